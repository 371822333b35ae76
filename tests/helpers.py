"""What more than one test file uses:
command lines, folders compared and spoilt, weights shaken, processes killed."""
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import safetensors.torch
import torch

import official.branch
import config
import data
import experts
import model
import train
from config import UserError

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {"cogvideox": "cogvideox-5b", "wan": "wan-1.3b"}  # of each lineage one
PRESENT = [2, 4, 11]  # the categories that a run of `write_run` says it has seen


# ---------------------------------------------------------------------------------------------- command lines
def words_of(fields: dict) -> list[str]:
    """{field: value} as a command line has them: --field value ..."""
    return [word for field, value in fields.items() for word in (f"--{field}", str(value))]


def sentence(call, *args, error=UserError, **kwargs) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    said = str(caught.value)
    assert "\n" not in said and said.endswith((".", "?")), said
    return said


def killed_when(ready, argv: list[str]) -> bool:
    """Start `python argv ...` and kill -9 it when `ready()`; False when it ended by itself before that.

    A process of its own, not a fork of this one: a fork that is killed may hold a lock that it shares
    with us (tqdm has one), and then this process waits for ever.
    """
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=quiet, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    while not ready() and child.poll() is None:
        time.sleep(0.001)
    child.kill()
    return child.wait() == -9


# ------------------------------------------------------------------------------------------ files and folders
def files_of(folder) -> dict[str, bytes]:
    """{path in the folder: its bytes}."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def written(folder) -> dict[str, int]:
    """{name: when it was written} of the finished clips in a folder; none where there is no folder yet."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def json_of(path):
    """What a file of JSON holds."""
    return json.loads(path.read_text())


def unsealed(path):
    """The same without its digest, as an earlier version wrote it."""
    return {name: value for name, value in json_of(path).items() if name != "digest"}


def rewrite(path, **changed):
    """Some entries of a file of JSON replaced, and no digest to tell of it."""
    path.write_text(json.dumps({**unsealed(path), **changed}))


def flip(path, at=-5, bit=6):
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)


def shorten(path, n=100):
    """Cut the last n bytes off."""
    path.write_bytes(path.read_bytes()[:-n])


def resave(path, change, which=lambda name, tensor: tensor.dim() > 1):
    """A file of safetensors with `change` made to the first tensor that is meant; None drops it."""
    tensors = safetensors.torch.load_file(path)
    name = next(name for name, tensor in tensors.items() if which(name, tensor))
    changed = change(tensors[name])
    tensors.pop(name) if changed is None else tensors.update({name: changed})
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def drifting(path, seed, frames=12, height=20, width=36):
    """A video of blots that drift, different for every seed; H.264, 8 frames a second."""
    rng = np.random.default_rng(seed)
    big = np.kron(rng.integers(0, 256, (height // 4, width // 4 + frames, 3)),
                  np.ones((4, 4, 1))).astype(np.uint8)
    shown = np.stack([big[:, 2 * i:2 * i + width] for i in range(frames)])
    iio.imwrite(path, shown, fps=8, codec="libx264", plugin="pyav")


# ---------------------------------------------------------------------------------------------------- weights
def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def awake(module, seed: int = 0):
    """Move every parameter off its initial value, so that nothing is zero, one or shut any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return module


def shaken(module, scale=0.1):
    """The same, by torch's own stream: other weights with every call."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def perturbed(module):
    """Zero-initialised layers would make every clip grey: shake all weights, always alike."""
    torch.manual_seed(1)
    return shaken(module).eval()


def tiny_official(lineage, **fields):
    """The config of a branch beside official weights, with everything in small; trained on a CPU."""
    sizes = dict(dim=32, depth=3, heads=2, channels=4, text_dim=16, time_dim=16,
                 ffn=48 if lineage == "wan" else 128,
                 fit_height=2, fit_width=4, frames=9, height=16, width=32)
    branch = dict(map_rank=2, semantic_experts=4, refinement_experts=4, physical_blocks="0,2")
    machine = dict(device="cpu", threads=1, precision="fp32", compile="off", checkpointing=False)
    return config.preset(PRESETS[lineage], **{**sizes, **branch, **machine, **fields})


def trained_branch(cfg, step=123):
    """A state as after some steps, its average apart from its weights;
    its branch is published in the run folder."""
    cfg.run_dir.mkdir(exist_ok=True)
    state = train.State(cfg, 0)
    state.attach_branch()
    torch.manual_seed(7)
    for p, average in zip(state.trained.values(), state.ema.values()):
        p.data.add_(torch.randn_like(p))
        average.add_(0.1 * torch.randn_like(p))
    state.step = step
    official.branch.publish(state, cfg.run_dir, 0.25, [0, 4])
    return state


def write_run(folder, cfg, captions, branch=True, name="step000050.pt"):
    """A run folder as train.py leaves it, with random weights.
    Its averages are twice its last weights in one layer."""
    (folder / "checkpoints").mkdir(parents=True)
    extra = dict(git="", resolved={}, categories_present=PRESENT)  # which config.load is to ignore
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg) | extra))
    tokenizer = data.Tokenizer.from_captions(captions)
    tokenizer.save(folder / "tokenizer.json")
    net = model.build_backbone(cfg, len(tokenizer))
    net = perturbed(experts.ProPhy(net, cfg) if branch else net)
    averaged = {n: p.detach().clone() for n, p in net.named_parameters() if not branch
                or not n.startswith("backbone.")}
    averaged["physical.0.ff.2.bias" if branch else "proj_out.bias"] *= 2
    save = dict(step=50, stage="physics" if branch else "base", model=net.state_dict(), ema=averaged,
                optimizers=[])
    torch.save(save, folder / "checkpoints" / name)
    return folder
