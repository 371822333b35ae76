"""Pictures show what they were given: overlays, bars, sheets, text, GIF and MP4."""
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

import common.pictures
from config import Stopped
from helpers import ROOT


# --- pictures and files -------------------------------------------------------------------------------------
def test_overlay_lights_up_its_token_on_a_fixed_scale():
    clip, heat = np.full((4, 16, 16, 3), 160, np.uint8), np.zeros((2, 4, 4), np.float32)
    heat[1, 2, 3] = 1
    out = common.pictures.overlay(clip, heat, 3)
    assert out.shape == (4, 48, 48, 3)
    lit = np.zeros((4, 48, 48), bool)
    lit[2:, 24:36, 36:48] = True
    assert (out[~lit] == 96).all()  # 0.6 of 160: the dark grey of a map at zero
    assert len(np.unique(out[lit], axis=0)) == 1 and out[lit][0, 0] > 200
    half, more = common.pictures.overlay(clip, heat * 0.5, 3)[lit][0], common.pictures.overlay(clip, heat * 7, 3)[lit][0]
    # not scaled to the map's own largest
    assert half.sum() < out[lit][0].sum() and np.array_equal(more, out[lit][0])


def test_a_map_is_shown_only_where_its_peak_says_that_the_phenomenon_is_there():
    clip, heat = np.full((4, 16, 16, 3), 160, np.uint8), np.zeros((2, 4, 4), np.float32)
    heat[1, 2, 3] = common.pictures.SEEN
    assert np.array_equal(common.pictures.heat_map(clip, heat, 4), common.pictures.overlay(clip, heat, 4))
    heat[1, 2, 3] -= 0.01
    plate = common.pictures.heat_map(clip, heat, 4)
    assert plate.shape == (4, 64, 64, 3) and (plate == plate[0]).all()  # nothing of the clip moves in it
    grounds = (plate[0] == common.pictures.PLATE).all(-1)
    assert grounds[:20].all() and not grounds.all()  # words in its middle, nothing else


def test_comparison_and_routing_cells_leave_an_unseen_map_empty():
    clip, lift = np.full((4, 16, 16, 3), 160, np.uint8), np.zeros((2, 4, 4, 3), np.float32)
    lift[..., 0], lift[..., 2] = 0.3, 0.4
    routing = common.pictures.ClipRouting(lift, None, 0.5)
    empty, gap, line = common.pictures.heat_map(clip, lift[..., 2], 8), common.pictures.GAP, common.pictures.LINE
    cell = common.pictures.comparison_cell(clip, clip, routing, "a ball", 8, {0: "one", 2: "two"})
    assert np.array_equal(cell[:, line + 2 : line + 130, 2 * (128 + gap) :], empty)
    small = common.pictures.heat_map(clip, lift[..., 0], 4)
    cell = common.pictures.routing_cell(clip, "a ball", "", 8, routing, {0: "one"})
    assert np.array_equal(cell[:, -64 - gap : -gap, :64], small)


def test_bars_are_as_long_as_the_weights():
    panel = common.pictures.Panel(300, 200)
    common.pictures.bars(panel, 0, 0, 300, 200, np.array([0.75, 0.25, 0.0], np.float32))
    blue = (np.asarray(panel.image) == common.pictures.BLUE).all(-1).sum(1)  # blue pixels a row
    lengths = [run for run in np.unique(blue) if run > 1]
    assert len(lengths) == 2 and abs(lengths[1] / lengths[0] - 3) < 0.1


def test_sheet_keeps_pairs_in_a_row_and_loses_no_cell():
    cells = [np.full((2, 10, 20, 3), 100 + i, np.uint8) for i in range(6)]
    for together in (1, 2, 6):
        out = common.pictures.sheet(cells, together)[1, :, :, 0]
        spots = [np.argwhere(out == 100 + i) for i in range(6)]
        assert all(len(s) == 200 for s in spots)
        for i in range(0, 6, together):
            assert len({s[0][0] for s in spots[i : i + together]}) == 1
    assert common.pictures.sheet(cells, 6).shape[2] == 6 * (20 + 2 * common.pictures.GAP)
    wide = [np.zeros((1, 10, 10 * columns, 3), np.uint8) for columns in (1, 9) for _ in range(6)]
    for six in (wide[:6], wide[6:]):  # whatever their shape, rows of groups of three hold one, three or six
        columns = common.pictures.sheet(six, 1, 3).shape[2] // (six[0].shape[2] + 2 * common.pictures.GAP)
        assert columns in (1, 3, 6)


@pytest.mark.parametrize("suffix, tolerance", [(".gif", 6), (".mp4", 12), (".MP4", 12)])
def test_a_file_shows_the_frames_it_was_given(tmp_path, suffix, tolerance):
    frames = np.zeros((7, 33, 47, 3), np.uint8)  # odd sides
    frames[:, :16, :24] = (200, 40, 40)
    for i in range(7):
        frames[i, 20:30, 6 * i : 6 * i + 6] = 220  # a block that moves on in every frame
    path = tmp_path / f"clip{suffix}"
    common.pictures.save(path, frames, 10)
    back = iio.imread(path, plugin="pyav" if "4" in suffix else "pillow")[..., :3].astype(int)
    size = (7, 34, 48) if "4" in suffix else (7, 33, 47)  # video codecs need even sides
    assert back.shape[:3] == size and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert np.abs(back[:, :33, :47] - frames).mean() < tolerance
    for i in range(7):
        assert back[i, 23:27, 6 * i + 2 : 6 * i + 4].mean() > 170
        assert i == 6 or back[i, 23:27, 6 * i + 10 :].mean() < 60
    if "4" in suffix:
        properties = iio.improps(path, plugin="pyav"), iio.immeta(path, plugin="pyav")
        assert properties[1]["fps"] == 10 and properties[1]["video_format"].startswith("yuv420p")


def test_a_file_that_cannot_be_written_stops_with_a_sentence(tmp_path):
    for name in ("clip.gif", "clip.mp4"):
        with pytest.raises(Stopped, match="could not be written"):
            common.pictures.save(tmp_path / "gone" / name, np.zeros((2, 8, 8, 3), np.uint8), 4)


def test_a_caption_is_cut_to_what_fits_before_pillow_sees_it():
    clip = np.zeros((2, 8, 64, 3), np.uint8)
    normal = common.pictures.wrap("a red ball bounces on the left " * 9, 64)
    assert " ".join(normal).split() == ("a red ball bounces on the left " * 9).split()
    for caption in ("word " * 25_000, "w" * 3_000_000, "a \ud800 ball"):
        lines = common.pictures.wrap(caption, 64)
        assert len(lines) <= common.pictures.MOST_LINES and max(map(len, lines)) <= 1000
        cell = common.pictures.plain_cell(clip, caption, "", 1)
        assert cell.shape[1] <= 17 * common.pictures.MOST_LINES + 20
        assert common.pictures.annotate(clip, caption).shape[2] == 64
    assert lines == ["a ? ball"] and common.pictures.wrap("word " * 25_000, 64)[-1] == "..."


@pytest.mark.parametrize("fps, duration", [(8, 120), (100, 10), (256, 10)])
def test_a_gif_plays_as_fast_as_it_is_told_or_as_it_can(tmp_path, fps, duration):
    """Above 100 frames a second its hundredths would be none, and viewers take that for ten."""
    frames = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3) * 80
    common.pictures.save(tmp_path / "clip.gif", frames, fps)
    assert iio.immeta(tmp_path / "clip.gif")["duration"] == duration


def test_a_full_disk_is_one_sentence_and_no_destructor_speaks_after_it(tmp_path):
    code = """
import resource, sys
import numpy as np
import config
from common import pictures
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
config.entry(lambda: pictures.save(pictures.Path(sys.argv[1]), noise, 8))
"""
    for name in ("clip.gif", "clip.mp4"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_picture_helpers():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    big = common.pictures.enlarge(frames, 5)
    assert big.shape == (2, 15, 20, 3) and np.array_equal(big[:, 2::5, 2::5], frames)
    mask = np.zeros((2, 3, 4), bool)
    mask[1, 2, 3] = True
    tinted = common.pictures.tint(frames, mask, (255, 0, 255), 1)
    assert np.array_equal(tinted[~mask], frames[~mask]) and tinted[1, 2, 3].tolist() == [255, 0, 255]
    wide = np.zeros((2, 8, 120, 3), np.uint8)
    short = common.pictures.annotate(wide, "a ball")
    long = common.pictures.annotate(wide, "a ball and many more words than fit on a line")
    assert long.shape[1] > short.shape[1] > 8 and short[:, 8:].max() > 150 and not short[:, :8].any()
    assert common.pictures.annotate(wide, "a ball", lines=4).shape[1] > short.shape[1]
