"""What the world is painted with: colours, the empty room, and the cell of one phenomenon.

Units: canvas heights. The picture is one unit high, x grows to the right and y grows DOWN. Shapes
are coverages in 0..1 (antialiased), so that sums over a picture are true areas.

Letters: F frames, H W pixels of the picture, h w pixels of a cell. An array whose F is 1 stands for
all frames: still things are drawn once.
"""
import functools

import numpy as np


# Actors and decoys have these colours, which a prompt may combine with any phenomenon.
COLOURS = {
    "red": (.95, .22, .20),
    "yellow": (.98, .83, .18),
    "green": (.22, .78, .30),
    "cyan": (.15, .85, .88),
    "blue": (.22, .36, .98),
    "purple": (.76, .25, .92),
}
# With `colour_cues` every phenomenon has its own colour, and a collision's second puck is white.
CUE_COLOURS = COLOURS | {
    "pink": (1., .58, .76),
    "lime": (.68, .95, .20),
    "brown": (.58, .36, .18),
    "teal": (.08, .52, .48),
    "coral": (1., .48, .32),
    "lilac": (.70, .64, 1.),
    "white": (.95, .95, .95),
}
NIGHT = (.045, .055, .095)  # the wall of the room
GROUND = (.125, .135, .195)  # its floor
PANEL = (.165, .185, .25)  # a table
STEEL = (.50, .54, .62)
GLASS = (.42, .48, .58)
WATER = (.09, .17, .25)
HOT = (.46, .17, .10)  # a hot plate
COLD = (.26, .28, .33)  # a cold one
VAPOUR = (.80, .85, .92)
FLAME = (1., .50, .12)
CORE = (1., .88, .50)  # the bright middle of a flame or a blast
WHITE = (1., 1., 1.)

FLOOR = .9  # y of the floor line
VISIBLE = .1  # a pixel belongs to the mask when an actor covers more of it than this


def per_frame(value):
    """A number or one value per frame -> float32 (F or 1, 1, 1), to broadcast over the pixels."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


def vectors(x, y, t):
    """Two components at the times t (F,), each a number or one value per frame -> (F, 2)."""
    return np.stack([x + 0 * t, y + 0 * t], -1)


@functools.lru_cache(maxsize=8)
def backdrop(height, width):
    """The empty room: float32 (3, H, W) in 0..1, a dark wall and a floor."""
    scale = min(height, width)
    y = (np.arange(height) + .5 - (height - scale) / 2) / scale
    floor = np.clip(.5 + (y - FLOOR) * scale, 0, 1)[:, None]  # (H, 1)
    wall = np.reshape(NIGHT, (3, 1, 1))
    ground = np.reshape(GROUND, (3, 1, 1))
    rgb = (wall + floor * (ground - wall)).astype(np.float32)  # (3, H, 1)
    return np.broadcast_to(rgb, (3, height, width))


class Cell:
    """The stage of one phenomenon, painted back to front: x in -.25 .. .25, y in 0 .. 1.

    Shapes take numbers or one value per frame. Until something moves, all arrays hold a single
    frame. `actor=True` adds a shape to the mask of where the phenomenon happens.
    """

    def __init__(self, box, height, width, colour=WHITE, colour2=WHITE):
        """box: x0, y0, x1, y1 in canvas units, in a picture of height x width pixels.
        colour, colour2: rgb of the actor and of a second body."""
        self.colour = colour
        self.colour2 = colour2
        self.scale = min(height, width)  # pixels per canvas unit
        self.x0 = (box[0] + box[2]) / 2  # canvas place of the cell's origin
        self.y0 = box[1]
        # In odd sizes two cells would share a column without the rounding up of the small number.
        x0, y0, x1, y1 = [int(v * self.scale + .5 + 1e-6) for v in box]
        self.place = np.s_[:, y0:y1, x0:x1]  # the cell's pixels in (F, H, W, ...)
        # Centres of the cell's pixels, in canvas units from the cell's origin.
        pixels = (np.arange(max(height, width)) + .5) / self.scale
        self.x = (pixels[x0:x1] - self.x0).astype(np.float32)[None, None, :]  # (1, 1, w)
        self.y = (pixels[y0:y1] - self.y0).astype(np.float32)[None, :, None]  # (1, h, 1)
        self.rgb = backdrop(height, width)[self.place][:, None]  # (3, F or 1, h, w)
        self.mask = np.zeros((1, self.y.size, self.x.size), bool)  # (F or 1, h, w)

    # --- painting
    def paint(self, coverage, colour=None, actor=False):
        """Lay a colour over the cell. Without one the shape is the actor, in the actor's colour.
        coverage: (F or 1, h, w) in 0..1."""
        if colour is None:
            colour = self.colour
            actor = True
        colour = np.reshape(colour, (3, 1, 1, 1)).astype(np.float32)
        self.rgb = self.rgb + coverage * (colour - self.rgb)
        if actor:
            self.mark(coverage)

    def mark(self, coverage):
        """Add what is visible of a shape to the mask, without painting it."""
        self.mask = self.mask | (coverage > VISIBLE)

    def block(self, width, top, bottom, colour=None, actor=False, x=0):
        """An upright box around x."""
        self.paint(self.box(width, top, bottom, x), colour, actor)

    def ball(self, x, y, radius, colour=None):
        """A disc with a small highlight. It is an actor."""
        self.paint(self.disc(x, y, radius), colour, actor=True)
        self.paint(.45 * self.disc(x - .35 * radius, y - .35 * radius, .3 * radius), WHITE)

    def laser(self, start, end, thickness):
        """A beam with a bright heart. It is an actor."""
        self.paint(self.beam(start, end, thickness))
        self.paint(.4 * self.beam(start, end, thickness * .3), WHITE)

    def vessel(self, width, wall, top, bottom, colour):
        """An open vessel on the floor, of this width inside."""
        self.block(width + 2 * wall, top, FLOOR, colour)
        self.block(width, top, bottom, NIGHT)

    # --- shapes: each returns a coverage (F or 1, h, w)
    def disc(self, x, y, radius):
        return self._inside(*self._from(x, y), radius)

    def box(self, width, top, bottom, x=0):
        """The exact coverage of an upright box around x: areas in the picture are true areas."""
        half = np.float32(.5 / self.scale)

        def overlap(pixels, low, high):
            """The share of each pixel's side that lies between low and high."""
            edges = pixels - half, pixels + half
            inside = np.clip(per_frame(high), *edges) - np.clip(per_frame(low), *edges)
            return inside * self.scale

        return overlap(self.x, x - width / 2, x + width / 2) * overlap(self.y, top, bottom)

    def beam(self, start, end, thickness):
        """A straight bar with round ends, from x, y to x, y."""
        px, py = self._from(*start)  # from the beam's start to the pixel
        dx, dy = (per_frame(b) - per_frame(a) for a, b in zip(start, end))  # to its end
        # The nearest point of the beam's axis: 0 is the start, 1 the end.
        nearest = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        return self._inside(px - nearest * dx, py - nearest * dy, thickness / 2)

    def blob(self, x, y, sigma):
        """A Gaussian of peak 1."""
        dx, dy = self._from(x, y)
        k = .5 / per_frame(sigma) ** 2
        return np.exp(-dx ** 2 * k) * np.exp(-dy ** 2 * k)

    def _from(self, x, y):
        """How far each pixel lies from (x, y), to the right and down."""
        return self.x - per_frame(x), self.y - per_frame(y)

    def _inside(self, dx, dy, reach):
        """1 where (dx, dy) is shorter than `reach`, 0 where it is longer, with a soft edge."""
        return np.clip(.5 - (np.sqrt(dx * dx + dy * dy) - per_frame(reach)) * self.scale, 0, 1)
