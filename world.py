"""A physics world in numpy: clips in which things fall, melt, burn and bend light, with the truth.

Data for the video model, so that ProPhy (arXiv 2512.05564) can be studied without a download.
A clip takes four steps:

    (seed, index) -> draw parameters -> true states at the frames' times
                  -> antialiased frames and masks -> caption

Space: the canvas is 1 high, x grows to the right, y grows DOWN. (In a picture taller than wide the
shorter side is 1.) Each half of the canvas has a cell, half as wide as high, in its middle:
a phenomenon, a decoy or nothing is there.
Time: a clip lasts one second. Frame i of F shows t = i / F, so more frames show the same second
more finely.

Twelve of WISA's seventeen phenomena are here (physics/phenomena.py). Constants of nature (gravity,
flux, burning rate ...) have one value; sizes, colours, speeds and places vary. Decoys are still
objects that look like actors, so that neither colour nor shape tells where something happens.
Left out on purpose: depth, texture, light and a moving camera.

    python world.py --preview world.gif    every phenomenon: true, its mask, weak, still; caption
    python world.py --benchmark            how fast clips are drawn
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import config
from common.pictures import annotate, enlarge, save_gif, tint
from config import Config, UserError
from physics import CATEGORIES, PHENOMENA, canvas


# The files that draw: clips on disk go by their content, because another line draws another world.
SOURCES = [Path(__file__).parent / name
           for name in ("world.py", "physics/canvas.py", "physics/phenomena.py")]


# --- clips --------------------------------------------------------------------------------------
@dataclass
class Actor:
    """One phenomenon of a clip and its truth, in canvas heights and seconds from the corner."""
    phenomenon: str  # name of its category
    category: int  # index into CATEGORIES
    side: str  # "left" | "right"
    colour: str
    colour2: str  # of a collision's second puck; "" elsewhere
    box: tuple  # x0, y0, x1, y1 of its cell
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


def drawing(cfg: Config, **changed) -> dict:
    """The arguments of make_clip that draw a run's clips, with some of them changed."""
    own = dict(frames=cfg.frames, height=cfg.height, width=cfg.width, decoys=cfg.decoys,
               two=cfg.two, colour_cues=cfg.colour_cues, ood=cfg.ood)
    return own | changed


def make_clip(seed, index, *, frames=12, height=32, width=32, decoys=.6, two=.4, colour_cues=False,
              ood="", physics="true", phenomenon=None):
    """Clip number `index` of world `seed`: a pure function of its arguments, which shows the same
    scene at any frame count and size. Raises ValueError with one sentence.

    frames: 2..256. height, width: 16..128 pixels.
    two: share of scenes with two phenomena.
    decoys: share of scenes with a still look-alike. It stands in the empty cell, or, where there
        are two phenomena, it is a small ball in front of them.
    colour_cues: every phenomenon has its own colour.
    ood: "speed" | "radius" | "gravity" is drawn outside its training interval, in phenomena that
        have one.
    physics: "true" | "weak" runs at a random speed and direction of time | "still" shows one
        moment. All else of the clip is the same: places, sizes, colours and caption.
    phenomenon: show this one alone.
    """
    _check(seed, index, frames, height, width, decoys, two, ood, physics, phenomenon)
    rng = np.random.default_rng([seed, index])
    times = _times(seed, index, frames, physics)

    # What is to be seen, where, and in which colours.
    two = 0. if phenomenon else two
    names = [phenomenon] if phenomenon else _phenomena_with(ood)
    n_actors = 2 if rng.random() < two else 1
    chosen = rng.permutation(names)[:n_actors].tolist()
    has_decoy = rng.random() < _decoy_chance(n_actors, decoys, two)
    sides = ("left", "right") if rng.random() < .5 else ("right", "left")
    # Two of the actors, then their second ones.
    colours = rng.permutation(list(canvas.COLOURS)).tolist()

    # The actors, each in its cell.
    video = np.repeat(empty_room(height, width)[None], frames, 0)  # (F, H, W, 3)
    actors, phrases = [], []
    for i, name in enumerate(chosen):
        one = PHENOMENA[name]
        pair = (one.cue, "white") if colour_cues else (colours[i], colours[i + 2])
        actor, size = _add_actor(video, rng, name, sides[i], pair, ood, times)
        actors.append(actor)
        phrase = rng.choice(one.phrases)
        phrases.append(phrase.format(c=pair[0], d=pair[1], s=size if n_actors == 1 else ""))

    decoy = ""
    if has_decoy:
        taken = [actor.colour for actor in actors] if colour_cues else []
        colour = rng.choice([c for c in canvas.COLOURS if c not in taken])
        decoy = _add_decoy(video, rng, "middle" if n_actors == 2 else sides[1], colour, chosen[0])
    return Clip(video, _caption(rng, phrases, sides, decoy), actors)


def empty_room(height, width):
    """uint8 (H, W, 3): what every clip shows where nothing is."""
    return _to_bytes(canvas.backdrop(height, width))


def _times(seed, index, frames, physics):
    """(F,) moments of the true second that the frames show.

    Of weak physics these are a + b t, with b from -1 to 1: how fast things go, and which way, tells
    nothing of a law then, while every moment shown is a true one. (Gravity keeps its direction: a
    throw seen backwards is a throw, with b^2 times its acceleration.) a and b have a stream of
    their own, so that all else is drawn as in the true world.
    """
    t = np.arange(frames) / frames
    if physics == "true":
        return t
    u, speed = np.random.default_rng([seed, index, 1]).random(2)
    b = 2 * speed - 1 if physics == "weak" else 0.
    first, last = max(0, -b), min(1, 1 - b)  # a, so that the whole second of t lies in 0 .. 1
    return first + u * (last - first) + b * t


def _check(seed, index, frames, height, width, decoys, two, ood, physics, phenomenon):
    whole = {"frames": (frames, 2, 256), "height": (height, 16, 128), "width": (width, 16, 128),
             "seed": (seed, 0, math.inf), "index": (index, 0, math.inf)}
    for name, (value, low, high) in whole.items():
        if value != int(value) or not low <= value <= high:
            wanted = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise ValueError(f"{name} is a whole number {wanted}, not {value}")
    for name, value in (("decoys", decoys), ("two", two)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share from 0 to 1, not {value}")
    if ood not in ("", "speed", "radius", "gravity"):
        raise ValueError(f"ood is speed, radius, gravity or empty, not {ood!r}")
    if physics not in ("true", "weak", "still"):
        raise ValueError(f"physics is true, weak or still, not {physics!r}")
    if phenomenon is not None and phenomenon not in PHENOMENA:
        raise ValueError(f"the world has no phenomenon {phenomenon!r}, only {', '.join(PHENOMENA)}")
    if phenomenon and phenomenon not in _phenomena_with(ood):
        raise ValueError(f"{phenomenon} has no {ood} to be drawn outside its range")


def _phenomena_with(role):
    """Names of the phenomena that have a parameter of this role; of all for an empty one."""
    return [name for name, one in PHENOMENA.items()
            if not role or any(span.role == role for span in one.spans.values())]


def _decoy_chance(n_actors, decoys, two):
    """The chance of a decoy in a scene with this many actors, so that `decoys` is that of all.

    An empty cell is the better place for a decoy, but a quarter of the scenes with one phenomenon
    show it alone where that is possible: plain prompts ask for it.
    """
    beside_one = min(decoys / .75, decoys / max(1 - two, 1e-9), 1)
    return beside_one if n_actors == 1 else (decoys - (1 - two) * beside_one) / two


def _to_bytes(rgb):
    """(3, ..., h, w) floats in 0..1 -> (..., h, w, 3) uint8."""
    return np.moveaxis((rgb * 255 + .5).astype(np.uint8), 0, -1)


def _cell_box(side, height, width):
    """The cell in the middle of a half of the canvas, or of the whole: x0, y0, x1, y1 in canvas
    units. side: "left" | "middle" | "right"."""
    scale = min(height, width)
    centre = {"left": .25, "middle": .5, "right": .75}[side] * width / scale
    top = (height / scale - 1) / 2
    return centre - .25, top, centre + .25, top + 1


def _parameters(one, rng, ood):
    """Draw a phenomenon's parameters, and a size word with a blank, which is empty for many."""
    u = dict(zip(one.spans, rng.random(len(one.spans))))
    p = SimpleNamespace(**{name: span.draw(u[name], ood) for name, span in one.spans.items()})
    one.derive(p, rng)
    # Only clearly small and clearly large actors are called so, and not all of them.
    place = next(u[name] for name, span in one.spans.items() if span.role == "radius")
    said = rng.random() < .7 and ood != "radius" and abs(place - .5) > 1 / 6
    size = "small " if place < .5 else "large "
    for name, value in vars(p).items():
        setattr(p, name, float(value))
    return p, size if said else ""


def _add_actor(video, rng, name, side, pair, ood, times):
    """Draw a phenomenon into video (F, H, W, 3): the Actor, and a word for its size.

    pair: names of its colour and of a second body's. times: (F,) when its states are shown.
    """
    one = PHENOMENA[name]
    frames, height, width, _ = video.shape
    p, size = _parameters(one, rng, ood)
    box = _cell_box(side, height, width)
    cell = canvas.Cell(box, height, width, *(canvas.CUE_COLOURS[colour] for colour in pair))
    one.furniture(cell)
    s = one.states(p, times)
    one.paint(cell, p, s)
    video[cell.place] = _to_bytes(cell.rgb)
    mask = np.zeros((frames, height, width), bool)
    mask[cell.place] = cell.mask
    # Places, counted from the cell until here, are counted from the canvas's corner.
    states = {key: values + (cell.x0, cell.y0) if key.startswith("position") else values
              for key, values in vars(s).items()}
    colour2 = pair[1] if "{d}" in one.phrases[0] else ""
    category = CATEGORIES.index(name)
    return Actor(name, category, side, pair[0], colour2, box, mask, vars(p), states), size


def _add_decoy(video, rng, side, colour, like):
    """Draw a still look-alike into every frame of video (F, H, W, 3); return its words.

    In a free cell half of the decoys are of the kind of the actor, `like`. In the middle, between
    two actors, the decoy is a small ball in front of them.
    """
    height, width = video.shape[1:3]
    cell = canvas.Cell(_cell_box(side, height, width), height, width, canvas.COLOURS[colour])
    if side == "middle":
        coverage = cell.disc(0, .95, .045)[0, ..., None]  # below everything that moves
        rgb = np.array(cell.colour) * 255
        part = video[cell.place]
        part[:] = part + coverage * (rgb - part) + .5
        return f"a still {colour} ball"

    name = like if rng.random() < .5 else rng.choice(list(PHENOMENA))
    one = PHENOMENA[name]
    variant = int(rng.integers(len(one.decoy_phrases)))
    one.furniture(cell)
    one.decoy(cell, _parameters(one, rng, "")[0], variant)
    video[cell.place] = _to_bytes(cell.rgb)
    return one.decoy_phrases[variant].format(c=colour)


def _caption(rng, phrases, sides, decoy):
    """Words for a scene: at most 24, lower case, no marks but commas and full stops.

    phrases: of one or two phenomena, which are on these sides. decoy: its words, or nothing.
    """
    if len(phrases) == 2:
        there = rng.choice(("at {}",) if decoy else ("on the {}", "at {}"))
        first, second = (f"{phrase} {there.format(side)}" for phrase, side in zip(phrases, sides))
        if decoy:
            return f"{first}, {second}, {decoy}."
        joined = rng.choice(("{}, {}.", "{} and {}.", "{} while {}.", "{}. {}."))
        return joined.format(first, second)

    here = rng.choice(("on the {}", "at {}", "to the {}", "in the {} half")).format(sides[0])
    text = rng.choice(("{0} {1}", "{1}, {0}")).format(phrases[0], here)
    if decoy:
        beside = (", beside {}", ", next to {}", ", near {}", ". {} stays at {}", ", {} on the {}")
        text += rng.choice(beside).format(decoy, sides[1])
    return text + "."


# --- the command --------------------------------------------------------------------------------
def preview(flags):
    """Every phenomenon that is asked for: its clip, the mask tinted over it, the same scene of weak
    and of still physics, and its caption. uint8 (F, H', W', 3)."""
    names = flags.phenomena.split(",") if flags.phenomena else _phenomena_with(flags.ood)
    tiles = []
    columns = 2
    scale = max(128 // max(flags.size, 1), 1)
    for i, name in enumerate(names or PHENOMENA):  # an `ood` that there is not is refused below
        clip, weak, still = (
            make_clip(flags.seed, i, frames=flags.frames, height=flags.size, width=flags.size,
                      decoys=1, colour_cues=flags.colour_cues, ood=flags.ood, physics=physics,
                      phenomenon=name) for physics in ("true", "weak", "still"))
        shown = [clip.video, tint(clip.video, clip.actors[0].mask), weak.video, still.video]
        gap = ((0, 0), (4, 0), (4, 0), (0, 0))
        tile = np.concatenate([np.pad(enlarge(video, scale), gap) for video in shown], 2)
        tiles.append(annotate(tile, f"{name}: {clip.caption}", lines=2))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i:i + columns], 2) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows, 1)


@dataclass(frozen=True)
class Flags:
    """The command line."""
    preview: str = ""  # write a GIF: each phenomenon true, with its mask, weak, and still
    phenomena: str = ""  # show these alone, such as collision,melting; empty = all
    benchmark: bool = False  # count the clips a CPU-second at 12 x 32 x 32, on one thread
    seed: int = 0  # which world
    size: int = 64  # pixels of a clip's side in the preview
    frames: int = 24  # frames of a clip in the preview
    ood: str = ""  # draw this outside its training interval: speed | radius | gravity
    colour_cues: bool = False  # each phenomenon in its own colour

    def check(self):
        if not self.preview and not self.benchmark:
            raise UserError("Say --preview FILE or --benchmark.")
        gif = Path(self.preview)
        if self.preview and not (gif.suffix.lower() == ".gif" and gif.parent.is_dir()):
            raise UserError("--preview takes a .gif in a folder that is there, not "
                            f"{self.preview!r}.")
        if not self.preview and self != Flags(benchmark=True, seed=self.seed):
            raise UserError("--benchmark takes --seed alone: the other flags are for --preview.")


def main(argv) -> None:
    """Write the preview, and time the drawing. Raises UserError."""
    flags = config.parse_flags(Flags, argv, "The physics world: look at it, or time its drawing.")
    try:
        if flags.preview:
            # Half as fast as it happens.
            save_gif(flags.preview, preview(flags), fps=flags.frames / 2)
            print(f"wrote {flags.preview}")
        if flags.benchmark:
            start = time.process_time()
            for i in range(500):
                make_clip(flags.seed, i)
            print(f"{500 / (time.process_time() - start):.0f} clips a CPU-second")
    except ValueError as e:  # of make_clip
        raise UserError(f"{e}.") from None
    except OSError as e:
        raise UserError(f"{flags.preview} could not be written ({e.strerror or e}).") from None


if __name__ == "__main__":
    config.entry(main, sys.argv[1:])
