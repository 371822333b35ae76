"""A physics world in numpy: clips in which things fall, melt, burn and bend light, with the truth about all of it.

Data for the video model, so that ProPhy (arXiv 2512.05564) can be studied without a download. A clip takes four steps:

    (seed, index) -> draw parameters -> true states at the frames' times -> antialiased frames and masks -> caption

Space: the canvas is 1 high, x grows to the right, y grows DOWN. (In a picture taller than wide the shorter side is 1.)
Each half of the canvas has a cell, half as wide as high, in its middle: a phenomenon, a decoy or nothing is there.
Time: a clip lasts one second; frame i of F shows t = i / F, so more frames show the same second more finely.

Twelve of WISA's seventeen phenomena are here, a class each: its law, its parameters, its picture. Constants of nature
(gravity, flux, burning rate ...) have one value; sizes, colours, speeds and places vary. Decoys are still objects that
look like actors, so that neither colour nor shape tells where something happens. Left out on purpose: depth, texture,
light and a moving camera.
"""
import argparse
import functools
import os
import sys
import time
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


# -------------------------------------------------------------------------------------------------------------- drawing

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


# ------------------------------------------------------------------------------------------------------------ phenomena

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


# ---------------------------------------------------------------------------------------------------------------- clips

@dataclass
class Actor:
    """One phenomenon of a clip and its truth, in canvas heights and seconds; positions count from the corner."""
    phenomenon: str  # name of its category
    category: int  # index into CATEGORIES
    side: str  # "left" | "right"
    colour: str
    colour2: str  # of a collision's second puck; "" elsewhere
    box: tuple  # x0, y0, x1, y1 of its cell, canvas units
    mask: np.ndarray  # bool (F, H, W): where it happens
    params: dict  # {name: float}
    states: dict  # {name: (F,) or (F, 2)}


@dataclass
class Clip:
    """video uint8 (F, H, W, 3), its caption, and the phenomena in it."""
    video: np.ndarray
    caption: str
    actors: list

    @property
    def categories(self):
        """Sorted indices into CATEGORIES."""
        return sorted({actor.category for actor in self.actors})


def make_clip(seed, index, *, frames=12, height=32, width=32, decoys=.6, two=.4, colour_cues=False, ood="",
              phenomenon=None):
    """Clip number `index` of world `seed`: a pure function of its arguments, one scene at any frame count and size.

    frames 2..256; height, width 16..128 pixels. two: share of scenes with two phenomena. decoys: share of all scenes
    with a still look-alike: in the empty cell, or, beside two phenomena, a small ball in front of them.
    colour_cues: every phenomenon in its own colour. ood: "speed" | "radius" | "gravity" is drawn outside its training
    interval, in phenomena that have it. phenomenon: show this one alone. Raises ValueError with one sentence.
    """
    _check(seed, index, frames, height, width, decoys, two, ood, phenomenon)
    rng = np.random.default_rng([seed, index])
    two = 0. if phenomenon else two
    names = [phenomenon] if phenomenon else [name for name, one in PHENOMENA.items() if not ood or _has(one, ood)]
    n_actors = 2 if rng.random() < two else 1
    chosen = [names[i] for i in rng.permutation(len(names))[:n_actors]]
    # An empty cell is the better place for a decoy, but some phenomena must be seen alone: plain prompts ask for them.
    single = min(decoys / .75, decoys / max(1 - two, 1e-9), 1)
    has_decoy = rng.random() < (single if n_actors == 1 else (decoys - (1 - two) * single) / two)
    sides = ("left", "right") if rng.random() < .5 else ("right", "left")
    colours = [str(c) for c in rng.permutation(list(COLOURS))]  # of both actors, then their second colours
    t = np.arange(frames) / frames

    canvas = np.broadcast_to(_bytes(backdrop(height, width)), (frames, height, width, 3)).copy()
    actors, phrases = [], []
    for i, name in enumerate(chosen):
        one = PHENOMENA[name]
        pair = (one.cue, "white") if colour_cues else (colours[i], colours[i + 2])
        second = pair[1] if "{d}" in one.phrases[0] else ""
        p, size = _parameters(one, rng, ood)
        box = _box(sides[i], height, width)
        cell = Cell(box, height, width)
        states = one.states(p, t)
        one.paint(cell, p, states, [CUE_COLOURS[c] for c in pair])
        canvas[:, cell.rows, cell.columns] = _bytes(cell.rgb)
        mask = np.zeros((frames, height, width), bool)
        mask[:, cell.rows, cell.columns] = cell.mask
        states = {k: v + (cell.x0, cell.y0) if k.startswith("position") else v for k, v in states.items()}
        actors.append(Actor(name, CATEGORIES.index(name), sides[i], pair[0], second, box, mask, p, states))
        phrases.append(rng.choice(one.phrases).format(c=pair[0], d=pair[1], s=size if n_actors == 1 else ""))

    still = ""
    if has_decoy:
        taken = [a.colour for a in actors] if colour_cues else []
        colour = rng.choice([c for c in COLOURS if c not in taken])
        still = _decoy(canvas, rng, chosen, sides[1], colour)
    return Clip(canvas, _caption(rng, phrases, sides, still), actors)


def _check(seed, index, frames, height, width, decoys, two, ood, phenomenon):
    for name, value, low, high in (("frames", frames, 2, 256), ("height", height, 16, 128), ("width", width, 16, 128),
                                   ("seed", seed, 0, None), ("index", index, 0, None)):
        if value != int(value) or value < low or (high and value > high):
            wanted = f"from {low} to {high}" if high else f"of at least {low}"
            raise ValueError(f"{name} is a whole number {wanted}, not {value}")
    for name, value in (("decoys", decoys), ("two", two)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, not {value}")
    if ood not in ("", "speed", "radius", "gravity"):
        raise ValueError(f"ood is speed, radius, gravity or empty, not {ood!r}")
    if phenomenon is not None and phenomenon not in PHENOMENA:
        raise ValueError(f"the world has no phenomenon {phenomenon!r}, only {', '.join(PHENOMENA)}")
    if ood and phenomenon and not _has(PHENOMENA[phenomenon], ood):
        raise ValueError(f"{phenomenon} has no {ood} to be drawn outside its range")


def _has(one, role):
    return any(span.role == role for span in one.spans.values())


def _bytes(rgb):
    """(3, ..., h, w) floats -> (..., h, w, 3) uint8."""
    return np.moveaxis((rgb * 255 + .5).astype(np.uint8), 0, -1)


def _box(side, height, width):
    """The cell in the middle of a half of the canvas: x0, y0, x1, y1 in canvas units."""
    scale = min(height, width)
    centre, top = (.25 if side == "left" else .75) * width / scale, (height / scale - 1) / 2
    return centre - .25, top, centre + .25, top + 1


def _parameters(one, rng, ood):
    """Draw a phenomenon's parameters; also a size word (with a blank) that holds for them, or nothing."""
    u = dict(zip(one.spans, rng.random(len(one.spans))))
    p = {name: span.draw(u[name], ood) for name, span in one.spans.items()}
    one.derive(p, rng)
    sizes = [u[name] for name, span in one.spans.items() if span.role == "radius"]
    said = rng.random() < .7 and ood != "radius" and abs(sizes[0] - .5) > 1 / 6  # only of clearly small or large ones
    return {k: float(v) for k, v in p.items()}, ("small " if sizes[0] < .5 else "large ") if said else ""


def _decoy(canvas, rng, chosen, free_side, colour):
    """Draw a still look-alike into every frame; return its words."""
    height, width = canvas.shape[1:3]
    if len(chosen) == 2:  # no free cell: a small ball in front, below everything that moves
        (left, top, _, bottom), right = _box("left", height, width), _box("right", height, width)[2]
        cell = Cell((left, top, right, bottom), height, width)
        alpha, rgb = cell.disc(0, .95, .045)[0, ..., None], np.array(COLOURS[colour]) * 255
        part = canvas[:, cell.rows, cell.columns]
        part[:] = part + alpha * (rgb - part) + .5
        return f"a still {colour} ball"
    name = chosen[0] if rng.random() < .5 else rng.choice(list(PHENOMENA))  # half of them of the actor's own kind
    one = PHENOMENA[name]
    variant = int(rng.integers(len(one.decoy_phrases)))
    cell = Cell(_box(free_side, height, width), height, width)
    one.decoy(cell, _parameters(one, rng, "")[0], COLOURS[colour], variant)
    canvas[:, cell.rows, cell.columns] = _bytes(cell.rgb)
    return one.decoy_phrases[variant].format(c=colour)


def _caption(rng, phrases, sides, still):
    """Words for a scene: at most 24, lower case, no marks but commas and full stops."""
    if len(phrases) == 2:
        there = rng.choice(("at {}",) if still else ("on the {}", "at {}"))
        parts = [f"{phrase} {there.format(side)}" for phrase, side in zip(phrases, sides)]
        if still:
            return f"{parts[0]}, {parts[1]}, {still}."
        return rng.choice(("{}, {}.", "{} and {}.", "{} while {}.", "{}. {}.")).format(*parts)
    here = rng.choice(("on the {}", "at {}", "to the {}", "in the {} half")).format(sides[0])
    text = rng.choice(("{0} {1}", "{1}, {0}")).format(phrases[0], here)
    if still:
        beside = (", beside {}", ", next to {}", ", near {}", ". {} stays at {}", ", {} on the {}")
        text += rng.choice(beside).format(still, sides[1])
    return text + "."


# ------------------------------------------------------------------------------------------------------------- pictures

def enlarge(frames, scale):
    """uint8 (F, H, W, 3) -> (F, H scale, W scale, 3): every pixel becomes a square of `scale` pixels."""
    return frames.repeat(scale, 1).repeat(scale, 2)


def tint(frames, mask, colour=(255, 255, 255), alpha=.5):
    """Lay a colour (0..255) over uint8 frames (F, H, W, 3) where mask (F, H, W), bool or weights in 0..1, says so."""
    weight = alpha * np.asarray(mask, np.float32)[..., None]
    return (frames + weight * (np.asarray(colour, np.float32) - frames) + .5).astype(np.uint8)


def annotate(frames, text, lines=1):
    """Add a strip of wrapped text, at least `lines` high, below: uint8 (F, H, W, 3) -> (F, H + strip, W, 3)."""
    from PIL import Image, ImageDraw, ImageFont
    font, wrapped, room = ImageFont.load_default(), [""], frames.shape[2] - 8
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        wrapped = wrapped[:-1] + [longer] if font.getlength(longer) <= room or not wrapped[-1] else wrapped + [word]
    strip = Image.new("RGB", (frames.shape[2], 13 * max(len(wrapped), lines) + 6), tuple(int(255 * c) for c in NIGHT))
    ImageDraw.Draw(strip).multiline_text((4, 2), "\n".join(wrapped), fill=(205, 210, 222), font=font, spacing=2)
    strip = np.broadcast_to(np.asarray(strip), (len(frames), strip.height, strip.width, 3))
    return np.concatenate([frames, strip], 1)


def save_gif(path, frames, fps):
    """Write uint8 (F, H, W, 3) as a GIF that loops for ever; whoever looks finds the whole file or none."""
    import imageio.v3 as iio
    partial = f"{path}.{os.getpid()}.part"
    try:
        iio.imwrite(partial, frames, extension=".gif", plugin="pillow", duration=1000 / fps, loop=0)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def preview(seed=0, size=64, frames=24, colour_cues=False, ood="", columns=3):
    """Every phenomenon: its clip, the clip with the mask tinted over it, its caption. uint8 (F, H', W', 3)."""
    tiles, scale = [], max(128 // max(size, 1), 1)
    for i, name in enumerate([n for n, one in PHENOMENA.items() if not ood or _has(one, ood)] or PHENOMENA):
        clip = make_clip(seed, i, frames=frames, height=size, width=size, decoys=1, colour_cues=colour_cues, ood=ood,
                         phenomenon=name)
        pair = [clip.video, tint(clip.video, clip.actors[0].mask)]
        tile = np.concatenate([np.pad(enlarge(v, scale), ((0, 0), (4, 0), (4, 0), (0, 0))) for v in pair], 2)
        tiles.append(annotate(tile, f"{name}: {clip.caption}", lines=3))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i:i + columns], 2) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows, 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"world.py: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments=None):
    parser = _Parser(description="The physics world: look at it, or measure how fast it is drawn.",
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preview", metavar="FILE", help="write a GIF of every phenomenon with its mask and caption")
    parser.add_argument("--benchmark", action="store_true", help="clips a CPU-second at 12x32x32, one thread")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--size", type=int, default=64, help="pixels of a clip's side in the preview")
    parser.add_argument("--frames", type=int, default=24, help="frames of a clip in the preview")
    parser.add_argument("--ood", default="", help="draw this outside its training interval: speed | radius | gravity")
    parser.add_argument("--colour_cues", action="store_true", help="each phenomenon in its own colour")
    args = parser.parse_args(arguments)
    if not args.preview and not args.benchmark:
        parser.error("say --preview FILE or --benchmark")
    try:
        if args.preview:
            pictures = preview(args.seed, args.size, args.frames, args.colour_cues, args.ood)
            save_gif(args.preview, pictures, fps=args.frames / 2)  # half as fast as it happens
            print(f"wrote {args.preview}")
    except (ValueError, OSError) as problem:
        parser.error(str(problem))
    if args.benchmark:
        start = time.process_time()
        for i in range(500):
            make_clip(args.seed, i)
        print(f"{500 / (time.process_time() - start):.0f} clips a CPU-second")


if __name__ == "__main__":
    main()
