"""How well attention maps find what they are asked for, where the truth is known."""
import dataclasses
import math
import tempfile
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
from common.files import read_json
from common.pictures import annotate, enlarge, save_gif, tint
from common.score import auc
from common.video import Cut, windows_of
from config import Config, UserError
from physics.phenomena import backdrop
from vlm.maps import DENIAL, axis_weights, time_weights, weigh, windows_for_vlm
from vlm.qwen import CUES, KINDS, VLM, Settings, layers_of
from vlm.tiny import write_tiny


def saliency(video: np.ndarray, t: int) -> Tensor:
    """(t, H, W): how much each pixel changes from frame to frame. The rival that needs no model."""
    change = np.abs(np.diff(video.astype(np.float32), axis=0)).mean(-1)
    change = np.concatenate([change[:1], change])  # the first frame has none before it
    return data.resample(torch.from_numpy(change), (t, *change.shape[1:]))


@dataclass
class Truth:
    """One phenomenon of one clip, where it is known."""
    video: np.ndarray  # (F, H, W, 3) uint8
    fps: float
    name: str
    mask: np.ndarray  # (F, H, W) bool
    objects: np.ndarray  # (F, H, W) bool: this and everything else that stands out from the background


def of_clips(cfg: Config, n: int, first: int = data.HELD_OUT + 500_000) -> list[list[Truth]]:
    """The truths of n clips that nothing was trained on."""
    empty = (backdrop(cfg.height, cfg.width) * 255 + .5).astype(np.uint8)  # (3, H, W)
    found = []
    for index in range(first, first + n):
        clip = world.make_clip(cfg.world_seed, index, **data.world_settings(cfg))
        stands = (np.abs(clip.video.astype(int) - np.moveaxis(empty, 0, -1)) > 24).any(-1)
        found.append([Truth(clip.video, cfg.frames, actor.phenomenon, actor.mask, stands | actor.mask)
                      for actor in clip.actors])
    return found


def of_json(path: Path, vlm: VLM, frames: int, fps: float, most: int) -> list[list[Truth]]:
    """Truths from a file {video: {phenomenon: [[start, end, left, top, right, bottom], ...] or "mask.mp4"}}: boxes in
    seconds and shares of the frame, or a video or picture that is bright where it happens. Videos lie beside the file.
    Raises UserError."""
    found = []
    for name, phenomena in read_json(path).items():
        try:
            window = windows_for_vlm(path.parent / name, vlm, frames, fps, 1, most)[0]
            if not phenomena:
                raise ValueError("it names no phenomenon")
            F_, H, W = window.video.shape[:3]
            when = window.start + np.arange(F_) / fps
            y, x = (np.arange(H) + .5) / H, (np.arange(W) + .5) / W
            clip = []
            for phenomenon, where in phenomena.items():
                if isinstance(where, str):
                    grey = windows_of(path.parent / where, Cut(F_, fps, 1, H, W))
                    mask = grey[0].video.mean(-1) > 127
                else:
                    mask = np.zeros((F_, H, W), bool)
                    for start, end, left, top, right, bottom in where:
                        mask |= (((start <= when) & (when < end))[:, None, None]
                                 & ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right)))
                if phenomenon not in CUES:
                    raise ValueError(f"{phenomenon!r} is none of {', '.join(CUES)}")
                clip.append(Truth(window.video, fps, phenomenon, mask, mask))
            every = np.any([truth.mask for truth in clip], axis=0)
            found.append([dataclasses.replace(truth, objects=every) for truth in clip])
        except Exception as e:  # of a decoder, or of the file's shape
            raise UserError(f"{path}: {name} cannot be used ({e or type(e).__name__}).") from None
    if not found:
        raise UserError(f"{path} names no video.")
    return found


def measures(score: np.ndarray, positive: np.ndarray, objects: np.ndarray) -> dict[str, float]:
    """AUC of a map (N,) against all tokens and against those of other objects; pointing game: is its peak on the
    object; IoU of the tokens above half of its peak. NaN where there is nothing to compare with."""
    rivals = positive | objects
    over = score >= .5 * score.max() if score.max() > 0 else np.zeros_like(positive)
    return {"AUC": auc(score, positive),
            "AUC objects": auc(score[rivals], positive[rivals]) if (objects & ~positive).any() else math.nan,
            "pointing": float(positive[score.argmax()]), "IoU": (over & positive).sum() / (over | positive).sum()}


def bands(n: int) -> dict[str, list[int]]:
    """Layers to average: each quarter of n, the default, all."""
    edges = np.linspace(0, n, min(4, n) + 1).round().astype(int)
    found = {f"{a}-{b - 1}" if b - a > 1 else f"{a}": list(range(a, b)) for a, b in zip(edges, edges[1:])}
    found["default"] = layers_of("", n)
    found["all"] = list(range(n))
    return found


def covered(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """(N,) tokens of which the mask covers a share."""
    return data.covered(torch.from_numpy(mask), grid).numpy()


def report(vlm: VLM, settings: Settings, clips: list[list[Truth]], untrained: VLM | None, batch: int, shape) -> dict:
    """{row: {measure: mean}}: every kind of rows, layer band and background, then the rivals that need no VLM, or an
    untrained one; and means of what else is worth a look, such as how often the VLM's own answers affirm a phenomenon
    that only other clips are known to hold (one a clip is asked for). Masks are averaged over equal parts of the clip:
    with aligned frames of a real video that is up to a frame and a half off. shape: a Truth -> the frames that the VLM sees of it, and how many a second.
    """
    rows, order = {}, bands(vlm.n_layers)
    log = {"answers that affirm what is there": [], "what is not": [], "mass on the video": [], "overlap": []}
    prior, affirms = {}, lambda look: float(not look.empty and not DENIAL.search(look.answer))
    known = sorted({truth.name for clip in clips for truth in clip})
    for number, clip in enumerate(tqdm(clips, desc="report", unit="clip", leave=False)):
        (frames, fps), names = shape(clip[0]), [truth.name for truth in clip]
        absent = [name for name in known if name not in names]
        absent = [absent[number % len(absent)]] if absent else []
        every = dict(kinds=KINDS, layers=list(range(vlm.n_layers)), batch=batch)
        *mine, behind = vlm.look_for([frames], fps, [names + absent], settings, **every)[0]
        if not settings.answer:  # which would be its answer to everything
            log["answers that affirm what is there"] += map(affirms, mine[:len(names)])
            log["what is not"] += map(affirms, mine[len(names):])
        if untrained:
            questions, said = [[settings.ask(name) for name in names]], [[look.answer for look in mine[:len(names)]]]
            every["layers"] = list(range(untrained.n_layers))
            none = untrained.look([frames], fps, questions, settings, answers=said, **every)[0]
        grid = tuple(behind.maps.shape[2:])
        for i, (truth, look) in enumerate(zip(clip, mine)):
            positive, objects = covered(truth.mask, grid), covered(truth.objects, grid)
            if positive.all() or not positive.any():
                continue
            maps = {"frame differences": data.resample(saliency(truth.video, len(truth.video)), grid)}
            for k, kind in enumerate(KINDS):
                for band, layers in order.items():
                    one, bg = look.density(layers, k, settings.sinks), behind.density(layers, k, settings.sinks)
                    maps |= {f"{kind}, layers {band}, {how}": align.relative(one, bg, how)
                             for how in ("none", "subtract", "divide")}
            if untrained:
                maps["untrained, predict, layers all, none"] = none[i].density(slice(None), 1)
            for row, values in maps.items():
                for measure, value in measures(values.flatten().numpy(), positive, objects).items():
                    rows.setdefault(row, {}).setdefault(measure, []).append(value)
            prior.setdefault(truth.name, []).append((positive, objects))
            log["mass on the video"].append(look.mass(1).mean().item())
            log["overlap"].append(F.cosine_similarity(*(one.density(order["default"], 1).flatten()
                                                        for one in (look, behind)), dim=0).item())
    for seen in prior.values():  # each clip against the mean mask of the others with this phenomenon
        total = sum(positive.astype(float) for positive, _ in seen)
        for positive, objects in seen if len(seen) > 1 else ():
            for measure, value in measures(total - positive, positive, objects).items():
                rows.setdefault("location prior", {}).setdefault(measure, []).append(value)
    return {"rows": {row: {m: float(np.nanmean(v)) for m, v in table.items()} for row, table in rows.items()},
            **{name: float(np.nanmean(values)) for name, values in log.items() if values}}


def heat(frames: np.ndarray, values: Tensor, colour=(255, 120, 40)) -> np.ndarray:
    """Lay a map (t, h, w) >= 0 over frames (F, H, W, 3), its peak strongest."""
    cells = (np.arange(len(frames)) + .5) * len(values) / len(frames)  # of the map, at each frame
    axes = [time_weights(np.arange(len(values)) + .5, cells)]
    for n, m in zip(values.shape[1:], frames.shape[1:3]):
        axes.append(axis_weights(np.linspace(0, 1, n + 1), np.linspace(0, 1, m + 1)))
    over = weigh(values[None], *(torch.from_numpy(weights).float() for weights, _ in axes))[0].clamp(min=0)
    return tint(frames, (over / over.max().clamp(min=1e-9)).numpy(), colour, .85)


def tile(frames: np.ndarray, panels: list[tuple[str, np.ndarray]], text: str, scale: int) -> np.ndarray:
    """One row of a preview: named panels (F, H, W, 3) side by side, the text below."""
    shown_ = [annotate(np.pad(enlarge(panel, scale), ((0, 0), (4, 0), (4, 0), (0, 0))), name)
              for name, panel in [("clip", frames), *panels]]
    return annotate(np.concatenate(shown_, 2), text, lines=2)


def preview(path: Path, vlm: VLM, settings: Settings, clips: list[list[Truth]], batch: int, shape) -> None:
    """A GIF: question, answer, map, background map, difference, exact mask of each clip's first phenomenon."""
    rows = []
    for clip in clips:
        truth, (frames, fps) = clip[0], shape(clip[0])
        look, behind = vlm.look_for([frames], fps, [[truth.name]], settings, batch=batch)[0]
        one, bg = look.density(sinks=settings.sinks), behind.density(sinks=settings.sinks)
        scale = max(1, 112 // truth.video.shape[1])
        panels = [("map", heat(truth.video, one)), ("background map", heat(truth.video, bg)),
                  ("difference", heat(truth.video, align.relative(one, bg).clamp(min=0))),
                  ("exact mask", tint(truth.video, truth.mask, (255, 120, 40), .7))]
        rows.append(tile(truth.video, panels, f"{settings.ask(truth.name)}: {look.answer}", scale))
    longest, widest = (max(row.shape[axis] for row in rows) for axis in (0, 2))
    rows = [np.pad(np.pad(row, ((0, longest - len(row)), (0, 0), (0, 0), (0, 0)), mode="edge"),
                   ((0, 0), (0, 0), (0, widest - row.shape[2]), (0, 0))) for row in rows]
    save_gif(path, np.concatenate(rows, 1), max(1, clips[0][0].fps / 2))
    print(f"wrote {path}")


def print_report(vlm: VLM, settings: Settings, clips: list[list[Truth]], args, shape) -> None:
    """The table of `report`, best AUC first."""
    untrained = None
    if args.untrained:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(Path(folder), 0)
            untrained = VLM(folder)
    found = report(vlm, settings, clips, untrained, args.batch, shape)
    rows = found.pop("rows")
    columns = list(next(iter(rows.values()), {}))
    if not rows:
        raise UserError("No phenomenon of these clips covers some, and not all, of the VLM's tokens.")
    print(f"\n{sum(map(len, clips))} phenomena of {len(clips)} clips; " +
          ", ".join(f"{name} {value:.2f}" for name, value in found.items()) + "\n")
    print("| rows, layers, background | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, values in sorted(rows.items(), key=lambda row: -row[1]["AUC"]):
        print(f"| {name} | " + " | ".join(f"{values[column]:.3f}" for column in columns) + " |")
