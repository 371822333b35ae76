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
from collections import defaultdict
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
from common.score import auc, table_head, table_line
from config import Config, UserError
from vlm.maps import DENIAL, on_grid
from vlm.qwen import VLM, AnswerAttention
from vlm.settings import KINDS, Settings, layers_of

FIRST = data.HELD_OUT + 500_000  # the world's indices from here on: nothing was trained on them
STANDS_OUT = 24  # levels of 255 by which a pixel of an object differs from the empty backdrop
ORANGE = (255, 120, 40)
PREDICT = KINDS.index("predict")


def held_out_clips(cfg: Config, n: int) -> list[world.Clip]:
    """Clips that nothing was trained on."""
    return [world.make_clip(cfg.world_seed, index, **world.drawing(cfg))
            for index in range(FIRST, FIRST + n)]


# --- scores -------------------------------------------------------------------------------------
def measures(score: np.ndarray, positive: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """How well a score (N,) finds the positive tokens; NaN where there is nothing to compare with.

    objects: tokens of any object, the positive ones among them. AUC against all other tokens, and
    against those of other objects; pointing: is the peak on the object; IoU of the object with the
    tokens above half of the peak.
    """
    over = (score > 0) & (score >= .5 * score.max())
    among_objects = math.nan
    if not positive[objects].all():
        among_objects = auc(score[objects], positive[objects])
    return {"AUC": auc(score, positive),
            "AUC objects": among_objects,
            "pointing": float(positive[score.argmax()]),
            "IoU": (over & positive).sum() / (over | positive).sum()}


def saliency(video: np.ndarray, grid: tuple[int, int, int]) -> Tensor:
    """How much a video (F, H, W, 3) changes from frame to frame, averaged over the cells of a grid.
    A rival that needs no model."""
    change = torch.from_numpy(video.astype(np.float32)).diff(dim=0).abs().mean(-1)
    change = torch.cat([change[:1], change])  # (F, H, W): the first frame has none before it
    return data.resample(change, grid)


def bands(n: int) -> dict[str, list[int]]:
    """Layers to average, of n: each quarter, the default, all."""
    edges = np.linspace(0, n, min(4, n) + 1).round().astype(int)
    names = [f"{first}-{end - 1}" if end - first > 1 else f"{first}"
             for first, end in zip(edges, edges[1:])]
    return {**{name: layers_of(name, n) for name in names},
            "default": layers_of("", n), "all": list(range(n))}


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


def affirms(answer: AnswerAttention) -> bool:
    """Does the answer say that the phenomenon is there?"""
    return not answer.empty and not DENIAL.search(answer.answer)


# --- the report ---------------------------------------------------------------------------------
def report(vlm: VLM, settings: Settings, clips: list[world.Clip], batch: int) -> dict:
    """{"rows": {row: {measure: mean}}}, and means of what else is worth a look.

    Each clip is also asked for one phenomenon that only other clips are known to hold. A phenomenon
    that covers none or all of the VLM's tokens is left out.
    """
    scores = defaultdict(list)  # {row: [measures]}
    masks = defaultdict(list)  # {phenomenon: [(positive, objects)]}
    affirmed, invented, reaching, alike = [], [], [], []
    known = sorted({actor.phenomenon for clip in clips for actor in clip.actors})
    empty = world.empty_room(*clips[0].video.shape[1:3])
    default = layers_of("", vlm.n_layers)
    for number, clip in enumerate(tqdm(clips, desc="report", unit="clip", leave=False)):
        # Ask.
        names = [actor.phenomenon for actor in clip.actors]
        absent = [name for name in known if name not in names]
        if absent:
            absent = [absent[number % len(absent)]]
        *answers, background = vlm.ask_about(
            [clip.video], len(clip.video), [names + absent], settings, kinds=KINDS,
            layers=list(range(vlm.n_layers)), batch=batch)[0]
        if not settings.answer:  # which would be the answer to everything
            affirmed += map(affirms, answers[:len(names)])
            invented += map(affirms, answers[len(names):])

        # Compare with the masks.
        grid = tuple(background.maps.shape[2:])
        stands_out = (np.abs(clip.video.astype(int) - empty) > STANDS_OUT).any(-1)
        for actor, answer in zip(clip.actors, answers):
            positive, objects = (data.covered(torch.from_numpy(mask), grid).numpy()  # (N,) bool
                                 for mask in (actor.mask, actor.mask | stands_out))
            if positive.all() or not positive.any():
                continue
            maps = {"frame differences": saliency(clip.video, grid),
                    **ways_to_read(answer, background, vlm.n_layers, settings.sinks)}
            for row, values in maps.items():
                scores[row].append(measures(values.flatten().numpy(), positive, objects))
            masks[actor.phenomenon].append((positive, objects))
            reaching.append(answer.mass(PREDICT).mean().item())
            densities = [one.density(default, PREDICT).flatten() for one in (answer, background)]
            alike.append(F.cosine_similarity(*densities, dim=0).item())

    prior = [score for one in masks.values() for score in location_prior(one)]
    if prior:
        scores["location prior"] = prior
    others = {"answers that affirm what is there": affirmed, "what is not": invented,
              "mass on the video": reaching, "overlap": alike}
    return {"rows": {row: {name: np.nanmean([one[name] for one in found]) for name in found[0]}
                     for row, found in scores.items()},
            **{name: np.nanmean(values) for name, values in others.items() if values}}


def print_report(vlm: VLM, settings: Settings, clips: list[world.Clip], batch: int) -> None:
    """The table of `report`, best AUC first. Raises UserError where nothing could be scored."""
    found = report(vlm, settings, clips, batch)
    rows = found.pop("rows")
    if not rows:
        raise UserError("No phenomenon of these clips covers some, and not all, of the VLM's "
                        "tokens.")
    others = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    phenomena = sum(len(clip.actors) for clip in clips)
    print(f"\n{phenomena} phenomena of {len(clips)} clips; {others}\n")
    print(table_head(["rows, layers, background", *rows["frame differences"]]))
    for name, values in sorted(rows.items(), key=lambda row: -row[1]["AUC"]):
        print(table_line([name, *(f"{value:.3f}" for value in values.values())]))


# --- the preview --------------------------------------------------------------------------------
def heat(frames: np.ndarray, values: Tensor) -> np.ndarray:
    """Lay a map (t, h, w) >= 0 over frames (F, H, W, 3), its peak strongest."""
    over = on_grid(values, frames.shape[:3]).clamp(min=0)  # (F, H, W)
    return tint(frames, (over / over.max().clamp(min=1e-9)).numpy(), ORANGE, .85)


def preview(path: Path, vlm: VLM, settings: Settings, clips: list[world.Clip], batch: int) -> None:
    """A GIF with a row for the first phenomenon of each clip: the clip, its maps and the exact mask
    side by side, question and answer below."""
    rows = []
    for clip in clips:
        video = clip.video
        name = clip.actors[0].phenomenon
        answer, background = vlm.ask_about([video], len(video), [[name]], settings, batch=batch)[0]
        own = answer.density(sinks=settings.sinks)
        behind = background.density(sinks=settings.sinks)
        panels = {"clip": video,
                  "map": heat(video, own),
                  "background map": heat(video, behind),
                  "difference": heat(video, align.relative(own, behind).clamp(min=0)),
                  "exact mask": tint(video, clip.actors[0].mask, ORANGE, .7)}
        scale = max(1, 112 // video.shape[1])
        border = ((0, 0), (4, 0), (4, 0), (0, 0))
        named = [annotate(np.pad(enlarge(panel, scale), border), title)
                 for title, panel in panels.items()]
        text = f"{settings.question_for(name)}: {answer.answer}"
        rows.append(annotate(np.concatenate(named, 2), text, lines=2))
    save_gif(path, np.concatenate(rows, 1), max(1, len(rows[0]) / 2))
    print(f"wrote {path}")
