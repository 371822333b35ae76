"""The page of report.py: a log becomes curves, films and maps become text, page.html holds all of it.

One file that needs no network: its script and its style stand in it, and its own header forbids a
browser to ask anybody for anything. Nothing here imports torch.

Letters: F H W a clip, T' h w the token grid, E_cat phenomena.
"""
import base64
import io
import json
import math
from pathlib import Path

import numpy as np

from config import Config

PLACE = ">{}<"  # in page.html: where the data goes
POINTS = 300  # of a curve
SAMPLES = 6  # previews of a run


# --- a run folder ---------------------------------------------------------------------------------
def curves(entries: list[dict], cfg: Config) -> dict:
    """The entries of a log as series, each of at most POINTS means of neighbours. What an entry says
    in another way than this version's counts as not said."""
    entries = [one for one in entries if type(one["step"]) is int]
    steps = [one for one in entries if "loss" in one]
    validations = [one for one in entries if isinstance(one.get("held_out"), dict)]

    # Clips a second, from one entry to the next; a stop and a start anew cost no seconds.
    for before, one in zip(steps, steps[1:]):
        first, last = (number(entry.get("seconds")) or 0 for entry in (before, one))
        if last > first:
            one["speed"] = cfg.batch_size * (one["step"] - before["step"]) / (last - first)
    for one in steps:
        if number(one.get("waited")) is not None:
            one["waited"] *= 1000

    slots = chunks(len(steps), POINTS)
    groups = [steps[slot] for slot in slots]
    names = dict.fromkeys(name for one in steps for name, value in one.items()
                          if number(value) is not None and name not in ("step", "seconds"))
    noise = [one["by_noise"] if isinstance(one.get("by_noise"), list) else [] for one in steps]
    held = dict.fromkeys(name for one in validations for name in one["held_out"])
    found = {name: [number(one["held_out"].get(name)) for one in validations] for name in held}
    if any("held_out_base" in one for one in validations):
        found["diffusion, stage one's clips"] = [number(one.get("held_out_base"))
                                                 for one in validations]
    return {"border": cfg.base_steps,
            "steps": [round(mean(one["step"] for one in group)) for group in groups],
            "values": {name: [mean(one.get(name) for one in group) for group in groups]
                       for name in names},
            "by_noise": [[mean(one[i] for one in noise[slot] if i < len(one)) for slot in slots]
                         for i in range(max(map(len, noise), default=0))],
            "held_out": {"steps": [one["step"] for one in validations], "values": found}}


def number(value) -> float | None:
    """The value if it is a number, else None."""
    return value if type(value) in (int, float) else None


def chunks(n: int, most: int) -> list[slice]:
    """0 ... n - 1 in order, cut into at most so many slices of one length or nearly so."""
    edges = np.linspace(0, n, min(n, most) + 1).round().astype(int).tolist()
    return [slice(first, end) for first, end in zip(edges, edges[1:])]


def mean(values) -> float | None:
    """The mean of those that are numbers."""
    there = [value for value in values if number(value) is not None]
    return float(f"{sum(there) / len(there):.5g}") if there else None


def previews(folder: Path, most: int) -> list[dict]:
    """At most SAMPLES of the previews stepNNNNNN.gif, evenly chosen, the last among them, in `most`
    bytes together. What is damaged or does not fit is left out."""
    paths = sorted(path for path in folder.glob("step*.gif") if path.stem[4:].isdecimal())
    paths = [paths[slot.stop - 1] for slot in chunks(len(paths), SAMPLES)]
    shown = [{"step": int(path.stem[4:]), "src": moving(path, most // len(paths))}
             for path in paths]
    return [one for one in shown if one["src"]]


# --- pictures -------------------------------------------------------------------------------------
def data_uri(kind: str, content: bytes) -> str:
    """A file as the address of itself. kind: jpeg | png | webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def film(frames: np.ndarray, most: int) -> dict:
    """A clip uint8 (F, H, W, 3) as one picture, its frames one below the other, in at most `most`
    bytes where that can be done: without loss, else as JPEG, else of fewer pixels."""
    from PIL import Image
    for step in (1, 2, 3, 4, 6, 8):
        small = frames[:, ::step, ::step]
        F, H, W, _ = small.shape
        image = Image.fromarray(np.ascontiguousarray(small).reshape(F * H, W, 3))
        for kind, how in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
            if kind == "jpeg" and F * H > 65_000:  # the format's largest side is 65,535
                continue
            file = io.BytesIO()
            image.save(file, kind, **how)
            if file.tell() <= most:
                break
        if file.tell() <= most:
            break
    return {"src": data_uri(kind, file.getvalue()), "frames": F, "height": H, "width": W}


def moving(path: Path, most: int) -> str | None:
    """A GIF as an animated WebP of at most `most` bytes, at half its size if need be; None where
    that cannot be done, or the file is damaged."""
    from PIL import Image, ImageSequence
    try:
        with Image.open(path) as gif:
            duration = gif.info.get("duration", 100)
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    except (OSError, ValueError, SyntaxError, EOFError):  # of what no longer is a picture
        return None
    for scale in (1, 2):
        first, *others = [frame.reduce(scale) for frame in frames]
        file = io.BytesIO()
        first.save(file, "webp", save_all=True, append_images=others, duration=duration, loop=0,
                   quality=70)
        if file.tell() <= most:
            return data_uri("webp", file.getvalue())
    return None


def as_bytes(maps: list[np.ndarray], most: int) -> tuple[list[str], list[int]]:
    """Maps (T', h, w, E_cat) of several times, each value in 0..1 as a byte, and their grid. Where
    they have more than `most` bytes, squares of tokens become one, with the largest value in them:
    peaks stay."""
    size = sum(one.size for one in maps)
    step = max(math.ceil(math.sqrt(size / max(most, 1))), 1)
    for axis in (1, 2):
        maps = [np.maximum.reduceat(one, range(0, one.shape[axis], step), axis) for one in maps]
    return ([base64.b64encode((one.clip(0, 1) * 255 + .5).astype(np.uint8).tobytes()).decode()
             for one in maps], list(maps[0].shape[:3]))


# --- the file -------------------------------------------------------------------------------------
def without_nan(value):
    """The same nest of dicts, lists and numbers with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def page(data: dict) -> str:
    """page.html with its data, which cannot end its script: "<" is written as an escape."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    text = json.dumps(without_nan(data), separators=(",", ":")).replace("<", "\\u003c")
    before, after = template.split(PLACE)
    return f"{before}>{text}<{after}"
