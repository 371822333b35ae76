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
import sys
import time
from dataclasses import dataclass

import numpy as np

from common.pictures import annotate, enlarge, save_gif, tint
from physics.phenomena import (
    CATEGORIES,
    COLOURS,
    CUE_COLOURS,
    PHENOMENA,
    Cell,
    backdrop,
)


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
