"""The laws of the world, measured from pixels."""
import math
from dataclasses import dataclass

import numpy as np

from physics.phenomena import (
    CUE_COLOURS,
    FLOOR,
    GLASS,
    PANEL,
    PHENOMENA,
    WATER,
    Cell,
    Collision,
    LiquidMotion,
    Melting,
    Reflection,
    Refraction,
    Vaporization,
)


FEWEST_FRAMES, FEWEST_PIXELS = 8, 32  # a law needs that much to be measured
FAINT = .1  # shares of the actor's colour up to here are background
SOLID = .4  # how much a pixel's neighbours must agree with it: shapes .45 and more, noise .25
EVIDENCE = .3  # of the area of the smallest actor must be there
KEPT = .75  # of the frames must have it


@dataclass(frozen=True)
class Scene:
    """All that a caption tells of one phenomenon, and so all that a detector may know of it."""
    phenomenon: str
    box: tuple  # its side: a cell of world.py, x0, y0, x1, y1 in canvas heights
    colour: str
    colour2: str = ""

    @classmethod
    def of(cls, actor) -> "Scene":
        return cls(actor.phenomenon, actor.box, actor.colour, actor.colour2)


class Unseen(Exception):
    """Too little of the actor is found in too many frames."""


class View:
    """The cell of a scene in a clip (F, H, W, 3) uint8. Units of world.py: heights from the cell's origin, seconds."""

    def __init__(self, frames, scene):
        self.room = Cell(scene.box, *frames.shape[1:3])  # as it is without actors; a detector adds furniture
        self.colour, self.colour2, self.spans = scene.colour, scene.colour2, PHENOMENA[scene.phenomenon].spans
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
    return np.array(CUE_COLOURS[colour], np.float32).reshape(3, 1, 1, 1)


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
    view.room.paint(view.room.box(*Collision.table), PANEL)
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
    w = view.amount(view.colour) * (view.x > 0) * (view.y > LiquidMotion.top)
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
    half, rate = Melting.half, view.low("melt_rate")
    view.room.vessel(half, .015, FLOOR - .2, FLOOR, GLASS)
    w = view.amount(view.colour) * (np.abs(view.x) < half) * (view.y < FLOOR)
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
    w = view.amount(view.colour) * (view.y < Vaporization.plate) * (view.y > .5)
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
    t, in_x, in_y, out_x, out_y = _beams(view, Reflection.hit)
    angle_in, angle_out = np.arctan2(in_y, in_x), np.arctan2(out_y, out_x)
    ((_, omega), rest), ((_, omega_out), rest_out) = (fit((1, t), angle) for angle in (angle_in, angle_out))
    sweep = max(outside(abs(one), view.spans["omega"]) for one in (omega, omega_out))
    return max(np.abs(angle_out - angle_in).mean() / angle_in.mean(), sweep, rest, rest_out)


def refraction(view):
    """Refracted beam: n = slope of sin(in) over sin(out) through zero, error |n^ - n| / (n - 1) and its 1 - R^2; the
    angle in sweeps evenly at a speed in the world's range."""
    (_, surface), n = Refraction.hit, view.low("refractive_index")
    view.room.paint(view.room.box(-.245, surface, .245, FLOOR), WATER)
    t, in_x, in_y, out_x, out_y = _beams(view, Refraction.hit)
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
