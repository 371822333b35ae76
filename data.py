"""Clips for training: the physics world, a folder of videos with captions, or the latents that encode.py made of one.

    world, or videos  --open_pool-->  Pool on disk   --Clips.batch(positions)-->    Batch of pixels
    videos            --encode.py-->  Cache on disk  --Latents.batch(positions)-->  Batch of latents

Either source is turned once into a pool: clips of the training size as bytes, captions, categories, the world's exact
masks. A pool is named by a hash of all that shapes it, so runs with the same settings share it. Everything behind it is
a pure function of the position in the stream (order, caption dropout, targets): a restart has no state to restore.

Why a pool for the world too: reading clips costs a seventh of drawing them or less, and training reads each often.

Videos, the rules. *Time*: a clip's k-th frame is the one shown k/fps seconds after its start (time stamps count, within
a millisecond, so variable frame rates work). A video is cut into consecutive windows of `frames` such frames; of more
than `windows` of them as many are taken, evenly spread. Shorter videos are skipped. *Space*: turned as the file says,
then the largest centred rectangle of the training shape, resized with antialiasing. *Colour*: 8-bit RGB; alpha is
dropped. *Bad files* are skipped, counted and named; of a damaged file the windows that decode are used.
Captions: `--annotations FILE`, else captions.json in the folder; {file: caption}, or a WISA list.
Left out on purpose: sound, mirroring, non-square pixels.

Latents, the rules. encode.py writes one safetensors file a clip and an index; everything is in one folder, whose
cache.json says which settings and weights it is of. A file is read when its clip is asked for, never before. One that
is damaged is named once, and the next clip that can be read stands in: which one depends on the files alone.

Letters: B clips, F frames, H W pixels or token grid, N video tokens, L text tokens, E_cat categories.
"""
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import sys
import types
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import av
import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import world
from config import Config, Stopped, UserError

FORMAT = 2  # of the pool's files
HELD_OUT = 1_000_000_000  # the world's indices from here on are never trained on
HELD_SHARE = 0.05  # of a folder's videos
TOLERANCE = 1e-3  # seconds: some containers round time stamps to it
SEEK_FROM = 10.0  # seconds ahead: jump; nearer frames are decoded through
POSITIVE = 0.25  # a token is positive when at least this share of its area is covered
MASKS = 2  # phenomena with a mask a clip, at most
POOL_FROM = 1000  # drawing fewer world clips than this is done before other processes would have started
OTHER_SLOTS = (
    "no obvious dynamic phenomenon", "no obvious thermodynamic phenomenon", "no obvious optical phenomenon",
    "camera motion yes", "camera motion no",
    "liquids objects appearance", "solid objects appearance", "gas objects appearance",
    "object decomposition and splitting", "mixing of multiple objects", "object disappearance", "no change")


def category_names(cfg: Config) -> tuple[str, ...]:
    """Names of the E_cat categories: WISA's 17 laws, with cfg.categories = 29 also its twelve other slots."""
    return (*world.CATEGORIES, *OTHER_SLOTS)[:cfg.categories]


@dataclass
class Batch:
    """What one step needs, from any source: pixels, or latents where a VAE stands before the network."""
    video: Tensor | None  # (B, 3, F, H, W) float32 in [-1, 1]; None where there are latents
    text: Tensor  # (B, L) int64 word ids, 0 = pad; beside latents the embeddings (B, L, D_text) float32
    text_length: Tensor  # (B,) int64; 0 = the caption was dropped or is empty
    caption: list[str]  # as in the data, also where dropped
    categories: Tensor  # (B, E_cat) float32 multi-hot
    target: Tensor  # (B, N, E_cat) float32, 1 where the phenomenon covers a quarter of the token
    target_mask: Tensor  # (B, N, E_cat) float32, 1 where `target` says anything
    index: Tensor  # (B,) int64 position in the stream
    latent: Tensor | None = None  # (B, C, F, H, W) float32, F H W of the latent grid, in the network's own scale
    maps: Tensor | None = None  # (B, N, E_cat) float32 a teacher's attention (uniform = 1), NaN where it says nothing
    background: Tensor | None = None  # (B, N) float32 the same for a generic question; align.py makes targets of both

    @property
    def x(self) -> Tensor:
        """(B, C, F, H, W): what the network learns to draw."""
        return self.video if self.latent is None else self.latent

    def to(self, device) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "caption"}
        return replace(self, **{name: tensor.to(device, non_blocking=True)
                                for name, tensor in tensors.items() if tensor is not None})


# ---------------------------------------------------------------------------------------------------------------- words
class Tokenizer:
    """Words <-> ids. Lower case; a word is a run of letters and digits (an apostrophe may stand inside); punctuation is
    dropped. Id 0 is padding, 1 any unknown word."""

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words, start=2)}

    @staticmethod
    def split(caption: str) -> list[str]:
        return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower())

    @classmethod
    def from_captions(cls, captions: Iterable[str]) -> "Tokenizer":
        return cls(sorted({word for caption in captions for word in cls.split(caption)}))

    def __len__(self) -> int:
        """Size of the vocabulary, padding and unknown included."""
        return len(self.words) + 2

    def encode(self, caption: str, length: int) -> tuple[Tensor, int]:
        """ids (length,) int64 padded with 0, and how many are words. A longer caption is cut."""
        ids = [self.ids.get(word, 1) for word in self.split(caption)[:length]]
        return torch.tensor(ids + [0] * (length - len(ids)), dtype=torch.int64), len(ids)

    def unknown(self, caption: str) -> list[str]:
        """The caption's words that are not in the vocabulary, each once."""
        return list(dict.fromkeys(word for word in self.split(caption) if word not in self.ids))

    def save(self, path: Path) -> None:
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps({"words": self.words}, ensure_ascii=False), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError when the file is missing or broken."""
        try:
            words = json.loads(Path(path).read_text(encoding="utf-8"))["words"]
        except FileNotFoundError:
            raise UserError(f"{path} is missing: no tokenizer was saved there.") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            words = None
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words) or len(set(words)) != len(words):
            raise UserError(f"{path} is not a tokenizer: a JSON object with a list of different words is expected.")
        return cls(words)


# ------------------------------------------------------------------------------------------------- maps on a token grid
@functools.lru_cache
def area_weights(n: int, size: int) -> Tensor:
    """(n, size): share of cell j of `size` equal cells that pixel i of n covers. Columns sum to one."""
    pixel = np.arange(n)[:, None] * size  # both in units of 1 / (n size)
    cell = np.arange(size)[None] * n
    overlap = np.minimum(pixel + size, cell + n) - np.maximum(pixel, cell)
    return torch.from_numpy((overlap.clip(min=0) / n).astype(np.float32))


def resample(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(..., F, H, W) float -> (..., *grid): the average over each cell's area, whether sizes divide or not."""
    for axis, size in zip((-1, -2, -3), reversed(grid)):
        if maps.shape[axis] != size:
            weights = area_weights(maps.shape[axis], size).to(maps)
            maps = (maps.movedim(axis, -1) @ weights).movedim(-1, axis)
    return maps


def token_times(cfg: Config) -> np.ndarray:
    """(T',) seconds from a clip's start to the mean time of the frames that a token shows. Frame i is shown at i / fps;
    a world clip lasts one second. Latent 0 is frame 0, latent k the frames 4 k - 3 .. 4 k."""
    if not cfg.latent:
        fps = cfg.fps if cfg.data_dir else cfg.frames
        return np.arange(cfg.frames).reshape(-1, cfg.patch_t).mean(1) / fps
    latents = np.maximum(4 * np.arange(1 + (cfg.frames - 1) // 4) - 1.5, 0) / cfg.fps
    latents = np.concatenate([latents[:1]] * (-len(latents) % cfg.patch_t) + [latents])  # as the latents are padded
    return latents.reshape(-1, cfg.patch_t).mean(1)


def axis_weights(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """(m, n) weights that bring values of n cells, whose n + 1 edges are `have`, to m cells with the edges `want`: the
    average over a wanted cell's area, or, where those are finer, linear interpolation between middles. NaN where the
    middle of a wanted cell lies outside."""
    at, middles = (want[1:] + want[:-1]) / 2, (have[1:] + have[:-1]) / 2
    if want[1] - want[0] < have[1] - have[0]:
        weights = np.stack([np.interp(at, middles, one) for one in np.eye(len(middles))], axis=1)
    else:
        overlap = np.minimum(want[1:, None], have[None, 1:]) - np.maximum(want[:-1, None], have[None, :-1])
        weights = overlap.clip(min=0) / overlap.clip(min=0).sum(1, keepdims=True).clip(min=1e-9)
    weights[(at < have[0]) | (at > have[-1])] = np.nan
    return weights


def time_weights(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """(m, n) weights of linear interpolation in time, from the n rising times of a map to the m times of tokens. NaN
    where a token lies further outside than half a step of the map."""
    before, after = (np.diff(have) / 2)[[0, -1]] if len(have) > 1 else (math.inf, math.inf)
    weights = np.stack([np.interp(want, have, one) for one in np.eye(len(have))], axis=1)
    weights[(want < have[0] - before - TOLERANCE) | (want > have[-1] + after + TOLERANCE)] = np.nan
    return weights


# --------------------------------------------------------------------------------------------------------- pool on disk
@dataclass
class Pool:
    """Clips on disk, opened read-only. `train` and `held` list the rows of either split."""
    video: np.ndarray  # (n, F, H, W, 3) uint8, mapped
    masks: np.ndarray | None  # (n, MASKS, bytes) uint8, mapped: packed bits of (F, H, W); None for videos
    mask_category: np.ndarray  # (n, MASKS) int64, -1 = no mask
    captions: list[str]
    categories: list[list[int]]  # of all 29
    train: list[int]
    held: list[int]
    sources: list[list]  # of each clip: file, start in seconds, [height, width], crop, as in a Window
    summary: str
    key: str  # the folder's name: a hash of all that shapes the clips

    @property
    def names(self) -> list[str]:
        """The file that each clip is from."""
        return [source[0] for source in self.sources]

    @classmethod
    def open(cls, path: Path, size: tuple[int, int, int]) -> "Pool | None":
        """The pool in folder `path` with clips of `size` (F, H, W), or None when there is none or it is not whole."""
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            n, rows = len(meta["captions"]), set(range(len(meta["captions"])))
            shape, bits = (n, *size, 3), (n, MASKS, -(-int(np.prod(size)) // 8))
            category = np.array(meta["mask_category"], np.int64).reshape(n, MASKS)
            whole = (len(meta["categories"]) == len(meta["sources"]) == n and meta["train"] and meta["held"]
                     and rows >= {*meta["train"], *meta["held"]}
                     and all(isinstance(c, str) for c in (*meta["captions"], meta["summary"]))
                     and {c for row in meta["categories"] for c in row} <= set(range(29))
                     and (path / "video.u8").stat().st_size == np.prod(shape)
                     and (path / "masks.u8").stat().st_size == (np.prod(bits) if meta["masks"] else 0)
                     and -1 <= category.min() and category.max() < 29)
            if not whole:
                return None
            masks = np.memmap(path / "masks.u8", np.uint8, "r", shape=bits) if meta["masks"] else None
            return cls(np.memmap(path / "video.u8", np.uint8, "r", shape=shape), masks, category,
                       *(meta[name] for name in ("captions", "categories", "train", "held", "sources", "summary")),
                       path.name)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


class Writer:
    """Writes a pool into a folder. Plain files: writing to a mapped one on a full disk would kill the process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.video, self.masks = open(folder / "video.u8", "wb"), open(folder / "masks.u8", "wb")
        self.meta = {"captions": [], "categories": [], "mask_category": [], "sources": [], "masks": False}

    def add(self, video: np.ndarray, caption: str, categories: list[int], source: list,
            masks: dict | None = None) -> int:
        """One clip (F, H, W, 3) uint8, where it is from, and {category: bool (F, H, W)}; returns its row."""
        self.video.write(np.ascontiguousarray(video).data)
        if masks is not None:
            slots = np.zeros((MASKS, -(-video[..., 0].size // 8)), np.uint8)
            for slot, mask in zip(slots, masks.values()):
                slot[:] = np.packbits(mask)
            self.masks.write(slots.data)
            self.meta["masks"] = True
        self.meta["captions"].append(caption)
        self.meta["categories"].append(sorted(set(categories)))
        self.meta["sources"].append(source)
        self.meta["mask_category"].append([*(masks or ()), -1, -1][:MASKS])
        return len(self.meta["captions"]) - 1

    def close(self, **extra) -> None:
        for file in (self.video, self.masks):
            file.flush()
            os.fsync(file.fileno())  # the folder's new name must not survive a power cut that its bytes do not
            file.close()
        (self.folder / "meta.json").write_text(json.dumps({**self.meta, **extra}), encoding="utf-8")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[bool]:
    """One process at a time builds in `folder`; a killed one's lock vanishes with it. False where locks are unknown."""
    handle, locked = None, False
    try:
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another run is building clips in {folder}; waiting for it.", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        locked = True
    except (ImportError, OSError):  # Windows, some network drives: builds have folders of their own, so work is doubled
        pass
    try:
        yield locked
    finally:
        if handle is not None:
            os.close(handle)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_pool(cfg: Config, progress: bool = True) -> Pool:
    """The pool of these settings, built if need be (bar and summary when `progress`).

    UserError: no usable videos, annotations or place for the pool; Stopped: the disk is full, or a worker was killed.
    """
    source = Folder(cfg) if cfg.data_dir else World(cfg)
    settings = {"format": FORMAT, "size": source.size, "val_clips": cfg.val_clips, **source.settings()}
    path = Path(cfg.pool_dir) / f"{source.name}-{digest(settings)[:12]}"
    pool = Pool.open(path, source.size)
    if pool is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path.parent, os.W_OK):
                raise PermissionError(0, "it is not writable")
        except OSError as e:
            raise UserError(f"--pool_dir {cfg.pool_dir} cannot hold clips: {e.strerror}.") from None
        with only_one(path.parent) as locked:
            if locked:
                for leftover in path.parent.glob(f"{path.name}.*"):  # of builds that were killed
                    shutil.rmtree(leftover, ignore_errors=True)
            pool = Pool.open(path, source.size)  # another run may have built it while we waited
            if pool is None:
                build(source, settings, path, progress)
                pool = Pool.open(path, source.size)
    if pool is None:
        raise Stopped(f"The clips written to {path} cannot be read back; is the disk sound?")
    if progress:
        print(pool.summary)
    return pool


def build(source: "World | Folder", settings: dict, path: Path, progress: bool) -> None:
    """Fill a folder beside `path` and rename it, so that `path` is whole or absent."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        part.mkdir()
        writer = Writer(part)
        train, held, summary = source.fill(writer.add, progress)
        writer.close(train=train, held=held, summary=summary, settings=settings)
        shutil.rmtree(path, ignore_errors=True)  # only ever a broken one
        part.rename(path)
    except OSError as e:
        raise Stopped(f"The clips could not be written to {path.parent}: {e.strerror or e}.") from None
    except concurrent.futures.BrokenExecutor:
        raise Stopped("A process drawing clips died, for want of memory perhaps: fewer --threads need less.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def cores(cfg: Config) -> int:
    return cfg.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def bar(items: Iterable, what: str, total: int, unit: str, progress: bool) -> Iterable:
    return tqdm(items, what, total, unit=unit, disable=not progress, leave=False)


def ahead(executor: concurrent.futures.Executor, function, items: list, group: int, chunksize: int = 1) -> Iterator:
    """executor.map in order, but never more than two groups under way: undelivered clips would fill the memory."""
    waiting = collections.deque()
    for start in range(0, len(items), group):
        waiting.append(executor.map(function, items[start:start + group], chunksize=chunksize))
        if len(waiting) == 2:
            yield from waiting.popleft()
    for results in waiting:
        yield from results


# -------------------------------------------------------------------------------------------------- source 1: the world
WORKER = """
import multiprocessing, os, signal, threading

def follow():  # a killed parent leaves no worker behind
    multiprocessing.parent_process().join()
    os._exit(1)

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
threading.Thread(target=follow, daemon=True).start()
"""  # run at a worker's start; as text, because a function of this file would make the worker import torch


class World:
    """Clips 0, 1, ... of the world to train on, and as many as asked from HELD_OUT on to validate."""
    name = "world"

    def __init__(self, cfg: Config):
        self.cfg, self.size = cfg, (cfg.frames, cfg.height, cfg.width)
        self.drawing = dict(frames=cfg.frames, height=cfg.height, width=cfg.width, decoys=cfg.decoys, two=cfg.two,
                            colour_cues=cfg.colour_cues, ood=cfg.ood)

    def settings(self) -> dict:
        code = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()  # another world.py draws another world
        return {"clips": self.cfg.world_clips, "seed": self.cfg.world_seed, "code": code, **self.drawing}

    def fill(self, add, progress: bool) -> tuple[list[int], list[int], str]:
        n, n_held = self.cfg.world_clips, self.cfg.val_clips
        indices = [*range(n), *range(HELD_OUT, HELD_OUT + n_held)]
        drawn = bar(self.draw(indices), "drawing the world", len(indices), "clip", progress)
        for index, clip in zip(indices, drawn):
            masks = {}
            for actor in clip.actors:  # two actors of one phenomenon share its mask
                masks[actor.category] = actor.mask | masks.get(actor.category, False)
            add(clip.video, clip.caption, clip.categories, self.source(index), masks)
        return list(range(n)), list(range(n, n + n_held)), f"{n} clips of the world, {n_held} more held out"

    def source(self, index: int) -> list:
        """Where a clip is from, as if each were a file."""
        return [f"clip {index} of the world", 0.0, [self.cfg.height, self.cfg.width],
                [0, 0, self.cfg.width, self.cfg.height]]

    def draw(self, indices: list[int]) -> Iterator["world.Clip"]:
        """The clips in order, drawn on all cores when they are many."""
        make = functools.partial(world.make_clip, self.cfg.world_seed, **self.drawing)
        workers = min(cores(self.cfg), 1 + len(indices) // POOL_FROM)
        if workers == 1:
            yield from map(make, indices)
            return
        chunk = int(np.clip(2**24 // (5 * np.prod(self.size)), 1, 32))  # 16 MB a parcel: three colours, two masks
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, spawn, exec, (WORKER, {})) as executor:
            with no_main():
                for _ in range(workers):  # a process is started for each call that finds none idle
                    executor.submit(int)
            yield from ahead(executor, make, indices, group=4 * chunk * workers, chunksize=chunk)


@contextlib.contextmanager
def no_main():
    """Processes started inside do not import the main script, and with it torch: seconds each, for nothing."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ----------------------------------------------------------------------------------------- source 2: a folder of videos
@dataclass
class Video:
    name: str  # as the annotations write it
    path: Path
    caption: str
    categories: list[int]  # of all 29


def spelled(label: str) -> str:
    """A label without case, numbers, punctuation and plural s, which WISA's annotators use freely."""
    return " ".join(word.removesuffix("s") for word in re.findall(r"[a-z]+", label.lower()))


LABELS = {spelled(name): i for i, name in enumerate((*world.CATEGORIES, *OTHER_SLOTS))}


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


def listed(items: Iterable[str], most: int = 8) -> str:
    items = [item.encode("utf-8", "replace").decode() for item in items]  # JSON may hold what no terminal prints
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


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


# ----------------------------------------------------------------------------------------------------- a teacher's maps
class Maps:
    """What teacher.py left in a folder: maps.json (settings, and a hash of them), index.json (which file's seconds each
    map is of), clips/*.safetensors. A map is read when its clip is asked for.

    A map file holds maps (R, t, h, w) of R categories and background (t, h, w), float16 densities on the teacher's own
    grid, the times of its t rows in seconds of the video, and the rectangle of the video that it covers: any clip of
    the same video finds its tokens in it, whatever its size, rate and crop.
    """

    def __init__(self, folder: Path):
        """Opens no map. Raises UserError."""
        self.folder, self.damaged = Path(folder), {}
        try:
            settings = json.loads((self.folder / "maps.json").read_text(encoding="utf-8"))
            index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            self.made_with, self.of = settings["key"], {}
            for file, source, start, end in index["clips"]:
                self.of.setdefault(source, []).append((float(start), float(end), str(file)))
        except FileNotFoundError as e:
            raise UserError(f"There is no {e.filename}: teacher.py makes it, once it has gone through.") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{self.folder} is not what teacher.py left there: its maps.json or index.json is "
                            "damaged.") from None
        if not self.of:
            raise UserError(f"There is no map in {self.folder}: teacher.py made none.")
        self.key = digest([self.made_with, sorted(self.of.items())])  # of settings and of what is there
        if index.get("key") != self.made_with:
            raise UserError(f"{self.folder} is stale: its index.json is of other settings than its maps.json; run "
                            "teacher.py again.")

    def read(self, file: str) -> tuple[dict[str, Tensor], dict] | None:
        """A map file; None where it is damaged, which is said once. UserError where it is of other settings."""
        if file in self.damaged:
            return None
        try:
            tensors, about = read_tensors(self.folder / "clips" / file)
        except (OSError, ValueError) as e:
            self.damaged[file] = str(getattr(e, "strerror", None) or e)
            tqdm.write(f"{self.folder / 'clips' / file} is left out ({self.damaged[file]}); delete it and run "
                       "teacher.py again to mend it.", file=sys.stderr)
            return None
        if about["key"] != self.made_with:
            raise UserError(f"{self.folder / 'clips' / file} is stale, made with other settings than maps.json beside "
                            "it says: delete it and run teacher.py again.")
        return tensors, about

    def on_tokens(self, source: list, times: np.ndarray, grid: tuple[int, int, int],
                  n_categories: int) -> tuple[Tensor, Tensor] | None:
        """Maps (N, E_cat) and background (N,) on the tokens of a clip: `source` says where it is from (Pool.sources),
        `times` (T',) when its tokens are. None without a map. NaN outside what the teacher saw and for categories that
        it was not asked for.
        """
        name, start, _, (left, top, right, bottom) = source
        when = start + times
        shared = [(min(end, when[-1]) - max(begin, when[0]), file) for begin, end, file in self.of.get(name, ())]
        found = self.read(max(shared)[1]) if shared else None
        if found is None:
            return None
        tensors, about = found
        maps = torch.cat([tensors["maps"], tensors["background"][None]]).double()  # (R + 1, t, h, w)
        x0, y0, x1, y1 = about["crop"]
        rows = axis_weights(np.linspace(y0, y1, maps.shape[2] + 1), np.linspace(top, bottom, grid[1] + 1))
        columns = axis_weights(np.linspace(x0, x1, maps.shape[3] + 1), np.linspace(left, right, grid[2] + 1))
        weights = map(torch.from_numpy, (time_weights(np.asarray(about["times"]), when), rows, columns))
        on_grid = torch.einsum("rthw,Tt,Yh,Xw->rTYX", maps, *weights).flatten(1).float()  # (R + 1, N)
        filled = torch.full((on_grid.shape[1], n_categories), math.nan)
        for category, values in zip(about["categories"], on_grid):
            if category < n_categories:
                filled[:, category] = values
        return filled, on_grid[-1]


def world_maps(cfg: Config, pool: Pool, name: str) -> Path:
    """Where the maps of this name of the world's clips are kept."""
    return Path(cfg.pool_dir) / f"{pool.key}-{name}"


def open_maps(cfg: Config, pool: "Pool | Cache") -> Maps | None:
    """The maps that --teacher names: a folder, or a name of maps of the world. None for exact masks. Raises
    UserError."""
    if not cfg.teacher:
        return None
    named = re.fullmatch(r"\w+", cfg.teacher) and not (cfg.data_dir or cfg.latent)
    folder = world_maps(cfg, pool, cfg.teacher) if named and not Path(cfg.teacher).is_dir() else Path(cfg.teacher)
    if not folder.is_dir():
        how = f"`python teacher.py --annotate {cfg.teacher}` makes them" if named else "teacher.py --out makes one"
        raise UserError(f"There are no maps in {folder}: {how}.")
    return Maps(folder)


# ----------------------------------------------------------------------------------------------------------- the stream
class Stream:
    """The order of clips. Position p of the endless stream is clip order[p mod n] of epoch p div n."""
    cut = 0  # captions cut short

    def __init__(self, cfg: Config, pool: "Pool | Cache", maps: Maps | None = None):
        self.cfg, self.pool, self.maps, self.orders = cfg, pool, maps, {}
        self.categories = torch.zeros(len(pool.captions), cfg.categories)
        for row, present in enumerate(pool.categories):
            self.categories[row, [c for c in present if c < cfg.categories]] = 1

    def __len__(self) -> int:
        """Clips an epoch."""
        return len(self.pool.train)

    @property
    def key(self) -> str:
        """Of all that shapes what is trained on: clips, and maps where there are any."""
        return f"{self.pool.key}+{self.maps.key}" if self.maps else self.pool.key

    @property
    def unmapped(self) -> int:
        """How many training clips have no map, so that L_fine_align skips them. Of a cache, whose index has no times,
        only those of videos without any map."""
        if not self.maps:
            return 0
        if not isinstance(self.pool, Pool):
            return sum(self.pool.names[row] not in self.maps.of for row in self.pool.train)
        first, *_, last = (*token_times(self.cfg), *token_times(self.cfg)[-1:])

        def mapped(name: str, start: float, *_) -> bool:
            return any(begin <= start + last and start + first <= end for begin, end, _ in self.maps.of.get(name, ()))
        return sum(not mapped(*self.pool.sources[row]) for row in self.pool.train)

    def looked_at(self, sources: list) -> tuple[Tensor | None, Tensor | None]:
        """A teacher's maps (B, N, E_cat) and background (B, N) for clips from `sources`; NaN where it says nothing."""
        if not self.maps:
            return None, None
        N, times = int(np.prod(self.cfg.grid)), token_times(self.cfg)
        found = [self.maps.on_tokens(source, times, self.cfg.grid, self.cfg.categories) for source in sources]
        silent = torch.full((N, self.cfg.categories), math.nan), torch.full((N,), math.nan)
        maps, background = zip(*(one or silent for one in found))
        return torch.stack(maps), torch.stack(background)

    @property
    def categories_present(self) -> list[int]:
        """Indices of the categories that occur in the training clips."""
        return self.categories[self.pool.train].any(0).nonzero().flatten().tolist()

    def row(self, position: int) -> int:
        epoch, at = divmod(position, len(self))
        if epoch not in self.orders:
            order = np.random.default_rng([self.cfg.seed, 3, epoch]).permutation(self.pool.train)  # 0, 1: diffusion.py
            self.orders = {**dict(list(self.orders.items())[-1:]), epoch: order}  # a batch may lie across two epochs
        return int(self.orders[epoch][at])

    def dropped(self, positions: list[int]) -> Tensor:
        """(B,) bool: whose caption is left out, so that guidance has an unconditional model."""
        draws = [np.random.default_rng([self.cfg.seed, 2, p]).random() for p in positions]
        return torch.tensor(draws) < self.cfg.caption_dropout

    def held_out(self) -> Batch:
        """All validation clips, index 0 upwards."""
        return self.batch(range(len(self.pool.held)), train=False)


class Clips(Stream):
    """Batches of pixels from a pool."""

    def __init__(self, cfg: Config, pool: Pool, tokenizer: Tokenizer, maps: Maps | None = None):
        super().__init__(cfg, pool, maps)
        encoded = [tokenizer.encode(caption, cfg.text_len) for caption in pool.captions]
        self.ids, self.lengths = torch.stack([ids for ids, _ in encoded]), torch.tensor([n for _, n in encoded])
        self.cut = sum(len(tokenizer.split(caption)) > cfg.text_len for caption in pool.captions)

    def batch(self, positions: Iterable[int], train: bool = True) -> Batch:
        """The clips at these positions of the stream (train), or of the held-out list (no caption is dropped)."""
        positions = list(positions)
        rows = [self.row(p) if train else self.pool.held[p] for p in positions]
        text, length = self.ids[rows], self.lengths[rows]  # (B, L), (B,)
        if train:
            drop = self.dropped(positions)
            text[drop], length[drop] = 0, 0
        video = pixels(self.pool.video[rows])
        target, target_mask = self.targets(rows)
        maps, background = self.looked_at([self.pool.sources[r] for r in rows])
        return Batch(video, text, length, [self.pool.captions[r] for r in rows], self.categories[rows],
                     target, target_mask, torch.tensor(positions), None, maps, background)

    def targets(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """target, target_mask (B, N, E_cat) of the exact masks, where there are any and no teacher's maps stand in for
        them. Every token of a present category counts.

        `negatives` above 0 also pulls the maps of absent categories to zero (ours): then all maps can be read side by
        side.
        """
        target = torch.zeros(len(rows), int(np.prod(self.cfg.grid)), self.cfg.categories)
        mask = torch.zeros_like(target)
        if self.pool.masks is not None and not self.maps:
            size = self.pool.video.shape[1:4]
            mask += self.cfg.negatives
            clip, slot = np.nonzero(self.pool.mask_category[rows] >= 0)  # (P,) the clips' phenomena
            of = np.asarray(rows)[clip]
            bits = np.unpackbits(self.pool.masks[of, slot], axis=-1, count=int(np.prod(size))).reshape(-1, *size)
            covered = resample(torch.from_numpy(bits).float(), self.cfg.grid).flatten(1)  # (P, T' H' W') -> (P, N)
            category = self.pool.mask_category[of, slot]
            target[clip, :, category] = (covered >= POSITIVE - 1e-6).float()  # sizes that do not divide leave rounding
            mask[clip, :, category] = 1
        return target, mask


# -------------------------------------------------------------------------------------------------------- latents
def checksum(tensors: dict[str, Tensor]) -> int:
    """Of the tensors' bytes: safetensors notices a file cut short, but not a block that came back as zeros."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return total


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict, tag: str) -> None:
    """A safetensors file with `about` in its header: whole or absent, and the same bytes for the same contents. Until
    it is whole its name ends in tag.part."""
    header = json.dumps({**about, "checksum": checksum(tensors)}, sort_keys=True)
    part = path.with_name(f"{path.name}.{tag}.part")
    try:
        with open(part, "wb") as file:
            file.write(safetensors.torch.save(tensors, {"about": header}))
            file.flush()
            os.fsync(file.fileno())  # the name must not survive a power cut that the bytes do not
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_about(path: Path) -> dict:
    """What the header says. Raises ValueError with the reason for a damaged or missing file, OSError without a disk."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["about"])
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (safetensors.SafetensorError, KeyError, ValueError) as e:
        raise ValueError("cut short" if "ncomplete" in str(e) else "no safetensors file of encode.py") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What write_tensors wrote, checked. Raises as read_about."""
    about = read_about(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if checksum(tensors) != about.get("checksum"):
        raise ValueError("its checksum is another")
    return tensors, about


@dataclass
class Cache:
    """What encode.py made of a folder of videos, opened: the list of clips. `train` and `held` list the rows of either
    split, as a Pool's do."""
    folder: Path
    settings: dict  # all that shapes the clips
    files: list[str]
    names: list[str]  # of the videos they are from
    captions: list[str]
    categories: list[list[int]]  # of all 29
    train: list[int]
    held: list[int]
    summary: str
    key: str  # of settings and clips


def open_cache(cfg: Config, folder: Path, expected: dict | None = None) -> Cache:
    """The cache in `folder`, if it is of cfg's lineage and sizes and of the other settings `expected`, such as
    encode.identity(weights). Opens no clip. Raises UserError."""
    folder = Path(folder)
    try:
        stored = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        settings, (key, rows, done, total) = stored["settings"], map(index.get, ("key", "clips", "done", "videos"))
        files, names, captions, categories = map(list, zip(*rows)) if rows else ([], [], [], [])
        whole = (stored["key"] == digest(settings) and isinstance(done, int) and isinstance(total, int)
                 and all(isinstance(name, str) for name in (*files, *names, *captions)))
    except FileNotFoundError as e:
        raise UserError(f"There is no {e.filename}: `python encode.py --out {folder} ...` makes it, once it has gone "
                        "through.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{folder} is not what encode.py left there: its cache.json or index.json is damaged.")
    if key != stored["key"]:
        raise UserError(f"{folder} is stale: its index.json is of other settings than its cache.json; run encode.py "
                        "again.")
    fields = ("lineage", "frames", "height", "width", "channels", "text_dim", "text_len")
    for field, value in {**{field: getattr(cfg, field) for field in fields}, **(expected or {})}.items():
        if settings.get(field) != value:
            change = f"change --{field}, or " if field in fields else ""
            raise UserError(f"The clips in {folder} were made with {field} {settings.get(field)}, and this run has "
                            f"{value}: {change}encode again into another folder.")
    if not rows:
        raise UserError(f"There is no clip in {folder}: encode.py made none.")
    train, held, summary = shares(names, cfg.val_clips)
    if done < total:
        summary += f"; {total - done} of {total} videos are not there (yet)"
    return Cache(folder, settings, files, names, captions, categories, train, held, summary, digest([key, files]))


class Latents(Stream):
    """Batches of latents and text embeddings from a cache, read clip by clip."""

    def __init__(self, cfg: Config, cache: Cache, maps: Maps | None = None):
        """Reads the embedding of the empty caption. Raises UserError without it."""
        super().__init__(cfg, cache, maps)
        self.damaged: dict[str, str] = {}  # {file: reason}
        try:
            self.empty, about = read_tensors(cache.folder / "empty.safetensors")
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise UserError(f"{cache.folder / 'empty.safetensors'}, the embedding of the empty caption, cannot be read "
                            f"({reason}): run encode.py again.") from None
        self.expect(about, "empty.safetensors")

    def expect(self, about: dict, file: str) -> None:
        if about["key"] != digest(self.pool.settings):
            raise UserError(f"{self.pool.folder / file} is stale, made with other settings or weights than cache.json "
                            "beside it says: delete it and run encode.py again.")

    def read(self, row: int) -> dict | None:
        """The tensors of a row's file, and its source as in Pool.sources; None where it is damaged, which is said once.
        UserError where it is stale."""
        file = self.pool.files[row]
        if file in self.damaged:
            return None
        try:
            tensors, about = read_tensors(self.pool.folder / "clips" / file)
        except (OSError, ValueError) as e:
            self.damaged[file] = str(getattr(e, "strerror", None) or e)
            tqdm.write(f"{self.pool.folder / 'clips' / file} is left out ({self.damaged[file]}); delete it and run "
                       "encode.py again to mend it.", file=sys.stderr)
            return None
        self.expect(about, f"clips/{file}")
        source = [about["file"], about["times"][0], about["size"], about["crop"]]
        return {**tensors, "text_length": torch.tensor(about["text_length"]), "source": source}

    def clip(self, row: int, among: list[int]) -> tuple[int, dict]:
        """The row's tensors, or, round the list `among` in which it is, the next row's that can be read, and its
        number. Raises Stopped when none can."""
        at = among.index(row)
        for candidate in (*among[at:], *among[:at]):
            tensors = self.read(candidate)
            if tensors is not None:
                return candidate, tensors
        raise Stopped(f"No clip in {self.pool.folder} can be read any more.")

    def batch(self, positions: Iterable[int], train: bool = True) -> Batch:
        """As Clips.batch. A latent with a spread (CogVideoX) is drawn, mean + std * noise, the noise a function of
        (seed, position); of the position alone for held-out clips: runs of every seed are judged on the same."""
        positions = list(positions)
        among = self.pool.train if train else self.pool.held
        clips = [self.clip(self.row(p) if train else among[p], among) for p in positions]
        drop = self.dropped(positions) if train else torch.zeros(len(positions), dtype=torch.bool)
        latents, texts, lengths = [], [], []
        for p, gone, (_, tensors) in zip(positions, drop, clips):
            stream = [self.cfg.seed, 5, p] if train else [0, 6, p]
            latent, text = tensors["mean"].float(), self.empty["text"] if gone else tensors["text"]
            if "std" in tensors:
                noise = np.random.default_rng(stream).standard_normal(tuple(latent.shape), np.float32)
                latent = latent + tensors["std"].float() * torch.from_numpy(noise)
            odd = -latent.shape[1] % self.cfg.patch_t  # CogVideoX 1.5 sees pairs: its trainer repeats the first frame
            latents.append(torch.cat([latent[:, :1]] * odd + [latent], dim=1))
            missing = self.pool.settings["text_len"] - len(text)  # zeros that were not worth storing
            texts.append(torch.nn.functional.pad(text.float(), (0, 0, 0, missing)))
            lengths.append(torch.zeros((), dtype=torch.int64) if gone else tensors["text_length"])
        rows = [row for row, _ in clips]
        target = torch.zeros(len(rows), int(np.prod(self.cfg.grid)), self.cfg.categories)  # no maps: nothing is said
        maps, background = self.looked_at([tensors["source"] for _, tensors in clips])
        return Batch(None, torch.stack(texts), torch.stack(lengths), [self.pool.captions[row] for row in rows],
                     self.categories[rows], target, torch.zeros_like(target), torch.tensor(positions),
                     torch.stack(latents), maps, background)
