"""Videos: which clips are cut from them, and how they are decoded.

*Time*: a clip's k-th frame is the one shown k/fps seconds after its start. Time stamps count,
within a millisecond, so variable frame rates work. A video is cut into consecutive windows of
`frames` such frames; if there are more than `windows` of them, that many are taken, evenly spread.
A shorter video is skipped. *Space*: a frame is turned and mirrored as the file says, then its
largest centred rectangle of the wanted shape is resized with antialiasing. *Colour*: 8-bit RGB;
alpha is dropped. *Bad files* are skipped, counted and named; of a file that is damaged halfway
those windows are used that decode, and the others are counted.

Left out on purpose: sound, non-square pixels, the brightness of HDR (PQ and HLG: named).
"""
import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image
from torch import Tensor

TOLERANCE = 1e-3  # seconds: some containers round time stamps to it
SEEK_FROM = 10.0  # seconds ahead: jump; nearer frames are decoded through
CLOCK_JUMP = 1.0  # seconds: no decoder holds frames back for longer
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
HDR_CURVES = (16, 18)  # PQ (SMPTE 2084) and HLG (ARIB STD-B67), as ITU-T H.273 numbers them


@dataclass(frozen=True)
class Cut:
    """How clips are cut from videos."""
    frames: int  # of a clip
    fps: float  # frames a second
    windows: int  # clips from one video at most
    height: int  # of a clip, in pixels
    width: int


@dataclass
class Window:
    """A clip, and where in its video it was: maps made later from the file find the same pixels."""
    video: np.ndarray  # (F, H, W, 3) uint8
    number: int  # of the windows taken from its video, which are `taken`
    taken: int
    start: float  # seconds on the file's own clock; frame k is the one shown at start + k / fps
    size: tuple[int, int]  # height and width of the upright source
    crop: tuple[float, float, float, float]  # left, top, right, bottom in its pixels
    hdr: bool = False  # of high dynamic range, whose curve is read as if it were the usual one


def reason_of(error: Exception) -> str:
    """What a decoder's error says, in a few words."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def windows_of(path: Path, cut: Cut) -> list[Window]:
    """The clips of one video by the rules at the top; never more than those in memory.

    A window that does not decode, or whose frames have odd times, is left out. Raises ValueError
    with the reason when there is none, or what the decoder raises.
    """
    times, end, counted = timeline(path)
    n = int(np.ceil((end - times[0] - TOLERANCE) * cut.fps)) // cut.frames
    if n < 1:
        length = f"{end - times[0]:.2g} s of {cut.frames / cut.fps:.2g} s"
        raise ValueError(f"too short, {length}")
    taken = min(n, cut.windows)
    found = []
    reason = "damaged, no window decodes"
    with contextlib.closing(Player(path, times, end, counted)) as player:
        for number in range(taken):
            window = (2 * number + 1) * n // (2 * taken)  # the middles of `taken` equal parts
            shown = times[0] + (window * cut.frames + np.arange(cut.frames)) / cut.fps
            pictures = [player.picture(t, cut.height, cut.width) for t in shown]
            if player.odd_at >= shown[0]:
                reason = "its time stamps make no sense"
            elif all(picture is not None for picture in pictures):
                size = upright_size(player.now)
                crop = central_crop(*size, cut.height, cut.width)
                found.append(Window(np.stack(pictures), number, taken, float(shown[0]), size, crop,
                                    player.stream.codec_context.color_trc in HDR_CURVES))
    if not found:
        raise ValueError(reason)
    return found


def lost_windows(windows: list[Window]) -> str:
    """How many windows of a video were left out, "" if none."""
    taken = windows[0].taken
    lost = taken - len(windows)
    return f"{lost} of {taken} windows lost: damage, or odd time stamps" if lost else ""


def pictures_of(container):
    """The stream of pictures that a player shows: the default one, else the first. Covers of albums
    and thumbnails are none. Raises ValueError."""
    streams = [stream for stream in container.streams.video if not stream.disposition & COVERS]
    if not streams:
        raise ValueError("no picture in it")
    return max(streams, key=lambda stream: bool(stream.disposition & Disposition.default))


def timeline(path: Path) -> tuple[np.ndarray, float, bool]:
    """When each frame is shown and when the last one ends, in seconds; and whether the frames must
    be counted, because the file does not say which of them is shown when.

    Read from the packets alone: nothing is decoded, so hours of video cost seconds, and unlike the
    file's header it is also true of a truncated file. Raises ValueError without any.
    """
    if not path.stat().st_size:
        raise ValueError("empty file")
    shown, decoded = [], []  # (start, duration) of each packet; when it is due to be decoded
    with av.open(str(path)) as container:
        stream = pictures_of(container)
        if container.format.name.endswith("_pipe"):  # so libav calls readers of one picture a file
            raise ValueError("read as a single picture: convert an animation to mp4")
        unit = stream.time_base
        reorders = stream.codec_context.has_b_frames
        with contextlib.suppress(av.FFmpegError):  # damage ends the timeline
            for packet in container.demux(stream):
                start = packet.pts if packet.pts is not None else packet.dts
                if start is not None and packet.size and not packet.is_discard:
                    shown.append((float(start * unit), float((packet.duration or 0) * unit)))
                    if packet.dts is not None:
                        decoded.append(packet.dts)
    if not shown:
        raise ValueError("its frames carry no times: convert it to mp4, with its frame rate")
    back = -np.diff(decoded).min(initial=0) * float(unit)
    if back > CLOCK_JUMP:  # files that were joined as they are
        raise ValueError(f"its clock jumps back by {back:.3g} s")

    # A decoder that reorders is given packets whose times of display fall now and then. Where they
    # only rise, as in AVI, they are not times of display.
    times, durations = np.array(sorted(shown)).T
    rise = all(first < second for (first, _), (second, _) in zip(shown, shown[1:]))
    return times, times[-1] + (durations[-1] or usual_gap(times)), reorders and rise


def usual_gap(times: np.ndarray) -> float:
    """Seconds from a frame to the next."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


class Player:
    """Opens a video, walks through it and gives the picture shown at rising times."""

    def __init__(self, path: Path, times: np.ndarray, end: float, counted: bool):
        self.path = path
        self.times = times
        self.end = end
        self.counted = counted  # the i-th frame is shown at times[i], whatever its own stamp says
        self.gap = usual_gap(times)
        self.fit = functools.lru_cache(1)(fit_frame)  # a frame may be on show several times
        self.asked = times[0]
        self.odd_at = -math.inf  # when the stamps of frames made no sense for the last time
        self.open()

    def open(self) -> None:
        """Decode from the first frame on."""
        self.container = av.open(str(self.path))
        self.stream = pictures_of(self.container)
        self.stream.thread_type = "AUTO"
        self.stream.codec_context.thread_count = 2
        self.start()

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def start(self) -> None:
        """Decode from where the container stands."""
        self.frames = self.container.decode(self.stream)
        self.now = None  # the frame on show
        self.next = None  # the one after it; None at the end
        self.now_at = self.next_at = -math.inf  # when they are shown, in seconds
        self.count = 0
        self.advance()

    def advance(self) -> None:
        """One frame on."""
        if self.next:
            self.now, self.now_at = self.next, self.next_at
        self.next = None
        with contextlib.suppress(av.FFmpegError):  # what follows the damage is lost
            self.next = next(self.frames, None)
        if not self.next:
            return
        at = self.time(self.next)
        odd = not at >= self.now_at  # it falls, or there is none
        if self.counted:
            counted = self.times[min(self.count, len(self.times) - 1)]
            odd = abs(at - counted) > CLOCK_JUMP  # such as two packets a frame
            at = counted
            self.count += 1
        if odd:
            at = self.odd_at = max(self.now_at, at)
        self.next_at = at

    def time(self, frame) -> float:
        """When a frame is shown by its own stamp, in seconds; not a number if it has none."""
        stamp = frame.pts if frame.pts is not None else frame.dts
        return math.nan if stamp is None else float(stamp * self.stream.time_base)

    def enter(self, t: float) -> None:
        """Decode from a key frame that is not behind t seconds.

        A seek may land behind its target, or between key frames, where half a picture comes out. So
        what it gives is looked at; if need be one tries from earlier, at last from the first frame.
        """
        ahead = 0.0
        while t - ahead > self.times[0]:
            with contextlib.suppress(av.FFmpegError):
                self.container.seek(int((t - ahead) / self.stream.time_base), stream=self.stream)
                self.start()
                if self.next and self.next.key_frame and self.next_at <= t + TOLERANCE:
                    return
            ahead = 2 * ahead + SEEK_FROM
        self.close()
        self.open()

    def picture(self, t: float, height: int, width: int) -> np.ndarray | None:
        """The picture (height, width, 3) uint8 on show at t seconds, None where the file does not
        decode that far."""
        # GIF and its like draw changes onto the picture before: one cannot enter in the middle.
        # Nor can one where frames are counted.
        changes = self.stream.codec_context.name in ("gif", "apng", "webp")
        if t - self.asked > SEEK_FROM and not changes and not self.counted:
            self.enter(t)
        self.asked = t
        while self.next and self.next_at <= t + TOLERANCE:
            self.advance()
        if self.now is None:
            return None
        if not self.next:
            # The last picture stays until the end. One before damage does not stay for what is
            # lost.
            whole = self.times[-1] - self.now_at < 2 * self.gap
            if t >= (self.end if whole else self.now_at + self.gap) + TOLERANCE:
                return None
        return self.fit(self.now, height, width)


def upright_size(frame) -> tuple[int, int]:
    """Height and width of a decoded frame once it is turned as the file says."""
    if round(frame.rotation / 90) % 2:
        return frame.width, frame.height
    return frame.height, frame.width


def mirrored(frame) -> bool:
    """Does the file's display matrix mirror this frame? If so, it is turned upside down before it
    is rotated: the rotation says only where the matrix sends the upper edge."""
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    return a * d < b * c  # x' = a x + c y, y' = b x + d y


def central_crop(h: int, w: int, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred rectangle of shape height : width in a picture of h x w pixels, as left,
    top, right, bottom."""
    scale = min(h / height, w / width)
    x = max(0.0, (w - width * scale) / 2)
    y = max(0.0, (h - height * scale) / 2)
    return x, y, w - x, h - y


def fit_frame(frame, height: int, width: int) -> np.ndarray:
    """A decoded frame, turned upright, its central crop resized to (height, width, 3) uint8."""
    quarters = round(frame.rotation / 90)  # anticlockwise, as Pillow counts them
    picture = frame.to_image()
    if mirrored(frame):
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    picture = picture.rotate(90 * quarters, expand=True)
    box = central_crop(picture.height, picture.width, height, width)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))


def pixels(video: np.ndarray | Tensor) -> Tensor:
    """(..., F, H, W, 3) uint8 -> (..., 3, F, H, W) float32 in [-1, 1]."""
    video = torch.as_tensor(np.asarray(video)).movedim(-1, -4).contiguous()
    return video.float().div_(127.5).sub_(1)


def to_bytes(video: Tensor) -> Tensor:
    """(..., 3, F, H, W) in [-1, 1] -> (..., F, H, W, 3) uint8. What is not a number becomes grey."""
    levels = (video.nan_to_num().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().movedim(-4, -1)
