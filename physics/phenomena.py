"""Twelve physical phenomena, a class each: its law, its drawing, its mask."""
import functools
from dataclasses import dataclass

import numpy as np


CATEGORIES = (  # WISA's names, WISA's order
    "collision", "rigid body motion", "elastic motion", "liquid motion", "gas motion", "deformation", "melting",
    "solidification", "vaporization", "liquefaction", "explosion", "combustion", "reflection", "refraction",
    "scattering", "interference and diffraction", "unnatural light source")
COLOURS = {"red": (.95, .22, .20), "yellow": (.98, .83, .18), "green": (.22, .78, .30),
           "cyan": (.15, .85, .88), "blue": (.22, .36, .98), "purple": (.76, .25, .92)}
CUE_COLOURS = COLOURS | {"pink": (1., .58, .76), "lime": (.68, .95, .20), "brown": (.58, .36, .18),
                         "teal": (.08, .52, .48), "coral": (1., .48, .32), "lilac": (.70, .64, 1.),
                         "white": (.95, .95, .95)}
NIGHT, GROUND, PANEL = (.045, .055, .095), (.125, .135, .195), (.165, .185, .25)  # background, floor, table
STEEL, GLASS, WATER = (.50, .54, .62), (.42, .48, .58), (.09, .17, .25)
HOT, COLD, VAPOUR = (.46, .17, .10), (.26, .28, .33), (.80, .85, .92)
FLAME, CORE, WHITE = (1., .50, .12), (1., .88, .50), (1., 1., 1.)
FLOOR = .9  # y of the floor line
VISIBLE = .1  # a pixel belongs to the mask when an actor covers more of it than this


@functools.lru_cache(maxsize=64)
def _pixels(first, last, origin, scale):
    """Centres of the pixels first .. last - 1, in canvas units from `origin`."""
    return ((np.arange(first, last) + .5) / scale - origin).astype(np.float32)


def _frames(value):
    """A number or a value per frame, as (F or 1, 1, 1)."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


class Cell:
    """One half's stage, painted back to front: x in -.25 .. .25, y in 0 .. 1.

    Shapes take numbers or one value per frame. Until something moves, all arrays hold a single frame: still things are
    drawn once. `actor=True` adds a shape to the mask of where the phenomenon happens.
    """

    def __init__(self, box, height, width):
        self.scale = min(height, width)  # pixels per canvas unit
        self.x0, self.y0 = (box[0] + box[2]) / 2, box[1]  # canvas place of the cell's origin
        x0, y0, x1, y1 = [int(v * self.scale + .5 + 1e-6) for v in box]  # in odd sizes, cells share no column
        self.columns, self.rows = slice(x0, x1), slice(y0, y1)
        self.x = _pixels(x0, x1, self.x0, self.scale)[None, None, :]  # (1, 1, w)
        self.y = _pixels(y0, y1, self.y0, self.scale)[None, :, None]  # (1, h, 1)
        self.rgb = backdrop(height, width)[:, None, self.rows, self.columns]  # (3, F or 1, h, w)
        self.mask = np.zeros((1, self.y.size, self.x.size), bool)  # (F or 1, h, w)

    def paint(self, alpha, colour, actor=False):
        """Lay a colour over the cell. alpha: (F or 1, h, w) coverage in 0..1."""
        colour = np.asarray(colour, np.float32).reshape(3, 1, 1, 1)
        self.rgb = self.rgb + alpha * (colour - self.rgb)
        if actor:
            self.mark(alpha)

    def mark(self, alpha):
        self.mask = self.mask | (alpha > VISIBLE)

    def disc(self, x, y, radius):
        dx, dy = self.x - _frames(x), self.y - _frames(y)
        return np.clip(.5 - (np.sqrt(dx * dx + dy * dy) - _frames(radius)) * self.scale, 0, 1)

    def box(self, left, top, right, bottom):
        """Exact coverage of an upright box: areas in the picture are the true areas."""
        half = np.float32(.5 / self.scale)
        across = np.minimum(self.x + half, _frames(right)) - np.maximum(self.x - half, _frames(left))
        along = np.minimum(self.y + half, _frames(bottom)) - np.maximum(self.y - half, _frames(top))
        return np.maximum(across * self.scale, 0) * np.maximum(along * self.scale, 0)

    def vessel(self, half, wall, top, bottom, colour):
        """An open vessel on the floor, 2 half wide inside."""
        self.paint(self.box(-half - wall, top, half + wall, FLOOR), colour)
        self.paint(self.box(-half, top, half, bottom), NIGHT)

    def beam(self, x0, y0, x1, y1, thickness):
        """A straight bar with round ends."""
        x0, y0, x1, y1 = map(_frames, (x0, y0, x1, y1))
        px, py, dx, dy = self.x - x0, self.y - y0, x1 - x0, y1 - y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)  # nearest point of the axis
        px, py = px - along * dx, py - along * dy
        return np.clip(.5 - (np.sqrt(px * px + py * py) - _frames(thickness) / 2) * self.scale, 0, 1)

    def blob(self, x, y, sigma):
        """A Gaussian of peak 1."""
        k = .5 / _frames(sigma) ** 2
        return np.exp(-(self.x - _frames(x)) ** 2 * k) * np.exp(-(self.y - _frames(y)) ** 2 * k)

    def ball(self, x, y, radius, colour, actor=False):
        """A disc with a small highlight."""
        self.paint(self.disc(x, y, radius), colour, actor)
        self.paint(.45 * self.disc(x - .35 * radius, y - .35 * radius, .3 * radius), WHITE)

    def laser(self, x0, y0, x1, y1, thickness, colour):
        """A beam with a bright heart."""
        self.paint(self.beam(x0, y0, x1, y1, thickness), colour, actor=True)
        self.paint(.4 * self.beam(x0, y0, x1, y1, thickness * .3), WHITE)


@functools.lru_cache(maxsize=8)
def backdrop(height, width):
    """(3, H, W): a dark room with a floor."""
    scale = min(height, width)
    y = (np.arange(height) + .5 - (height - scale) / 2) / scale
    alpha = np.clip(.5 + (y - FLOOR) * scale, 0, 1)[:, None]
    rgb = [np.broadcast_to(n + alpha * (g - n), (height, width)) for n, g in zip(NIGHT, GROUND)]
    return np.stack(rgb).astype(np.float32)


@dataclass(frozen=True)
class Span:
    """Where a parameter is drawn from: uniformly in low .. high, or in `outside` when a clip's `ood` names its role."""
    low: float
    high: float
    role: str = ""  # "speed" | "radius" | "gravity" | "" for none
    outside: tuple = ()

    def draw(self, u, ood):
        low, high = self.outside if ood and ood == self.role else (self.low, self.high)
        return low + u * (high - low)


class Phenomenon:
    """What every phenomenon has. Units: canvas heights, seconds, radians. "position..." states are places in the cell.

    name: WISA's. spans: {parameter: Span}. cue: its colour under `colour_cues`. phrases, decoy_phrases: at most eight
    words, with {c} for the colour, {d} for a second one, {s} for a size word and a blank, or nothing.
    """
    name, spans, phrases, decoy_phrases, cue = "", {}, (), (), ""

    def derive(self, p, rng):
        """Add to the drawn parameters `p` those that follow from them."""

    def states(self, p, t):
        """True states at the times t (F,): {name: (F,) or (F, 2)}."""

    def paint(self, cell, p, s, colours):
        """Draw all frames from the states `s` and mark where it happens. colours: rgb of actor and second body."""

    def decoy(self, cell, p, colour, variant):
        """Draw a still object that looks like the actor and fits decoy_phrases[variant]."""


def _pair(x, y, t):
    """Two components, constant or per frame, as (F, 2)."""
    return np.stack([x + 0 * t, y + 0 * t], -1)


class RigidBodyMotion(Phenomenon):
    """A ball thrown upward: x = x0 + vx t, y = y0 + vy t + g t^2 / 2 (heights, heights/s, heights/s^2)."""
    name, cue = "rigid body motion", "red"
    spans = dict(gravity=Span(2.4, 2.4, "gravity", (1.4, 1.8)), radius=Span(.11, .13, "radius", (.15, .165)),
                 vx=Span(.08, .16, "speed", (.19, .23)), apex_time=Span(.4, .6), apex=Span(.18, .25))
    phrases = ("a {s}{c} ball is thrown up", "a {s}{c} ball flies in an arc", "a {s}{c} ball is tossed upward")
    decoy_phrases = ("a resting {c} ball", "a still {c} ball")

    def derive(self, p, rng):
        p["vx"] *= rng.choice((-1, 1))
        p["vy"] = -p["gravity"] * p["apex_time"]

    def states(self, p, t):
        since = t - p["apex_time"]
        return dict(position=_pair(p["vx"] * (t - .5), p["apex"] + p["gravity"] * since ** 2 / 2, t),
                    velocity=_pair(p["vx"], p["gravity"] * since, t))

    def paint(self, cell, p, s, colours):
        cell.ball(*s["position"].T, p["radius"], colours[0], actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.ball(.5 * p["vx"], FLOOR - p["radius"], p["radius"], colour)


class ElasticMotion(RigidBodyMotion):
    """A ball falls and bounces: free fall between contacts, and after a contact v = -e v, with restitution e."""
    name, cue = "elastic motion", "yellow"
    spans = dict(gravity=Span(2.4, 2.4, "gravity", (3.2, 3.8)), radius=Span(.11, .13, "radius", (.15, .165)),
                 vy=Span(0, .4, "speed", (.7, 1.)), vx=Span(0, .08), drop=Span(.2, .42), restitution=Span(.8, .8))
    phrases = ("a {s}{c} ball bounces on the floor", "a {s}{c} ball falls and bounces", "a {s}{c} ball bounces back up")

    def derive(self, p, rng):
        p["vx"] *= rng.choice((-1, 1))

    def states(self, p, t):
        g, start, y0, v0 = p["gravity"], 0., p["drop"], p["vy"]
        y, v, rest = np.zeros_like(t), np.zeros_like(t), FLOOR - p["radius"]
        while start < 1:  # one parabola per turn
            since = t - start
            y = np.where(since >= 0, y0 + v0 * since + g * since ** 2 / 2, y)
            v = np.where(since >= 0, v0 + g * since, v)
            impact = (v0 ** 2 + 2 * g * (rest - y0)) ** .5
            start, y0, v0 = start + (impact - v0) / g, rest, -p["restitution"] * impact
        return dict(position=_pair(p["vx"] * (t - .5), y, t), velocity=_pair(p["vx"], v, t))


class Collision(Phenomenon):
    """Two pucks meet head-on on an air table, seen from above: m v + m2 v2 and m v^2 + m2 v2^2 last; m = radius^2.

    The puck named first comes from the upper end, so that a caption tells which colour is where.
    """
    name, cue = "collision", "blue"
    spans = dict(radius=Span(.10, .12, "radius", (.07, .085)), radius2=Span(.10, .12, "radius", (.07, .085)),
                 speed=Span(.28, .35, "speed", (.14, .20)), speed2=Span(.20, .34, "speed", (.12, .18)),
                 contact_time=Span(.42, .55))
    phrases = ("a {c} puck hits a {d} puck", "a {c} puck and a {d} puck collide", "a {c} puck strikes a {d} puck")
    decoy_phrases = ("a still {c} puck", "a resting {c} puck")
    table = (-.21, .015, .21, .885)

    def derive(self, p, rng):
        if rng.random() < .5:
            p["speed2"] = 0.  # the second puck waits
        m, m2 = p["mass"], p["mass2"] = p["radius"] ** 2, p["radius2"] ** 2
        v, v2 = p["velocity"], p["velocity2"] = p["speed"], -p["speed2"]
        centre = (m * v + m2 * v2) / (m + m2)  # of mass: seen from it, both velocities just turn round
        p["velocity_after"], p["velocity2_after"] = 2 * centre - v, 2 * centre - v2
        p["contact"], p["contact2"] = -p["radius"], p["radius2"]
        ends = self._along(p, np.array([0., 1.]))
        reach = [y + side * r for y, r in zip(ends, (p["radius"], p["radius2"])) for side in (-1, 1)]
        shift = (self.table[1] + self.table[3] - np.min(reach) - np.max(reach)) / 2  # the motion's middle: the table's
        p["contact"], p["contact2"] = p["contact"] + shift, p["contact2"] + shift

    def _along(self, p, t):
        since = t - p["contact_time"]
        return (p["contact"] + since * np.where(since < 0, p["velocity"], p["velocity_after"]),
                p["contact2"] + since * np.where(since < 0, p["velocity2"], p["velocity2_after"]))

    def states(self, p, t):
        y, y2 = self._along(p, t)
        before = t < p["contact_time"]
        return dict(position=_pair(0, y, t), position2=_pair(0, y2, t),
                    velocity=_pair(0, np.where(before, p["velocity"], p["velocity_after"]), t),
                    velocity2=_pair(0, np.where(before, p["velocity2"], p["velocity2_after"]), t))

    def paint(self, cell, p, s, colours):
        cell.paint(cell.box(*self.table), PANEL)
        cell.ball(*s["position"].T, p["radius"], colours[0], actor=True)
        cell.ball(*s["position2"].T, p["radius2"], colours[1], actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.paint(cell.box(*self.table), PANEL)
        cell.ball(0, p["contact"], p["radius"], colour)


class LiquidMotion(Phenomenon):
    """A stream of constant flux fills a vessel: level = level0 + flux t / width (flux in heights^2/s)."""
    name, cue = "liquid motion", "cyan"
    spans = dict(flux=Span(.11, .11, "speed", (.05, .07)), width=Span(.26, .36, "radius", (.39, .44)),
                 level0=Span(.03, .10))
    phrases = ("{c} water fills a {s}glass", "{c} water is poured into a {s}glass", "a {s}glass fills with {c} water")
    decoy_phrases = ("a glass of still {c} water", "an empty {c} glass")
    top, bottom, wall = .26, .88, .025  # of the vessel

    def states(self, p, t):
        level = p["level0"] + p["flux"] * t / p["width"]
        return dict(level=level, area=level * p["width"])

    def paint(self, cell, p, s, colours):
        half, surface = p["width"] / 2, self.bottom - s["level"]
        cell.vessel(half, self.wall, self.top, self.bottom, GLASS)
        cell.paint(cell.box(-.115, 0, -.025, surface), colours[0], actor=True)  # the stream
        cell.paint(cell.box(-half, surface, half, self.bottom), colours[0], actor=True)
        cell.paint(.3 * cell.box(-half, surface, half, surface + .03), WHITE)

    def decoy(self, cell, p, colour, variant):
        half, surface = p["width"] / 2, self.bottom - 3 * p["level0"]
        cell.vessel(half, self.wall, self.top, self.bottom, colour if variant else GLASS)
        if not variant:
            cell.paint(cell.box(-half, surface, half, self.bottom), colour)


class GasMotion(Phenomenon):
    """A puff of smoke rises at speed u and spreads in 2-D: sigma^2 = sigma0^2 + 2 D t, peak = sigma0^2 / sigma^2."""
    name, cue = "gas motion", "lilac"
    spans = dict(speed=Span(.40, .55, "speed", (.20, .30)), sigma0=Span(.055, .065, "radius", (.069, .073)),
                 diffusivity=Span(.0022, .0022), start=Span(.74, .80))
    phrases = ("{c} smoke rises and spreads", "a {s}puff of {c} smoke drifts up", "a {s}{c} cloud of smoke rises")
    decoy_phrases = ("a still {c} cloud", "a {c} cloud at rest")

    def states(self, p, t):
        sigma = np.sqrt(p["sigma0"] ** 2 + 2 * p["diffusivity"] * t)
        return dict(position=_pair(0, p["start"] - p["speed"] * t, t), sigma=sigma, peak=(p["sigma0"] / sigma) ** 2)

    def paint(self, cell, p, s, colours):
        cell.paint(_frames(s["peak"]) * cell.blob(*s["position"].T, s["sigma"]), colours[0], actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.paint(.85 * cell.blob(0, .5, 1.2 * p["sigma0"]), colour)


class Deformation(Phenomenon):
    """A plate presses a soft block at constant speed: height = height0 - v t, width = area / height, constant area."""
    name, cue = "deformation", "green"
    spans = dict(press_speed=Span(.15, .20, "speed", (.08, .11)), width0=Span(.18, .22, "radius", (.12, .15)),
                 height0=Span(.40, .46))
    phrases = ("a plate presses a {s}{c} block", "a {s}{c} block is pressed flat", "a plate squeezes a {s}{c} block")
    decoy_phrases = ("a soft {c} block at rest", "a still soft {c} block")

    def states(self, p, t):
        height = p["height0"] - p["press_speed"] * t
        width = p["width0"] * p["height0"] / height
        return dict(height=height, width=width, area=height * width)

    def paint(self, cell, p, s, colours):
        top, half = FLOOR - s["height"], s["width"] / 2
        cell.paint(cell.box(-half, top, half, FLOOR), colours[0], actor=True)
        cell.paint(cell.box(-.04, 0, .04, top - .06), COLD)
        cell.paint(cell.box(-.235, top - .07, .235, top), STEEL, actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.paint(cell.box(-p["width0"] / 2, FLOOR - p["height0"], p["width0"] / 2, FLOOR), colour)


class Melting(Phenomenon):
    """A square block melts in a tray at a constant rate: side^2 = side0^2 - rate t.

    The lost area is water around the block: level = rate t / (tray width - side).
    """
    name, cue = "melting", "pink"
    spans = dict(melt_rate=Span(.035, .035, "speed", (.016, .022)), side0=Span(.27, .30, "radius", (.32, .34)))
    phrases = ("a {s}{c} block melts", "a {s}{c} block melts into a puddle", "a {s}frozen {c} block melts away")
    decoy_phrases = ("a frozen {c} block", "a solid {c} block")
    half = .23  # of the tray

    def states(self, p, t):
        puddle = p["melt_rate"] * t
        side = np.sqrt(p["side0"] ** 2 - puddle)
        return dict(side=side, block_area=side ** 2, puddle_area=puddle, level=puddle / (2 * self.half - side))

    def paint(self, cell, p, s, colours):
        cell.vessel(self.half, .015, FLOOR - .2, FLOOR, GLASS)
        dark = [.5 * c + .04 for c in colours[0]]
        cell.paint(cell.box(-self.half, FLOOR - s["level"], self.half, FLOOR), dark, actor=True)
        cell.paint(cell.box(-s["side"] / 2, FLOOR - s["side"], s["side"] / 2, FLOOR), colours[0], actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.vessel(self.half, .015, FLOOR - .2, FLOOR, GLASS)
        cell.paint(cell.box(-p["side0"] / 2, FLOOR - p["side0"], p["side0"] / 2, FLOOR), colour)


class Vaporization(Phenomenon):
    """A drop boils away on a hot plate by the d^2 law: diameter^2 = diameter0^2 - K t (K in heights^2/s)."""
    name, cue = "vaporization", "teal"
    spans = dict(rate=Span(.055, .055, "speed", (.025, .035)), diameter0=Span(.26, .30, "radius", (.32, .36)),
                 phase=Span(0, 1))
    phrases = ("a {s}{c} drop boils away", "a {s}{c} drop evaporates", "a {s}{c} drop shrinks on a hot plate")
    decoy_phrases = ("a cold {c} drop", "a {c} drop on a cold plate")
    plate = .82

    def states(self, p, t):
        return dict(diameter=np.sqrt(p["diameter0"] ** 2 - p["rate"] * t), vapour=(t + p["phase"]) % 1)

    def paint(self, cell, p, s, colours):
        cell.paint(cell.box(-.23, self.plate, .23, FLOOR), HOT)
        for x, lag in ((-.07, 0), (.07, .5)):  # two wisps of vapour, unseen where they begin and end
            way = (s["vapour"] + lag) % 1
            cell.paint(_frames(.3 * np.sin(np.pi * way)) * cell.blob(x, .5 - .3 * way, .045), VAPOUR, actor=True)
        cell.ball(0, self.plate - s["diameter"] / 2, s["diameter"] / 2, colours[0], actor=True)

    def decoy(self, cell, p, colour, variant):
        cell.paint(cell.box(-.23, self.plate, .23, FLOOR), COLD)
        cell.ball(0, self.plate - p["diameter0"] / 2, p["diameter0"] / 2, colour)


class Combustion(Phenomenon):
    """A candle burns down: height = height0 - burn_rate t. It happens in the flame and the top of the wax."""
    name, cue = "combustion", "coral"
    spans = dict(burn_rate=Span(.25, .25, "speed", (.12, .16)), width=Span(.15, .20, "radius", (.24, .28)),
                 height0=Span(.46, .56), phase=Span(0, 1))
    phrases = ("a {s}{c} candle burns down", "a {s}{c} candle is burning", "the flame of a {s}{c} candle burns")
    decoy_phrases = ("an unlit {c} candle", "a {c} candle without a flame")

    def states(self, p, t):
        height = p["height0"] - p["burn_rate"] * t
        flicker = np.sin(2 * np.pi * (3 * t + p["phase"]))
        return dict(height=height, position=_pair(0, FLOOR - height, t), flicker=flicker)

    def candle(self, cell, half, top, colour):
        cell.paint(cell.box(-half, top, half, FLOOR), colour)
        cell.paint(cell.box(-.012, top - .04, .012, top), STEEL)

    def paint(self, cell, p, s, colours):
        half, top, sway = p["width"] / 2, FLOOR - s["height"], .02 * s["flicker"]
        self.candle(cell, half, top, colours[0])
        cell.paint(.45 * cell.blob(sway / 2, top - .08, .08), FLAME, actor=True)
        for x, up, radius in ((0, .06, .062), (.5, .11, .045), (1, .155, .026)):  # a tongue that leans with the flicker
            cell.paint(cell.disc(x * sway, top - up * (1 + .1 * s["flicker"]), radius), FLAME, actor=True)
        cell.paint(.9 * cell.disc(sway / 4, top - .06, .038), CORE)
        cell.mark(cell.box(-half, top, half, top + .06))

    def decoy(self, cell, p, colour, variant):
        self.candle(cell, p["width"] / 2, FLOOR - p["height0"], colour)


class Reflection(Phenomenon):
    """A beam meets an upright mirror and sweeps evenly: angle = middle + omega (t - 1/2), from the normal; out = in."""
    name, cue = "reflection", "lime"
    spans = dict(omega=Span(.55, .75, "speed", (.28, .40)), thickness=Span(.085, .105, "radius", (.12, .13)),
                 middle=Span(.70, .85))
    phrases = ("a {c} beam sweeps over a mirror", "a mirror reflects a moving {c} beam",
               "a {c} laser is reflected by a mirror")
    decoy_phrases = ("a still {c} beam on a mirror", "a mirror with a still {c} beam")
    hit, arm = (.175, .49), .37  # where the beam meets the mirror; length of either half

    def derive(self, p, rng):
        p["omega"] *= rng.choice((-1, 1))

    def states(self, p, t):
        angle = p["middle"] + p["omega"] * (t - .5)
        return dict(position=_pair(*self.hit, t), angle_in=angle, angle_out=angle.copy())

    def paint(self, cell, p, s, colours):
        (x, y), arm = self.hit, self.arm
        for angle, way in ((s["angle_in"], -1), (s["angle_out"], 1)):
            tip = x - arm * np.cos(angle), y + way * arm * np.sin(angle)
            cell.laser(x, y, *tip, p["thickness"], colours[0])
            if way < 0:
                cell.paint(cell.disc(*tip, .05), STEEL, actor=True)  # the lamp
        mirror = cell.box(x, .07, x + .07, .88)
        cell.paint(mirror, GLASS)
        cell.mask = cell.mask & (mirror < .5)  # it hides the beam's end

    def decoy(self, cell, p, colour, variant):
        self.paint(cell, p, self.states(p, np.array([.5])), (colour,))


class Refraction(Reflection):
    """A beam enters water and sweeps evenly: sin(angle_in) = n sin(angle_out), angle_in = middle + omega (t - 1/2)."""
    name, cue = "refraction", "purple"
    spans = dict(omega=Span(.45, .60, "speed", (.22, .32)), thickness=Span(.08, .10, "radius", (.11, .115)),
                 middle=Span(.42, .47), refractive_index=Span(1.33, 1.33))
    phrases = ("a {c} beam bends in water", "water refracts a moving {c} beam", "a {c} laser is refracted by water")
    decoy_phrases = ("a still {c} beam in water", "water with a still {c} beam")
    hit, arm, arm_out = (.05, .48), .34, .26

    def states(self, p, t):
        angle = p["middle"] + p["omega"] * (t - .5)
        bent = np.arcsin(np.sin(angle) / p["refractive_index"])
        return dict(position=_pair(*self.hit, t), angle_in=angle, angle_out=bent)

    def paint(self, cell, p, s, colours):
        (x, y), a, b = self.hit, s["angle_in"], s["angle_out"]
        cell.paint(cell.box(-.245, y, .245, FLOOR), WATER)
        tip = x - self.arm * np.sin(a), y - self.arm * np.cos(a)
        cell.laser(x, y, *tip, p["thickness"], colours[0])
        cell.laser(x, y, x + self.arm_out * np.sin(b), y + self.arm_out * np.cos(b), p["thickness"], colours[0])
        cell.paint(cell.disc(*tip, .05), STEEL, actor=True)  # the lamp


class Explosion(Phenomenon):
    """A blast wave in two dimensions (Sedov): radius^2 = radius0^2 + c t, so it starts fast and slows down."""
    name, cue = "explosion", "brown"
    spans = dict(blast=Span(.044, .044, "speed", (.020, .028)), radius0=Span(.06, .08, "radius", (.09, .105)),
                 height=Span(.40, .60))
    phrases = ("a {s}{c} firework explodes", "a {s}{c} blast expands", "a {c} blast wave spreads")
    decoy_phrases = ("an unlit {c} firework", "a still {c} firework")

    def states(self, p, t):
        radius = np.sqrt(p["radius0"] ** 2 + p["blast"] * t)
        return dict(position=_pair(0, p["height"], t), radius=radius, fading=1 - .35 * t)

    def paint(self, cell, p, s, colours):
        y, radius, fading = p["height"], s["radius"], _frames(s["fading"])
        whole = cell.disc(0, y, radius)
        inside = cell.disc(0, y, np.maximum(radius - .07, 0))
        cell.paint(fading * (whole - .65 * inside), colours[0])
        cell.paint(fading ** 2 * .8 * cell.blob(0, y, .35 * radius), CORE)
        cell.mark(whole)

    def decoy(self, cell, p, colour, variant):
        top = p["height"] - 1.4 * p["radius0"]
        cell.ball(0, p["height"], 1.4 * p["radius0"], colour)
        cell.paint(cell.box(-.015, top - .06, .015, top), STEEL)  # the fuse

PHENOMENA = {one.name: one() for one in (
    RigidBodyMotion, ElasticMotion, Collision, LiquidMotion, GasMotion, Deformation, Melting, Vaporization, Combustion,
    Reflection, Refraction, Explosion)}
