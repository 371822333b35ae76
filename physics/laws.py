"""The laws of the world, measured from pixels: a detector a law, and the errors of clips.

A detector knows what a caption tells (phenomenon, side, colours), the constants of nature and the
furniture of the room. It does not know how large or how fast this actor is. It follows a state y(t)
(a height, an area, an angle), fits the law to it and reports, unless its docstring says more,

    error = min(1, max(|k^ / k - 1|, 1 - R^2))

with k^ the fitted constant, k the true one, and 1 - R^2 the share of y's variance that the fit
leaves unexplained: shuffled frames fail by the latter, and still ones have k^ = 0. Where too little
of the right colour is found on the right side, the error is 1.

Units as in phenomena.py: canvas heights from the cell's origin, y DOWN, and seconds.
Letters: F frames, h w pixels of a cell.
"""
import math

import numpy as np

from physics.canvas import CUE_COLOURS, FLOOR, Cell
from physics.phenomena import PHENOMENA


FEWEST_FRAMES = 8  # a law needs that many to be measured
FEWEST_PIXELS = 32  # and that many on the clip's shorter side
FAINT = .1  # a smaller share of the actor's colour is background
SOLID = .4  # how much a pixel's neighbours must agree with it: shapes .45 and more, noise .25
EVIDENCE = .3  # share of the area of the smallest actor that must be there
KEPT = .75  # share of the frames that must show it


class NotFound(Exception):
    """Too little of the actor is found in too many frames."""


class CellView:
    """The cell of one actor in a clip, and what can be measured in it.

    Of the actor only what a caption tells is read: phenomenon, box, colour and colour2.
    Weights (F, h, w) in 0..1 say how much of a pixel is the actor.
    """

    def __init__(self, frames, actor):
        """frames: uint8 (F, H, W, 3). actor: a world.Actor, or whatever has these four fields."""
        self.actor = actor
        self.phenomenon = PHENOMENA[actor.phenomenon]
        self.room = Cell(actor.box, *frames.shape[1:3])  # as it is without the actor
        self.phenomenon.furniture(self.room)
        self.t = np.arange(len(frames)) / len(frames)
        self.x = self.room.x[0]  # (1, w)
        self.y = self.room.y[0]  # (h, 1)
        self.pixel = 1 / self.room.scale  # its side
        rgb = frames[self.room.place] / np.float32(255)
        self.rgb = np.moveaxis(rgb, -1, 0)  # (3, F, h, w)

    # --- what the world knows
    def smallest(self, name):
        """The smallest value of a parameter."""
        return self.phenomenon.spans[name].low

    constant = smallest  # a constant of nature has no other value

    def relative_error(self, value, name):
        """|value / truth - 1| for the constant of this name."""
        return abs(value / self.constant(name) - 1)

    def beyond(self, value, name):
        """How far a value lies outside the parameter's range, relative to its smaller end: 1 for a
        value of 0."""
        span = self.phenomenon.spans[name]
        return max(span.low - value, value - span.high, 0) / span.low

    # --- what the pixels show
    def colour_share(self, rgb, colour):
        """How far rgb (3, F, h, w) lies on the way from the room's colour to the actor's, and how
        far beside it.

        Grey is taken out first, so that highlights, steel and glass weigh little. With q the hue of
        rgb and d that of the actor, both less the room's, the share is a = q.d / d.d and the rest
        |q - a d| / |d|. A pixel that the actor covers to one half has a = 1/2, so sums of a are
        areas finer than pixels.
        """
        def hue(rgb):
            return rgb - rgb.mean(0)

        room = hue(self.room.rgb)
        d = hue(rgb_of(colour)) - room
        q = hue(rgb) - room
        size = (d * d).sum(0)
        a = (q * d).sum(0) / size
        return a, np.sqrt(((q - a * d) ** 2).sum(0) / size)

    def weights(self, colour=""):
        """(F, h, w): how much of a pixel has the actor's colour, or this one."""
        share, beside = self.colour_share(self.rgb, colour or self.actor.colour)
        # A hue that is 22 degrees off counts fully, one that is 39 degrees off not at all.
        trusted = np.clip(2 - beside / (.4 * np.abs(share) + .04), 0, 1)
        return np.where(share > FAINT, np.clip(share, 0, 1), 0) * trusted

    def area(self, w):
        """(F,) canvas heights^2."""
        return w.sum((1, 2)) * self.pixel ** 2

    def height(self, w):
        """(F,) y of the actor's centre. The weights are squared, because faint noise all over the
        cell would pull a plain mean."""
        return (w ** 2 * self.y).sum((1, 2)) / ((w ** 2).sum((1, 2)) + 1e-9)

    def find(self, area, where=True):
        """Times (F',) and weights (F', h, w) of the frames in which an actor of this area is found,
        with the weights counted `where` this (h, w) is true. Raises NotFound."""
        w = self.weights() * where
        ok = usable_frames(self.is_found(w, area))
        return self.t[ok], w[ok]

    def is_found(self, w, area):
        """(F,) bool: frames that show EVIDENCE of an actor of this area, and as one body: its
        pixels are like their neighbours, which those of noise are not."""
        p = np.pad(w, ((0, 0), (1, 1), (1, 1)))
        neighbours = (p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]) / 4
        alike = (w * neighbours).sum((1, 2)) / ((w * w).sum((1, 2)) + 1e-9)
        return (self.area(w) > EVIDENCE * area) & (alike > SOLID)


def rgb_of(colour):
    """A colour's name -> float32 (3, 1, 1, 1) in 0..1."""
    return np.array(CUE_COLOURS[colour], np.float32).reshape(3, 1, 1, 1)


# --- fits ---------------------------------------------------------------------------------------
def usable_frames(*found):
    """(F,) bool: frames in which everything is found. Raises NotFound when these are too few."""
    usable = np.logical_and.reduce(found)
    if usable.sum() < max(KEPT * len(usable), FEWEST_FRAMES - 2):
        raise NotFound
    return usable


def fit(columns, y):
    """Least squares of y on the columns: the coefficients, and 1 - R^2 in 0..1, which is 1 where y
    does not change."""
    A = np.stack(np.broadcast_arrays(*columns), -1).astype(float)
    coefficients = np.linalg.lstsq(A, y, rcond=None)[0]
    total = np.square(y - y.mean()).sum()
    if total > 1e-9 * len(y):
        return coefficients, min(np.square(y - A @ coefficients).sum() / total, 1.)
    return coefficients, 1.


def line(t, y):
    """The slope of y over t, and 1 - R^2 of a straight line."""
    (_, slope), rest = fit((1, t), y)
    return slope, rest


def fit_contact(t, ys, terms):
    """Fit two curves that meet at a contact to each of the ys, at the time of contact that fits all
    of them best: y = a + v s before and a + v' s after it, with s the time since the contact, and
    with four terms + g s^2 / 2 on both sides.

    Returns the coefficients (a, v, v', g) of each y, and 1 - R^2 of all together.
    """
    variance = np.array([y.var() + 1e-12 for y in ys])

    def fit_at(contact):
        s = t - contact
        columns = [1, np.minimum(s, 0), np.maximum(s, 0), s ** 2 / 2]
        coefficients, rests = zip(*(fit(columns[:terms], y) for y in ys))
        return coefficients, np.array(rests) @ variance / variance.sum()

    return min(map(fit_at, np.linspace(t[1], t[-2], 101)), key=lambda fitted: fitted[1])


# --- detectors: each takes a CellView and returns an error --------------------------------------
def _ball_heights(view):
    """Times and heights of the centre of a ball, where it is found."""
    t, w = view.find(np.pi * view.smallest("radius") ** 2)
    return t, view.height(w)


def gravity(view):
    """Thrown ball: y = a + b t + g t^2 / 2 fitted to the centre's height; k = g."""
    t, y = _ball_heights(view)
    (_, _, g), rest = fit((1, t, t ** 2 / 2), y)
    return max(view.relative_error(g, "gravity"), rest)


def bounce(view):
    """Bouncing ball: two arcs of one gravity that meet in a contact, y = a + v s + g s^2 / 2 with s
    the time since the contact, and v' for v after it. The error is the larger one of the errors of
    g and of the share of energy that the contact leaves, e^2 with e = -v' / v."""
    t, y = _ball_heights(view)
    [(_, v, v_after, g)], rest = fit_contact(t, [y], terms=4)
    if v < .1:  # the ball must come down before it can bounce
        return 1.
    kept = (v_after / v / view.constant("restitution")) ** 2
    return max(abs(kept - 1) if v_after < 0 else 1., view.relative_error(g, "gravity"), rest)


def collision(view):
    """Two pucks: straight lines with one kink at a common time, masses m = their areas.

    The error is the larger one of the momentum lost, |m dv + m2 dv2| / (m |v| + m2 |v2|), and of
    (1 + u' / u) / 2 with u = v - v2 before and u' after: 0 when they part as fast as they met, as
    elastic bodies do, 1/2 when they stick, 1 when they pass through each other.
    """
    pucks = [view.weights(), view.weights(view.actor.colour2)]
    area = np.pi * view.smallest("radius") ** 2
    ok = usable_frames(*(view.is_found(w, area) for w in pucks))
    m, m2 = (np.median(view.area(w[ok])) for w in pucks)
    ys = [view.height(w[ok]) for w in pucks]
    [(_, v, v_after), (_, v2, v2_after)], rest = fit_contact(view.t[ok], ys, terms=3)
    if abs(v - v2) < .5 * view.smallest("speed"):  # the pucks do not come together
        return 1.
    lost = abs(m * (v_after - v) + m2 * (v2_after - v2)) / (m * abs(v) + m2 * abs(v2))
    return max(lost, abs(1 + (v_after - v2_after) / (v - v2)) / 2, rest)


def liquid(view):
    """Filling glass: the coloured area right of the middle, where no stream falls, grows by
    flux / 2; k = flux."""
    t, w = view.find(view.smallest("level0") * view.smallest("width") / 2,
                     (view.x > 0) & (view.y > view.phenomenon.top))
    slope, rest = line(t, view.area(w))
    return max(view.relative_error(2 * slope, "flux"), rest)


def smoke(view):
    """Spreading puff: of a Gaussian, S = (sum w^3)^2 / sum w^6 = 4 pi sigma^2 / 3, so that
    dS/dt = 8 pi D / 3; k = D. The powers are high because the puff's faint rim drowns in the noise
    of a generated clip."""
    t, w = view.find(2 * np.pi * view.smallest("sigma0") ** 2)
    slope, rest = line(t, view.area(w ** 3) ** 2 / view.area(w ** 6))
    return max(view.relative_error(3 * slope / (8 * np.pi), "diffusivity"), rest)


def candle(view):
    """Burning candle: the wax area falls by rate x width, with the width measured below the flame;
    k = burning rate."""
    w = view.weights()
    foot = (view.y > .72) & (view.y < .88)
    # Asked of the foot, because a flame alone, a little red and yellow, is no candle.
    ok = usable_frames(view.is_found(w * foot, view.smallest("width") * .16))
    width = np.median(w[ok][:, foot[:, 0]].sum(2)) * view.pixel
    slope, rest = line(view.t[ok], view.area(w[ok]))
    return max(view.relative_error(-slope / width, "burn_rate"), rest)


def melting(view):
    """Melting block: the block's area B falls by the melting rate k, and with the puddle's area P
    the sum B + P stays. The error is the larger one of the error of k and |d(B + P)/dt| / k.

    P = level x (tray - side), with the level from the outer columns and the side from the middle
    ones. B is the rest of the coloured area, in which the darker water weighs less.
    """
    block = view.phenomenon
    rate = view.constant("melt_rate")
    across = np.abs(view.x)  # (1, w)
    t, w = view.find(view.smallest("side0") ** 2 - rate,
                     (across < block.tray / 2) & (view.y < FLOOR))
    colour = view.actor.colour
    dark = view.colour_share(block.water(rgb_of(colour)), colour)[0].mean()

    def height_in(columns):
        return w[:, :, columns[0]].mean(2).sum(1) * view.pixel

    side = height_in(across < .08)
    level = height_in((across > .18) & (across < .22))
    P = level / dark * (block.tray - side)
    B = view.area(w) - dark * P
    slope, rest = line(t, B)
    gained, _ = line(t, B + P)
    return max(view.relative_error(-slope, "melt_rate"), abs(gained) / rate, rest)


def boiling(view):
    """Evaporating drop: diameter^2 = 4 area / pi falls by K (the d^2 law); k = K."""
    smallest = view.smallest("diameter0") ** 2 - view.constant("rate")  # diameter^2 at the end
    t, w = view.find(np.pi / 4 * smallest, (view.y < view.phenomenon.plate) & (view.y > .5))
    slope, rest = line(t, 4 / np.pi * view.area(w))
    return max(view.relative_error(-slope, "rate"), rest)


def pressing(view):
    """Pressed block: ln width = c - p ln height, where p = 1 keeps the area and p = 0 keeps the
    width. The error is the larger one of |p - 1| and how far the speed of the height lies outside
    the world's range. The width is the median of the fuller rows."""
    t, w = view.find(view.smallest("width0") * view.smallest("height0"))
    rows = w.sum(2) * view.pixel  # (F, h)
    width = np.array([np.median(row[row > row.max() / 2]) for row in rows])
    height = view.area(w) / width
    speed, rest = line(t, height)
    minus_p, _ = line(np.log(height), np.log(width))
    return max(abs(minus_p + 1), view.beyond(-speed, "press_speed"), rest)


def _beam_angles(view, upright):
    """Times, and the angles (F,) of a beam before and after the point where it is turned: counted
    from the upright direction, or else from the level one."""
    w = view.weights()
    x, y = view.phenomenon.hit
    dx = view.x - x
    dy = view.y - y
    r = np.hypot(dx, dy)
    beside, along = (dx, dy) if upright else (dy, dx)
    found = [view.is_found(w, .1 * .3)]
    angles = []
    for there in (dy < 0, dy > 0):
        # Nearer to the middle the halves overlap, and farther away is the lamp.
        half = w ** 2 * there * (r > .2) * (r < .36)
        found.append(view.area(half) > EVIDENCE * .1 * .1)
        sums = [np.abs((half * d / r).sum((1, 2))) for d in (beside, along)]
        angles.append(np.arctan2(*sums))
    ok = usable_frames(*found)
    return view.t[ok], *(angle[ok] for angle in angles)


def _sweep_error(view, t, angle):
    """How far an angle is from an even sweep, at a speed in the world's range."""
    omega, rest = line(t, angle)
    return max(view.beyond(abs(omega), "omega"), rest)


def mirror(view):
    """Reflected beam: the error is mean |out - in| / mean in, and both angles sweep evenly at a
    speed in the world's range."""
    t, angle_in, angle_out = _beam_angles(view, upright=False)
    error = np.abs(angle_out - angle_in).mean() / angle_in.mean()
    return max(error, _sweep_error(view, t, angle_in), _sweep_error(view, t, angle_out))


def refraction(view):
    """Refracted beam: n = slope of sin(in) over sin(out) through zero. The error is |n^ - n| /
    (n - 1), and the angle in sweeps evenly at a speed in the world's range."""
    n = view.constant("refractive_index")
    t, angle_in, angle_out = _beam_angles(view, upright=True)
    (slope,), rest = fit((np.sin(angle_out),), np.sin(angle_in))
    return max(abs(slope - n) / (n - 1), rest, _sweep_error(view, t, angle_in))


def blast(view):
    """Blast wave: radius^2 = a + c t; k = c. The radius is where the mean colour over a circle
    falls for the last time through half of its maximum, so that the wave may fade."""
    t, w = view.find(np.pi * view.smallest("radius0") ** 2)
    # The mean colour over each ring of one pixel's width around the centre.
    y = view.height(w.sum(0, keepdims=True))
    r = np.hypot(view.x, view.y - y) / view.pixel  # (h, w)
    rings = np.arange(1, int(.32 / view.pixel))
    near = np.clip(1 - np.abs(r[..., None] - rings), 0, 1)  # (h, w, rings)
    profile = (np.einsum("fyx,yxr->fr", w, near) / near.sum((0, 1))).T  # (rings, F)

    # Between the last ring above half of the maximum and the next one, the profile is a line.
    half = profile.max(0) / 2
    last = len(rings) - 2 - (profile > half)[-2::-1].argmax(0)
    frame = np.arange(len(t))
    above = profile[last, frame]
    below = profile[last + 1, frame]
    step = np.clip((above - half) / (above - below + 1e-9), 0, 1)
    radius = (rings[last] + step) * view.pixel
    slope, rest = line(t, radius ** 2)
    return max(view.relative_error(slope, "blast"), rest)


LAWS = {  # in the order in which tables show them
    "rigid body motion": gravity,
    "collision": collision,
    "liquid motion": liquid,
    "gas motion": smoke,
    "combustion": candle,
    "melting": melting,
    "refraction": refraction,
    "elastic motion": bounce,
    "deformation": pressing,
    "vaporization": boiling,
    "reflection": mirror,
    "explosion": blast,
}

LAWFUL = {  # what may be done to true clips, and the laws that hold all the same
    # A parabola, an elastic collision and a beam's angles are as lawful backwards.
    "reversed": ("rigid body motion", "collision", "refraction", "reflection"),
    # These three name no speed either. But the detectors want pucks and beams about as quick as the
    # world's, so that still ones do not pass: errors of slow clips say this, not that a law broke.
    "weak physics": ("collision", "refraction", "reflection"),
}


# --- errors of clips ----------------------------------------------------------------------------
def law_error(frames, actor) -> tuple[float, bool]:
    """The error in 0..1 of one clip, uint8 (F, H, W, 3), and whether enough of its actor was found.

    Of the actor (a world.Actor) only what a caption tells is looked at.
    """
    try:
        error = float(LAWS[actor.phenomenon](CellView(frames, actor)))
    except NotFound:
        return 1., False
    return min(error, 1.) if math.isfinite(error) else 1., True


def judge(videos, scenes) -> list:
    """[phenomenon, number of actors in the clip, error, found] of each actor, clip by clip.

    scenes: for each video a world.Clip, or whatever has the actors that should be seen.
    """
    return [[actor.phenomenon, len(scene.actors), *law_error(frames, actor)]
            for frames, scene in zip(videos, scenes, strict=True) for actor in scene.actors]


def law_means(judged) -> dict:
    """What judge returned -> {"found": share of actors, "all": mean over the laws, "two": mean
    error in clips of two actors, law: error ..., "se": standard error of "all"}.

    All but "found" and "two" are of clips with one actor. A law goes by its detector's name. What
    no clip shows is left out.
    """
    errors = {LAWS[name].__name__: [error for one, n, error, _ in judged if (one, n) == (name, 1)]
              for name in LAWS}
    errors = {law: some for law, some in errors.items() if some}
    means = {law: float(np.mean(some)) for law, some in errors.items()}
    row = {"found": float(np.mean([found for *_, found in judged])),
           "all": float(np.mean(list(means.values())))}
    two = [error for _, n, error, _ in judged if n == 2]
    if two:
        row["two"] = float(np.mean(two))
    se = math.sqrt(sum(np.var(e) / len(e) for e in errors.values())) / len(errors)
    return {**row, **means, "se": se}


def motion(frames, scene) -> tuple[float, float]:
    """Mean absolute change from frame to frame, of 255, where a scene's actors are (in their cells)
    and in the rest of the picture, which stands still in every clip of the world."""
    change = np.abs(np.diff(frames.astype(int), axis=0))
    inside = np.zeros(frames.shape, bool)
    for actor in scene.actors:
        inside[Cell(actor.box, *frames.shape[1:3]).place] = True
    rest = change[~inside[1:]]
    return float(change[inside[1:]].mean()), float(rest.mean()) if rest.size else 0.
