"""Twelve of WISA's seventeen physical phenomena, a class each: its law, its drawing, its mask.

    spans -> draw parameters p -> derive -> states s = states(p, t): the truth -> paint: the picture

Parameters and states are the attributes of `p` and `s`: p.radius, s.position.

Units: canvas heights from the middle of the cell's upper edge, y DOWN; seconds, a clip lasts one.
Constants of nature (gravity, flux, burning rate ...) have a span of one value: low = high.
"""
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from physics.canvas import (
    COLD, CORE, FLAME, FLOOR, GLASS, HOT, PANEL, STEEL, VAPOUR, WATER, WHITE, per_frame,
    vectors)


CATEGORIES = (  # WISA's names, WISA's order
    "collision", "rigid body motion", "elastic motion", "liquid motion", "gas motion",
    "deformation", "melting", "solidification", "vaporization", "liquefaction", "explosion",
    "combustion", "reflection", "refraction", "scattering", "interference and diffraction",
    "unnatural light source")


@dataclass(frozen=True)
class Span:
    """Where a parameter is drawn from: uniformly in low .. high, or in ood_low .. ood_high when a
    clip's `ood` names the parameter's role."""
    low: float
    high: float
    role: str = ""  # "speed" | "radius" | "gravity" | "" for none
    ood_low: float = 0.
    ood_high: float = 0.

    def draw(self, u, ood):
        """The value at u, which is uniform in 0..1."""
        if ood and ood == self.role:
            return self.ood_low + u * (self.ood_high - self.ood_low)
        return self.low + u * (self.high - self.low)


class Phenomenon:
    """What every phenomenon has. Units: canvas heights, seconds, radians.

    name: WISA's. cue: its colour under `colour_cues`. spans: {parameter: Span}.
    phrases, decoy_phrases: at most eight words, with {c} for the colour, {d} for a second colour,
    and {s} for a size word and a blank, or for nothing.
    """
    name = ""
    cue = ""
    spans = {}
    phrases = decoy_phrases = ()

    def derive(self, p, rng):
        """Add to the drawn parameters `p` those that follow from them."""

    def states(self, p, t):
        """True states at t (F,), each (F,) or (F, 2). "position..." is a place in the cell."""

    def furniture(self, cell):
        """Draw what stands behind actors and decoys, and in front of which laws are measured."""

    def paint(self, cell, p, s):
        """Draw the states `s` and mark the actor."""

    def decoy(self, cell, p, variant):
        """Draw a still object that looks like the actor and fits decoy_phrases[variant]. Nobody
        reads its mask."""


# --- motion -------------------------------------------------------------------------------------
class RigidBodyMotion(Phenomenon):
    """A ball is thrown upward: x = vx (t - 1/2), y = apex + g (t - apex_time)^2 / 2."""
    name = "rigid body motion"
    cue = "red"
    spans = dict(gravity=Span(2.4, 2.4, "gravity", 1.4, 1.8),  # heights / s^2
                 radius=Span(.11, .13, "radius", .15, .165),
                 vx=Span(.08, .16, "speed", .19, .23),
                 apex_time=Span(.4, .6),
                 apex=Span(.18, .25))
    phrases = ("a {s}{c} ball is thrown up", "a {s}{c} ball flies in an arc",
               "a {s}{c} ball is tossed upward")
    decoy_phrases = ("a resting {c} ball", "a still {c} ball")

    def derive(self, p, rng):
        p.vx *= rng.choice((-1, 1))

    def fall(self, p, t):
        """The height of the ball, and its speed downward."""
        since = t - p.apex_time
        return p.apex + p.gravity * since ** 2 / 2, p.gravity * since

    def states(self, p, t):
        y, v = self.fall(p, t)
        return SimpleNamespace(position=vectors(p.vx * (t - .5), y, t),
                               velocity=vectors(p.vx, v, t))

    def paint(self, cell, p, s):
        cell.ball(*s.position.T, p.radius)

    def decoy(self, cell, p, variant):
        cell.ball(.5 * p.vx, FLOOR - p.radius, p.radius)


class ElasticMotion(RigidBodyMotion):
    """A ball falls freely and bounces: v = -e v after a contact, with restitution e."""
    name = "elastic motion"
    cue = "yellow"
    spans = dict(gravity=Span(2.4, 2.4, "gravity", 3.2, 3.8),
                 radius=Span(.11, .13, "radius", .15, .165),
                 vy=Span(0, .4, "speed", .7, 1.),
                 vx=Span(0, .08),
                 drop=Span(.2, .42),
                 restitution=Span(.8, .8))
    phrases = ("a {s}{c} ball bounces on the floor", "a {s}{c} ball falls and bounces",
               "a {s}{c} ball bounces back up")

    def fall(self, p, t):
        g = p.gravity
        lowest = FLOOR - p.radius
        y = v = np.zeros_like(t)
        start, y0, v0 = 0., p.drop, p.vy  # of the parabola between two contacts
        while start < 1:
            since = t - start
            y = np.where(since >= 0, y0 + v0 * since + g * since ** 2 / 2, y)
            v = np.where(since >= 0, v0 + g * since, v)
            impact = (v0 ** 2 + 2 * g * (lowest - y0)) ** .5  # speed at the next contact
            start += (impact - v0) / g
            y0, v0 = lowest, -p.restitution * impact
        return y, v


class Collision(Phenomenon):
    """Two pucks meet head-on on an air table, seen from above: m v + m2 v2 and m v^2 + m2 v2^2 are
    conserved, with masses m = radius^2.

    The puck named first comes from the upper end, so that a caption tells which colour is where.
    """
    name = "collision"
    cue = "blue"
    spans = dict(radius=Span(.10, .12, "radius", .07, .085),
                 radius2=Span(.10, .12, "radius", .07, .085),
                 speed=Span(.28, .35, "speed", .14, .20),
                 speed2=Span(.20, .34, "speed", .12, .18),
                 contact_time=Span(.42, .55))
    phrases = ("a {c} puck hits a {d} puck", "a {c} puck and a {d} puck collide",
               "a {c} puck strikes a {d} puck")
    decoy_phrases = ("a still {c} puck", "a resting {c} puck")
    table = (.015, .885)  # y of its upper and its lower edge

    def derive(self, p, rng):
        if rng.random() < .5:
            p.speed2 = 0.  # the second puck waits
        m = p.mass = p.radius ** 2
        m2 = p.mass2 = p.radius2 ** 2
        v = p.velocity = p.speed
        v2 = p.velocity2 = -p.speed2
        # Seen from the centre of mass, both velocities just turn round.
        centre = (m * v + m2 * v2) / (m + m2)
        p.velocity_after = 2 * centre - v
        p.velocity2_after = 2 * centre - v2

        # The pucks touch at y = 0 first; then the middle of the whole motion moves to the table's.
        p.contact, p.contact2 = -p.radius, p.radius2
        y, y2, _, _ = self._motion(p, np.array([0., 1.]))
        highest = (y - p.radius).min()  # of the first puck, which is always above the second
        lowest = (y2 + p.radius2).max()
        shift = (sum(self.table) - highest - lowest) / 2
        p.contact += shift
        p.contact2 += shift

    def _motion(self, p, t):
        """y of both pucks at the times t (F,), then their velocities."""
        since = t - p.contact_time
        v = np.where(since < 0, p.velocity, p.velocity_after)
        v2 = np.where(since < 0, p.velocity2, p.velocity2_after)
        return p.contact + since * v, p.contact2 + since * v2, v, v2

    def states(self, p, t):
        y, y2, v, v2 = (vectors(0, one, t) for one in self._motion(p, t))
        return SimpleNamespace(position=y, position2=y2, velocity=v, velocity2=v2)

    def furniture(self, cell):
        cell.block(.42, *self.table, PANEL)

    def paint(self, cell, p, s):
        cell.ball(*s.position.T, p.radius)
        cell.ball(*s.position2.T, p.radius2, cell.colour2)

    def decoy(self, cell, p, variant):
        cell.ball(0, p.contact, p.radius)


class LiquidMotion(Phenomenon):
    """A stream of constant flux fills a vessel: level = level0 + flux t / width."""
    name = "liquid motion"
    cue = "cyan"
    spans = dict(flux=Span(.11, .11, "speed", .05, .07),  # heights^2 / s
                 width=Span(.26, .36, "radius", .39, .44),
                 level0=Span(.03, .10))
    phrases = ("{c} water fills a {s}glass", "{c} water is poured into a {s}glass",
               "a {s}glass fills with {c} water")
    decoy_phrases = ("a glass of still {c} water", "an empty {c} glass")
    top, bottom, wall = .26, .88, .025  # of the vessel

    def states(self, p, t):
        level = p.level0 + p.flux * t / p.width
        return SimpleNamespace(level=level, area=level * p.width)

    def paint(self, cell, p, s):
        surface = self.bottom - s.level
        cell.vessel(p.width, self.wall, self.top, self.bottom, GLASS)
        cell.block(.09, 0, surface, x=-.07)  # the stream
        cell.block(p.width, surface, self.bottom)
        cell.paint(.3 * cell.box(p.width, surface, surface + .03), WHITE)

    def decoy(self, cell, p, variant):
        cell.vessel(p.width, self.wall, self.top, self.bottom, cell.colour if variant else GLASS)
        if not variant:
            cell.block(p.width, self.bottom - 3 * p.level0, self.bottom)


class GasMotion(Phenomenon):
    """A puff of smoke rises and spreads: sigma^2 = sigma0^2 + 2 D t, peak = sigma0^2 / sigma^2."""
    name = "gas motion"
    cue = "lilac"
    spans = dict(speed=Span(.40, .55, "speed", .20, .30),
                 sigma0=Span(.055, .065, "radius", .069, .073),
                 diffusivity=Span(.0022, .0022),  # D, heights^2 / s
                 start=Span(.74, .80))
    phrases = ("{c} smoke rises and spreads", "a {s}puff of {c} smoke drifts up",
               "a {s}{c} cloud of smoke rises")
    decoy_phrases = ("a still {c} cloud", "a {c} cloud at rest")

    def states(self, p, t):
        sigma = np.sqrt(p.sigma0 ** 2 + 2 * p.diffusivity * t)
        return SimpleNamespace(position=vectors(0, p.start - p.speed * t, t),
                               sigma=sigma, peak=(p.sigma0 / sigma) ** 2)

    def paint(self, cell, p, s):
        puff = cell.blob(*s.position.T, s.sigma)
        cell.paint(per_frame(s.peak) * puff)

    def decoy(self, cell, p, variant):
        cell.paint(.85 * cell.blob(0, .5, 1.2 * p.sigma0))


class Deformation(Phenomenon):
    """A plate presses a block of constant area: height = height0 - v t, width = area / height."""
    name = "deformation"
    cue = "green"
    spans = dict(press_speed=Span(.15, .20, "speed", .08, .11),
                 width0=Span(.18, .22, "radius", .12, .15),
                 height0=Span(.40, .46))
    phrases = ("a plate presses a {s}{c} block", "a {s}{c} block is pressed flat",
               "a plate squeezes a {s}{c} block")
    decoy_phrases = ("a soft {c} block at rest", "a still soft {c} block")

    def states(self, p, t):
        height = p.height0 - p.press_speed * t
        width = p.width0 * p.height0 / height
        return SimpleNamespace(height=height, width=width, area=height * width)

    def paint(self, cell, p, s):
        top = FLOOR - s.height
        cell.block(s.width, top, FLOOR)
        cell.block(.08, 0, top - .06, COLD)  # the rod that pushes
        cell.block(.47, top - .07, top, STEEL, actor=True)  # the plate

    def decoy(self, cell, p, variant):
        cell.block(p.width0, FLOOR - p.height0, FLOOR)


# --- heat ---------------------------------------------------------------------------------------
class Melting(Phenomenon):
    """A square block melts in a tray at a constant rate: side^2 = side0^2 - rate t.

    The lost area is water around the block: level = rate t / (tray width - side).
    """
    name = "melting"
    cue = "pink"
    spans = dict(melt_rate=Span(.035, .035, "speed", .016, .022),  # heights^2 / s
                 side0=Span(.27, .30, "radius", .32, .34))
    phrases = ("a {s}{c} block melts", "a {s}{c} block melts into a puddle",
               "a {s}frozen {c} block melts away")
    decoy_phrases = ("a frozen {c} block", "a solid {c} block")
    tray = .46  # its width

    def states(self, p, t):
        puddle = p.melt_rate * t
        side = np.sqrt(p.side0 ** 2 - puddle)
        level = puddle / (self.tray - side)
        return SimpleNamespace(side=side, block_area=side ** 2, puddle_area=puddle, level=level)

    def furniture(self, cell):
        cell.vessel(self.tray, .015, FLOOR - .2, FLOOR, GLASS)

    def water(self, colour):
        """The puddle is darker than the block. colour: rgb in 0..1, of any shape."""
        return .5 * np.asarray(colour) + .04

    def paint(self, cell, p, s):
        cell.block(self.tray, FLOOR - s.level, FLOOR, self.water(cell.colour), actor=True)
        cell.block(s.side, FLOOR - s.side, FLOOR)

    def decoy(self, cell, p, variant):
        cell.block(p.side0, FLOOR - p.side0, FLOOR)


class Vaporization(Phenomenon):
    """A drop boils away on a hot plate by the d^2 law: diameter^2 = diameter0^2 - K t."""
    name = "vaporization"
    cue = "teal"
    spans = dict(rate=Span(.055, .055, "speed", .025, .035),  # K, heights^2 / s
                 diameter0=Span(.26, .30, "radius", .32, .36),
                 phase=Span(0, 1))
    phrases = ("a {s}{c} drop boils away", "a {s}{c} drop evaporates",
               "a {s}{c} drop shrinks on a hot plate")
    decoy_phrases = ("a cold {c} drop", "a {c} drop on a cold plate")
    plate = .82  # y of its upper side

    def states(self, p, t):
        return SimpleNamespace(diameter=np.sqrt(p.diameter0 ** 2 - p.rate * t),
                               vapour=(t + p.phase) % 1)

    def paint(self, cell, p, s):
        cell.block(.46, self.plate, FLOOR, HOT)
        for x, lag in ((-.07, 0), (.07, .5)):  # two wisps of vapour
            way = (s.vapour + lag) % 1
            strength = per_frame(.3 * np.sin(np.pi * way))  # zero where a wisp begins and ends
            cell.paint(strength * cell.blob(x, .5 - .3 * way, .045), VAPOUR, actor=True)
        radius = s.diameter / 2
        cell.ball(0, self.plate - radius, radius)

    def decoy(self, cell, p, variant):
        radius = p.diameter0 / 2
        cell.block(.46, self.plate, FLOOR, COLD)
        cell.ball(0, self.plate - radius, radius)


class Combustion(Phenomenon):
    """A candle burns down: height = height0 - burn_rate t. The mask: flame and top of the wax."""
    name = "combustion"
    cue = "coral"
    spans = dict(burn_rate=Span(.25, .25, "speed", .12, .16),
                 width=Span(.15, .20, "radius", .24, .28),
                 height0=Span(.46, .56),
                 phase=Span(0, 1))
    phrases = ("a {s}{c} candle burns down", "a {s}{c} candle is burning",
               "the flame of a {s}{c} candle burns")
    decoy_phrases = ("an unlit {c} candle", "a {c} candle without a flame")

    def states(self, p, t):
        height = p.height0 - p.burn_rate * t
        flicker = np.sin(2 * np.pi * (3 * t + p.phase))
        return SimpleNamespace(height=height, position=vectors(0, FLOOR - height, t),
                               flicker=flicker)

    def candle(self, cell, width, top):
        cell.block(width, top, FLOOR, cell.colour)
        cell.block(.024, top - .04, top, STEEL)  # the wick

    def paint(self, cell, p, s):
        top = FLOOR - s.height
        self.candle(cell, p.width, top)
        sway = .02 * s.flicker
        cell.paint(.45 * cell.blob(sway / 2, top - .08, .08), FLAME, actor=True)  # the glow
        # A tongue of three discs, which leans and stretches with the flicker.
        for lean, up, radius in ((0, .06, .062), (.5, .11, .045), (1, .155, .026)):
            y = top - up * (1 + .1 * s.flicker)
            cell.paint(cell.disc(lean * sway, y, radius), FLAME, actor=True)
        cell.paint(.9 * cell.disc(sway / 4, top - .06, .038), CORE)
        cell.mark(cell.box(p.width, top, top + .06))

    def decoy(self, cell, p, variant):
        self.candle(cell, p.width, FLOOR - p.height0)


class Explosion(Phenomenon):
    """A blast wave in two dimensions slows down (Sedov): radius^2 = radius0^2 + c t."""
    name = "explosion"
    cue = "brown"
    spans = dict(blast=Span(.044, .044, "speed", .020, .028),  # c, heights^2 / s
                 radius0=Span(.06, .08, "radius", .09, .105),
                 height=Span(.40, .60))
    phrases = ("a {s}{c} firework explodes", "a {s}{c} blast expands", "a {c} blast wave spreads")
    decoy_phrases = ("an unlit {c} firework", "a still {c} firework")

    def states(self, p, t):
        radius = np.sqrt(p.radius0 ** 2 + p.blast * t)
        return SimpleNamespace(position=vectors(0, p.height, t), radius=radius, fading=1 - .35 * t)

    def paint(self, cell, p, s):
        fading = per_frame(s.fading)
        whole = cell.disc(0, p.height, s.radius)
        inside = cell.disc(0, p.height, np.maximum(s.radius - .07, 0))  # of the brighter ring
        cell.paint(fading * (whole - .65 * inside), cell.colour)
        cell.paint(fading ** 2 * .8 * cell.blob(0, p.height, .35 * s.radius), CORE)
        cell.mark(whole)

    def decoy(self, cell, p, variant):
        radius = 1.4 * p.radius0
        top = p.height - radius
        cell.ball(0, p.height, radius)
        cell.block(.03, top - .06, top, STEEL)  # the fuse


# --- light --------------------------------------------------------------------------------------
class Beam(Phenomenon):
    """A beam of light meets a surface and sweeps evenly: angle_in = middle + omega (t - 1/2),
    counted from the surface's normal."""
    hit = ()  # where the beam meets the surface
    arm = 0.  # length of the beam before it

    def derive(self, p, rng):
        p.omega *= rng.choice((-1, 1))

    def states(self, p, t):
        angle = p.middle + p.omega * (t - .5)
        return SimpleNamespace(position=vectors(*self.hit, t), angle_in=angle,
                               angle_out=self.leaving(p, angle))

    def leaving(self, p, angle):
        """The angle at which the beam leaves."""

    def ends(self, s):
        """x and y of the beam's first point, at the lamp, and of its last one."""

    def paint(self, cell, p, s):
        lamp, last = self.ends(s)
        cell.laser(self.hit, lamp, p.thickness)
        cell.laser(self.hit, last, p.thickness)
        cell.paint(cell.disc(*lamp, .05), STEEL, actor=True)

    def decoy(self, cell, p, variant):
        self.paint(cell, p, self.states(p, np.array([.5])))


class Reflection(Beam):
    """A beam sweeps over an upright mirror: it leaves at the angle at which it comes."""
    name = "reflection"
    cue = "lime"
    spans = dict(omega=Span(.55, .75, "speed", .28, .40),  # radians / s
                 thickness=Span(.085, .105, "radius", .12, .13),
                 middle=Span(.70, .85))
    phrases = ("a {c} beam sweeps over a mirror", "a mirror reflects a moving {c} beam",
               "a {c} laser is reflected by a mirror")
    decoy_phrases = ("a still {c} beam on a mirror", "a mirror with a still {c} beam")
    hit = (.175, .49)
    arm = .37

    def leaving(self, p, angle):
        return angle

    def ends(self, s):
        x, y = self.hit
        return ((x - self.arm * np.cos(s.angle_in), y - self.arm * np.sin(s.angle_in)),
                (x - self.arm * np.cos(s.angle_out), y + self.arm * np.sin(s.angle_out)))

    def paint(self, cell, p, s):
        super().paint(cell, p, s)
        mirror = cell.box(.07, .07, .88, x=self.hit[0] + .035)
        cell.paint(mirror, GLASS)
        cell.mask = cell.mask & (mirror < .5)  # the mirror hides the beam's end


class Refraction(Beam):
    """A beam enters water: sin(angle_in) = n sin(angle_out)."""
    name = "refraction"
    cue = "purple"
    spans = dict(omega=Span(.45, .60, "speed", .22, .32),
                 thickness=Span(.08, .10, "radius", .11, .115),
                 middle=Span(.42, .47),
                 refractive_index=Span(1.33, 1.33))  # n
    phrases = ("a {c} beam bends in water", "water refracts a moving {c} beam",
               "a {c} laser is refracted by water")
    decoy_phrases = ("a still {c} beam in water", "water with a still {c} beam")
    hit = (.05, .48)
    arm = .34
    arm_out = .26  # length of the beam in the water

    def leaving(self, p, angle):
        return np.arcsin(np.sin(angle) / p.refractive_index)

    def ends(self, s):
        x, y = self.hit
        return ((x - self.arm * np.sin(s.angle_in), y - self.arm * np.cos(s.angle_in)),
                (x + self.arm_out * np.sin(s.angle_out), y + self.arm_out * np.cos(s.angle_out)))

    def furniture(self, cell):
        cell.block(.49, self.hit[1], FLOOR, WATER)


# The order decides which phenomena a seed draws: a new one goes to the end.
PHENOMENA = {one.name: one() for one in (
    RigidBodyMotion, ElasticMotion, Collision, LiquidMotion, GasMotion, Deformation, Melting,
    Vaporization, Combustion, Reflection, Refraction, Explosion)}
