"""A local judge: a Qwen-VL rates clips as VideoPhy-2's rater does, but it is not that rater.

    folder with clips.csv (caption, videopath) --two questions a clip--> judge_sa.csv, judge_pc.csv

Both have the rater's columns (caption, videopath, score), so `--videophy2` reads them, and one more
that says which judge saw which file: rows of which that is still true are not judged again. The
questions are our own. An answer is read strictly: one that holds anything but one number from 1 to
5 is 0, not understood.
"""
import csv
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.intervals import correlations
from benchmarks.videophy2 import (
    PASS, TASKS, percent, read_clips, read_scores, read_table, show, some)
from common import score
from common.annotations import Video
from common.files import digest, lock, whole_file
from common.libraries import fingerprint
from common.paths import check_writable
from common.run import pick_device, pick_precision
from common.video import reason_of, timeline
from config import Stopped, UserError
from vlm import maps, qwen

QUESTIONS = {
    "SA": ("This video was made from a description: {caption}\n"
           "How well does the video show what the description says: the things, what they do, and "
           "how they meet? Answer with one whole number from 1 (nothing of it) to 5 (all of it)."),
    "PC": ("Could what happens in this video happen in the real world, whatever it shows: do "
           "things fall, collide, flow, keep their shape and stay there as real ones do? Answer "
           "with one whole number from 1 (impossible) to 5 (entirely possible).")}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER = re.compile(rf"-?\d(?:[\w.,/]*\w)?|\b(?:{'|'.join(DIGITS)})\b")
WORDS = 16  # tokens of an answer, at most
FRAMES = 33  # shown of a clip, evenly over all of it; the rater takes 32
PIXELS = 350_000  # of a frame, at most
COLUMNS = ("caption", "videopath", "score", "judged")
NOTE = ("These scores are a local VLM's, not those of VideoPhy-2's rater: do not set them beside "
        "published figures.")


def read_answer(text: str) -> int:
    """1 to 5 if exactly one number stands in an answer, and it is one of these; else 0."""
    numbers = NUMBER.findall(text.lower())
    scores = [n for n in range(1, 6) if numbers in ([str(n)], [DIGITS[n]])]
    return sum(scores)


# --- files --------------------------------------------------------------------------------------
def output(folder: Path, task: str) -> Path:
    """Where the scores of a task are written."""
    return folder / f"judge_{task.lower()}.csv"


def find_clip(name: str, folder: Path) -> Path | None:
    """The file of a videopath, from here, from the list's folder, or by its bare name in it."""
    places = (Path(name), folder / name, folder / Path(name).name)
    return next((path for path in places if path.is_file()), None)


def read_judged(folder: Path) -> dict[str, list[dict]]:
    """{videopath: its rows in both files} of what was judged before. Raises UserError."""
    files = [output(folder, task) for task in TASKS]
    if not all(path.is_file() for path in files):
        return {}
    sa, pc = ({row["videopath"]: row for row in read_table(path, *COLUMNS)} for path in files)
    return {name: [sa[name], pc[name]] for name in sa if name in pc}


def write_judged(folder: Path, judged: dict[str, list[dict]]) -> None:
    """Both files, each whole or as it was. Raises Stopped."""
    for task, rows in zip(TASKS, zip(*judged.values())):
        path = output(folder, task)
        try:
            with whole_file(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                table.writerows(rows)
        except OSError as e:
            raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None


# --- judging ------------------------------------------------------------------------------------
def ask(vlm, path: Path, caption: str) -> list[str]:
    """The VLM's greedy answers to both questions about a clip. Raises VLMError, Stopped, and what
    decoders raise."""
    times, end, _ = timeline(path)
    fps = FRAMES / (end - times[0])
    window, = maps.windows_for_vlm(path, vlm, FRAMES, fps, 1, PIXELS)
    with qwen.full_memory_as_sentence(vlm, [window.video], len(TASKS)):
        prefilled = vlm.prefill([window.video], fps)
        questions = [QUESTIONS[task].replace("{caption}", caption) for task in TASKS]
        suffixes = [vlm.prompt(question, prefilled.grid, fps)[1] for question in questions]
        said = vlm.answer(prefilled, [0] * len(TASKS), suffixes, WORDS)
    return [vlm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]


def judge_clips(rows: list[dict], folder: Path, vlm_dir: str, device: str) -> list[str]:
    """Judge the rows {caption, videopath} whose clip this judge has not seen; the files are written
    after each. Returns those that could not be, with the reason. Raises UserError, Stopped."""
    device = pick_device(device)
    precision = pick_precision("auto", device)
    who = digest([QUESTIONS, WORDS, FRAMES, PIXELS, precision, fingerprint(Path(vlm_dir))])[:16]

    # What is still true of what was judged before.
    before = read_judged(folder)
    judged, todo, skipped = {}, [], []
    for row in rows:
        name = row["videopath"]
        path = find_clip(name, folder)
        if not path:
            skipped.append(f"{name} (missing)")
            continue
        row["judged"] = f"{who} {Video(name, path, '', []).content}"
        old = before.get(name)
        if old and all(row.items() <= one.items() for one in old):
            judged[name] = old
        else:
            todo.append((row, path))
    print(f"{len(judged)} clips as judged before, {len(todo)} to judge.")

    # The others, one by one.
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vlm = qwen.VLM.from_folder(vlm_dir, device, dtype) if todo else None
    for row, path in tqdm(todo, desc="judging", unit="clip"):
        try:
            answers = ask(vlm, path, row["caption"])
        except Stopped:
            raise
        except Exception as e:  # a bad file, or a caption that is no prompt, concerns itself alone
            skipped.append(f"{row['videopath']} ({reason_of(e)})")
            continue
        scores = map(read_answer, answers)
        judged[row["videopath"]] = [row | {"score": f"{one:.1f}"} for one in scores]
        write_judged(folder, judged)
    if not judged:
        raise UserError(f"No clip could be judged: {some(skipped)}.")
    write_judged(folder, judged)  # without rows that the list has no more
    return skipped


def rate(vlm_dir: str, clips_dir: str, agree: list[str], device: str) -> None:
    """--judge: write the scores, print their table and, if files of other scores are given, how far
    these agree. Raises UserError, Stopped."""
    if not Path(vlm_dir).is_dir():
        raise UserError(f"There is no VLM in {vlm_dir}: --judge takes the folder of a Qwen-VL.")
    others = list(map(read_scores, agree, TASKS))
    listed = Path(clips_dir)
    if not listed.is_file():
        listed /= "clips.csv"  # as sample.py calls it
    folder = listed.parent
    table = read_table(listed, "caption", "videopath")
    if not table:
        raise UserError(f"{listed} has no rows.")
    rows = [{name: row[name] for name in COLUMNS[:2]} for row in table]
    check_writable(output(folder, TASKS[0]))
    with lock(folder, f"Another process judges in {folder}."):
        skipped = judge_clips(rows, folder, vlm_dir, device)
    if skipped:
        print(f"Skipped: {some(skipped)}.")

    files = [output(folder, task) for task in TASKS]
    show({"all": read_clips(*files)})
    print(f"{NOTE} They are in {files[0]} and {files[1].name}.")
    if others:
        rows = {task: agreement(read_scores(path, task), theirs)
                for task, path, theirs in zip(TASKS, files, others)}
        print(f"\nAgreement with {' and '.join(agree)}\n{score.markdown(rows)}")


def agreement(mine: dict, theirs: dict) -> dict[str, str]:
    """A row: how far two raters agree on the clips that both have. Scores of 0, not understood, do
    not pass and are in no correlation. Raises UserError where no clip is in both."""
    both = [(mine[name][1], theirs[name][1]) for name in mine if name in theirs]
    if not both:
        raise UserError("--agree has no videopath of these clips.")
    right = sum((a >= PASS) == (b >= PASS) for a, b in both)
    understood = [pair for pair in both if min(pair) > 0]
    found = correlations([a for a, _ in understood], [b for _, b in understood])
    shown = ["none" if math.isnan(value) else f"{value:.3f}" for value in found]
    return {"clips": str(len(both)), "understood by both": str(len(understood)),
            "Pearson": shown[0], "Spearman": shown[1],
            "same side of passing, %": percent(right, len(both))}
