"""The latent cache: its writer, which encode.py runs, and its reader, from which training takes batches."""
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.files import digest, read_json
from common.store import Store, read_tensors, write_tensors
from common.video import LABELS, Folder, Video, Window, pixels, shares
from config import CACHE, Config, Stopped, UserError, marked, stream
from data import Batch, Stream
from official.encoders import VAE, TextEncoder
from official.folder import Lineage, identity
from vlm.maps import Maps


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
    fields = marked(CACHE)
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
            rng = stream(self.cfg.seed, "latent", p) if train else stream(0, "held-out latent", p)
            latent, text = tensors["mean"].float(), self.empty["text"] if gone else tensors["text"]
            if "std" in tensors:
                noise = rng.standard_normal(tuple(latent.shape), np.float32)
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

FORMAT = 1  # of the cache's files
GROUP = 64  # videos whose captions are encoded together, before the text encoder leaves the device to the VAE


def fill(store: Store, folder: Folder, todo: dict[str, Video], have: set[str], text: TextEncoder, vae: VAE,
         dtype: torch.dtype, args, bar: tqdm) -> tuple[int, int]:
    """Encode these videos ({name in the store: video}) but for the files in `have`. Returns how many clips were made,
    and how many captions were cut; the videos that gave none are noted in folder.skipped."""
    made, cut, names = 0, 0, {id(video): name for name, video in todo.items()}
    for at in range(0, len(todo), GROUP):
        videos = list(todo.values())[at:at + GROUP]
        captions = [video.caption for video in videos]
        # Always the same number at once: a batch of another shape may round differently, and a clip would then depend
        # on what was done before the run was interrupted, or on its shard.
        embeddings, lengths = text(captions + [""] * (-len(captions) % args.text_batch), args.text_batch)
        cut += text.too_long(captions)
        for (video, windows), embedding, length in zip(folder.read(videos), embeddings, lengths):
            if isinstance(windows, str):
                folder.skipped.append(f"{video.name} ({windows})")
                windows = []
            for window in windows:
                file = f"{names[id(video)]}-{window.number}of{window.taken}.safetensors"
                if file not in have:
                    latent = vae.encode(pixels(window.video)[None])
                    if not all(part.isfinite().all() for part in latent.values()):
                        folder.skipped.append(f"{video.name} (its latent is not finite)")
                        continue
                    tensors = {"text": stored_text(embedding, int(length), text.lineage, dtype),
                               **{part: value[0].to("cpu", dtype) for part, value in latent.items()}}
                    store_clip(store, file, tensors, video, window, int(length), args)
                    made += 1
            bar.update()
    return made, cut


def stored_text(embedding: Tensor, length: int, lineage: Lineage, dtype: torch.dtype) -> Tensor:
    """(L, D_text), without the zeros behind Wan's captions; the reader puts them back."""
    rows = max(length, 1) if lineage.name == "wan" else len(embedding)  # the empty caption has its end-of-text token
    return embedding[:rows].to(dtype).clone()


def store_clip(store: Store, file: str, tensors: dict[str, Tensor], video: Video, window: Window, length: int,
               args) -> None:
    """One clip's file: its tensors, the 29 categories, and where it comes from."""
    categories = torch.zeros(len(LABELS), dtype=torch.uint8)
    categories[video.categories] = 1
    about = {"key": store.key, "caption": video.caption, "file": video.name, "text_length": length, "size": window.size,
             "times": [window.start, window.start + args.frames / args.fps], "crop": window.crop}
    write_tensors(store.clips / file, {**tensors, "categories": categories}, about, store.tag)


def settings_of(args, lineage: Lineage, weights: Path, dtype: torch.dtype) -> dict:
    """All that shapes the cache's numbers, but for the videos themselves."""
    vae, text = (read_json(weights / part / "config.json") for part in ("vae", "text_encoder"))
    fields = ("frames", "fps", "height", "width", "windows", "captions", "phys_law", "tiled")
    return {"format": FORMAT, "lineage": lineage.name, **{field: getattr(args, field) for field in fields},
            "dtype": str(dtype).removeprefix("torch."), "text_len": lineage.text_len, "text_dim": text.get("d_model"),
            "channels": vae.get("z_dim") or vae.get("latent_channels"),
            **identity(weights)}
