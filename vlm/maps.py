"""Map files: what of a clip a VLM is shown, how its attention is stored, and how a clip finds its tokens in it."""
import dataclasses
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
from common.files import digest
from common.store import Store as store_Store
from common.store import read_about, read_tensors, write_tensors
from common.video import TOLERANCE, Video, Window, timeline, upright, windows_of
from config import Config, UserError
from data import Pool
from physics.phenomena import CATEGORIES
from vlm.qwen import VLM, Look, Settings, VLMError


DENIAL = re.compile(r"\b(no|not|cannot|none|nowhere)\b|n't\b", re.IGNORECASE)
LITTLE = 0.02  # of all attention on the video: less in every layer suggests a broken prompt (a guess, not calibrated)
ALIKE = 0.95  # cosine of map and background above which the difference is mostly noise (likewise)


def aligned_frames(n: int) -> np.ndarray:
    """Of n = 1 + 4 m frames those that make VLM token row j show what latent j of a causal VAE shows: (0, 0), (2, 3),
    (6, 7) ... Latent j has the frames 4 j - 3 .. 4 j; the pair has the same middle. Raises VLMError."""
    if n < 1 or n % 4 != 1:
        raise VLMError(f"A causal VAE with temporal stride 4 takes 1 + 4 m frames (e.g. 49 or 81), not {n}.")
    pairs = 4 * np.arange((n + 3) // 4)[:, None] - [2, 1]
    return pairs.clip(min=0).flatten()


def uniform_frames(n: int, k: int) -> np.ndarray:
    """k of n frames, evenly spread over all of them."""
    return ((np.arange(k) + .5) * n / k).astype(int)


@dataclass
class Shown:
    """A clip as the VLM sees it, and where it is from."""
    source: str  # name of its file
    frames: np.ndarray  # (F, H, W, 3) uint8
    fps: float  # of these frames
    times: list[float]  # of each row of tokens, in seconds of the file
    size: tuple[int, int]  # height and width of the upright file
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels
    names: list[str]  # phenomena to ask for


def shown(window: Window, source: str, names: list[str], fps: float, merged: int, uniform: int = 0) -> Shown:
    """What of a window the VLM is shown: the frames that latents stand for, or, with `uniform`, that many."""
    n = len(window.video)
    frames = uniform_frames(n, uniform) if uniform else aligned_frames(n)
    if not uniform and merged != 2:
        raise VLMError(f"Time axes do not fit: this VLM merges {merged} frames, aligned sampling makes pairs; give "
                       "--sample N.")
    rows = np.pad(frames, (0, -len(frames) % merged), mode="edge").reshape(-1, merged).mean(1)
    rate = uniform * fps / n if uniform else fps / 2  # pairs, four frames apart
    return Shown(source, window.video[frames], rate, (window.start + rows / fps).tolist(), window.size, window.crop,
                 names)


class Store(store_Store):
    """A folder of maps, as one shard writes it."""
    manifest = "maps.json"

    def name(self, video: Video) -> str:
        if video.path.name:
            return super().name(video)
        return digest([self.key, video.name, video.categories])[:24]  # a clip of the world is no file

    def row(self, file: str, video: Video) -> tuple:
        try:
            times = read_about(self.clips / file)["times"]
        except ValueError:  # of another shard, which makes it again: who reads it until then is told
            times = [0.0]
        return file, video.name, times[0], times[-1]


@dataclass
class Tally:
    """What a summary says at the end."""
    made: int = 0
    denied: int = 0  # answers that say it is not there
    empty: int = 0
    little: int = 0  # maps with hardly any attention on the video
    alike: int = 0  # maps that are nearly the background's

    def __str__(self) -> str:
        said = {"denied": "answers deny the phenomenon, so that their maps are left out",
                "empty": "answers hold nothing but special tokens, likewise",
                "little": f"maps have under {LITTLE:.0%} of the attention on the video (a broken prompt?)",
                "alike": f"maps are nearly the background's (cosine above {ALIKE})"}
        return "".join(f"; {getattr(self, name)} {what}" for name, what in said.items() if getattr(self, name))


def write_map(store: Store, file: str, clip: Shown, asked: list[tuple[str, Look]], background: Look,
              settings: Settings, tally: Tally) -> None:
    """One clip's maps of the phenomena that were found, beside the background's. Raises VLMError where the background
    has no answer."""
    if background.empty:
        raise VLMError("the model answered the background question with nothing but special tokens")
    behind, kept = background.density(sinks=settings.sinks), []
    for name, look in asked:
        tally.empty, tally.denied = tally.empty + look.empty, tally.denied + bool(DENIAL.search(look.answer))
        if look.empty or DENIAL.search(look.answer):
            continue
        density = look.density(sinks=settings.sinks)
        tally.little += bool((look.mass() < LITTLE).all())
        tally.alike += F.cosine_similarity(density.flatten(), behind.flatten(), dim=0).item() > ALIKE
        kept.append((name, look.answer, density))
    tensors = {"maps": torch.stack([density for *_, density in kept] or [behind])[:len(kept)].half(),
               "background": behind.half()}
    about = {"key": store.key, "file": clip.source, "times": clip.times, "size": clip.size, "crop": clip.crop,
             "categories": [CATEGORIES.index(name) for name, *_ in kept],
             "answers": {name: answer for name, answer, _ in kept}, "background": background.answer}
    write_tensors(store.clips / file, tensors, about, store.tag)
    tally.made += 1


def full_frame(path: Path, vlm: VLM, most: int) -> tuple[int, int]:
    """Height and width at which the VLM sees a video, uncropped but for a patch's rest."""
    with av.open(str(path)) as container:
        return vlm.size_for(*upright(next(container.decode(video=0))), most)


def windows(video: Video, vlm: VLM, cfg: Config, most: int) -> list[Window]:
    """The windows of a video at the VLM's size; of a short one the largest 1 + 4 m frames that it has. Raises
    ValueError with the reason when there are none, or what the decoder raises."""
    times, end = timeline(video.path)
    has = math.ceil((end - times[0] - TOLERANCE) * cfg.fps)
    frames = min(cfg.frames, 1 + 4 * ((has - 1) // 4))
    if frames < 5:
        raise ValueError(f"too short, {end - times[0]:.2g} s")
    height, width = full_frame(video.path, vlm, most)
    return windows_of(video.path, dataclasses.replace(cfg, frames=frames, height=height, width=width))


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


def open_maps(cfg: Config, pool) -> Maps | None:
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
