"""train.py: runs cut in two against whole ones to the bit, each switch against the run without it, disks full, NaN.

Almost every test runs the real `train.main` on ten steps of the debug preset. `interrupted` stands for whatever ends a
process without asking it: the exception passes through everything and nothing is saved.
"""
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import align
import common.run
import config
import data
import diffusion
import sample
import train
from config import Stopped, UserError

ROOT = Path(__file__).parent.parent
TEN = dict(base_steps=6, physics_steps=4, batch_size=4, world_clips=16, val_clips=4, log_every=1, eval_every=3,
           save_every=100, preview_steps=1, guidance=1.0, threads=1, device="cpu", warmup=2)
PIPES = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
SIX = dict(base_steps=4, physics_steps=2)  # gates start shut, so block matrices first move in step three
TERMS = {"diffusion", "coarse", "fine_align", "balance"}
REAL_PREVIEW = sample.preview


class Interrupted(Exception):
    """A kill, as far as one process can play it."""


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module", autouse=True)
def no_previews():
    """A preview costs more than ten steps; those who look at one put it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "preview", lambda *_, **__: None)
        yield


@pytest.fixture
def go(tmp_path, pools):
    """Start a run of ten steps, some fields replaced; returns its folder."""
    def go(name="run", **overrides):
        return launch(tmp_path / name, pools, **overrides)
    return go


def settings(out, pools, **overrides):
    return config.preset("debug", **{**TEN, "pool_dir": str(pools), "out_dir": str(out), **overrides})


def launch(out, pools, **overrides):
    train.main(settings(out, pools, **overrides))
    return out


def again(run, *flags):
    """Resume as the command line does."""
    train.main(config.parse(["--config", "debug", "--out_dir", str(run), "--resume", *map(str, flags)], ""))
    return run


def checkpoint(run, name):
    stored = torch.load(run / "checkpoints" / name, weights_only=True)
    return {key: value for key, value in stored.items() if key != "seconds"}


def backbone_of(stored):
    return {name.removeprefix("backbone."): p for name, p in stored["model"].items() if name.startswith("backbone.")}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(run):
    """The log, in JSON as the standard has it (no NaN), without the wall clock."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    log = [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log]


def steps(run, stage=None):
    return [line for line in lines(run) if "loss" in line and line["stage"] == (stage or line["stage"])]


def held_out(run, stage):
    return [line["held_out"] for line in lines(run) if "held_out" in line and line["stage"] == stage]


def differences(a, b, at=""):
    """Paths at which two nests of dicts, lists, tensors and numbers differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    return [] if type(a) is type(b) and a == b else [at]


def same_run(run, other):
    """Same weights, averages, optimizers, step and best in every checkpoint that both must have, and the same log."""
    for name in ("step000010.pt", "best.pt", "base.pt"):
        assert differences(checkpoint(run, name), checkpoint(other, name), name) == []
    assert lines(run) == lines(other)
    return True


def training_calls(patch, what):
    """Call what(n, state, batch, t, eps, losses) -> losses at the n-th training step; held-out batches pass by."""
    plain, seen = train.losses_of, []

    def losses_of(state, process, batch, t, eps):
        losses, per_clip = plain(state, process, batch, t, eps)
        if state.model.training:
            seen.append(state.step)
            losses = what(len(seen) - 1, state, batch, t, eps, losses) or losses
        return losses, per_clip
    patch.setattr(train, "losses_of", losses_of)


def recorded(patch):
    """The list that every training batch will be put into: where, what clips and words, which noise."""
    fed = []

    def record(n, state, batch, t, eps, losses):
        torch.rand(1)  # whoever draws from the global stream must not matter, the border's new weights included
        fed.append((state.stage, batch.index.tolist(), batch.video.sum().item(), batch.text.tolist(), t.tolist(),
                    eps.sum().item()))
    training_calls(patch, record)
    return fed


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pools):
    """Ten steps in one go, and what they were fed. Not to be written into."""
    with pytest.MonkeyPatch.context() as patch:
        fed = recorded(patch)
        return launch(tmp_path_factory.mktemp("whole") / "run", pools), fed


@pytest.fixture(scope="module")
def six(tmp_path_factory, pools):
    """Four steps and two: what the switches are held against."""
    return launch(tmp_path_factory.mktemp("six") / "run", pools, **SIX)


# --- a run cut in two is the run --------------------------------------------------------------------------------------
@pytest.mark.parametrize("stops", [[3], [5], [6], [7], [8], [2, 6, 9]], ids=str)  # stage two begins at 6
def test_resumed_equals_whole_to_the_bit(stops, whole, go, monkeypatch):
    fed = recorded(monkeypatch)
    for i, stop in enumerate(stops):
        run = again(run, "--stop_at", stop) if i else go(stop_at=stop)
        assert names(run)[-1] == f"step{stop:06d}.pt"
    again(run)
    assert same_run(run, whole[0]) and fed == whole[1]


@pytest.mark.parametrize("stop", [4, 8])
def test_resumed_equals_whole_with_adamw_and_a_free_backbone(stop, go):
    rivals = dict(optimizer="adamw", freeze_backbone=False)
    whole = go("whole", **rivals)
    assert same_run(again(go(stop_at=stop, **rivals)), whole)


def test_what_is_compared_is_alive(whole, go):
    """Guards the tests above: states differ from step to step and hold momenta; other seeds are fed otherwise."""
    run, fed = whole
    early, late = checkpoint(go(stop_at=8), "step000008.pt"), checkpoint(run, "step000010.pt")
    changed = differences(early, late)
    moments = {entry.split("/")[-1] for entry in changed if "/optimizers/" in entry}
    assert {"exp_avg", "exp_avg_sq", "momentum_buffer", "step"} <= moments
    assert any(entry.startswith("/ema/") for entry in changed) and any(entry.startswith("/model/") for entry in changed)
    assert len({str(batch) for batch in fed}) == 10 and [batch[0] for batch in fed] == ["base"] * 6 + ["physics"] * 4
    assert [batch[1][0] for batch in fed] == list(range(0, 40, 4))
    other = go("seed", seed=1, stop_at=1)
    assert differences(checkpoint(other, "step000001.pt"), checkpoint(go("first", stop_at=1), "step000001.pt"))


def test_signals_save_and_end_with_0(go, tmp_path, pools):
    """SIGINT in stage one and SIGTERM in stage two, sent to the program itself."""
    long = dict(base_steps=40, physics_steps=40)
    cfg = settings(tmp_path / "cut", pools, **long)
    given = [text for field, value in dataclasses.asdict(cfg).items() if value != getattr(config.Config(), field)
             for text in (f"--{field}", str(value))]
    run = Path(cfg.out_dir)
    resume = ["--config", "debug", "--out_dir", str(run), "--resume"]
    for number, flags, stage in ((signal.SIGINT, given, "base"), (signal.SIGTERM, resume, "physics")):
        program = subprocess.Popen([sys.executable, "train.py", *flags], **PIPES)
        log, deadline = run / "log.jsonl", time.monotonic() + 240  # a busy machine may take long to start
        while not (log.exists() and log.read_text().count(f'"{stage}", "seconds"') > 3):
            assert program.poll() is None and time.monotonic() < deadline, program.communicate()
            time.sleep(0.01)
        program.send_signal(number)
        out, err = program.communicate(timeout=240)
        assert program.returncode == 0 and "Traceback" not in err
        step = int(re.search(r"Stopped at step (\d+) of 80 and saved", out)[1])
        stored = checkpoint(run, f"step{step:06d}.pt")
        assert names(run)[-1] == f"step{step:06d}.pt" and stored["step"] == step < 80 and stored["stage"] == stage
    again(run)
    whole = go("whole", **long)
    assert differences(checkpoint(run, "step000080.pt"), checkpoint(whole, "step000080.pt")) == []
    assert lines(run) == lines(whole)


# --- the log and config.json ------------------------------------------------------------------------------------------
def test_log_of_a_killed_and_resumed_run_is_that_of_the_whole(whole, go, tmp_path, monkeypatch):
    def kill(n, *_):
        if n == 7:
            raise Interrupted
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        training_calls(patch, kill)
        go(save_every=5)  # saved at 5; logged up to 6
    run = tmp_path / "run"
    assert [line["step"] for line in steps(run)] == list(range(7))
    with (run / "log.jsonl").open("a") as f:
        f.write('{"step": 7, "stage": "phy')  # and died while it wrote
    again(run)
    assert [line["step"] for line in steps(run)] == list(range(10))
    assert lines(run) == lines(whole[0])


def test_a_finished_run_resumed_changes_nothing(go):
    run = go()
    before = contents(run / "checkpoints"), lines(run)
    again(run)
    assert {name: data for name, data in contents(run / "checkpoints").items() if "step" not in name} == \
           {name: data for name, data in before[0].items() if "step" not in name}
    assert lines(run) == before[1]


def test_a_run_that_died_before_its_first_checkpoint_may_be_started_again(whole, go, tmp_path, monkeypatch):
    def kill(n, *_):
        if n == 2:
            raise Interrupted
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        training_calls(patch, kill)
        go()
    assert lines(go()) == lines(whole[0])


def test_log_says_what_design_promises(whole):
    for line in steps(whole[0]):
        terms = {"diffusion"} if line["stage"] == "base" else TERMS
        assert line.keys() == {"step", "stage", "loss", "grad_norm", "lr", "by_noise", "skipped"} | terms
        assert not line["skipped"]
        weights = dict(diffusion=1, coarse=0.1, fine_align=0.02, balance=0.01)
        assert line["loss"] == pytest.approx(sum(weights[term] * line[term] for term in terms), abs=2e-6)
        assert len(line["by_noise"]) == train.BINS
    assert [line["step"] for line in lines(whole[0]) if "held_out" in line] == [3, 6, 9, 10]


def test_config_json_has_every_field_and_the_reasons_also_after_resume(go):
    run = go(device="auto", precision="auto", stop_at=3)
    for resumed in (False, True):
        if resumed:
            again(run, "--stop_at", 5)
        stored = json.loads((run / "config.json").read_text())
        assert {f.name for f in dataclasses.fields(config.Config)} <= stored.keys()
        assert stored["device"] in ("cpu", "cuda", "mps") and stored["precision"] in ("fp32", "bf16")
        assert stored["threads"] == 1
        assert stored["resolved"].keys() == {"device", "precision"}
        assert stored["resolved"]["precision"].startswith(stored["precision"] + ": ")
        assert stored["torch"] == torch.__version__ and re.fullmatch(r"[0-9a-f]{40}|", stored["git"])
        assert stored["categories_present"] == sorted(set(stored["categories_present"])) != []
        assert stored["data"].startswith("world-")


def test_auto_is_resolved_by_what_the_machine_can(monkeypatch):
    def resolved(gain=1.0, compiler="/usr/bin/c++", **overrides):
        monkeypatch.setattr(common.run, "matmul_gain", lambda device: gain)
        monkeypatch.setattr(common.run.shutil, "which", lambda name: compiler)
        return common.run.resolve(config.preset("small", device="cpu", threads=1, **overrides))
    assert resolved(gain=2.0)[0].precision == "bf16" and resolved(gain=1.0)[0].precision == "fp32"
    assert resolved()[0].compile == "on" and resolved(compiler=None)[0].compile == "off"
    assert resolved(base_steps=400, physics_steps=99)[0].compile == "off"
    cfg, why = resolved(precision="fp32", compile="off")
    assert (cfg.precision, cfg.compile, why) == ("fp32", "off", {})
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda is not available"):
            common.run.resolve(config.preset("debug", device="cuda"))


# --- switches ---------------------------------------------------------------------------------------------------------
BRANCH_SWITCHES = {  # field values -> terms of the loss in stage two; none of them may touch stage one
    "as_is": (dict(), TERMS),
    "no_semantic": (dict(semantic=False), TERMS - {"coarse"}),
    "no_refinement": (dict(refinement=False), {"diffusion", "coarse"}),
    "neither": (dict(semantic=False, refinement=False), {"diffusion"}),
    "plain": (dict(injection="plain"), TERMS),
    "bce": (dict(coarse_loss="bce"), TERMS),
    "free": (dict(freeze_backbone=False), TERMS),
    "first_block": (dict(physical_blocks="0"), TERMS),
    "last_block": (dict(physical_blocks="1"), TERMS),
    "sum": (dict(reduction="sum"), TERMS),
}


@pytest.mark.parametrize("switch", BRANCH_SWITCHES)
def test_a_switch_of_the_branch_changes_what_it_says(switch, six, go):
    fields, terms = BRANCH_SWITCHES[switch]
    run = go(**SIX, **fields)
    mine, reference = checkpoint(run, "step000006.pt"), checkpoint(six, "step000006.pt")
    base = checkpoint(run, "base.pt")

    # stage one knows nothing of it
    assert differences(base, checkpoint(six, "base.pt")) == [] and steps(run, "base") == steps(six, "base")

    # the log has the terms it should, and before its first step a zero-injected branch leaves the diffusion loss alone
    for line in steps(run, "physics"):
        assert line.keys() & TERMS == terms and math.isfinite(line["loss"])
    assert held_out(run, "physics")[-1].keys() == terms
    first, reference_first = steps(run, "physics")[0], steps(six, "physics")[0]
    assert (first["diffusion"] == reference_first["diffusion"]) == (switch != "plain")
    if switch in ("bce", "sum"):
        assert first["coarse"] != reference_first["coarse"]
        assert (first["fine_align"] == reference_first["fine_align"]) == (switch == "bce")

    # a frozen backbone stays the averaged one to the bit; a free one moves
    backbone = backbone_of(mine)
    moved = differences(backbone, base["ema"])
    assert bool(moved) == (switch == "free")
    assert {name.startswith("backbone.") for name in mine["ema"]} == ({True, False} if switch == "free" else {False})

    # parts that are switched off do not exist, all others do and learn
    parts = {name.split(".")[0] for name in mine["model"]}
    off = {"no_semantic": {"semantic"}, "no_refinement": {"refinement"}, "neither": {"semantic", "refinement"},
           "plain": {"inject"}}
    assert parts == {"backbone", "semantic", "refinement", "physical", "inject"} - off.get(switch, set())
    blocks = {name.split(".")[1] for name in mine["model"] if name.startswith("physical.")}
    assert blocks == ({"0"} if switch in ("first_block", "last_block") else {"0", "1"})
    assert bool(differences(mine["model"], reference["model"])) == (switch != "as_is")
    at = {"first_block": [0], "last_block": [1]}.get(switch, [0, 1])
    for i, stands_at in enumerate(at):
        name = "attn1.to_v.weight"
        assert not torch.equal(mine["model"][f"physical.{i}.{name}"], base["ema"][f"blocks.{stands_at}.{name}"])


@pytest.mark.parametrize("fields", [
    dict(optimizer="adamw"), dict(process="vpred", predict="v"), dict(process="vpred", predict="x"), dict(predict="v"),
    dict(predict="eps"), dict(schedule="constant"), dict(shift=1.0)], ids=str)
def test_a_switch_of_both_stages_trains(fields, six, go):
    run = go(**SIX, **fields)
    base, reference = checkpoint(run, "base.pt"), checkpoint(six, "base.pt")
    assert base["model"].keys() == reference["model"].keys() and differences(base["model"], reference["model"])
    assert len(base["optimizers"]) == (1 if fields.get("optimizer") == "adamw" else 2)
    for line in lines(run):
        assert all(math.isfinite(value) for value in (line.get("held_out") or {"loss": line.get("loss")}).values())
    backbone = backbone_of(checkpoint(run, "step000006.pt"))
    assert differences(backbone, base["ema"]) == []


# --- training trains --------------------------------------------------------------------------------------------------
def test_training_lowers_what_it_is_to_lower(tmp_path, pools):
    cfg = settings(tmp_path / "run", pools, base_steps=60, physics_steps=60, batch_size=8, world_clips=64, val_clips=16,
                   warmup=5, eval_every=61, log_every=50, physics_lr=1e-2)
    train.main(cfg)
    run, pool = Path(cfg.out_dir), data.open_pool(cfg, progress=False)
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    fresh, clips = train.State(cfg, len(tokenizer)), data.Clips(cfg, pool, tokenizer)
    untrained = train.held_out_loss(fresh, diffusion.build(cfg), clips)["diffusion"]
    base, (begun, *_, done) = held_out(run, "base")[-1]["diffusion"], held_out(run, "physics")  # begun: after one step
    print("LEARN", untrained, base, begun, done)
    assert untrained > 1.5 and base < 0.45 and done["diffusion"] < 0.95 * base
    assert done["fine_align"] < 0.85 * begun["fine_align"] and done["coarse"] < 0.8 * begun["coarse"]


# --- init_from --------------------------------------------------------------------------------------------------------
def test_init_from_takes_the_averaged_backbone_and_skips_stage_one(whole, go):
    run = go(init_from=str(whole[0]))
    assert [(line["step"], line["stage"]) for line in steps(run)] == [(i, "physics") for i in range(4)]
    rates = [train.learning_rate(settings("", ""), "physics", i) for i in range(4)]
    assert [line["lr"] for line in steps(run)] == pytest.approx(rates)
    stored, base = checkpoint(run, "step000004.pt"), checkpoint(whole[0], "base.pt")
    backbone = backbone_of(stored)
    assert differences(backbone, base["ema"]) == []
    assert differences(backbone, base["model"])  # the averages, not the last weights
    assert json.loads((run / "tokenizer.json").read_text()) == json.loads((whole[0] / "tokenizer.json").read_text())


@pytest.mark.parametrize("stop", [1, 3])
def test_init_from_resumes_to_the_bit_and_without_its_source(stop, whole, go, tmp_path):
    source = shutil.copytree(whole[0], tmp_path / "source")
    complete = go("complete", init_from=str(source))
    run = go(init_from=str(source), stop_at=stop)
    shutil.rmtree(source)
    again(run)
    assert differences(checkpoint(run, "step000004.pt"), checkpoint(complete, "step000004.pt")) == []
    assert lines(run) == lines(complete)


def test_init_from_resumes_by_its_own_command_line_again(whole, go):
    """--resume behind the flags the run was started with, --base_steps among them."""
    complete, run = go("complete", init_from=str(whole[0])), go(init_from=str(whole[0]), stop_at=2)
    again(run, "--init_from", whole[0], "--base_steps", TEN["base_steps"])
    assert differences(checkpoint(run, "step000004.pt"), checkpoint(complete, "step000004.pt")) == []


@pytest.mark.parametrize("field, value", [
    ("dim", 64), ("depth", 3), ("heads", 1), ("time_dim", 8), ("patch_t", 1), ("patch", 8), ("text_len", 8),
    ("process", "vpred"), ("predict", "v")])
def test_init_from_refuses_another_shape_by_name(field, value, whole, go):
    with pytest.raises(UserError, match=rf"--{field} .*{value}\b"):
        go(init_from=str(whole[0]), **{field: value})


def test_init_from_refuses_what_is_no_trained_run(go, tmp_path):
    unfinished = go("unfinished", stop_at=3)
    with pytest.raises(UserError, match=r"no checkpoints/base\.pt"):
        go(init_from=str(unfinished))
    (unfinished / "checkpoints" / "base.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"base\.pt cannot be read"):
        go(init_from=str(unfinished))
    with pytest.raises(UserError, match="is no run folder|is missing"):
        go(init_from=str(tmp_path / "nowhere"))


# --- saves ------------------------------------------------------------------------------------------------------------
def full_after_some_bytes(state, f):
    f.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def wrapped(state, f):  # as torch reports a failing file
    f.write(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("victim, cadence", [("step000004.pt", dict(save_every=2)), ("best.pt", dict(eval_every=2))],
                         ids=["newest", "best"])
@pytest.mark.parametrize("owner, name, fails", [
    (torch, "save", full_after_some_bytes), (torch, "save", wrapped), (os, "fsync", full)],
    ids=["write", "torch", "fsync"])
def test_a_full_disk_leaves_the_checkpoints_before(owner, name, fails, victim, cadence, whole, go, monkeypatch):
    run = go(**cadence, stop_at=3)
    before = contents(run / "checkpoints")
    assert "best.pt" in before
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(owner, name, fails)
        again(run)
    sentence = rf"The checkpoint \S*/{re.escape(victim)} could not be written \(.*\); the previous one is intact\."
    assert re.fullmatch(sentence, str(caught.value))
    assert contents(run / "checkpoints") == before  # and no .tmp
    again(run)
    assert differences(checkpoint(run, "step000010.pt"), checkpoint(whole[0], "step000010.pt")) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_full_elsewhere_stops_with_a_sentence(number, go, monkeypatch):
    def write(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(common.run.Log, "write", write)
    with pytest.raises(Stopped, match="disk is full; .*--resume"):
        go()


def test_other_errors_of_the_system_are_not_called_a_full_disk(go, monkeypatch):
    def write(*_, **__):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(common.run.Log, "write", write)
    with pytest.raises(OSError, match="Input/output"):
        go()


@pytest.mark.parametrize("left", [0, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_passed_over(left, whole, go, capsys):
    run = go(save_every=2, stop_at=5)
    newest = run / "checkpoints" / "step000005.pt"
    size = newest.stat().st_size
    os.truncate(newest, int(left * size) if left < 1 else left)
    capsys.readouterr()
    again(run, "--stop_at", 0)  # it goes on from step 4, and 5 is where it was told to stop
    assert re.search(r"step000005\.pt is damaged \(\w+\); trying the one before", capsys.readouterr().err)
    assert differences(checkpoint(run, "step000010.pt"), checkpoint(whole[0], "step000010.pt")) == []
    assert [line["step"] for line in steps(run)] == list(range(10))


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(go):
    run = go(save_every=3, stop_at=5)
    os.truncate(run / "checkpoints" / "step000005.pt", 1000)
    again(run, "--stop_at", 4)
    assert {"step000003.pt", "step000004.pt"} <= set(names(run))  # the last two that read


def test_no_readable_checkpoint_is_said(go):
    run = go(stop_at=3)
    os.truncate(run / "checkpoints" / "step000003.pt", 1000)
    with pytest.raises(UserError, match="No checkpoint in .* can be read"):
        again(run)


def test_the_last_two_the_best_and_the_base_are_kept(go):
    run = go(save_every=1)
    assert names(run) == ["base.pt", "best.pt", "step000009.pt", "step000010.pt"]
    assert checkpoint(run, "base.pt")["stage"] == "base" and checkpoint(run, "base.pt")["step"] == 6
    best, scores = checkpoint(run, "best.pt"), [scores["diffusion"] for scores in held_out(run, "physics")]
    assert best["stage"] == "physics" and best["best"] == min(scores) == scores[[9, 10].index(best["step"])]


def test_best_is_not_replaced_by_worse(go, monkeypatch):
    scores = iter([3.0, 2.0, 9.0, 5.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: {"diffusion": next(scores)})
    run = go(eval_every=2)  # 2: 3.0, 4: 2.0, 6 (border): 9.0, then stage two anew: 8: 5.0, 10: 6.0
    best = checkpoint(run, "best.pt")
    assert (best["step"], best["best"]) == (8, 5.0)


def test_best_is_remembered_by_a_resumed_run(go, monkeypatch):
    scores = iter([2.0, 9.0])
    monkeypatch.setattr(train, "held_out_loss", lambda *_: {"diffusion": next(scores)})
    run = again(go(eval_every=2, stop_at=3), "--stop_at", 5)
    best = checkpoint(run, "best.pt")
    assert (best["step"], best["best"]) == (2, 2.0) and checkpoint(run, "step000005.pt")["best"] == 2.0


# --- losses that are no numbers ---------------------------------------------------------------------------------------
def tensors(state):
    """Copies of weights, averages and optimizer states."""
    stored = state.state_dict()
    moments = {f"optimizer {i} {j} {key}": value for i, o in enumerate(stored["optimizers"])
               for j, entry in o["state"].items() for key, value in entry.items()}
    averages = {f"ema {name}": p for name, p in stored["ema"].items()}
    return {name: torch.as_tensor(p).clone() for name, p in (stored["model"] | averages | moments).items()}


def nan_loss(state, losses):
    return losses | {"diffusion": losses["diffusion"] * math.nan}


def infinite_loss(state, losses):
    return losses | {"diffusion": losses["diffusion"] * math.inf}


def nan_gradient(state, losses):  # sqrt at 0: the value is 0, its slope times 0 is not a number
    return losses | {"diffusion": losses["diffusion"] + (0 * next(iter(state.trained.values())).sum()).sqrt()}


@pytest.mark.parametrize("spoil", [nan_loss, infinite_loss, nan_gradient])
@pytest.mark.parametrize("stage, at", [("base", 2), ("physics", 8)])
def test_a_step_that_is_no_number_is_skipped(spoil, stage, at, go, monkeypatch):
    states = {}

    def spoiled(n, state, batch, t, eps, losses):
        if abs(n - at) <= 1:
            states[n] = tensors(state)
        return spoil(state, losses) if n == at else None
    training_calls(monkeypatch, spoiled)
    run = go(log_every=100)  # a skipped step is logged in any case
    assert differences(states[at - 1], states[at]) and differences(states[at], states[at + 1]) == []
    raw = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in raw if line.get("skipped")] == [(at, stage)]
    assert not any(value.isnan().any() for value in checkpoint(run, "step000010.pt")["model"].values())


def test_the_log_of_a_skipped_step_is_json(go, monkeypatch):
    training_calls(monkeypatch, lambda n, state, batch, t, eps, losses: nan_loss(state, losses) if n == 2 else None)
    assert [line["step"] for line in steps(go()) if line["skipped"]] == [2]  # `lines` is strict


def test_three_in_a_row_stop_the_run(go, tmp_path, monkeypatch):
    good = {}

    def spoiled(n, state, batch, t, eps, losses):
        if n == 3:
            good.update(tensors(state))
        return nan_loss(state, losses) if n >= 3 else None
    training_calls(monkeypatch, spoiled)
    with pytest.raises(Stopped) as caught:
        go(save_every=2)
    said = str(caught.value)
    assert "not finite three steps in a row (step 5)" in said and "--lr" in said and "\n" not in said
    stored = checkpoint(tmp_path / "run", "step000004.pt")
    assert names(tmp_path / "run") == ["best.pt", "step000002.pt", "step000004.pt"]
    assert differences(stored["model"], {name: good[name] for name in stored["model"]}) == []


def test_two_in_a_row_are_borne_again_and_again(go, monkeypatch):
    training_calls(monkeypatch, lambda n, state, batch, t, eps, losses: nan_loss(state, losses) if n % 3 else None)
    run = go(log_every=100)
    skipped = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped if line.get("skipped")] == [1, 2, 4, 5, 7, 8]


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(tmp_path_factory, pools):
    """A run stopped at step 3 of 6 + 4. Not to be written into."""
    return launch(tmp_path_factory.mktemp("stopped") / "run", pools, stop_at=3)


@pytest.fixture
def half(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "half")


@pytest.mark.parametrize("field, value", [
    ("lr", 0.5), ("seed", 3), ("dim", 64), ("semantic", "false"), ("physical_blocks", "0"), ("batch_size", 8),
    ("process", "vpred"), ("world_seed", 2), ("threads", 2), ("data_dir", "x"), ("val_clips", 5), ("precision", "bf16"),
    ("init_from", "x")])
def test_resume_refuses_a_changed_field_by_name(field, value, half):
    before = contents(half)
    with pytest.raises(UserError, match=rf"--resume cannot change --{field}: "):
        again(half, f"--{field}", value)
    assert contents(half) == before


def test_resume_names_all_changed_fields(half):
    with pytest.raises(UserError, match="cannot change --seed, --lr: "):
        again(half, "--lr", 0.5, "--seed", 4)


def test_resume_lets_the_rest_change(half, tmp_path, pools):
    moved, elsewhere = half.rename(tmp_path / "moved"), shutil.copytree(pools, tmp_path / "pools")
    again(moved, "--physics_steps", 6, "--log_every", 3, "--eval_every", 4, "--save_every", 5, "--preview_steps", 2,
          "--guidance", 2.0, "--pool_dir", elsewhere)
    assert checkpoint(moved, "step000012.pt")["step"] == 12
    assert [line["step"] for line in steps(moved)] == [0, 1, 2, 3, 6, 9]


def test_resume_needs_no_preset_again(half):
    train.main(config.parse(["--out_dir", str(half), "--resume", "--stop_at", "4"], ""))
    assert "step000004.pt" in names(half)


@pytest.mark.parametrize("base_steps, stop", [(2, 4), (8, 8), (5, 8)])
def test_resume_refuses_base_steps_that_stage_one_has_passed(base_steps, stop, go):
    """Steps count from the border: moved behind what is done, it would turn learning rates negative."""
    run = go(stop_at=stop)
    with pytest.raises(UserError, match="--base_steps"):
        again(run, "--base_steps", base_steps)


def test_stage_one_may_be_prolonged_while_it_lasts(half):
    again(half, "--base_steps", 8)
    assert [line["stage"] for line in steps(half)] == ["base"] * 8 + ["physics"] * 4


def test_resume_of_what_is_no_run(half, tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        again(tmp_path / "nowhere")
    (half / "checkpoints" / "step000003.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        again(half)


def test_a_folder_with_a_run_is_not_overwritten(stopped, pools):
    before = contents(stopped)
    with pytest.raises(UserError, match="already holds a run: go on with --resume, or give another --out_dir"):
        launch(stopped, pools)
    assert contents(stopped) == before


def test_a_run_folder_that_cannot_be_is_refused(tmp_path, pools):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be made"):
        launch(tmp_path / "file" / "run", pools)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_resume_of_a_half_written_run_folder(name, share, half):
    path = half / name
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=name):
        again(half)


def test_resume_refuses_other_clips(half, monkeypatch):
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)  # as another world.py would, these clips get another key
    with pytest.raises(UserError, match="The clips of the world are not those"):
        again(half)


def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, pools):
    common = ["--config", "debug", "--out_dir", str(tmp_path / "run"), "--pool_dir", str(pools)]
    cases = {("--nonsense", "1"): "--nonsense", ("--data_dir", str(tmp_path / "nowhere")): "nowhere",
             ("--base_steps", "many"): "--base_steps"}
    programs = {flags: subprocess.Popen([sys.executable, "train.py", *common, *flags], **PIPES) for flags in cases}
    for flags, program in programs.items():
        out, err = program.communicate(timeout=240)
        assert program.returncode == 2 and err.count("\n") == 1 and err.endswith(".\n"), err
        assert cases[flags] in err and "Traceback" not in err + out


# --- a folder of real videos ------------------------------------------------------------------------------------------
def test_a_folder_of_videos_from_training_to_sampling(tmp_path, pools, monkeypatch, capsys):
    monkeypatch.setattr(sample, "preview", REAL_PREVIEW)
    folder, rng = tmp_path / "videos", np.random.default_rng(0)
    folder.mkdir()
    captions = {}
    sizes = {"a.mp4": (48, 64), "b.mp4": (64, 32), "c.gif": (30, 45), "d.gif": (20, 20), "e.mp4": (16, 96)}
    for i, (name, (h, w)) in enumerate(sizes.items()):
        frames = np.full((12, h, w, 3), 30 + 40 * i, np.uint8)
        for f in range(12):
            frames[f, h // 4 : h // 2, (f * w) // 16 : (f * w) // 16 + w // 4] = rng.integers(100, 255, 3)
        if name.endswith("mp4"):
            iio.imwrite(folder / name, frames, plugin="pyav", codec="libx264", fps=12)
        else:
            iio.imwrite(folder / name, frames, duration=80)
        captions[name] = f"a block slides over grey number {i}"
    (folder / "bad.mp4").write_bytes(b"not a video at all")
    (folder / "captions.json").write_text(json.dumps(captions | {"bad.mp4": "nothing"}))

    short = dict(base_steps=3, physics_steps=3, preview_every=2, stop_at=5)
    run = launch(tmp_path / "run", pools, data_dir=str(folder), **short)
    said = capsys.readouterr().out
    assert "bad.mp4" in said and "skipped 1" in said and "from 5 videos" in said
    for line in steps(run, "physics"):  # no labels and no masks: nothing to route by, no target
        assert "coarse" not in line and line["fine_align"] == 0 and math.isfinite(line["loss"])
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step00000{i}.gif" for i in (2, 3, 4)]
    preview = iio.imread(run / "samples" / "step000004.gif")
    assert len(preview) == 4 and preview.shape[1] >= 128 and preview.std() > 1

    out = tmp_path / "clip.gif"
    sample.main(["--run", str(run), "--checkpoint", "last", "--prompt", "a block slides", "--n", "1", "--steps", "2",
                 "--out", str(out), "--device", "cpu"])
    assert len(iio.imread(out)) == 4

    (folder / "captions.json").write_text(json.dumps(captions | {"a.mp4": "a block flies"}))
    with pytest.raises(UserError, match="are not those"):
        again(run)


# --- parts, by hand ---------------------------------------------------------------------------------------------------
def test_learning_rate_by_hand():
    cfg = config.preset("debug", lr=1.0, physics_lr=0.1, warmup=4, base_steps=10, physics_steps=20)
    rate = train.learning_rate
    assert [rate(cfg, "base", i) for i in (0, 1, 3, 4, 5, 9)] == pytest.approx([0.25, 0.5 * 0.9, 0.7, 0.6, 0.5, 0.1])
    assert [rate(cfg, "physics", i) for i in (0, 3, 10, 19)] == pytest.approx([0.025, 0.1 * 17 / 20, 0.05, 0.005])
    constant = dataclasses.replace(cfg, schedule="constant")
    assert [rate(constant, "base", i) for i in (0, 3, 9)] == [0.25, 1.0, 1.0] and rate(constant, "physics", 19) == 0.1
    assert rate(dataclasses.replace(cfg, warmup=0), "base", 0) == 1.0


@pytest.fixture(scope="module")
def physics(pools):
    """A state at the beginning of stage two, the process, and a batch of four clips with captions and categories."""
    cfg = settings("", pools, caption_dropout=0.0)
    pool = data.open_pool(cfg, progress=False)
    tokenizer = data.Tokenizer.from_captions(pool.captions)
    state = train.State(cfg, len(tokenizer))
    state.attach_branch()
    return state, diffusion.build(cfg), data.Clips(cfg, pool, tokenizer).batch(range(4))


def test_muon_has_the_block_matrices_and_nothing_is_twice(physics):
    state = physics[0]
    for frozen, trained in ((True, state.trained), (False, dict(state.model.named_parameters()))):
        muon, adamw = train.make_optimizers(trained, dataclasses.replace(state.cfg, weight_decay=0.3), 0.5)
        assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
        name_of = {id(p): name for name, p in trained.items()}
        group = lambda g: {name_of[id(p)] for p in g["params"]}
        matrices, (decayed, undecayed) = group(muon.param_groups[0]), map(group, adamw.param_groups)
        everything = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
        assert len(everything) == len({id(p) for p in everything}) == len(trained)
        blocks = {name for name in trained if re.match(r"(physical|backbone\.(text_encoder\.)?blocks)\.\d+\.", name)}
        assert matrices == {name for name in blocks if trained[name].ndim == 2 and "norm" not in name}
        assert len(matrices) >= 12
        assert all(re.search(r"\.(to_q|to_k|to_v|to_out|ff\.[02])\.weight$", name) for name in matrices)
        assert {name for name, p in trained.items() if p.ndim == 1} <= undecayed and len(decayed) > 5
        assert {name for name in undecayed if trained[name].ndim > 1} <= {"refinement.bias"}  # see below
        assert [g["weight_decay"] for o in (muon, adamw) for g in o.param_groups] == [0.3, 0.3, 0.0]
        assert frozen == (not any(name.startswith("backbone.") for name in trained))
        assert all(g["lr"] == 0.5 for o in (muon, adamw) for g in o.param_groups)
        assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    rest = train.make_optimizers(state.trained, dataclasses.replace(state.cfg, optimizer="adamw"), 0.5)
    assert [type(o) for o in rest] == [torch.optim.AdamW]
    assert sum(len(g["params"]) for g in rest[0].param_groups) == len(state.trained)


def test_biases_do_not_decay(physics):
    """E_r biases stand in one (E_r, D) table: two axes, and biases all the same."""
    state = physics[0]
    groups = [g for o in state.optimizers for g in o.param_groups]
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert [name for name, p in state.trained.items() if name.endswith("bias") and id(p) in decayed] == []


def test_total_loss_is_equation_6():
    values = dict(diffusion=2.0, coarse=3.0, fine_align=5.0, balance=7.0)
    losses = {name: torch.tensor(value) for name, value in values.items()}
    cfg = config.preset("debug")
    assert align.total_loss(losses, cfg).item() == pytest.approx(2 + 0.1 * 3 + 0.02 * 5 + 0.01 * 7)
    assert align.total_loss({"diffusion": losses["diffusion"]}, cfg).item() == 2
    other = dataclasses.replace(cfg, coarse_weight=1.0, fine_weight=10.0, balance_weight=0.0)
    assert align.total_loss(losses, other).item() == 2 + 3 + 50


def test_noise_bins():
    t = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.74, 1.0])
    assert train.by_noise(torch.tensor([1.0, 3.0, 5.0, 7.0, 8.0, 11.0]), t) == [2.0, 5.0, 7.5, 11.0]
    assert train.by_noise(torch.tensor([4.0]), torch.tensor([0.9])) == [None, None, None, 4.0]


def coarse(physics, batch, **fields):
    state, process, _ = physics
    t, eps = process.draw(0, range(4), batch.video.shape[1:])
    kept, state.cfg = state.cfg, dataclasses.replace(state.cfg, **fields)
    try:
        return train.losses_of(state, process, batch, t, eps)[0].get("coarse")
    finally:
        state.cfg = kept


def test_a_dropped_caption_does_not_enter_the_coarse_loss(physics):
    batch = physics[2]
    assert (batch.text_length > 0).all() and (batch.categories.sum(1) > 0).all() and coarse(physics, batch) is not None
    told = torch.tensor([True, False, True, True])
    dropped = dataclasses.replace(batch, text=batch.text * told[:, None], text_length=batch.text_length * told)
    changed = {i: dataclasses.replace(dropped, categories=batch.categories.clone()) for i in (1, 2)}
    for i, other in changed.items():
        other.categories[i] = 1 - other.categories[i]
    for kind in ("relative", "bce"):
        assert coarse(physics, dropped, coarse_loss=kind) == coarse(physics, changed[1], coarse_loss=kind)
        assert coarse(physics, dropped, coarse_loss=kind) != coarse(physics, changed[2], coarse_loss=kind)
        assert coarse(physics, dropped, coarse_loss=kind) != coarse(physics, batch, coarse_loss=kind)


def test_a_clip_without_label_does_not_enter_the_coarse_loss(physics):
    batch = physics[2]
    unlabelled = dataclasses.replace(batch, categories=batch.categories.clone())
    unlabelled.categories[1] = 0
    reworded = dataclasses.replace(unlabelled, text=batch.text.clone())
    reworded.text[1, 0] = 1 if batch.text[1, 0] != 1 else 2
    assert coarse(physics, unlabelled) == coarse(physics, reworded) != coarse(physics, batch)


@pytest.mark.parametrize("n_told, terms", [(0, set()), (1, {"bce"}), (2, {"bce", "relative"})])
def test_how_many_clips_the_coarse_loss_needs(physics, n_told, terms):
    batch, told = physics[2], torch.arange(4) < n_told
    few = dataclasses.replace(batch, text=batch.text * told[:, None], text_length=batch.text_length * told)
    assert {kind for kind in ("relative", "bce") if coarse(physics, few, coarse_loss=kind) is not None} == terms


def test_held_out_loss_is_the_mean_over_clips_whatever_the_batches(physics, pools):
    state, process, _ = physics
    cfg = dataclasses.replace(state.cfg, semantic=True)
    pool = data.open_pool(cfg, progress=False)
    clips, kept = data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions)), state.cfg
    found = []
    try:
        for size in (4, 3, 1):
            state.cfg = dataclasses.replace(cfg, batch_size=size)
            found.append(train.held_out_loss(state, process, clips)["diffusion"])
    finally:
        state.cfg = kept
    assert found == pytest.approx([found[0]] * 3, rel=1e-5) and state.model.training
