"""Text encoders and VAEs against diffusers' own pipelines, with tiny random weights."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="needs ftfy: pip install -r requirements-extra.txt")

import official.encoders  # noqa: E402
from helpers import sentence  # noqa: E402
from tiny_weights import LINEAGES, RECORDS, latent_scale, pipeline, prompt_embeddings  # noqa: E402

pytestmark = pytest.mark.parity
PROMPTS = ["a red ball falls", "", "ice  melts &amp;amp; drips\n on the floor", "lÃ©ft", "ball " * 600]


@torch.no_grad()
@pytest.mark.parametrize("lineage", LINEAGES)
def test_text_is_what_the_pipeline_makes_of_it(weights, lineage):
    encoder = official.encoders.TextEncoder(weights[lineage])
    ours, lengths = encoder(PROMPTS, batch=2)
    length = encoder.lineage.preset.text_len
    theirs = prompt_embeddings(pipeline(lineage, weights[lineage]), PROMPTS, length)
    assert ours.shape == (5, length, 16) and (ours - theirs).abs().max() < 1e-6
    # </s> is counted; an empty caption has none
    assert lengths[:2].tolist() == [5, 0] and lengths[4] == length
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
    assert latent["mean"].shape == (2, 4, 5, 2, 4)
    if lineage == "wan":
        mean, std = latent_scale(theirs)
        assert set(latent) == {"mean"}
        assert torch.allclose(latent["mean"], (posterior.mode() - mean) / std, atol=1e-5)
        back = latent["mean"] * std + mean
    else:
        noise = torch.randn_like(latent["mean"])
        drawn = latent["mean"] + latent["std"] * noise
        assert torch.allclose(drawn, (posterior.mean + posterior.std * noise) * 0.7, atol=1e-5)
        back = latent["mean"] / 0.7
    decoded = vae.decode(latent["mean"])
    assert decoded.shape == video.shape
    assert torch.allclose(decoded, theirs.decode(back).sample.clamp(-1, 1), atol=1e-5)
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
    # tiles that these small clips exceed; CogVideoX's overlap, a sixth and a fifth, must be whole latents
    tile = tiled.model
    tile.tile_sample_min_height, tile.tile_sample_min_width = 48, 40
    tile.tile_latent_min_height, tile.tile_latent_min_width = 6, 5
    tile.tile_sample_stride_height, tile.tile_sample_stride_width = 40, 32
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    video = torch.stack([x, y, x * y])[None, :, None].repeat(1, 1, 5, 1, 1)
    a, b = whole.encode(video)["mean"], tiled.encode(video)["mean"]
    assert a.shape == b.shape and 0 < (a - b).abs().mean() < a.std()
    c, d = whole.decode(a), tiled.decode(a)
    assert c.shape == d.shape and 0 < (c - d).abs().mean() < c.std()


def test_official_tokenizers_come_as_sentencepiece(weights, tmp_path):
    """CogVideoX ships spiece.model without tokenizer.json:
    ids and embeddings must not change with the form."""
    spm = pytest.importorskip(
        "sentencepiece",
        reason="official tokenizers need sentencepiece: pip install -r requirements-extra.txt")
    pytest.importorskip(
        "google.protobuf", reason="sentencepiece models need protobuf: pip install -r requirements-extra.txt")
    folder = Path(shutil.copytree(weights["cogvideox"], tmp_path / "official"))
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    spm.SentencePieceTrainer.train(sentence_iterator=iter([r["en_caption"] for r in RECORDS] * 20),
                                   model_prefix=str(folder / "tokenizer" / "spiece"),
                                   vocab_size=45, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                                   hard_vocab_limit=False, minloglevel=2)
    its_config = dict(tokenizer_class="T5Tokenizer", extra_ids=0, eos_token="</s>", pad_token="<pad>",
                      unk_token="<unk>")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(its_config))
    encoder = official.encoders.TextEncoder(folder)
    plain = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    caption = "a red ball falls"
    assert encoder.tokenizer(caption).input_ids == [*plain.encode(caption), 1]


def test_a_missing_package_is_named(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "diffusers" in sentence(official.encoders.VAE, weights["wan"])
    assert "requirements-extra.txt" in sentence(official.encoders.VAE, weights["wan"])
