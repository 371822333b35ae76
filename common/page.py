"""The page of report.py, made of its data: films and maps become text, and page.html holds all of it.

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

PLACE = ">{}<"  # in page.html: where the data goes


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
    they have more than `most` bytes, every second, third ... row and column is left out."""
    size = sum(one.size for one in maps)
    step = max(math.ceil(math.sqrt(size / max(most, 1))), 1)
    thin = [one[:, ::step, ::step] for one in maps]
    return ([base64.b64encode((one.clip(0, 1) * 255 + .5).astype(np.uint8).tobytes()).decode()
             for one in thin], list(thin[0].shape[:3]))


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
