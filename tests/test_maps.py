"""Maps from the VLM to the loss: on which tokens they land and when, the folder that keeps them, training with them."""
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common.files
import common.store
import common.video
import official.cache
import physics.phenomena
from vlm import maps as vlm_maps
from vlm import qwen as vlm_qwen
import align
import config
import data
import sample
import train
from config import Stopped, UserError, preset

transformers = pytest.importorskip("transformers", reason="the teacher needs transformers: pip install -r requirements.txt")

import teacher  # noqa: E402
from helpers import killed_when  # noqa: E402
from test_teacher import expected, make_vlm, sentence  # noqa: E402

RECORDS = [  # the fifth is no video, the sixth is not there
    {"file": "a.mp4", "caption": "ice melts over a fire", "q0": "melting, combustion", "q4": "no change"},
    {"file": "b.mp4", "caption": "two balls hit", "q1": "collision"},
    {"file": "long.mp4", "caption": "a ball falls", "q1": "rigid body motion, levitation"},
    {"file": "quiet.mp4", "caption": "nothing happens"},
    {"file": "text.mp4", "caption": "words"},
    {"file": "absent.mp4", "caption": "gone"},
]
FLAGS = dict(frames_shown=9, rate=8, words=3, question="{name}?", background="behind?", pixels=32 * 48, batch=2)
SIZE = dict(frames=8, fps=8, height=16, width=32)


def movie(path, seed, frames=12, height=36, width=52):
    """Blots that drift, different in every video; H.264, 8 frames a second."""
    rng = np.random.default_rng(seed)
    big = np.kron(rng.integers(0, 256, (height // 4, width // 4 + frames, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    iio.imwrite(path, np.stack([big[:, 2 * i:2 * i + width] for i in range(frames)]), fps=8, codec="libx264", plugin="pyav")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_vlm(tmp_path_factory.mktemp("vlm"), "qwen2_5_vl", layers=3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("a", "b", "long", "quiet")):
        movie(folder / f"{name}.mp4", seed, frames=28 if name == "long" else 12)
    (folder / "text.mp4").write_text("this is no video")
    (folder / "captions.json").write_text(json.dumps(RECORDS))
    return folder


def flags_of(videos, vlm, out, **fields):
    """The command line of teacher.py."""
    flags = {**FLAGS, **fields}
    return ["--videos", str(videos), "--vlm", str(vlm), "--out", str(out), "--device", "cpu", "--threads", "1",
            *(word for field, value in flags.items() for word in (f"--{field}", str(value)))]


def run(videos, vlm, out, *more, **fields):
    teacher.main([*flags_of(videos, vlm, out, **fields), *more])
    return out


@pytest.fixture(scope="module")
def maps(vlm, videos, tmp_path_factory):
    return run(videos, vlm, tmp_path_factory.mktemp("out") / "maps")


@pytest.fixture
def copy(maps, tmp_path):
    return Path(shutil.copytree(maps, tmp_path / "copy"))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def of(maps, name):
    """[(tensors, about)] of a video, in order."""
    index = json.loads((maps / "index.json").read_text())
    return [common.store.read_tensors(maps / "clips" / row[0]) for row in index["clips"] if row[1] == name]


# ---------------------------------------------------------------------------------------------------- along one axis
def test_area_where_cells_grow_and_interpolation_where_they_shrink():
    rng = np.random.default_rng(0)
    for n, m in ((12, 4), (12, 12), (12, 5), (45, 26), (30, 17), (8, 1)):
        values = torch.from_numpy(rng.standard_normal(n))
        weights = torch.from_numpy(vlm_maps.axis_weights(np.linspace(3, 7, n + 1), np.linspace(3, 7, m + 1)))
        assert torch.allclose(weights @ values, data.resample(values[None, None].float(), (1, 1, m)).flatten().double(), atol=1e-6)
    for n, m in ((17, 30), (26, 45), (4, 12), (3, 4), (2, 90)):
        values = torch.from_numpy(rng.standard_normal(n))
        weights = torch.from_numpy(vlm_maps.axis_weights(np.linspace(0, 1, n + 1), np.linspace(0, 1, m + 1)))
        right = F.interpolate(values.view(1, 1, 1, n), (1, m), mode="bilinear", align_corners=False).flatten()
        assert torch.allclose(weights @ values, right)


def test_cells_with_their_middle_outside_are_nan():
    weights = vlm_maps.axis_weights(np.linspace(0, 4, 5), np.linspace(-2, 6, 9))  # cells of one, middles -1.5 ... 5.5
    assert np.isnan(weights).any(1).tolist() == [True] * 2 + [False] * 4 + [True] * 2
    assert np.allclose(weights[2:6], np.eye(4))
    weights = vlm_maps.axis_weights(np.linspace(0, 4, 3), np.linspace(-1, 5, 4))  # of the first and last only a half lies inside
    assert np.allclose(weights, [[1, 0], [.5, .5], [0, 1]])
    weights = vlm_maps.axis_weights(np.linspace(0, 1, 3), np.linspace(-1, 2, 13))
    assert np.isnan(weights).any(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_a_ramp_over_time_stays_that_ramp():
    have, want = np.array([0, 2.5, 6.5, 10.5]) / 8, np.linspace(0, 10.5, 31) / 8
    assert np.allclose(vlm_maps.time_weights(have, want) @ have, want)
    assert np.allclose(vlm_maps.time_weights(have, have), np.eye(4))
    late = vlm_maps.time_weights(have, np.array([-.17, -.15, 10.5 / 8 + .24, 10.5 / 8 + .26]))  # half a step: 1.25 / 8 and 2 / 8
    assert np.isnan(late).any(1).tolist() == [True, False, False, True] and late[1].tolist() == [1, 0, 0, 0] and late[2, 3] == 1
    assert vlm_maps.time_weights(np.array([1.0]), np.array([0.0, 9.0])).tolist() == [[1], [1]]


def test_times_of_tokens_are_those_of_their_frames():
    cog, wan = data.token_times(preset("cogvideox-5b")), data.token_times(preset("wan-1.3b"))
    assert len(cog) == 13 and cog[0] == 0 and all(cog[k] == np.mean(range(4 * k - 3, 4 * k + 1)) / 8 for k in range(1, 13))
    assert len(wan) == 21 and wan[20] == np.mean([77, 78, 79, 80]) / 16
    cfg = preset("cogvideox1.5-5b")  # 21 latents, the first repeated, in pairs
    padded = np.concatenate([[0.], [0.], [np.mean(range(4 * k - 3, 4 * k + 1)) / 16 for k in range(1, 21)]])
    assert np.allclose(data.token_times(cfg), padded.reshape(-1, 2).mean(1)) and len(padded) == 2 * cfg.grid[0]
    assert np.allclose(data.token_times(preset("small", data_dir="x", frames=8, fps=4.0)), [.125, .625, 1.125, 1.625])
    assert np.allclose(data.token_times(preset("small", frames=12)), (2 * np.arange(6) + .5) / 12)


# -------------------------------------------------------------------------------------------------- on anybody's grid
def window(frames, start=0.0, size=(480, 720), shape=(480, 720)):
    return common.video.Window(np.zeros((frames, 2, 2, 3), np.uint8), 0, 1, start, size, common.video.central(*size, *shape))


def ramp(x, y, t):
    return 1 + .002 * x - .003 * y + .25 * t


@pytest.fixture
def planted(tmp_path):
    """A folder of one map of a 480 x 720 video, 49 frames at 8 a second from second 2 on: a ramp along x, y and t, and a
    background that is 3 everywhere."""
    seen = vlm_maps.shown(window(49, start=2.0), "v.mp4", ["melting"], 8.0, 2)
    y, x = (np.arange(17) + .5) * 480 / 17, (np.arange(26) + .5) * 720 / 26
    values = ramp(x, y[:, None], np.array(seen.times)[:, None, None])
    about = dict(key="k", file="v.mp4", times=seen.times, size=[480, 720], crop=list(seen.crop), categories=[6], answers={}, background="")
    (tmp_path / "clips").mkdir()
    common.store.write_tensors(tmp_path / "clips" / "m.safetensors", {"maps": torch.from_numpy(values)[None], "background": torch.full((13, 17, 26), 3.)},
                       about, "x")
    (tmp_path / "maps.json").write_text(json.dumps(dict(key="k", settings={})))
    (tmp_path / "index.json").write_text(json.dumps(dict(key="k", clips=[["m.safetensors", "v.mp4", seen.times[0], seen.times[-1]]])))
    return tmp_path


def middles(cfg, source):
    """Seconds, row and column of each token's middle, in the file's own units: (T', Y, X) each."""
    name, start, _, (left, top, right, bottom) = source
    _, h, w = cfg.grid
    y, x = top + (np.arange(h) + .5) * (bottom - top) / h, left + (np.arange(w) + .5) * (right - left) / w
    return np.meshgrid(start + data.token_times(cfg), y, x, indexing="ij")


@pytest.mark.parametrize("name, start, size, shape", [
    ("cogvideox-5b", 2.0, (480, 720), (480, 720)),  # the very frames: nothing to interpolate in time
    ("wan-1.3b", 2.4, (480, 720), (480, 832)),  # 16 frames a second, 21 x 30 x 52, a lower crop, somewhere in the midst
    ("cogvideox1.5-5b", 2.0, (480, 720), (768, 1360)),
    ("small", 3.0, (480, 720), (32, 32))])
def test_a_linear_map_comes_back_linear_at_the_right_places(planted, name, start, size, shape):
    cfg = preset(name, data_dir="" if name != "small" else "x")
    source = ["v.mp4", start, list(size), list(common.video.central(*size, *shape))]
    maps, background = vlm_maps.Maps(planted).on_tokens(source, data.token_times(cfg), cfg.grid, cfg.categories)
    N = math.prod(cfg.grid)
    assert maps.shape == (N, 17) and background.shape == (N,) and maps.dtype == background.dtype == torch.float32
    assert maps[:, [c for c in range(17) if c != 6]].isnan().all() and (background - 3).abs().max() < 1e-6
    t, y, x = middles(cfg, source)
    inside = (y > 480 / 34) & (y < 480 - 480 / 34) & (x > 720 / 52) & (x < 720 - 720 / 52)  # up to the outermost middles
    assert inside.mean() > .7
    cell = .002 * 720 / 26 + .003 * 480 / 17  # what averages of larger, crooked cells may miss is a small part of one
    assert np.abs(maps[:, 6].view(cfg.grid).numpy() - ramp(x, y, t))[inside].max() < (.05 * cell if name == "small" else 1e-5)


def test_time_is_the_identity_on_the_frames_that_the_teacher_saw():
    cfg = preset("cogvideox-5b")
    times = np.array(vlm_maps.shown(window(49, start=7.5), "v", [], 8.0, 2).times)
    assert np.allclose(times, 7.5 + data.token_times(cfg)) and np.allclose(vlm_maps.time_weights(times, 7.5 + data.token_times(cfg)), np.eye(13))
    even = vlm_maps.shown(window(49), "v", [], 8.0, 2, uniform=16)
    assert np.allclose(even.times, vlm_maps.uniform_frames(49, 16).reshape(8, 2).mean(1) / 8) and even.fps == 16 * 8 / 49
    odd = vlm_maps.shown(window(49), "v", [], 8.0, 2, uniform=5)
    assert np.allclose(odd.times, [(4 + 14) / 16, (24 + 34) / 16, 44 / 8])  # the last frame stands twice
    assert "Time axes do not fit" in sentence(vlm_maps.shown, window(49), "v", [], 8.0, 4)


def test_outside_of_what_the_teacher_saw_is_nan(planted):
    cfg, maps = preset("wan-1.3b"), vlm_maps.Maps(planted)
    read = lambda start, crop: maps.on_tokens(["v.mp4", start, [480, 720], crop], data.token_times(cfg), cfg.grid, 17)  # noqa: E731
    one, background = read(5.0, [0, 32.3, 720, 447.7])  # ends after the map's last row of tokens, at 2 + 46.5 / 8, does
    known = one[:, 6].view(cfg.grid).isfinite()
    assert (known == known[:, :1, :1]).all() and known[:, 0, 0].tolist() == (5 + data.token_times(cfg) <= 2 + 48.5 / 8 + 1e-9).tolist()
    assert torch.equal(background.view(cfg.grid).isfinite(), known) and 0 < known.float().mean() < 1
    one, _ = read(2.0, [-72, 32.3, 648, 447.7])  # a tenth of it left of the picture
    known = one[:, 6].view(cfg.grid).isfinite()
    assert (known == known[:1, :1]).all() and known[0, 0].tolist() == [-72 + (i + .5) * 720 / 52 >= 0 for i in range(52)]
    one, _ = read(60.0, [0, 32.3, 720, 447.7])  # another time altogether
    assert one.isnan().all()
    assert maps.on_tokens(["w.mp4", 0.0, [1, 1], [0, 0, 1, 1]], data.token_times(cfg), cfg.grid, 17) is None


def test_of_several_maps_that_with_most_in_common(planted):
    index = json.loads((planted / "index.json").read_text())
    tensors, about = common.store.read_tensors(planted / "clips" / "m.safetensors")
    for i, start in enumerate((0.0, 4.0, 9.0)):
        times = [start + second - 2 for second in about["times"]]
        common.store.write_tensors(planted / "clips" / f"{i}.safetensors", {**tensors, "background": tensors["background"] * 0 + i}, {**about, "times": times}, "x")
        index["clips"].append([f"{i}.safetensors", "w.mp4", times[0], times[-1]])
    (planted / "index.json").write_text(json.dumps(index))
    cfg = preset("cogvideox-5b", frames=17)  # two seconds
    for start, which in ((0.0, 0), (3.0, 0), (4.2, 1), (8.8, 2), (9.5, 2)):
        _, background = vlm_maps.Maps(planted).on_tokens(["w.mp4", start, [480, 720], [0, 0, 720, 480]], data.token_times(cfg), cfg.grid, 17)
        assert background[background.isfinite()].unique().tolist() == [which], start


# --------------------------------------------------------------------------------------------- differences and targets
def test_relative_by_hand():
    maps, background = torch.tensor([3.0, 2.0, .5, 1.0]), torch.tensor([1.5, 2.0, 2.0, 0.0])
    assert align.relative(maps, background).tolist() == [1.5, 0.0, -1.5, 1.0]
    assert align.relative(maps, background, "none").tolist() == [2.0, 1.0, -.5, 0.0]
    assert torch.allclose(align.relative(maps, background, "divide"), torch.tensor([1.0, 0.0, -.75, 999.0]))  # 1 / 0.001


@pytest.mark.parametrize("kind, targets, counts", [
    ("subtract", [1.0, .4, 0.0, 0.0], [1, 1, 0, 0]), ("none", [1.0, .4, .4, 0.0], [1, 1, 1, 0]), ("divide", [1.0, .4, 0.0, 0.0], [1, 1, 0, 0])])
def test_map_target_of_each_kind_by_hand(kind, targets, counts):
    """Maps 3.5 2 2 1 of what is there, over 1 1 2.5 1: differences 2.5 1 -.5 0; less one 2.5 1 1 0; quotients 2.5 1 -.2 0."""
    maps = torch.tensor([3.5, 2.0, 2.0, 1.0])
    both = torch.stack([maps, maps, torch.full((4,), math.nan)], dim=1)[None]  # there, not there, there but never asked for
    target, mask = align.map_target(both, torch.tensor([[1.0, 1.0, 2.5, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]]), kind=kind)
    assert torch.allclose(target[0, :, 0], torch.tensor(targets)) and mask[0, :, 0].tolist() == counts
    assert (target[0, :, 1:] == 0).all() and (mask[0, :, 1:] == 0).all()
    _, pulled = align.map_target(both, torch.tensor([[1.0, 1.0, 2.5, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]]), .1, kind)
    assert torch.allclose(pulled[0, :, 0], torch.tensor([1.0 if c else .1 for c in counts])) and (pulled[0, :, 1:] == 0).all()


def test_tokens_that_nobody_saw_teach_nothing():
    maps, background = torch.tensor([[[3.0], [math.nan], [2.0]]]), torch.tensor([[1.0, 1.0, math.nan]])
    target, mask = align.map_target(maps, background, torch.ones(1, 1), negatives=.5)
    assert target.flatten().tolist() == [1, 0, 0] and mask.flatten().tolist() == [1, 0, 0]
    p = torch.full((1, 3, 1), .5, requires_grad=True)
    align.fine_align_loss(p, target, mask).backward()
    assert p.grad.flatten().tolist() == [-1, 0, 0]


# -------------------------------------------------------------------------------------------- the folder, end to end
def test_a_folder_of_videos_becomes_a_folder_of_maps(maps, videos):
    index, stored = (json.loads((maps / name).read_text()) for name in ("index.json", "maps.json"))
    assert stored["key"] == index["key"] == common.files.digest(stored["settings"]) and (index["videos"], index["done"]) == (5, 4)
    assert [row[1] for row in index["clips"]] == ["a.mp4", "b.mp4", *["long.mp4"] * 3, "quiet.mp4"]
    assert sorted(os.listdir(maps / "clips")) == sorted(row[0] for row in index["clips"])
    asked = {"a.mp4": ["combustion", "melting"], "b.mp4": ["collision"], "long.mp4": ["rigid body motion"], "quiet.mp4": []}
    for file, name, start, end in index["clips"]:
        tensors, about = common.store.read_tensors(maps / "clips" / file)
        assert tensors["maps"].dtype == tensors["background"].dtype == torch.float16
        assert sorted(physics.phenomena.CATEGORIES[c] for c in about["categories"]) == sorted(about["answers"]) == asked[name]  # those of the label
        assert tensors["maps"].shape == (len(asked[name]), 3, 4, 6) and tensors["background"].shape == (3, 4, 6)
        assert about["times"] == [start, start + 2.5 / 8, start + 6.5 / 8] and about["times"][-1] == end
        assert about["size"] == [36, 52] and np.allclose(about["crop"], [0, (36 - 52 * 32 / 48) / 2, 52, (36 + 52 * 32 / 48) / 2])
        assert about["file"] == name and all(about["answers"].values()) and about["background"]
        assert np.allclose(tensors["background"].float().mean(), 1, atol=1e-3)
    assert [about["times"][0] for _, about in of(maps, "long.mp4")] == [0, 9 / 8, 18 / 8]


def test_a_map_is_the_eager_models_attention_to_the_file(maps, vlm, videos):
    """From the mp4 to float16 by another way: decode, take the frames that latents show, one plain pass of the model."""
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    eager, tokenizer = kind.from_pretrained(vlm, attn_implementation="eager").eval(), vlm_qwen.VLM(vlm).tokenizer
    cfg = preset("small", data_dir=str(videos), frames=9, fps=8.0, height=32, width=48)
    for name, taken in (("a.mp4", 0), ("long.mp4", 1)):
        tensors, about = of(maps, name)[taken]
        frames = common.video.windows_of(videos / name, cfg)[taken].video[[0, 0, 2, 3, 6, 7]]
        asked = [(f"{physics.phenomena.CATEGORIES[c]}?", about["answers"][physics.phenomena.CATEGORIES[c]], one) for c, one in zip(about["categories"], tensors["maps"])]
        for question, answer, stored in (*asked, ("behind?", about["background"], tensors["background"])):
            right, _ = expected(eager, "qwen2_5_vl", tokenizer, frames, 4.0, question, answer)
            right = right[1, :, 1].mean(0)  # of three layers the second; rows that predict the answer
            assert torch.allclose(stored.float().flatten(), right / right.sum() * 72, rtol=1e-3, atol=1e-3), question


def test_again_makes_nothing_new(copy, vlm, videos, capsys):
    before, times = files_of(copy), {path: path.stat().st_mtime_ns for path in (copy / "clips").iterdir()}
    run(videos, vlm, copy)
    said = capsys.readouterr().out
    assert "0 maps made, 6 were there" in said and "6 of 4 of 5 videos" in said
    assert "skipped 2: absent.mp4 (missing), text.mp4 (Invalid data" in said and "1 unknown category names: 'levitation' (1)" in said
    assert files_of(copy) == before and times == {path: path.stat().st_mtime_ns for path in (copy / "clips").iterdir()}


def test_of_a_video_begun_the_rest_is_made(copy, vlm, videos, capsys):
    before, (_, gone, _) = files_of(copy), [row[0] for row in json.loads((copy / "index.json").read_text())["clips"] if row[1] == "long.mp4"]
    (copy / "clips" / gone).unlink()
    times = {path: path.stat().st_mtime_ns for path in (copy / "clips").iterdir()}
    run(videos, vlm, copy)
    assert "1 maps made, 5 were there" in capsys.readouterr().out and files_of(copy) == before
    assert times.items() <= {path: path.stat().st_mtime_ns for path in (copy / "clips").iterdir()}.items()


def test_a_full_disk_is_one_sentence(vlm, videos, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(28, "No space left on device", str(path))
    monkeypatch.setattr(common.store, "write_tensors", full)
    assert "No space left on device" in sentence(run, videos, vlm, tmp_path / "out", error=Stopped)


def test_one_bad_clip_of_a_group_costs_itself_alone(tmp_path):
    look = lambda empty: vlm_qwen.Look("" if empty else "words", torch.rand(1, 1, 2, 2, 2), empty)  # noqa: E731
    store, skipped = vlm_maps.Store(tmp_path / "out", {}, "x"), []
    group = [(f"{i}.safetensors", vlm_maps.Shown(f"clip {i}", None, 4.0, [0.0, 0.5], (8, 8), (0, 0, 8, 8), ["melting"])) for i in range(4)]
    asked = []

    class Fake(vlm_qwen.VLM):
        def __init__(self):
            pass

        def look(self, videos, fps, questions, settings, batch, answers):
            asked.append(questions)
            if len(asked) == 2:
                raise vlm_qwen.VLMError("not finite")
            return [[look(i == 2), look(i == 1)] for i in range(4)]

    class Bar:
        n = 0

        def update(self, n):
            self.n += n

    bar, tally, settings = Bar(), vlm_maps.Tally(), vlm_qwen.Settings()
    teacher.annotate(Fake(), settings, store, [group, group], tally, 0, skipped, bar)
    assert sorted(os.listdir(store.clips)) == ["0.safetensors", "2.safetensors", "3.safetensors"] and (tally.made, tally.empty, bar.n) == (3, 1, 8)
    assert [name.split(" (")[0] for name in skipped] == ["clip 1", "clip 0", "clip 1", "clip 2", "clip 3"]
    assert asked[0] == [[settings.ask("melting"), settings.background]] * 4
    assert common.store.read_tensors(store.clips / "2.safetensors")[0]["maps"].shape == (0, 2, 2, 2)


def test_shards_make_what_one_process_makes(maps, vlm, videos, tmp_path):
    for shard in ("1/2", "2/2"):
        run(videos, vlm, tmp_path / "halves", shard=shard)
    assert files_of(tmp_path / "halves") == files_of(maps)


@pytest.mark.parametrize("flags, words", [(dict(words=4), "words 3, now 4"), (dict(rate=9), "fps 8.0, now 9.0"), (dict(layers="0-1"), "layers [1], now [0, 1]"),
                                          (dict(question="a {name}?"), "question '{name}?', now 'a {name}?'")])
def test_other_settings_are_refused(copy, vlm, videos, flags, words):
    before = files_of(copy)
    said = sentence(run, videos, vlm, copy, error=UserError, **flags)
    assert words in said and "give another --out" in said and files_of(copy) == before


def test_another_vlm_is_refused(copy, videos, tmp_path):
    other = make_vlm(tmp_path / "other", "qwen2_5_vl", seed=1, layers=3)
    assert "vlm '" in sentence(run, videos, other, copy, error=UserError)


def test_a_truncated_map_is_named_once_left_out_and_made_again(copy, vlm, videos, capfd):
    before = files_of(copy)
    path = copy / "clips" / json.loads((copy / "index.json").read_text())["clips"][0][0]
    path.write_bytes(path.read_bytes()[:-9])
    found, source = vlm_maps.Maps(copy), ["a.mp4", 0.0, [36, 52], [0, 0, 52, 36]]
    assert found.on_tokens(source, np.zeros(1), (1, 2, 2), 17) is None and found.on_tokens(source, np.zeros(1), (1, 2, 2), 17) is None
    err = capfd.readouterr().err
    assert err.count(path.name) == 1 and "left out (cut short)" in err and "teacher.py" in err
    run(videos, vlm, copy, shard="2/2")  # another shard goes past it
    capfd.readouterr()
    run(videos, vlm, copy)
    assert "1 maps made, 5 were there" in capfd.readouterr().out and files_of(copy) == before


def test_zeros_in_a_map_are_noticed(copy, capfd):
    path = copy / "clips" / json.loads((copy / "index.json").read_text())["clips"][1][0]
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    assert vlm_maps.Maps(copy).on_tokens(["b.mp4", 0.0, [36, 52], [0, 0, 52, 36]], np.zeros(1), (1, 2, 2), 17) is None
    assert "checksum" in capfd.readouterr().err


def test_stale_and_damaged_folders_are_one_sentence(copy, tmp_path):
    say = lambda: sentence(vlm_maps.Maps, copy, error=UserError)  # noqa: E731
    path = copy / "clips" / json.loads((copy / "index.json").read_text())["clips"][1][0]
    tensors, about = common.store.read_tensors(path)
    common.store.write_tensors(path, tensors, {**about, "key": "another"}, "x")
    assert "stale" in sentence(vlm_maps.Maps(copy).on_tokens, ["b.mp4", 0.0, [36, 52], [0, 0, 52, 36]], np.zeros(1), (1, 2, 2), 17, error=UserError)
    stored = json.loads((copy / "maps.json").read_text())
    (copy / "maps.json").write_text(json.dumps({**stored, "key": "another"}))
    assert "stale" in say()
    (copy / "index.json").write_text("[]")
    assert "damaged" in say()
    (copy / "index.json").unlink()
    assert "teacher.py makes it" in say()
    cfg = preset("debug", data_dir="x", teacher=str(tmp_path / "nowhere"))
    assert "There are no maps in" in sentence(vlm_maps.open_maps, cfg, None, error=UserError) and vlm_maps.open_maps(preset("debug"), None) is None


def test_an_empty_background_answer_leaves_the_video_out(vlm, videos, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    said = sentence(run, videos, vlm, tmp_path / "out", answer="<|im_end|>", annotations=tmp_path / "one.json", error=UserError)
    assert "No map could be made" in said and "a.mp4 (the model answered the background question with nothing but special tokens)" in said


def test_denials_leave_the_map_out(vlm, videos, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    out = run(videos, vlm, tmp_path / "out", answer="there is no {name}", annotations=tmp_path / "one.json")
    assert "2 answers deny the phenomenon" in capsys.readouterr().out
    (tensors, about), = of(out, "a.mp4")
    assert tensors["maps"].shape == (0, 3, 4, 6) and about["categories"] == [] and about["answers"] == {}
    assert about["background"] == "there is no background"
    for text, denies in {"No.": True, "It isn't there": True, "none of it": True, "I cannot see": True, "a knot, now north": False}.items():
        assert bool(vlm_maps.DENIAL.search(text)) == denies


def test_a_short_video_is_taken_as_it_is(vlm, videos, tmp_path):
    """Twelve frames, 49 asked for: the nine that latents could be of."""
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[1:2]))
    out = run(videos, vlm, tmp_path / "out", frames_shown=49, annotations=tmp_path / "one.json")
    (tensors, about), = of(out, "b.mp4")
    assert tensors["maps"].shape == (1, 3, 4, 6) and about["times"] == [0, 2.5 / 8, 6.5 / 8]


def test_a_video_too_short_for_latents_is_named(vlm, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "s.mp4", 0, frames=3)
    (folder / "captions.json").write_text(json.dumps({"s.mp4": "short"}))
    assert "s.mp4 (too short, 0.38 s)" in sentence(run, folder, vlm, tmp_path / "out", error=UserError)


def test_all_phenomena_by_switch_and_even_sampling(vlm, videos, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[1:2]))
    out = run(videos, vlm, tmp_path / "out", "--all", sample=5, annotations=tmp_path / "one.json")
    (tensors, about), = of(out, "b.mp4")
    assert tensors["maps"].shape == (17, 3, 4, 6) and about["categories"] == list(range(17))
    assert np.allclose(about["times"], [1 / 8, 5 / 8, 8 / 8])  # frames 0 2 4 6 8 of nine, the last one twice


@pytest.mark.parametrize("flags, words", [
    (dict(frames_shown=48), "1 + 4 m"), (dict(rate=0), "--rate"), (dict(rate="nan"), "--rate"), (dict(shard="3/2"), "--shard"), (dict(batch=-1), "--batch"),
    (dict(annotations="nowhere.json"), "nowhere.json"), (dict(windows_taken=-1), "--windows"), (dict(rows="tokens"), "--rows"), (dict(pixels=0), "--pixels"),
    (dict(layers="7"), "--layers"), (dict(words="few"), "--words"), (dict(question="{nom}"), "--question"), (dict(heads="1"), "--heads")])
def test_wrong_flags_are_one_sentence(vlm, videos, tmp_path, flags, words):
    assert words in sentence(run, videos, vlm, tmp_path / "out", error=UserError, **flags)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_one_sentence(tmp_path):
    say = lambda *argv: sentence(teacher.main, list(argv), error=UserError)  # noqa: E731
    assert "--train_tiny" in say() and "--out" in say("--videos", "x") and "--annotate" in say("--annotate", "a/b")
    assert "nowhere" in say("--videos", "x", "--out", str(tmp_path / "o"), "--vlm", str(tmp_path / "nowhere"), "--device", "cpu")


# ------------------------------------------------------------------------------------------------ batches and training
def clips_of(videos, maps, pools, **fields):
    cfg = preset("debug", **{**SIZE, "data_dir": str(videos), "pool_dir": str(pools), "patch": 8, "patch_t": 2, "teacher": str(maps), "val_clips": 2,
                             "threads": 1, "caption_dropout": 0.0, **fields})
    pool = data.open_pool(cfg, progress=False)
    return data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions), vlm_maps.open_maps(cfg, pool))


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    return tmp_path_factory.mktemp("pools")


def test_a_batch_carries_the_maps_of_its_clips(videos, maps, pools):
    clips = clips_of(videos, maps, pools)
    seen = set()
    for position in range(len(clips)):
        batch, row = clips.batch([position]), clips.row(position)
        assert batch.maps.shape == (1, 4 * 2 * 4, 17) and batch.background.shape == (1, 32)
        assert (batch.target == 0).all() and (batch.target_mask == 0).all()
        name, start, size, crop = clips.pool.sources[row]
        known = {category for tensors, about in of(maps, name) for category in about["categories"]}
        assert {c for c in range(17) if batch.maps[0, :, c].isfinite().any()} == known == {c for c in clips.pool.categories[row] if c < 17}
        # the same clip by the maps on disk: of the map whose seconds it shares most, tokens by hand
        tensors, about = max(of(maps, name), key=lambda one: min(one[1]["times"][-1], start + 6.5 / 8) - max(one[1]["times"][0], start + .5 / 8))
        when, edges = start + data.token_times(clips.cfg), lambda a, b, n: a + (np.arange(n + 1)) * (b - a) / n  # noqa: E731
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
        right = np.stack([np.interp(when, about["times"], flat[:, k, m]) for k in range(2) for m in range(4)], axis=1).flatten()
        got = batch.background[0].numpy()
        late = np.repeat((when < about["times"][0] - 1.25 / 8 - 1e-3) | (when > about["times"][-1] + 2 / 8 + 1e-3), 8)
        assert np.array_equal(np.isnan(got), late) and np.allclose(got[~late], right[~late], atol=1e-5)
        seen.add(name)
    assert len(seen) >= 3 and clips.unmapped == 0 and clips.key == f"{clips.pool.key}+{clips.maps.key}"


def test_clips_without_a_map_are_counted_and_teach_nothing(videos, maps, pools, copy):
    whole = clips_of(videos, maps, pools)
    name = whole.pool.sources[whole.row(0)][0]
    index = json.loads((copy / "index.json").read_text())
    index["clips"] = [row for row in index["clips"] if row[1] != name]
    (copy / "index.json").write_text(json.dumps(index))
    clips = clips_of(videos, copy, pools)
    assert clips.unmapped == sum(whole.pool.sources[row][0] == name for row in whole.pool.train) > 0
    batch, full = clips.batch(range(len(clips))), whole.batch(range(len(clips)))
    target, mask = align.map_target(batch.maps, batch.background, batch.categories, negatives=.1)
    right_target, right_mask = align.map_target(full.maps, full.background, full.categories, negatives=.1)
    without = torch.tensor([whole.pool.sources[whole.row(p)][0] == name for p in range(len(clips))])
    assert batch.maps[without].isnan().all() and batch.background[without].isnan().all()
    assert (mask[without] == 0).all() and (target[without] == 0).all()
    assert torch.equal(mask[~without], right_mask[~without]) and torch.equal(target[~without], right_target[~without]) and mask.any()


def test_a_batch_of_latents_carries_maps_too(maps, tmp_path):
    """A cache as encode.py leaves it, of two videos: 9 frames in 3 latents, 16 x 32 pixels in 1 x 2 tokens."""
    sizes = dict(lineage="wan", frames=9, height=16, width=32, channels=4, text_dim=16, text_len=512)
    cfg, key, rows = preset("small", latent=True, patch=2, patch_t=1, fps=8.0, val_clips=1, teacher=str(maps), **sizes), common.files.digest(sizes), []
    (tmp_path / "clips").mkdir()
    for name, start, crop in (("b.mp4", 0.0, [0, 5, 52, 31]), ("long.mp4", 9 / 8, [0, 5, 52, 31]), ("other.mp4", 0.0, [0, 0, 52, 26])):
        about = dict(key=key, file=name, times=[start, start + 9 / 8], size=[36, 52], crop=crop, text_length=1)
        common.store.write_tensors(tmp_path / "clips" / name, {"mean": torch.zeros(4, 3, 2, 4), "text": torch.ones(1, 16)}, about, "x")
        rows.append([name, name, "a caption", [0]])
    common.store.write_tensors(tmp_path / "empty.safetensors", {"text": torch.zeros(1, 16)}, dict(key=key, text_length=0), "x")
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
    # cells of the map are 8 2/3 pixels; the crop takes half of the first and the last row of them, three columns a token
    rows = np.array([.5, 1, 1, .5]) / 3
    for name, taken in (("b.mp4", 0), ("long.mp4", 1)):
        stored = of(maps, name)[taken][0]["background"].double().numpy()
        right = np.einsum("tyx,y->tx", stored, rows).reshape(3, 2, 3).mean(2).flatten()
        assert np.allclose(seen[name].numpy(), right, atol=1e-5)
    assert seen["other.mp4"].isnan().all()


WORLD = dict(world_clips=12, val_clips=4, threads=1, device="cpu")
STEPS = dict(base_steps=2, physics_steps=2, batch_size=4, log_every=1, eval_every=100, save_every=100, warmup=1, **WORLD)


def flags(fields):
    return [word for field, value in fields.items() for word in (f"--{field}", str(value))]


@pytest.fixture(scope="module")
def saliency(pools):
    teacher.main(["--annotate", "sal", "--kind", "saliency", "--config", "debug", "--pool_dir", str(pools), *flags(WORLD)])
    return preset("debug", pool_dir=str(pools), **STEPS)


def test_maps_of_the_world_lie_beside_its_pool(saliency):
    pool = data.open_pool(saliency, progress=False)
    found = vlm_maps.open_maps(dataclasses.replace(saliency, teacher="sal"), pool)
    assert found.folder == vlm_maps.world_maps(saliency, pool, "sal") and len(found.of) == len(pool.captions) == 16
    row = pool.train[0]
    maps, background = found.on_tokens(pool.sources[row], data.token_times(saliency), saliency.grid, 17)
    assert {c for c in range(17) if maps[:, c].isfinite().all()} == set(pool.categories[row]) and torch.equal(background, torch.ones(len(background)))
    video = pool.video[row].astype(float)  # (4, 16, 16, 3): four frames, two a token, cells of four by four
    change = np.abs(video[1:] - video[:-1]).mean(-1)
    change = np.stack([change[0], *change]).reshape(2, 2, 4, 4, 4, 4).mean((1, 3, 5))
    right = torch.from_numpy(change / change.mean()).float().flatten()
    assert all(torch.allclose(maps[:, c], right, atol=2e-3, rtol=2e-3) for c in pool.categories[row])


def test_maps_stand_in_for_exact_masks(saliency):
    pool = data.open_pool(saliency, progress=False)
    clips = [data.Clips(dataclasses.replace(saliency, negatives=.1, teacher=name), pool, data.Tokenizer([]), vlm_maps.open_maps(cfg, pool))
             for name, cfg in (("", saliency), ("sal", dataclasses.replace(saliency, teacher="sal")))]
    exact, taught = (one.batch(range(4)) for one in clips)
    assert exact.target.any() and exact.target_mask.all() and exact.maps is None and exact.background is None
    assert not taught.target.any() and not taught.target_mask.any() and torch.equal(taught.maps.isfinite().any(1), taught.categories > 0)


def test_a_vlms_maps_of_the_world_are_those_of_each_clip_alone(saliency, vlm, pools, capsys):
    """Groups of many clips at once; the answer is given, so that all of them have all maps."""
    argv = ["--annotate", "seen", "--vlm", str(vlm), "--config", "debug", "--pool_dir", str(pools), "--answer", "a {name}", "--question", "{name}?",
            "--background", "behind?", *flags(WORLD)]
    teacher.main(argv)
    assert "16 maps made" in capsys.readouterr().out
    pool, model = data.open_pool(saliency, progress=False), vlm_qwen.VLM(vlm)
    found = vlm_maps.open_maps(dataclasses.replace(saliency, teacher="seen"), pool)
    for row in (0, 7, 15):
        name, start, size, crop = pool.sources[row]
        (_, _, file), = found.of[name]
        tensors, about = found.read(file)
        names = [physics.phenomena.CATEGORIES[c] for c in pool.categories[row]]
        settings = model.settings(answer="a {name}", question="{name}?", background="behind?")
        looks = model.look([pool.video[row]], 4.0, [[*(f"{name}?" for name in names), "behind?"]], settings,
                           answers=[[*(f"a {name}" for name in names), "a background"]])[0]
        assert about["answers"] == {name: f"a {name}" for name in names} and about["background"] == "a background"
        assert sorted(about["categories"]) == sorted(pool.categories[row]) and about["times"] == [.125, .625]
        assert torch.allclose(tensors["background"].float(), looks[-1].density(), rtol=2e-3, atol=1e-3)
        for category, one in zip(about["categories"], tensors["maps"]):
            assert torch.allclose(one.float(), looks[names.index(physics.phenomena.CATEGORIES[category])].density(), rtol=2e-3, atol=1e-3)
    teacher.main(argv)
    assert "0 maps made, 16 were there" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(saliency, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "preview", lambda *_, **__: None)
        folder = tmp_path_factory.mktemp("runs")
        for name in ("", "sal"):
            train.main(dataclasses.replace(saliency, teacher=name, out_dir=str(folder / f"run{name}")))
        yield folder


def test_training_follows_the_teacher(runs, saliency):
    exact, taught = ([json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()] for name in ("run", "runsal"))
    aligned = [[line["fine_align"] for line in log if line.get("stage") == "physics" and "loss" in line] for log in (exact, taught)]
    assert len(aligned[0]) == len(aligned[1]) == 2 and aligned[0][0] != aligned[1][0]
    diffusion = [[line["diffusion"] for line in log if line.get("stage") == "base" and "loss" in line] for log in (exact, taught)]
    assert diffusion[0] == diffusion[1]  # maps touch nothing but the branch
    assert all(math.isfinite(value) for value in aligned[1])
    stored = json.loads((runs / "runsal" / "config.json").read_text())
    pool = data.open_pool(saliency, progress=False)
    assert stored["data"] == f"{pool.key}+{vlm_maps.Maps(vlm_maps.world_maps(saliency, pool, 'sal')).key}"


def test_the_targets_are_of_the_kind_that_the_run_names(saliency, tmp_path, monkeypatch):
    seen, real = [], align.map_target
    monkeypatch.setattr(align, "map_target", lambda *args: seen.append(args[3:]) or real(*args))
    monkeypatch.setattr(sample, "preview", lambda *_, **__: None)
    train.main(dataclasses.replace(saliency, teacher="sal", background="divide", negatives=.25, out_dir=str(tmp_path / "run"), physics_steps=1))
    assert set(seen) == {(.25, "divide")}


def test_resume_with_other_maps_is_refused(runs, saliency, tmp_path):
    run = Path(shutil.copytree(runs / "runsal", tmp_path / "run"))
    again = ["--config", "debug", "--out_dir", str(run), "--resume"]
    said = sentence(train.main, config.parse([*again, "--teacher", ""], ""), error=UserError)
    assert "teacher" in said
    pool = data.open_pool(saliency, progress=False)
    folder = vlm_maps.world_maps(saliency, pool, "sal")
    kept = Path(shutil.copytree(folder, tmp_path / "kept"))
    try:
        for name in ("maps.json", "index.json"):
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "key": "another"}))
        said = sentence(train.main, config.parse(again, ""), error=UserError)
        assert "the maps of --teacher" in said
    finally:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)


def test_missing_maps_are_one_sentence(saliency, tmp_path):
    with_maps = lambda name: dataclasses.replace(saliency, teacher=name, out_dir=str(tmp_path / "run"))  # noqa: E731
    assert "python teacher.py --annotate nobody" in sentence(train.main, with_maps("nobody"), error=UserError)
    assert "There are no maps in" in sentence(train.main, with_maps(str(tmp_path / "no" / "folder")), error=UserError)


# ------------------------------------------------------------------------------------------------------------- kill -9
def test_kill_9_loses_and_doubles_nothing(maps, vlm, videos, tmp_path, capsys):
    out, there = tmp_path / "killed", tmp_path / "killed" / "clips"
    finished = lambda: [] if not there.exists() else [f for f in os.listdir(there) if f.endswith(".safetensors")]  # noqa: E731
    assert killed_when(lambda: len(finished()) == 2, ["teacher.py", *flags_of(videos, vlm, out)])
    survived = {f: (there / f).stat().st_mtime_ns for f in finished()}
    assert 2 <= len(survived) < 6 and not (out / "index.json").exists()
    assert "once it has gone through" in sentence(vlm_maps.Maps, out, error=UserError)
    (there / f"{'0' * 24}-0of1.safetensors.1of1.part").write_bytes(b"half")  # what a kill in the midst of a write leaves
    capsys.readouterr()
    run(videos, vlm, out)
    said = capsys.readouterr().out
    assert f"{6 - len(survived)} maps made, {len(survived)} were there" in said and files_of(out) == files_of(maps)
    assert survived.items() <= {f: (there / f).stat().st_mtime_ns for f in finished()}.items()
