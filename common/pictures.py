"""Pictures: text, heat maps, cells of a clip with what belongs to it, sheets of cells, GIF and MP4.

Frames are uint8 (F, H, W, 3) everywhere, F frames of a moving picture. Nothing here imports torch.
Pillow is imported where letters are drawn: training needs none before its first preview.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.files import whole_file
from config import Stopped, UserError

PAPER = (17, 19, 25)  # colours of a sheet: its ground,
PLATE = (29, 32, 41)  # a plate on it,
BLUE = (92, 160, 255)  # a bar,
INK = (232, 234, 240)  # text,
FAINT = (136, 142, 156)  # and text that matters less
STRIP = (11, 14, 24)  # the strip of text under a frame
STRIP_INK = (205, 210, 222)
GAP = 8  # pixels between things
LINE = 17  # pixels of a line of text
COLUMNS = 4  # heat maps a row
SEEN = .5  # peak of a map from which on the model says "it is there"; its targets are 0 and 1
MOST_LINES = 100  # of a caption; what is longer is cut
FPS = {".gif": (0.01, 100), ".mp4": (0.01, 1000)}  # what a file can hold; a GIF counts hundredths
MOST_PIXELS = 2**28  # of all frames of a sheet: 0.8 GB in memory, more than a viewer opens

# The colours of a heat map, violet to pale yellow and ever brighter: red, green and blue.
HEAT_LEVELS = (
    (50, 150, 235, 255, 255),
    (20, 35, 85, 170, 245),
    (120, 165, 90, 45, 170),
)
HEAT = np.stack([  # (256, 3)
    np.interp(np.linspace(0, 1, 256), (0, .25, .5, .75, 1), levels)
    for levels in HEAT_LEVELS], axis=-1)


@dataclass
class ClipRouting:
    """What the routers said of one clip at diffusion time t; None where one is switched off."""

    lift: np.ndarray | None  # P'_r on the token grid, float32 (T', h, w, E_cat)
    semantic: np.ndarray | None  # rho_s, float32 (E_s,)
    t: float

    @classmethod
    def of(cls, routing, i: int, t: float, grid: tuple[int, int, int]):
        """What a batch's Routing, made at diffusion time t, says of its clip i; None of None."""
        if routing is None:
            return None

        def of_clip(values):
            return None if values is None else values[i].float().cpu().numpy()

        lift = of_clip(routing.refinement_lift)  # (N, E_cat)
        if lift is not None:
            lift = lift.reshape(*grid, -1)  # (T', h, w, E_cat)
        return cls(lift, of_clip(routing.semantic), t)


# --- frames -------------------------------------------------------------------------------------
def enlarge(frames, scale):
    """(F, H, W, 3) -> (F, H scale, W scale, 3): every pixel becomes a square of `scale` pixels."""
    return frames.repeat(scale, 1).repeat(scale, 2)


def tint(frames, mask, colour=(255, 255, 255), alpha=.5):
    """Lay a colour over frames where mask (F, H, W), bool or weights in 0..1, says so."""
    weight = alpha * np.asarray(mask, np.float32)[..., None]
    distance = np.asarray(colour, np.float32) - frames
    return (frames + weight * distance + .5).astype(np.uint8)


def overlay(clip, heat, scale: int) -> np.ndarray:
    """A map (T', h, w) glows over the darkened grey clip (F, H, W, 3) -> (F, H scale, W scale, 3).

    Colour and opacity both say the value, on one scale 0..1 for all maps; a square is a token.
    Values come in tenths and greys in sixteenths: a GIF has 256 colours a frame, and the clip needs
    most of them.
    """
    grey = 0.6 * (enlarge(clip, scale).mean(-1, keepdims=True) // 16 * 16)  # (F, H', W', 1)
    value = (heat.clip(0, 1) * 10).round() / 10
    for axis in range(3):
        value = value.repeat(grey.shape[axis] // heat.shape[axis], axis)
    opacity = np.minimum(1.2 * value, 0.75)[..., None]
    colour = HEAT[(255 * value).astype(np.uint8)]
    return (grey + opacity * (colour - grey)).astype(np.uint8)


# --- text ---------------------------------------------------------------------------------------
def font(size=None):
    """Pillow's own font, `size` pixels high; None is its smallest."""
    from PIL import ImageFont
    return ImageFont.load_default(size)


def wrap(text: str, room, letters=None) -> list[str]:
    """Lines of at most `room` pixels in these letters (a font); a wider word stands alone. What is
    more than MOST_LINES ends in "...", and half a character becomes a question mark."""
    letters = letters or font(13)
    lines = [""]
    for word in text.encode("utf-8", "replace").decode().split():
        word = word[:1000]  # Pillow refuses a million letters
        longer = f"{lines[-1]} {word}".strip()
        if letters.getlength(longer) <= room or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == MOST_LINES:
            lines[-1] = "..."
            break
        else:
            lines.append(word)
    return lines


def annotate(frames, text, lines=1):
    """Add a strip of wrapped text, at least `lines` high, below.

    (F, H, W, 3) -> (F, H + strip, W, 3).
    """
    letters = font()
    width = frames.shape[2]
    wrapped = wrap(text, width - 8, letters)
    strip = Panel(width, 13 * max(len(wrapped), lines) + 6, STRIP)
    strip.draw.multiline_text((4, 2), "\n".join(wrapped), fill=STRIP_INK, font=letters, spacing=2)
    return np.concatenate([frames, strip.frames(len(frames))], 1)


# --- cells and sheets ---------------------------------------------------------------------------
class Panel:
    """A still picture with moving tiles on it."""

    def __init__(self, width: int, height: int, ground=PAPER):
        from PIL import Image, ImageDraw
        self.image = Image.new("RGB", (width, height), ground)
        self.draw = ImageDraw.Draw(self.image)
        self.tiles = []

    def write(self, x, y, text, colour=INK, size=13, room=math.inf, anchor="la") -> None:
        """One line; where there is no room the letters shrink."""
        while size > 7 and font(size).getlength(text) > room:
            size -= 1
        self.draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor)

    def write_lines(self, y, lines) -> None:
        """Lines of a caption, one below the other."""
        for i, line in enumerate(lines):
            self.write(0, y + i * LINE, line)

    def place(self, x, y, frames) -> None:
        """Put frames (F, h, w, 3), with their upper left corner at (x, y)."""
        self.tiles.append((x, y, frames))

    def frames(self, count: int) -> np.ndarray:
        """The moving picture (F, H, W, 3) of `count` frames."""
        out = np.repeat(np.asarray(self.image)[None], count, axis=0)
        for x, y, tile in self.tiles:
            h, w = tile.shape[1:3]
            out[:, y:y + h, x:x + w] = tile
        return out


def heat_map(clip, heat, scale: int) -> np.ndarray:
    """`overlay` of a map (T', h, w) whose peak says that its phenomenon is there; else a plate that
    says "not seen". A map of what is not there was hardly trained: its glow means nothing."""
    if heat.max() >= SEEN:
        return overlay(clip, heat, scale)
    count, h, w, _ = clip.shape
    plate = Panel(w * scale, h * scale, PLATE)
    plate.write(w * scale // 2, h * scale // 2, "not seen", FAINT, 12, w * scale, anchor="mm")
    return plate.frames(count)


def bars(panel: Panel, x, y, width, height, rho) -> None:
    """Semantic weights rho_s (E_s,) as bars from 0 to 1, beside the experts' numbers."""
    panel.draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, fill=PLATE)
    panel.write(x + 10, y + 8, "semantic router rho_s, bars 0 to 1", FAINT, 12, width - 20)

    # Each bar lies on a darker one that is as long as a weight of 1.
    start = x + 34
    longest = width - 84
    pitch = (height - 36) / len(rho)  # from bar to bar
    size = int(min(13, max(7, pitch - 4)))
    half = max(1, int(pitch * 0.28))
    for expert, weight in enumerate(rho.tolist()):
        middle = int(y + 30 + (expert + 0.5) * pitch)
        panel.write(x + 26, middle, str(expert + 1), FAINT, size, anchor="rm")
        for share, colour in ((1, PAPER), (weight, BLUE)):
            end = start + round(longest * share)
            panel.draw.rectangle((start, middle - half, end, middle + half), fill=colour)
        panel.write(x + width - 8, middle, f"{weight:.2f}", INK, size, anchor="rm")


def legend(panel: Panel, y, width, t) -> None:
    """What the heat maps below show, for diffusion time t, and a ramp of their colours."""
    panel.write(0, y, f"where: P'_r at t = {t:.2f}", FAINT, 12, width - 116)
    panel.write(width - 98, y, "0", FAINT, 12, anchor="ra")
    ground = np.full((1, 9, 80, 3), 100, np.uint8)
    ramp = np.linspace(0, 1, 80)[None, None]
    panel.place(width - 94, y + 3, overlay(ground, ramp, 1))
    panel.write(width - 1, y, "1", FAINT, 12, anchor="ra")


def plain_cell(clip, text: str, label: str, scale: int, *beside) -> np.ndarray:
    """A clip (F, H, W, 3), beside it what else there is to see, each as (name, frames as large as
    the clip is shown), below it the caption."""
    shown = [(label, enlarge(clip, scale)), *beside]
    h, w = shown[0][1].shape[1:3]
    top = LINE + 2 if label or beside else 0
    width = len(shown) * (w + GAP) - GAP
    lines = wrap(text, width)
    panel = Panel(width, top + h + 6 + LINE * len(lines))
    for i, (name, frames) in enumerate(shown):
        x = i * (w + GAP)
        panel.write(x, 0, name, FAINT, room=w)
        panel.place(x, top, frames)
    panel.write_lines(top + h + 4, lines)
    return panel.frames(len(clip))


def comparison_cell(bare, clip, routing: ClipRouting, text: str, scale: int,
                    names: dict[int, str]) -> np.ndarray:
    """Two clips (F, H, W, 3) of one noise, without the branch and with it, and where the router
    looked: of the phenomena {index: name} the map with the highest peak."""
    beside = [("with the branch", enlarge(clip, scale))]
    if names and routing.lift is not None:
        strongest = max(names, key=lambda category: routing.lift[..., category].max())
        beside.append((names[strongest], heat_map(clip, routing.lift[..., strongest], scale)))
    return plain_cell(bare, text, "without", scale, *beside)


def routing_cell(clip, text: str, label: str, scale: int, routing: ClipRouting,
                 names: dict[int, str]) -> np.ndarray:
    """Clip and semantic weights; below, half as large, a heat map for each phenomenon of names
    {index: name}."""
    # Sizes: the clip at its scale, its maps at half of it, `COLUMNS` of them in a row.
    large = enlarge(clip, scale)
    h, w = large.shape[1:3]
    small = max(1, scale // 2)
    map_pitch = clip.shape[2] * small + GAP
    row_pitch = clip.shape[1] * small + LINE + GAP
    # The bars beside the clip need some room at any scale.
    width = max(COLUMNS * map_pitch - GAP, 2 * w + GAP, w + GAP + 120)
    lines = wrap(text, width)
    maps = names if routing.lift is not None else {}
    top = LINE + 2
    y_maps = top + h + 10 + LINE * (len(lines) + 2 * bool(maps))
    panel = Panel(width, y_maps + math.ceil(len(maps) / COLUMNS) * row_pitch)

    # The clip, the weights of the semantic experts beside it, the caption below both.
    panel.write(0, 0, label or "clip", FAINT)
    panel.place(0, top, large)
    if routing.semantic is not None:
        bars(panel, w + GAP, top, width - w - GAP, h, routing.semantic)
    panel.write_lines(top + h + 6, lines)

    # The maps, under a legend of their colours.
    if maps:
        legend(panel, y_maps - LINE - 6, width, routing.t)
    for i, (category, name) in enumerate(maps.items()):
        x = i % COLUMNS * map_pitch
        y = y_maps + i // COLUMNS * row_pitch
        panel.write(x, y, name, FAINT, 12, map_pitch - GAP)
        panel.place(x, y + LINE, heat_map(clip, routing.lift[..., category], small))
    return panel.frames(len(clip))


def sheet(cells: list[np.ndarray], pair: int = 1, group: int = 1) -> np.ndarray:
    """Cells (F, h, w, 3) in rows, together shaped like a screen -> (F, H, W, 3).

    `pair` neighbours stay in one row, and rows hold whole groups or whole parts of one, so that
    prompts stay apart.
    """
    n = len(cells)
    h = max(cell.shape[1] for cell in cells) + 2 * GAP
    w = max(cell.shape[2] for cell in cells) + 2 * GAP

    def distance(shape):
        """How far a sheet of so many columns and rows is from the shape of a screen."""
        columns, rows = shape
        return abs(math.log(columns * w / (rows * h) / 1.6))

    shapes = [(columns, math.ceil(n / columns)) for columns in range(pair, n + 1, pair)
              if group % columns == 0 or columns % group == 0]
    columns, rows = min(shapes, key=distance)
    panel = Panel(columns * w, rows * h)
    for i, cell in enumerate(cells):
        row, column = divmod(i, columns)
        panel.place(GAP + column * w, GAP + row * h, cell)
    return panel.frames(len(cells[0]))


# --- files --------------------------------------------------------------------------------------
def check_fps(path: Path, fps: float) -> None:
    """Can this file show so many frames a second? Raises UserError."""
    low, high = FPS[path.suffix.lower()]
    if not low <= fps <= high:
        raise UserError(f"--fps must be {low} to {high} for a {path.suffix} file, not {fps}.")


def save(path: Path, frames, fps: float) -> None:
    """(F, H, W, 3) -> GIF or MP4 by suffix, the whole file or none.

    Raises Stopped when it cannot be written.
    """
    write = save_mp4 if path.suffix.lower() == ".mp4" else save_gif
    try:
        write(path, frames, fps)
    except OSError as e:
        raise Stopped(f"{path} could not be written ({e.strerror or e}).") from None


def save_gif(path, frames, fps):
    """A GIF that loops for ever. One of more frames a second than it can count plays as fast as it
    can."""
    import imageio.v3 as iio
    duration = 1000 / min(fps, FPS[".gif"][1])
    # In memory first: on a full disk the library's writer fails again when it is thrown away.
    film = iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=duration,
                       loop=0)
    with whole_file(path) as part:
        part.write_bytes(film)


def save_mp4(path, frames, fps):
    """H.264, or MPEG-4 where the library lacks it, as yuv420p: every player shows that, and it
    needs even sides."""
    import av
    import imageio.v3 as iio
    _, h, w, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    film = iio.imwrite("<bytes>", frames, extension=".mp4", plugin="pyav", codec=codec,
                       fps=float(fps), out_pixel_format="yuv420p")
    with whole_file(path) as part:
        part.write_bytes(film)
