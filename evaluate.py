"""Do generated clips obey physics, and does the branch know where it happens? Two tables from a run folder.

    python evaluate.py --run runs/small                        both tables, kept in runs/small/evaluation.json
    python evaluate.py --run runs/a --run runs/b --run runs/c  the same for each, then mean and spread over them

*Law errors.* Each phenomenon of the world has one law and one detector, which measures the law from pixels alone. It
knows what a caption tells (side, colours, phenomenon), the constants of nature and the furniture of the room; it does
not know how large or how fast this actor is. A detector follows a state y(t) (a height, an area, an angle), fits the
law to it, and reports, unless its docstring says more,

    error = min(1, max(|k^ / k - 1|, 1 - R^2))

with k^ the fitted constant, k the true one, and 1 - R^2 the share of y's variance that the fit leaves unexplained:
that is what shuffled frames fail by, and still ones have k^ = 0. Where too little of the right colour is found on the
right side, the error is 1. The same detectors judge the true clips, their frames shuffled, their middle frame repeated,
and noise: these rows say what the figures are worth.

*Localisation.* True clips with decoys are noised to t, passed once through the network, and the refinement router's
maps P'_r compared with the exact masks: AUC over a clip's tokens, for each phenomenon in it. Rivals: where that
phenomenon usually is, and the backbone's own attention from video to the words of that phenomenon.

Left out on purpose: how the clips look (a blurred ball that falls rightly is right), and judges that are networks.

Letters: F frames, h w pixels of a cell, B clips, N video tokens, L text tokens.
"""
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import encode
import sample
import world
from align import auc
from config import Stopped, UserError
from experts import ProPhy

JUDGED_SEED = 999  # the world whose captions are prompts: no run trains on it
SELECTED, SCORED = data.HELD_OUT + 200_000, data.HELD_OUT + 100_000  # first clips that choose a head, that are scored
PRIOR_CLIPS = 2000  # training clips behind the location priors
LEVELS = (.7, .5, .2)  # noise at which the maps are scored
FEWEST_FRAMES, FEWEST_PIXELS = 8, 32  # a law needs that much to be measured
FAINT = .1  # shares of the actor's colour up to here are background
SOLID = .4  # how much a pixel's neighbours must agree with it: shapes .45 and more, noise .25
EVIDENCE = .3  # of the area of the smallest actor must be there
KEPT = .75  # of the frames must have it


# ------------------------------------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Scene:
    """All that a caption tells of one phenomenon, and so all that a detector may know of it."""
    phenomenon: str
    box: tuple  # its side: a cell of world.py, x0, y0, x1, y1 in canvas heights
    colour: str
    colour2: str = ""

    @classmethod
    def of(cls, actor: world.Actor) -> "Scene":
        return cls(actor.phenomenon, actor.box, actor.colour, actor.colour2)


class Unseen(Exception):
    """Too little of the actor is found in too many frames."""


class View:
    """The cell of a scene in a clip (F, H, W, 3) uint8. Units of world.py: heights from the cell's origin, seconds."""

    def __init__(self, frames, scene):
        self.room = world.Cell(scene.box, *frames.shape[1:3])  # as it is without actors; a detector adds furniture
        self.colour, self.colour2, self.spans = scene.colour, scene.colour2, world.PHENOMENA[scene.phenomenon].spans
        self.t = np.arange(len(frames)) / len(frames)
        self.x, self.y, self.pixel = self.room.x[0], self.room.y[0], 1 / self.room.scale  # (1, w), (h, 1), a side
        self.rgb = np.moveaxis(frames[:, self.room.rows, self.room.columns] / np.float32(255), -1, 0)  # (3, F, h, w)

    def low(self, name):
        """The smallest value of a parameter; of a constant of nature, the value."""
        return self.spans[name].low

    def share(self, rgb, colour):
        """How far rgb (3, F, h, w) lies on the way from the room's colour to the actor's, and how far beside it.

        Grey is taken out first, so highlights, steel and glass weigh little: with q the hue of rgb and d that of the
        actor, both less the room's, the share is a = q.d / d.d and the rest |q - a d| / |d|. A pixel that the actor
        covers to one half has a = 1/2, so sums of a are areas finer than pixels.
        """
        def hue(rgb):
            return rgb - rgb.mean(0)
        d, q = hue(_rgb(colour)) - hue(self.room.rgb), hue(rgb) - hue(self.room.rgb)
        size = (d * d).sum(0)
        a = (q * d).sum(0) / size
        return a, np.sqrt(((q - a * d) ** 2).sum(0) / size)

    def amount(self, colour):
        """Weights (F, h, w) in 0..1: how much of a pixel is the actor. Hues 22 degrees off count fully, 39 not."""
        a, beside = self.share(self.rgb, colour)
        return np.where(a > FAINT, np.clip(a, 0, 1), 0) * np.clip(2 - beside / (.4 * np.abs(a) + .04), 0, 1)

    def area(self, w):
        return w.sum((1, 2)) * self.pixel ** 2

    def middle(self, w):
        """Centre's x and y (F,). Squared weights: faint noise all over the cell would pull a plain mean."""
        total = (w ** 2).sum((1, 2)) + 1e-9
        return (w ** 2 * self.x).sum((1, 2)) / total, (w ** 2 * self.y).sum((1, 2)) / total

    def seen(self, w, area):
        """(F,) frames that show EVIDENCE of this area, in a body: neighbours are alike, which they are not in noise."""
        p = np.pad(w, ((0, 0), (1, 1), (1, 1)))
        near = (p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]) / 4
        alike = (w * near).sum((1, 2)) / ((w * w).sum((1, 2)) + 1e-9)
        return (self.area(w) > EVIDENCE * area) & (alike > SOLID)


def _rgb(colour):
    return np.array(world.CUE_COLOURS[colour], np.float32).reshape(3, 1, 1, 1)


def enough(*seen):
    """Frames where everything is seen; raises Unseen when these are too few."""
    ok = np.logical_and.reduce(seen)
    if ok.sum() < max(KEPT * len(ok), FEWEST_FRAMES - 2):
        raise Unseen
    return ok


def fit(columns, y):
    """Least squares of y on the columns: coefficients, and 1 - R^2 in 0..1, which is 1 where y does not change."""
    A = np.stack(np.broadcast_arrays(*columns), -1).astype(float)
    c = np.linalg.lstsq(A, y, rcond=None)[0]
    total = np.square(y - y.mean()).sum()
    return c, min(np.square(y - A @ c).sum() / total, 1.) if total > 1e-9 * len(y) else 1.


def fit_contact(t, ys, columns):
    """Fit columns(before, after), times until and since a contact, to all ys; the contact time that fits best.

    Returns the coefficients of each y, and 1 - R^2 of all together.
    """
    spread, best = np.array([y.var() + 1e-12 for y in ys]), (math.inf, None)
    for contact in np.linspace(t[1], t[-2], 101):
        terms = columns(np.minimum(t - contact, 0), np.maximum(t - contact, 0))
        fits = [fit(terms, y) for y in ys]
        best = min(best, (np.array([rest for _, rest in fits]) @ spread / spread.sum(), [c for c, _ in fits]),
                   key=lambda one: one[0])
    return best[1], best[0]


def off(value, truth):
    return abs(value / truth - 1)


def outside(value, span):
    """How far a value lies outside the world's range, relative to the range's smaller end: 1 for zero."""
    return max(span.low - value, value - span.high, 0) / span.low


# ----------------------------------------------------------------------------------------------------------------- laws
def _ball(view):
    w = view.amount(view.colour)
    ok = enough(view.seen(w, np.pi * view.low("radius") ** 2))
    return view.t[ok], view.middle(w)[1][ok]


def gravity(view):
    """Thrown ball: y = a + b t + g t^2 / 2 fitted to the centre's height; k = g."""
    t, y = _ball(view)
    (_, _, g), rest = fit((1, t, t ** 2 / 2), y)
    return max(off(g, view.low("gravity")), rest)


def bounce(view):
    """Bouncing ball: two arcs of one gravity that meet in a contact, y = a + v s + g s^2 / 2 with s the time since the
    contact, and v' for v after it. The larger of the errors of g and of the restitution e = -v' / v."""
    t, y = _ball(view)
    def arcs(before, after):
        return 1, before, after, (before + after) ** 2 / 2
    [(_, v, v_after, g)], rest = fit_contact(t, [y], arcs)
    if v < .1:  # the ball must come down before it can bounce
        return 1.
    return max(off(-v_after / v, view.low("restitution")), off(g, view.low("gravity")), rest)


def collision(view):
    """Two pucks, straight lines with one kink at a common time, masses m = their areas. The larger of the momentum
    lost, |m dv + m2 dv2| / (m |v| + m2 |v2|), and (1 + u' / u) / 2 with u = v - v2 before and u' after: 0 when they
    part as fast as they met, as elastic bodies do, 1/2 when they stick, 1 when they pass through each other."""
    view.room.paint(view.room.box(*world.Collision.table), world.PANEL)
    pucks = [view.amount(colour) for colour in (view.colour, view.colour2)]
    ok = enough(*(view.seen(w, np.pi * view.low("radius") ** 2) for w in pucks))
    m, m2 = (np.median(view.area(w)[ok]) for w in pucks)
    ys = [view.middle(w)[1][ok] for w in pucks]
    [(_, v, v_after), (_, v2, v2_after)], rest = fit_contact(view.t[ok], ys, lambda before, after: (1, before, after))
    if abs(v - v2) < .5 * view.low("speed"):  # nothing comes to meet
        return 1.
    lost = abs(m * (v_after - v) + m2 * (v2_after - v2)) / (m * abs(v) + m2 * abs(v2))
    return max(lost, abs(1 + (v_after - v2_after) / (v - v2)) / 2, rest)


def liquid(view):
    """Filling glass: the coloured area right of the middle, where no stream falls, grows by flux / 2; k = flux."""
    w = view.amount(view.colour) * (view.x > 0) * (view.y > world.LiquidMotion.top)
    ok = enough(view.seen(w, view.low("level0") * view.low("width") / 2))
    (_, slope), rest = fit((1, view.t[ok]), view.area(w)[ok])
    return max(off(2 * slope, view.low("flux")), rest)


def smoke(view):
    """Spreading puff: of a Gaussian, S = (sum w^3)^2 / sum w^6 = 4 pi sigma^2 / 3, so dS/dt = 8 pi D / 3; k = D. High
    powers, because the puff's faint rim drowns in a generated clip's noise."""
    w = view.amount(view.colour)
    ok = enough(view.seen(w, 2 * np.pi * view.low("sigma0") ** 2))
    size = view.area(w ** 3)[ok] ** 2 / view.area(w ** 6)[ok]
    (_, slope), rest = fit((1, view.t[ok]), size)
    return max(off(3 * slope / (8 * np.pi), view.low("diffusivity")), rest)


def candle(view):
    """Burning candle: the wax area falls by rate x width, the width read off below the flame; k = burning rate."""
    w = view.amount(view.colour)
    foot = (view.y > .72) & (view.y < .88)
    ok = enough(view.seen(w * foot, view.low("width") * .16))  # the flame alone, a little red and yellow, is no candle
    width = np.median(w[ok][:, foot[:, 0]].sum(2)) * view.pixel
    (_, slope), rest = fit((1, view.t[ok]), view.area(w)[ok])
    return max(off(-slope / width, view.low("burn_rate")), rest)


def melting(view):
    """Melting block: B + P stays, B falls by the rate. The puddle P = level x (tray - side), its level from the outer
    columns, the side from the middle ones; the block B is the rest of the coloured area, in which the darker water
    weighs less. The larger of the errors of the rate and |d(B + P)/dt| / rate; k = melting rate."""
    half, rate = world.Melting.half, view.low("melt_rate")
    view.room.vessel(half, .015, world.FLOOR - .2, world.FLOOR, world.GLASS)
    w = view.amount(view.colour) * (np.abs(view.x) < half) * (view.y < world.FLOOR)
    ok = enough(view.seen(w, view.low("side0") ** 2 - rate))
    dark = view.share(.5 * _rgb(view.colour) + .04, view.colour)[0].mean()
    across = np.abs(view.x[0])
    side, level = (w[ok][:, :, columns].mean(2).sum(1) * view.pixel
                   for columns in (across < .08, (across > .18) & (across < .22)))
    puddle = level / dark * (2 * half - side)
    block = view.area(w)[ok] - dark * puddle
    (_, slope), rest = fit((1, view.t[ok]), block)
    (_, made), _ = fit((1, view.t[ok]), block + puddle)
    return max(off(-slope, rate), abs(made) / rate, rest)


def boiling(view):
    """Evaporating drop: diameter^2 = 4 area / pi falls by K (the d^2 law); k = K."""
    w = view.amount(view.colour) * (view.y < world.Vaporization.plate) * (view.y > .5)
    ok = enough(view.seen(w, np.pi / 4 * (view.low("diameter0") ** 2 - view.low("rate"))))
    (_, slope), rest = fit((1, view.t[ok]), 4 / np.pi * view.area(w)[ok])
    return max(off(-slope, view.low("rate")), rest)


def pressing(view):
    """Pressed block: ln width = c - p ln height, where p = 1 keeps the area and p = 0 keeps the width; the larger of
    |p - 1| and how far the speed of the height lies outside the world's range. Width: the median of the fuller rows."""
    w = view.amount(view.colour)
    ok = enough(view.seen(w, view.low("width0") * view.low("height0")))
    rows = w[ok].sum(2) * view.pixel  # (F, h)
    width = np.array([np.median(row[row > row.max() / 2]) for row in rows])
    height = view.area(w)[ok] / width
    (_, speed), rest = fit((1, view.t[ok]), height)
    (_, minus_p), _ = fit((1, np.log(height)), np.log(width))
    return max(abs(minus_p + 1), outside(-speed, view.spans["press_speed"]), rest)


def _beams(view, hit):
    """Directions of the two halves of a beam that meet in `hit`: sums (F,) of |dx| and |dy|, above it and below."""
    w = view.amount(view.colour)
    dx, dy = view.x - hit[0], view.y - hit[1]
    r = np.hypot(dx, dy)
    seen, sums = [view.seen(w, .1 * .3)], []
    for there in (dy < 0, dy > 0):
        part = w ** 2 * there * (r > .2) * (r < .36)  # nearer, the halves overlap; farther is the lamp
        seen.append(view.area(part) > EVIDENCE * .1 * .1)
        sums += np.abs((part * dx / r).sum((1, 2))), np.abs((part * dy / r).sum((1, 2)))
    ok = enough(*seen)
    return view.t[ok], *(one[ok] for one in sums)


def mirror(view):
    """Reflected beam: mean |out - in| / mean in, and both angles sweep evenly at a speed in the world's range."""
    t, in_x, in_y, out_x, out_y = _beams(view, world.Reflection.hit)
    angle_in, angle_out = np.arctan2(in_y, in_x), np.arctan2(out_y, out_x)
    ((_, omega), rest), ((_, omega_out), rest_out) = (fit((1, t), angle) for angle in (angle_in, angle_out))
    sweep = max(outside(abs(one), view.spans["omega"]) for one in (omega, omega_out))
    return max(np.abs(angle_out - angle_in).mean() / angle_in.mean(), sweep, rest, rest_out)


def refraction(view):
    """Refracted beam: n = slope of sin(in) over sin(out) through zero, error |n^ - n| / (n - 1) and its 1 - R^2; the
    angle in sweeps evenly at a speed in the world's range."""
    (_, surface), n = world.Refraction.hit, view.low("refractive_index")
    view.room.paint(view.room.box(-.245, surface, .245, world.FLOOR), world.WATER)
    t, in_x, in_y, out_x, out_y = _beams(view, world.Refraction.hit)
    angle_in, angle_out = np.arctan2(in_x, in_y), np.arctan2(out_x, out_y)
    (slope,), rest = fit((np.sin(angle_out),), np.sin(angle_in))
    (_, omega), uneven = fit((1, t), angle_in)
    return max(abs(slope - n) / (n - 1), outside(abs(omega), view.spans["omega"]), rest, uneven)


def blast(view):
    """Blast wave: radius^2 = a + c t; k = c. The radius is where the mean colour over a circle falls for the last time
    through half of its maximum, so it does not matter that the wave fades."""
    w = view.amount(view.colour)
    ok = enough(view.seen(w, np.pi * view.low("radius0") ** 2))
    _, y = view.middle(w[ok].sum(0, keepdims=True))
    r = np.hypot(view.x, view.y - y) / view.pixel  # (h, w)
    rings = np.arange(1, int(.32 / view.pixel))
    near = np.clip(1 - np.abs(r[..., None] - rings), 0, 1)  # (h, w, rings)
    profile = np.einsum("fyx,yxr->fr", w[ok], near) / near.sum((0, 1))
    half = profile.max(1, keepdims=True) / 2
    last = profile.shape[1] - 2 - (profile > half)[:, -2::-1].argmax(1)  # last ring above half
    f = np.arange(len(profile))
    p, q = profile[f, last], profile[f, last + 1]
    radius = (rings[last] + np.clip((p - half[:, 0]) / (p - q + 1e-9), 0, 1)) * view.pixel
    (_, slope), rest = fit((1, view.t[ok]), radius ** 2)
    return max(off(slope, view.low("blast")), rest)


LAWS = {"rigid body motion": gravity, "collision": collision, "liquid motion": liquid, "gas motion": smoke,
        "combustion": candle, "melting": melting, "refraction": refraction, "elastic motion": bounce,
        "deformation": pressing, "vaporization": boiling, "reflection": mirror, "explosion": blast}
SEVEN = list(LAWS)[:7]  # those that an earlier experiment measured too: their mean has a history


def law_error(frames, scene) -> tuple[float, bool]:
    """Error in 0..1 of one clip (F, H, W, 3) uint8, and whether enough of its actor was found."""
    try:
        error = float(LAWS[scene.phenomenon](View(frames, scene)))
    except Unseen:
        return 1., False
    return min(error, 1.) if math.isfinite(error) else 1., True


def law_errors(videos, scenes) -> dict:
    """Means over clips: {"found": share, "seven": mean over the SEVEN laws, "all": over all, law: error ...}; a law
    goes by its detector's name, "se" is the standard error of "all". Laws without a clip are left out."""
    errors, found = {}, []
    for frames, scene in zip(videos, scenes, strict=True):
        error, there = law_error(frames, scene)
        errors.setdefault(scene.phenomenon, []).append(error)
        found.append(there)
    means = {name: float(np.mean(errors[name])) for name in LAWS if name in errors}
    seven = [means[name] for name in SEVEN if name in means]
    se = math.sqrt(sum(np.var(e) / len(e) for e in errors.values())) / len(errors)
    total = {"seven": float(np.mean(seven))} if seven else {}
    return {"found": float(np.mean(found)), **total, "all": float(np.mean(list(means.values()))),
            **{LAWS[name].__name__: error for name, error in means.items()}, "se": se}


# -------------------------------------------------------------------------------------------------------- table of laws
def drawing(cfg, **changed) -> dict:
    """Arguments of world.make_clip that draw what the run was trained on, with some changed."""
    names = "frames", "height", "width", "decoys", "two", "colour_cues"
    return {name: getattr(cfg, name) for name in names} | changed


def law_table(loaded, batch, n, seed, steps, guidance, precision) -> dict:
    """{"rows": {row: law_errors}} over n clips a law: first what bounds the figures, then what the model makes."""
    cfg, model, process, tokenizer, _ = loaded
    rng = np.random.default_rng([seed, 4])
    clips = [world.make_clip(JUDGED_SEED, 1000 * i + j, phenomenon=name, **drawing(cfg, two=0))
             for i, name in enumerate(LAWS) for j in range(n)]
    scenes = [Scene.of(clip.actors[0]) for clip in clips]
    true = np.stack([clip.video for clip in clips])  # (clips, F, H, W, 3)
    rows = {"simulator": true,
            "frames shuffled": np.stack([video[rng.permutation(cfg.frames)] for video in true]),
            "frozen": true[:, [cfg.frames // 2] * cfg.frames],
            "noise": rng.integers(0, 256, true.shape, dtype=np.uint8)}
    rows = {name: law_errors(videos, scenes) for name, videos in rows.items()}
    models = {"generated": model}
    if isinstance(model, ProPhy):
        models["backbone alone"] = model.backbone  # from the same noise
    for name, one in models.items():
        videos, _ = sample.generate(one, process, tokenizer, cfg, [clip.caption for clip in clips], seed=seed,
                                    steps=steps, guidance=guidance, batch=batch, precision=precision)
        rows[name] = law_errors(videos, scenes)
    return {"rows": rows}


# --------------------------------------------------------------------------------------------------------- localisation
@dataclass
class Sight:
    """One phenomenon of a clip: where it is, and which words of the caption tell of it."""
    category: int
    side: str
    positive: np.ndarray  # bool (N,) tokens of which it covers a quarter
    words: list[int]  # their places in the caption

    @property
    def scorable(self) -> bool:
        return bool(self.positive.any() and not self.positive.all())


def sights(clip, cfg) -> list[Sight]:
    """Its phenomena. The words are those of the template that world.py made the caption from: noun, verb and colour."""
    found = []
    for actor in clip.actors:
        cover = data.resample(torch.from_numpy(actor.mask).float(), cfg.grid).flatten().numpy()
        phrases = [phrase.format(c=actor.colour, d=actor.colour2, s=size)
                   for phrase in world.PHENOMENA[actor.phenomenon].phrases for size in ("", "small ", "large ")]
        phrase = next(phrase for phrase in phrases if phrase in clip.caption)
        first = len(data.Tokenizer.split(clip.caption[:clip.caption.index(phrase)]))
        words = range(first, min(first + len(data.Tokenizer.split(phrase)), cfg.text_len))
        found.append(Sight(actor.category, actor.side, cover >= data.POSITIVE - 1e-6, list(words)))
    return found


def location_priors(cfg) -> dict:
    """{category: (N,)} and {(category, side): (N,)}: how often each token is positive in training clips."""
    seen = {}
    for i in range(min(PRIOR_CLIPS, cfg.world_clips)):
        for sight in sights(world.make_clip(cfg.world_seed, i, ood=cfg.ood, **drawing(cfg)), cfg):
            for key in (sight.category, (sight.category, sight.side)):
                seen.setdefault(key, []).append(sight.positive)
    return {key: np.mean(positives, 0) for key, positives in seen.items()}


def attention_maps(backbone, x_t, time, text, length) -> torch.Tensor:
    """(B, layers, 2, heads, N, L): how much each video token attends to each word, as it is and as a share of its
    attention to the caption's real words."""
    tokens, condition = backbone.embed(x_t, time, text, length)
    real = torch.arange(text.shape[1], device=text.device) < length[:, None]  # (B, L)
    maps = []
    for block in backbone.blocks:
        attention = block.attention_map(tokens, condition).float() * real[:, None, None]  # (B, heads, N, L)
        maps.append(torch.stack([attention, attention / attention.sum(-1, keepdim=True).clamp(min=1e-9)], 1))
        tokens = block(tokens, condition)
    return torch.stack(maps, 1)


@torch.no_grad()
def observe(loaded, first, clips, t, seed, ood, precision, batch):
    """Yield (sight, P'_r (N,) or None, attention to its words (layers, 2, heads, N)) for each phenomenon in `clips`
    clips of the world from index `first` on, all with a decoy, noised to t."""
    cfg, model, process, tokenizer, _ = loaded
    device, branch = next(model.parameters()).device, isinstance(model, ProPhy)
    backbone = model.backbone if branch else model
    for start in range(first, first + clips, batch):
        indices = range(start, min(start + batch, first + clips))
        made = [world.make_clip(cfg.world_seed, i, ood=ood, **drawing(cfg, decoys=1.)) for i in indices]
        ids, n_words = zip(*(tokenizer.encode(clip.caption, cfg.text_len) for clip in made))
        text, length = torch.stack(ids).to(device), torch.tensor(n_words, device=device)
        x = torch.from_numpy(np.stack([clip.video for clip in made])).permute(0, 4, 1, 2, 3) / 127.5 - 1
        eps = process.draw(seed, indices, x.shape[1:])[1]
        now = torch.full((len(made),), t)
        x_t, time = process.noise(x, now, eps).to(device), process.model_time(now).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            lift = model(x_t, time, text, length)[1].refinement_lift if branch else None  # (B, N, E_cat)
            attention = attention_maps(backbone, x_t, time, text, length).cpu().numpy()
        for b, clip in enumerate(made):
            for sight in sights(clip, cfg):
                yield (sight, None if lift is None else lift[b, :, sight.category].float().cpu().numpy(),
                       attention[b][..., sight.words].sum(-1))


def localisation_table(loaded, batch, clips, seed, ood, precision) -> dict:
    """{"rows": {row: {noise level: mean AUC over phenomena}}, and how many were scored and skipped, which heads}.

    A phenomenon is scored where some, and not all, of a clip's tokens are positive. Rows: the maps P'_r; the share of
    training clips in which a token is positive (the same map for all clips of a phenomenon, and again for each side:
    harder, as the caption tells the side); the backbone's attention, with layer, head and reading (plain, or as a share
    of the attention to the whole caption) chosen by best mean AUC at that noise level on other clips, half as many.
    """
    priors, rows, heads = location_priors(loaded[0]), {}, {}
    nowhere, seen = np.zeros(math.prod(loaded[0].grid)), {}
    for t in tqdm(LEVELS, desc="localisation", unit="noise level", leave=False):
        level = f"{t:.0%} noise"
        others = observe(loaded, SELECTED, max(clips // 2, 1), t, seed, ood, precision, batch)
        tried = [np.apply_along_axis(auc, -1, attention, sight.positive)
                 for sight, _, attention in others if sight.scorable]  # each (layers, 2, heads)
        seen = list(observe(loaded, SCORED, clips, t, seed, ood, precision, batch))
        scored = [one for one in seen if one[0].scorable]
        if not tried or not scored:
            raise UserError(f"No phenomenon of {clips} clips can be scored on {loaded[0].grid} tokens: raise --clips.")
        best = np.unravel_index(np.mean(tried, 0).argmax(), tried[0].shape)
        heads[level] = f"layer {best[0]}, head {best[2]}, {('plain', 'share')[best[1]]}"
        maps = {"refinement maps": lambda sight, lift, attention: lift,
                "location prior": lambda sight, lift, attention: priors.get(sight.category, nowhere),
                "prior given the side": lambda sight, *_: priors.get((sight.category, sight.side), nowhere),
                "backbone's best attention": lambda sight, lift, attention: attention[best]}
        if scored[0][1] is None:
            del maps["refinement maps"]
        for name, read in maps.items():
            rows.setdefault(name, {})[level] = float(np.mean([auc(read(*one), one[0].positive) for one in scored]))
    return {"rows": rows, "scored": len(scored), "skipped": len(seen) - len(scored), "attention": heads}


# ------------------------------------------------------------------------------------------------------ tables and runs
def markdown(rows) -> str:
    """{row: {column: value, or (mean, deviation)}} as a Markdown table that is also straight in a terminal."""
    def cell(value):
        return "" if value is None else f"{value:.3f}" if np.isscalar(value) else "{:.3f} ± {:.3f}".format(*value)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if column != "se"))
    lines = [["", *columns]] + [[name, *(cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    widths = [max(map(len, one)) for one in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def over_runs(tables) -> dict:
    """Tables of several runs -> {row: {column: (mean, standard deviation over runs)}}, rows that all of them have."""
    return {name: {column: (float(np.mean(values)), float(np.std(values, ddof=1)))
                   for column in row if column != "se" for values in [[table[name][column] for table in tables]]}
            for name, row in tables[0].items() if all(name in table for table in tables)}


PARTS = {"laws": law_table, "localisation": localisation_table}


def evaluate_run(run, args) -> dict:
    """{part: table} of one run; what evaluation.json holds for this checkpoint, code and settings is not done again."""
    device = encode.pick_device(args.device)
    loaded = cfg, _, process, _, info = sample.load_run(run, args.checkpoint, device)
    parts = [args.only] if args.only else list(PARTS)
    if cfg.data_dir:
        raise UserError(f"{run} was trained on videos; laws and exact masks are known of the physics world alone.")
    if "laws" in parts and (cfg.frames < FEWEST_FRAMES or min(cfg.height, cfg.width) < FEWEST_PIXELS):
        raise UserError(f"Laws are measured on {FEWEST_FRAMES} frames of {FEWEST_PIXELS} pixels or more, and {run} "
                        f"makes {cfg.frames} of {cfg.width} x {cfg.height}; --only localisation works.")
    steps = args.steps or cfg.preview_steps
    try:
        process.times(steps)
    except ValueError as e:
        raise UserError(f"--steps {steps}: {e}") from None
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" or (device == cfg.device and cfg.precision == "bf16") else "fp32"
    settings = {"laws": dict(n=args.n, seed=args.seed, steps=steps, guidance=args.guidance or cfg.guidance),
                "localisation": dict(clips=args.clips, seed=args.seed, ood=args.ood or cfg.ood)}
    checkpoint = sample.find_checkpoint(Path(run) / "checkpoints", args.checkpoint)
    code = hashlib.sha256(Path(__file__).read_bytes() + Path(world.__file__).read_bytes()).hexdigest()[:12]
    basis = dict(checkpoint=checkpoint.name, step=info["step"], saved=checkpoint.stat().st_mtime_ns, code=code)

    path, tables = Path(run) / "evaluation.json", {}
    stored = read_stored(path)
    for part in parts:
        chosen = settings[part] | dict(precision=precision)
        if stored.get(part, {}).get("settings") == chosen | basis:
            print(f"{run}: {part} as {path.name} has them.")
        else:
            stored[part] = {"settings": chosen | basis, **PARTS[part](loaded, args.batch, **chosen)}
            try:
                config.write(path, json.dumps(stored, indent=2))
            except OSError as e:
                raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None
        tables[part] = stored[part]
    return tables


def read_stored(path) -> dict:
    try:
        stored = json.loads(path.read_text())
        return stored if isinstance(stored, dict) and all(isinstance(part, dict) for part in stored.values()) else {}
    except (OSError, ValueError):
        return {}


def describe(part, table) -> None:
    print(markdown(table["rows"]))
    if part == "laws":
        print(f"Errors in 0..1, {table['settings']['n']} clips a law; standard error of the generated clips' mean over "
              f"all laws {table['rows']['generated']['se']:.3f}.")
    else:
        heads = "; ".join(f"{level}: {head}" for level, head in table["attention"].items())
        print(f"AUC, {table['scored']} phenomena ({table['skipped']} more had no positive or no negative token). "
              f"Attention chosen: {heads}.")


# -------------------------------------------------------------------------------------------------------------- command
def parse(argv):
    parser = config.Parser("Law errors of generated clips, and how well the routing finds where physics happens.")
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR", help="run folder; several: mean and spread over them")
    add("--n", type=int, default=16, help="clips a law")
    add("--clips", type=int, default=128, help="held-out clips for the localisation")
    add("--seed", type=int, default=0, help="of the noise")
    add("--checkpoint", default="best", help="best | last | base (end of stage one) | a file in the run's checkpoints/")
    add("--steps", type=int, default=0, help="sampling steps; 0 = those of the run's previews")
    add("--guidance", type=float, default=0, help="classifier-free guidance; 0 = that of the run's previews")
    add("--only", choices=list(PARTS), help="one table")
    add("--ood", choices=config.CHOICES["ood"], default="",
        help="draw this of the localisation's clips outside its usual range (captions do not tell it: no use for laws)")
    add("--batch", type=int, default=16, help="clips at a time")
    add("--device", choices=config.CHOICES["device"], default="auto", help="auto = cuda, else mps, else cpu")
    add("--precision", choices=config.CHOICES["precision"], default="auto", help="auto = the run's, on its device")
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("clips", 1), ("batch", 1), ("seed", 0), ("steps", 0), ("guidance", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} must be {least} or more, not {getattr(args, name)}.")
    return args


def main(argv) -> None:
    args = parse(argv)
    done = []
    for run in args.run:
        done.append(evaluate_run(run, args))
        for part, table in done[-1].items():
            print(f"\n{run}, {part}")
            describe(part, table)
    for part in done[0] if len(done) > 1 else ():
        print(f"\n{len(done)} runs, {part}: mean ± standard deviation")
        print(markdown(over_runs([tables[part]["rows"] for tables in done])))


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])
