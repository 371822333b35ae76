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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import world
from common.files import ahead, bar, cores, digest, only_one, write_text
from common.video import OTHER_SLOTS, Folder, pixels
from config import Config, Stopped, UserError, stream
from physics import phenomena
from physics.phenomena import CATEGORIES


FORMAT = 2  # of the pool's files
HELD_OUT = 1_000_000_000  # the world's indices from here on are never trained on
POSITIVE = 0.25  # a token is positive when at least this share of its area is covered
MASKS = 2  # phenomena with a mask a clip, at most
POOL_FROM = 1000  # drawing fewer world clips than this is done before other processes would have started


def category_names(cfg: Config) -> tuple[str, ...]:
    """Names of the E_cat categories: WISA's 17 laws, with cfg.categories = 29 also its twelve other slots."""
    return (*CATEGORIES, *OTHER_SLOTS)[:cfg.categories]


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
        write_text(path, json.dumps({"words": self.words}, ensure_ascii=False))

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
        files = (Path(world.__file__), Path(phenomena.__file__))  # other files draw another world
        code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
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


# ----------------------------------------------------------------------------------------------------------- the stream
class Stream:
    """The order of clips. Position p of the endless stream is clip order[p mod n] of epoch p div n."""
    cut = 0  # captions cut short

    def __init__(self, cfg: Config, pool, maps=None):
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
            order = stream(self.cfg.seed, "order", epoch).permutation(self.pool.train)
            self.orders = {**dict(list(self.orders.items())[-1:]), epoch: order}  # a batch may lie across two epochs
        return int(self.orders[epoch][at])

    def dropped(self, positions: list[int]) -> Tensor:
        """(B,) bool: whose caption is left out, so that guidance has an unconditional model."""
        draws = [stream(self.cfg.seed, "caption dropout", p).random() for p in positions]
        return torch.tensor(draws) < self.cfg.caption_dropout

    def held_out(self) -> Batch:
        """All validation clips, index 0 upwards."""
        return self.batch(range(len(self.pool.held)), train=False)


class Clips(Stream):
    """Batches of pixels from a pool."""

    def __init__(self, cfg: Config, pool: Pool, tokenizer: Tokenizer, maps=None):
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
