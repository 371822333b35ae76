"""Do generated clips obey physics, and does the branch know where it happens? (part: laws)"""
from dataclasses import dataclass

import numpy as np

import world

SEVEN = ("rigid body motion", "collision", "liquid motion", "gas motion", "combustion", "melting", "refraction")


# ------------------------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class Scene:
    """All that a caption tells of one phenomenon, and so all that a detector may know."""
    phenomenon: str
    box: tuple  # its side, as the cell of world.py: x0, y0, x1, y1 in canvas heights
    colour: str
    colour2: str = ""


class View:
    """The pixels of a scene's cell. Canvas units: x from -.25 to .25, y downward, seconds."""

    def __init__(self, frames, scene):
        self.room = world.Cell(scene.box, *frames.shape[1:3])  # what is there without any actor; detectors furnish it
        self.scene, self.t = scene, np.arange(len(frames)) / len(frames)
        self.x, self.y, self.pixel = self.room.x[0], self.room.y[0], 1 / self.room.scale
        self.rgb = np.moveaxis(frames[:, self.room.rows, self.room.columns] / np.float32(255), -1, 0)  # (3, F, h, w)

    def share(self, rgb, colour):
        hue = lambda rgb: rgb - rgb.mean(0)
        back = hue(self.room.rgb)
        d, q = hue(np.array(world.CUE_COLOURS[colour], np.float32).reshape(3, 1, 1, 1)) - back, hue(rgb) - back
        size = (d * d).sum(0)
        a = (q * d).sum(0) / size
        return a, np.sqrt(((q - a * d) ** 2).sum(0) / size)

    def amount(self, colour):
        a, away = self.share(self.rgb, colour)
        return np.where(a > .1, np.clip(a, 0, 1), 0) * np.clip(2 - away / (.4 * np.abs(a) + .04), 0, 1)

    def area(self, w):
        return w.sum((-2, -1)) * self.pixel ** 2

    def centre(self, w):
        w = w ** 2
        total = w.sum((-2, -1)) + 1e-9
        return (w * self.x).sum((-2, -1)) / total, (w * self.y).sum((-2, -1)) / total

    def seen(self, w, least):
        """(F,) where there is at least this area, and it is a body rather than grain."""
        solid = (w * near(w)).sum((1, 2)) / ((w * w).sum((1, 2)) + 1e-9)
        return (self.area(w) > least) & (solid > .4)


def near(w):
    p = np.pad(w, ((0, 0), (1, 1), (1, 1)))
    return (p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]) / 4


def fit(columns, y):
    """Least squares: coefficients, and the share of y's variance left unexplained (1 - R^2; 1 where nothing changes)."""
    A = np.stack(np.broadcast_arrays(*columns), -1).astype(float)
    c = np.linalg.lstsq(A, y, rcond=None)[0]
    total = np.square(y - y.mean()).sum()
    return c, min(np.square(y - A @ c).sum() / total, 1) if total > 1e-9 * len(y) else 1.


def relative(value, truth):
    return abs(value / truth - 1)


def outside(value, span):
    low, high = sorted((span.low, span.high))
    return max(low - value, value - high, 0) / low


def span(view, name):
    return world.PHENOMENA[view.scene.phenomenon].spans[name]


def constant(view, name):
    return span(view, name).low


class Unseen(Exception):
    pass


def keep(view, *found):
    ok = np.logical_and.reduce(found)
    if ok.sum() < max(.75 * len(ok), 6):
        raise Unseen
    return ok


# ------------------------------------------------------------------------------------------------------------------ laws
def gravity(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * np.pi * span(view, "radius").low ** 2))
    t, y = view.t[ok], view.centre(w)[1][ok]
    c, rest = fit((1, t, t ** 2 / 2), y)
    return max(relative(c[2], constant(view, "gravity")), rest)


def bounce(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * np.pi * span(view, "radius").low ** 2))
    t, y = view.t[ok], view.centre(w)[1][ok]
    best = None
    for contact in np.linspace(.2, .9, 141):
        s = t - contact
        if (s > 0).sum() < 2 or (s <= 0).sum() < 2:
            continue
        c, rest = fit((1, np.minimum(s, 0), np.maximum(s, 0), s ** 2 / 2), y)
        if best is None or rest < best[1]:
            best = c, rest
    (_, v, v2, g), rest = best
    if v < .1:
        return 1.
    return max(relative(-v2 / v, constant(view, "restitution")), relative(g, constant(view, "gravity")), rest)


def momentum(view):
    view.room.paint(view.room.box(*world.Collision.table), world.PANEL)
    ws = view.amount(view.scene.colour), view.amount(view.scene.colour2)
    ok = keep(view, *(view.seen(w, .3 * np.pi * span(view, "radius").low ** 2) for w in ws))
    t, (m, m2) = view.t[ok], [np.median(view.area(w)[ok]) for w in ws]
    y, y2 = (view.centre(w)[1][ok] for w in ws)
    best = None
    for contact in np.linspace(.25, .75, 101):
        s = t - contact
        if (s > 0).sum() < 3 or (s <= 0).sum() < 3:
            continue
        columns = 1, np.minimum(s, 0), np.maximum(s, 0)
        (_, v, u), rest = fit(columns, y)
        (_, v2, u2), rest2 = fit(columns, y2)
        loss = rest * y.var() + rest2 * y2.var()
        if best is None or loss < best[0]:
            best = loss, v, u, v2, u2, loss / (y.var() + y2.var())
    _, v, u, v2, u2, rest = best
    if abs(v - v2) < .5 * span(view, "speed").low:
        return 1.
    lost = abs(m * (u - v) + m2 * (u2 - v2)) / (m * abs(v) + m2 * abs(v2))
    return max(lost, abs(1 + (u - u2) / (v - v2)) / 2, rest)


def flux(view):
    w = view.amount(view.scene.colour) * (view.x > 0) * (view.y > world.LiquidMotion.top)
    area = view.area(w)
    ok = keep(view, view.seen(w, .5 * span(view, "level0").low * span(view, "width").low / 2))
    (_, slope), rest = fit((1, view.t[ok]), area[ok])
    return max(relative(2 * slope, constant(view, "flux")), rest)


def spreading(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * 2 * np.pi * span(view, "sigma0").low ** 2))
    size = view.area(w ** 3) ** 2 / (view.area(w ** 6) + 1e-9)
    (_, slope), rest = fit((1, view.t[ok]), size[ok])
    return max(relative(slope * 3 / (8 * np.pi), constant(view, "diffusivity")), rest)


def squeezing(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * span(view, "width0").low * span(view, "height0").low))
    area = view.area(w)[ok]
    rows = w[ok].sum(2) * view.pixel
    width = np.array([np.median(r[r > r.max() / 2]) for r in rows])
    height = area / width
    (_, speed), rest = fit((1, view.t[ok]), height)
    (_, k), _ = fit((1, np.log(height)), np.log(width))
    return max(abs(k + 1), outside(-speed, span(view, "press_speed")), rest)


def melting(view):
    half = world.Melting.half
    view.room.vessel(half, .015, world.FLOOR - .2, world.FLOOR, world.GLASS)
    w = view.amount(view.scene.colour) * (np.abs(view.x) < half) * (view.y < world.FLOOR)
    ok = keep(view, view.seen(w, .3 * span(view, "side0").low ** 2))
    middle, outer = np.abs(view.x[0]) < .08, (np.abs(view.x[0]) > .18) & (np.abs(view.x[0]) < .22)
    side = w[:, :, middle].mean(2).sum(1)[ok] * view.pixel
    dark = np.reshape([.5 * c + .04 for c in world.CUE_COLOURS[view.scene.colour]], (3, 1, 1, 1)).astype(np.float32)
    dark = view.share(dark, view.scene.colour)[0].mean()
    level = w[:, :, outer].mean(2).sum(1)[ok] * view.pixel / dark
    puddle = level * (2 * half - side)
    block = view.area(w)[ok] - dark * puddle
    t, rate = view.t[ok], constant(view, "melt_rate")
    (_, slope), rest = fit((1, t), block)
    (_, lost), _ = fit((1, t), block + puddle)
    return max(relative(-slope, rate), abs(lost) / rate, rest)


def d2(view):
    w = view.amount(view.scene.colour) * (view.y < world.Vaporization.plate) * (view.y > .5)
    ok = keep(view, view.seen(w, .3 * np.pi / 4 * span(view, "diameter0").low ** 2 / 3))
    (_, slope), rest = fit((1, view.t[ok]), view.area(w)[ok] * 4 / np.pi)
    return max(relative(-slope, constant(view, "rate")), rest)


def burning(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * span(view, "width").low * .2))
    low = (view.y[:, 0] > .72) & (view.y[:, 0] < .88)
    width = np.median(w[:, low].sum(2)) * view.pixel
    (_, slope), rest = fit((1, view.t[ok]), view.area(w)[ok])
    return max(relative(-slope / max(width, 1e-3), constant(view, "burn_rate")), rest)


def ray(view, w, hit, above):
    dx, dy = view.x - hit[0], view.y - hit[1]
    r = np.hypot(dx, dy)
    part = w ** 2 * (r > .2) * (r < .36) * ((dy < 0) if above else (dy > 0))
    return view.seen(w, .01) & (view.area(part) > .003), np.abs((part * dx / r).sum((1, 2))), np.abs((part * dy / r).sum((1, 2)))


def mirror(view):
    w = view.amount(view.scene.colour)
    seen, ax, ay = ray(view, w, world.Reflection.hit, True)
    seen2, bx, by = ray(view, w, world.Reflection.hit, False)
    ok = keep(view, seen, seen2)
    t, a, b = view.t[ok], np.arctan2(ay, ax)[ok], np.arctan2(by, bx)[ok]
    (_, omega), rest = fit((1, t), a)
    (_, omega2), rest2 = fit((1, t), b)
    return max(np.abs(a - b).mean() / a.mean(), outside(abs(omega), span(view, "omega")),
               outside(abs(omega2), span(view, "omega")), rest, rest2)


def snell(view):
    (hx, hy), room = world.Refraction.hit, view.room
    room.paint(room.box(-.245, hy, .245, world.FLOOR), world.WATER)
    w = view.amount(view.scene.colour)
    seen, ax, ay = ray(view, w, world.Refraction.hit, True)
    seen2, bx, by = ray(view, w, world.Refraction.hit, False)
    ok = keep(view, seen, seen2)
    t, a, b = view.t[ok], np.arctan2(ax, ay)[ok], np.arctan2(bx, by)[ok]
    sa, sb = np.sin(a), np.sin(b)
    n = (sa * sb).sum() / (sb * sb).sum()
    (_, omega), rest = fit((1, t), a)
    (_, _), rest2 = fit((1, sa), sb)
    return max(abs(n - 1.33) / .33, outside(abs(omega), span(view, "omega")), rest, rest2)


def blast(view):
    w = view.amount(view.scene.colour)
    ok = keep(view, view.seen(w, .3 * np.pi * span(view, "radius0").low ** 2))
    _, y = view.centre(w[ok].sum(0))
    r = np.hypot(view.x, view.y - y) / view.pixel  # (h, w)
    rings = np.arange(int(.32 / view.pixel))
    share = np.clip(1 - np.abs(r[..., None] - rings), 0, 1)  # (h, w, rings)
    profile = np.einsum("fyx,yxr->fr", w[ok], share) / share.sum((0, 1))
    radius = []
    for p in profile:
        half = p.max() / 2
        i = min(np.flatnonzero(p > half)[-1], len(p) - 2)
        radius.append((i + (p[i] - half) / (p[i] - p[i + 1] + 1e-9)) * view.pixel)
    (_, slope), rest = fit((1, view.t[ok]), np.square(radius))
    return max(relative(slope, constant(view, "blast")), rest)


LAWS = {"rigid body motion": gravity, "elastic motion": bounce, "collision": momentum, "liquid motion": flux,
        "gas motion": spreading, "deformation": squeezing, "melting": melting, "vaporization": d2,
        "combustion": burning, "reflection": mirror, "refraction": snell, "explosion": blast}


def law_error(frames, scene):
    view = View(frames, scene)
    try:
        error = LAWS[scene.phenomenon](view)
    except Unseen:
        return 1., False
    return float(min(error, 1)), True
