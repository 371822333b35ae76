"""How well attention maps find what they are asked for, on synthetic clips, whose masks are known.

`report` takes five measurements:

1. each way to read a map (rows, layers, background) against the exact mask;
2. the same of two rivals that need no VLM: frame differences, and where such things usually are;
3. how often the VLM's own answers affirm what is there, and what is not there;
4. how much of the attention reaches the video at all;
5. how alike a map is to that of the background question.

`preview` draws maps over clips. Letters: F frames, H W pixels, t h w the VLM's grid, N its tokens.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import align
import data
import world
from common.pictures import annotate, enlarge, save_gif, tint
from common.score import auc
from config import Config, UserError
from vlm.maps import DENIAL, axis_weights, time_weights, weigh
from vlm.qwen import VLM, AnswerAttention
from vlm.settings import KINDS, Settings, layers_of

FIRST = data.HELD_OUT + 500_000  # the world's indices from here on: nothing was trained on them
STANDS_OUT = 24  # levels of 255 by which a pixel of an object differs from the empty backdrop
ORANGE = (255, 120, 40)
PREDICT = KINDS.index("predict")


@dataclass
class Truth:
    """One phenomenon of one clip, and where it is."""
    video: np.ndarray  # (F, H, W, 3) uint8
    fps: float
    name: str
    mask: np.ndarray  # (F, H, W) bool
    objects: np.ndarray  # (F, H, W) bool: this and all else that stands out from the background


def held_out_truths(cfg: Config, n: int) -> list[list[Truth]]:
    """The phenomena of each of n clips that nothing was trained on."""
    empty = world.empty_room(cfg.height, cfg.width)  # (H, W, 3)
    clips = []
    for index in range(FIRST, FIRST + n):
        clip = world.make_clip(cfg.world_seed, index, **world.drawing(cfg))
        difference = np.abs(clip.video.astype(int) - empty)
        objects = (difference > STANDS_OUT).any(-1)
        clips.append([Truth(clip.video, cfg.frames, actor.phenomenon, actor.mask,
                            objects | actor.mask) for actor in clip.actors])
    return clips


# --- scores -------------------------------------------------------------------------------------
def measures(score: np.ndarray, positive: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """How well a score (N,) finds the positive tokens; NaN where there is nothing to compare with.

    AUC against all other tokens, and against those of other objects; pointing: is the peak on the
    object; IoU of the object with the tokens above half of the peak.
    """
    rivals = positive | objects
    over = score >= .5 * score.max() if score.max() > 0 else np.zeros_like(positive)
    among_objects = math.nan
    if (objects & ~positive).any():
        among_objects = auc(score[rivals], positive[rivals])
    return {"AUC": auc(score, positive),
            "AUC objects": among_objects,
            "pointing": float(positive[score.argmax()]),
            "IoU": (over & positive).sum() / (over | positive).sum()}


def saliency(video: np.ndarray, t: int) -> Tensor:
    """(t, H, W): how much each pixel changes from frame to frame. A rival that needs no model."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean(-1)
    change = np.concatenate([change[:1], change])  # the first frame has none before it
    return data.resample(torch.from_numpy(change), (t, *change.shape[1:]))


def bands(n: int) -> dict[str, list[int]]:
    """Layers to average, of n: each quarter, the default, all."""
    edges = np.linspace(0, n, min(4, n) + 1).round().astype(int)
    found = {}
    for first, end in zip(edges, edges[1:]):
        name = f"{first}-{end - 1}" if end - first > 1 else f"{first}"
        found[name] = list(range(first, end))
    found["default"] = layers_of("", n)
    found["all"] = list(range(n))
    return found


def ways_to_read(answer: AnswerAttention, background: AnswerAttention, n_layers: int, sinks: float
                 ) -> dict[str, Tensor]:
    """{row of the table: map (t, h, w)} of one answer that was read at all layers and KINDS."""
    maps = {}
    for k, kind in enumerate(KINDS):
        for band, layers in bands(n_layers).items():
            own = answer.density(layers, k, sinks)
            behind = background.density(layers, k, sinks)
            for how in ("none", "subtract", "divide"):
                maps[f"{kind}, layers {band}, {how}"] = align.relative(own, behind, how)
    return maps


def location_prior(clips: list[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, float]]:
    """`measures` of one phenomenon's mean mask, on each of its clips (positive, objects), of which
    the mean leaves that clip out. Of a single clip there is none."""
    if len(clips) < 2:
        return []
    total = sum(positive.astype(float) for positive, _ in clips)
    return [measures(total - positive, positive, objects) for positive, objects in clips]


def affirms(answer: AnswerAttention) -> float:
    """Does the answer say that the phenomenon is there?"""
    return float(not answer.empty and not DENIAL.search(answer.answer))


def overlap(answer: AnswerAttention, background: AnswerAttention, layers: list[int]) -> float:
    """Cosine of a map and the background's, of the rows that predict the answer."""
    maps = [one.density(layers, PREDICT).flatten() for one in (answer, background)]
    return F.cosine_similarity(*maps, dim=0).item()


# --- the report ---------------------------------------------------------------------------------
def report(vlm: VLM, settings: Settings, clips: list[list[Truth]], batch: int) -> dict:
    """{"rows": {row: {measure: mean}}}, and means of what else is worth a look.

    Each clip is also asked for one phenomenon that only other clips are known to hold. A phenomenon
    that covers none or all of the VLM's tokens is left out.
    """
    scores = {}  # {row: [measures]}
    masks = {}  # {phenomenon: [(positive, objects)]}
    affirmed, invented, reaching, alike = [], [], [], []
    known = sorted({truth.name for clip in clips for truth in clip})
    for number, clip in enumerate(tqdm(clips, desc="report", unit="clip", leave=False)):
        # Ask.
        names = [truth.name for truth in clip]
        absent = [name for name in known if name not in names]
        absent = [absent[number % len(absent)]] if absent else []
        *answers, background = vlm.ask_about(
            [clip[0].video], clip[0].fps, [names + absent], settings,
            kinds=KINDS, layers=list(range(vlm.n_layers)), batch=batch)[0]
        if not settings.answer:  # which would be the answer to everything
            affirmed += map(affirms, answers[:len(names)])
            invented += map(affirms, answers[len(names):])

        # Compare with the masks.
        grid = tuple(background.maps.shape[2:])
        for truth, answer in zip(clip, answers):
            positive, objects = (data.covered(torch.from_numpy(mask), grid).numpy()  # (N,) bool
                                 for mask in (truth.mask, truth.objects))
            if positive.all() or not positive.any():
                continue
            change = saliency(truth.video, len(truth.video))
            maps = {"frame differences": data.resample(change, grid),
                    **ways_to_read(answer, background, vlm.n_layers, settings.sinks)}
            for row, values in maps.items():
                score = measures(values.flatten().numpy(), positive, objects)
                scores.setdefault(row, []).append(score)
            masks.setdefault(truth.name, []).append((positive, objects))
            reaching.append(answer.mass(PREDICT).mean().item())
            alike.append(overlap(answer, background, layers_of("", vlm.n_layers)))

    prior = [score for one in masks.values() for score in location_prior(one)]
    if prior:
        scores["location prior"] = prior
    others = {"answers that affirm what is there": affirmed, "what is not": invented,
              "mass on the video": reaching, "overlap": alike}
    return {"rows": {row: mean_of(table) for row, table in scores.items()},
            **{name: float(np.nanmean(values)) for name, values in others.items() if values}}


def mean_of(tables: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each measure over the phenomena that have it."""
    return {name: float(np.nanmean([table[name] for table in tables])) for name in tables[0]}


def print_report(vlm: VLM, settings: Settings, clips: list[list[Truth]], batch: int) -> None:
    """The table of `report`, best AUC first. Raises UserError where nothing could be scored."""
    found = report(vlm, settings, clips, batch)
    rows = found.pop("rows")
    if not rows:
        raise UserError("No phenomenon of these clips covers some, and not all, of the VLM's "
                        "tokens.")
    others = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"\n{sum(map(len, clips))} phenomena of {len(clips)} clips; {others}\n")
    columns = list(next(iter(rows.values())))
    print(f"| rows, layers, background | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in sorted(rows.items(), key=lambda row: -row[1]["AUC"]):
        print(f"| {name} | {' | '.join(f'{values[column]:.3f}' for column in columns)} |")


# --- the preview --------------------------------------------------------------------------------
def heat(frames: np.ndarray, values: Tensor) -> np.ndarray:
    """Lay a map (t, h, w) >= 0 over frames (F, H, W, 3), its peak strongest."""
    F_, H, W = frames.shape[:3]
    t, h, w = values.shape
    over = weigh(values[None], time_weights(np.arange(t) + .5, (np.arange(F_) + .5) * t / F_),
                 axis_weights(np.linspace(0, 1, h + 1), np.linspace(0, 1, H + 1)),
                 axis_weights(np.linspace(0, 1, w + 1), np.linspace(0, 1, W + 1)))
    over = over[0].clamp(min=0)  # (F, H, W)
    return tint(frames, (over / over.max().clamp(min=1e-9)).numpy(), ORANGE, .85)


def preview_row(truth: Truth, answer: AnswerAttention, background: AnswerAttention,
                settings: Settings) -> np.ndarray:
    """(F, H', W', 3): the clip, its maps and the exact mask side by side, question and answer
    below."""
    video = truth.video
    own = answer.density(sinks=settings.sinks)
    behind = background.density(sinks=settings.sinks)
    panels = {"clip": video,
              "map": heat(video, own),
              "background map": heat(video, behind),
              "difference": heat(video, align.relative(own, behind).clamp(min=0)),
              "exact mask": tint(video, truth.mask, ORANGE, .7)}
    scale = max(1, 112 // video.shape[1])
    border = ((0, 0), (4, 0), (4, 0), (0, 0))
    named = [annotate(np.pad(enlarge(panel, scale), border), name)
             for name, panel in panels.items()]
    text = f"{settings.question_for(truth.name)}: {answer.answer}"
    return annotate(np.concatenate(named, 2), text, lines=2)


def preview(path: Path, vlm: VLM, settings: Settings, clips: list[list[Truth]], batch: int) -> None:
    """A GIF with a row for the first phenomenon of each clip."""
    rows = []
    for truth, *_ in clips:
        answers = vlm.ask_about([truth.video], truth.fps, [[truth.name]], settings, batch=batch)[0]
        rows.append(preview_row(truth, *answers, settings))
    save_gif(path, np.concatenate(rows, 1), max(1, clips[0][0].fps / 2))
    print(f"wrote {path}")
