"""What annotations say of the videos in a folder: captions, categories, and which files are there.

Captions come from `--annotations FILE`, else from the first of captions.json, captions.jsonl and
captions.csv in the folder, else from a .txt beside each video. Records are named by FILE_FIELDS and
CAPTIONS below; WISA's have categories too. What cannot be used is skipped, counted and named.
"""
import collections
import concurrent.futures
import csv
import functools
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import bounded_map, join_some
from common.video import Cut, Window, lost_windows, reason_of, windows_of
from config import UserError
from physics import CATEGORIES

HELD_SHARE = 0.05  # of a folder's videos
BLOCK = 2**16  # bytes of a file that are read to know it again
OTHER_SLOTS = (
    "no obvious dynamic phenomenon", "no obvious thermodynamic phenomenon",
    "no obvious optical phenomenon", "camera motion yes", "camera motion no",
    "liquids objects appearance", "solid objects appearance", "gas objects appearance",
    "object decomposition and splitting", "mixing of multiple objects", "object disappearance",
    "no change")
CAPTIONS = {  # fields of a record, the first with text counts
    "long": ("en_caption", "caption", "captions", "text"),
    "short": ("en_caption_1", "caption", "captions", "text")}
CAPTION_FIELDS = {field for fields in CAPTIONS.values() for field in fields}
FILE_FIELDS = ("file", "video_path", "video_id", "file_name", "video")
ENDINGS = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".flv",
           ".wmv", ".ogv")  # of videos; a bare id may lack them
EXPECTED = ("expected are {file: caption} or a list of WISA records as JSON, a record a line "
            "(.jsonl), a table whose first line names the columns file and caption (.csv), or a "
            ".txt beside each video")


@dataclass
class Video:
    """A file that the annotations name."""
    name: str  # as the annotations write it
    path: Path
    caption: str
    categories: list[int]  # of all 29

    def identity(self) -> list:
        """What tells this video, in this state, from all others. Raises OSError.

        Not its bytes: a run that is started again would read terabytes to learn that nothing has
        changed. The price: a copy that was made without its times counts as another video.
        """
        stat = os.stat(self.path)
        return [self.name, stat.st_size, stat.st_mtime_ns, self.caption, self.categories]

    @functools.cached_property
    def content(self) -> str:
        """What tells the file's content from that of most others: its size, and a hash of three
        blocks of it. Neither its name nor its times, and not all of its bytes. Raises OSError."""
        size = os.path.getsize(self.path)
        found = hashlib.sha256(str(size).encode())
        with open(self.path, "rb") as file:
            for start in (0, size // 2, max(0, size - BLOCK)):
                file.seek(start)
                found.update(file.read(BLOCK))
        return found.hexdigest()[:24]


# --- annotations --------------------------------------------------------------------------------
def normalise_label(label: str) -> str:
    """A label without case, numbers, punctuation and plural s, which WISA's annotators vary."""
    return " ".join(word.removesuffix("s") for word in re.findall(r"[a-z]+", label.lower()))


LABELS = {normalise_label(name): i for i, name in enumerate((*CATEGORIES, *OTHER_SLOTS))}


def parse_labels(record: dict) -> tuple[list[int], list[str]]:
    """Categories in the answers q0 ... q4 of a WISA record, and the names that match none of them
    as a whole.

    An answer is a list in disguise: parts end at commas, semicolons, lines and item numbers.
    """
    known, unknown = [], []
    for question in ("q0", "q1", "q2", "q3", "q4"):
        answer = record.get(question) or ""
        answer = "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        for part in re.split(r"[,;\n]|\b\d+[.)]", answer):
            label = normalise_label(part)
            if question == "q3" and label:  # whose answers are a bare yes or no
                label = normalise_label(f"camera motion {part}")
            if label in LABELS:
                known.append(LABELS[label])
            elif label:
                unknown.append(" ".join(part.split()))
    return sorted(set(known)), unknown


def first_text(record: dict, fields: Iterable[str]) -> str:
    """The first of these fields that holds text, else ""."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def split_by_video(names: list[str], val_clips: int) -> tuple[list[int], list[int], str]:
    """Rows to train on, rows held out, and a summary. names: the video that each row is of.

    One in twenty videos (not clips) is held out, chosen by a hash of its name: runs of every seed
    are validated on the same, and adding videos moves few from one side to the other.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    hashed = lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest()
    by_hash = sorted(rows, key=hashed)
    summary = f"{len(names)} clips from {len(rows)} videos"
    chosen = by_hash[:max(1, round(HELD_SHARE * len(rows)))]
    held = [row for name in chosen for row in rows.pop(name)]
    train = [row for left in rows.values() for row in left]
    if not train:
        alone = "(a single one, so it is validated on its own training clips)"
        return held, held[:val_clips], f"{summary} {alone}"
    held = held[:val_clips]
    return train, held, f"{summary}, {len(held)} of {len(names)} held out"


def read_records(file: Path) -> list:
    """An annotation file as a list of records. Raises UserError that says what is expected."""
    suffix = file.suffix.lower()
    kind = "CSV" if suffix == ".csv" else "JSON"
    try:
        text = file.read_text(encoding="utf-8-sig")
        if suffix == ".csv":
            return read_table(text)
        if suffix == ".jsonl":
            # Split at the one end of line that JSON lines have: others may stand in a caption.
            data = []
            for number, line in enumerate(text.split("\n"), 1):
                kind = f"JSON in line {number}"
                data += [json.loads(line)] if line.strip() else []
        else:
            data = json.loads(text)
    except FileNotFoundError:
        raise UserError(f"There is no {file} (or give --annotations FILE): {EXPECTED}.") from None
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}): {EXPECTED}.") from None
    except csv.Error as e:
        raise UserError(f"{file} is not CSV ({e}): {EXPECTED}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not {kind} in UTF-8: {EXPECTED}.") from None
    if isinstance(data, dict):
        if isinstance(data.get("data"), list):
            data = data["data"]
        elif not data or any(isinstance(caption, str) for caption in data.values()):
            data = [{"file": name, "caption": caption} for name, caption in data.items()]
    if not isinstance(data, list) or data and not any(isinstance(r, dict) for r in data):
        raise UserError(f"{file} has another shape: {EXPECTED}.")
    return data


def read_table(text: str) -> list[dict]:
    """The rows of a table by the names in its first line. Raises csv.Error."""
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)  # a spreadsheet's depends on its country
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = [name.strip().lower() for name in rows.fieldnames or ()]
    has = set(names)
    if has.isdisjoint(FILE_FIELDS) or has.isdisjoint(CAPTION_FIELDS) or len(has) < len(names):
        raise csv.Error("its first line does not name each column once, with a file and a caption")
    rows.fieldnames = names
    return list(rows)


class Folder:
    """The videos of a folder that its annotations name."""

    def __init__(self, folder, annotations: str = "", captions: str = "long",
                 phys_law: bool = False):
        """Reads the annotations; no video. Raises UserError where they are missing or odd.

        captions: the long or the short one of a WISA record. phys_law: with the record's field of
        that name behind it, where it has one, as WISA's own loader prompts (how it joins the two is
        not on record; a space is ours).
        """
        self.dir = Path(folder)
        self.caption_fields = CAPTIONS[captions]
        self.phys_law = phys_law
        self.skipped: list[str] = []  # "name (reason)"
        self.partial: list[str] = []  # likewise, of those that lost some windows
        self.hdr: list[str] = []  # names of videos of high dynamic range
        self.unknown = collections.Counter()  # category names that match none
        self.videos: dict[Path, Video] = {}
        if not self.dir.is_dir():
            raise UserError(f"There is no folder of videos {self.dir}.")
        files = [self.dir / f"captions{ending}" for ending in (".json", ".jsonl", ".csv")]
        file = Path(annotations) if annotations else next(filter(Path.exists, files), None)
        records = read_records(file) if file else self.texts() or read_records(files[0])
        for i, record in enumerate(records):
            self.add_record(record, f"record {i + 1}")

    @functools.cached_property
    def files(self) -> list[Path]:
        """Every file in the folder and in those inside it, by its path from there."""
        files = (Path(at, name) for at, _, names in os.walk(self.dir) for name in names)
        return sorted(file.relative_to(self.dir) for file in files)

    @functools.cached_property
    def spellings(self) -> dict[str, list[Path]]:
        """The files by their names in one spelling."""
        spelt = collections.defaultdict(list)
        for file in self.files:
            spelt[one_spelling(str(file))].append(file)
        return spelt

    def texts(self) -> list[dict]:
        """A record for each video where some have a .txt beside them, else none."""
        videos = [file for file in self.files if file.suffix.lower() in ENDINGS]
        texts = {file: "" for file in self.files if file.suffix == ".txt"}
        alone = texts.keys() - {video.with_suffix(".txt") for video in videos}
        if len(alone) == len(texts):
            return []
        self.skipped += [f"{text} (no video beside it)" for text in sorted(alone)]
        for text in texts:
            try:
                texts[text] = (self.dir / text).read_text(encoding="utf-8-sig")
            except (OSError, ValueError):
                raise UserError(f"{self.dir / text} is not a text in UTF-8.") from None
        return [{"file": str(video), "caption": texts.get(video.with_suffix(".txt"))}
                for video in videos]

    def find(self, names: list[str]) -> tuple[Path | None, str]:
        """The first file that is there under one of these names, or why there is none.

        A bare id may lack its suffix. A name that other systems spell in another way (backslashes,
        accents in one or two characters, .MP4) is found where a single file is meant.
        """
        wanted = [name + ending for name in names for ending in ("", *ENDINGS)]
        paths = (self.dir / os.path.normpath(name) for name in wanted)
        found = next(filter(os.path.isfile, paths), None)
        if found or not wanted:
            return found, ""
        alike = (self.spellings.get(one_spelling(name)) for name in wanted)
        files = next(filter(None, alike), [])
        if len(files) == 1:
            return self.dir / files[0], ""
        return None, f"missing; {len(files)} files are spelt like it" if files else "missing"

    def add_record(self, record, label: str) -> None:
        """Note the record's video, or why there is none."""
        if not isinstance(record, dict):
            self.skipped.append(f"{label} (not an object)")
            return
        inner = record.get("physical_annotation")
        if isinstance(inner, dict):
            record = {**inner, **record}

        # Several fields may name the file; the first that is there counts. A path may not leave the
        # folder.
        ids = (record.get(field) for field in FILE_FIELDS)
        names = [str(name) for name in ids if isinstance(name, str | int) and name != ""]
        inside = list(filter(stays_inside, names))
        found, absent = self.find(inside)
        caption = first_text(record, self.caption_fields)
        if caption and self.phys_law:
            caption = f"{caption} {first_text(record, ['phys_law'])}".strip()

        # Why the record cannot be used: the first reason that holds.
        reasons = [
            (None in record, "more cells than columns, are its commas quoted?"),
            (not names, "names no file"),
            (not caption, "no caption"),
            (not inside, "outside the folder"),
            (not found, absent),
            (found in self.videos, "named twice"),
        ]
        for holds, reason in reasons:
            if holds:
                self.skipped.append(f"{names[0] if names else label} ({reason})")
                return
        categories, unknown = parse_labels(record)
        self.unknown.update(unknown)
        self.videos[found] = Video(names[0], found, caption, categories)

    def read(self, cut: Cut, threads: int, videos: list[Video] | None = None
             ) -> Iterator[tuple[Video, list[Window]]]:
        """Each of these videos (None: all) with its windows, decoded by so many threads.

        A video without any is noted in `skipped`, one that lost some in `partial`, with the reason.
        """
        def attempt(video: Video):
            try:
                windows = windows_of(video.path, cut)
                return video, windows, lost_windows(windows)
            except Exception as e:  # whatever decoders make of a bad file concerns that file alone
                return video, [], reason_of(e)

        wanted = list(self.videos.values()) if videos is None else videos
        # Threads are enough, because decoders work without Python's lock.
        with concurrent.futures.ThreadPoolExecutor(threads) as executor:
            for video, windows, reason in bounded_map(executor, attempt, wanted, group=threads):
                if reason:
                    noted = self.partial if windows else self.skipped
                    noted.append(f"{video.name} ({reason})")
                if windows and windows[0].hdr:
                    self.hdr.append(video.name)
                yield video, windows

    def skipped_sentence(self) -> str:
        """What a summary says of the files that were skipped, or whose colours are not right."""
        said = f"; skipped {len(self.skipped)}: {join_some(self.skipped)}" if self.skipped else ""
        if self.partial:
            said += f"; {len(self.partial)} used in part: {join_some(self.partial)}"
        if self.hdr:
            said += f"; {len(self.hdr)} in HDR, read without its curve: {join_some(self.hdr)}"
        return said

    def unknown_labels(self) -> str:
        """What a summary says of category names that match none."""
        names = join_some(f"{name!r} ({count})" for name, count in self.unknown.most_common())
        return f"; {len(self.unknown)} unknown category names: {names}" if self.unknown else ""


def stays_inside(name: str) -> bool:
    """Does a name, as a path, stay in the folder that it is looked for in?"""
    path = os.path.normpath(name)
    return not os.path.isabs(path) and path.split(os.sep)[0] != ".."


def one_spelling(name: str) -> str:
    """A path as all systems can agree on: slashes, composed accents, a suffix in small letters."""
    stem, suffix = os.path.splitext(os.path.normpath(name.replace("\\", "/")))
    return unicodedata.normalize("NFC", stem) + suffix.lower()
