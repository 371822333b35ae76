"""Clips for training: the physics world, a folder of videos with captions, or latents of one.

    world, or videos  --open_pool-->  Pool on disk   --Clips.batch(positions)-->    Batch of pixels
    videos            --encode.py-->  cache on disk  --Latents.batch(positions)-->  Batch of latents

Either source is turned once into a pool: clips of the training size as bytes, captions, categories,
and the exact masks of synthetic clips (common/pool.py). A pool is named by a hash of all that
shapes it, so runs with the same settings share it. common/video.py says how clips are cut from
videos, and official/cache.py reads what encode.py made of them.

Everything behind a pool or a cache is a pure function of the position in the training order (which
clip, caption dropout, targets): a restart has no state to restore.

Letters: B clips, F frames, H W pixels or token grid, N video tokens, L text tokens, E_cat
categories.
"""
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import world
from common.annotations import OTHER_SLOTS, Folder, split_by_video
from common.files import (
    cores, digest, is_intact, join_some, map_in_processes, sealed, write_text)
from common.pool import FORMAT, Pool, PoolClip, check_room, open_or_build
from common.run import description
from common.video import Cut, pixels
from config import Config, UserError, stream
from physics import CATEGORIES

HELD_OUT = 1_000_000_000  # the world's indices from here on are never trained on
POSITIVE = 0.25  # a token is positive when at least this share of its area is covered
POOL_FROM = 1000  # fewer synthetic clips are drawn before other processes would have started


def category_names(cfg: Config) -> tuple[str, ...]:
    """Names of the E_cat categories: WISA's 17 laws, with categories = 29 also its other slots."""
    return (*CATEGORIES, *OTHER_SLOTS)[:cfg.categories]


@dataclass
class Batch:
    """What one step needs, from any source: pixels, or latents for a network behind a VAE."""
    video: Tensor | None  # (B, 3, F, H, W) float32 in [-1, 1]; None where there are latents
    text: Tensor  # (B, L) int64 word ids, 0 = pad; beside latents embeddings (B, L, D_text) float32
    text_length: Tensor  # (B,) int64; 0 = the caption was dropped or is empty
    caption: list[str]  # as in the data, also where dropped
    categories: Tensor  # (B, E_cat) float32 multi-hot
    target: Tensor  # (B, N, E_cat) float32, 1 where the phenomenon covers a quarter of the token
    target_mask: Tensor  # (B, N, E_cat) float32, 1 where `target` says anything
    index: Tensor  # (B,) int64 position in the training order
    latent: Tensor | None = None  # (B, C, F, H, W) float32 in the network's own scale
    # A teacher's attention (uniform = 1), NaN where it says nothing; align.py makes targets of it:
    maps: Tensor | None = None  # (B, N, E_cat) float32, for each phenomenon
    background: Tensor | None = None  # (B, N) float32, for a generic question

    @property
    def x(self) -> Tensor:
        """(B, C, F, H, W): what the network learns to draw."""
        return self.video if self.latent is None else self.latent

    def to(self, device) -> "Batch":
        """The batch with all of its tensors on a device."""
        moved = {name: value.to(device, non_blocking=True)
                 for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved)


# --- words --------------------------------------------------------------------------------------
class Tokenizer:
    """Words <-> ids. Id 0 is padding, 1 any unknown word.

    Captions become lower case. A word is a run of letters and digits, in which an apostrophe may
    stand; punctuation is dropped.
    """

    def __init__(self, words: Iterable[str]):
        self.words = list(words)
        self.ids = {word: i for i, word in enumerate(self.words, start=2)}

    @staticmethod
    def split(caption: str) -> list[str]:
        """The words of a caption."""
        return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.lower())

    @classmethod
    def from_captions(cls, captions: Iterable[str]) -> "Tokenizer":
        """The tokenizer whose vocabulary is every word of these captions."""
        return cls(sorted({word for caption in captions for word in cls.split(caption)}))

    def __len__(self) -> int:
        """Size of the vocabulary, padding and unknown included."""
        return len(self.words) + 2

    def encode_all(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids (B, length) int64 padded with 0, and how many are words (B,) int64. A longer caption
        is cut."""
        ids = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in zip(ids, captions):
            known = [self.ids.get(word, 1) for word in self.split(caption)[:length]]
            row[:len(known)] = torch.tensor(known)
        return ids, (ids > 0).sum(1)

    def unknown(self, caption: str) -> list[str]:
        """The caption's words that are not in the vocabulary, each once."""
        return list(dict.fromkeys(word for word in self.split(caption) if word not in self.ids))

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(sealed({"words": self.words}), ensure_ascii=False))

    @property
    def key(self) -> str:
        """Of the words and their order, which a run's config.json remembers."""
        return digest(self.words)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises UserError when the file is missing or broken, or is not of the run beside it."""
        path = Path(path)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            words = stored["words"]
            # They must be text, and all of them different.
            if not isinstance(words, list) or sorted(set(words)) != sorted(map(str, words)):
                raise ValueError
            if not is_intact(stored):
                raise UserError(f"{path} is damaged: its words are not those that were written.")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: no tokenizer was saved there.") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path} is not a tokenizer: a JSON object with a list of different "
                            "words is expected.") from None
        tokenizer = cls(words)
        run = path.parent
        trained_with = description(run).get("tokenizer") if (run / "config.json").exists() else None
        if trained_with not in (None, tokenizer.key):
            raise UserError(f"{path} is not the tokenizer that {run} was trained with: it has "
                            "other words, or the same in another order.")
        return tokenizer


def check_words(tokenizer: Tokenizer, captions: Iterable[str], length: int, source: str) -> None:
    """Say on stderr which words of these captions the vocabulary of `source` lacks.

    All of them would be one and the same word. Raises UserError where that loses half of the words,
    or in half of the captions, of which `length` words are read, what sets them apart.
    """
    # Captions that are the same for a model that knows every word are one here.
    split = {tuple(tokenizer.split(caption)[:length]): caption for caption in captions}
    words = {word for caption in split for word in caption}
    lost = sorted(words - tokenizer.ids.keys())
    if not lost:
        return
    seen = {}
    harmed = []  # captions that lose what sets them apart
    for caption, text in split.items():
        ids = tuple(tokenizer.ids.get(word, 1) for word in caption)
        other = seen.setdefault(ids, text)
        if other != text:
            harmed.append(f"{other[:60]!r} and {text[:60]!r} become the same")
        elif set(ids) == {1}:
            harmed.append(f"no word of {text[:60]!r} is known")
    said = f"{source} never read {len(lost)} of {len(words)} words: {join_some(lost)}"
    if harmed:
        said += f"; {len(harmed)} of {len(split)} captions are not told apart, such as: {harmed[0]}"
    if 2 * len(lost) >= len(words) or 2 * len(harmed) >= len(split):
        raise UserError(f"{said}; these are too many: train a backbone on these captions.")
    print(f"Warning: {said}; the model takes all these words for one.", file=sys.stderr)


# --- the token grid -----------------------------------------------------------------------------
@functools.lru_cache
def area_weights(n: int, size: int) -> Tensor:
    """(n, size): share of cell j of `size` equal cells that pixel i of n covers.

    Columns sum to one.
    """
    pixel = np.arange(n)[:, None] * size  # both in units of 1 / (n size)
    cell = np.arange(size)[None] * n
    overlap = np.minimum(pixel + size, cell + n) - np.maximum(pixel, cell)
    return torch.from_numpy((overlap.clip(min=0) / n).astype(np.float32))


def resample(maps: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(..., F, H, W) float -> (..., *grid): the average over each cell's area, whether or not the
    sizes divide."""
    for axis, size in zip((-1, -2, -3), reversed(grid)):
        if maps.shape[axis] != size:
            weights = area_weights(maps.shape[axis], size).to(maps)
            maps = (maps.movedim(axis, -1) @ weights).movedim(-1, axis)
    return maps


def covered(masks: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(..., F, H, W) masks -> (..., N) bool: the tokens of which a quarter or more is covered."""
    share = resample(masks.float(), grid).flatten(-3)
    return share >= POSITIVE - 1e-6  # sizes that do not divide leave rounding errors


def latent_frames(n: int) -> np.ndarray:
    """(1 + n // 4, 4) the frames of a clip of n = 1 + 4 m that each latent of a causal VAE shows.

    Latent 0 is frame 0 alone (here four times), latent k the frames 4 k - 3 .. 4 k.
    """
    latent = np.arange(1 + (n - 1) // 4)
    return (4 * latent[:, None] - [3, 2, 1, 0]).clip(min=0)


def token_times(cfg: Config) -> np.ndarray:
    """(T',) seconds from a clip's start to the mean time of the frames that a token shows.

    Frame i of a video is shown at i / fps; a clip of the world lasts one second.
    """
    if not cfg.latent:
        fps = cfg.fps if cfg.data_dir else cfg.frames
        return np.arange(cfg.frames).reshape(-1, cfg.patch_t).mean(1) / fps
    latents = latent_frames(cfg.frames).mean(1) / cfg.fps
    missing = -len(latents) % cfg.patch_t  # the first latent is repeated, as it is in training
    latents = np.concatenate([latents[:1]] * missing + [latents])
    return latents.reshape(-1, cfg.patch_t).mean(1)


# --- two sources of clips -----------------------------------------------------------------------
class SyntheticClips:
    """Clips of the physics world: 0, 1, ... to train on, from HELD_OUT on to validate."""
    name = "world"

    def __init__(self, cfg: Config, physics: str = "true"):
        """physics: true | weak | still, as world.make_clip has it."""
        self.cfg = cfg
        self.drawing = world.drawing(cfg, physics=physics)

    def settings(self) -> dict:
        """All that shapes the clips."""
        # Another line of these files draws another world.
        code = hashlib.sha256(b"".join(path.read_bytes() for path in world.SOURCES)).hexdigest()
        return {"clips": self.cfg.world_clips, "seed": self.cfg.world_seed, "code": code,
                **self.drawing}

    def clips(self, progress: bool) -> Iterator[PoolClip]:
        """Every clip, in order."""
        cfg = self.cfg
        indices = [*range(cfg.world_clips), *range(HELD_OUT, HELD_OUT + cfg.val_clips)]
        drawn = tqdm(self.draw(indices), "drawing the world", len(indices), unit="clip",
                     disable=not progress, leave=False)
        for index, clip in zip(indices, drawn):
            masks = {}
            for actor in clip.actors:  # two actors of one phenomenon share its mask
                masks[actor.category] = actor.mask | masks.get(actor.category, False)
            # where it is from, as if each clip were a file
            frame = [cfg.height, cfg.width]
            source = [f"clip {index} of the world", 0.0, frame, [0, 0, cfg.width, cfg.height]]
            yield PoolClip(clip.video, clip.caption, clip.categories, source, masks)

    def draw(self, indices: list[int]) -> Iterator[world.Clip]:
        """The clips in order, drawn on all cores when they are many."""
        cfg = self.cfg
        make = functools.partial(world.make_clip, cfg.world_seed, **self.drawing)
        workers = min(cores(cfg.threads), 1 + len(indices) // POOL_FROM)
        if workers == 1:
            return map(make, indices)
        clip_bytes = 5 * cfg.frames * cfg.height * cfg.width  # three colours and two masks
        chunk = min(max(2**24 // clip_bytes, 1), 32)  # 16 MB a message
        return map_in_processes(make, indices, workers, chunk)

    def split(self, names: list[str]) -> tuple[list[int], list[int], str]:
        """Rows to train on, rows held out, and a summary."""
        n = self.cfg.world_clips
        kind = self.drawing["physics"]
        summary = f"{n} clips of the world, {kind} physics, {self.cfg.val_clips} more held out"
        return list(range(n)), list(range(n, len(names))), summary


class VideoClips:
    """Clips cut from the videos of a folder."""
    name = "folder"

    def __init__(self, cfg: Config):
        """Reads the annotations. Raises UserError."""
        self.cfg = cfg
        self.folder = Folder(cfg.data_dir, cfg.annotations)

    def settings(self) -> dict:
        """All that shapes the clips."""
        videos = [(video.name, video.caption, video.categories, os.path.getsize(video.path),
                   os.path.getmtime(video.path)) for video in self.folder.videos.values()]
        skipped = [self.folder.skipped, self.folder.unknown]
        return {"dir": str(self.folder.dir.resolve()), "fps": self.cfg.fps,
                "windows": self.cfg.windows, "videos": digest(videos), "skipped": digest(skipped)}

    def clips(self, progress: bool) -> Iterator[PoolClip]:
        """Every clip, video by video."""
        cfg = self.cfg
        cut = Cut(cfg.frames, cfg.fps, cfg.windows, cfg.height, cfg.width)
        read = tqdm(self.folder.read(cut, cores(cfg.threads)), "reading videos",
                    len(self.folder.videos), unit="video", disable=not progress, leave=False)
        for video, windows in read:
            content = video.content if windows else ""
            for window in windows:
                source = [video.name, window.start, list(window.size), list(window.crop), content]
                yield PoolClip(window.video, video.caption, video.categories, source)

    def split(self, names: list[str]) -> tuple[list[int], list[int], str]:
        """Rows to train on, rows held out, and a summary. Raises UserError without any clip."""
        skipped = self.folder.skipped_sentence()
        if not names:
            reason = skipped or "; the annotations name no video"
            raise UserError(f"No clip could be made from {self.folder.dir}{reason}.")
        train, held, summary = split_by_video(names, self.cfg.val_clips)
        return train, held, summary + skipped + self.folder.unknown_labels()


def pool_place(cfg: Config, source) -> tuple[Path, dict]:
    """The folder of the pool of this source's clips, whether or not it is there, and its settings."""
    size = (cfg.frames, cfg.height, cfg.width)
    settings = {"format": FORMAT, "size": size, "val_clips": cfg.val_clips, **source.settings()}
    return Path(cfg.pool_dir) / f"{source.name}-{digest(settings)[:12]}", settings


def open_pool(cfg: Config, progress: bool = True, stage: str = "physics") -> Pool:
    """The pool of what a stage (base | physics) learns from, built if need be (bar and summary when
    `progress`): stage one has its own world, or its own folder of videos where one is given.

    UserError: no usable videos, annotations or place for the pool. Stopped: the disk is full, or a
    worker was killed.
    """
    if stage == "base" and cfg.base_data_dir:  # captions and labels stand in that folder
        cfg = replace(cfg, data_dir=cfg.base_data_dir, annotations="")
    if cfg.data_dir:
        source = VideoClips(cfg)
    else:
        source = SyntheticClips(cfg, cfg.physics if stage == "base" else "true")
    size = (cfg.frames, cfg.height, cfg.width)
    path, settings = pool_place(cfg, source)
    if not (cfg.data_dir or path.exists()):  # how much a folder of videos gives is not known yet
        clip_bytes = 3 * cfg.frames * cfg.height * cfg.width
        check_room(path.parent, (cfg.world_clips + cfg.val_clips) * clip_bytes)
    pool = open_or_build(path, size, source, settings, progress)
    if progress:
        print(pool.summary)
    return pool


def open_pools(cfg: Config) -> dict[str, Pool]:
    """{stage: its pool} of the stages that have steps; one pool where both learn from the same."""
    pools = {}
    if cfg.base_steps and cfg.physics_steps and cfg.base_data_dir:
        VideoClips(cfg)  # what is wrong with its folder is seen before the other's videos are read
    if cfg.base_steps:
        pools["base"] = open_pool(cfg, stage="base")
    if cfg.physics_steps:
        alike = not cfg.base_data_dir if cfg.data_dir else cfg.physics == "true"
        pools["physics"] = pools["base"] if pools and alike else open_pool(cfg)
    return pools


# --- the order of clips -------------------------------------------------------------------------
class ClipOrder:
    """The endless order of training clips: position p is clip p mod n of epoch p div n, and every
    epoch has an order of its own.

    pool: a Pool or a cache of latents. maps: a teacher's attention maps (vlm/maps.py), or None.
    """
    cut = 0  # captions cut short

    def __init__(self, cfg: Config, pool, maps=None):
        self.cfg = cfg
        self.pool = pool
        self.maps = maps
        self.categories = torch.zeros(len(pool.captions), cfg.categories)  # (n, E_cat) multi-hot
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
        """How many training clips have no map, so that L_fine_align skips them."""
        return sum(not self.has_map(row) for row in self.pool.train) if self.maps else 0

    def has_map(self, row: int) -> bool:
        """Is there any map of the video that this clip is from? Which seconds a clip shows is only
        known where it is read."""
        return self.maps.covers(self.pool.names[row])

    def teacher_maps(self, sources: list) -> tuple[Tensor | None, Tensor | None]:
        """A teacher's maps (B, N, E_cat) and background (B, N) for clips from `sources`; NaN where
        it says nothing."""
        if not self.maps:
            return None, None
        cfg = self.cfg
        times = token_times(cfg)
        n = math.prod(cfg.grid)
        silent = torch.full((n, cfg.categories), math.nan), torch.full((n,), math.nan)
        found = [self.maps.on_tokens(source, times, cfg.grid, cfg.categories) or silent
                 for source in sources]
        maps, background = map(torch.stack, zip(*found))
        return maps, background

    @property
    def categories_present(self) -> list[int]:
        """Indices of the categories that occur in the training clips."""
        return self.categories[self.pool.train].any(0).nonzero().flatten().tolist()

    def row(self, position: int) -> int:
        """The row of the pool at a position of the training order."""
        epoch, at = divmod(position, len(self))
        return int(self.order(epoch)[at])

    @functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
    def order(self, epoch: int) -> np.ndarray:
        """The training rows, (n,), as they follow each other in an epoch."""
        return stream(self.cfg.seed, "order", epoch).permutation(self.pool.train)

    def dropped(self, positions: list[int]) -> Tensor:
        """(B,) bool: whose caption is left out, so that guidance has an unconditional model."""
        draws = [stream(self.cfg.seed, "caption dropout", p).random() for p in positions]
        return torch.tensor(draws) < self.cfg.caption_dropout


class Clips(ClipOrder):
    """Batches of pixels from a pool."""

    def __init__(self, cfg: Config, pool: Pool, tokenizer: Tokenizer, maps=None):
        super().__init__(cfg, pool, maps)
        self.ids, self.lengths = tokenizer.encode_all(pool.captions, cfg.text_len)
        self.cut = sum(len(tokenizer.split(caption)) > cfg.text_len for caption in pool.captions)

    def has_map(self, row: int) -> bool:
        """Is there a map of some of the seconds that this clip shows?"""
        name, start, *_ = self.pool.sources[row]
        return self.maps.covers(name, start + token_times(self.cfg))

    def batch(self, positions: Iterable[int], train: bool = True) -> Batch:
        """The clips at these positions of the training order (train), or of the held-out list
        (then no caption is dropped)."""
        positions = list(positions)
        rows = [self.row(p) if train else self.pool.held[p] for p in positions]

        # Words: a dropped caption has none.
        text = self.ids[rows]  # (B, L)
        length = self.lengths[rows]  # (B,)
        if train:
            drop = self.dropped(positions)
            text[drop] = 0
            length[drop] = 0

        # Where each phenomenon is: by the exact masks, or by a teacher's maps.
        target, target_mask = self.targets(rows)
        maps, background = self.teacher_maps([self.pool.sources[row] for row in rows])
        return Batch(
            video=pixels(self.pool.clips(rows)), text=text, text_length=length,
            caption=[self.pool.captions[row] for row in rows], categories=self.categories[rows],
            target=target, target_mask=target_mask, index=torch.tensor(positions),
            maps=maps, background=background)

    def targets(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """target, target_mask (B, N, E_cat) of the exact masks. Every token of a present category
        counts. Both are zero where there are no masks, or where a teacher's maps stand in for them.

        `negatives` above 0 also pulls the maps of absent categories to zero (ours): then all maps
        can be read side by side.
        """
        target = torch.zeros(len(rows), math.prod(self.cfg.grid), self.cfg.categories)
        target_mask = torch.zeros_like(target)
        if self.pool.masks is None or self.maps:
            return target, target_mask

        # The masks of all clips at once, one after the other: n of them.
        rows = np.asarray(rows)
        clip, slot = np.nonzero(self.pool.mask_category[rows] >= 0)  # (n,) where in the batch
        category = self.pool.mask_category[rows[clip], slot]  # (n,)
        packed = self.pool.masks[rows[clip], slot]  # (n, bytes)
        size = self.pool.video.shape[1:4]
        masks = np.unpackbits(packed, axis=-1, count=math.prod(size)).reshape(-1, *size)

        target_mask += self.cfg.negatives
        is_covered = covered(torch.from_numpy(masks), self.cfg.grid)  # (n, N)
        target[clip, :, category] = is_covered.float()
        target_mask[clip, :, category] = 1
        return target, target_mask
