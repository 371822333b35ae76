"""Videos: what annotations say of them, which clips are cut from them, and how they are decoded.

*Time*: a clip's k-th frame is the one shown k/fps seconds after its start. Time stamps count,
within a millisecond, so variable frame rates work. A video is cut into consecutive windows of
`frames` such frames; if there are more than `windows` of them, that many are taken, evenly spread.
A shorter video is skipped. *Space*: a frame is turned as the file says, then its largest centred
rectangle of the wanted shape is resized with antialiasing. *Colour*: 8-bit RGB; alpha is dropped.
*Bad files* are skipped, counted and named; of a file that is damaged halfway those windows are used
that decode.

Captions come from `--annotations FILE`, else from captions.json in the folder: {file: caption}, or
a list of WISA's records. Left out on purpose: sound, mirroring, non-square pixels.
"""
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import bounded_map, join_some
from config import UserError
from physics import CATEGORIES

HELD_SHARE = 0.05  # of a folder's videos
TOLERANCE = 1e-3  # seconds: some containers round time stamps to it
SEEK_FROM = 10.0  # seconds ahead: jump; nearer frames are decoded through
OTHER_SLOTS = (
    "no obvious dynamic phenomenon", "no obvious thermodynamic phenomenon",
    "no obvious optical phenomenon", "camera motion yes", "camera motion no",
    "liquids objects appearance", "solid objects appearance", "gas objects appearance",
    "object decomposition and splitting", "mixing of multiple objects", "object disappearance",
    "no change")
CAPTIONS = {  # fields of a record, the first with text counts
    "long": ("en_caption", "caption", "captions"),
    "short": ("en_caption_1", "caption", "captions")}
ENDINGS = ("", ".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")  # that a bare id may lack


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


@dataclass(frozen=True)
class Cut:
    """How clips are cut from videos."""
    frames: int  # of a clip
    fps: float  # frames a second
    windows: int  # clips from one video at most
    height: int  # of a clip, in pixels
    width: int


@dataclass
class Window:
    """A clip, and where in its video it was: maps made later from the file find the same pixels."""
    video: np.ndarray  # (F, H, W, 3) uint8
    number: int  # of the windows taken from its video, which are `taken`
    taken: int
    start: float  # seconds on the file's own clock; frame k is the one shown at start + k / fps
    size: tuple[int, int]  # height and width of the upright source
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels


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
    expected = "a JSON object {file: caption} or a list of WISA records is expected"
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"There is no {file} (or give --annotations FILE): {expected}.") from None
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}): {expected}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not JSON: {expected}.") from None
    if isinstance(data, dict):
        if isinstance(data.get("data"), list):
            data = data["data"]
        elif not data or any(isinstance(caption, str) for caption in data.values()):
            data = [{"file": name, "caption": caption} for name, caption in data.items()]
    if not isinstance(data, list) or data and not any(isinstance(r, dict) for r in data):
        raise UserError(f"{file} has another shape: {expected}.")
    return data


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
        self.unknown = collections.Counter()  # category names that match none
        self.videos: dict[Path, Video] = {}
        if not self.dir.is_dir():
            raise UserError(f"There is no folder of videos {self.dir}.")
        file = Path(annotations) if annotations else self.dir / "captions.json"
        for i, record in enumerate(read_records(file)):
            self.add_record(record, f"record {i + 1}")

    def add_record(self, record, label: str) -> None:
        """Note the record's video, or why there is none."""
        if not isinstance(record, dict):
            self.skipped.append(f"{label} (not an object)")
            return
        inner = record.get("physical_annotation")
        if isinstance(inner, dict):
            record = {**inner, **record}

        # Several fields may name the file; the first that is there counts. A bare id may lack its
        # suffix, and a path may not leave the folder.
        ids = (record.get(field) for field in ("file", "video_path", "video_id"))
        names = [str(name) for name in ids if isinstance(name, str | int) and name != ""]
        inside = list(filter(stays_inside, names))
        paths = (self.dir / os.path.normpath(name + ending)
                 for name in inside for ending in ENDINGS)
        found = next(filter(os.path.isfile, paths), None)
        caption = first_text(record, self.caption_fields)
        if caption and self.phys_law:
            caption = f"{caption} {first_text(record, ['phys_law'])}".strip()

        # Why the record cannot be used: the first reason that holds.
        reasons = [
            (not names, "names no file"),
            (not caption, "no caption"),
            (not inside, "outside the folder"),
            (not found, "missing"),
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

        A video without any is noted in `skipped`, with the reason.
        """
        def attempt(video: Video):
            try:
                return video, windows_of(video.path, cut), ""
            except Exception as e:  # whatever decoders make of a bad file concerns that file alone
                return video, [], reason_of(e)

        wanted = list(self.videos.values()) if videos is None else videos
        # Threads are enough, because decoders work without Python's lock.
        with concurrent.futures.ThreadPoolExecutor(threads) as executor:
            for video, windows, reason in bounded_map(executor, attempt, wanted, group=threads):
                if reason:
                    self.skipped.append(f"{video.name} ({reason})")
                yield video, windows

    def skipped_sentence(self) -> str:
        """What a summary says of the files that were skipped."""
        names = join_some(self.skipped)
        return f"; skipped {len(self.skipped)}: {names}" if self.skipped else ""

    def unknown_labels(self) -> str:
        """What a summary says of category names that match none."""
        names = join_some(f"{name!r} ({count})" for name, count in self.unknown.most_common())
        return f"; {len(self.unknown)} unknown category names: {names}" if self.unknown else ""


def stays_inside(name: str) -> bool:
    """Does a name, as a path, stay in the folder that it is looked for in?"""
    path = os.path.normpath(name)
    return not os.path.isabs(path) and path.split(os.sep)[0] != ".."


def reason_of(error: Exception) -> str:
    """What a decoder's error says, in a few words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


# --- windows and decoding -----------------------------------------------------------------------
def windows_of(path: Path, cut: Cut) -> list[Window]:
    """The clips of one video by the rules at the top; never more than those in memory.

    Raises ValueError with the reason when there is none, or what the decoder raises.
    """
    times, end = timeline(path)
    n = int(np.ceil((end - times[0] - TOLERANCE) * cut.fps)) // cut.frames
    if n < 1:
        length = f"{end - times[0]:.2g} s of {cut.frames / cut.fps:.2g} s"
        raise ValueError(f"too short, {length}")
    taken = min(n, cut.windows)
    found = []
    with av.open(str(path)) as container:
        player = Player(container, times, end)
        for number in range(taken):
            window = (2 * number + 1) * n // (2 * taken)  # the middles of `taken` equal parts
            shown = times[0] + (window * cut.frames + np.arange(cut.frames)) / cut.fps
            pictures = [player.picture(t, cut.height, cut.width) for t in shown]
            if all(picture is not None for picture in pictures):
                size = upright_size(player.now)
                crop = central_crop(*size, cut.height, cut.width)
                found.append(Window(np.stack(pictures), number, taken, float(shown[0]), size, crop))
    if not found:
        raise ValueError("damaged, no window decodes")
    return found


def timeline(path: Path) -> tuple[np.ndarray, float]:
    """When each frame is shown and when the last one ends, in seconds.

    Read from the packets alone: nothing is decoded, so hours of video cost seconds, and unlike the
    file's header it is also true of a truncated file. Raises ValueError without any.
    """
    if not path.stat().st_size:
        raise ValueError("empty file")
    shown = []  # (start, duration) of each packet
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no picture in it")
        stream = container.streams.video[0]
        unit = stream.time_base
        with contextlib.suppress(av.FFmpegError):  # damage ends the timeline
            for packet in container.demux(stream):
                start = packet.pts if packet.pts is not None else packet.dts
                if start is not None and packet.size and not packet.is_discard:
                    shown.append((float(start * unit), float((packet.duration or 0) * unit)))
    if not shown:
        raise ValueError("no frames with time stamps")
    times, durations = np.array(sorted(shown)).T
    return times, times[-1] + (durations[-1] or usual_gap(times))


def usual_gap(times: np.ndarray) -> float:
    """Seconds from a frame to the next."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


class Player:
    """Walks through an open video and gives the picture shown at rising times."""

    def __init__(self, container, times: np.ndarray, end: float):
        self.container = container
        self.stream = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.thread_count = 2
        self.times = times
        self.end = end
        self.gap = usual_gap(times)
        # GIF and its like draw changes onto the picture before: one cannot enter in the middle.
        self.seeks = self.stream.codec_context.name not in ("gif", "apng", "webp")
        self.fit = functools.lru_cache(1)(fit_frame)  # a frame may be on show several times
        self.asked = times[0]
        self.start()

    def start(self) -> None:
        """Decode from where the container stands."""
        self.frames = self.container.decode(self.stream)
        self.now = None  # the frame on show
        self.next = None  # the one after it; None at the end
        self.advance()

    def time(self, frame) -> float:
        """When a frame is shown, in seconds."""
        return float((frame.pts if frame.pts is not None else frame.dts) * self.stream.time_base)

    def advance(self) -> None:
        """One frame on."""
        self.now = self.next or self.now
        self.next = None
        with contextlib.suppress(av.FFmpegError):  # what follows the damage is lost
            self.next = next(self.frames, None)

    def picture(self, t: float, height: int, width: int) -> np.ndarray | None:
        """The picture (height, width, 3) uint8 on show at t seconds, None where the file does not
        decode that far."""
        if self.seeks and t - self.asked > SEEK_FROM:
            with contextlib.suppress(av.FFmpegError):  # where one cannot seek, one walks
                self.container.seek(int(t / self.stream.time_base), stream=self.stream)
                self.start()
        self.asked = t
        while self.next and self.time(self.next) <= t + TOLERANCE:
            self.advance()
        if self.now is None:
            return None
        if not self.next:
            # The last picture stays until the end. One before damage does not stay for what is
            # lost.
            last = self.time(self.now)
            whole = self.times[-1] - last < 2 * self.gap
            if t >= (self.end if whole else last + self.gap) + TOLERANCE:
                return None
        return self.fit(self.now, height, width)


def upright_size(frame) -> tuple[int, int]:
    """Height and width of a decoded frame once it is turned as the file says."""
    if round(frame.rotation / 90) % 2:
        return frame.width, frame.height
    return frame.height, frame.width


def central_crop(h: int, w: int, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred rectangle of shape height : width in a picture of h x w pixels, as left,
    top, right, bottom."""
    scale = min(h / height, w / width)
    x = max(0.0, (w - width * scale) / 2)
    y = max(0.0, (h - height * scale) / 2)
    return x, y, w - x, h - y


def fit_frame(frame, height: int, width: int) -> np.ndarray:
    """A decoded frame, turned upright, its central crop resized to (height, width, 3) uint8."""
    quarters = round(frame.rotation / 90)  # anticlockwise, as Pillow counts them
    picture = frame.to_image().rotate(90 * quarters, expand=True)
    box = central_crop(picture.height, picture.width, height, width)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))


def pixels(video: np.ndarray | Tensor) -> Tensor:
    """(..., F, H, W, 3) uint8 -> (..., 3, F, H, W) float32 in [-1, 1]."""
    video = torch.as_tensor(np.asarray(video)).movedim(-1, -4).contiguous()
    return video.float().div_(127.5).sub_(1)


def to_bytes(video: Tensor) -> Tensor:
    """(..., 3, F, H, W) in [-1, 1] -> (..., F, H, W, 3) uint8. What is not a number becomes grey."""
    levels = (video.nan_to_num().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().movedim(-4, -1)
