"""Every way in which a folder of official weights can be wrong, and what its config says."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
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


def spoil(part, **changed):
    """A harm that changes a part's config."""
    return lambda folder: rewrite(folder / part / "config.json", **changed)


def index_says(**fields):
    """A harm: the folder's model_index.json says this."""
    return lambda folder: (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "_diffusers_version": "0.35.0", "vae": ["diffusers", "x"],
                    "transformer_2": [None, None], "boundary_ratio": None, **fields}))


def other_tokenizer(*first, more=40):
    """A harm: the tokenizer of another model, with these tokens first."""
    words = [*first, "▁", *(f"▁word{i}" for i in range(more))]
    return lambda folder: transformers.T5Tokenizer(
        vocab=[(word, -2.0) for word in words], extra_ids=0).save_pretrained(folder / "tokenizer")


UNKNOWN = {  # what is whole, and no model that is known here
    "a second transformer": (lambda f: shutil.copytree(f / "transformer", f / "transformer_2"),
                             "transformer_2"),
    "a boundary between transformers": (index_says(boundary_ratio=0.875), "boundary_ratio (0.875)"),
    "times for each token": (index_says(expand_timesteps=True), "expand_timesteps"),
    "an image encoder": (index_says(image_encoder=["transformers", "CLIPVisionModel"]), "image_encoder"),
    "a pipeline of images": (index_says(_class_name="WanImageToVideoPipeline"), "WanImageToVideoPipeline"),
    "a VAE with patches": (spoil("vae", patch_size=2), "patch_size = 2"),
    "a VAE of another stride": (spoil("vae", scale_factor_spatial=16), "scale_factor_spatial = 16"),
    "a VAE of other levels": (spoil("vae", dim_mult=[1, 1, 1, 2, 2]), "dim_mult"),
    "a VAE of other times": (spoil("vae", temperal_downsample=[False, False, True]), "temperal_downsample"),
    "statistics of other channels": (spoil("vae", latents_mean=[0.0] * 3), "latents_mean"),
    "no statistics": (spoil("vae", latents_std=None), "latents_std = None"),
    "latents of other channels": (spoil("transformer", in_channels=48), "in_channels = 48"),
    "no vocabulary": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "holds no vocabulary"),
    "ids beyond the embedding": (other_tokenizer("<pad>", "</s>", "<unk>", more=100), "64 rows"),
    "a few tokens": (other_tokenizer("<pad>", "</s>", "<unk>", more=2), "has 6 tokens"),
    "special tokens of another order": (other_tokenizer("</s>", "<pad>", "<unk>"), "pad_token_id"),
    "eight bits": (lambda f: resave(f / "vae" / "diffusion_pytorch_model.safetensors",
                                    lambda t: t.to(torch.float8_e4m3fn)), "F8_E4M3"),
}


@pytest.mark.parametrize("harm", UNKNOWN)
def test_a_folder_of_what_is_not_known_is_refused_before_anything_is_written(weights, videos, tmp_path, harm):
    folder = Path(shutil.copytree(weights["wan"], tmp_path / "weights"))
    break_it, words = UNKNOWN[harm]
    break_it(folder)
    assert words in sentence(fill_cache, videos, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_of_a_known_pipeline_changes_nothing(weights, tmp_path):
    folder = Path(shutil.copytree(weights["wan"], tmp_path / "weights"))
    index_says()(folder)
    assert official.folder.lineage_of(folder) == official.folder.lineage_of(weights["wan"])
    index_says(boundary_ratio=0.9)(folder)  # train.py reads the transformer alone
    says(folder, "boundary_ratio")


def test_a_cogvideox_vae_of_another_stride_is_refused(weights, tmp_path):
    folder = Path(shutil.copytree(weights["cogvideox"], tmp_path / "weights"))
    spoil("vae", temporal_compression_ratio=8)(folder)
    assert "temporal_compression_ratio = 8" in sentence(official.folder.lineage_of, folder)


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
    assert not (tmp_path / "out").exists(), "nothing is begun before all that is read was looked at"


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


# --- which files are read
def same_weights(folder, other):
    ours, theirs = (official.weights.load_pretrained(one).state_dict() for one in (folder, other))
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_files_beside_the_official_ones_are_not_read(weights, tmp_path):
    """Averages, older weights, and a variant with an index of its own lie beside them."""
    good = weights["cogvideox"] / "transformer"
    folder = Path(shutil.copytree(good, tmp_path / "w"))
    changed = {name: tensor + 1 for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items()}
    for name in ("ema", "diffusion_pytorch_model_old", "zz", "diffusion_pytorch_model.fp16",
                 "diffusion_pytorch_model.fp16-00001-of-00001"):
        save_file(changed, folder / f"{name}.safetensors")
    for name in ("safetensors.index.fp16.json", "fp16.safetensors.index.json"):
        where = dict.fromkeys(changed, "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
        (folder / f"diffusion_pytorch_model.{name}").write_text(json.dumps({"weight_map": where}))
    assert same_weights(folder, good)


def test_of_two_whole_indices_the_one_without_a_variant_is_read(broken, tmp_path):
    good = Path(shutil.copytree(broken, tmp_path / "good"))
    index = broken / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    for name in set(where.values()):
        half = {tensor: value.half() for tensor, value in load_file(broken / name).items()}
        save_file(half, broken / name.replace("model-", "model.fp16-"))
    where = {tensor: name.replace("model-", "model.fp16-") for tensor, name in where.items()}
    (broken / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (broken / "a.safetensors.index.json").write_text("{")
    assert same_weights(broken, good)


def test_a_variant_alone_is_named_with_what_it_would_have_to_be_called(broken):
    (broken / "diffusion_pytorch_model.safetensors.index.json").unlink()
    says(broken, "neither diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-")


def test_a_whole_file_beside_an_index_of_others_is_refused(broken, weights):
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(weights["cogvideox"] / "transformer" / name, broken / name)
    says(broken, "both", name, "index.json")


def test_an_index_names_files_of_its_own_folder_alone(broken, weights):
    """Otherwise a folder could be filled from a place that its fingerprint does not know."""
    index = broken / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    outside = Path(shutil.move(sorted(broken.glob("*.safetensors"))[0], broken.parent / "outside.safetensors"))
    changed = {name: f"../{outside.name}" if not (broken / file).exists() else file for name, file in where.items()}
    index.write_text(json.dumps({"weight_map": changed}))
    says(broken, "lacks outside.safetensors")


def test_a_tensor_in_two_files_is_refused(broken):
    first, second = sorted(broken.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file(load_file(second) | {name: tensors[name] + 1}, second)
    says(broken, name, first.name, second.name)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
def test_names_of_comfyui_are_recognised(weights, tmp_path, prefix):
    folder = Path(shutil.copytree(weights["wan"] / "transformer", tmp_path / "w"))
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(path).items()}, path)
    says(folder, "ComfyUI", f"{prefix}*")
