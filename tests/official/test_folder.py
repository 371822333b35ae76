"""Every way in which a folder of official weights can be wrong, and what its config says."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="needs ftfy: pip install -r requirements-extra.txt")

import official.folder  # noqa: E402
import official.weights  # noqa: E402
from config import UserError  # noqa: E402
from helpers import resave, rewrite, sentence, shorten  # noqa: E402
from tiny_weights import fill_cache  # noqa: E402


# -------------------------------------------------------------------------------------- as encode.py reads it
def test_sizes_come_from_the_lineage(weights, tmp_path):
    def sizes(folder):
        preset = official.folder.lineage_of(folder).preset
        return preset.frames, preset.fps, preset.height, preset.width
    assert sizes(weights["cogvideox"]) == (49, 8, 480, 720) and sizes(weights["wan"]) == (81, 16, 480, 832)
    folder = Path(shutil.copytree(weights["cogvideox"], tmp_path / "copy"))
    (folder / "transformer" / "config.json").write_text(
        '{"_class_name": "CogVideoXTransformer3DModel", "patch_size_t": 2}')
    assert sizes(folder) == (81, 16, 768, 1360)
    (folder / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert "mixes" in sentence(official.folder.lineage_of, folder)
    shutil.rmtree(folder / "transformer")  # encode.py needs none
    assert sizes(folder) == (49, 8, 480, 720)


HARMS = {
    "no vae": ("vae", lambda f: shutil.rmtree(f), "config.json"),
    "no text encoder": ("text_encoder", lambda f: shutil.rmtree(f), "text_encoder"),
    "no tokenizer": ("tokenizer", lambda f: shutil.rmtree(f), "tokenizer"),
    "empty tokenizer": ("tokenizer", lambda f: [p.unlink() for p in f.iterdir()], "tokenizer_config.json"),
    "pickled": ("text_encoder", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
                "pickled"),
    "cut short": ("text_encoder", lambda f: shorten(f / "model.safetensors"), "damaged"),
    "missing shard": ("text_encoder", lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"shared.weight": "model-00002-of-00002.safetensors"}})),
                      "lacks model-00002-of-00002.safetensors"),
    "wrong config": ("text_encoder", lambda f: rewrite(f / "config.json", d_ff=48), "text_encoder"),
    "wrong model": ("text_encoder", lambda f: rewrite(f / "config.json", model_type="bert"), "'bert'"),
    "no JSON": ("vae", lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "unknown VAE": ("vae", lambda f: rewrite(f / "config.json", _class_name="AutoencoderKL"),
                    "AutoencoderKLWan"),
    "shape": ("vae", lambda f: rewrite(f / "config.json", base_dim=8), "vae"),
    "whole numbers": ("vae",
                      lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: t.to(torch.int8)),
                      "floating point"),
    "NaN": ("vae", lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: t * float("nan")),
            "not finite"),
    "missing tensor": ("vae", lambda f: resave(f / "diffusion_pytorch_model.safetensors", lambda t: None),
                       "vae"),
    "missing tensor of text": ("text_encoder", lambda f: resave(f / "model.safetensors", lambda t: None),
                               "text_encoder"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_broken_weights_are_one_sentence(weights, videos, tmp_path, harm):
    folder = Path(shutil.copytree(weights["wan"], tmp_path / "weights"))
    part, break_it, words = HARMS[harm]
    break_it(folder / part)
    assert words in sentence(fill_cache, videos, folder, tmp_path / "out")


# --- broken folders
@pytest.fixture
def broken(weights, tmp_path):
    """A copy of a good transformer in shards, to break."""
    net = official.weights.load_pretrained(weights["cogvideox"] / "transformer")
    official.weights.save_pretrained(net, tmp_path / "w", shard_bytes=40_000)
    return tmp_path / "w"


def says(folder, *words):
    with pytest.raises(UserError) as caught:
        official.weights.load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and all(word in message for word in words), message


def change(folder, edit):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    edit(tensors, sorted(tensors))
    save_file(tensors, path)


def test_a_missing_shard_is_named(broken):
    gone = sorted(broken.glob("*.safetensors"))[1]
    gone.unlink()
    says(broken, gone.name)


def test_a_truncated_shard_is_named(broken):
    path = sorted(broken.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    says(broken, path.name, "damaged")


@pytest.mark.parametrize("edit, word", [
    (lambda c: c.update(_class_name="UNet"), "UNet"),
    (lambda c: c.update(ofs_embed_dim=512), "ofs_embed_dim"), (lambda c: c.pop("num_layers"), "num_layers"),
    (lambda c: c.update(num_layers=5), "lacks"), (lambda c: c.update(num_layers=1), "unknown"),
    (lambda c: c.update(num_attention_heads="many"), "config"),
    (lambda c: c.update(num_attention_heads=4), "shape"), (lambda c: c.update(out_channels=7), "channels"),
    (lambda c: c.update(patch_size=0), "config"),
    (lambda c: c.update(use_learned_positional_embeddings=True), "use_learned_positional_embeddings"),
])
def test_a_wrong_config_is_named(broken, edit, word):
    stored = json.loads((broken / "config.json").read_text())
    edit(stored)
    (broken / "config.json").write_text(json.dumps(stored))
    says(broken, word)


def test_config_or_index_that_are_no_json(broken):
    (broken / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
    says(broken, "index.json")
    (broken / "config.json").write_text("[1, 2")
    says(broken, "config.json")
    (broken / "config.json").write_text("[1, 2]")
    says(broken, "config.json")


def test_pickled_weights_are_not_opened(broken):
    for path in broken.glob("*.safetensors*"):
        path.unlink()
    says(broken, "no .safetensors")
    (broken / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    says(broken, "pickled")


@pytest.mark.parametrize("edit, word", [
    (lambda w, n: w.update({n[0]: w[n[0]].long()}), "stored as"),
    (lambda w, n: w[n[0]].view(-1)[0].fill_(math.nan), "not finite"), (lambda w, n: w.pop(n[0]), "lacks"),
    (lambda w, n: w.update({n[0]: w[n[0]][..., :-1].contiguous()}), "shape"),
    (lambda w, n: w.update(extra=w[n[0]].clone()), "extra"),
])
def test_a_wrong_tensor_is_named(broken, edit, word):
    change(broken, edit)
    says(broken, word)


def test_no_folder_and_an_empty_one(tmp_path):
    says(tmp_path / "nowhere", "config.json")
    says(tmp_path, "config.json")
