"""Map files: where a VLM looked, as it is stored, and how a clip finds its own tokens in it.

    video --clip_for_vlm--> VLMClip --VLM--> answers and attention --map_file--> a file on disk
    clip of any size --Maps.on_tokens--> attention maps on the tokens of that clip

A file holds maps (R, t, h, w) of R phenomena and background (t, h, w), float16 densities (uniform
attention = 1) on the VLM's own grid, the times of its t rows in seconds of the video, and the
rectangle of the video that it covers. So one file serves any clip of the same video, whatever its
length, size, rate and crop.

Letters: R phenomena with a map, t h w a VLM's grid, s y x a clip's own grid, N = s y x its tokens.
"""
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.files import digest, join_some
from common.store import Kind, Store, read_about
from common.video import TOLERANCE, Cut, Window, pictures_of, timeline, upright_size, windows_of
from config import Config, UserError
from data import Pool, SyntheticClips, latent_frames, pool_place
from physics import CATEGORIES
from vlm.qwen import VLM, AnswerAttention, Settings, VLMError

DENIAL = re.compile(r"\b(no|not|cannot|none|nowhere)\b|n't\b", re.IGNORECASE)
# Two guesses, which are not calibrated:
LITTLE = 0.02  # of all attention on the video: less in every layer suggests a broken prompt
ALIKE = 0.95  # cosine of map and background above which their difference is mostly noise


# --- what the VLM is shown ----------------------------------------------------------------------
@dataclass
class VLMClip:
    """A clip as the VLM sees it, and where it is from."""
    source: str  # name of its file
    frames: np.ndarray  # (F, H, W, 3) uint8
    fps: float  # of these frames
    times: list[float]  # of each row of tokens, in seconds of the file
    size: tuple[int, int]  # height and width of the upright file
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels
    names: list[str]  # phenomena to ask for
    file: str = ""  # of its maps
    content: str = ""  # of the video, as Video.content says it; of a world's clip nothing


def aligned_frames(n: int) -> np.ndarray:
    """Of n = 1 + 4 m frames two for each latent of a causal VAE: (0, 0), (2, 3), (6, 7) ...

    They are the middle ones of the four that a latent shows. A VLM that makes one row of tokens of
    two frames then has a row for each latent, with the same mean time. Raises VLMError.
    """
    if n < 1 or n % 4 != 1:
        raise VLMError("A causal VAE with temporal stride 4 takes 1 + 4 m frames (e.g. 49 or 81), "
                       f"not {n}.")
    return latent_frames(n)[:, 1:3].flatten()


def uniform_frames(n: int, k: int) -> np.ndarray:
    """k of n frames, evenly spread over all of them."""
    return ((np.arange(k) + .5) * n / k).astype(int)


def row_middles(frames: np.ndarray, merged: int) -> np.ndarray:
    """The mean number of the frames of each row of tokens, where a VLM merges so many frames. The
    last frame stands in for those that are missing."""
    padded = np.pad(frames, (0, -len(frames) % merged), mode="edge")
    return padded.reshape(-1, merged).mean(1)


def clip_for_vlm(window: Window, source: str, names: list[str], fps: float, merged: int,
                 uniform: int = 0, file: str = "", content: str = "") -> VLMClip:
    """What of a window the VLM is shown: the frames that latents stand for, or, with `uniform`,
    that many, evenly spread. Raises VLMError."""
    n = len(window.video)
    if uniform:
        frames = uniform_frames(n, uniform)
        rate = uniform * fps / n
    elif merged == 2:
        frames = aligned_frames(n)
        rate = fps / 2  # pairs, four frames apart
    else:
        raise VLMError(f"Time axes do not fit: this VLM merges {merged} frames, aligned sampling "
                       "makes pairs; give --sample N.")
    times = window.start + row_middles(frames, merged) / fps
    return VLMClip(source, window.video[frames], rate, times.tolist(), window.size, window.crop,
                   names, file, content)


def windows_for_vlm(path: Path, vlm: VLM, frames: int, fps: float, most_windows: int,
                    most_pixels: int) -> list[Window]:
    """The windows of a video at the VLM's size; of a short one the most frames 1 + 4 m that it has.

    A frame is not cropped, but for the rest of a patch. Raises ValueError with the reason when
    there are no windows, or what the decoder raises.
    """
    times, end, _ = timeline(path)
    has = math.ceil((end - times[0] - TOLERANCE) * fps)
    frames = min(frames, 1 + 4 * ((has - 1) // 4))
    if frames < 5:
        raise ValueError(f"too short, {end - times[0]:.2g} s")
    with av.open(str(path)) as container:
        size = upright_size(next(container.decode(pictures_of(container))))
    return windows_of(path, Cut(frames, fps, most_windows,
                                *vlm.pictures.size_for(*size, most_pixels)))


# --- writing ------------------------------------------------------------------------------------
class MapRow(NamedTuple):
    """What index.json says of a map file."""
    file: str
    video: str
    start: float  # when its first and last row of tokens are, in seconds of the video
    end: float
    content: str = ""  # of the video; older rows do not tell


MAPS = Kind("maps.json", "teacher.py", MapRow)


def map_row(store: Store, file: str, video: str) -> MapRow:
    """What index.json says of a file of maps of a video."""
    try:
        about = read_about(store.clips / file)
    except ValueError:  # another shard's damaged file, which that shard makes again
        about = {"times": [0.0]}
    times = about["times"]
    return MapRow(file, video, times[0], times[-1], about.get("content", ""))


COUNTED = {  # by map_answers, for the summary
    "denied": "answers deny the phenomenon, so that their maps are left out",
    "empty": "answers hold nothing but special tokens, likewise",
    "little": f"maps have under {LITTLE:.0%} of the attention on the video (a broken prompt?)",
    "alike": f"maps are nearly the background's (cosine above {ALIKE})"}


def counted(tally: Counter) -> str:
    """What a summary says of the answers that were read."""
    return "".join(f"; {tally[name]} {what}" for name, what in COUNTED.items() if tally[name])


class Answer(NamedTuple):
    """One answer of the VLM, and its map."""
    name: str  # the phenomenon that was asked for
    text: str
    density: Tensor  # (t, h, w), mean 1


def map_answers(clip: VLMClip, looks: list[AnswerAttention], settings: Settings,
                tally: Counter) -> list[Answer]:
    """The answers that found their phenomenon, and behind them the one to the background question.

    looks: of each of clip.names, then of the background. tally: counts the names of COUNTED. Raises
    VLMError where the background's answer is empty.
    """
    *looks, background = looks
    if background.empty:
        raise VLMError("the model answered the background question with nothing but special tokens")
    behind = background.density(sinks=settings.sinks)
    kept = []
    for name, look in zip(clip.names, looks):
        denied = bool(DENIAL.search(look.answer))
        tally["empty"] += look.empty
        tally["denied"] += denied
        if look.empty or denied:
            continue
        density = look.density(sinks=settings.sinks)
        cosine = F.cosine_similarity(density.flatten(), behind.flatten(), dim=0).item()
        tally["little"] += bool((look.mass() < LITTLE).all())
        tally["alike"] += cosine > ALIKE
        kept.append(Answer(name, look.answer, density))
    return [*kept, Answer("background", background.answer, behind)]


def map_file(clip: VLMClip, answers: list[Answer]) -> tuple[dict[str, Tensor], dict]:
    """What the file of a clip holds: tensors, and what is said of them. answers: the background's
    last."""
    *found, background = answers
    maps = torch.stack([answer.density for answer in answers]).half()  # (R + 1, t, h, w)
    tensors = {"maps": maps[:-1], "background": maps[-1]}
    about = {"file": clip.source, "times": clip.times, "size": clip.size, "crop": clip.crop,
             "categories": [CATEGORIES.index(answer.name) for answer in found],
             "answers": {answer.name: answer.text for answer in found},
             "background": background.text}
    if clip.content:
        about["content"] = clip.content
    return tensors, about


# --- reading: onto the tokens of a clip ---------------------------------------------------------
def axis_weights(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """How values of n cells, whose n + 1 edges are `have`, come to m cells with the edges `want`.

    -> weights (m, n): the average over a wanted cell's area, or, where the wanted cells are finer,
    linear interpolation between middles; NaN for a wanted cell whose middle lies outside.
    """
    middles = (have[1:] + have[:-1]) / 2
    wanted_middles = (want[1:] + want[:-1]) / 2
    if want[1] - want[0] < have[1] - have[0]:
        weights = interpolation(middles, wanted_middles)
    else:
        right = np.minimum(want[1:, None], have[1:])
        left = np.maximum(want[:-1, None], have[:-1])
        overlap = (right - left).clip(min=0)  # (m, n)
        weights = overlap / overlap.sum(1, keepdims=True).clip(min=1e-9)
    weights[(wanted_middles < have[0]) | (wanted_middles > have[-1])] = math.nan
    return weights


def time_weights(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """How values at the n rising times of a map come to the m times of tokens.

    -> weights (m, n) of linear interpolation; NaN for a token that is more than half a step of the
    map outside.
    """
    weights = interpolation(have, want)
    if len(have) > 1:  # a map of one moment stands for all of the video
        before, after = (np.diff(have) / 2)[[0, -1]]
        outside = (want < have[0] - before - TOLERANCE) | (want > have[-1] + after + TOLERANCE)
        weights[outside] = math.nan
    return weights


def interpolation(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """(m, n) weights of linear interpolation from values at n rising points to m points."""
    return np.stack([np.interp(want, have, one) for one in np.eye(len(have))], axis=1)


def regrid(maps: Tensor, times: np.ndarray, box: tuple, new_times: np.ndarray, new_box: tuple,
           size: tuple[int, int]) -> Tensor:
    """Maps (R, t, h, w), at these times on the rectangle `box` (left, top, right, bottom), ->
    (R, s, y, x) at the new times on the new box, whose size is (y, x). NaN where the old ones do
    not reach."""
    h, w = maps.shape[2:]
    y, x = size
    x0, y0, x1, y1 = box
    left, top, right, bottom = new_box
    weights = {"rthw,st->rshw": time_weights(times, new_times),
               "rshw,yh->rsyw": axis_weights(np.linspace(y0, y1, h + 1),
                                             np.linspace(top, bottom, y + 1)),
               "rsyw,xw->rsyx": axis_weights(np.linspace(x0, x1, w + 1),
                                             np.linspace(left, right, x + 1))}
    for letters, one in weights.items():  # one axis after the other
        maps = torch.einsum(letters, maps, torch.from_numpy(one).to(maps))
    return maps


def on_grid(values: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """A map (t, h, w) of a whole clip, on another grid of the same clip."""
    whole = (0, 0, 1, 1)
    t = len(values)
    times = (np.arange(grid[0]) + .5) * t / grid[0]
    return regrid(values[None], np.arange(t) + .5, whole, times, whole, grid[1:])[0]


class Maps:
    """A folder of maps that teacher.py made. A map is read when its clip is asked for."""

    def __init__(self, folder: Path):
        """Opens no map. Raises UserError."""
        self.store = Store.open(folder, MAPS)
        self.folder = self.store.folder
        if not self.store.rows:
            raise UserError(f"There is no map in {folder}: teacher.py made none.")
        self.of = defaultdict(list)  # {video: (start, end, file) of each of its maps}
        self.content = {}  # {video: what is known of its content}
        for file, video, start, end, content in self.store.rows:
            self.of[video].append((start, end, file))
            self.content[video] = content
        # The key is of the settings and of what is there.
        self.key = digest([self.store.key, sorted(self.of.items())])

    def check_videos(self, sources: list) -> None:
        """Raises UserError where maps are of other videos than these clips of the same names.

        sources: as in a PoolClip. Where one of both does not tell its content, the sizes of the
        upright videos are compared, if they are known.
        """
        videos = {source[0]: source[2:] for source in sources if source[0] in self.of}
        others = [video for video, known in videos.items() if not self.is_of(video, *known)]
        if others:
            raise UserError(f"The maps in {self.folder} were made of other videos than those of the "
                            f"same names: {join_some(others)}; make maps of these by teacher.py.")

    def is_of(self, video: str, size: list, crop: list, content: str = "") -> bool:
        """Were the maps of this video made of one like it, as far as they tell?"""
        if content and self.content[video]:
            return content == self.content[video]
        try:
            return not size or read_about(self.store.clips / self.of[video][0][2])["size"] == size
        except (OSError, ValueError):  # a damaged one does not tell
            return True

    def overlaps(self, video: str, when: np.ndarray) -> list[tuple[float, str]]:
        """(seconds in common, file) of each map of this video with a clip whose tokens are at
        `when`; negative where they are apart."""
        return [(min(end, when[-1]) - max(start, when[0]), file)
                for start, end, file in self.of.get(video, ())]

    def covers(self, video: str, when: np.ndarray | None = None) -> bool:
        """Is there a map of this video, and of some of these seconds?"""
        if when is None:
            return video in self.of
        return any(seconds >= 0 for seconds, _ in self.overlaps(video, when))

    def on_tokens(self, source: list, times: np.ndarray, grid: tuple[int, int, int],
                  n_categories: int) -> tuple[Tensor, Tensor] | None:
        """Maps (N, E_cat) and background (N,) on the tokens of a clip, float32; None without a map.

        source: where the clip is from, as in a PoolClip. times (s,): when its tokens are, in
        seconds from its start. NaN outside of what the teacher saw, and for categories that it was
        not asked for. Raises UserError for a stale map.
        """
        video, start, size, crop, *_ = source
        when = start + times
        overlaps = self.overlaps(video, when)
        found = self.store.read(max(overlaps)[1]) if overlaps else None  # most seconds in common
        if found is None:
            return None
        tensors, about = found
        if list(about["size"]) != list(size):  # clips of an old cache tell it no earlier
            raise UserError(f"The map of {video} in {self.folder} was made of another video, of "
                            f"{about['size']} pixels and not {list(size)}.")
        maps = torch.cat([tensors["maps"], tensors["background"][None]])  # (R + 1, t, h, w)
        maps = regrid(maps.double(), np.asarray(about["times"]), about["crop"], when, crop,
                      grid[1:])
        maps = maps.flatten(1).T.float()  # (N, R + 1)

        on_tokens = torch.full((len(maps), n_categories), math.nan)
        on_tokens[:, about["categories"]] = maps[:, :-1]
        return on_tokens, maps[:, -1]


def world_maps(cfg: Config, pool: Pool, name: str) -> Path:
    """Where the attention maps of this name of the synthetic clips are kept."""
    return Path(cfg.pool_dir) / f"{pool.key}-{name}"


def open_maps(cfg: Config, pool=None) -> Maps | None:
    """The maps that --teacher names: a folder, or a name of maps of the synthetic clips. None for
    exact masks. pool: where it is open; its maps can be looked for before. Raises UserError."""
    if not cfg.teacher:
        return None
    folder = Path(cfg.teacher)
    named = re.fullmatch(r"\w+", cfg.teacher) and not (cfg.data_dir or cfg.latent)
    if named and not folder.is_dir():
        key = pool.key if pool else pool_place(cfg, SyntheticClips(cfg))[0].name
        folder = Path(cfg.pool_dir) / f"{key}-{cfg.teacher}"
    if not folder.is_dir():
        how = "teacher.py --out makes one"
        if named:
            how = f"`python teacher.py --annotate {cfg.teacher}` makes them"
        raise UserError(f"There are no maps in {folder}: {how}.")
    maps = Maps(folder)
    if pool and not named:  # the clips of a world are in the name of their maps' folder
        maps.check_videos(pool.sources)
    return maps
