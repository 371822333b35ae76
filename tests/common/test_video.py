"""Videos of every kind and their annotations:
pixels at their times, windows, WISA's answers, what cannot be read."""
import types

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

import common.annotations
import common.files
import common.video
import data
from videos import (
    CORNERS,
    annotate,
    clips_in,
    counts,
    gif,
    movie,
    opened,
    picture,
    pool_cfg,
    quarters_of,
    turn,
    windows_in,
)

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
    pool = opened(pool_cfg(tmp_path, data_dir=str(folder), windows=1))
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
    upright, = clips_in(path, windows=1)
    turn(path, degrees)
    turned, = clips_in(path, windows=1)
    want = np.rot90(quarters_of(upright), -degrees // 90, axes=(1, 2))  # quarter turns clockwise
    assert np.abs(quarters_of(turned) - want).max() < 3
    assert np.abs(quarters_of(turned) - quarters_of(upright)).max() > 100


CONTAINERS = {  # name: how it is made
    "open.mp4": dict(encoder={"x264-params": "open-gop=1:keyint=40:scenecut=0"}),
    "one_key.mp4": dict(gop=1000),
    "no_edit_list.mp4": dict(use_editlist="0"),
    "negative.mp4": dict(start=-4, avoid_negative_ts="disabled"),  # an edit list cuts the first four off
    "late.mp4": dict(start=48, avoid_negative_ts="disabled"),
    "late.mkv": dict(start=48),
    "fragmented.mp4": dict(movflags="frag_keyframe+empty_moov"),
    "refresh.mp4": dict(encoder={"x264-params": "intra-refresh=1:keyint=40:bframes=0"}),
    "a.mov": dict(), "a.mkv": dict(), "a.flv": dict(), "a.ts": dict(),
    "a.webm": dict(codec="libvpx-vp9"),
    "a.wmv": dict(codec="wmv2"),
    "a.mpg": dict(codec="mpeg2video", rate=25),
    "motion.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "b.avi": dict(codec="mpeg4", encoder={"bf": "2"}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_its_windows_also_after_a_seek(tmp_path, name):
    how = {"rate": 8, "n": 200, "gop": 40, "height": 32, "width": 32, **CONTAINERS[name]}
    start = how.pop("start", 0)
    if start:
        how["times"] = [(i + start) / 8 for i in range(200)]
    if how["rate"] == 25:
        how["n"] = 625
    movie(tmp_path / name, **how)
    cut_off = max(0, -start)
    clips = clips_in(tmp_path / name, windows=2, fps=float(how["rate"]))
    for clip, part in zip(clips, (.25, .75), strict=True):
        first = int(part * ((how["n"] - cut_off) // 4)) * 4 + cut_off
        assert counts(clip) == [(first + k) % 25 for k in range(4)]


MIRRORS = {  # display matrix -> where it sends a picture's rows and columns
    (-1, 0, 0, 1): lambda p: p[:, :, ::-1],  # selfies
    (1, 0, 0, -1): lambda p: p[:, ::-1],
    (0, 1, 1, 0): lambda p: p.swapaxes(1, 2),  # a selfie of a phone held upright
    (0, -1, -1, 0): lambda p: p[:, ::-1, ::-1].swapaxes(1, 2),
}


@pytest.mark.parametrize("matrix", MIRRORS)
def test_mirrors_in_the_display_matrix_are_honoured(tmp_path, matrix):
    path = tmp_path / "mirrored.mp4"
    movie(path, height=64, width=48)
    plain, = clips_in(path, windows=1)
    turn(path, matrix)
    mirrored, = clips_in(path, windows=1)
    assert np.abs(quarters_of(mirrored) - MIRRORS[matrix](quarters_of(plain))).max() < 3


@pytest.mark.parametrize("encoder", [{}, {"x264-params": "open-gop=1:keyint=40"}])
def test_frames_whose_stamps_are_not_of_display_are_counted(tmp_path, encoder):
    """AVI has no times of display, and H.264 with B-frames is decoded in another order than shown."""
    path = tmp_path / "b.avi"
    movie(path, n=160, rate=8, gop=40, encoder=encoder)
    assert [counts(clip) for clip in clips_in(path, windows=99)] == (np.arange(160) % 25).reshape(-1, 4).tolist()
    last = clips_in(path, windows=3)[-1]  # also where a seek would save time
    assert counts(last) == [(132 + k) % 25 for k in range(4)]


def test_stamps_that_were_copied_from_an_avi_are_not_believed_either(tmp_path):
    movie(tmp_path / "b.avi", n=40, rate=8)
    with av.open(str(tmp_path / "b.avi")) as given, av.open(str(tmp_path / "b.mkv"), "w") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    assert [counts(clip) for clip in clips_in(tmp_path / "b.mkv", windows=99)] == (
        np.arange(40) % 25).reshape(-1, 4).tolist()


def test_a_window_whose_stamps_fall_is_lost_with_a_reason(tmp_path, monkeypatch):
    movie(tmp_path / "a.mp4", n=40, rate=8)
    stamp, passed = common.video.Player.time, []

    def swapped(self, frame):
        """The stamps of the frames 9 and 10 are swapped, as program streams of MPEG-1 have them."""
        passed.append(frame)
        return stamp(self, frame) + {10: .125, 11: -.125}.get(len(passed), 0)

    monkeypatch.setattr(common.video.Player, "time", swapped)
    folder, read = folder_with(tmp_path / "a.mp4")
    assert [w.number for w in read] == [0, 1, *range(3, 10)]
    assert folder.partial == ["a.mp4 (1 of 10 windows lost: damage, or odd time stamps)"]


@pytest.mark.parametrize("encoder", [
    {}, {"x264-params": "open-gop=1:keyint=40:scenecut=0"},
    {"x264-params": "intra-refresh=1:keyint=40:bframes=0"}])
def test_a_seek_that_lands_behind_its_target_is_tried_from_earlier(tmp_path, encoder):
    path = tmp_path / "minute.ts"
    movie(path, n=480, rate=8, gop=40, height=32, width=32, encoder=encoder)
    clips = clips_in(path, windows=4)
    assert [counts(clip) for clip in clips] == [[(s + k) % 25 for k in range(4)] for s in (60, 180, 300, 420)]


@pytest.mark.parametrize("lie", [dict(offset=10 ** 9), dict(any_frame=True)])
def test_a_seek_is_not_believed_wherever_it_lands(tmp_path, monkeypatch, lie):
    """With a picture behind the target; between key frames, where a decoder gives half a picture."""
    movie(tmp_path / "long.mp4", "mpeg4", n=480, rate=8, height=32, width=32, gop=400)
    right = clips_in(tmp_path / "long.mp4", windows=2)
    opened = av.open

    class Liar:
        def __init__(self, path):
            self.real = opened(path)
            self.streams = self.real.streams
            self.format = self.real.format
            self.demux = self.real.demux
            self.decode = self.real.decode
            self.close = self.real.close

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def seek(self, at, stream):
            self.real.seek(at + lie.get("offset", 0), stream=stream, any_frame=lie.get("any_frame", False))

    monkeypatch.setattr(av, "open", Liar)
    assert np.array_equal(clips_in(tmp_path / "long.mp4", windows=2), right)
    assert [counts(clip) for clip in right] == [[(start + k) % 25 for k in range(4)] for start in (120, 360)]


def folder_with(path, **cut):
    """A Folder of this file alone, after it was read."""
    annotate(path.parent, {path.name: "a caption"})
    folder = common.annotations.Folder(path.parent)
    clips = {**dict(frames=4, fps=8.0, windows=99, height=16, width=16), **cut}
    read = [window for _, windows in folder.read(common.video.Cut(**clips), threads=1) for window in windows]
    return folder, read


def test_windows_that_are_lost_are_counted_and_named(tmp_path):
    path = tmp_path / "cut.mp4"
    movie(path, n=40, rate=8, step=5, noise=True, movflags="faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # as a broken download leaves
    folder, read = folder_with(path)
    lost = f"{10 - len(read)} of 10 windows lost: damage, or odd time stamps"
    assert 2 <= len(read) <= 8 and folder.partial == [f"cut.mp4 ({lost})"] and not folder.skipped
    pool = opened(pool_cfg(tmp_path, data_dir=str(tmp_path), windows=99))
    assert f"; 1 used in part: {folder.partial[0]}" in pool.summary


def test_streams_that_were_joined_as_they_are_are_named(tmp_path):
    path = tmp_path / "joined.ts"
    movie(path, n=40)
    path.write_bytes(2 * path.read_bytes())
    folder, read = folder_with(path)
    assert not read and folder.skipped == ["joined.ts (its clock jumps back by 3.9 s)"]


def test_pictures_and_frames_without_times_have_a_reason(tmp_path):
    frames = [Image.fromarray(picture(10 * i)) for i in range(12)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "a.png")
    movie(tmp_path / "raw.h264")
    annotate(tmp_path, {name: name for name in ("a.webp", "a.png", "raw.h264")})
    folder = common.annotations.Folder(tmp_path)
    for _ in folder.read(common.video.Cut(4, 8.0, 1, 16, 16), threads=1):
        pass
    assert folder.skipped == [
        *(f"{name} (read as a single picture: convert an animation to mp4)" for name in ("a.webp", "a.png")),
        "raw.h264 (its frames carry no times: convert it to mp4, with its frame rate)"]


def test_the_default_track_is_shown_and_a_cover_is_none(tmp_path):
    with av.open(str(tmp_path / "two.mp4"), "w") as out:
        streams = [out.add_stream("libx264", rate=8) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(8):
            for stream, level in zip(streams, (0, 10 * i)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture(level), format="rgb24")))
        for stream in streams:
            out.mux(stream.encode())
    raw = bytearray((tmp_path / "two.mp4").read_bytes())
    raw[raw.index(b"tkhd") + 7] &= 254  # of both tracks the second is switched on
    raw[raw.rindex(b"tkhd") + 7] |= 1
    (tmp_path / "two.mp4").write_bytes(raw)
    assert [counts(clip) for clip in clips_in(tmp_path / "two.mp4")] == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def chosen(*dispositions):
        streams = [types.SimpleNamespace(disposition=d) for d in dispositions]
        return streams.index(common.video.pictures_of(types.SimpleNamespace(
            streams=types.SimpleNamespace(video=streams))))

    none, default, cover = Disposition(0), Disposition.default, Disposition.attached_pic
    assert chosen(none, none) == 0 and chosen(none, default) == 1 and chosen(default, default) == 0
    assert chosen(cover | default, none) == 1
    with pytest.raises(ValueError, match="no picture in it"):
        chosen(cover)


@pytest.mark.parametrize("curve", ["smpte2084", "arib-std-b67", "bt709"])
def test_hdr_is_read_and_said(tmp_path, curve):
    movie(tmp_path / "a.mp4", pix_fmt="yuv420p10le", encoder={"x264-params": f"transfer={curve}"})
    folder, read = folder_with(tmp_path / "a.mp4")
    said = folder.skipped_sentence()
    assert len(read) == 2 and said == ("" if curve == "bt709" else "; 1 in HDR, read without its curve: a.mp4")


def test_crop_is_central_and_covers(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40, 0] = np.arange(20) * 12  # the central square holds a ramp
    frame = av.VideoFrame.from_ndarray(wide, format="rgb24")
    assert np.array_equal(common.video.fit_frame(frame, 20, 20), wide[:, 20:40])
    tall = common.video.fit_frame(av.VideoFrame.from_ndarray(wide.transpose(1, 0, 2).copy(), format="rgb24"), 10, 20)
    assert np.array_equal(tall[:, 0, 0] // 12, np.arange(5, 15))


def test_a_window_says_where_it_was(tmp_path):
    movie(tmp_path / "long.mp4", n=60, height=48, width=64)
    # 6 s hold twelve of half a second
    first, second, third = windows_in(tmp_path / "long.mp4", windows=3)
    assert [w.start for w in (first, second, third)] == [1.0, 3.0, 5.0]
    assert [w.number for w in (first, second, third)] == [0, 1, 2]
    assert second.taken == 3 and second.size == (48, 64) and second.crop == (8, 0, 56, 48)
    turn(tmp_path / "long.mp4", 90)
    turned = windows_in(tmp_path / "long.mp4", windows=1)[0]
    assert turned.size == (64, 48) and turned.crop == (0, 8, 48, 56)


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = common.video.fit_frame(av.VideoFrame.from_ndarray(stripes, format="rgb24"), 16, 16)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 4


def test_variable_frame_rate_follows_time_stamps(tmp_path):
    shown = [0, .05, .26, .30, .62, .70, .71, 1.3]
    for name, codec in (("v.mp4", "libx264"), ("v.webm", "libvpx-vp9")):
        movie(tmp_path / name, codec, n=8, step=30, times=shown)
        clip, = clips_in(tmp_path / name, windows=1, frames=8)
        assert counts(clip, 30) == [np.searchsorted(shown, k / 8 + .001, "right") - 1 for k in range(8)], name


def test_time_stamps_rounded_to_milliseconds_lose_no_frame(tmp_path):
    movie(tmp_path / "thirty.webm", "libvpx-vp9", n=24, rate=30)
    clip, = clips_in(tmp_path / "thirty.webm", windows=1, frames=24, fps=30.0)
    assert counts(clip) == list(range(24))


def test_windows_follow_each_other_and_are_spread(tmp_path):
    # ten windows of four frames, three frames are left over
    movie(tmp_path / "long.mp4", n=43, rate=8, step=5)
    every = clips_in(tmp_path / "long.mp4", windows=99)
    assert [counts(clip, 5) for clip in every] == np.arange(40).reshape(10, 4).tolist()
    three = clips_in(tmp_path / "long.mp4", windows=3)
    assert [counts(clip, 5)[0] for clip in three] == [4, 20, 32]  # the windows 1, 5 and 8


@pytest.mark.parametrize("name, codec", [
    ("s.mp4", "libx264"), ("s.webm", "libvpx-vp9"), ("s.avi", "mpeg4"), ("s.gif", "")])
def test_long_videos_are_entered_in_the_middle_where_possible(tmp_path, monkeypatch, name, codec):
    if codec:
        movie(tmp_path / name, codec, n=480, rate=8, height=32, width=32)
    else:
        # a GIF holds changes only: it is walked through
        gif(tmp_path / name, [120] * 500, height=32, width=32)
    steps, advance = [], common.video.Player.advance
    monkeypatch.setattr(common.video.Player, "advance", lambda self: (steps.append(1), advance(self)))
    clips = clips_in(tmp_path / name, windows=2)
    for clip, start in zip(clips, (120, 360), strict=True):
        rate = 8 if codec else 1 / .12
        assert counts(clip) == [int((start + k) / 8 * rate + .01) % 25 for k in range(4)]
    assert (len(steps) < 150) == bool(codec)


def test_damaged_files_give_the_windows_that_decode(tmp_path):
    for name, codec, options in (("cut.webm", "libvpx-vp9", {}),
                                 ("cut.mp4", "libx264", {"movflags": "faststart"})):
        path = tmp_path / name
        movie(path, codec, n=40, rate=8, step=5, noise=True, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[:int(len(whole) * .6)])
        starts = [counts(clip, 5) for clip in clips_in(path, windows=99)]
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
        "good.mp4", "one.mp4", "one.gif", "zero.mp4", "text.mp4", "half.mp4", "sound.mp4", "nowhere.mp4",
        "folder.mp4")}
        | {"good2.mp4": "another", "scrambled.mp4": "scrambled", "empty.mp4": " "})
    pool = data.open_pool(pool_cfg(tmp_path, data_dir=str(folder), windows=1))
    out, err = capfd.readouterr()
    assert out.strip().splitlines()[-1] == pool.summary
    assert not [line for line in err.replace("\r", "\n").splitlines() if line.strip()
                and "reading videos" not in line]
    usable = 3 if "scrambled" in pool.captions else 2
    assert f"{usable} clips from {usable} videos" in pool.summary
    assert f"skipped {12 - usable}:" in pool.summary
    folder_again = common.annotations.Folder(folder)
    for _ in folder_again.read(common.video.Cut(frames=4, fps=8.0, windows=1, height=16, width=16), threads=2):
        pass
    reasons = dict(entry[:-1].split(" (", 1) for entry in folder_again.skipped)
    assert reasons["zero.mp4"] == "empty file"
    assert reasons["nowhere.mp4"] == "missing" == reasons["folder.mp4"]
    assert reasons["one.mp4"].startswith("too short") and reasons["one.gif"].startswith("too short")
    assert reasons["sound.mp4"] == "no picture in it" and reasons["empty.mp4"] == "no caption"
    assert "Invalid data" in reasons["text.mp4"] and "Invalid data" in reasons["half.mp4"]


def test_long_lists_of_bad_files_are_cut():
    assert common.files.join_some(map(str, range(11))) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
    assert common.files.join_some(["\ud800"]) == "?"  # JSON may hold half a surrogate pair, a terminal may not
