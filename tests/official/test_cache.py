"""The cache of latents:
read back it is what diffusers gives for the file; stale and damaged parts are named."""
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="needs ftfy: pip install -r requirements-extra.txt")

import common.files  # noqa: E402
import common.store  # noqa: E402
import common.video  # noqa: E402
import official.cache  # noqa: E402
import official.encoders  # noqa: E402
import official.folder  # noqa: E402
import data  # noqa: E402
from config import Stopped  # noqa: E402
from helpers import rewrite, sentence  # noqa: E402
from tiny_weights import (  # noqa: E402
    LINEAGES, RECORDS, SIZE, cache_cfg, latents_of, latent_scale, pipeline, prompt_embeddings)


# --------------------------------------------------------------------------------------- the cache, read back
@pytest.mark.parity
@torch.no_grad()
@pytest.mark.parametrize("lineage", LINEAGES)
def test_cache_reads_back_what_diffusers_gives_for_the_file(weights, videos, caches, lineage):
    latents = latents_of(lineage, caches[lineage], caption_dropout=0.0)
    cache, theirs = latents.pool, pipeline(lineage, weights[lineage])
    # three windows of the long one
    assert len(cache.files) == 7 and sorted(cache.train + cache.held) == list(range(7))
    assert "7 clips from 5 videos" in cache.summary and "1 of 6 videos" in cache.summary
    length, seen = cache_cfg(lineage).text_len, {}
    for position in range(len(latents)):
        batch = latents.batch([position])
        row = latents.row(position)
        record = next(r for r in RECORDS if r["en_caption"].strip() == batch.caption[0])
        window = seen.setdefault(record["file"], 0)
        seen[record["file"]] += 1
        about = common.store.read_about(caches[lineage] / "clips" / cache.files[row])
        window = next(w
                      for w in common.video.windows_of(videos / record["file"],
                                               common.video.Cut(windows=4, **SIZE)) if w.start == about["times"][0])
        posterior = theirs.vae.encode(common.video.pixels(window.video)[None]).latent_dist
        if lineage == "wan":
            mean, std = latent_scale(theirs.vae)
            expected = (posterior.mode() - mean) / std
        else:
            noise = np.random.default_rng([0, 5, position]).standard_normal((4, 3, 2, 4), np.float32)
            expected = 0.7 * (posterior.mean + posterior.std * torch.from_numpy(noise))
        text = prompt_embeddings(theirs, [batch.caption[0]], length)
        assert batch.x is batch.latent and batch.video is None and batch.latent.shape == (1, 4, 3, 2, 4)
        assert torch.allclose(batch.latent, expected, atol=1e-5)
        assert torch.allclose(batch.text, text, atol=1e-6)
        assert batch.text.shape == (1, length, 16) and 0 < batch.text_length[0] <= length
        names = [data.category_names(cache_cfg(lineage))[c] for c in batch.categories[0].nonzero().flatten()]
        assert names == [q for q in ("collision", "melting", "gas motion") if q in str(record)]
        assert batch.target.shape == (1, 3 * 1 * 2, 17) and batch.target_mask.sum() == 0
    assert sum(seen.values()) == len(latents)


def test_a_clip_says_where_it_comes_from(videos, caches):
    cache = latents_of("wan", caches["wan"]).pool
    row = [i for i, caption in enumerate(cache.captions) if caption.startswith("ball ball")][1]
    tensors, about = common.store.read_tensors(caches["wan"] / "clips" / cache.files[row])
    assert about["file"] == "long.mp4" and about["times"] == [9 / 8, 18 / 8] and about["size"] == [20, 36]
    assert about["crop"] == [0, 1, 36, 19] and about["caption"].startswith("ball ball")  # 2 : 1 of 36 x 20
    assert set(tensors) == {"mean", "text", "categories"} and tensors["categories"].shape == (29,)
    assert cache.files[row].endswith("-1of3.safetensors")


def test_29_categories_by_switch(caches):
    latents = latents_of("wan", caches["wan"], categories=29)
    row = next(i for i, caption in enumerate(latents.pool.captions) if caption.startswith("ice"))
    assert [data.category_names(latents.cfg)[c]
            for c in latents.categories[row].nonzero().flatten()] == ["melting", "no change"]


@pytest.mark.parametrize("lineage", LINEAGES)
def test_dropped_captions_are_the_empty_one(caches, weights, lineage):
    latents = latents_of(lineage, caches[lineage], caption_dropout=0.5)
    batch = latents.batch(range(40))
    dropped = latents.dropped(list(range(40)))
    assert 5 < dropped.sum() < 35 and torch.equal(batch.text_length == 0, dropped)
    empty = official.encoders.TextEncoder(weights[lineage])([""])[0][0]
    assert (batch.text[dropped] - empty).abs().max() < 1e-6
    assert (batch.text[~dropped] - empty).abs().amax((1, 2)).min() > 1e-3
    assert (latents.batch(range(len(latents.pool.held)), train=False).text_length > 0).all()
    with_captions = latents_of(lineage, caches[lineage], caption_dropout=0.0).batch(range(40))
    assert torch.equal(with_captions.latent, batch.latent) and with_captions.caption == batch.caption


def test_a_batch_is_a_function_of_seed_and_position(caches):
    latents = latents_of("cogvideox", caches["cogvideox"])
    batch = latents.batch([3, 11, 4])
    for i, position in enumerate((3, 11, 4)):
        one = latents_of("cogvideox", caches["cogvideox"]).batch([position])
        assert all(torch.equal(getattr(one, name)[0], getattr(batch, name)[i])
                   for name in ("latent", "text", "text_length", "index"))
    # the same clip an epoch later has other noise
    same = next(p for p in range(len(latents), 2 * len(latents)) if latents.row(p) == latents.row(3))
    assert not torch.equal(latents.batch([same]).latent, latents.batch([3]).latent)
    other = latents_of("cogvideox", caches["cogvideox"], seed=1)
    assert not torch.equal(other.batch([3]).latent, batch.latent[:1])
    assert torch.equal(other.batch(range(len(other.pool.held)), train=False).latent, latents.batch(range(len(latents.pool.held)), train=False).latent)
    assert batch.to("cpu").video is None


def test_opening_reads_no_clip(caches, monkeypatch):
    read = []
    monkeypatch.setattr(common.store, "read_tensors",
                        lambda path, real=common.store.read_tensors: read.append(path.name) or real(path))
    latents = latents_of("wan", caches["wan"])
    assert read == ["empty.safetensors"]
    latents.batch([0, 1])
    assert len(read) == 3


# ------------------------------------------------------------------------------------------ stale and damaged
def test_a_cache_of_other_sizes_or_lineage_is_refused(caches):
    for field, value in dict(frames=13, height=32, lineage="cogvideox", channels=16, text_dim=32).items():
        said = sentence(official.cache.open_cache, dataclasses.replace(cache_cfg("wan"), **{field: value}),
                        caches["wan"])
        assert f"--{field}" in said and str(SIZE.get(field, "")) in said


def test_a_cache_of_other_weights_is_refused(caches, weights, tmp_path):
    """2B and 5B have one VAE with two scales: only the fingerprint tells their caches apart."""
    cfg = cache_cfg("cogvideox")
    assert official.cache.open_cache(cfg, caches["cogvideox"], official.folder.identity(weights["cogvideox"])).train
    other = Path(shutil.copytree(weights["cogvideox"], tmp_path / "other"))
    rewrite(other / "vae" / "config.json", scaling_factor=1.15258426)
    assert "made with vae" in sentence(official.cache.open_cache, cfg, caches["cogvideox"], official.folder.identity(other))


def test_stale_files_are_refused(cache_copy, weights, videos, tmp_path):
    settings = json.loads((cache_copy / "cache.json").read_text())["settings"]
    rewrite(cache_copy / "cache.json", settings={**settings, "fps": 9})
    assert "damaged" in sentence(latents_of, "wan", cache_copy)  # the key is not of these settings
    rewrite(cache_copy / "cache.json", settings={**settings, "fps": 9},
            key=common.files.digest({**settings, "fps": 9}))
    assert "stale" in sentence(latents_of, "wan", cache_copy)
    rewrite(cache_copy / "index.json", key=common.files.digest({**settings, "fps": 9}))
    assert "empty.safetensors is stale" in sentence(latents_of, "wan", cache_copy)


def test_a_clip_from_another_cache_is_refused(cache_copy):
    latents = latents_of("wan", cache_copy)
    path = cache_copy / "clips" / latents.pool.files[latents.row(0)]
    tensors, about = common.store.read_tensors(path)
    common.store.write_tensors(path, tensors, {**about, "key": "another"}, "x")
    said = sentence(latents.batch, [0])
    assert "stale" in said and path.name in said


@pytest.mark.parametrize("harm", ["cut", "zeros", "gone", "empty", "other"])
def test_a_damaged_file_is_named_once_and_another_stands_in(cache_copy, capfd, harm):
    whole = latents_of("wan", cache_copy)
    row = whole.row(2)
    path = cache_copy / "clips" / whole.pool.files[row]
    raw = path.read_bytes()
    {"cut": lambda: path.write_bytes(raw[:-100]), "zeros": lambda: path.write_bytes(raw[:-64] + bytes(64)),
     "gone": path.unlink,
     "empty": lambda: path.write_bytes(b""), "other": lambda: path.write_bytes(b"x" * 3000)}[harm]()
    latents = latents_of("wan", cache_copy)
    a = latents.batch(range(3 * len(latents)))
    err = capfd.readouterr().err
    assert err.count(path.name) == 1 and err.count("\n") == 1
    stand_in = whole.pool.train[(whole.pool.train.index(row) + 1) % len(whole)]
    assert a.caption == [whole.pool.captions[stand_in if whole.row(p) == row else whole.row(p)]
                         for p in range(3 * len(whole))]
    again = latents_of("wan", cache_copy).batch([2])  # a restart that meets it first gives the same clip
    assert torch.equal(again.latent[0], a.latent[2]) and again.caption[0] == a.caption[2]


def test_nothing_left_to_read_stops(cache_copy):
    latents = latents_of("wan", cache_copy)
    for path in (cache_copy / "clips").iterdir():
        path.write_bytes(b"")
    assert "can be read" in sentence(latents.batch, [0], error=Stopped)


def test_what_lies_around_a_cache(cache_copy):
    (cache_copy / "empty.safetensors").write_bytes(b"")
    assert "empty.safetensors" in sentence(latents_of, "wan", cache_copy)
    (cache_copy / "index.json").write_text("[]")
    assert "damaged" in sentence(latents_of, "wan", cache_copy)
    (cache_copy / "index.json").unlink()
    assert "encode.py" in sentence(latents_of, "wan", cache_copy)
