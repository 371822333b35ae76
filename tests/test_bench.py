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
import model
from config import Stopped, UserError
from official import cost, reference

pytest.importorskip("diffusers",
                    reason="the comparison needs diffusers: pip install -r requirements-extra.txt")

pytestmark = pytest.mark.parity


# --- FLOPs
@pytest.mark.parametrize("name", ["cogvideox-5b", "wan-1.3b"])
@pytest.mark.parametrize("mode", ["all weights", "frozen + branch"])
def test_flops_of_a_step(name, mode, monkeypatch):
    """What --full takes for useful work, against a count of a real step of the network: what it leaves out is little."""
    cfg = replace(bench.full_sizes("cpu")[name], **bench.MODES[mode], checkpointing=False, compile="off", depth=4,
                  dim=512, heads=4, ffn=2048, frames=9, height=128, width=128, refinement=False, semantic=False)
    # written out: torch does not count the fused kernel of a CPU, and nothing is made again
    monkeypatch.setattr(model, "attend", lambda q, k, v: model.attention_weights(q, k) @ v)
    step, _ = bench.training_step(cfg, "physics")
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == pytest.approx(cost.count(cfg).useful, rel=0.05)


@pytest.mark.parametrize("name, depth, teraflops",
                         [("cogvideox-2b", 30, 120.0), ("cogvideox-5b", 42, 332.2), ("wan-1.3b", 30, 283.0)])
def test_flops_at_full_size(name, depth, teraflops):
    """All blocks at the native token count, forward,
    as worked out by hand from 24 S D^2 + 4 S^2 D and Wan's like of it."""
    assert abs(cost.count(config.preset(name, physics_steps=0)).forward / 1e12 - teraflops) < 0.1


# --- like with like
@pytest.mark.parametrize("name", ["CogVideoX, tiny", "Wan, tiny"])
@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_timed_when_a_weight_is_another(name, which):
    """The gate passes for the same weights, and stops at one that was changed, in the first block and in the last."""
    sides = reference.whole_models(bench.official_sizes("cpu")[name], torch.float32)
    assert reference.gradients_apart(*sides.values()) < 1e-5
    weight = sides["ours"].watched[which]
    weight.data = 1.01 * weight.data  # a copy: both sides share their weights
    with pytest.raises(Stopped, match="nothing was timed"):
        next(bench.compared(sides, ["off"], rounds=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CogVideoX, tiny", "Wan, tiny"])
def test_both_models_are_one_function(name, dtype):
    cfg = bench.official_sizes("cpu")[name]
    ours, theirs, call_theirs = reference.official_pair(cfg, dtype)
    x, t, text = reference.official_inputs(cfg, dtype)
    assert {p.dtype for p in (*ours.parameters(), *theirs.parameters())} == {dtype}
    assert 0 <= reference.difference(lambda: ours(x, t, text),
                                 lambda: call_theirs(x, t, text)) < (1e-5 if dtype == torch.float32 else 5e-2)
    with pytest.raises(Stopped, match="nothing was timed"):
        reference.difference(lambda: ours(x, t, text) * 1.1, lambda: call_theirs(x, t, text))


def test_what_is_not_finite_is_not_timed():
    with pytest.raises(Stopped):
        reference.difference(lambda: torch.full((2, 2), torch.nan), lambda: torch.ones(2, 2))


# --- the commands
def test_full_table_on_a_cpu(capsys, monkeypatch):
    """A heading that says where the numbers come from, and a row a model and mode; a CPU's times are left out, its
    ratios are not."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench.py", "--full", "--device", "cpu"])
    bench.main(config.preset(device="cpu", threads=1, precision="fp32", compile="off"), full=True, rounds=1)
    heading, _, columns, line, *rows = capsys.readouterr().out.strip().splitlines()
    assert "`python bench.py --full --device cpu`" in heading and "CPU" in heading and torch.__version__ in heading
    assert columns.count("|") == line.count("|")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:2] for row in cells] == [[name, mode] for name in ("cogvideox-5b", "wan-1.3b") for mode in bench.MODES]
    assert all((float(row[5]) > 0) if row[1] == "all weights" else row[5] == "" for row in cells)
    assert all(row[6:] == [""] * 5 for row in cells)


def test_growth_is_told_of_every_size(capsys):
    bench.growth_table(config.preset("debug", frames=4, patch=8, device="cpu", precision="fp32", threads=1), rounds=1)
    said = capsys.readouterr().out
    assert re.findall(r"(\d+) tokens \d+\.\d\d", said) == ["96", "384", "768", "1728"] and " 1.00" in said


def test_official_table(capsys):
    sizes = {name: replace(cfg, depth=1)
             for name, cfg in bench.official_sizes("cpu").items() if "tiny" in name}
    bench.official_table(sizes, ["off"], rounds=1)
    rows = capsys.readouterr().out.strip().splitlines()[4:]
    assert [(row.split(" | ")[0][2:], row.split(" | ")[2])
            for row in rows] == [(name, dtype) for name in sizes for dtype in ("float32", "bfloat16")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no CUDA")
def test_full_is_refused_without_cuda(capsys):
    with pytest.raises(SystemExit) as stop:
        config.entry(bench.from_command_line, ["--full"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and "CUDA" in err
    assert "--device cpu" in err


@pytest.mark.parametrize("flags", ["--full=1", "--ful", "--full --tokens 5", "--full --device gpu"])
def test_a_wrong_flag_is_one_sentence(flags):
    with pytest.raises(UserError):
        bench.from_command_line(flags.split())


def test_without_diffusers_full_is_refused(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-extra"):
        bench.main(config.preset(device="cpu", threads=1, precision="fp32", compile="off"), full=True)


def test_the_training_step_that_is_timed_is_a_step(capsys):
    """Both stages take their steps on the batch that the bench makes up, and the parts of a step add up."""
    bench.step_table(config.preset("debug", device="cpu", precision="fp32", compile="off", threads=1),
                     rounds=9)
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| (base|with)", line)]
    assert len(rows) == 2 and all(70 <= sum(map(int, re.findall(r"(\d+)%", row))) <= 130 for row in rows)
