"""The latent cache: its writer, which encode.py runs, and its reader, which makes batches of it.

    cache.json, clips/NAME-NofM.safetensors, index.json     as common/store.py says
    empty.safetensors                                       the embedding of the empty caption

A clip's file holds the latent's mean (CogVideoX: and std), the text embedding and the 29
categories. It is read when its clip is asked for, never before. If it is damaged, the next clip
that can be read stands in for it: which one depends on the files alone.

Letters: B clips, C F H W the latent and its grid, L text tokens, N video tokens, E_cat categories.
"""
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config
from common.annotations import LABELS, Folder, Video, split_by_video
from common.files import cores, digest, read_json
from common.store import Kind, Store, clip_file
from common.video import Cut, Window, pixels, reason_of
from config import Config, Stopped, UserError, stream
from data import Batch, ClipOrder
from official.encoders import VAE, TextEncoder
from official.folder import Lineage, channels_of, identity

FORMAT = 1  # of the cache's files
GROUP = 64  # videos whose captions are encoded together, before the VAE takes over the device
EMPTY = "empty.safetensors"


class CacheRow(NamedTuple):
    """What index.json says of a clip's file."""
    file: str
    video: str
    caption: str
    categories: list  # of all 29
    content: str = ""  # of the video, as Video.content says it; older rows do not tell


CACHE = Kind("cache.json", "encode.py", CacheRow)


# --- writing ------------------------------------------------------------------------------------
def settings_of(args, lineage: Lineage, weights: Path, dtype: torch.dtype) -> dict:
    """All that shapes the cache's numbers, but for the videos themselves."""
    vae = read_json(weights / "vae" / "config.json")
    text = read_json(weights / "text_encoder" / "config.json")
    fields = ("frames", "fps", "height", "width", "windows", "captions", "phys_law", "tiled")
    return {"format": FORMAT, "lineage": lineage.name,
            **{field: getattr(args, field) for field in fields},
            "dtype": str(dtype).removeprefix("torch."),
            "text_len": lineage.preset.text_len, "text_dim": text.get("d_model"),
            "channels": channels_of(vae),
            **identity(weights)}


class Encoder:
    """Makes the files of videos."""

    store: Store  # to write to

    def __init__(self, weights: Path, device: str, dtype: torch.dtype, tiled: bool,
                 text_batch: int):
        """Reads the weights. Raises UserError."""
        self.text = TextEncoder(weights, device, dtype)
        self.vae = VAE(weights, device, dtype, tiled)
        self.dtype = dtype  # of what is stored
        self.text_batch = text_batch  # captions at once
        self.made = 0  # clips
        self.cut_captions = 0  # that were too long

    def write_empty(self) -> None:
        """The embedding of the empty caption."""
        embeddings, _ = self.text([""] * self.text_batch, self.text_batch)
        tensors = {"text": self.stored_text(embeddings[0], 0)}
        self.store.write(self.store.folder / EMPTY, tensors, {"text_length": 0})

    def write_videos(self, folder: Folder, videos: dict[str, Video], have: set[str], cut: Cut,
                     bar: tqdm) -> None:
        """Encode these videos ({NAME in the store: video}) but for the files in `have`. The videos
        that gave none are noted in folder.skipped."""
        threads = min(4, cores(0))  # each reads ahead a video's clips, a hundred megabytes apiece
        for at in range(0, len(videos), GROUP):
            names = list(videos)[at:at + GROUP]
            group = [videos[name] for name in names]
            captions = [video.caption for video in group]
            # Always the same number at once: a batch of another shape may round differently, and a
            # clip would depend on where the run was interrupted, or on its shard.
            padded = captions + [""] * (-len(captions) % self.text_batch)
            embeddings, lengths = self.text(padded, self.text_batch)
            self.cut_captions += self.text.too_long(captions)
            read = folder.read(cut, threads, group)
            for name, (video, windows), *words in zip(names, read, embeddings, lengths.tolist()):
                for window in windows:
                    file = clip_file(name, window.number, window.taken)
                    if file not in have and not self.write_clip(file, video, window, *words):
                        folder.skipped.append(f"{video.name} (its latent is not finite)")
                bar.update()

    def write_clip(self, file: str, video: Video, window: Window, embedding: Tensor,
                   length: int) -> bool:
        """One clip's file. False where its latent is not finite."""
        latent = self.vae.encode(pixels(window.video)[None])
        if not all(part.isfinite().all() for part in latent.values()):
            return False
        categories = torch.zeros(len(LABELS), dtype=torch.uint8)
        categories[video.categories] = 1
        tensors = {"text": self.stored_text(embedding, length), "categories": categories,
                   **{part: value[0].to("cpu", self.dtype) for part, value in latent.items()}}
        end = window.start + self.store.settings["frames"] / self.store.settings["fps"]
        about = {"caption": video.caption, "file": video.name, "text_length": length,
                 "times": [window.start, end], "size": window.size, "crop": window.crop}
        self.store.write(self.store.clips / file, tensors, about)
        self.made += 1
        return True

    def stored_text(self, embedding: Tensor, length: int) -> Tensor:
        """(L, D_text), without the zeros behind Wan's captions; the reader puts them back."""
        rows = len(embedding)
        if self.text.lineage.name == "wan":
            rows = max(length, 1)  # the empty caption has its end-of-text token
        return embedding[:rows].to(self.dtype).clone()


# --- reading ------------------------------------------------------------------------------------
class Cache:
    """What encode.py made of a folder of videos, opened. `train` and `held` list the rows of either
    split, as a Pool's do."""

    def __init__(self, store: Store, val_clips: int):
        self.store = store
        rows = map(list, zip(*store.rows))
        self.files, self.names, self.captions, self.categories, contents = rows
        # As in a PoolClip, as far as it is known without opening a clip.
        self.sources = [[name, 0.0, None, None, content]
                        for name, content in zip(self.names, contents)]  # names are the videos'
        self.train, self.held, self.summary = split_by_video(self.names, val_clips)
        if store.done < store.total:
            absent = store.total - store.done
            self.summary += f"; {absent} of {store.total} videos are not there (yet)"
        self.key = digest([store.key, self.files])  # of settings and clips


def open_cache(cfg: Config, folder: Path, expected: dict | None = None) -> Cache:
    """The cache in `folder`, if it is of cfg's lineage and sizes, and of the other settings
    `expected`, such as official.folder.identity(weights). Opens no clip. Raises UserError."""
    store = Store.open(folder, CACHE)
    fields = config.marked(config.CACHE)
    wanted = {field: getattr(cfg, field) for field in fields}
    for field, value in {**wanted, **(expected or {})}.items():
        if store.settings.get(field) != value:
            change = f"change --{field}, or " if field in fields else ""
            raise UserError(f"The clips in {folder} were made with {field} "
                            f"{store.settings.get(field)}, and this run has {value}: {change}"
                            "encode again into another folder.")
    if not store.rows:
        raise UserError(f"There is no clip in {folder}: encode.py made none.")
    return Cache(store, cfg.val_clips)


class Latents(ClipOrder):
    """Batches of latents and text embeddings from a cache, read clip by clip."""

    def __init__(self, cfg: Config, cache: Cache, maps=None):
        """Reads the embedding of the empty caption. Raises UserError without it."""
        super().__init__(cfg, cache, maps)
        path = cache.store.folder / EMPTY
        try:
            tensors, _ = cache.store.load(path)
        except (OSError, ValueError) as e:
            raise UserError(f"{path}, the embedding of the empty caption, cannot be read "
                            f"({reason_of(e)}): run encode.py again.") from None
        self.empty = tensors["text"]

    def clip(self, row: int, among: list[int]) -> tuple[int, dict, dict]:
        """A row's number, its tensors, and what its file says of them.

        A damaged row is replaced by the next one that can be read in the list `among`, in which it
        stands. Raises Stopped where there is none.
        """
        store = self.pool.store
        at = among.index(row)
        for candidate in (*among[at:], *among[:at]):
            found = store.read(self.pool.files[candidate])
            if found:
                return candidate, *found
        raise Stopped(f"No clip in {store.folder} can be read any more.")

    def batch(self, positions: Iterable[int], train: bool = True) -> Batch:
        """As Clips.batch."""
        positions = list(positions)
        among = self.pool.train if train else self.pool.held
        wanted = [self.row(p) if train else among[p] for p in positions]
        rows, clips, abouts = zip(*(self.clip(row, among) for row in wanted))
        rows = list(rows)

        # Words: the empty caption stands in for a dropped one. Zeros were not worth storing.
        drop = self.dropped(positions) & train
        text_len = self.pool.store.settings["text_len"]
        texts = [self.empty if gone else clip["text"] for gone, clip in zip(drop, clips)]
        texts = [F.pad(text.float(), (0, 0, 0, text_len - len(text))) for text in texts]
        lengths = [0 if gone else about["text_length"] for gone, about in zip(drop, abouts)]

        latents = [self.latent(clip, p, train) for clip, p in zip(clips, positions)]
        sources = [[about["file"], about["times"][0], about["size"], about["crop"]]
                   for about in abouts]
        maps, background = self.teacher_maps(sources)
        silent = torch.zeros(len(rows), math.prod(self.cfg.grid), self.cfg.categories)
        return Batch(
            video=None, latent=torch.stack(latents), text=torch.stack(texts),
            text_length=torch.tensor(lengths), caption=[self.pool.captions[row] for row in rows],
            categories=self.categories[rows],
            target=silent, target_mask=torch.zeros_like(silent),  # there are no exact masks
            index=torch.tensor(positions), maps=maps, background=background)

    def latent(self, clip: dict[str, Tensor], position: int, train: bool) -> Tensor:
        """(C, F, H, W) float32, ready for the network.

        A latent with a spread (CogVideoX) is drawn, mean + std * noise. The noise is a function of
        (seed, position), for held-out clips of the position alone: runs of every seed are judged on
        the same.
        """
        latent = clip["mean"].float()
        if "std" in clip:
            seed, name = (self.cfg.seed, "latent") if train else (0, "held-out latent")
            noise = stream(seed, name, position).standard_normal(tuple(latent.shape), np.float32)
            latent = latent + clip["std"].float() * torch.from_numpy(noise)
        odd = -latent.shape[1] % self.cfg.patch_t
        # CogVideoX 1.5 sees pairs of latent frames: its trainer, too, repeats the first one.
        return torch.cat([latent[:, :1]] * odd + [latent], dim=1)
