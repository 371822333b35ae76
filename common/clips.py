"""A folder of clips for other people's raters: a file of prompts in; out come an mp4 a clip, and tables.

    DIR/a-red-ball-falls-1f2e3d4c5b6a-0.mp4    clip 0 of a prompt
    DIR/clips.csv        caption,videopath,prompt,seed,index; VideoPhy-2's rater takes the first two
                         by their names and passes the others on, so one table is enough
    DIR/prompts.json     {file name: caption}, as VBench reads it beside videos of one's own
    DIR/settings.json    what the clips depend on beside their prompts

What a rater is asked about is the caption, also where the model was given a longer prompt. A clip
that has its file is not made again: what was killed is started again. Nothing here imports torch.
"""
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import digest, handle_of, lock, read_json, take, whole_file, write_text
from common.paths import check_writable, no_trace, read_lines, read_text
from common.pictures import save
from config import Stopped, UserError, rank

MOST_BYTES = 230  # of a caption: a file name has 255, and some more while it is written
MOST_LETTERS = 40  # of a caption in a file name; in other scripts one takes up to four bytes


@dataclass(frozen=True)
class Wanted:
    """A clip to make."""
    caption: str  # what a rater is asked about
    prompt: str  # what the model is given
    index: int  # of the prompt's clips
    name: str  # of its file


# --- prompts ------------------------------------------------------------------------------------
def read_prompts(path: str, column: str) -> list[tuple[str, str]]:
    """(caption, prompt) of each row of a .csv, whose first row names its columns: the prompt is in
    `column`, the caption in the one of that name, else it is the prompt. Of any other file each
    line that is not empty is both. Raises UserError.
    """
    flag = f"--prompts {path}"
    if not path.lower().endswith(".csv"):
        found = [(line, line) for line in read_lines("--prompts", path)]
    else:
        # Strict, for a quote that nobody closed would swallow all rows after it.
        rows = csv.DictReader(io.StringIO(read_text("--prompts", path)), strict=True)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise UserError(f"{flag} has two columns of one name: {', '.join(names)}.")
            if names and column not in names:
                raise UserError(f"{flag} has no column {column!r}; there are {', '.join(names)}: "
                                "--column says which one to sample from.")
            found = [pair_of(row, column, f"{flag}, line {rows.line_num}") for row in rows]
        except csv.Error as e:
            raise UserError(f"{flag} is no csv after line {rows.line_num} ({e}).") from None
    if not found:
        raise UserError(f"{flag} holds no prompt.")
    return found


def pair_of(row: dict, column: str, where: str) -> tuple[str, str]:
    """(caption, prompt) of a row. Raises UserError, which says where it stands."""
    if None in row:
        raise UserError(f"{where}, has more cells than there are columns: quote those with a comma.")
    for name in sorted({"caption", column}):
        if name in row and not (row[name] or "").strip():
            raise UserError(f"{where}, has nothing in column {name!r}.")
    return row.get("caption", row[column]), row[column]


# --- names --------------------------------------------------------------------------------------
def wanted(prompts: list[tuple[str, str]], n: int, names: str) -> list[Wanted]:
    """Clips 0 ... n - 1 of each different (caption, prompt). names: readable | vbench. Raises UserError
    for a caption that cannot be a file's name."""
    # A command line may hold half a character, which no table does.
    different = dict.fromkeys(tuple(text.encode("utf-8", "replace").decode() for text in pair)
                              for pair in prompts)
    if len(different) < len(prompts):
        print(f"{len(prompts) - len(different)} of {len(prompts)} prompts repeat others, and are "
              "sampled once.")
    name_of = suite_name if names == "vbench" else readable_name
    found = [Wanted(*pair, i, f"{name_of(*pair)}-{i}.mp4")
             for pair in different for i in range(n)]
    owners = {}
    for one in found:
        if owners.setdefault(one.name, one) is not one:
            raise UserError(f"--names vbench: two prompts have the caption {one.caption!r}, and their "
                            "clips would have one name; leave --names out.")
    return found


def readable_name(caption: str, prompt: str) -> str:
    """The caption's first letters and digits, of any script, and a hash of all of it: safe on any
    disk, unique, and the same whatever else is asked for."""
    start = re.sub(r"\W+", "-", caption.lower())[:MOST_LETTERS].strip("-")
    return f"{start or 'clip'}-{digest([caption, prompt])[:12]}"


def suite_name(caption: str, prompt: str) -> str:
    """The caption, as in VBench's own list of prompts. Raises UserError where that is no name."""
    if re.search(r"[/\x00-\x1f]", caption) or len(caption.encode()) > MOST_BYTES:
        raise UserError(f"--names vbench: {caption[:60]!r} cannot be a file's name: it has a slash or a "
                        f"line's end in it, or more than {MOST_BYTES} bytes; leave --names out.")
    return caption


# --- the folder ---------------------------------------------------------------------------------
@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """A folder to fill, made if need be; no other process fills it meanwhile, but for those that
    torchrun started with this one. Raises UserError."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    check_writable(folder / "clips.csv")
    number, processes = rank()
    refusal = f"Another process fills {folder}: wait for it, or give another --out."
    own = folder / f".{number + 1}of{processes}.lock"
    with no_trace(new), contextlib.ExitStack() as locks:
        # One process holds the folder alone; several hold it together, and each a file of its own.
        handle = locks.enter_context(handle_of(folder))
        if take(handle, shared=processes > 1) is False:
            raise UserError(refusal)
        if processes == 1:
            for part in folder.glob("*.mp4.*.part"):  # left by one that was killed
                part.unlink()
        else:
            own.touch()
            locks.callback(own.unlink, missing_ok=True)
            locks.enter_context(lock(own, refusal))
        yield


def check_settings(folder: Path, settings: dict) -> None:
    """Were the clips that are there made with these settings? Raises UserError with the first that
    is another."""
    path = folder / "settings.json"
    before = read_json(path) if path.exists() else {}
    for name, value in before.items():
        if settings.get(name, value) != value:
            raise UserError(f"The clips in {folder} were made with {name} {value!r}, not "
                            f"{settings[name]!r}: go on with that, or give another --out.")


def without_file(folder: Path, clips: list[Wanted]) -> list[Wanted]:
    """Those of this process that are still to be made, and says how many are not."""
    number, processes = rank()
    clips = clips[number::processes]
    left = [clip for clip in clips if not (folder / clip.name).exists()]
    print(f"{len(clips)} clips, {len(clips) - len(left)} of them are in {folder} already.")
    return left


@contextlib.contextmanager
def written(folder: Path) -> Iterator[None]:
    """An error of the disk while a table is written becomes a sentence: raises Stopped."""
    try:
        yield
    except OSError as e:
        raise Stopped(f"{folder} could not be written to ({e.strerror or e}).") from None


def fill(folder: Path, clips: list[Wanted], made: Iterable[tuple[np.ndarray, Wanted]], fps: float,
         settings: dict) -> None:
    """Write settings.json, then each clip as soon as it is made, frames uint8 (F, H, W, 3), at last
    the tables: of those clips that are there, also when something stops this. Raises Stopped where
    a file cannot be written."""
    with written(folder):
        write_text(folder / "settings.json", json.dumps(settings, indent=1))
    try:
        for frames, clip in made:
            save(folder / clip.name, frames, fps)
    finally:
        # Processes that share the work may end together. The one that writes last looks again
        # afterwards, so what stays lacks nothing that was there by then.
        there = None
        with written(folder):
            while there != (now := [clip for clip in clips if (folder / clip.name).exists()]):
                there = now
                write_tables(folder, there, settings["seed"])


def write_tables(folder: Path, clips: list[Wanted], seed: int) -> None:
    """clips.csv and prompts.json. Paths are whole ones, for a rater is started elsewhere. Raises
    OSError."""
    at = folder.resolve()
    write_text(folder / "prompts.json", json.dumps({clip.name: clip.caption for clip in clips}, indent=1))
    # A folder's name may hold bytes that are no UTF-8, and has them in the table, too.
    with (whole_file(folder / "clips.csv") as part,
          open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as file):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("caption", "videopath", "prompt", "seed", "index"))
        table.writerows((clip.caption, at / clip.name, clip.prompt, seed, clip.index)
                        for clip in clips)
