"""The benchmark compares like with like and counts FLOPs rightly.
What it times is no test: a busy machine would fail it."""
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import config
from config import Stopped, UserError
from official import cost, reference

pytest.importorskip("diffusers",
                    reason="the comparison needs diffusers: pip install -r requirements-extra.txt")

pytestmark = pytest.mark.parity
NAMES = ["cogvideox-2b", "cogvideox-5b", "wan-1.3b"]


def small(name: str):
    """The CPU's config of --blocks, narrow enough for a test."""
    cfg = bench.full_sizes("cpu")[name]
    narrow = dict(dim=256, ffn=700, freq_dim=32) if cfg.lineage == "wan" else dict(dim=128, time_dim=20)
    return replace(cfg, heads=2, text_dim=24, **narrow)


# --- FLOPs
@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_block(name):
    """Against the closed form, and a count of a real forward and of a real backward,
    which is exactly twice as much."""
    cfg = small(name)
    side = bench.one_block(cfg, torch.float32)["ours"]
    D, F, L, N = cfg.dim, cfg.ffn or 4 * cfg.dim, cfg.text_len, 2 * 4 * 6
    if cfg.lineage == "wan":
        forward = 2 * N * (6 * D**2 + 2 * D * F) + 2 * L * 2 * D**2 + 4 * N**2 * D + 4 * N * L * D
    else:
        forward = 2 * (L + N) * (4 * D**2 + 2 * D * F) + 4 * (L + N) ** 2 * D + 2 * 12 * D * cfg.time_dim
    with FlopCounterMode(display=False) as counter:
        side.call()
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        side.run()
    assert counter.get_total_flops() == cost.block_flops(cfg) == 3 * forward


@pytest.mark.parametrize("name, depth, teraflops",
                         [("cogvideox-2b", 30, 120.0), ("cogvideox-5b", 42, 332.2), ("wan-1.3b", 30, 283.0)])
def test_flops_at_full_size(name, depth, teraflops):
    """All blocks at the native token count, forward,
    as worked out by hand from 24 S D^2 + 4 S^2 D and Wan's like of it."""
    assert abs(depth * cost.block_flops(bench.full_sizes("cuda")[name]) / 3e12 - teraflops) < 0.1


# --- like with like
@pytest.mark.parametrize("name", NAMES)
def test_both_blocks_are_one_function(name):
    """Same weights and inputs: same output, and the same gradient of the tokens that come in."""
    sides, text = bench.one_block(small(name), torch.float32), 16
    assert bench.difference(sides["ours"][1], sides["diffusers"][1]) < 1e-5
    ours, theirs = sides["ours"][1](), sides["diffusers"][1]()
    # of all leaves the tokens: (1, more than the six rows of a modulation, D)
    tokens = {side: [v for v in leaves if v.ndim == 3 and v.shape[1] > 6]
              for side, (_, _, leaves) in sides.items()}
    a = torch.autograd.grad(ours.square().sum(), tokens["ours"])
    parts = theirs if isinstance(theirs, tuple) else [theirs]
    b = torch.autograd.grad(sum(part.square().sum() for part in parts), tokens["diffusers"])
    if name != "wan-1.3b":  # theirs are apart, video first
        a = a[0][:, text:], a[0][:, :text]
    assert len(a) == len(b) == 2 and all((x - y).abs().max() < 1e-5 * y.abs().max() for x, y in zip(a, b))
    # a block whose gates are shut would be equal to anything
    assert (ours - tokens["ours"][0]).abs().max() > 0.1
    count = {side: sum(leaf.numel() for leaf in leaves) for side, (_, _, leaves) in sides.items()}
    assert count["ours"] == count["diffusers"]  # as much to find gradients of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CogVideoX, tiny", "Wan, tiny"])
def test_both_models_are_one_function(name, dtype):
    cfg = bench.official_sizes("cpu")[name]
    ours, theirs, call_theirs = reference.official_pair(cfg, dtype)
    x, t, text = bench.official_inputs(cfg, dtype)
    assert {p.dtype for p in (*ours.parameters(), *theirs.parameters())} == {dtype}
    assert 0 <= bench.difference(lambda: ours(x, t, text),
                                 lambda: call_theirs(x, t, text)) < (1e-5 if dtype == torch.float32 else 5e-2)
    with pytest.raises(Stopped, match="nothing was timed"):
        bench.difference(lambda: ours(x, t, text) * 1.1, lambda: call_theirs(x, t, text))


def test_what_is_not_finite_is_not_timed():
    with pytest.raises(Stopped):
        bench.difference(lambda: torch.full((2, 2), torch.nan), lambda: torch.ones(2, 2))


# --- the commands
def test_block_table_on_a_cpu(capsys, monkeypatch):
    """A heading that says where the numbers come from, and a row a model;
    a CPU's times are left out, its ratios are not."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--blocks", "--device", "cpu"])
    sizes = {name: small(name) for name in NAMES}
    monkeypatch.setattr(bench, "full_sizes", lambda device: sizes)
    bench.main(config.preset(device="cpu", threads=1, precision="fp32", compile="off"), blocks=True, rounds=1)
    heading, _, columns, line, *rows = capsys.readouterr().out.strip().splitlines()
    assert "`python bench.py --blocks --device cpu`" in heading and "CPU" in heading
    assert torch.__version__ in heading
    assert " ms" not in columns and "TFLOP" not in columns and "GiB" not in columns
    assert columns.count("|") == line.count("|") and [row.split()[1] for row in rows] == NAMES
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == columns.count("|") - 1 and cells[1] == "48 + 16" and cells[2] == "off"
        assert float(cells[3]) > 0 and re.fullmatch(r"\d+% / \d+%", cells[4])


def test_official_table(capsys):
    sizes = {name: replace(cfg, depth=1)
             for name, cfg in bench.official_sizes("cpu").items() if "tiny" in name}
    bench.official_table(sizes, ["off"], rounds=1)
    rows = capsys.readouterr().out.strip().splitlines()[4:]
    assert [(row.split(" | ")[0][2:], row.split(" | ")[2])
            for row in rows] == [(name, dtype) for name in sizes for dtype in ("float32", "bfloat16")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_blocks_are_refused_without_cuda(capsys):
    with pytest.raises(SystemExit) as stop:
        config.entry(bench.from_command_line, ["--blocks"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "CUDA" in err
    assert "--device cpu" in err


@pytest.mark.parametrize("flags", ["--blocks=1", "--block", "--blocks --tokens 5", "--blocks --device gpu"])
def test_a_wrong_flag_is_one_sentence(flags):
    with pytest.raises(UserError):
        bench.from_command_line(flags.split())


def test_without_diffusers_blocks_are_refused(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-extra"):
        bench.main(config.preset(device="cpu", threads=1, precision="fp32", compile="off"), blocks=True)


def test_the_training_step_that_is_timed_is_a_step(capsys):
    """Both stages take their steps on the batch that the bench makes up, and the parts of a step add up."""
    bench.step_table(config.preset("debug", device="cpu", precision="fp32", compile="off", threads=1),
                     rounds=9)
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (base|with)", line)]
    assert len(rows) == 2 and all(70 <= sum(map(int, re.findall(r"(\d+)%", row))) <= 130 for row in rows)
