"""Pictures: text, heat maps, sheets of clips, GIF and MP4."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import whole_file
from config import Stopped
from physics.phenomena import NIGHT


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
    with whole_file(path) as part:
        iio.imwrite(part, frames, extension=".gif", plugin="pillow", duration=1000 / fps, loop=0)


@dataclass
class ClipRouting:
    """What the routers said of one clip at diffusion time t; None where a router is switched off."""

    lift: np.ndarray | None  # P'_r on the token grid, float32 (T', h, w, E_cat)
    semantic: np.ndarray | None  # rho_s, float32 (E_s,)
    t: float

PAPER, PLATE, BLUE, INK, FAINT = (17, 19, 25), (29, 32, 41), (92, 160, 255), (232, 234, 240), (136, 142, 156)
MOST_PIXELS = 2**28  # of all frames of a sheet: 0.8 GB in memory, more than a viewer opens
GAP, LINE, COLUMNS = 8, 17, 4  # pixels between things; of a line of text; heat maps a row
HEAT = np.stack([np.interp(np.linspace(0, 1, 256), (0, .25, .5, .75, 1), levels)  # violet to pale yellow, ever brighter
                 for levels in ((50, 150, 235, 255, 255), (20, 35, 85, 170, 245), (120, 165, 90, 45, 170))], axis=-1)


def font(size: int):
    """Pillow's own font, `size` pixels high."""
    from PIL import (
        ImageFont,  # lazily: training needs no letters before its first preview
    )
    return ImageFont.load_default(size)


def wrap(text: str, room: int) -> list[str]:
    """Lines of at most `room` pixels; a wider word stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = lines[:-1] + [longer] if font(13).getlength(longer) <= room or not lines[-1] else [*lines, word]
    return lines


class Panel:
    """A still picture with moving tiles on it."""

    def __init__(self, width: int, height: int):
        from PIL import Image, ImageDraw
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw, self.tiles = ImageDraw.Draw(self.image), []

    def write(self, x: int, y: int, text: str, colour=INK, size: int = 13, room: float = math.inf, anchor="la") -> None:
        """One line; where there is no room the letters shrink."""
        while size > 7 and font(size).getlength(text) > room:
            size -= 1
        self.draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor)

    def place(self, x: int, y: int, frames: np.ndarray) -> None:
        """Put uint8 frames (F, h, w, 3), with their upper left corner at (x, y)."""
        self.tiles.append((x, y, frames))

    def frames(self) -> np.ndarray:
        """uint8 (F, H, W, 3)."""
        out = np.repeat(np.asarray(self.image)[None], max(len(tile) for _, _, tile in self.tiles), axis=0)
        for x, y, tile in self.tiles:
            out[:, y : y + tile.shape[1], x : x + tile.shape[2]] = tile
        return out


def overlay(clip: np.ndarray, heat: np.ndarray, scale: int) -> np.ndarray:
    """A map (T', h, w) glowing over the darkened grey clip uint8 (F, H, W, 3) -> (F, H scale, W scale, 3).

    Colour and opacity both say the value, on one scale 0..1 for all maps; a square is a token.
    Values come in tenths and greys in sixteenths: a GIF has 256 colours a frame, and the clip needs most of them.
    """
    grey = 0.6 * (enlarge(clip, scale).mean(-1, keepdims=True) // 16 * 16)  # (F, H scale, W scale, 1)
    value = (heat.clip(0, 1) * 10).round() / 10
    for axis in range(3):
        value = value.repeat(grey.shape[axis] // heat.shape[axis], axis)
    opacity = np.minimum(1.2 * value, 0.75)[..., None]
    return (grey + opacity * (HEAT[(255 * value).astype(np.uint8)] - grey)).astype(np.uint8)


def bars(panel: Panel, x: int, y: int, width: int, height: int, rho: np.ndarray) -> None:
    """Semantic weights rho_s (E_s,) as bars from 0 to 1, beside the experts' numbers."""
    panel.draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, fill=PLATE)
    panel.write(x + 10, y + 8, "semantic router rho_s, bars 0 to 1", FAINT, 12, width - 20)
    pitch, left, room = (height - 36) / len(rho), x + 34, width - 84
    size, half = int(min(13, max(7, pitch - 4))), max(1, int(pitch * 0.28))
    for e, weight in enumerate(rho.tolist()):
        middle = int(y + 30 + (e + 0.5) * pitch)
        panel.write(x + 26, middle, str(e + 1), FAINT, size, anchor="rm")
        for share, colour in ((1, PAPER), (weight, BLUE)):
            panel.draw.rectangle((left, middle - half, left + round(room * share), middle + half), fill=colour)
        panel.write(x + width - 8, middle, f"{weight:.2f}", INK, size, anchor="rm")


def plain_cell(clip, text: str, label: str, scale: int, beside: tuple[str, np.ndarray] | None = None) -> np.ndarray:
    """A clip (F, H, W, 3), beside it one named heat map if there is any, below it the caption."""
    (h, w), top = (side * scale for side in clip.shape[1:3]), LINE + 2 if label or beside else 0
    width = 2 * w + GAP if beside else w
    lines = wrap(text, width)
    panel = Panel(width, top + h + 6 + LINE * len(lines))
    for i, (name, frames) in enumerate([(label, enlarge(clip, scale))] + [beside] * bool(beside)):
        panel.write(i * (w + GAP), 0, name, FAINT, room=w)
        panel.place(i * (w + GAP), top, frames)
    for i, line in enumerate(lines):
        panel.write(0, top + h + 4 + i * LINE, line)
    return panel.frames()


def routing_cell(clip, text: str, label: str, scale: int, routing: ClipRouting, names: dict[int, str]) -> np.ndarray:
    """Clip and semantic weights; below, half as large, a heat map for each phenomenon of names {index: name}."""
    small, top = max(1, scale // 2), LINE + 2
    (h, w), (h_map, w_map) = ((clip.shape[1] * s, clip.shape[2] * s) for s in (scale, small))
    width = max(COLUMNS * (w_map + GAP) - GAP, 2 * w + GAP)
    lines, maps = wrap(text, width), names if routing.lift is not None else {}
    y_maps = top + h + 10 + LINE * (len(lines) + 2 * bool(maps))
    panel = Panel(width, y_maps + math.ceil(len(maps) / COLUMNS) * (h_map + LINE + GAP))
    panel.write(0, 0, label or "clip", FAINT)
    panel.place(0, top, enlarge(clip, scale))
    if routing.semantic is not None:
        bars(panel, w + GAP, top, width - w - GAP, h, routing.semantic)
    for i, line in enumerate(lines):
        panel.write(0, top + h + 6 + i * LINE, line)
    if maps:
        legend = y_maps - LINE - 6
        heading = f"where: P'_r at t = {routing.t:.2f}"
        panel.write(0, legend, heading, FAINT, 12, width - 116)
        panel.write(width - 98, legend, "0", FAINT, 12, anchor="ra")
        ramp = overlay(np.full((1, 9, 80, 3), 100, np.uint8), np.linspace(0, 1, 80)[None, None], 1)
        panel.place(width - 94, legend + 3, ramp)
        panel.write(width - 1, legend, "1", FAINT, 12, anchor="ra")
    for i, (category, name) in enumerate(maps.items()):
        x, y = i % COLUMNS * (w_map + GAP), y_maps + i // COLUMNS * (h_map + LINE + GAP)
        panel.write(x, y, name, FAINT, 12, w_map)
        panel.place(x, y + LINE, overlay(clip, routing.lift[..., category], small))
    return panel.frames()


def sheet(cells: list[np.ndarray], pair: int = 1, group: int = 1) -> np.ndarray:
    """Cells (F, h, w, 3) in rows, together shaped like a screen -> (F, H, W, 3).

    `pair` neighbours stay in one row, and rows hold whole groups or whole parts of one, so that prompts stay apart.
    """
    n, h, w = len(cells), max(c.shape[1] for c in cells) + 2 * GAP, max(c.shape[2] for c in cells) + 2 * GAP
    options = [c for c in range(pair, n + 1, pair) if group % c == 0 or c % group == 0]
    columns = min(options, key=lambda c: abs(math.log(c * w / (-(-n // c) * h) / 1.6)))
    out = np.empty((len(cells[0]), -(-n // columns) * h, columns * w, 3), np.uint8)
    out[:] = PAPER
    for i, cell in enumerate(cells):
        y, x = GAP + i // columns * h, GAP + i % columns * w
        out[:, y : y + cell.shape[1], x : x + cell.shape[2]] = cell
    return out


def save(path: Path, frames: np.ndarray, fps: float) -> None:
    """uint8 (F, H, W, 3) -> GIF or MP4 by suffix, the whole file or none. Raises Stopped when it cannot be written."""
    try:
        (save_mp4 if path.suffix.lower() == ".mp4" else save_gif)(path, frames, fps)
    except OSError as e:
        raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None


def save_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 (MPEG-4 where the library lacks it) as yuv420p, which every player shows and which needs even sides."""
    import av
    import imageio.v3 as iio
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    film = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec=codec, fps=float(fps),
                       out_pixel_format="yuv420p")
    with whole_file(path) as part:
        part.write_bytes(film)
