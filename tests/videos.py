"""Videos whose pixels say which frame they are of: four coloured quarters, the last of which counts.
For pools of clips."""
import json
import struct
from fractions import Fraction

import av
import numpy as np
from PIL import Image

import config
import data
from common import video

# the last one counts the frames
CORNERS = np.array([[[200, 30, 30], [30, 180, 40]], [[40, 60, 210], [0, 0, 0]]])


def pool_cfg(tmp_path, **overrides):
    """A config of 16 small clips whose pool lies in tmp_path/pools."""
    small = dict(frames=4, height=16, width=16, patch=4, world_clips=12, val_clips=4,
                 pool_dir=str(tmp_path / "pools"))
    return config.preset("debug", **{**small, **overrides})


def opened(cfg):
    return data.open_pool(cfg, progress=False)


def windows_in(path, **cut):
    """The windows of a video, cut as `pool_cfg` says but for what is given."""
    small = dict(frames=4, fps=8.0, windows=4, height=16, width=16)
    return video.windows_of(path, video.Cut(**{**small, **cut}))


def clips_in(path, **cut):
    return [window.video for window in windows_in(path, **cut)]


def picture(level, height=48, width=64):
    """Four coloured quarters; the lower right one is grey and tells the frame's number."""
    quarters = CORNERS.copy()
    quarters[1, 1] = level
    return quarters.repeat((height + 1) // 2,
                           0)[:height].repeat((width + 1) // 2, 1)[:, :width].astype(np.uint8)


def movie(path, codec="libx264", pix_fmt="yuv420p", n=12, rate=10, step=10, height=48, width=64, times=None,
          audio=False, noise=False, gop=12, encoder=None, **options):
    """A video whose frame i shows level step * i (mod 250) from i / rate on, or from times[i] seconds on."""
    quality = {"libx264": {"crf": "4"},
               "libvpx-vp9": {"crf": "8", "b": "0", "cpu-used": "8", "deadline": "realtime"}}
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as out:
        settings = {**quality.get(codec, {"qscale": "2"}), **(encoder or {})}
        stream = out.add_stream(codec, rate=rate, options=settings)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.codec_context.gop_size = gop
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio:
            sound = out.add_stream("aac", rate=16000, layout="mono")
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            block.sample_rate = 16000
            for i in range(40):  # longer than the pictures
                block.pts = 1024 * i
                out.mux(sound.encode(block))
            out.mux(sound.encode())
        for i in range(n):
            pixels = picture(step * i % 250, height, width)
            if noise:  # so that the file has bytes to lose
                pixels[:height // 2] = rng.integers(0, 256, (height // 2, width, 3))
            if pix_fmt == "gray":  # grey video holds luma from 16 to 235
                pixels = np.round(16 + 219 / 255 * pixels @ [.299, .587, .114]).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pix_fmt == "gray" else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def gif(path, durations, step=10, height=48, width=64):
    frames = [Image.fromarray(picture(step * i % 250, height, width)) for i in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def turn(path, how):
    """Write a clockwise turn, or another display matrix (a, b, c, d), into an mp4's track header, as phones do
    (ISO 14496-12: x' = ax + cy, y' = bx + dy)."""
    turns = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = turns.get(how, how)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    raw[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


def annotate(folder, captions):
    (folder / "captions.json").write_text(json.dumps(captions))


def quarters_of(clip):
    """(F, H, W, 3) -> (F, 2, 2, 3): mean colour inside each quarter, borders left out."""
    f, h, w, _ = clip.shape
    return clip.reshape(f, 2, h // 2, 2, w // 2, 3)[:, :, 2:-2, :, 2:-2].mean((2, 4))


def counts(clip, step=10):
    return np.round(quarters_of(clip)[:, 1, 1].mean(-1) / step).astype(int).tolist()
