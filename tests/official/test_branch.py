"""branch.safetensors:
what a run beside official weights publishes attaches to those weights, elsewhere, to the bit.

A file that does not fit is one sentence.
"""
import json
import shutil
import subprocess
import sys

import pytest
import safetensors
import torch

import common.store
import official.branch
import official.clips
import official.weights
import config
import data
import experts
import model
import sample
from config import UserError
from helpers import ROOT, flip, shaken, shorten, tiny_official, trained_branch

LINEAGES = ("cogvideox", "wan")
SIZE = dict(frames=9, height=16, width=32)
OTHER_SIZE = dict(frames=17, height=48, width=32)
VAES = {"cogvideox": "AutoencoderKLCogVideoX", "wan": "AutoencoderKLWan"}
PARTS = {"branch": {}, "full maps": dict(map_rank=0),
         "both": dict(lora_rank=2, lora_alpha=3.0, lora_targets="to_q,to_out"),
         "lora": dict(physical_blocks="", lora_rank=3),
         "no routers": dict(semantic=False, refinement=False, injection="plain"), "29": dict(categories=29)}


def settings(lineage, weights="", out="", **fields):
    return tiny_official(lineage, **{"weights": str(weights), "cache": "none", "out_dir": str(out), **fields})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What sample.py reads of an official folder before it makes a clip:
    a transformer, and the VAE's config."""
    made = {}
    for lineage in LINEAGES:
        folder = made[lineage] = tmp_path_factory.mktemp(lineage)
        torch.manual_seed(0)
        official.weights.save_pretrained(shaken(model.build_backbone(settings(lineage))), folder / "transformer")
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(dict(_class_name=VAES[lineage])))
    return made


def trained(lineage, weights, run, **fields):
    return trained_branch(settings(lineage, weights[lineage], run, **fields))


@pytest.fixture
def published(weights, tmp_path):
    trained("wan", weights, tmp_path / "run", lora_rank=2)
    return tmp_path / "run" / "branch.safetensors"


def inputs(net, frames, height, width):
    cfg = net.backbone.cfg
    torch.manual_seed(3)
    shape = 1, cfg.channels, 1 + (frames - 1) // 4, height // 8, width // 8
    x, text = torch.randn(shape), torch.randn(1, cfg.text_len, cfg.text_dim)
    return x, torch.tensor([500]), text, torch.tensor([5])


# --- there and back
@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize("parts", PARTS)
def test_attached_it_predicts_as_the_run_did_to_the_bit_at_any_size(
        lineage, parts, weights, tmp_path, capsys):
    state = trained(lineage, weights, tmp_path / "run", **PARTS[parts])
    file = shutil.move(tmp_path / "run" / "branch.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "run")  # the file is enough
    net = official.clips.OfficialModel(weights[lineage], branch=file, **SIZE).net
    assert isinstance(net, experts.ProPhy) and not net.training and capsys.readouterr().err == ""
    for size in (SIZE, OTHER_SIZE):
        given = inputs(net, **size)
        with torch.no_grad():
            found, routing = net(*given)
            bare = net.backbone(*given) if parts not in ("both", "lora") else None
        with state.averaged() as own:
            wanted, own_routing = own(*given)
        assert torch.equal(found, wanted) and (bare is None or (found - bare).abs().max() > 1e-3)
        if own_routing.semantic is not None:
            assert torch.equal(routing.semantic_lift, own_routing.semantic_lift)
            assert torch.equal(routing.refinement_lift, own_routing.refinement_lift)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_run_in_bf16_is_stored_in_half_the_room_and_runs_in_bf16(lineage, weights, tmp_path):
    state = trained(lineage, weights, tmp_path, precision="bf16", lora_rank=2)
    with safetensors.safe_open(tmp_path / "branch.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    for name, average in state.ema.items():
        exact = average.ndim == 1 or name.endswith("table")
        assert torch.equal(stored[name], average if exact else average.bfloat16()), name
    exact, half = (official.clips.OfficialModel(weights[lineage], dtype=dtype, branch=tmp_path / "branch.safetensors",
                                               **SIZE).net for dtype in (torch.float32, torch.bfloat16))
    x, t, text, length = inputs(exact, **SIZE)
    with torch.no_grad():
        a, b = exact(x, t, text, length)[0], half(x.bfloat16(), t, text.bfloat16(), length)[0]
    assert b.dtype == torch.bfloat16 and 0 < (a - b).norm() < 0.05 * a.norm()
    keeps = {name for name, p in half.physical.named_parameters() if p.dtype == torch.float32}
    assert keeps == {f"{i}.{name}" for i, at in enumerate(half.at)
                     for name, p in half.backbone.blocks[at].named_parameters()
                     if p.dtype == torch.float32
                     and not name.endswith((".up", ".down"))}, "as the blocks beside them"


def test_other_weights_of_the_same_shape_are_a_warning(weights, published, tmp_path, capsys):
    other = shutil.copytree(weights["wan"], tmp_path / "other")
    official.weights.save_pretrained(shaken(model.build_backbone(settings("wan"))), other / "transformer")
    official.clips.OfficialModel(other, branch=published, **SIZE)
    said = capsys.readouterr().err
    assert said.startswith("Warning: ") and said.count("\n") == 1 and str(other) in said


# --- what does not fit
def rewritten(path, about=lambda about: None, tensors=lambda tensors: None):
    """The file with its header, or its tensors, changed by a function;
    whole and with a checksum that is right."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["about"])
        found = {name: file.get_tensor(name).clone() for name in file.keys()}
    about(header)
    tensors(found)
    common.store.write_tensors(path, found, header, "test")


def header(change):
    return lambda path: rewritten(path, about=change)


def tensors(change):
    return lambda path: rewritten(path, tensors=change)


def saved(tensors, metadata=None):
    return lambda path: safetensors.torch.save_file(tensors, path, metadata)


ONE = {"physical.0.ff.0.weight": torch.zeros(2)}
NAN, INFINITE = float("nan"), float("inf")
BROKEN = {  # {what is wrong: (what makes it so, a word of the sentence)}
    "absent": (lambda path: path.unlink(), "There is no"),
    "empty": (lambda path: path.write_bytes(b""), "no safetensors"),
    "text": (lambda path: path.write_text("hello, this is no such file"), "no safetensors"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no safetensors"),
    "pickled": (lambda path: torch.save(ONE, path), "pickled"),
    "cut short": (lambda path: shorten(path, 9), "damaged"),
    "one bit": (flip, "checksum"),
    "one bit of the header": (lambda path: flip(path, path.read_bytes().index(b"held_out") + 2), "checksum"),
    "no header": (saved(ONE), "no branch of format"),
    "other header": (header(lambda about: about.clear()), "no branch of format"),
    "list for header": (saved(ONE, {"about": "[1]"}), "no branch of format"),
    "not JSON": (saved(ONE, {"about": "{"}), "no safetensors"),
    "format": (header(lambda about: about.update(branch_format=2)), "no branch of format"),
    "field missing": (header(lambda about: about["branch"].pop("top_k")), "top_k"),
    "no fields": (header(lambda about: about.update(branch=7)), "describes no branch"),
    "field wrong": (header(lambda about: about["branch"].update(physical_blocks="0,9")), "--physical_blocks"),
    "field mad": (header(lambda about: about["branch"].update(semantic_experts=10**17)), "branch"),
    "depth": (header(lambda about: about["fits"].update(depth=30)), "--depth 30"),
    "lacks": (tensors(lambda found: found.pop("physical.0.ff.0.weight")),
              "physical.0.ff.0.weight"),
    "more": (tensors(lambda found: found.update(stranger=torch.zeros(2))), "stranger"),
    "shape": (tensors(lambda found: found.update({"physical.1.ff.2.bias": torch.zeros(31)})),
              "physical.1.ff.2.bias"),
    "integers": (tensors(lambda found: found.update({"physical.1.ff.2.bias": torch.zeros(32).int()})),
                 "physical.1.ff.2.bias"),
    "NaN": (tensors(lambda found: found["physical.1.ff.2.bias"].fill_(NAN)),
            "not finite: physical.1.ff.2.bias"),
    "infinite": (tensors(lambda found: found["physical.0.ff.0.bias"][3:].fill_(INFINITE)), "not finite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_broken_is_one_sentence_before_weights_are_read(how, weights, published, monkeypatch):
    monkeypatch.setattr(official.clips, "load_pretrained", lambda *_: pytest.fail("the weights were read first"))
    spoil, word = BROKEN[how]
    spoil(published)
    with pytest.raises(UserError) as said:
        sample.main(["--weights", str(weights["wan"]), "--branch", str(published), "--prompt", "a ball",
                     "--height", "16", "--width", "32"])
    assert word in str(said.value) and str(published) in str(said.value) and "\n" not in str(said.value)


def test_another_architecture_is_one_sentence(weights, published):
    with pytest.raises(UserError, match="--lineage wan, not cogvideox"):
        official.clips.OfficialModel(weights["cogvideox"], branch=published, **SIZE)


def test_the_flag_belongs_to_weights(weights, published):
    for flags, word in ((["--run", "r"], "belongs to --weights"),
                        (["--run", "r", "--weights", str(weights["wan"])], "not both")):
        with pytest.raises(UserError, match=word):
            sample.main(["--branch", str(published), "--prompt", "a ball", *flags])


KILLED = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import tiny_official, trained_branch
os.fsync = lambda _: os._exit(9)  # its bytes are written, its name is not yet
trained_branch(tiny_official("wan", weights=sys.argv[1], cache="none", out_dir=sys.argv[2]))
"""


@pytest.mark.kill
@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file(weights, published):
    before = published.read_bytes(), (published.parent / "README.md").read_text()
    done = subprocess.run([sys.executable, "-c", KILLED, str(weights["wan"]), str(published.parent)],
                          cwd=ROOT)
    assert done.returncode == 9
    assert before == (published.read_bytes(), (published.parent / "README.md").read_text())
    trained("wan", weights, published.parent)
    assert published.read_bytes() != before[0]
    assert sorted(p.name for p in published.parent.iterdir()) == ["README.md", "branch.safetensors"]


# --- the card
def card(preset, **fields):
    cfg = config.preset(preset, **fields)
    about = dict(weights="0123abcd", step=1500, held_out=0.125, categories_present=[0, 4],
                 fits={name: getattr(cfg, name) for name in config.marked(config.NETWORK)})
    return official.branch.model_card(cfg, about)


def front_matter(text):
    """The YAML of a card, of which it uses `key: value` and one list."""
    opening, front, rest = text.split("---\n", 2)
    assert opening == ""
    lines = [line.split(": ") for line in front.splitlines() if not line.startswith("- ")]
    assert all(len(line) == 2 and line[1].strip() == line[1] != "" or line == ["tags:"]
               for line in lines), lines
    assert lines[-1] == ["tags:"] and len(dict(lines[:-1])) == len(lines) - 1
    return dict(lines[:-1]), rest


@pytest.mark.parametrize("preset, base, licence, words", [
    ("cogvideox-2b", "CogVideoX-2b", "apache-2.0", "Apache License 2.0"),
    ("cogvideox-5b", "CogVideoX-5b", "other", "CogVideoX LICENSE"),
    ("cogvideox1.5-5b", "CogVideoX1.5-5B", "other", "CogVideoX LICENSE"),
    ("wan-1.3b", "Wan2.1-T2V-1.3B-Diffusers", "apache-2.0", "Apache License 2.0"),
    ("wan-14b", "Wan2.1-T2V-14B-Diffusers", "apache-2.0", "Apache License 2.0")])
def test_the_card_names_weights_and_licence_of_each_official_architecture(preset, base, licence, words):
    text = card(preset)
    front, rest = front_matter(text)
    assert front["license"] == licence and front["base_model"].split("/")[1] == base
    assert front["library_name"] == "nanoprophy"
    assert front.get("license_name") == ("cogvideox-license" if licence == "other" else None)
    assert words in rest.split("## Licence")[1] and base in rest and "{" not in text
    assert "step 1500" in rest and "0.1250" in rest
    assert f"| physical_blocks | {config.preset(preset).physical_blocks} |" in rest
    names = data.category_names(config.preset(preset))
    assert f"{names[0]}, {names[4]}." in rest and names[1] not in rest
    assert "# LoRA of rank 64, for" in card(preset, physical_blocks="", lora_rank=64)
    assert "# Physical branch and LoRA of rank 8, for" in card(preset, lora_rank=8)


def test_of_unknown_weights_the_card_asks_for_the_licence():
    front, rest = front_matter(card("cogvideox-5b", depth=40, physical_blocks="1"))
    assert front["license"] == "unknown" and "base_model" not in front
    assert "fill it in" in rest.split("## Licence")[1]


# --- its size
def test_the_readme_says_how_large_the_file_is_at_full_scale():
    """Every tensor's name and shape from the meta device;
    matrices take two bytes a number, as the presets train in bf16 on a GPU."""
    said = (ROOT / "README.md").read_text()
    for preset in ("cogvideox-5b", "wan-1.3b"):
        cfg = config.preset(preset)
        with torch.device("meta"):
            state = experts.ProPhy(model.build_backbone(cfg), cfg).branch_state()
        size = sum(p.numel() * (4 if p.ndim == 1 or name.endswith("table") else 2)
                   for name, p in state.items())
        assert f"{size / 1e9:.1f} GB ({preset})" in said
