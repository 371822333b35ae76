"""data.py: pools of clips, the stream of batches, targets and words,
against pixels and masks that the tests make themselves."""
import concurrent.futures
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common.files
import physics.phenomena
import data
import world
from config import Stopped, UserError
from videos import annotate, counts, gif, movie, opened, pool_cfg


# --------------------------------------------------------------------------------------------------- the pool
def test_world_pool_holds_the_worlds_clips(tmp_path):
    cfg = pool_cfg(tmp_path, world_seed=3, two=1.0)
    pool = opened(cfg)
    assert pool.train == list(range(12)) and pool.held == [12, 13, 14, 15] and pool.video.dtype == np.uint8
    for row, index in enumerate([*range(12), *range(data.HELD_OUT, data.HELD_OUT + 4)]):
        clip = world.make_clip(3, index, frames=4, height=16, width=16, decoys=cfg.decoys, two=1.0)
        assert np.array_equal(pool.video[row], clip.video) and pool.captions[row] == clip.caption
        assert pool.categories[row] == sorted(set(clip.categories))
        for slot, category in enumerate(pool.mask_category[row]):
            nothing = np.zeros((4, 16, 16), bool)
            union = np.any([nothing] + [actor.mask for actor in clip.actors if actor.category == category],
                           axis=0)
            bits = np.unpackbits(pool.masks[row, slot])[:4 * 16 * 16].reshape(4, 16, 16)
            assert np.array_equal(bits, union)
    with pytest.raises(ValueError):
        pool.video[0] = 0  # read-only


def test_pool_is_named_by_what_shapes_it(tmp_path):
    def built(**overrides):
        opened(pool_cfg(tmp_path, world_clips=2, val_clips=1, **overrides))
        return {path.name for path in (tmp_path / "pools").iterdir()}

    first = built()
    assert len(first) == 1
    assert built(seed=5, lr=1.0, batch_size=3, patch=8, categories=29, threads=2, out_dir="x") == first
    seen = first
    for change in (dict(world_seed=1), dict(frames=6), dict(height=32), dict(width=32), dict(decoys=0.1),
                   dict(two=0.1),
                   dict(colour_cues=True), dict(ood="speed")):
        now = built(**change)
        assert len(now) == len(seen) + 1, change
        seen = now
    opened(pool_cfg(tmp_path, world_clips=3, val_clips=1))
    opened(pool_cfg(tmp_path, world_clips=2, val_clips=2))
    assert len(list((tmp_path / "pools").iterdir())) == len(seen) + 2


def test_stage_one_has_a_pool_of_the_worlds_physics_and_stage_two_the_true_one(tmp_path):
    keys = set()
    for physics in ("true", "weak", "still"):
        cfg = pool_cfg(tmp_path, world_clips=3, val_clips=1, physics=physics)
        base, true = (data.open_pool(cfg, progress=False, stage=stage) for stage in ("base", "physics"))
        keys |= {base.key, true.key}
        assert (base.key == true.key) == (physics == "true") and base.captions == true.captions
        for pool, kind in ((base, physics), (true, "true")):
            drawn = [world.make_clip(0, index, **world.drawing(cfg, physics=kind)).video
                     for index in (0, 1, 2, data.HELD_OUT)]
            assert np.array_equal(pool.video, drawn)
    assert len(keys) == 3 == len(list((tmp_path / "pools").iterdir()))


def films(folder, **captions):
    """A folder of films of these names with these captions."""
    folder.mkdir()
    for name in captions:
        movie(folder / f"{name}.mp4")
    annotate(folder, {f"{name}.mp4": caption for name, caption in captions.items()})
    return str(folder)


def test_each_stage_has_the_videos_of_its_own_folder_and_annotations(tmp_path):
    """--annotations belongs to --data_dir; what is said of general videos stands in their folder."""
    general = films(tmp_path / "general", a="a street", b="a street at night")
    physical = films(tmp_path / "physical", a="not read", b="not read")
    (tmp_path / "said.json").write_text('{"a.mp4": "a ball falls", "b.mp4": "ice melts"}')
    pools = data.open_pools(pool_cfg(tmp_path, data_dir=physical, base_data_dir=general,
                                     annotations=str(tmp_path / "said.json")))
    assert {stage: set(pool.captions) for stage, pool in pools.items()} == {
        "base": {"a street", "a street at night"}, "physics": {"a ball falls", "ice melts"}}


def test_one_pool_is_opened_for_both_and_none_for_a_stage_without_steps(tmp_path, monkeypatch):
    opened_by = []
    one, two = ({"data_dir": films(tmp_path / name, a="a ball falls")} for name in ("one", "two"))
    two = one | {"base_data_dir": two["data_dir"]}
    monkeypatch.setattr(data, "open_pool", lambda cfg, stage="physics": opened_by.append(stage) or stage)

    def opens(**fields):
        opened_by.clear()
        return data.open_pools(pool_cfg(tmp_path, **fields)), list(opened_by)
    both = {"base": "base", "physics": "physics"}, ["base", "physics"]
    assert opens() == opens(physics="still") == opens(**two) == both
    assert opens(physics="true") == opens(**one) == ({"base": "base", "physics": "base"}, ["base"])
    for fields in ({}, {"physics": "true"}, one, two):
        assert opens(physics_steps=0, **fields) == ({"base": "base"}, ["base"])
        assert opens(base_steps=0, **fields) == ({"physics": "physics"}, ["physics"])


def test_changed_videos_are_read_again(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4", n=8, step=10)
    annotate(folder, {"a.mp4": "c"})
    cfg = pool_cfg(tmp_path, data_dir=str(folder), windows=1)
    assert counts(opened(cfg).video[0]) == [0, 1, 2, 3]
    movie(folder / "a.mp4", n=6, step=20)
    assert counts(opened(cfg).video[0], 20) == [0, 1, 2, 3]


def test_whole_videos_are_held_out_whatever_the_seed(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for i in range(30):
        gif(folder / f"{i}.gif", [130] * (8 + i % 9), height=16, width=16)
    annotate(folder, {f"{i}.gif": f"video {i}" for i in range(30)})
    cfg = pool_cfg(tmp_path, data_dir=str(folder), val_clips=50)
    pool = opened(cfg)
    train, held = ({pool.captions[row] for row in rows} for rows in (pool.train, pool.held))
    assert len(held) == 2 and not train & held and len(train | held) == 30  # one in twenty, rounded
    assert sorted(pool.train + pool.held) == list(range(len(pool.captions)))
    again = opened(pool_cfg(tmp_path, data_dir=str(folder), val_clips=50, seed=7))
    assert again.held == pool.held
    one = opened(pool_cfg(tmp_path, data_dir=str(folder), val_clips=1))
    assert len(one.held) == 1
    assert not set(one.train) & {row for row, c in enumerate(one.captions) if c in held}


def test_a_single_video_serves_both_and_says_so(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4", n=20)
    annotate(folder, {"a.mp4": "c"})
    pool = opened(pool_cfg(tmp_path, data_dir=str(folder), val_clips=3))
    assert pool.train == [0, 1, 2, 3] and pool.held == [0, 1, 2] and "a single one" in pool.summary


def test_plain_captions_have_no_categories_and_no_targets(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4")
    annotate(folder, {"a.mp4": "a collision with melting"})
    cfg = pool_cfg(tmp_path, data_dir=str(folder))
    pool = opened(cfg)
    clips = data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions))
    batch = clips.batch(range(3))
    assert batch.categories.sum() == batch.target.sum() == batch.target_mask.sum() == 0
    assert clips.categories_present == []
    assert batch.target.shape == (3, 2 * 4 * 4, 17)


def test_unknown_labels_are_counted_in_the_summary(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    movie(folder / "a.mp4")
    movie(folder / "b.mp4", n=13)
    records = [{"file": name, "caption": "c", "q0": "levitation, collision"} for name in ("a.mp4", "b.mp4")]
    (folder / "captions.json").write_text(json.dumps(records))
    pool = opened(pool_cfg(tmp_path, data_dir=str(folder)))
    assert "1 unknown category names: 'levitation' (2)" in pool.summary
    assert pool.categories == [[0]] * len(pool.categories)


def test_none_left_stops_with_one_sentence_and_leaves_nothing(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "zero.mp4").write_bytes(b"")
    for captions, words in (({"zero.mp4": "a"}, "skipped 1: zero.mp4 (empty file)"),
                            ({}, "the annotations name no video")):
        annotate(folder, captions)
        with pytest.raises(UserError, match="No clip could be made") as error:
            opened(pool_cfg(tmp_path, data_dir=str(folder)))
        assert words in str(error.value) and "\n" not in str(error.value)
        assert list((tmp_path / "pools").iterdir()) == []


def test_missing_folder_and_annotations_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no folder of videos .*nowhere"):
        opened(pool_cfg(tmp_path, data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="captions.json .*--annotations FILE.*WISA"):
        opened(pool_cfg(tmp_path, data_dir=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="cannot be read"):
        opened(pool_cfg(tmp_path, data_dir=str(tmp_path / "empty"), annotations=str(tmp_path)))


def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch):
    def dies(self, indices):
        raise concurrent.futures.BrokenExecutor("died")
        yield

    monkeypatch.setattr(data.SyntheticClips, "draw", dies)
    with pytest.raises(Stopped, match="drawing clips died"):
        opened(pool_cfg(tmp_path))


@pytest.mark.slow
def test_many_processes_draw_the_same_clips_without_the_main_script(tmp_path):
    # no `if __name__ == "__main__"`: importing it again would start all over again
    script = tmp_path / "script.py"
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
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and not result.stderr and (tmp_path / "imported").read_text() == "once "
    path, = (tmp_path / "pools").iterdir()
    pool = data.Pool.open(path, (4, 16, 16))
    for row in (0, 31, 32, 149):
        assert np.array_equal(pool.video[row], world.make_clip(0, row, frames=4, height=16, width=16).video)


def test_reading_ahead_is_in_order_and_bounded():
    begun = []
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        results = common.files.bounded_map(executor, lambda i: begun.append(i) or i, list(range(20)), group=3)
        assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
        executor.submit(int).result()
        assert len(begun) <= 9
        assert list(results) == list(range(4, 20))


# ------------------------------------------------------------------------------------------------- the stream
@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    cfg = pool_cfg(tmp_path_factory.mktemp("stream"), caption_dropout=0.3, two=0.5)
    pool = opened(cfg)
    return cfg, pool, data.Tokenizer.from_captions(pool.captions)


TENSORS = ("video", "text", "text_length", "categories", "target", "target_mask", "index")


def same(a, b):
    return a.caption == b.caption and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


def test_every_epoch_shows_every_clip_once_in_a_new_order(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    epochs = [[clips.row(p) for p in range(12 * e, 12 * e + 12)] for e in range(4)]
    assert all(sorted(epoch) == pool.train for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = data.Clips(pool_cfg(Path(cfg.pool_dir).parent, seed=1), pool, tokenizer)
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
            (ids,), (n,) = tokenizer.encode_all([pool.captions[row]], 24)
            assert torch.equal(batch.text[i], ids) and batch.text_length[i] == n
    assert batch.video.dtype == torch.float32 and batch.video.is_contiguous()
    assert batch.text.dtype == batch.text_length.dtype == batch.index.dtype == torch.int64


def test_bytes_become_minus_one_to_one(stream):
    cfg, pool, tokenizer = stream
    extremes = data.replace(pool,
                            video=np.stack([np.full((4, 16, 16, 3), value, np.uint8)
                                            for value in (0, 255) * 8]))
    video = data.Clips(cfg, extremes, tokenizer).batch(range(12)).video
    assert set(video.unique().tolist()) == {-1.0, 1.0}


def test_caption_dropout_is_decided_by_seed_and_position(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(cfg, pool, tokenizer)
    dropped = [clips.batch(range(s, s + 100)).text_length == 0 for s in range(0, 1500, 100)]
    share = torch.cat(dropped).float().mean()
    assert abs(share - 0.3) < 0.04
    assert torch.equal(clips.batch(range(450, 550)).text_length == 0,
                       torch.cat([dropped[4][50:], dropped[5][:50]]))
    batch = clips.batch(range(100))
    assert not batch.text[batch.text_length == 0].any() and batch.text[batch.text_length > 0].any(1).all()
    other = data.Clips(data.replace(cfg, seed=1), pool, tokenizer).batch(range(100))
    assert not torch.equal(other.text_length == 0, batch.text_length == 0)
    never = data.Clips(data.replace(cfg, caption_dropout=0.0), pool, tokenizer).batch(range(100))
    assert (never.text_length > 0).all()


def test_held_out_is_never_trained_on_and_keeps_its_captions(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(data.replace(cfg, caption_dropout=1.0), pool, tokenizer)
    held = clips.batch(range(len(clips.pool.held)), train=False)
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
    assert batch.categories[:, 28].all() and batch.target_mask.shape[-1] == 29
    assert not batch.target_mask[..., 17:].any()
    narrow = data.Clips(cfg, with_slots, tokenizer).batch(range(4))
    assert torch.equal(narrow.categories, batch.categories[:, :17])
    assert torch.equal(narrow.target, batch.target[..., :17])


def test_long_captions_are_cut_and_counted(stream):
    cfg, pool, tokenizer = stream
    clips = data.Clips(data.replace(cfg, text_len=6), pool, tokenizer)
    assert clips.cut == sum(len(c.replace(".", " ").replace(",", " ").split()) > 6 for c in pool.captions) > 0
    assert clips.batch(range(len(clips.pool.held)), train=False).text.shape == (4, 6) and clips.batch(range(len(clips.pool.held)), train=False).text_length.max() == 6
    assert data.Clips(data.replace(cfg, text_len=200), pool, tokenizer).cut == 0


def test_batch_moves_whole(stream):
    cfg, pool, tokenizer = stream
    batch = data.Clips(cfg, pool, tokenizer).batch(range(2))
    moved = batch.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in TENSORS)
    assert moved.caption == batch.caption
    assert batch.video.device.type == "cpu"


# ---------------------------------------------------------------------------------------------------- targets
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
    cfg = pool_cfg(tmp_path, world_clips=2, val_clips=1, **overrides)
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
    assert batch.target[0, :, 3].view(2, 4, 4)[0, 0].tolist() == [1, 0, 0, 1]
    assert batch.target_mask[0].any(0).sum() == 1
    both = fake_pool(tmp_path / "other", monkeypatch, [left, right], [3, 5])
    for category, row in ((3, [1, 0, 0, 0]), (5, [0, 0, 0, 1])):
        assert both.target[0, :, category].view(2, 4, 4)[1, 2].tolist() == row


# ------------------------------------------------------------------------------------------------------ words
def test_tokenizer_rule():
    words = data.Tokenizer.split("A Red-hot ball, isn't it? 3 BALLS; d'été… 水が")
    assert words == ["a", "red", "hot", "ball", "isn't", "it", "3", "balls", "d'été", "水が"]
    assert data.Tokenizer.split(" ,.'_") == []


def test_tokenizer_ids_pad_unknown_and_cut():
    tokenizer = data.Tokenizer.from_captions(["the ball falls.", "A ball!"])
    assert tokenizer.words == ["a", "ball", "falls", "the"] and len(tokenizer) == 6
    ids, n = tokenizer.encode_all(["The green ball", ""], 5)
    assert ids.tolist() == [[5, 1, 3, 0, 0], [0] * 5] and n.tolist() == [3, 0]
    assert ids.dtype == n.dtype == torch.int64
    ids, n = tokenizer.encode_all(["the ball falls"], 2)
    assert ids.tolist() == [[5, 3]] and n.tolist() == [2]
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
