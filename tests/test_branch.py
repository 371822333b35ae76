"""branch.safetensors: what a run beside official weights publishes attaches to those weights, elsewhere, to the bit; a file that does not fit is one sentence."""
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors
import torch

import common.store
import official.branch
import official.clips
import config
import data
import sample
import train
from config import UserError
from experts import ProPhy
from model import build_backbone
from official.weights import save_pretrained

LINEAGES = ("cogvideox", "wan")
SIZE = dict(frames=9, height=16, width=32)
OTHER_SIZE = dict(frames=17, height=48, width=32)
LAW = {"cogvideox": ("AutoencoderKLCogVideoX", "cogvideox-5b"), "wan": ("AutoencoderKLWan", "wan-1.3b")}
PARTS = {"branch": {}, "full maps": dict(map_rank=0), "both": dict(lora_rank=2, lora_alpha=3.0, lora_targets="to_q,to_out"),
         "lora": dict(physical_blocks="", lora_rank=3), "no routers": dict(semantic=False, refinement=False, injection="plain"), "29": dict(categories=29)}


def settings(lineage, weights="", out="", **fields):
    tiny = dict(dim=32, depth=3, heads=2, channels=4, text_dim=16, time_dim=16, ffn=48 if lineage == "wan" else 128, fit_height=2, fit_width=4, map_rank=2,
                semantic_experts=4, refinement_experts=4, physical_blocks="0,2", device="cpu", threads=1, precision="fp32", compile="off", checkpointing=False)
    return config.preset(LAW[lineage][1], **{**tiny, **SIZE, "weights": str(weights), "cache": "none", "out_dir": str(out), **fields})


def shaken(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What sample.py reads of an official folder before it makes a clip: a transformer, and the VAE's config."""
    made = {}
    for lineage in LINEAGES:
        folder = made[lineage] = tmp_path_factory.mktemp(lineage)
        torch.manual_seed(0)
        save_pretrained(shaken(build_backbone(settings(lineage))), folder / "transformer")
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(dict(_class_name=LAW[lineage][0])))
    return made


def trained(lineage, weights, run, **fields):
    """A state as after some steps, its average apart from its weights, and its published branch."""
    run.mkdir(exist_ok=True)
    state = train.State(settings(lineage, weights[lineage], run, **fields), 0)
    state.attach_branch()
    torch.manual_seed(7)
    for p, average in zip(state.trained.values(), state.ema.values()):
        p.data.add_(torch.randn_like(p))
        average.add_(0.1 * torch.randn_like(p))
    state.step = 123
    official.branch.publish(state, run, 0.25, [0, 4])
    return state


@pytest.fixture
def published(weights, tmp_path):
    trained("wan", weights, tmp_path / "run", lora_rank=2)
    return tmp_path / "run" / "branch.safetensors"


def inputs(model, frames, height, width):
    cfg = model.backbone.cfg
    torch.manual_seed(3)
    shape = 1, cfg.channels, 1 + (frames - 1) // 4, height // 8, width // 8
    return torch.randn(shape), torch.tensor([500]), torch.randn(1, cfg.text_len, cfg.text_dim), torch.tensor([5])


# --- there and back
@pytest.mark.parametrize("lineage", LINEAGES)
@pytest.mark.parametrize("parts", PARTS)
def test_attached_it_predicts_as_the_run_did_to_the_bit_at_any_size(lineage, parts, weights, tmp_path, capsys):
    state = trained(lineage, weights, tmp_path / "run", **PARTS[parts])
    file = shutil.move(tmp_path / "run" / "branch.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "run")  # the file is enough
    model = official.clips.load_official(weights[lineage], branch=file, **SIZE)[1]
    assert isinstance(model, ProPhy) and not model.training and capsys.readouterr().err == ""
    for size in (SIZE, OTHER_SIZE):
        given = inputs(model, **size)
        with torch.no_grad():
            found, routing = model(*given)
            bare = model.backbone(*given) if parts not in ("both", "lora") else None
        with state.averaged() as own:
            wanted, own_routing = own(*given)
        assert torch.equal(found, wanted) and (bare is None or (found - bare).abs().max() > 1e-3)
        if own_routing.semantic is not None:
            assert torch.equal(routing.semantic_lift, own_routing.semantic_lift) and torch.equal(routing.refinement_lift, own_routing.refinement_lift)


@pytest.mark.parametrize("lineage", LINEAGES)
def test_a_run_in_bf16_is_stored_in_half_the_room_and_runs_in_bf16(lineage, weights, tmp_path):
    state = trained(lineage, weights, tmp_path, precision="bf16", lora_rank=2)
    with safetensors.safe_open(tmp_path / "branch.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    for name, average in state.ema.items():
        exact = average.ndim == 1 or name.endswith("table")
        assert torch.equal(stored[name], average if exact else average.bfloat16()), name
    exact, half = (official.clips.load_official(weights[lineage], dtype=dtype, branch=tmp_path / "branch.safetensors", **SIZE)[1] for dtype in (torch.float32, torch.bfloat16))
    x, t, text, length = inputs(exact, **SIZE)
    with torch.no_grad():
        a, b = exact(x, t, text, length)[0], half(x.bfloat16(), t, text.bfloat16(), length)[0]
    assert b.dtype == torch.bfloat16 and 0 < (a - b).norm() < 0.05 * a.norm()
    keeps = {name for name, p in half.physical.named_parameters() if p.dtype == torch.float32}
    assert keeps == {f"{i}.{name}" for i, at in enumerate(half.at) for name, p in half.backbone.blocks[at].named_parameters()
                     if p.dtype == torch.float32 and not name.endswith((".up", ".down"))}, "as the blocks beside them"


def test_other_weights_of_the_same_shape_are_a_warning(weights, published, tmp_path, capsys):
    other = shutil.copytree(weights["wan"], tmp_path / "other")
    save_pretrained(shaken(build_backbone(settings("wan"))), other / "transformer")
    official.clips.load_official(other, branch=published, **SIZE)
    said = capsys.readouterr().err
    assert said.startswith("Warning: ") and said.count("\n") == 1 and str(other) in said


# --- what does not fit
def rewritten(path, about=lambda about: None, tensors=lambda tensors: None):
    """The file with its header, or its tensors, changed by a function; whole and with a checksum that is right."""
    with safetensors.safe_open(path, "pt") as file:
        header, found = json.loads(file.metadata()["about"]), {name: file.get_tensor(name).clone() for name in file.keys()}
    about(header)
    tensors(found)
    common.store.write_tensors(path, found, header, "test")


def flip(path, at=-5):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 64
    path.write_bytes(raw)


BROKEN = {
    "absent": (lambda path: path.unlink(), "There is no"),
    "empty": (lambda path: path.write_bytes(b""), "no safetensors"),
    "text": (lambda path: path.write_text("hello, this is no such file"), "no safetensors"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no safetensors"),
    "pickled": (lambda path: torch.save({"inject.0.weight": torch.zeros(2)}, path), "pickled"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
    "one bit": (flip, "checksum"),
    "no header": (lambda path: safetensors.torch.save_file({"inject.0.weight": torch.zeros(2)}, path), "no branch of format"),
    "other header": (lambda path: rewritten(path, lambda about: about.clear()), "no branch of format"),
    "list for header": (lambda path: safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"about": "[1]"}), "no branch of format"),
    "not JSON": (lambda path: safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"about": "{"}), "no safetensors"),
    "format": (lambda path: rewritten(path, lambda about: about.update(branch_format=2)), "no branch of format"),
    "field missing": (lambda path: rewritten(path, lambda about: about["branch"].pop("top_k")), "top_k"),
    "no fields": (lambda path: rewritten(path, lambda about: about.update(branch=7)), "describes no branch"),
    "field wrong": (lambda path: rewritten(path, lambda about: about["branch"].update(physical_blocks="0,9")), "--physical_blocks"),
    "field mad": (lambda path: rewritten(path, lambda about: about["branch"].update(semantic_experts=10**17)), "branch"),
    "depth": (lambda path: rewritten(path, lambda about: about["fits"].update(depth=30)), "--depth 30"),
    "lacks": (lambda path: rewritten(path, tensors=lambda found: found.pop("inject.0.weight")), "inject.0.weight"),
    "more": (lambda path: rewritten(path, tensors=lambda found: found.update(stranger=torch.zeros(2))), "stranger"),
    "shape": (lambda path: rewritten(path, tensors=lambda found: found.update({"inject.1.bias": torch.zeros(31)})), "inject.1.bias"),
    "integers": (lambda path: rewritten(path, tensors=lambda found: found.update({"inject.1.bias": torch.zeros(32).int()})), "inject.1.bias"),
    "NaN": (lambda path: rewritten(path, tensors=lambda found: found["inject.1.bias"].fill_(float("nan"))), "not finite: inject.1.bias"),
    "infinite": (lambda path: rewritten(path, tensors=lambda found: found["physical.0.ff.0.bias"][3:].fill_(float("inf"))), "not finite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_broken_is_one_sentence_before_weights_are_read(how, weights, published, monkeypatch):
    monkeypatch.setattr(official.clips, "load_pretrained", lambda *_: pytest.fail("the weights were read first"))
    spoil, word = BROKEN[how]
    spoil(published)
    with pytest.raises(UserError) as said:
        sample.main(["--weights", str(weights["wan"]), "--branch", str(published), "--prompt", "a ball", "--height", "16", "--width", "32"])
    assert word in str(said.value) and str(published) in str(said.value) and "\n" not in str(said.value)


def test_another_architecture_is_one_sentence(weights, published):
    with pytest.raises(UserError, match="--lineage wan, not cogvideox"):
        official.clips.load_official(weights["cogvideox"], branch=published, **SIZE)


def test_the_flag_belongs_to_weights(weights, published):
    for flags, word in ((["--run", "r"], "belongs to --weights"), (["--run", "r", "--weights", str(weights["wan"])], "not both")):
        with pytest.raises(UserError, match=word):
            sample.main(["--branch", str(published), "--prompt", "a ball", *flags])


def test_a_writer_that_is_killed_leaves_the_old_file(weights, published):
    before = published.read_bytes(), (published.parent / "README.md").read_text()
    pid = os.fork()
    if pid == 0:
        try:
            os.fsync = lambda _: os._exit(9)  # its bytes are written, its name is not yet
            trained("wan", weights, published.parent)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert before == (published.read_bytes(), (published.parent / "README.md").read_text())
    trained("wan", weights, published.parent)
    assert published.read_bytes() != before[0] and sorted(p.name for p in published.parent.iterdir()) == ["README.md", "branch.safetensors"]


# --- the card
def card(preset, **fields):
    cfg = config.preset(preset, **fields)
    about = dict(weights="0123abcd", step=1500, held_out=0.125, categories_present=[0, 4],
                 fits={name: getattr(cfg, name) for name in official.branch.FITS})
    return official.branch.model_card(cfg, about)


def front_matter(text):
    """The YAML of a card, of which it uses `key: value` and one list."""
    opening, front, rest = text.split("---\n", 2)
    assert opening == ""
    lines = [line.split(": ") for line in front.splitlines() if not line.startswith("- ")]
    assert all(len(line) == 2 and line[1].strip() == line[1] != "" or line == ["tags:"] for line in lines), lines
    assert lines[-1] == ["tags:"] and len(dict(lines[:-1])) == len(lines) - 1
    return dict(lines[:-1]), rest


@pytest.mark.parametrize("preset, base, licence, words", [
    ("cogvideox-2b", "CogVideoX-2b", "apache-2.0", "Apache License 2.0"), ("cogvideox-5b", "CogVideoX-5b", "other", "CogVideoX LICENSE"),
    ("cogvideox1.5-5b", "CogVideoX1.5-5B", "other", "CogVideoX LICENSE"), ("wan-1.3b", "Wan2.1-T2V-1.3B-Diffusers", "apache-2.0", "Apache License 2.0"),
    ("wan-14b", "Wan2.1-T2V-14B-Diffusers", "apache-2.0", "Apache License 2.0")])
def test_the_card_names_weights_and_licence_of_each_official_architecture(preset, base, licence, words):
    text = card(preset)
    front, rest = front_matter(text)
    assert front["license"] == licence and front["base_model"].split("/")[1] == base and front["library_name"] == "nanoprophy"
    assert front.get("license_name") == ("cogvideox-license" if licence == "other" else None)
    assert words in rest.split("## Licence")[1] and base in rest and "{" not in text
    assert "step 1500" in rest and "0.1250" in rest and f"| physical_blocks | {config.preset(preset).physical_blocks} |" in rest
    names = data.category_names(config.preset(preset))
    assert f"{names[0]}, {names[4]}." in rest and names[1] not in rest
    assert "# LoRA of rank 64, for" in card(preset, physical_blocks="", lora_rank=64) and "# Physical branch and LoRA of rank 8, for" in card(preset, lora_rank=8)


def test_of_unknown_weights_the_card_asks_for_the_licence():
    front, rest = front_matter(card("cogvideox-5b", depth=40, physical_blocks="1"))
    assert front["license"] == "unknown" and "base_model" not in front and "fill it in" in rest.split("## Licence")[1]


# --- its size
def test_the_readme_says_how_large_the_file_is_at_full_scale():
    """Every tensor's name and shape from the meta device; matrices take two bytes a number, as the presets train in bf16 on a GPU."""
    said = (Path(__file__).parent.parent / "README.md").read_text()
    for preset in ("cogvideox-5b", "wan-1.3b"):
        cfg = config.preset(preset)
        with torch.device("meta"):
            state = ProPhy(build_backbone(cfg), cfg).branch_state()
        size = sum(p.numel() * (4 if p.ndim == 1 or name.endswith("table") else 2) for name, p in state.items())
        assert f"{size / 1e9:.1f} GB ({preset})" in said
