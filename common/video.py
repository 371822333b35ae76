"""Videos: annotations, windows, decoding."""
import collections
import concurrent.futures
import contextlib
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

from common.files import ahead, bar, cores, digest, listed
from config import Config, UserError
from physics.phenomena import CATEGORIES


HELD_SHARE = 0.05  # of a folder's videos
TOLERANCE = 1e-3  # seconds: some containers round time stamps to it
SEEK_FROM = 10.0  # seconds ahead: jump; nearer frames are decoded through
OTHER_SLOTS = (
    "no obvious dynamic phenomenon", "no obvious thermodynamic phenomenon", "no obvious optical phenomenon",
    "camera motion yes", "camera motion no",
    "liquids objects appearance", "solid objects appearance", "gas objects appearance",
    "object decomposition and splitting", "mixing of multiple objects", "object disappearance", "no change")


@dataclass
class Video:
    name: str  # as the annotations write it
    path: Path
    caption: str
    categories: list[int]  # of all 29


def spelled(label: str) -> str:
    """A label without case, numbers, punctuation and plural s, which WISA's annotators use freely."""
    return " ".join(word.removesuffix("s") for word in re.findall(r"[a-z]+", label.lower()))

LABELS = {spelled(name): i for i, name in enumerate((*CATEGORIES, *OTHER_SLOTS))}


def parse_labels(record: dict) -> tuple[list[int], list[str]]:
    """Categories in the answers q0 ... q4 of a WISA record, and the names that match none of them as a whole.

    An answer is a list in disguise: parts end at commas, semicolons, lines and item numbers.
    """
    known, unknown = [], []
    for question in ("q0", "q1", "q2", "q3", "q4"):
        answer = record.get(question) or ""
        answer = "\n".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        for part in re.split(r"[,;\n]|\b\d+[.)]", answer):
            label = spelled(f"camera motion {part}" if question == "q3" and spelled(part) else part)
            if label in LABELS:
                known.append(LABELS[label])
            elif label:
                unknown.append(" ".join(part.split()))
    return sorted(set(known)), unknown


def first_text(record: dict, names: Iterable[str]) -> str:
    """The first of these fields that holds text, else ""."""
    values = (value[0] if isinstance(value, list) and value else value for value in map(record.get, names))
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), "")

CAPTIONS = {"long": ("en_caption", "caption", "captions"), "short": ("en_caption_1", "caption", "captions")}


def shares(names: list[str], val_clips: int) -> tuple[list[int], list[int], str]:
    """Rows to train on, rows held out, and a summary; `names` says of each row which video it is from.

    One in twenty videos (not clips) is held out, chosen by a hash of its name: runs of every seed are validated on the
    same, and adding videos moves few from one side to the other.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    by_hash = sorted(rows, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())
    chosen = set(by_hash[:max(1, round(HELD_SHARE * len(rows)))])
    held = [row for name in by_hash if name in chosen for row in rows[name]][:val_clips]
    summary = f"{len(names)} clips from {len(rows)} videos"
    if len(rows) == 1:
        return rows[by_hash[0]], held, f"{summary} (a single one, so it is validated on its own training clips)"
    train = [row for name in rows if name not in chosen for row in rows[name]]
    return train, held, f"{summary}, {len(held)} of {len(names)} held out"


class Folder:
    """The videos that the annotations name."""
    name = "folder"

    def __init__(self, cfg: Config, captions: str = "long", phys_law: bool = False):
        """Reads the annotations. Raises UserError with what is expected when they are missing or something else.

        captions: the long or the short one of a WISA record. phys_law: with its field of that name behind, where it has
        one, as WISA's own loader prompts (how it joins the two is not on record; a space is ours).
        """
        self.cfg, self.size, self.dir = cfg, (cfg.frames, cfg.height, cfg.width), Path(cfg.data_dir)
        self.captions, self.phys_law = captions, phys_law
        self.skipped: list[str] = []  # "name (reason)"
        self.unknown = collections.Counter()  # category names that match none
        self.videos: dict[Path, Video] = {}
        if not self.dir.is_dir():
            raise UserError(f"There is no folder of videos {self.dir}.")
        for i, record in enumerate(self.records()):
            self.take(record, f"record {i + 1}")

    def records(self) -> list:
        """The annotation file as a list of records."""
        file = Path(self.cfg.annotations) if self.cfg.annotations else self.dir / "captions.json"
        expected = "a JSON object {file: caption} or a list of WISA records is expected"
        try:
            data = json.loads(file.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise UserError(f"There is no {file} (or give --annotations FILE): {expected}.") from None
        except OSError as e:
            raise UserError(f"{file} cannot be read ({e.strerror}): {expected}.") from None
        except (ValueError, RecursionError):
            raise UserError(f"{file} is not JSON: {expected}.") from None
        if isinstance(data, dict) and isinstance(data.get("data"), list):
            data = data["data"]
        elif isinstance(data, dict) and (not data or any(isinstance(caption, str) for caption in data.values())):
            data = [{"file": name, "caption": caption} for name, caption in data.items()]
        if not isinstance(data, list) or data and not any(isinstance(record, dict) for record in data):
            raise UserError(f"{file} has another shape: {expected}.")
        return data

    def take(self, record, label: str) -> None:
        """Note the record's video, or why there is none."""
        if not isinstance(record, dict):
            self.skipped.append(f"{label} (not an object)")
            return
        inner = record.get("physical_annotation")
        record = {**inner, **record} if isinstance(inner, dict) else record
        ids = (record.get(field) for field in ("file", "video_path", "video_id"))
        names = [str(name) for name in ids if isinstance(name, str | int) and name != ""]
        caption = first_text(record, CAPTIONS[self.captions])
        if caption and self.phys_law:
            caption = f"{caption} {first_text(record, ['phys_law'])}".strip()
        found = next(filter(None, map(self.find, names)), None)
        problem = ("names no file" if not names else "no caption" if not caption else
                   "outside the folder" if not found and not any(map(self.inside, names)) else
                   "missing" if not found else "named twice" if found in self.videos else "")
        if problem:
            self.skipped.append(f"{names[0] if names else label} ({problem})")
            return
        categories, unknown = parse_labels(record)
        self.unknown.update(unknown)
        self.videos[found] = Video(names[0], found, caption, categories)

    def inside(self, name: str) -> bool:
        path = os.path.normpath(name)
        return not os.path.isabs(path) and path.split(os.sep)[0] != ".."

    def find(self, name: str) -> Path | None:
        """The file of that name in the folder; a bare id may lack its suffix."""
        if not self.inside(name):
            return None
        endings = ("", ".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
        paths = (self.dir / os.path.normpath(name + ending) for ending in endings)
        return next((path for path in paths if os.path.isfile(path)), None)

    def settings(self) -> dict:
        stats = [(v.name, v.caption, v.categories, os.path.getsize(v.path), os.path.getmtime(v.path))
                 for v in self.videos.values()]
        return {"dir": str(self.dir.resolve()), "fps": self.cfg.fps, "windows": self.cfg.windows,
                "videos": digest(stats), "skipped": digest([self.skipped, self.unknown])}

    def fill(self, add, progress: bool) -> tuple[list[int], list[int], str]:
        names = []  # of the video of each clip
        for video, found in bar(self.read(), "reading videos", len(self.videos), "video", progress):
            if isinstance(found, str):
                self.skipped.append(f"{video.name} ({found})")
                continue
            for window in found:
                add(window.video, video.caption, video.categories,
                    [video.name, window.start, list(window.size), list(window.crop)])
                names.append(video.name)
        skipped = f"; skipped {len(self.skipped)}: {listed(self.skipped)}" if self.skipped else ""
        if not names:
            raise UserError(f"No clip could be made from {self.dir}{skipped or '; the annotations name no video'}.")
        train, held, summary = shares(names, self.cfg.val_clips)
        return train, held, summary + skipped + self.strangers()

    def strangers(self) -> str:
        """What a summary says of category names that match none."""
        names = listed(f"{name!r} ({count})" for name, count in self.unknown.most_common())
        return f"; {len(self.unknown)} unknown category names: {names}" if self.unknown else ""

    def read(self, videos: list[Video] | None = None) -> Iterator[tuple[Video, "list[Window] | str"]]:
        """Each of these videos (None: all) with its windows, or with the reason why there are none."""
        def attempt(video: Video):
            try:
                return video, windows_of(video.path, self.cfg)
            except Exception as e:  # whatever decoders make of a damaged file concerns that file alone
                return video, str(getattr(e, "strerror", None) or e or type(e).__name__)

        workers = cores(self.cfg)
        with concurrent.futures.ThreadPoolExecutor(workers) as executor:  # threads do: decoders let go of the GIL
            yield from ahead(executor, attempt, [*self.videos.values()] if videos is None else videos, group=workers)


@dataclass
class Window:
    """A clip, and where in its video it was: maps made later from the file find the same pixels by it."""
    video: np.ndarray  # (F, H, W, 3) uint8
    number: int  # of the windows taken from its video, which are `taken`
    taken: int
    start: float  # seconds on the file's own clock; frame k is the one shown at start + k / fps
    size: tuple[int, int]  # height and width of the upright source
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels


def read_windows(path: Path, cfg: Config) -> list[np.ndarray]:
    """The clips of `windows_of` alone."""
    return [window.video for window in windows_of(path, cfg)]


def windows_of(path: Path, cfg: Config) -> list[Window]:
    """The clips of one video by the rules at the top; never more than those in memory.

    Raises ValueError with the reason when there is none, or what the decoder raises.
    """
    times, end = timeline(path)
    n = int(np.ceil((end - times[0] - TOLERANCE) * cfg.fps)) // cfg.frames
    if n < 1:
        raise ValueError(f"too short, {end - times[0]:.2g} s of {cfg.frames / cfg.fps:.2g} s")
    taken = min(n, cfg.windows)
    found = []
    with av.open(str(path)) as container:
        player = Player(container, times, end)
        for number in range(taken):
            window = (2 * number + 1) * n // (2 * taken)  # the middles of `taken` equal parts
            shown = times[0] + (window * cfg.frames + np.arange(cfg.frames)) / cfg.fps
            pictures = [player.picture(t, cfg.height, cfg.width) for t in shown]
            if all(p is not None for p in pictures):
                size = upright(player.now)
                found.append(Window(np.stack(pictures), number, taken, float(shown[0]), size,
                                    central(*size, cfg.height, cfg.width)))
    if not found:
        raise ValueError("damaged, no window decodes")
    return found


def timeline(path: Path) -> tuple[np.ndarray, float]:
    """When each frame is shown and when the last one ends, in seconds, from the packets alone: nothing is decoded, so
    hours of video cost seconds, and unlike the header it is true of truncated files too."""
    if not path.stat().st_size:
        raise ValueError("empty file")
    shown = []  # (start, duration) of each packet
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no picture in it")
        stream = container.streams.video[0]
        with contextlib.suppress(av.FFmpegError):  # damage ends the timeline
            for packet in container.demux(stream):
                start = packet.pts if packet.pts is not None else packet.dts
                if start is not None and packet.size and not packet.is_discard:
                    shown.append((float(start * stream.time_base), float((packet.duration or 0) * stream.time_base)))
    if not shown:
        raise ValueError("no frames with time stamps")
    shown.sort()
    times = np.array([start for start, _ in shown])
    return times, times[-1] + (shown[-1][1] or (np.median(np.diff(times)) if len(times) > 1 else 0))


class Player:
    """Walks through an open video and gives the picture shown at rising times."""

    def __init__(self, container, times: np.ndarray, end: float):
        self.container, self.stream, self.times, self.end = container, container.streams.video[0], times, end
        self.stream.thread_type, self.stream.codec_context.thread_count = "AUTO", 2
        self.gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        # GIF and its like draw changes onto the picture before: they cannot be entered in the middle
        self.seeks = self.stream.codec_context.name not in ("gif", "apng", "webp")
        self.asked = times[0]
        self.start()

    def start(self) -> None:
        self.frames, self.now, self.next, self.ended = self.container.decode(self.stream), None, None, False
        self.fitted = None, None  # a frame and its picture

    def time(self, frame) -> float:
        return float((frame.pts if frame.pts is not None else frame.dts) * self.stream.time_base)

    def advance(self) -> None:
        self.now, self.next = self.next or self.now, None
        try:
            self.next = next(self.frames, None)
        except av.FFmpegError:
            pass  # what follows the damage is lost
        self.ended = self.next is None

    def picture(self, t: float, height: int, width: int) -> np.ndarray | None:
        """The picture (height, width, 3) uint8 on show at t seconds, None where the file does not decode that far."""
        if self.seeks and t - self.asked > SEEK_FROM:
            with contextlib.suppress(av.FFmpegError):  # where there is no seeking, walk
                self.container.seek(int(t / self.stream.time_base), stream=self.stream)
                self.start()
        self.asked = t
        while not self.ended and (self.next is None or self.time(self.next) <= t + TOLERANCE):
            self.advance()
        if self.now is None:
            return None
        if self.ended:  # the last picture stays until the end, but one before damage does not stay for what was lost
            last = self.time(self.now)
            if t >= (self.end if self.times[-1] - last < 2 * self.gap else last + self.gap) + TOLERANCE:
                return None
        if self.fitted[0] is not self.now:
            self.fitted = self.now, fit(self.now, height, width)
        return self.fitted[1]


def upright(frame) -> tuple[int, int]:
    """Height and width of a decoded frame once it is turned as the file says."""
    return (frame.width, frame.height) if round(frame.rotation / 90) % 2 else (frame.height, frame.width)


def central(h: int, w: int, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred rectangle of shape height : width in a picture h x w: left, top, right, bottom."""
    scale = min(h / height, w / width)
    x, y = max(0.0, (w - width * scale) / 2), max(0.0, (h - height * scale) / 2)
    return x, y, w - x, h - y


def fit(frame, height: int, width: int) -> np.ndarray:
    """A decoded frame, turned upright, its largest centred rectangle of that shape resized to (height, width, 3)."""
    rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # both count anticlockwise
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    box = central(*upright(frame), height, width)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))


def pixels(video: np.ndarray | Tensor) -> Tensor:
    """(..., F, H, W, 3) uint8 -> (..., 3, F, H, W) float32 in [-1, 1]."""
    video = torch.as_tensor(np.asarray(video)).movedim(-1, -4)
    return video.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
