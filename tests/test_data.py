"""data.py: both sources against pixels, counters and masks that the tests make themselves."""
import concurrent.futures
import itertools
import json
import resource
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import common.files
import common.video
import physics.phenomena
import data
import world
from config import Stopped, UserError, preset

CORNERS = np.array([[[200, 30, 30], [30, 180, 40]], [[40, 60, 210], [0, 0, 0]]])  # the last one counts the frames


def cfg_of(tmp_path, **overrides):
    small = dict(frames=4, height=16, width=16, patch=4, world_clips=12, val_clips=4, pool_dir=str(tmp_path / "pools"))
    return preset("debug", **{**small, **overrides})


def opened(cfg):
    return data.open_pool(cfg, progress=False)


# ----------------------------------------------------------------------------------------------------------- real media
def picture(level, height=48, width=64):
    """Four coloured quarters; the lower right one is grey and tells the frame's number."""
    quarters = CORNERS.copy()
    quarters[1, 1] = level
    return quarters.repeat((height + 1) // 2, 0)[:height].repeat((width + 1) // 2, 1)[:, :width].astype(np.uint8)


def movie(path, codec="libx264", pix_fmt="yuv420p", n=12, rate=10, step=10, height=48, width=64, times=None,
          audio=False, noise=False, gop=12, **options):
    """A video whose frame i shows level step * i (mod 250) from i / rate on, or from times[i] seconds on."""
    quality = {"libx264": {"crf": "4"}, "libvpx-vp9": {"crf": "8", "b": "0", "cpu-used": "8", "deadline": "realtime"}}
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=rate, options=quality.get(codec, {"qscale": "2"}))
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


def turn(path, degrees):
    """Write a clockwise turn into an mp4's track header, as phones do (ISO 14496-12: x' = ax + cy, y' = bx + dy)."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
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


SHAPES = {  # file -> how it is made, and the first four frames' numbers at 8 frames a second
    "h264.mp4": (dict(), [0, 1, 2, 3]),  # k / 8 s at 10 frames a second: 0, 1.25, 2.5, 3.75
    "sixty.mp4": (dict(rate=60, n=30, step=8), [0, 7, 15, 22]),
    "mpeg4.mp4": (dict(codec="mpeg4"), [0, 1, 2, 3]),
    "xvid.avi": (dict(codec="mpeg4"), [0, 1, 2, 3]),
    "vp9.webm": (dict(codec="libvpx-vp9"), [0, 1, 2, 3]),
    "vertical.mp4": (dict(height=90, width=30), [0, 1, 2, 3]),
    "wide.webm": (dict(codec="libvpx-vp9", height=32, width=128), [0, 1, 2, 3]),
    "odd.mp4": (dict(pix_fmt="yuv444p", height=37, width=51), [0, 1, 2, 3]),
    "deep.mp4": (dict(pix_fmt="yuv420p10le"), [0, 1, 2, 3]),
    "grey.mp4": (dict(pix_fmt="gray"), [0, 1, 2, 3]),
    "alpha.mkv": (dict(codec="ffv1", pix_fmt="bgra"), [0, 1, 2, 3]),
    "sound.mp4": (dict(audio=True), [0, 1, 2, 3]),
    "tiny.mp4": (dict(height=8, width=10, pix_fmt="yuv444p"), [0, 1, 2, 3]),
}


def test_every_shape_of_video_gives_its_pixels_at_its_times(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, (how, _) in SHAPES.items():
        movie(folder / name, **{"n": 8, **how})
    gif(folder / "odd.gif", [70, 130, 90, 30, 210, 60, 40, 200], height=35, width=41)
    expected = {**{name: want for name, (_, want) in SHAPES.items()}, "odd.gif": [0, 1, 2, 4]}
    annotate(folder, {name: name for name in expected})
    pool = opened(cfg_of(tmp_path, data_dir=str(folder), windows=1))
    assert sorted(pool.captions) == sorted(expected) and "skipped" not in pool.summary
    for clip, name in zip(pool.video, pool.captions):
        step = SHAPES.get(name, ({},))[0].get("step", 10)
        assert counts(clip, step) == expected[name], name
        colours = CORNERS.reshape(4, 3)[:3].astype(float)
        if name == "grey.mp4":
            colours = np.repeat(colours @ [[.299], [.587], [.114]], 3, 1)
        assert np.abs(quarters_of(clip).reshape(-1, 4, 3)[:, :3] - colours).max() < 12, name


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_metadata_is_honoured(tmp_path, degrees):
    path = tmp_path / "turned.mp4"
    movie(path, height=64, width=48)
    upright, = common.video.read_windows(path, cfg_of(tmp_path, windows=1))
    turn(path, degrees)
    turned, = common.video.read_windows(path, cfg_of(tmp_path, windows=1))
    want = np.rot90(quarters_of(upright), -degrees // 90, axes=(1, 2))  # quarter turns clockwise
    assert np.abs(quarters_of(turned) - want).max() < 3
    assert np.abs(quarters_of(turned) - quarters_of(upright)).max() > 100


def test_crop_is_central_and_covers(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40, 0] = np.arange(20) * 12  # the central square holds a ramp
    frame = av.VideoFrame.from_ndarray(wide, format="rgb24")
    assert np.array_equal(common.video.fit(frame, 20, 20), wide[:, 20:40])
    tall = common.video.fit(av.VideoFrame.from_ndarray(wide.transpose(1, 0, 2).copy(), format="rgb24"), 10, 20)
    assert np.array_equal(tall[:, 0, 0] // 12, np.arange(5, 15))


def test_a_window_says_where_it_was(tmp_path):
    movie(tmp_path / "long.mp4", n=60, height=48, width=64)
    first, second, third = common.video.windows_of(tmp_path / "long.mp4", cfg_of(tmp_path, windows=3))  # 6 s hold twelve of half a second
    assert [w.start for w in (first, second, third)] == [1.0, 3.0, 5.0] and [w.number for w in (first, second, third)] == [0, 1, 2]
    assert second.taken == 3 and second.size == (48, 64) and second.crop == (8, 0, 56, 48)
    turn(tmp_path / "long.mp4", 90)
    turned = common.video.windows_of(tmp_path / "long.mp4", cfg_of(tmp_path, windows=1))[0]
    assert turned.size == (64, 48) and turned.crop == (0, 8, 48, 56)


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = common.video.fit(av.VideoFrame.from_ndarray(stripes, format="rgb24"), 16, 16)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 4


def test_variable_frame_rate_follows_time_stamps(tmp_path):
    shown = [0, .05, .26, .30, .62, .70, .71, 1.3]
    for name, codec in (("v.mp4", "libx264"), ("v.webm", "libvpx-vp9")):
        movie(tmp_path / name, codec, n=8, step=30, times=shown)
        clip, = common.video.read_windows(tmp_path / name, cfg_of(tmp_path, windows=1, frames=8))
        assert counts(clip, 30) == [np.searchsorted(shown, k / 8 + .001, "right") - 1 for k in range(8)], name


def test_time_stamps_rounded_to_milliseconds_lose_no_frame(tmp_path):
    movie(tmp_path / "thirty.webm", "libvpx-vp9", n=24, rate=30)
    clip, = common.video.read_windows(tmp_path / "thirty.webm", cfg_of(tmp_path, windows=1, frames=24, fps=30.0))
    assert counts(clip) == list(range(24))


def test_windows_follow_each_other_and_are_spread(tmp_path):
    movie(tmp_path / "long.mp4", n=43, rate=8, step=5)  # ten windows of four frames, three frames are left over
    every = common.video.read_windows(tmp_path / "long.mp4", cfg_of(tmp_path, windows=99))
    assert [counts(clip, 5) for clip in every] == np.arange(40).reshape(10, 4).tolist()
    three = common.video.read_windows(tmp_path / "long.mp4", cfg_of(tmp_path, windows=3))
    assert [counts(clip, 5)[0] for clip in three] == [4, 20, 32]  # the windows 1, 5 and 8


@pytest.mark.parametrize("name, codec", [
    ("s.mp4", "libx264"), ("s.webm", "libvpx-vp9"), ("s.avi", "mpeg4"), ("s.gif", "")])
def test_long_videos_are_entered_in_the_middle_where_possible(tmp_path, monkeypatch, name, codec):
    if codec:
        movie(tmp_path / name, codec, n=480, rate=8, height=32, width=32)
    else:
        gif(tmp_path / name, [120] * 500, height=32, width=32)  # a GIF holds changes only: it is walked through
    steps, advance = [], common.video.Player.advance
    monkeypatch.setattr(common.video.Player, "advance", lambda self: (steps.append(1), advance(self)))
    clips = common.video.read_windows(tmp_path / name, cfg_of(tmp_path, windows=2))
    for clip, start in zip(clips, (120, 360), strict=True):
        rate = 8 if codec else 1 / .12
        assert counts(clip) == [int((start + k) / 8 * rate + .01) % 25 for k in range(4)]
    assert (len(steps) < 150) == bool(codec)


def test_damaged_files_give_the_windows_that_decode(tmp_path):
    for name, codec, options in (("cut.webm", "libvpx-vp9", {}), ("cut.mp4", "libx264", {"movflags": "faststart"})):
        path = tmp_path / name
        movie(path, codec, n=40, rate=8, step=5, noise=True, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[:int(len(whole) * .6)])
        starts = [counts(clip, 5) for clip in common.video.read_windows(path, cfg_of(tmp_path, windows=99))]
        assert 3 <= len(starts) <= 7 and starts == np.arange(4 * len(starts)).reshape(-1, 4).tolist(), name


def test_bad_files_are_skipped_counted_named_and_silent(tmp_path, capfd):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "good.mp4")
    movie(folder / "good2.mp4")
    movie(folder / "one.mp4", n=1)
    gif(folder / "one.gif", [100])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "half.mp4").write_bytes((folder / "good.mp4").read_bytes()[:900])
    noisy = bytearray((folder / "good.mp4").read_bytes())
    noisy[60:400] = bytes(range(170)) * 2
    (folder / "scrambled.mp4").write_bytes(noisy)
    (folder / "folder.mp4").mkdir()
    with av.open(str(folder / "sound.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.sample_rate = 16000
        out.mux(sound.encode(block))
        out.mux(sound.encode())
    annotate(folder, {name: "a caption" for name in (
        "good.mp4", "one.mp4", "one.gif", "zero.mp4", "text.mp4", "half.mp4", "sound.mp4", "nowhere.mp4", "folder.mp4")}
        | {"good2.mp4": "another", "scrambled.mp4": "scrambled", "empty.mp4": " "})
    pool = data.open_pool(cfg_of(tmp_path, data_dir=str(folder), windows=1))
    out, err = capfd.readouterr()
    assert out.strip().splitlines()[-1] == pool.summary
    assert not [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "reading videos" not in line]
    usable = 3 if "scrambled" in pool.captions else 2
    assert f"{usable} clips from {usable} videos" in pool.summary and f"skipped {12 - usable}:" in pool.summary
    folder_again = common.video.Folder(cfg_of(tmp_path, data_dir=str(folder), windows=1))
    list_of_all = folder_again.skipped + [f"{v.name} ({c})" for v, c in folder_again.read() if isinstance(c, str)]
    reasons = dict(entry[:-1].split(" (", 1) for entry in list_of_all)
    assert reasons["zero.mp4"] == "empty file" and reasons["nowhere.mp4"] == "missing" == reasons["folder.mp4"]
    assert reasons["one.mp4"].startswith("too short") and reasons["one.gif"].startswith("too short")
    assert reasons["sound.mp4"] == "no picture in it" and reasons["empty.mp4"] == "no caption"
    assert "Invalid data" in reasons["text.mp4"] and "Invalid data" in reasons["half.mp4"]


def test_long_lists_of_bad_files_are_cut():
    assert common.files.listed(map(str, range(11))) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert common.files.listed(["\ud800"]) == "?"  # JSON may hold half a surrogate pair, a terminal may not


def test_none_left_stops_with_one_sentence_and_leaves_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "zero.mp4").write_bytes(b"")
    for captions, words in (({"zero.mp4": "a"}, "skipped 1: zero.mp4 (empty file)"),
                            ({}, "the annotations name no video")):
        annotate(folder, captions)
        with pytest.raises(UserError, match="No clip could be made") as error:
            opened(cfg_of(tmp_path, data_dir=str(folder)))
        assert words in str(error.value) and "\n" not in str(error.value)
        assert list((tmp_path / "pools").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- annotations
def folder_of(tmp_path, annotations, names=("a.mp4",)):
    folder = tmp_path / "videos"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    file = tmp_path / "annotations.json"
    file.write_text(annotations if isinstance(annotations, str) else json.dumps(annotations), encoding="utf-8-sig")
    return common.video.Folder(cfg_of(tmp_path, data_dir=str(folder), annotations=str(file)))


def names_of(indices):
    return [(*physics.phenomena.CATEGORIES, *common.video.OTHER_SLOTS)[i] for i in indices]


FLAT = {"phys_law": "stress", "n0": "soil: 1.2 to 1.6 g/cm3", "file": "a.mp4", "label": "Deformation ",
        "q0": "Deformation, collision", "q1": "no obvious thermodynamic phenomenon.", "q2": "scattering", "q3": "no",
        "q4": "1. object decomposition and splitting\n2. liquid objects appearance\n3. no change",
        "en_caption": "the long one", "en_caption_1": "short"}
FLAT_NAMES = ["collision", "deformation", "scattering", "no obvious thermodynamic phenomenon", "camera motion no",
              "liquids objects appearance", "object decomposition and splitting", "no change"]


@pytest.mark.parametrize("shape", ["list", "data", "nested"])
def test_wisa_records(tmp_path, shape):
    answers = {key: value for key, value in FLAT.items() if key[0] in "qn"}
    nested = {"captions": "the long one", "video_id": "a", "file": None, "physical_annotation": answers}
    folder = folder_of(tmp_path, {"list": [FLAT], "data": {"data": [FLAT]}, "nested": [nested]}[shape])
    video, = folder.videos.values()
    assert video.caption == "the long one" and video.path.name == "a.mp4"
    assert names_of(video.categories) == FLAT_NAMES and not folder.unknown and not folder.skipped


WISA = [  # the answers of WISA's three published examples, and their collection category
    (dict(q0="deformation, collision", q1="no obvious thermodynamic phenomenon.", q2="scattering", q3="no",
          q4="1. object decomposition and splitting\n2. gas objects appearance\n3. no change", label="Deformation "),
     ["collision", "deformation", "scattering", "no obvious thermodynamic phenomenon", "camera motion no", "gas objects appearance",
      "object decomposition and splitting", "no change"]),
    (dict(q0="liquid motion, deformation", q1="solidification, melting", q2="reflection, refraction", q3="no",
          q4="1. liquid objects appearance\n2. solid objects appearance\n3. object decomposition and splitting\n4. no change",
          label="Solidification"),
     ["liquid motion", "deformation", "melting", "solidification", "reflection", "refraction", "camera motion no", "liquids objects appearance",
      "solid objects appearance", "object decomposition and splitting", "no change"]),
    (dict(q0="liquid motion, deformation", q1="no obvious thermodynamic phenomenon.", q2="no obvious optical phenomenon", q3="no",
          q4="1. liquids objects appearance\n2. no change", label="Solid Objects Appearance"),
     ["liquid motion", "deformation", "no obvious thermodynamic phenomenon", "no obvious optical phenomenon", "camera motion no",
      "liquids objects appearance", "no change"]),
]


@pytest.mark.parametrize("answers, names", WISA)
def test_wisas_published_answers_parse_without_a_guess(answers, names):
    known, unknown = common.video.parse_labels(answers)
    assert sorted(names_of(known)) == sorted(names) and unknown == []
    seventeen = [name for name in names_of(known) if name in data.category_names(preset("debug"))]
    assert seventeen == [name for name in physics.phenomena.CATEGORIES if name in names]


def test_captions_long_or_short_with_or_without_the_law(tmp_path):
    folder = folder_of(tmp_path, [FLAT, {"file": "b.mp4", "caption": "the only one"}, {"file": "c.mp4", "en_caption": "long alone"}],
                       names=("a.mp4", "b.mp4", "c.mp4"))

    def read(*how):
        again = common.video.Folder(folder.cfg, *how)
        return [video.caption for video in again.videos.values()], again.skipped

    assert read() == read("long", False) == (["the long one", "the only one", "long alone"], [])
    assert read("long", True) == (["the long one stress", "the only one", "long alone"], [])
    assert read("short", False) == (["short", "the only one"], ["c.mp4 (no caption)"])
    assert read("short", True) == (["short stress", "the only one"], ["c.mp4 (no caption)"])


def test_labels_match_as_whole_names_only():
    known, unknown = common.video.parse_labels({
        "q0": "rigid-body motion; no collision, 2) Elastic Motions", "q1": ["melting", "vaporisation"],
        "q2": "interference and diffraction\nunnatural light source. reflection", "q3": "Yes.",
        "q4": "1. no change 2. yes"})
    assert names_of(known) == ["rigid body motion", "elastic motion", "melting", "interference and diffraction",
                               "camera motion yes", "no change"]
    assert unknown == ["no collision", "vaporisation", "unnatural light source. reflection", "yes"]
    assert len(common.video.LABELS) == 29


def test_unknown_labels_are_counted_in_the_summary(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4")
    movie(folder / "b.mp4", n=13)
    records = [{"file": name, "caption": "c", "q0": "levitation, collision"} for name in ("a.mp4", "b.mp4")]
    (folder / "captions.json").write_text(json.dumps(records))
    pool = opened(cfg_of(tmp_path, data_dir=str(folder)))
    assert "1 unknown category names: 'levitation' (2)" in pool.summary
    assert pool.categories == [[0]] * len(pool.categories)


def test_plain_captions_have_no_categories_and_no_targets(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4")
    annotate(folder, {"a.mp4": "a collision with melting"})
    cfg = cfg_of(tmp_path, data_dir=str(folder))
    pool = opened(cfg)
    clips = data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions))
    batch = clips.batch(range(3))
    assert batch.categories.sum() == batch.target.sum() == batch.target_mask.sum() == 0
    assert clips.categories_present == []
    assert batch.target.shape == (3, 2 * 4 * 4, 17)


def test_records_that_cannot_be_used_are_named(tmp_path):
    folder = folder_of(tmp_path, [
        {"file": "a.mp4", "caption": "fine"}, {"file": "./a.mp4", "caption": "again"}, {"file": "a.mp4"},
        {"caption": "no file"}, 7, {"file": "b.mp4", "caption": "b"}, {"video_id": 12, "caption": "number"},
        {"file": 3.5, "caption": ["x"]}, {"file": "nul\0.mp4", "caption": "b"},
        {"file": "elsewhere.mp4", "video_id": "second", "caption": [" listed ", "2"]}], names=("a.mp4", "second.webm"))
    assert [v.caption for v in folder.videos.values()] == ["fine", "listed"]
    assert folder.skipped == [
        "./a.mp4 (named twice)", "a.mp4 (no caption)", "record 4 (names no file)", "record 5 (not an object)",
        "b.mp4 (missing)", "12 (missing)", "record 8 (names no file)", "nul\0.mp4 (missing)"]


def test_paths_that_leave_the_folder_are_refused(tmp_path):
    outside = tmp_path / "outside.mp4"
    movie(outside)
    names = ["../outside.mp4", str(outside), "inner/../../outside.mp4", "..", "inner/../a.mp4"]
    folder = folder_of(tmp_path, {name: "c" for name in names})
    assert [video.path.name for video in folder.videos.values()] == ["a.mp4"]
    assert folder.skipped == [f"{name} (outside the folder)" for name in names[:4]]


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"), ("[" * 100000, "is not JSON"), ("3", "another shape"), ('"a"', "another shape"),
    ("[1, 2]", "another shape"), ('{"a.mp4": 1}', "another shape"), ('{"data": 3}', "another shape"),
    ("null", "another shape")])
def test_annotations_of_another_kind_are_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as error:
        folder_of(tmp_path, text)
    assert "annotations.json" in str(error.value) and "{file: caption}" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_annotations_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no folder of videos .*nowhere"):
        opened(cfg_of(tmp_path, data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="captions.json .*--annotations FILE.*WISA"):
        opened(cfg_of(tmp_path, data_dir=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="cannot be read"):
        opened(cfg_of(tmp_path, data_dir=str(tmp_path / "empty"), annotations=str(tmp_path)))


def test_whole_videos_are_held_out_whatever_the_seed(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(30):
        gif(folder / f"{i}.gif", [130] * (8 + i % 9), height=16, width=16)
    annotate(folder, {f"{i}.gif": f"video {i}" for i in range(30)})
    cfg = cfg_of(tmp_path, data_dir=str(folder), val_clips=50)
    pool = opened(cfg)
    train, held = ({pool.captions[row] for row in rows} for rows in (pool.train, pool.held))
    assert len(held) == 2 and not train & held and len(train | held) == 30  # one in twenty, rounded
    assert sorted(pool.train + pool.held) == list(range(len(pool.captions)))
    again = opened(cfg_of(tmp_path, data_dir=str(folder), val_clips=50, seed=7))
    assert again.held == pool.held
    one = opened(cfg_of(tmp_path, data_dir=str(folder), val_clips=1))
    assert len(one.held) == 1 and not set(one.train) & {row for row, c in enumerate(one.captions) if c in held}


def test_a_single_video_serves_both_and_says_so(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4", n=20)
    annotate(folder, {"a.mp4": "c"})
    pool = opened(cfg_of(tmp_path, data_dir=str(folder), val_clips=3))
    assert pool.train == [0, 1, 2, 3] and pool.held == [0, 1, 2] and "a single one" in pool.summary


def test_changed_videos_are_read_again(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4", n=8, step=10)
    annotate(folder, {"a.mp4": "c"})
    cfg = cfg_of(tmp_path, data_dir=str(folder), windows=1)
    assert counts(opened(cfg).video[0]) == [0, 1, 2, 3]
    movie(folder / "a.mp4", n=6, step=20)
    assert counts(opened(cfg).video[0], 20) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------ the pool
def test_world_pool_holds_the_worlds_clips(tmp_path):
    cfg = cfg_of(tmp_path, world_seed=3, two=1.0)
    pool = opened(cfg)
    assert pool.train == list(range(12)) and pool.held == [12, 13, 14, 15] and pool.video.dtype == np.uint8
    for row, index in enumerate([*range(12), *range(data.HELD_OUT, data.HELD_OUT + 4)]):
        clip = world.make_clip(3, index, frames=4, height=16, width=16, decoys=cfg.decoys, two=1.0)
        assert np.array_equal(pool.video[row], clip.video) and pool.captions[row] == clip.caption
        assert pool.categories[row] == sorted(set(clip.categories))
        for slot, category in enumerate(pool.mask_category[row]):
            nothing = np.zeros((4, 16, 16), bool)
            union = np.any([nothing] + [actor.mask for actor in clip.actors if actor.category == category], axis=0)
            bits = np.unpackbits(pool.masks[row, slot])[:4 * 16 * 16].reshape(4, 16, 16)
            assert np.array_equal(bits, union)
    with pytest.raises(ValueError):
        pool.video[0] = 0  # read-only


def test_pool_is_named_by_what_shapes_it(tmp_path):
    def built(**overrides):
        opened(cfg_of(tmp_path, world_clips=2, val_clips=1, **overrides))
        return {path.name for path in (tmp_path / "pools").iterdir()}

    first = built()
    assert len(first) == 1
    assert built(seed=5, lr=1.0, batch_size=3, patch=8, categories=29, threads=2, out_dir="x") == first
    seen = first
    for change in (dict(world_seed=1), dict(frames=6), dict(height=32), dict(width=32), dict(decoys=0.1), dict(two=0.1),
                   dict(colour_cues=True), dict(ood="speed")):
        now = built(**change)
        assert len(now) == len(seen) + 1, change
        seen = now
    opened(cfg_of(tmp_path, world_clips=3, val_clips=1))
    opened(cfg_of(tmp_path, world_clips=2, val_clips=2))
    assert len(list((tmp_path / "pools").iterdir())) == len(seen) + 2


def test_an_existing_pool_is_not_built_again(tmp_path, monkeypatch):
    cfg = cfg_of(tmp_path)
    opened(cfg)
    monkeypatch.setattr(data.World, "fill", lambda *_: pytest.fail("built again"))
    opened(cfg)


def break_video(path):
    (path / "video.u8").write_bytes((path / "video.u8").read_bytes()[:-1])


def break_masks(path):
    (path / "masks.u8").unlink()


def break_meta(path):
    (path / "meta.json").write_text((path / "meta.json").read_text()[:-40])


def change_meta(**entries):
    def change(path):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps({**meta, **entries}))
    return change


@pytest.mark.parametrize("harm", [
    break_video, break_masks, break_meta, change_meta(train=[99]), change_meta(train=[]), change_meta(captions=3),
    change_meta(categories=[[77]] * 16), change_meta(mask_category=[[0, 99]] * 16), change_meta(held="no")])
def test_a_broken_pool_is_built_again(tmp_path, harm):
    cfg = cfg_of(tmp_path)
    video = opened(cfg).video[:].copy()
    path, = (tmp_path / "pools").iterdir()
    harm(path)
    assert data.Pool.open(path, (4, 16, 16)) is None
    assert np.array_equal(opened(cfg).video, video) and list((tmp_path / "pools").iterdir()) == [path]


def test_half_built_pools_are_ignored_and_cleaned(tmp_path):
    cfg = cfg_of(tmp_path)
    opened(cfg)
    path, = (tmp_path / "pools").iterdir()
    path.rename(path.with_name(path.name + ".dead"))  # as a build killed just before its renaming leaves it
    other = tmp_path / "pools" / "world-000000000000.live"
    other.mkdir()
    opened(cfg)
    assert {p.name for p in (tmp_path / "pools").iterdir()} == {path.name, other.name}


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def dies(self, add, progress):
        add(np.zeros((4, 16, 16, 3), np.uint8), "half", [0], {})
        raise KeyboardInterrupt

    monkeypatch.setattr(data.World, "fill", dies)
    with pytest.raises(KeyboardInterrupt):
        opened(cfg_of(tmp_path))
    assert list((tmp_path / "pools").iterdir()) == []


def test_two_runs_build_once(tmp_path, monkeypatch, capsys):
    import fcntl
    cfg, built, fill, flock = cfg_of(tmp_path), [], data.World.fill, fcntl.flock
    begun, waits = threading.Event(), threading.Event()

    def slow(self, add, progress):
        built.append(1)
        begun.set()
        assert waits.wait(60)  # the second run stands before the lock while the first still builds
        return fill(self, add, progress)

    def seen(handle, how):
        if not how & fcntl.LOCK_NB:
            waits.set()
        return flock(handle, how)

    monkeypatch.setattr(data.World, "fill", slow)
    monkeypatch.setattr("fcntl.flock", seen)
    with concurrent.futures.ThreadPoolExecutor(2) as runs:
        first = runs.submit(opened, cfg)
        assert begun.wait(60)
        second = runs.submit(opened, cfg)
        assert np.array_equal(first.result().video, second.result().video)
    assert len(built) == 1 and "waiting for it" in capsys.readouterr().out


def test_without_locks_pools_are_built_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(37, "No locks available")  # some network drives

    monkeypatch.setattr("fcntl.flock", refuses)
    (tmp_path / "pools").mkdir()
    cfg = cfg_of(tmp_path)
    opened(cfg)
    path, = (tmp_path / "pools").iterdir()
    break_video(path)
    beside = path.with_name(path.name + ".other")  # perhaps another run's, still being filled: it must be left alone
    beside.mkdir()
    assert len(opened(cfg).captions) == 16 and beside.is_dir()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # writing more fails, as on a full disk
    try:
        with pytest.raises(Stopped, match="could not be written") as error:
            opened(cfg_of(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value) and list((tmp_path / "pools").iterdir()) == []


def test_a_place_that_cannot_hold_clips_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--pool_dir .* cannot hold clips"):
        opened(cfg_of(tmp_path, pool_dir=str(tmp_path / "file")))


def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    def dies(self, indices):
        raise concurrent.futures.BrokenExecutor("died")
        yield

    monkeypatch.setattr(data.World, "draw", dies)
    with pytest.raises(Stopped, match="drawing clips died"):
        opened(cfg_of(tmp_path))


def test_many_processes_draw_the_same_clips_without_the_main_script(tmp_path):
    script = tmp_path / "script.py"  # no `if __name__ == "__main__"`: importing it again would start all over again
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
open({str(tmp_path / 'imported')!r}, "a").write("once ")
import data
from config import preset
data.POOL_FROM = 20
cfg = preset("debug", frames=4, height=16, width=16, world_clips=150, val_clips=2, threads=2,
             pool_dir={str(tmp_path / 'pools')!r})
data.open_pool(cfg, progress=False)
""")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0 and not result.stderr and (tmp_path / "imported").read_text() == "once "
    path, = (tmp_path / "pools").iterdir()
    pool = data.Pool.open(path, (4, 16, 16))
    for row in (0, 31, 32, 149):
        assert np.array_equal(pool.video[row], world.make_clip(0, row, frames=4, height=16, width=16).video)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the workers under /proc")
def test_a_killed_build_leaves_no_process_and_nothing_that_is_opened(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(data.__file__).parent)!r})
import data
from config import preset
data.open_pool(preset("debug", world_clips=99_999, threads=2, pool_dir={str(tmp_path / 'pools')!r}), progress=False)
""")
    run = subprocess.Popen([sys.executable, script])
    try:
        videos = (tmp_path / "pools").glob
        part = wait_for(lambda: [p for p in videos("world-*/video.u8") if p.stat().st_size])[0].parent
        workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    finally:
        run.kill()
        run.wait()
    assert len(workers) >= 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert part.suffix and data.Pool.open(part, (4, 16, 16)) is None


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return answer


def test_reading_ahead_is_in_order_and_bounded():
    begun = []
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        results = common.files.ahead(executor, lambda i: begun.append(i) or i, list(range(20)), group=3)
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        executor.submit(int).result()
        assert len(begun) <= 9
        assert list(results) == list(range(4, 20))


# ----------------------------------------------------------------------------------------------------------- the stream
@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    cfg = cfg_of(tmp_path_factory.mktemp("stream"), caption_dropout=0.3, two=0.5)
    pool = opened(cfg)
    return cfg, pool, data.Tokenizer.from_captions(pool.captions)


TENSORS = ("video", "text", "text_length", "categories", "target", "target_mask", "index")


def same(a, b):
    return a.caption == b.caption and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def test_every_epoch_shows_every_clip_once_in_a_new_order(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    epochs = [[clips.row(p) for p in range(12 * e, 12 * e + 12)] for e in range(4)]
    assert all(sorted(epoch) == pool.train for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    other = data.Clips(cfg_of(Path(cfg.pool_dir).parent, seed=1), pool, tokenizer)
    assert [other.row(p) for p in range(12)] != epochs[0]


def test_a_batch_depends_on_its_positions_only(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    for start in range(0, 40, 8):
        clips.batch(range(start, start + 8))
    restarted = data.Clips(cfg, pool, tokenizer).batch(range(8, 18))  # lies across two epochs
    assert same(restarted, clips.batch(range(8, 18)))
    for i, position in enumerate(range(8, 18)):
        alone = clips.batch([position])
        for name in TENSORS:
            assert torch.equal(getattr(alone, name)[0], getattr(restarted, name)[i]), name
    assert restarted.index.tolist() == list(range(8, 18))


def test_batch_holds_the_clip(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    batch = clips.batch(range(5))
    for i in range(5):
        row = clips.row(i)
        pixels = torch.from_numpy(pool.video[row] / np.float32(127.5) - 1)
        assert torch.equal(batch.video[i], pixels.permute(3, 0, 1, 2))
        assert batch.caption[i] == pool.captions[row]
        assert batch.categories[i].nonzero().flatten().tolist() == pool.categories[row]
        if batch.text_length[i]:
            ids, n = tokenizer.encode(pool.captions[row], 24)
            assert torch.equal(batch.text[i], ids) and batch.text_length[i] == n
    assert batch.video.dtype == torch.float32 and batch.video.is_contiguous()
    assert batch.text.dtype == batch.text_length.dtype == batch.index.dtype == torch.int64


def test_bytes_become_minus_one_to_one(stream):
    cfg, pool, tokenizer = stream
    extremes = data.replace(pool, video=np.stack([np.full((4, 16, 16, 3), value, np.uint8) for value in (0, 255) * 8]))
    video = data.Clips(cfg, extremes, tokenizer).batch(range(12)).video
    assert set(video.unique().tolist()) == {-1.0, 1.0}


def test_caption_dropout_is_decided_by_seed_and_position(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    dropped = [clips.batch(range(s, s + 100)).text_length == 0 for s in range(0, 1500, 100)]
    share = torch.cat(dropped).float().mean()
    assert abs(share - 0.3) < 0.04
    assert torch.equal(clips.batch(range(450, 550)).text_length == 0, torch.cat([dropped[4][50:], dropped[5][:50]]))
    batch = clips.batch(range(100))
    assert not batch.text[batch.text_length == 0].any() and batch.text[batch.text_length > 0].any(1).all()
    other = data.Clips(data.replace(cfg, seed=1), pool, tokenizer).batch(range(100))
    assert not torch.equal(other.text_length == 0, batch.text_length == 0)
    never = data.Clips(data.replace(cfg, caption_dropout=0.0), pool, tokenizer).batch(range(100))
    assert (never.text_length > 0).all()


def test_held_out_is_never_trained_on_and_keeps_its_captions(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(data.replace(cfg, caption_dropout=1.0), pool, tokenizer)
    held = clips.held_out()
    assert held.caption == [pool.captions[row] for row in pool.held]
    assert held.index.tolist() == [0, 1, 2, 3] and (held.text_length > 0).all()
    trained = {clips.row(p) for p in range(36)}
    assert not trained & set(pool.held)


def test_present_categories_are_those_of_the_training_clips(stream):
    cfg, pool, tokenizer = stream
    present = sorted({c for row in pool.train for c in pool.categories[row]})
    assert data.Clips(cfg, pool, tokenizer).categories_present == present


def test_29_categories_by_switch(stream):
    cfg, pool, tokenizer = stream
    wide = data.replace(cfg, categories=29)
    names = data.category_names(wide)
    assert len(set(names)) == 29 and names[:17] == data.category_names(cfg) == physics.phenomena.CATEGORIES
    with_slots = data.replace(pool, categories=[[*c, 28] for c in pool.categories])
    batch = data.Clips(wide, with_slots, tokenizer).batch(range(4))
    assert batch.categories[:, 28].all() and batch.target_mask.shape[-1] == 29 and not batch.target_mask[..., 17:].any()
    narrow = data.Clips(cfg, with_slots, tokenizer).batch(range(4))
    assert torch.equal(narrow.categories, batch.categories[:, :17])
    assert torch.equal(narrow.target, batch.target[..., :17])


def test_long_captions_are_cut_and_counted(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(data.replace(cfg, text_len=6), pool, tokenizer)
    assert clips.cut == sum(len(c.replace(".", " ").replace(",", " ").split()) > 6 for c in pool.captions) > 0
    assert clips.held_out().text.shape == (4, 6) and clips.held_out().text_length.max() == 6
    assert data.Clips(data.replace(cfg, text_len=200), pool, tokenizer).cut == 0


def test_batch_moves_whole(stream):
    cfg, pool, tokenizer = stream
    batch = data.Clips(cfg, pool, tokenizer).batch(range(2))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS) and moved.caption == batch.caption
    assert batch.video.device.type == "cpu"


# -------------------------------------------------------------------------------------------------------------- targets
@pytest.mark.parametrize("size, grid", [
    ((4, 8, 6), (2, 2, 3)), ((5, 7, 9), (2, 3, 4)), ((3, 4, 5), (7, 4, 6)), ((4, 6, 6), (4, 6, 6))])
def test_resample_is_the_area_average(size, grid):
    maps = torch.rand(2, 3, *size, dtype=torch.float64)
    want = torch.zeros(2, 3, *grid, dtype=torch.float64)
    for cell in itertools.product(*map(range, grid)):
        for pixel in itertools.product(*map(range, size)):  # overlap along each axis, in cells
            share = 1.0
            for i, j, n, m in zip(pixel, cell, size, grid):
                share *= max(0.0, min((i + 1) * m / n, j + 1) - max(i * m / n, j))
            want[(..., *cell)] += share * maps[(..., *pixel)]
    got = data.resample(maps, grid)
    assert got.shape == want.shape and torch.allclose(got, want, atol=1e-6)
    assert torch.allclose(data.resample(torch.ones(size), grid), torch.ones(grid))


def fake_pool(tmp_path, monkeypatch, masks, categories, **overrides):
    """A pool whose every clip has these masks."""
    actors = [SimpleNamespace(category=c, mask=m) for c, m in zip(categories, masks)]
    video = np.zeros((4, 16, 16, 3), np.uint8)
    clip = SimpleNamespace(video=video, caption="c", actors=actors, categories=list(categories))
    monkeypatch.setattr(world, "make_clip", lambda *_, **__: clip)
    cfg = cfg_of(tmp_path, world_clips=2, val_clips=1, **overrides)
    return data.Clips(cfg, opened(cfg), data.Tokenizer(["c"])).batch([0])


def test_a_token_is_positive_from_a_quarter_of_its_area_on(tmp_path, monkeypatch):
    mask = np.zeros((4, 16, 16), bool)  # tokens of 2 x 4 x 4 pixels: a quarter is eight
    mask[0, :4, 4:6] = True  # token (0, 0, 1): 8 of 32
    mask[2, 4:8, 8:10] = True
    mask[2, 4, 8] = False  # token (1, 1, 2): 7 of 32
    mask[2:, 12:, 12:] = True  # token (1, 3, 3): all
    batch = fake_pool(tmp_path, monkeypatch, [mask], [6])
    target = batch.target[0, :, 6].view(2, 4, 4)  # tokens run along time, height, width
    assert target.nonzero().tolist() == [[0, 0, 1], [1, 3, 3]]
    assert batch.target_mask[0, :, 6].all() and batch.target_mask.sum() == 32 and batch.target.sum() == 2


def test_thirds_of_a_token_do_not_suffer_from_rounding(tmp_path, monkeypatch):
    mask = np.zeros((4, 16, 16), bool)
    mask[:, :, :4] = True
    batch = fake_pool(tmp_path, monkeypatch, [mask], [0], patch=16)
    assert batch.target[0, :, 0].tolist() == [1.0, 1.0]  # exactly a quarter


def test_two_actors_of_one_phenomenon_are_united(tmp_path, monkeypatch):
    left, right = np.zeros((2, 4, 16, 16), bool)
    left[:, :, :4], right[:, :, 12:] = True, True
    batch = fake_pool(tmp_path, monkeypatch, [left, right], [3, 3])
    assert batch.target[0, :, 3].view(2, 4, 4)[0, 0].tolist() == [1, 0, 0, 1] and batch.target_mask[0].any(0).sum() == 1
    both = fake_pool(tmp_path / "other", monkeypatch, [left, right], [3, 5])
    for category, row in ((3, [1, 0, 0, 0]), (5, [0, 0, 0, 1])):
        assert both.target[0, :, category].view(2, 4, 4)[1, 2].tolist() == row


# ---------------------------------------------------------------------------------------------------------------- words
def test_tokenizer_rule():
    words = data.Tokenizer.split("A Red-hot ball, isn't it? 3 BALLS; d'été… 水が")
    assert words == ["a", "red", "hot", "ball", "isn't", "it", "3", "balls", "d'été", "水が"]
    assert data.Tokenizer.split(" ,.'_") == []


def test_tokenizer_ids_pad_unknown_and_cut():
    tokenizer = data.Tokenizer.from_captions(["the ball falls.", "A ball!"])
    assert tokenizer.words == ["a", "ball", "falls", "the"] and len(tokenizer) == 6
    ids, n = tokenizer.encode("The green ball", 5)
    assert ids.tolist() == [5, 1, 3, 0, 0] and ids.dtype == torch.int64 and n == 3
    assert tokenizer.encode("the ball falls", 2)[0].tolist() == [5, 3] and tokenizer.encode("the ball falls", 2)[1] == 2
    assert tokenizer.encode("", 3)[0].tolist() == [0, 0, 0] and tokenizer.encode("", 3)[1] == 0
    assert tokenizer.unknown("green ball, Green cube") == ["green", "cube"]
    assert data.Tokenizer.from_captions(["a ball!", "THE ball falls"]).ids == tokenizer.ids


def test_tokenizer_round_trip(tmp_path):
    tokenizer = data.Tokenizer.from_captions(["été ball", "it's"])
    tokenizer.save(tmp_path / "tokenizer.json")
    assert data.Tokenizer.load(tmp_path / "tokenizer.json").ids == tokenizer.ids
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"words": 3}', '{"words": [1]}', '{"words": ["a", "a"]}', "null", "[" * 100000])
def test_a_broken_tokenizer_is_one_sentence(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer"):
        data.Tokenizer.load(path)
    with pytest.raises(UserError, match="missing"):
        data.Tokenizer.load(tmp_path / "none.json")
