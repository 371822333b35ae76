"""Maps from the VLM to the loss:
on which tokens they land and when, what a damaged one costs, training with them."""
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip(
    "transformers", reason="the teacher needs transformers: pip install -r requirements.txt")

import common.files  # noqa: E402
import common.store  # noqa: E402
import common.video  # noqa: E402
import official.cache  # noqa: E402
import physics.phenomena  # noqa: E402
from vlm import maps as vlm_maps  # noqa: E402
from vlm import qwen as vlm_qwen  # noqa: E402
import align  # noqa: E402
import config  # noqa: E402
import data  # noqa: E402
import teacher  # noqa: E402
import train  # noqa: E402
from config import preset  # noqa: E402
from helpers import drifting, rewrite, sentence, words_of  # noqa: E402
from runs import without_previews  # noqa: E402
from tiny_vlm import FILM, maps_of  # noqa: E402


# --------------------------------------------------------------------------------------------- along one axis
def test_area_where_cells_grow_and_interpolation_where_they_shrink():
    rng = np.random.default_rng(0)
    for n, m in ((12, 4), (12, 12), (12, 5), (45, 26), (30, 17), (8, 1)):
        values = torch.from_numpy(rng.standard_normal(n))
        weights = torch.from_numpy(vlm_maps.axis_weights(np.linspace(3, 7, n + 1), np.linspace(3, 7, m + 1)))
        assert torch.allclose(weights @ values,
                              data.resample(values[None, None].float(), (1, 1, m)).flatten().double(),
                              atol=1e-6)
    for n, m in ((17, 30), (26, 45), (4, 12), (3, 4), (2, 90)):
        values = torch.from_numpy(rng.standard_normal(n))
        weights = torch.from_numpy(vlm_maps.axis_weights(np.linspace(0, 1, n + 1), np.linspace(0, 1, m + 1)))
        right = F.interpolate(values.view(1, 1, 1, n), (1, m), mode="bilinear", align_corners=False).flatten()
        assert torch.allclose(weights @ values, right)


def test_cells_with_their_middle_outside_are_nan():
    # cells of one, middles -1.5 ... 5.5
    weights = vlm_maps.axis_weights(np.linspace(0, 4, 5), np.linspace(-2, 6, 9))
    assert np.isnan(weights).all(1).tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert np.allclose(weights[2:6], np.eye(4))
    # of the first and last only a half lies inside
    weights = vlm_maps.axis_weights(np.linspace(0, 4, 3), np.linspace(-1, 5, 4))
    assert np.allclose(weights, [[1, 0], [.5, .5], [0, 1]])
    weights = vlm_maps.axis_weights(np.linspace(0, 1, 3), np.linspace(-1, 2, 13))
    assert np.isnan(weights).all(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_a_ramp_over_time_stays_that_ramp():
    have, want = np.array([0, 2.5, 6.5, 10.5]) / 8, np.linspace(0, 10.5, 31) / 8
    assert np.allclose(vlm_maps.time_weights(have, want) @ have, want)
    assert np.allclose(vlm_maps.time_weights(have, have), np.eye(4))
    # half a step: 1.25 / 8 and 2 / 8
    late = vlm_maps.time_weights(have, np.array([-.17, -.15, 10.5 / 8 + .24, 10.5 / 8 + .26]))
    assert np.isnan(late).all(1).tolist() == [True, False, False, True]
    assert late[1].tolist() == [1, 0, 0, 0] and late[2, 3] == 1
    alone = vlm_maps.time_weights(np.array([1.0]), np.array([0.0, 9.0]))
    assert alone.tolist() == [[1], [1]]


def test_times_of_tokens_are_those_of_their_frames():
    cog, wan = data.token_times(preset("cogvideox-5b")), data.token_times(preset("wan-1.3b"))
    assert len(cog) == 13 and cog[0] == 0
    assert all(cog[k] == np.mean(range(4 * k - 3, 4 * k + 1)) / 8 for k in range(1, 13))
    assert len(wan) == 21 and wan[20] == np.mean([77, 78, 79, 80]) / 16
    cfg = preset("cogvideox1.5-5b")  # 21 latents, the first repeated, in pairs
    padded = np.concatenate([[0.], [0.], [np.mean(range(4 * k - 3, 4 * k + 1)) / 16 for k in range(1, 21)]])
    assert np.allclose(data.token_times(cfg), padded.reshape(-1, 2).mean(1))
    assert len(padded) == 2 * cfg.grid[0]
    assert np.allclose(data.token_times(preset("small", data_dir="x", frames=8, fps=4.0)),
                       [.125, .625, 1.125, 1.625])
    assert np.allclose(data.token_times(preset("small", frames=12)), (2 * np.arange(6) + .5) / 12)


# ------------------------------------------------------------------------------------------ on anybody's grid
def window(frames, start=0.0, size=(480, 720), shape=(480, 720)):
    return common.video.Window(np.zeros((frames, 2, 2, 3), np.uint8), 0, 1, start, size, common.video.central_crop(*size, *shape))


def ramp(x, y, t):
    return 1 + .002 * x - .003 * y + .25 * t


@pytest.fixture
def planted(tmp_path):
    """A folder of one map of a 480 x 720 video, 49 frames at 8 a second from second 2 on:
    a ramp along x, y and t, and a background that is 3 everywhere."""
    seen = vlm_maps.clip_for_vlm(window(49, start=2.0), "v.mp4", ["melting"], 8.0, 2)
    y, x = (np.arange(17) + .5) * 480 / 17, (np.arange(26) + .5) * 720 / 26
    values = ramp(x, y[:, None], np.array(seen.times)[:, None, None])
    key = common.files.digest({})  # of no settings at all
    about = dict(key=key, file="v.mp4", times=seen.times, size=[480, 720], crop=list(seen.crop),
                 categories=[6], answers={}, background="")
    (tmp_path / "clips").mkdir()
    common.store.write_tensors(tmp_path / "clips" / "m.safetensors",
                       {"maps": torch.from_numpy(values)[None], "background": torch.full((13, 17, 26), 3.)},
                       about, "x")
    (tmp_path / "maps.json").write_text(json.dumps(dict(key=key, settings={})))
    (tmp_path / "index.json").write_text(
        json.dumps(dict(key=key, clips=[["m.safetensors", "v.mp4", seen.times[0], seen.times[-1]]])))
    return tmp_path


def middles(cfg, source):
    """Seconds, row and column of each token's middle, in the file's own units: (T', Y, X) each."""
    name, start, _, (left, top, right, bottom) = source
    _, h, w = cfg.grid
    y, x = top + (np.arange(h) + .5) * (bottom - top) / h, left + (np.arange(w) + .5) * (right - left) / w
    return np.meshgrid(start + data.token_times(cfg), y, x, indexing="ij")


@pytest.mark.parametrize("name, start, size, shape", [
    ("cogvideox-5b", 2.0, (480, 720), (480, 720)),  # the very frames: nothing to interpolate in time
    # 16 frames a second, 21 x 30 x 52, a lower crop, somewhere in the midst
    ("wan-1.3b", 2.4, (480, 720), (480, 832)),
    ("cogvideox1.5-5b", 2.0, (480, 720), (768, 1360)),
    ("small", 3.0, (480, 720), (32, 32))])
def test_a_linear_map_comes_back_linear_at_the_right_places(planted, name, start, size, shape):
    cfg = preset(name, data_dir="" if name != "small" else "x")
    source = ["v.mp4", start, list(size), list(common.video.central_crop(*size, *shape))]
    maps, background = vlm_maps.Maps(planted).on_tokens(source, data.token_times(cfg), cfg.grid, cfg.categories)
    N = math.prod(cfg.grid)
    assert maps.shape == (N, 17) and background.shape == (N,)
    assert maps.dtype == background.dtype == torch.float32
    assert maps[:, [c for c in range(17) if c != 6]].isnan().all() and (background - 3).abs().max() < 1e-6
    t, y, x = middles(cfg, source)
    # up to the outermost middles
    inside = (y > 480 / 34) & (y < 480 - 480 / 34) & (x > 720 / 52) & (x < 720 - 720 / 52)
    assert inside.mean() > .7
    # what averages of larger, crooked cells may miss is a small part of one
    cell = .002 * 720 / 26 + .003 * 480 / 17
    found = maps[:, 6].view(cfg.grid).numpy()
    assert np.abs(found - ramp(x, y, t))[inside].max() < (.05 * cell if name == "small" else 1e-5)


def test_time_is_the_identity_on_the_frames_that_the_teacher_saw():
    cfg = preset("cogvideox-5b")
    times = np.array(vlm_maps.clip_for_vlm(window(49, start=7.5), "v", [], 8.0, 2).times)
    assert np.allclose(times, 7.5 + data.token_times(cfg))
    assert np.allclose(vlm_maps.time_weights(times, 7.5 + data.token_times(cfg)), np.eye(13))
    even = vlm_maps.clip_for_vlm(window(49), "v", [], 8.0, 2, uniform=16)
    assert np.allclose(even.times, vlm_maps.uniform_frames(49, 16).reshape(8, 2).mean(1) / 8)
    assert even.fps == 16 * 8 / 49
    odd = vlm_maps.clip_for_vlm(window(49), "v", [], 8.0, 2, uniform=5)
    assert np.allclose(odd.times, [(4 + 14) / 16, (24 + 34) / 16, 44 / 8])  # the last frame stands twice
    assert "Time axes do not fit" in sentence(vlm_maps.clip_for_vlm, window(49), "v", [], 8.0, 4,
                                              error=vlm_qwen.VLMError)


def test_outside_of_what_the_teacher_saw_is_nan(planted):
    cfg, maps = preset("wan-1.3b"), vlm_maps.Maps(planted)

    def read(start, crop):
        source = ["v.mp4", start, [480, 720], crop]
        return maps.on_tokens(source, data.token_times(cfg), cfg.grid, 17)
    # ends after the map's last row of tokens, at 2 + 46.5 / 8, does
    one, background = read(5.0, [0, 32.3, 720, 447.7])
    known = one[:, 6].view(cfg.grid).isfinite()
    assert (known == known[:, :1, :1]).all()
    assert known[:, 0, 0].tolist() == (5 + data.token_times(cfg) <= 2 + 48.5 / 8 + 1e-9).tolist()
    assert torch.equal(background.view(cfg.grid).isfinite(), known) and 0 < known.float().mean() < 1
    one, _ = read(2.0, [-72, 32.3, 648, 447.7])  # a tenth of it left of the picture
    known = one[:, 6].view(cfg.grid).isfinite()
    assert (known == known[:1, :1]).all()
    assert known[0, 0].tolist() == [-72 + (i + .5) * 720 / 52 >= 0 for i in range(52)]
    one, _ = read(60.0, [0, 32.3, 720, 447.7])  # another time altogether
    assert one.isnan().all()
    assert maps.on_tokens(["w.mp4", 0.0, [1, 1], [0, 0, 1, 1]], data.token_times(cfg), cfg.grid, 17) is None


def test_of_several_maps_that_with_most_in_common(planted):
    index = json.loads((planted / "index.json").read_text())
    tensors, about = common.store.read_tensors(planted / "clips" / "m.safetensors")
    for i, start in enumerate((0.0, 4.0, 9.0)):
        times = [start + second - 2 for second in about["times"]]
        common.store.write_tensors(planted / "clips" / f"{i}.safetensors",
                           {**tensors, "background": tensors["background"] * 0 + i},
                           {**about, "times": times}, "x")
        index["clips"].append([f"{i}.safetensors", "w.mp4", times[0], times[-1]])
    (planted / "index.json").write_text(json.dumps(index))
    cfg = preset("cogvideox-5b", frames=17)  # two seconds
    for start, which in ((0.0, 0), (3.0, 0), (4.2, 1), (8.8, 2), (9.5, 2)):
        _, background = vlm_maps.Maps(planted).on_tokens(["w.mp4", start, [480, 720], [0, 0, 720, 480]],
                                                     data.token_times(cfg), cfg.grid, 17)
        assert background[background.isfinite()].unique().tolist() == [which], start


# ------------------------------------------------------------------------------------ differences and targets
def test_relative_by_hand():
    maps, background = torch.tensor([3.0, 2.0, .5, 1.0]), torch.tensor([1.5, 2.0, 2.0, 0.0])
    assert align.relative(maps, background).tolist() == [1.5, 0.0, -1.5, 1.0]
    assert align.relative(maps, background, "none").tolist() == [2.0, 1.0, -.5, 0.0]
    # 1 / 0.001
    assert torch.allclose(align.relative(maps, background, "divide"), torch.tensor([1.0, 0.0, -.75, 999.0]))


@pytest.mark.parametrize("kind, targets, counts", [
    ("subtract", [1.0, .4, 0.0, 0.0], [1, 1, 0, 0]), ("none", [1.0, .4, .4, 0.0], [1, 1, 1, 0]),
    ("divide", [1.0, .4, 0.0, 0.0], [1, 1, 0, 0])])
def test_map_target_of_each_kind_by_hand(kind, targets, counts):
    """Maps 3.5 2 2 1 of what is there, over 1 1 2.5 1:
    differences 2.5 1 -.5 0; less one 2.5 1 1 0; quotients 2.5 1 -.2 0."""
    maps = torch.tensor([3.5, 2.0, 2.0, 1.0])
    # there, not there, there but never asked for
    both = torch.stack([maps, maps, torch.full((4,), math.nan)], dim=1)[None]
    target, mask = align.map_target(both, torch.tensor([[1.0, 1.0, 2.5, 1.0]]),
                                    torch.tensor([[1.0, 0.0, 1.0]]), kind=kind)
    assert torch.allclose(target[0, :, 0], torch.tensor(targets)) and mask[0, :, 0].tolist() == counts
    assert (target[0, :, 1:] == 0).all() and (mask[0, :, 1:] == 0).all()
    _, pulled = align.map_target(both, torch.tensor([[1.0, 1.0, 2.5, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]]),
                                 .1, kind)
    assert torch.allclose(pulled[0, :, 0], torch.tensor([1.0 if c else .1 for c in counts]))
    assert (pulled[0, :, 1:] == 0).all()


def test_tokens_that_nobody_saw_teach_nothing():
    maps, background = torch.tensor([[[3.0], [math.nan], [2.0]]]), torch.tensor([[1.0, 1.0, math.nan]])
    target, mask = align.map_target(maps, background, torch.ones(1, 1), negatives=.5)
    assert target.flatten().tolist() == [1, 0, 0] and mask.flatten().tolist() == [1, 0, 0]
    p = torch.full((1, 3, 1), .5, requires_grad=True)
    align.fine_align_loss(p, target, mask).backward()
    assert p.grad.flatten().tolist() == [-1, 0, 0]


# ----------------------------------------------------------------------------------- a folder that is damaged
def test_zeros_in_a_map_are_noticed(maps_copy, capfd):
    path = maps_copy / "clips" / json.loads((maps_copy / "index.json").read_text())["clips"][1][0]
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    assert vlm_maps.Maps(maps_copy).on_tokens(["b.mp4", 0.0, [36, 52], [0, 0, 52, 36]], np.zeros(1), (1, 2, 2),
                                     17) is None
    assert "checksum" in capfd.readouterr().err


def test_stale_and_damaged_folders_are_one_sentence(maps_copy, tmp_path):
    say = lambda: sentence(vlm_maps.Maps, maps_copy)  # noqa: E731
    path = maps_copy / "clips" / json.loads((maps_copy / "index.json").read_text())["clips"][1][0]
    tensors, about = common.store.read_tensors(path)
    common.store.write_tensors(path, tensors, {**about, "key": "another"}, "x")
    assert "stale" in sentence(vlm_maps.Maps(maps_copy).on_tokens, ["b.mp4", 0.0, [36, 52], [0, 0, 52, 36]],
                               np.zeros(1), (1, 2, 2), 17)
    stored = json.loads((maps_copy / "maps.json").read_text())
    (maps_copy / "maps.json").write_text(json.dumps({**stored, "key": "another"}))
    assert "damaged" in say()  # the key is not of these settings
    (maps_copy / "maps.json").write_text(json.dumps({"key": common.files.digest({}), "settings": {}}))
    assert "stale" in say()
    (maps_copy / "index.json").write_text("[]")
    assert "damaged" in say()
    (maps_copy / "index.json").unlink()
    assert "teacher.py makes it" in say()
    cfg = preset("debug", data_dir="x", teacher=str(tmp_path / "nowhere"))
    assert "There are no maps in" in sentence(vlm_maps.open_maps, cfg, None)
    assert vlm_maps.open_maps(preset("debug"), None) is None


SIZE = dict(frames=8, fps=8, height=16, width=32)


# --------------------------------------------------------------------------------------- batches and training
def clips_of(films, maps, pools, **fields):
    cfg = preset("debug",
                 **{**SIZE, "data_dir": str(films), "pool_dir": str(pools), "patch": 8, "patch_t": 2,
                    "teacher": str(maps), "val_clips": 2,
                             "threads": 1, "caption_dropout": 0.0, **fields})
    pool = data.open_pool(cfg, progress=False)
    return data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions), vlm_maps.open_maps(cfg, pool))


def test_a_batch_carries_the_maps_of_its_clips(films, maps, pools):
    clips = clips_of(films, maps, pools)
    seen = set()
    for position in range(len(clips)):
        batch, row = clips.batch([position]), clips.row(position)
        assert batch.maps.shape == (1, 4 * 2 * 4, 17) and batch.background.shape == (1, 32)
        assert (batch.target == 0).all() and (batch.target_mask == 0).all()
        name, start, size, crop, *_ = clips.pool.sources[row]
        known = {category for tensors, about in maps_of(maps, name) for category in about["categories"]}
        labels = {c for c in clips.pool.categories[row] if c < 17}
        assert {c for c in range(17) if batch.maps[0, :, c].isfinite().any()} == known == labels
        # the same clip by the maps on disk: of the map whose seconds it shares most, tokens by hand

        def shared(one):
            times = one[1]["times"]
            return min(times[-1], start + 6.5 / 8) - max(times[0], start + .5 / 8)
        tensors, about = max(maps_of(maps, name), key=shared)
        when = start + data.token_times(clips.cfg)
        edges = lambda a, b, n: a + np.arange(n + 1) * (b - a) / n  # noqa: E731
        (x0, y0, x1, y1), over = about["crop"], np.zeros((2, 4, 6, 2, 4))
        for i in range(4):
            for j in range(6):  # each cell of the map, to each token, by area
                for k in range(2):
                    for m in range(4):
                        (a, b), (c, d) = edges(y0, y1, 4)[i:i + 2], edges(crop[1], crop[3], 2)[k:k + 2]
                        (e, f), (g, h) = edges(x0, x1, 6)[j:j + 2], edges(crop[0], crop[2], 4)[m:m + 2]
                        over[:, i, j, k, m] = max(0, min(b, d) - max(a, c)) * max(0, min(f, h) - max(e, g))
        share = over[0] / over[0].sum((0, 1))
        flat = np.einsum("tij,ijkm->tkm", tensors["background"].double().numpy(), share)
        right = np.stack([np.interp(when, about["times"], flat[:, k, m]) for k in range(2) for m in range(4)],
                         axis=1).flatten()
        got = batch.background[0].numpy()
        early, late = when < about["times"][0] - 1.25 / 8 - 1e-3, when > about["times"][-1] + 2 / 8 + 1e-3
        outside = np.repeat(early | late, 8)
        assert np.array_equal(np.isnan(got), outside)
        assert np.allclose(got[~outside], right[~outside], atol=1e-5)
        seen.add(name)
    assert len(seen) >= 3 and clips.unmapped == 0 and clips.key == f"{clips.pool.key}+{clips.maps.key}"


def remade(films, folder, **video):
    """The same films, copied and so of other times; b.mp4 is another one."""
    folder = shutil.copytree(films, folder, copy_function=shutil.copyfile)
    if video:
        (folder / "b.mp4").unlink()
        drifting(folder / "b.mp4", **{"seed": 9, **FILM, **video})
    return folder


def aged(folder, change=lambda row: row[:4]):
    """The rows of index.json as an earlier version wrote them: they do not tell a video's content."""
    index = json.loads((folder / "index.json").read_text())
    rewrite(folder / "index.json", clips=[change(row) for row in index["clips"]])
    return folder


def test_maps_of_another_video_of_the_same_name_are_refused(films, maps, pools, tmp_path):
    """Of the same size and length, so that nothing but the content tells them apart."""
    clips_of(remade(films, tmp_path / "copies"), maps, pools)  # other times, the same videos
    said = sentence(clips_of, remade(films, tmp_path / "others", seed=9), maps, pools)
    assert "other videos" in said and "b.mp4" in said and "a.mp4" not in said and "long.mp4" not in said


def test_older_maps_are_told_apart_by_the_size_of_their_videos(films, maps_copy, pools, tmp_path):
    clips_of(films, aged(maps_copy), pools)
    clips_of(remade(films, tmp_path / "same size", seed=9), maps_copy, pools)  # not known, so no error
    said = sentence(clips_of, remade(films, tmp_path / "others", height=64, width=32), maps_copy, pools)
    assert "other videos" in said and "b.mp4" in said and "a.mp4" not in said


def test_clips_of_a_cache_meet_the_maps_of_their_own_videos(maps):
    """By its index where that tells the content, else when a clip's size is read."""
    found = vlm_maps.Maps(maps)
    row = next(row for row in found.store.rows if row.video == "b.mp4")
    found.check_videos([["b.mp4", 0.0, None, None, content] for content in (row.content, "")])
    assert "b.mp4" in sentence(found.check_videos, [["b.mp4", 0.0, None, None, "another"]])
    cfg = preset("debug", data_dir="x", **SIZE)
    source = ["b.mp4", 0.0, [99, 52], [0, 0, 52, 26]]
    assert "of another video" in sentence(found.on_tokens, source, data.token_times(cfg), (4, 2, 4), 17)


def test_clips_without_a_map_are_counted_and_teach_nothing(films, maps, pools, maps_copy):
    whole = clips_of(films, maps, pools)
    name = whole.pool.sources[whole.row(0)][0]
    index = json.loads((maps_copy / "index.json").read_text())
    rewrite(maps_copy / "index.json", clips=[row for row in index["clips"] if row[1] != name])
    clips = clips_of(films, maps_copy, pools)
    assert clips.unmapped == sum(whole.pool.sources[row][0] == name for row in whole.pool.train) > 0
    batch, full = clips.batch(range(len(clips))), whole.batch(range(len(clips)))
    target, mask = align.map_target(batch.maps, batch.background, batch.categories, negatives=.1)
    right_target, right_mask = align.map_target(full.maps, full.background, full.categories, negatives=.1)
    without = torch.tensor([whole.pool.sources[whole.row(p)][0] == name for p in range(len(clips))])
    assert batch.maps[without].isnan().all() and batch.background[without].isnan().all()
    assert (mask[without] == 0).all() and (target[without] == 0).all()
    assert torch.equal(mask[~without], right_mask[~without])
    assert torch.equal(target[~without], right_target[~without]) and mask.any()


def test_a_batch_of_latents_carries_maps_too(maps, tmp_path):
    """A cache as encode.py leaves it, of two videos:
    9 frames in 3 latents, 16 x 32 pixels in 1 x 2 tokens."""
    sizes = dict(lineage="wan", frames=9, height=16, width=32, channels=4, text_dim=16, text_len=512)
    cfg = preset("small", latent=True, patch=2, patch_t=1, fps=8.0, val_clips=1, teacher=str(maps), **sizes)
    key = common.files.digest(sizes)
    rows = []
    (tmp_path / "clips").mkdir()
    for name, start, crop in (("b.mp4", 0.0, [0, 5, 52, 31]), ("long.mp4", 9 / 8, [0, 5, 52, 31]),
                              ("other.mp4", 0.0, [0, 0, 52, 26])):
        about = dict(key=key, file=name, times=[start, start + 9 / 8], size=[36, 52], crop=crop,
                     text_length=1)
        common.store.write_tensors(tmp_path / "clips" / name,
                           {"mean": torch.zeros(4, 3, 2, 4), "text": torch.ones(1, 16)}, about, "x")
        rows.append([name, name, "a caption", [0]])
    common.store.write_tensors(tmp_path / "empty.safetensors", {"text": torch.zeros(1, 16)},
                       dict(key=key, text_length=0), "x")
    (tmp_path / "cache.json").write_text(json.dumps(dict(key=key, settings=sizes)))
    (tmp_path / "index.json").write_text(json.dumps(dict(key=key, videos=3, done=3, clips=rows)))
    cache = official.cache.open_cache(cfg, tmp_path)
    cache.train = [0, 1, 2]
    latents, seen = official.cache.Latents(cfg, cache, vlm_maps.open_maps(cfg, cache)), {}
    assert latents.unmapped == 1 and latents.key.endswith(f"+{latents.maps.key}")
    for position in range(3):
        batch, name = latents.batch([position]), cache.names[latents.row(position)]
        assert batch.maps.shape == (1, 6, 17) and batch.background.shape == (1, 6)
        seen[name] = batch.background[0]
    # cells of the map are 8 2/3 pixels; the crop takes half of the first and the last row of them, three
    # columns a token
    rows = np.array([.5, 1, 1, .5]) / 3
    for name, taken in (("b.mp4", 0), ("long.mp4", 1)):
        stored = maps_of(maps, name)[taken][0]["background"].double().numpy()
        right = np.einsum("tyx,y->tx", stored, rows).reshape(3, 2, 3).mean(2).flatten()
        assert np.allclose(seen[name].numpy(), right, atol=1e-5)
    assert seen["other.mp4"].isnan().all()


WORLD = dict(world_clips=12, val_clips=4, threads=1, device="cpu")
STEPS = dict(base_steps=2, physics_steps=2, batch_size=4, log_every=1, eval_every=100, save_every=100,
             warmup=1, **WORLD)


@pytest.fixture(scope="module")
def saliency(pools):
    teacher.main(["--annotate", "sal", "--kind", "saliency", "--config", "debug", "--pool_dir", str(pools),
                  *words_of(WORLD)])
    return preset("debug", pool_dir=str(pools), **STEPS)


def test_maps_of_the_world_lie_beside_its_pool(saliency):
    pool = data.open_pool(saliency, progress=False)
    found = vlm_maps.open_maps(dataclasses.replace(saliency, teacher="sal"), pool)
    assert found.folder == vlm_maps.world_maps(saliency, pool, "sal")
    assert len(found.of) == len(pool.captions) == 16
    row = pool.train[0]
    maps, background = found.on_tokens(pool.sources[row], data.token_times(saliency), saliency.grid, 17)
    assert {c for c in range(17) if maps[:, c].isfinite().all()} == set(pool.categories[row])
    assert torch.equal(background, torch.ones(len(background)))
    video = pool.video[row].astype(float)  # (4, 16, 16, 3): four frames, two a token, cells of four by four
    change = np.abs(video[1:] - video[:-1]).mean(-1)
    change = np.stack([change[0], *change]).reshape(2, 2, 4, 4, 4, 4).mean((1, 3, 5))
    right = torch.from_numpy(change / change.mean()).float().flatten()
    assert all(torch.allclose(maps[:, c], right, atol=2e-3, rtol=2e-3) for c in pool.categories[row])


def test_maps_stand_in_for_exact_masks(saliency):
    pool = data.open_pool(saliency, progress=False)
    clips = [data.Clips(dataclasses.replace(saliency, negatives=.1, teacher=name), pool, data.Tokenizer([]),
                        vlm_maps.open_maps(cfg, pool))
             for name, cfg in (("", saliency), ("sal", dataclasses.replace(saliency, teacher="sal")))]
    exact, taught = (one.batch(range(4)) for one in clips)
    assert exact.target.any() and exact.target_mask.all() and exact.maps is None and exact.background is None
    assert not taught.target.any() and not taught.target_mask.any()
    assert torch.equal(taught.maps.isfinite().any(1), taught.categories > 0)


def test_a_vlms_maps_of_the_world_are_those_of_each_clip_alone(saliency, small_vlm, pools, capsys):
    """Groups of many clips at once; the answer is given, so that all of them have all maps."""
    argv = ["--annotate", "seen", "--vlm", str(small_vlm), "--config", "debug", "--pool_dir", str(pools),
            "--answer", "a {name}", "--question", "{name}?",
            "--background", "behind?", *words_of(WORLD)]
    teacher.main(argv)
    assert "16 maps made" in capsys.readouterr().out
    pool, model = data.open_pool(saliency, progress=False), vlm_qwen.VLM.from_folder(small_vlm)
    found = vlm_maps.open_maps(dataclasses.replace(saliency, teacher="seen"), pool)
    for row in (0, 7, 15):
        name, start, size, crop = pool.sources[row]
        (_, _, file), = found.of[name]
        tensors, about = found.store.read(file)
        names = [physics.phenomena.CATEGORIES[c] for c in pool.categories[row]]
        settings = model.settings(answer="a {name}", question="{name}?", background="behind?")
        looks = model.ask([pool.video[row]], 4.0, [[*(f"{name}?" for name in names), "behind?"]], settings,
                           answers=[[*(f"a {name}" for name in names), "a background"]])[0]
        assert about["answers"] == {name: f"a {name}" for name in names}
        assert about["background"] == "a background"
        assert sorted(about["categories"]) == sorted(pool.categories[row]) and about["times"] == [.125, .625]
        assert torch.allclose(tensors["background"].float(), looks[-1].density(), rtol=2e-3, atol=1e-3)
        for category, one in zip(about["categories"], tensors["maps"]):
            assert torch.allclose(one.float(), looks[names.index(physics.phenomena.CATEGORIES[category])].density(),
                                  rtol=2e-3, atol=1e-3)
    teacher.main(argv)
    assert "0 maps made, 16 were there" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(saliency, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_previews(patch)
        folder = tmp_path_factory.mktemp("runs")
        for name in ("", "sal"):
            train.main(dataclasses.replace(saliency, teacher=name, out_dir=str(folder / f"run{name}")))
        yield folder


def test_training_follows_the_teacher(runs, saliency):
    exact, taught = ([json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
                     for name in ("run", "runsal"))
    aligned = [[line["fine_align"] for line in log if line.get("stage") == "physics" and "loss" in line]
               for log in (exact, taught)]
    assert len(aligned[0]) == len(aligned[1]) == 2 and aligned[0][0] != aligned[1][0]
    diffusion = [[line["diffusion"] for line in log if line.get("stage") == "base" and "loss" in line]
                 for log in (exact, taught)]
    assert diffusion[0] == diffusion[1]  # maps touch nothing but the branch
    assert all(math.isfinite(value) for value in aligned[1])
    stored = json.loads((runs / "runsal" / "config.json").read_text())
    pool = data.open_pool(saliency, progress=False)
    assert stored["data"]["physics"] == f"{pool.key}+{vlm_maps.Maps(vlm_maps.world_maps(saliency, pool, 'sal')).key}"


def test_the_targets_are_of_the_kind_that_the_run_names(saliency, tmp_path, monkeypatch):
    seen, real = [], align.map_target
    monkeypatch.setattr(align, "map_target", lambda *args: seen.append(args[3:]) or real(*args))
    without_previews(monkeypatch)
    train.main(dataclasses.replace(saliency, teacher="sal", background="divide", negatives=.25,
                                   out_dir=str(tmp_path / "run"), physics_steps=1))
    assert set(seen) == {(.25, "divide")}


def test_resume_with_other_maps_is_refused(runs, saliency, tmp_path):
    run = Path(shutil.copytree(runs / "runsal", tmp_path / "run"))
    again = ["--config", "debug", "--out_dir", str(run), "--resume"]
    said = sentence(train.main, config.parse([*again, "--teacher", ""], ""))
    assert "teacher" in said
    pool = data.open_pool(saliency, progress=False)
    folder = vlm_maps.world_maps(saliency, pool, "sal")
    kept = Path(shutil.copytree(folder, tmp_path / "kept"))
    try:
        for name in ("maps.json", "index.json"):
            rewrite(folder / name, settings={}, key=common.files.digest({}))
        said = sentence(train.main, config.parse(again, ""))
        assert "The maps of --teacher" in said
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_missing_maps_are_one_sentence(saliency, tmp_path):
    def with_maps(name):
        return dataclasses.replace(saliency, teacher=name, out_dir=str(tmp_path / "run"))
    assert "python teacher.py --annotate nobody" in sentence(train.main, with_maps("nobody"))
    assert "There are no maps in" in sentence(train.main, with_maps(str(tmp_path / "no" / "folder")))
