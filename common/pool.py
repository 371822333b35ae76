"""A pool: clips of the training size on disk, as bytes that are mapped into memory.

    video.u8     every clip (F, H, W, 3) uint8, one after the other
    masks.u8     where the phenomena of synthetic clips are, as packed bits; empty for videos
    meta.json    captions, categories, where each clip is from, and which clips are held out;
                 a checksum of each clip, and one of all this

Reading clips costs a seventh of drawing synthetic ones or less, and training reads each often.
A pool is a folder that is whole or absent; one that was damaged later counts as absent. Reader,
builder and writer are here; what clips go into it is the business of a source (data.py).
"""
import concurrent.futures
import contextlib
import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import is_intact, lock, sealed, whole_folder
from config import Stopped, UserError

FORMAT = 2  # of these files
MASKS = 2  # phenomena with a mask a clip, at most
CATEGORIES = 29  # numbers that a label may have


@dataclass
class PoolClip:
    """One clip on its way into a pool."""
    video: np.ndarray  # (F, H, W, 3) uint8
    caption: str
    categories: list[int]  # of all 29
    source: list  # file, start in seconds, [height, width], crop, as in a Window
    masks: dict[int, np.ndarray] | None = None  # {category: (F, H, W) bool}; None = not known


@dataclass
class Pool:
    """Clips on disk, opened read-only. `train` and `held` list the rows of either split."""
    video: np.ndarray  # (n, F, H, W, 3) uint8, mapped
    masks: np.ndarray | None  # (n, MASKS, bytes) uint8, mapped: packed bits of (F, H, W)
    mask_category: np.ndarray  # (n, MASKS) int64, -1 = no mask
    captions: list[str]
    categories: list[list[int]]  # of all 29
    train: list[int]
    held: list[int]
    sources: list[list]  # as in a PoolClip
    summary: str
    path: Path  # the folder
    unread: dict[int, int]  # rows that this process has not read yet: their checksums, if known

    @property
    def key(self) -> str:
        """The folder's name, with a hash of all that shapes the clips."""
        return self.path.name

    @property
    def names(self) -> list[str]:
        """The file that each clip is from."""
        return [source[0] for source in self.sources]

    @classmethod
    def open(cls, path: Path, size: tuple[int, int, int]) -> "Pool | None":
        """The pool in folder `path` with clips of `size` (F, H, W); None where it is not whole."""
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            n = len(meta["captions"])
            video = np.memmap(path / "video.u8", np.uint8, "r").reshape(n, *size, 3)
            mask_category = np.array(meta["mask_category"], np.int64).reshape(n, MASKS)
            masks = None
            if meta["masks"]:
                mask_bytes = -(-math.prod(size) // 8)
                masks = np.memmap(path / "masks.u8", np.uint8, "r").reshape(n, MASKS, mask_bytes)
            unread = dict(enumerate(meta.get("checksums", ())))  # older pools have none
            if not (is_intact(meta) and is_consistent(meta)):
                return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
        return cls(video, masks, mask_category, meta["captions"], meta["categories"], meta["train"],
                   meta["held"], meta["sources"], meta["summary"], path, unread)

    def clips(self, rows: list[int]) -> np.ndarray:
        """(B, F, H, W, 3) uint8: the pixels of these rows.

        Raises Stopped where pixels or masks are not those that were written. The pool is then put
        out of use, so that the next start builds it anew.
        """
        for row in self.unread.keys() & rows:
            packed = b"" if self.masks is None else self.masks[row]
            if checksum(self.video[row], packed) != self.unread[row]:
                with contextlib.suppress(OSError):
                    (self.path / "meta.json").unlink()
                raise Stopped(f"Clip {row} in {self.path} is damaged; the next start builds the "
                              "clips anew, and a training run goes on with --resume.")
            del self.unread[row]
        return self.video[rows]


def telling_prompts(clips) -> dict[str, list[int]]:
    """{caption: its categories} of eight held-out clips, those first that show something new.

    clips: a data.ClipOrder, over a Pool or over a cache of latents.
    """
    shown = set()  # categories that a prompt so far has
    first, rest = {}, {}
    for row in clips.pool.held:
        present = clips.categories[row].nonzero().flatten().tolist()
        (first if set(present) - shown else rest)[clips.pool.captions[row]] = present
        shown |= set(present)
    prompts = {caption: present for caption, present in (first | rest).items() if caption.strip()}
    return dict(list(prompts.items())[:8]) or {"a clip": []}


def checksum(video, masks) -> int:
    """Of a clip's bytes, as they are on the disk."""
    return zlib.crc32(masks, zlib.crc32(video))


def is_consistent(meta: dict) -> bool:
    """Do the lists of a meta.json fit each other? Raises KeyError or TypeError if they are none."""
    rows = set(range(len(meta["captions"])))
    labels = {category for field in ("categories", "mask_category")
              for clip in meta[field] for category in clip}
    return bool(len(meta["categories"]) == len(meta["sources"]) == len(rows)
                and meta["train"] and meta["held"]
                and rows.issuperset(meta["train"] + meta["held"])
                and all(isinstance(text, str) for text in [*meta["captions"], meta["summary"]])
                and labels <= set(range(-1, CATEGORIES)))


def open_or_build(path: Path, size: tuple[int, int, int], source, settings: dict,
                  progress: bool) -> Pool:
    """The pool in folder `path`, built from a source if it is not there.

    source: `clips(progress)` yields every PoolClip, `split(names)` says which rows are held out.
    Raises UserError without a place or without clips, Stopped when building had to stop.
    """
    if pool := Pool.open(path, size):
        return pool
    place = path.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(0, "it is not writable")
    except OSError as e:
        raise UserError(f"--pool_dir {place} cannot hold clips: {e.strerror}.") from None

    with lock(place) as locked:
        for leftover in place.glob(f"{path.name}.*") if locked else ():
            shutil.rmtree(leftover, ignore_errors=True)  # of builds that were killed
        if not Pool.open(path, size):  # another run may have built it while we waited
            build(path, source, settings, progress)
    if pool := Pool.open(path, size):
        return pool
    raise Stopped(f"The clips written to {path} cannot be read back; is the disk sound?")


def check_room(place: Path, needed: int) -> None:
    """Raises UserError where the disk of the folder `place`, that is or will be, has less room than
    the bytes needed for the clips."""
    there = place.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(f"The clips need {needed / 1e9:,.1f} GB, and the disk of --pool_dir {place} "
                        f"has {free / 1e9:,.1f} GB free: lower --world_clips or --val_clips.")


def build(path: Path, source, settings: dict, progress: bool) -> None:
    """Write a source's clips into the folder `path`, which is whole or absent."""
    try:
        with whole_folder(path) as folder:
            write(folder, source, settings, progress)
    except OSError as e:
        reason = e.strerror or e
        raise Stopped(f"The clips could not be written to {path.parent}: {reason}.") from None
    except concurrent.futures.BrokenExecutor:
        raise Stopped("A process drawing clips died, for want of memory perhaps: fewer --threads "
                      "need less.") from None


def write(folder: Path, source, settings: dict, progress: bool) -> None:
    """The files of a pool. Raises OSError.

    Plain files: writing to one that is mapped into memory kills the process when the disk is full.
    """
    rows = []  # of each clip: caption, categories, those of its masks, where it is from, checksum
    with open(folder / "video.u8", "wb") as video, open(folder / "masks.u8", "wb") as masks:
        for clip in source.clips(progress):
            pixels = clip.video.tobytes()
            packed = b""
            if clip.masks is not None:
                nothing = np.zeros(clip.video.shape[:3], bool)
                some = [*clip.masks.values(), *[nothing] * MASKS][:MASKS]
                packed = b"".join(np.packbits(mask).tobytes() for mask in some)
            video.write(pixels)
            masks.write(packed)
            mask_category = [*(clip.masks or ()), *[-1] * MASKS][:MASKS]
            rows.append((clip.caption, sorted(set(clip.categories)), mask_category, clip.source,
                         checksum(pixels, packed)))
        has_masks = masks.tell() > 0

        # The folder's final name must not survive a power cut that its bytes do not.
        for file in (video, masks):
            file.flush()
            os.fsync(file.fileno())
    train, held, summary = source.split([name for *_, (name, *_), _ in rows])
    columns = "captions", "categories", "mask_category", "sources", "checksums"
    meta = {**dict(zip(columns, zip(*rows))), "masks": has_masks, "train": train, "held": held,
            "summary": summary, "settings": settings}
    (folder / "meta.json").write_text(json.dumps(sealed(meta)), encoding="utf-8")
