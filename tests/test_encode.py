"""encode.py and the reading of its cache, against diffusers' own pipelines and VAEs with tiny random weights, and against kill -9."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common.files
import common.store
import common.video
import official.cache
import official.encoders
import official.folder
import data
from config import Stopped, UserError, preset

diffusers = pytest.importorskip("diffusers", reason="the VAEs are diffusers': pip install -r requirements-extra.txt")
transformers = pytest.importorskip("transformers", reason="the text encoders are transformers': pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="Wan's captions are cleaned with ftfy: pip install -r requirements-extra.txt")

import encode  # noqa: E402
from helpers import killed_when  # noqa: E402

LINEAGES = ("cogvideox", "wan")
SIZE = dict(frames=9, fps=8, height=16, width=32)
RECORDS = [  # the sixth is no video, the seventh is not there
    {"file": "a.mp4", "en_caption": "a red ball falls on the floor", "en_caption_1": "a ball", "phys_law": "gravity acts", "q0": "collision"},
    {"file": "b.mp4", "en_caption": "ice  melts &amp; drips\n", "en_caption_1": "ice", "q1": "melting, levitation", "q4": "no change"},
    {"file": "c.mp4", "en_caption": "the floor is lÃ©ft", "en_caption_1": "floor", "q3": "yes"},
    {"file": "long.mp4", "en_caption": "ball " * 600, "en_caption_1": "balls"},
    {"file": "e.mp4", "en_caption": "smoke rises", "en_caption_1": "smoke", "q0": "gas motion"},
    {"file": "broken.mp4", "en_caption": "nothing", "en_caption_1": "no"},
    {"file": "absent.mp4", "en_caption": "nothing", "en_caption_1": "no"},
]


# -------------------------------------------------------------------------------------------- tiny weights, real videos
def make_weights(folder, lineage, seed=0):
    """A folder in diffusers' layout with random weights whose norms are not one, so that a skipped norm would show."""
    torch.manual_seed(seed)
    small = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    if lineage == "wan":
        text = transformers.UMT5EncoderModel(transformers.UMT5Config(**small))
        vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=[.1, -.2, .3, 0.],
                                         latents_std=[1.5, 2., .5, 1.])
    else:
        text = transformers.T5EncoderModel(transformers.T5Config(**small))
        vae = diffusers.AutoencoderKLCogVideoX(block_out_channels=(4, 4, 4, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
                                               scaling_factor=0.7)
    with torch.no_grad():
        for name, parameter in [*text.named_parameters(), *vae.named_parameters()]:
            if "norm" in name and name.endswith(("weight", "gamma")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    words = "a red ball falls on the floor and bounces ice melts is smoke".split()
    vocabulary = [("<pad>", 0.), ("</s>", 0.), ("<unk>", -9.), ("▁", -2.), *(("▁" + word, -3.) for word in words),
                  *((letter, -6.) for letter in "abcdefghijklmnopqrstuvwxyz&;é")]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    text.save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {lineage: make_weights(folder / lineage, lineage) for lineage in LINEAGES}


def movie(path, seed, frames=12, height=20, width=36):
    """Blots that drift, different in every video; H.264, 8 frames a second."""
    rng = np.random.default_rng(seed)
    big = np.kron(rng.integers(0, 256, (height // 4, width // 4 + frames, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    iio.imwrite(path, np.stack([big[:, 2 * i:2 * i + width] for i in range(frames)]), fps=8, codec="libx264", plugin="pyav")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("a", "b", "c", "long", "e")):
        movie(folder / f"{name}.mp4", seed, frames=28 if name == "long" else 12)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "captions.json").write_text(json.dumps(RECORDS))
    return folder


def flags_of(videos, weights, out, **fields):
    """The command line of encode.py."""
    flags = {**SIZE, "text_batch": 2, "device": "cpu", **fields}
    return ["--videos", str(videos), "--weights", str(weights), "--out", str(out),
            *(word for field, value in flags.items() for word in (f"--{field}", str(value)))]


def run(videos, weights, out, *more, **fields):
    encode.main([*flags_of(videos, weights, out, **fields), *more])
    return out


@pytest.fixture(scope="module")
def caches(weights, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    return {lineage: run(videos, weights[lineage], folder / lineage) for lineage in LINEAGES}


def cfg_of(lineage, **overrides):
    sizes = dict(lineage=lineage, latent=True, channels=4, text_dim=16, text_len=226 if lineage == "cogvideox" else 512, patch=2,
                 patch_t=1, val_clips=2, **SIZE)
    return preset("small", **{**sizes, **overrides})


def opened(lineage, cache, **overrides):
    cfg = cfg_of(lineage, **overrides)
    return official.cache.Latents(cfg, official.cache.open_cache(cfg, cache))


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sentence(call, *args, error=UserError, **kwargs):
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("."), said
    return said


# ------------------------------------------------------------------------------------------------- against the libraries
def pipeline(lineage, weights):
    """diffusers' own pipeline, from the same folder, without its transformer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights / "tokenizer")
    if lineage == "wan":
        return diffusers.WanPipeline(tokenizer, transformers.UMT5EncoderModel.from_pretrained(weights / "text_encoder"),
                                     diffusers.AutoencoderKLWan.from_pretrained(weights / "vae"), None)
    return diffusers.CogVideoXPipeline(tokenizer, transformers.T5EncoderModel.from_pretrained(weights / "text_encoder"),
                                       diffusers.AutoencoderKLCogVideoX.from_pretrained(weights / "vae"), None, None)


def prompt_embeddings(pipe, prompts, length):
    """(B, L, D_text) of the pipeline's own text encoder."""
    return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length, device="cpu")[0]


PROMPTS = ["a red ball falls", "", "ice  melts &amp;amp; drips\n on the floor", "lÃ©ft", "ball " * 600]


@torch.no_grad()
@pytest.mark.parametrize("lineage", LINEAGES)
def test_text_is_what_the_pipeline_makes_of_it(weights, lineage):
    encoder = official.encoders.TextEncoder(weights[lineage])
    ours, lengths = encoder(PROMPTS, batch=2)
    length = encoder.lineage.text_len
    theirs = prompt_embeddings(pipeline(lineage, weights[lineage]), PROMPTS, length)
    assert ours.shape == (5, length, 16) and (ours - theirs).abs().max() < 1e-6
    assert lengths[:2].tolist() == [5, 0] and lengths[4] == length  # </s> is counted; an empty caption has none
    assert encoder.too_long(PROMPTS) == 1
    # the test can tell: the other lineage's rule is far off
    tokens = encoder.tokenizer(PROMPTS[0], padding="max_length", max_length=length, return_tensors="pt")
    masked = encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    unmasked = encoder.model(tokens.input_ids).last_hidden_state[0]
    right, wrong = (masked, unmasked) if lineage == "wan" else (unmasked, masked)
    assert (ours[0] - right)[:5].abs().max() < 1e-6 and (ours[0] - wrong)[:5].abs().max() > 1e-2
    assert (ours[0, 5:].abs().max() == 0) == (lineage == "wan")


@torch.no_grad()
@pytest.mark.parametrize("lineage", LINEAGES)
def test_vae_is_diffusers_and_its_scale_the_pipelines(weights, lineage):
    vae, theirs = official.encoders.VAE(weights[lineage]), pipeline(lineage, weights[lineage]).vae
    video = torch.rand(2, 3, 17, 16, 32) * 2 - 1
    latent, posterior = vae.encode(video), theirs.encode(video).latent_dist
    assert latent["mean"].shape == (2, 4, 5, 2, 4) and vae.channels == 4
    if lineage == "wan":
        mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
        assert set(latent) == {"mean"} and torch.allclose(latent["mean"], (posterior.mode() - mean) / std, atol=1e-5)
        back = latent["mean"] * std + mean
    else:
        noise = torch.randn_like(latent["mean"])
        drawn = latent["mean"] + latent["std"] * noise
        assert torch.allclose(drawn, (posterior.mean + posterior.std * noise) * 0.7, atol=1e-5)
        back = latent["mean"] / 0.7
    decoded = vae.decode(latent["mean"])
    assert decoded.shape == video.shape and torch.allclose(decoded, theirs.decode(back).sample.clamp(-1, 1), atol=1e-5)
    assert decoded.abs().max() <= 1


def test_chunks_belong_to_cogvideoxs_vae(weights):
    """GroupNorm takes its statistics over a chunk: 16 frames at once are another model."""
    vae, video = official.encoders.VAE(weights["cogvideox"]), torch.rand(1, 3, 17, 16, 32) * 2 - 1
    right = vae.encode(video)["mean"]
    vae.model.num_sample_frames_batch_size = 16
    assert (vae.encode(video)["mean"] - right).abs().max() > 1e-3


@pytest.mark.parametrize("lineage", LINEAGES)
def test_tiles_change_little(weights, lineage):
    whole, tiled = (official.encoders.VAE(weights[lineage], tiled=tiled) for tiled in (False, True))
    tile = tiled.model  # tiles that these small clips exceed; CogVideoX's overlap, a sixth and a fifth, must be whole latents
    tile.tile_sample_min_height, tile.tile_sample_min_width, tile.tile_latent_min_height, tile.tile_latent_min_width = 48, 40, 6, 5
    tile.tile_sample_stride_height, tile.tile_sample_stride_width = 40, 32
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    video = torch.stack([x, y, x * y])[None, :, None].repeat(1, 1, 5, 1, 1)
    a, b = whole.encode(video)["mean"], tiled.encode(video)["mean"]
    assert a.shape == b.shape and 0 < (a - b).abs().mean() < a.std()
    c, d = whole.decode(a), tiled.decode(a)
    assert c.shape == d.shape and 0 < (c - d).abs().mean() < c.std()


# ------------------------------------------------------------------------------------------------ the cache, read back
@torch.no_grad()
@pytest.mark.parametrize("lineage", LINEAGES)
def test_cache_reads_back_what_diffusers_gives_for_the_file(weights, videos, caches, lineage):
    latents = opened(lineage, caches[lineage], caption_dropout=0.0)
    cache, theirs = latents.pool, pipeline(lineage, weights[lineage])
    assert len(cache.files) == 7 and sorted(cache.train + cache.held) == list(range(7))  # three windows of the long one
    assert "7 clips from 5 videos" in cache.summary and "1 of 6 videos" in cache.summary
    length, seen = cfg_of(lineage).text_len, {}
    for position in range(len(latents)):
        batch = latents.batch([position])
        row = latents.row(position)
        record = next(r for r in RECORDS if r["en_caption"].strip() == batch.caption[0])
        window = seen.setdefault(record["file"], 0)
        seen[record["file"]] += 1
        about = common.store.read_about(caches[lineage] / "clips" / cache.files[row])
        window = next(w for w in common.video.windows_of(videos / record["file"], cfg_of(lineage)) if w.start == about["times"][0])
        posterior = theirs.vae.encode(common.video.pixels(window.video)[None]).latent_dist
        if lineage == "wan":
            mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (theirs.vae.config.latents_mean, theirs.vae.config.latents_std))
            expected = (posterior.mode() - mean) / std
        else:
            noise = np.random.default_rng([0, 5, position]).standard_normal((4, 3, 2, 4), np.float32)
            expected = 0.7 * (posterior.mean + posterior.std * torch.from_numpy(noise))
        text = prompt_embeddings(theirs, [batch.caption[0]], length)
        assert batch.x is batch.latent and batch.video is None and batch.latent.shape == (1, 4, 3, 2, 4)
        assert torch.allclose(batch.latent, expected, atol=1e-5) and torch.allclose(batch.text, text, atol=1e-6)
        assert batch.text.shape == (1, length, 16) and 0 < batch.text_length[0] <= length
        names = [data.category_names(cfg_of(lineage))[c] for c in batch.categories[0].nonzero().flatten()]
        assert names == [q for q in ("collision", "melting", "gas motion") if q in str(record)]
        assert batch.target.shape == (1, 3 * 1 * 2, 17) and batch.target_mask.sum() == 0
    assert sum(seen.values()) == len(latents)


def test_a_clip_says_where_it_comes_from(videos, caches):
    cache = opened("wan", caches["wan"]).pool
    row = [i for i, caption in enumerate(cache.captions) if caption.startswith("ball ball")][1]
    tensors, about = common.store.read_tensors(caches["wan"] / "clips" / cache.files[row])
    assert about["file"] == "long.mp4" and about["times"] == [9 / 8, 18 / 8] and about["size"] == [20, 36]
    assert about["crop"] == [0, 1, 36, 19] and about["caption"].startswith("ball ball")  # 2 : 1 of 36 x 20
    assert set(tensors) == {"mean", "text", "categories"} and tensors["categories"].shape == (29,)
    assert cache.files[row].endswith("-1of3.safetensors")


def test_29_categories_by_switch(caches):
    latents = opened("wan", caches["wan"], categories=29)
    row = next(i for i, caption in enumerate(latents.pool.captions) if caption.startswith("ice"))
    assert [data.category_names(latents.cfg)[c] for c in latents.categories[row].nonzero().flatten()] == ["melting", "no change"]


@pytest.mark.parametrize("lineage", LINEAGES)
def test_dropped_captions_are_the_empty_one(caches, weights, lineage):
    latents = opened(lineage, caches[lineage], caption_dropout=0.5)
    batch = latents.batch(range(40))
    dropped = latents.dropped(list(range(40)))
    assert 5 < dropped.sum() < 35 and torch.equal(batch.text_length == 0, dropped)
    empty = official.encoders.TextEncoder(weights[lineage])([""])[0][0]
    assert (batch.text[dropped] - empty).abs().max() < 1e-6 and (batch.text[~dropped] - empty).abs().amax((1, 2)).min() > 1e-3
    assert (latents.held_out().text_length > 0).all()
    with_captions = opened(lineage, caches[lineage], caption_dropout=0.0).batch(range(40))
    assert torch.equal(with_captions.latent, batch.latent) and with_captions.caption == batch.caption


def test_a_batch_is_a_function_of_seed_and_position(caches):
    latents = opened("cogvideox", caches["cogvideox"])
    batch = latents.batch([3, 11, 4])
    for i, position in enumerate((3, 11, 4)):
        one = opened("cogvideox", caches["cogvideox"]).batch([position])
        assert all(torch.equal(getattr(one, name)[0], getattr(batch, name)[i]) for name in ("latent", "text", "text_length", "index"))
    same = next(p for p in range(len(latents), 2 * len(latents)) if latents.row(p) == latents.row(3))  # the same clip an epoch later has other noise
    assert not torch.equal(latents.batch([same]).latent, latents.batch([3]).latent)
    other = opened("cogvideox", caches["cogvideox"], seed=1)
    assert not torch.equal(other.batch([3]).latent, batch.latent[:1])
    assert torch.equal(other.held_out().latent, latents.held_out().latent)
    assert batch.to("cpu").video is None


def test_opening_reads_no_clip(caches, monkeypatch):
    read = []
    monkeypatch.setattr(common.store, "read_tensors", lambda path, real=common.store.read_tensors: read.append(path.name) or real(path))
    latents = opened("wan", caches["wan"])
    assert read == ["empty.safetensors"]
    latents.batch([0, 1])
    assert len(read) == 3


# -------------------------------------------------------------------------------------------------- stale and damaged
@pytest.fixture()
def copy(caches, tmp_path):
    return Path(shutil.copytree(caches["wan"], tmp_path / "copy"))


def rewrite(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def test_a_cache_of_other_sizes_or_lineage_is_refused(caches):
    for field, value in dict(frames=13, height=32, lineage="cogvideox", channels=16, text_dim=32).items():
        said = sentence(official.cache.open_cache, dataclasses.replace(cfg_of("wan"), **{field: value}), caches["wan"])
        assert f"--{field}" in said and str(SIZE.get(field, "")) in said


def test_a_cache_of_other_weights_is_refused(caches, weights, tmp_path):
    """2B and 5B have one VAE with two scales: only the fingerprint tells their caches apart."""
    cfg = cfg_of("cogvideox")
    assert official.cache.open_cache(cfg, caches["cogvideox"], official.folder.identity(weights["cogvideox"])).train
    other = Path(shutil.copytree(weights["cogvideox"], tmp_path / "other"))
    rewrite(other / "vae" / "config.json", scaling_factor=1.15258426)
    assert "made with vae" in sentence(official.cache.open_cache, cfg, caches["cogvideox"], official.folder.identity(other))


def test_stale_files_are_refused(copy, weights, videos, tmp_path):
    settings = json.loads((copy / "cache.json").read_text())["settings"]
    rewrite(copy / "cache.json", settings={**settings, "fps": 9})
    assert "damaged" in sentence(opened, "wan", copy)  # the key is not of these settings
    rewrite(copy / "cache.json", settings={**settings, "fps": 9}, key=common.files.digest({**settings, "fps": 9}))
    assert "stale" in sentence(opened, "wan", copy)
    rewrite(copy / "index.json", key=common.files.digest({**settings, "fps": 9}))
    assert "empty.safetensors is stale" in sentence(opened, "wan", copy)


def test_a_clip_from_another_cache_is_refused(copy):
    latents = opened("wan", copy)
    path = copy / "clips" / latents.pool.files[latents.row(0)]
    tensors, about = common.store.read_tensors(path)
    common.store.write_tensors(path, tensors, {**about, "key": "another"}, "x")
    said = sentence(latents.batch, [0])
    assert "stale" in said and path.name in said


@pytest.mark.parametrize("harm", ["cut", "zeros", "gone", "empty", "other"])
def test_a_damaged_file_is_named_once_and_another_stands_in(copy, capfd, harm):
    whole = opened("wan", copy)
    row = whole.row(2)
    path = copy / "clips" / whole.pool.files[row]
    raw = path.read_bytes()
    {"cut": lambda: path.write_bytes(raw[:-100]), "zeros": lambda: path.write_bytes(raw[:-64] + bytes(64)), "gone": path.unlink,
     "empty": lambda: path.write_bytes(b""), "other": lambda: path.write_bytes(b"x" * 3000)}[harm]()
    latents = opened("wan", copy)
    a = latents.batch(range(3 * len(latents)))
    err = capfd.readouterr().err
    assert err.count(path.name) == 1 and err.count("\n") == 1
    stand_in = whole.pool.train[(whole.pool.train.index(row) + 1) % len(whole)]
    assert a.caption == [whole.pool.captions[stand_in if whole.row(p) == row else whole.row(p)] for p in range(3 * len(whole))]
    again = opened("wan", copy).batch([2])  # a restart that meets it first gives the same clip
    assert torch.equal(again.latent[0], a.latent[2]) and again.caption[0] == a.caption[2]


def test_nothing_left_to_read_stops(copy):
    latents = opened("wan", copy)
    for path in (copy / "clips").iterdir():
        path.write_bytes(b"")
    assert "can be read" in sentence(latents.batch, [0], error=Stopped)


def test_what_lies_around_a_cache(copy):
    (copy / "empty.safetensors").write_bytes(b"")
    assert "empty.safetensors" in sentence(opened, "wan", copy)
    (copy / "index.json").write_text("[]")
    assert "damaged" in sentence(opened, "wan", copy)
    (copy / "index.json").unlink()
    assert "encode.py" in sentence(opened, "wan", copy)


# ------------------------------------------------------------------------------------------------------- the command
def test_shards_make_what_one_process_makes(weights, videos, caches, tmp_path, capsys):
    for shard in ("1/2", "2/2"):
        run(videos, weights["wan"], tmp_path / "halves", shard=shard)
        assert f"from {dict([('1/2', 3), ('2/2', 5)])[shard]} of 6 videos" in capsys.readouterr().out
    assert files_of(tmp_path / "halves") == files_of(caches["wan"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "halves" / "clips").iterdir()}
    run(videos, weights["wan"], tmp_path / "halves", shard="1/3")  # nothing is made twice
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "halves" / "clips").iterdir()}


def test_bad_videos_unknown_names_and_long_captions_are_counted(weights, videos, tmp_path, capsys):
    run(videos, weights["wan"], tmp_path / "out")
    said = capsys.readouterr()
    assert "7 clips made, 0 were there" in said.out and "7 from 5 of 6 videos" in said.out
    assert "skipped 2: absent.mp4 (missing), broken.mp4 (Invalid data" in said.out
    assert "1 unknown category names: 'levitation' (1)" in said.out and "1 captions have more than 512 tokens" in said.out
    assert "6/6" in said.err  # the bar


def test_a_truncated_clip_is_made_again(copy, weights, videos, capsys):
    before = files_of(copy)
    path = copy / "clips" / opened("wan", copy).pool.files[3]
    path.write_bytes(path.read_bytes()[:-9])
    run(videos, weights["wan"], copy)
    assert "1 clips made, 6 were there" in capsys.readouterr().out and files_of(copy) == before


def test_what_changes_gets_another_name_and_is_read(weights, videos, copy, tmp_path):
    folder = Path(shutil.copytree(videos, tmp_path / "videos"))  # keeps times
    old = opened("wan", copy).pool
    run(folder, weights["wan"], copy)
    assert opened("wan", copy).pool.files == old.files
    records = [{**record} for record in RECORDS]
    records[0]["en_caption"] = "another caption"
    (folder / "captions.json").write_text(json.dumps(records))
    movie(folder / "b.mp4", 99)
    run(folder, weights["wan"], copy)
    new = opened("wan", copy).pool
    changed = [old.captions[i][:3] for i in range(7) if old.files[i] != new.files[i]]
    assert changed == ["a r", "ice"] and new.captions[0] == "another caption" and new.key != old.key


def test_captions_by_switch(weights, videos, tmp_path):
    (tmp_path / "two.json").write_text(json.dumps(RECORDS[:2]))
    run(videos, weights["wan"], tmp_path / "out", "--phys_law", captions="short", annotations=tmp_path / "two.json")
    assert opened("wan", tmp_path / "out").pool.captions == ["a ball gravity acts", "ice"]


def test_another_setting_is_refused(copy, weights, videos):
    assert "fps 8.0, now 9.0" in sentence(run, videos, weights["wan"], copy, fps=9)
    before = files_of(copy)
    assert "lineage 'wan', now 'cogvideox'" in sentence(run, videos, weights["cogvideox"], copy)
    assert files_of(copy) == before


def test_other_weights_are_other_settings(copy, videos, tmp_path):
    other = make_weights(tmp_path / "other", "wan", seed=1)
    said = sentence(run, videos, other, copy)
    assert "vae" in said and "text_encoder" in said and "tokenizer" not in said


def test_a_damaged_empty_caption_is_made_again(copy, weights, videos, capsys):
    before = files_of(copy)
    shorten(copy / "empty.safetensors")
    run(videos, weights["wan"], copy)
    assert "0 clips made, 7 were there" in capsys.readouterr().out and files_of(copy) == before


def test_a_folder_without_clips_may_change_its_settings(weights, videos, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(RECORDS[5:]))
    sentence(run, videos, weights["wan"], tmp_path / "out", annotations=tmp_path / "bad.json")
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    run(videos, weights["cogvideox"], tmp_path / "out", annotations=tmp_path / "one.json")
    latents = opened("cogvideox", tmp_path / "out")
    assert latents.pool.captions == [RECORDS[0]["en_caption"]] and "a single one" in latents.pool.summary


def test_none_left_is_one_sentence(weights, videos, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(RECORDS[5:]))
    said = sentence(run, videos, weights["wan"], tmp_path / "out", annotations=tmp_path / "bad.json")
    assert "No clip" in said and "absent.mp4 (missing), broken.mp4 (" in said


def test_bf16_is_what_float32_gives_to_rounding(weights, videos, caches, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[:1]))
    exact = opened("cogvideox", caches["cogvideox"])
    run(videos, weights["cogvideox"], tmp_path / "out", dtype="bf16", annotations=tmp_path / "one.json")
    tensors, _ = common.store.read_tensors(next((tmp_path / "out" / "clips").iterdir()))
    reference, _ = common.store.read_tensors(exact.pool.folder / "clips" / exact.pool.files[0])
    for name in ("mean", "std", "text"):
        assert tensors[name].dtype == torch.bfloat16
        assert (tensors[name].float() - reference[name]).norm() < 0.05 * reference[name].norm(), name


@pytest.mark.parametrize("flags, words", [
    (dict(frames=8), "1 + 4 m"), (dict(height=24), "multiple of 16"), (dict(fps=0), "--fps"), (dict(fps="nan"), "--fps"),
    (dict(shard="3/2"), "--shard"), (dict(shard="x"), "--shard"), (dict(annotations="nowhere.json"), "nowhere.json"),
    (dict(captions="middling"), "captions"), (dict(windows=-1), "--windows")])
def test_wrong_flags_are_one_sentence(weights, videos, tmp_path, flags, words):
    assert words in sentence(run, videos, weights["wan"], tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_hold_a_cache(weights, videos, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot hold a cache" in sentence(run, videos, weights["wan"], tmp_path / "file")


def test_sizes_come_from_the_lineage(weights, tmp_path):
    sizes = lambda folder: dataclasses.astuple(official.folder.lineage_of(folder))[5:]  # noqa: E731
    assert sizes(weights["cogvideox"]) == (49, 8, 480, 720) and sizes(weights["wan"]) == (81, 16, 480, 832)
    folder = Path(shutil.copytree(weights["cogvideox"], tmp_path / "newer"))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": 2}')
    assert sizes(folder) == (81, 16, 768, 1360)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert "mixes" in sentence(official.folder.lineage_of, folder)


def test_official_tokenizers_come_as_sentencepiece(weights, tmp_path):
    """CogVideoX ships spiece.model without tokenizer.json: ids and embeddings must not change with the form."""
    spm = pytest.importorskip("sentencepiece", reason="official tokenizers are sentencepiece models: pip install -r requirements-extra.txt")
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece models with protobuf: pip install -r requirements-extra.txt")
    folder = Path(shutil.copytree(weights["cogvideox"], tmp_path / "official"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    spm.SentencePieceTrainer.train(sentence_iterator=iter([r["en_caption"] for r in RECORDS] * 20), model_prefix=str(folder / "tokenizer" / "spiece"),
                                   vocab_size=45, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", '
                                                                '"pad_token": "<pad>", "unk_token": "<unk>"}')
    encoder, plain = official.encoders.TextEncoder(folder), spm.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    caption = "a red ball falls"
    assert encoder.tokenizer(caption).input_ids == [*plain.encode(caption), 1]


# ---------------------------------------------------------------------------------------------------- broken weights
def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def resave(path, change):
    import safetensors.torch
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if tensors[name].dim() > 1)
    changed = change(tensors[name])
    tensors.pop(name) if changed is None else tensors.update({name: changed})
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


HARMS = {
    "no vae": ("vae", lambda f: shutil.rmtree(f), "config.json"),
    "no text encoder": ("text_encoder", lambda f: shutil.rmtree(f), "text_encoder"),
    "no tokenizer": ("tokenizer", lambda f: shutil.rmtree(f), "tokenizer"),
    "empty tokenizer": ("tokenizer", lambda f: [p.unlink() for p in f.iterdir()], "tokenizer_config.json"),
    "pickled": ("text_encoder", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled"),
    "cut short": ("text_encoder", lambda f: shorten(f / "model.safetensors"), "damaged"),
    "missing shard": ("text_encoder", lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"shared.weight": "model-00002-of-00002.safetensors"}})), "lacks model-00002-of-00002.safetensors"),
    "wrong config": ("text_encoder", lambda f: rewrite(f / "config.json", d_ff=48), "text_encoder"),
    "wrong model": ("text_encoder", lambda f: rewrite(f / "config.json", model_type="bert"), "'bert'"),
    "no JSON": ("vae", lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "unknown VAE": ("vae", lambda f: rewrite(f / "config.json", _class_name="AutoencoderKL"), "AutoencoderKLWan"),
    "shape": ("vae", lambda f: rewrite(f / "config.json", base_dim=8), "vae"),
    "whole numbers": ("vae", lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: t.to(torch.int8)), "floating point"),
    "NaN": ("vae", lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: t * float("nan")), "not finite"),
    "missing tensor": ("vae", lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: None), "vae"),
    "missing tensor of text": ("text_encoder", lambda f: resave(f / "model.safetensors", lambda t: None), "text_encoder"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_broken_weights_are_one_sentence(weights, videos, tmp_path, harm):
    folder = Path(shutil.copytree(weights["wan"], tmp_path / "weights"))
    part, break_it, words = HARMS[harm]
    break_it(folder / part)
    assert words in sentence(run, videos, folder, tmp_path / "out")


def test_a_missing_package_is_named(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "diffusers" in sentence(official.encoders.VAE, weights["wan"]) and "requirements-extra.txt" in sentence(official.encoders.VAE, weights["wan"])


# ------------------------------------------------------------------------------------------------------------- kill -9
def test_kill_9_loses_and_doubles_nothing(weights, videos, caches, tmp_path, capsys):
    out, clips = tmp_path / "killed", tmp_path / "killed" / "clips"
    command = ["encode.py", *flags_of(videos, weights["wan"], out)]
    finished = lambda: [] if not clips.exists() else [f for f in os.listdir(clips) if f.endswith(".safetensors")]  # noqa: E731
    assert killed_when(lambda: len(finished()) == 2, command)  # between two clips
    survived = {f: (clips / f).stat().st_mtime_ns for f in finished()}
    assert 2 <= len(survived) < 7 and not (out / "index.json").exists()
    assert killed_when(lambda: any(f.endswith(".part") and f[:24] not in str(survived) for f in os.listdir(clips)), command)
    capsys.readouterr()
    (clips / f"{'0' * 24}-0of1.safetensors.1of1.part").write_bytes(b"half")  # what a kill in the midst of a write leaves
    run(videos, weights["wan"], out)
    said = capsys.readouterr().out
    assert files_of(out) == files_of(caches["wan"]) and "0 were there" not in said
    assert survived.items() <= {f: (clips / f).stat().st_mtime_ns for f in finished()}.items()


def test_errors_have_their_exit_codes(tmp_path):
    """The real command, as a process: 2, one sentence, no traceback."""
    done = subprocess.run([sys.executable, "encode.py", "--videos", "x", "--weights", str(tmp_path), "--out", "y"], capture_output=True, text=True,
                          cwd=Path(encode.__file__).parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "vae" in done.stderr
