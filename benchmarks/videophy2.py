"""VideoPhy-2: the rater's two csv files become SA, PC and joint, with intervals.

    SA.csv, PC.csv --read_scores--> {videopath: score} each --join--> [Clip] --table--> Markdown

SA is semantic adherence, PC physical commonsense, 1 to 5 each (0: the rater's answer was not
understood). A clip passes one with 4 or more, and the joint is the share that passes both. The
files are joined by path, never by order; whatever is in one of them alone is an error.
"""
import csv
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.intervals import Z_95, bootstrap, mcnemar, wilson
from common import score
from common.files import join_some
from common.paths import read_lines
from config import UserError

PASS = 4  # the least score that passes
TASKS = ("SA", "PC")
HARD_NOTE = ("The hard subset is of prompts on which people gave CogVideoX-5B a joint of 0 by "
             "construction: a gain over it there is biased in favour of any other model.")


@dataclass(frozen=True)
class Clip:
    """A clip's scores."""
    path: str
    caption: str  # in one line; "" where the files have none
    sa: float
    pc: float

    @property
    def joint(self) -> bool:
        return min(self.sa, self.pc) >= PASS


# --- files --------------------------------------------------------------------------------------
def one_line(text: str) -> str:
    """A prompt as it is compared: spaces and ends of lines are all alike."""
    return " ".join(text.split())


def some(texts) -> str:
    """How many there are, and which are the first three, each in one line and at most 80 long."""
    texts = [one_line(text) for text in texts]
    shown = [text if len(text) <= 80 else f"...{text[-77:]}" for text in texts]
    return f"{len(texts)} ({join_some(shown, 3)})"


def read_table(path, *columns: str) -> list[dict]:
    """The rows of a csv file that has these columns, in any order and among others: pandas writes
    its index as a first one without a name. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            rows = list(table)
            names = table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} cannot be read as a csv file in UTF-8 ({reason}).") from None
    for name in columns:
        if names.count(name) != 1:
            raise UserError(f"{path} has {names.count(name)} columns {name!r} in its first line, "
                            "and one is needed.")
    uneven = [str(i) for i, row in enumerate(rows, 1) if None in row or None in row.values()]
    if uneven:
        raise UserError(f"{path}: rows with more or fewer cells than its first line: "
                        f"{some(uneven)}; are commas quoted?")
    return rows


def read_scores(path, task: str) -> dict[str, tuple[str, float]]:
    """{videopath: (caption, score)} of a csv file, sorted by path. The score is in the column of
    the task's name, as in people's files, which have both, else in `score`. Raises UserError."""
    rows = read_table(path, "videopath")
    if not rows:
        raise UserError(f"{path} has no rows.")
    column = task.lower() if task.lower() in rows[0] else "score"
    rows = read_table(path, column)
    found = {}
    twice, odd = [], []
    for row in rows:
        name = row["videopath"]
        try:
            value = float(row[column])
        except ValueError:
            value = math.nan
        if name in found:
            twice.append(name)
        if not 0 <= value <= 5:
            odd.append(name)
        found[name] = one_line(row.get("caption", "")), value
    for wrong, what in ((twice, "appear again in other rows"),
                        (odd, f"have a {column} that is no number from 0 to 5")):
        if wrong:
            raise UserError(f"{path}: videopaths that {what}: {some(wrong)}.")
    return dict(sorted(found.items()))


def read_clips(sa_path, pc_path) -> list[Clip]:
    """The clips of both files, sorted by path. Raises UserError."""
    sa = read_scores(sa_path, "SA")
    pc = read_scores(pc_path, "PC")
    for have, path, lack, other in ((sa, sa_path, pc, pc_path), (pc, pc_path, sa, sa_path)):
        alone = [name for name in have if name not in lack]
        if alone:
            raise UserError(f"{path} has videopaths that {other} lacks: {some(alone)}.")
    unlike = [name for name in sa if sa[name][0] and pc[name][0] and sa[name][0] != pc[name][0]]
    if unlike:
        raise UserError(f"{sa_path} and {pc_path} have other captions, and so are of other clips, of "
                        f"these videopaths: {some(unlike)}.")
    return [Clip(name, caption or pc[name][0], value, pc[name][1])
            for name, (caption, value) in sa.items()]


def only_hard(clips: list[Clip], path: str) -> tuple[list[Clip], str]:
    """The clips whose prompt or path a list names, and a sentence on what it names besides. Raises
    UserError where it names none of them."""
    if Path(path).suffix.lower() == ".csv":
        lines = [row["caption"] for row in read_table(path, "caption")]
    else:
        lines = read_lines("--hard", path)
    wanted = dict.fromkeys(map(one_line, lines))
    names = {clip: {clip.caption, one_line(clip.path)} for clip in clips}
    hard = [clip for clip in clips if names[clip] & wanted.keys()]
    if not hard:
        raise UserError(f"--hard {path} names no prompt and no path of these clips.")
    lost = wanted.keys() - set().union(*names.values())
    missing = [line for line in wanted if line in lost]
    return hard, f"Of {path} these have no clip here: {some(missing)}." if missing else ""


# --- one model ----------------------------------------------------------------------------------
def percent(hits: int, n: int) -> str:
    """A share and its interval."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def mean_score(values: list[float]) -> str:
    """The mean of the scores that were understood, and its normal interval."""
    values = [value for value in values if value > 0]
    if len(values) < 2:
        return str(*values)
    half = Z_95 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.2f} ± {half:.2f}"


def row_of(clips: list[Clip]) -> dict[str, str]:
    """A row of the table."""
    row = {"clips": str(len(clips))}
    for task in TASKS:
        values = [getattr(clip, task.lower()) for clip in clips]
        row[task] = mean_score(values)
        row[f"{task} >= {PASS}, %"] = percent(sum(value >= PASS for value in values), len(values))
    row["joint, %"] = percent(sum(clip.joint for clip in clips), len(clips))
    return row


def show(subsets: dict[str, list[Clip]]) -> None:
    """Print the table of {subset: clips}, all of them first, and what it rests on."""
    clips = subsets["all"]
    print(score.markdown({name: row_of(some) for name, some in subsets.items()}))
    zeros = [sum(getattr(clip, task.lower()) == 0 for clip in clips) for task in TASKS]
    print(f"Intervals of 95 %: Wilson's for shares. Not understood: {zeros[0]} answers on SA and "
          f"{zeros[1]} on PC; they pass nothing, and the means of 1 to 5 leave them out.")
    prompts = len({clip.caption for clip in clips} - {""})
    if 0 < prompts < len(clips):
        print(f"{len(clips)} clips of {prompts} prompts: clips of a prompt resemble each other, so "
              "these intervals are too narrow.")


# --- two models ---------------------------------------------------------------------------------
def by_prompt(clips: list[Clip], files: list[str]) -> dict[str, list[Clip]]:
    """{caption: its clips in order of path}. Raises UserError for clips without a caption."""
    found = defaultdict(list)
    for clip in clips:
        found[clip.caption].append(clip)
    if "" in found:
        raise UserError(f"{' and '.join(files)} have clips without a caption, by which models are "
                        f"compared: {some(clip.path for clip in found[''])}.")
    return found


def check_same_prompts(mine: dict, others: dict, files: list[str]) -> None:
    """Have two models as many clips of every prompt? Raises UserError."""
    unlike = [caption for caption in {**mine, **others}
              if len(mine.get(caption, ())) != len(others.get(caption, ()))]
    if unlike:
        raise UserError(f"{' and '.join(files)} have more or fewer clips than --videophy2 of these "
                        f"prompts: {some(unlike)}.")


def difference(pairs: list[list[tuple[Clip, Clip]]]) -> dict[str, str]:
    """A row on the joint of this model against the other's: pairs of clips, a list a prompt."""
    gains = [[mine.joint - theirs.joint for mine, theirs in some] for some in pairs]
    flat = sum(gains, [])
    low, high = bootstrap(gains)
    interval = f"({100 * low:+.1f} to {100 * high:+.1f})" if low < high else "(no spread, no interval)"
    gained, lost = flat.count(1), flat.count(-1)
    return {"clips": str(len(flat)),
            "joint minus the other's, points":
                f"{100 * statistics.fmean(flat):+.1f} {interval}",
            "only this one passes": str(gained), "only the other": str(lost),
            "McNemar's p": f"{mcnemar(gained, lost):.3g}"}


def compare(files: list[str], other: list[str], hard: str) -> None:
    """--videophy2: print a model's table and, if another one's files are given, the differences.
    hard: the list of the hard subset, or "". Raises UserError."""
    clips = read_clips(*files)
    subsets = {"all": clips}
    missing = ""
    if hard:
        subsets["hard"], missing = only_hard(clips, hard)
    if other:
        theirs = by_prompt(read_clips(*other), other)
        check_same_prompts(by_prompt(clips, files), theirs, other)

    show(subsets)
    if hard:
        print(HARD_NOTE, missing)
    if not other:
        return
    rival = {mine: one for caption, some in by_prompt(clips, files).items()
             for mine, one in zip(some, theirs[caption])}
    rows = {}
    for name, chosen in subsets.items():
        prompts = by_prompt(chosen, files).values()
        rows[name] = difference([[(clip, rival[clip]) for clip in some] for some in prompts])
    print(f"\nAgainst {' and '.join(other)}, prompt by prompt\n{score.markdown(rows)}")
    print("Interval: a bootstrap over prompts. McNemar's p is exact, of clips as if independent.")
