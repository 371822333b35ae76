"""Several processes are one: same losses, gradients and weights, and checkpoints that any number of them goes on with.

The processes are real ones of torchrun on this machine's cores, with gloo.
"""
import ast
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import data
import sample
import train
from common import parallel
from common.run import agent, go_on_after_restart
from config import UserError
from helpers import ROOT, sentence, tiny_official, words_of
from runs import TEN, TERMS, again, checkpoint, differences, launch, lines, names, same_run, settings, steps
from state import State, losses_in_parts

SIX = dict(base_steps=3, physics_steps=3)
CASES = {  # name: fields of a run of six steps, which one process and two must make alike
    "branch": dict(),
    "parts": dict(micro_batch=1),
    "all_weights": dict(freeze_backbone=False, optimizer="adamw"),
    "no_branch": dict(freeze_backbone=False, physical_blocks=""),
    "lora": dict(physical_blocks="", lora_rank=4),
    "wan": dict(lineage="wan", checkpointing=True, injection="zero"),
    "factors": dict(map_rank=2, coarse_loss="bce", micro_batch=2, checkpointing=True),
    "pair": dict(batch_size=2, coarse_weight=10.0),  # a clip a process: every pair lies in both
    "sums": dict(reduction="sum", batch_size=6, micro_batch=3, val_clips=7),  # sizes that divide badly
    "bf16": dict(precision="bf16"),
}
REAL_PREVIEW = sample.preview
STOPS = dict(eval_every=2, save_every=2, preview_every=2)  # what others' sharded runs stumble over


def torchrun(n: int, cases: list[dict], folder) -> None:
    """Real runs in n processes, one after the other."""
    file = folder / f"{n}-{len(cases)}.json"
    file.write_text(json.dumps(cases))
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "--",
               "tests/ranks.py", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def fields_of(out, pools, **fields) -> dict:
    """A case of ten steps for tests/ranks.py."""
    return {**TEN, "pool_dir": str(pools), "out_dir": str(out), **fields}


def close(run, other, name="step000010.pt", bound=1e-5) -> bool:
    """Do two runs have the same log and weights, but for rounding?"""
    mine, theirs = lines(run), lines(other)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for a, b in zip(mine, theirs):
        assert a.keys() == b.keys()
        for key in {"loss", "grad_norm"} & a.keys() | TERMS & a.keys():
            assert b[key] == pytest.approx(a[key], rel=bound, abs=bound * 1e-2), (key, a["step"])
        assert b.get("held_out", {}) == pytest.approx(a.get("held_out", {}), rel=bound, abs=bound * 1e-2)
    for part in ("model", "ema"):
        a, b = checkpoint(run, name)[part], checkpoint(other, name)[part]
        assert a.keys() == b.keys()
        # The relative loss leaves the size of a lifted vector open: along it the gradient is nothing but rounding,
        # which AdamW makes into steps of full size.
        open_to_chance = {key for key in a if "semantic.lift" in key}
        for keys, most in ((a.keys() - open_to_chance, bound), (open_to_chance, 100 * bound)):
            apart = math.hypot(*((a[key] - b[key]).norm() for key in keys))
            assert apart <= most * math.hypot(*(a[key].norm() for key in keys)), (part, most)
    return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pools):
    """All runs of two processes, by one torchrun: {name: folder}. Those named "cut" stopped at step 5 or 8."""
    folder = tmp_path_factory.mktemp("two")
    cases = {name: SIX | fields for name, fields in CASES.items()}
    cases |= {"whole": STOPS | dict(preview=True), "cut": STOPS | dict(stop_at=5), "cut late": STOPS | dict(stop_at=8)}
    torchrun(2, [fields_of(folder / name, pools, **fields) for name, fields in cases.items()], folder)
    return {name: folder / name for name in cases}


# ---------------------------------------------------------------------------------------------- two processes are one
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name, runs, tmp_path, pools, no_previews):
    alone = launch(tmp_path / "one", pools, **SIX, **CASES[name])
    assert close(alone, runs[name], "step000006.pt", bound=3e-2 if name == "bf16" else 1e-5)
    assert names(alone) == names(runs[name])
    assert json.loads((runs[name] / "config.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_what_is_compared_is_alive(runs):
    """Guards the tests above: runs differ, from each other and from step to step, and the pairs' loss is not zero."""
    losses = {name: [line["loss"] for line in steps(run)] for name, run in runs.items() if name in CASES}
    first, *others = losses.values()
    assert first == pytest.approx(losses["parts"], rel=1e-5)  # the same run in other parts
    rest = [some for name, some in losses.items() if name not in ("branch", "parts", "bf16")]
    assert all(some != pytest.approx(first, rel=1e-3) for some in rest)
    assert all(len(set(some)) == 6 for some in losses.values())
    assert all(line.get("coarse", 1) > 1e-4 for line in steps(runs["pair"], "physics"))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path, pools, no_previews):
    """2 -> 2 to the bit, 2 -> 1, 1 -> 2 and 2 -> 4 but for rounding, with validations, previews and saves between."""
    alone = launch(tmp_path / "one", pools, **STOPS)
    assert close(alone, runs["whole"])
    started = launch(tmp_path / "started", pools, **STOPS, stop_at=7)
    four, one = tmp_path / "four", tmp_path / "one after two"
    for copy, source in ((four, "cut late"), (one, "cut")):
        subprocess.run(["cp", "-r", runs[source], copy], check=True)
    torchrun(2, [fields_of(run, pools, **STOPS, resume=True) for run in (runs["cut"], runs["cut late"], started)], tmp_path)
    torchrun(4, [fields_of(four, pools, **STOPS, resume=True)], tmp_path)
    again(one)
    assert same_run(runs["cut"], runs["whole"]) and same_run(runs["cut late"], runs["whole"])
    assert close(alone, started) and close(alone, four) and close(alone, one)


@pytest.mark.slow
def test_the_preview_of_two_processes_is_what_sample_draws(runs, tmp_path):
    """The first save, read by the function behind sample.py, draws the trainer's own preview to the bit."""
    cfg, net, process, tokenizer, info = sample.load_run(runs["whole"], "step000008.pt")
    drawn = sample.RunModel(cfg, net, process, tokenizer, cfg.precision)
    prompts = train.telling_prompts(data.Clips(cfg, data.open_pool(cfg, progress=False), tokenizer))
    REAL_PREVIEW(tmp_path / "again.gif", drawn, prompts)
    assert (tmp_path / "again.gif").read_bytes() == (runs["whole"] / "samples" / "step000008.gif").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("diffusers") is None,
                    reason="encoding needs diffusers: pip install -r requirements-extra.txt")
@pytest.mark.parametrize("lineage", ["cogvideox", "wan"])
def test_a_branch_beside_official_weights_trains_as_in_one_process(lineage, weights, caches, tmp_path):
    """On latents of a cache, the backbone frozen, a clip at a time; the published branch is the same but for rounding."""
    found = {}
    for n in (1, 2):
        cfg = tiny_official(lineage, weights=str(weights[lineage]), cache=str(caches[lineage]), batch_size=4,
                            micro_batch=1, physics_steps=4, log_every=1, eval_every=2, save_every=2, warmup=1,
                            physics_lr=1e-3, out_dir=str(tmp_path / str(n)), checkpointing=True, report=False)
        if n == 1:
            train.main(cfg)
        else:
            torchrun(2, [dataclasses.asdict(cfg)], tmp_path)
        found[n] = safetensors.torch.load_file(tmp_path / str(n) / "branch.safetensors")
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "2"), strict=True):
        assert b.get("loss", 0) == pytest.approx(a.get("loss", 0), rel=1e-5)
        assert b.get("grad_norm", 0) == pytest.approx(a.get("grad_norm", 0), rel=1e-4)
    assert found[1].keys() == found[2].keys()
    kept = [name for name in found[1] if "semantic.lift" not in name]
    apart = math.hypot(*((found[1][name] - found[2][name]).norm() for name in kept))
    assert apart < 1e-5 * math.hypot(*(found[1][name].norm() for name in kept))


# ----------------------------------------------------------------------------------------------------- parts of a batch
def gradients(state, batch, t, eps, size):
    """-> {name: gradient}, {term: value} of a batch in parts of so many clips."""
    kept, state.cfg = state.cfg, dataclasses.replace(state.cfg, micro_batch=size, coarse_weight=5.0)
    sums = {}
    try:
        for losses, *_ in losses_in_parts(state, batch, t, eps):
            parallel.add_up(sums, losses, 1)
            sum(losses.values()).backward()
    finally:
        state.cfg = kept
    found = {name: p.grad.clone() for name, p in state.trained.items() if p.grad is not None}
    for p in state.trained.values():
        p.grad = None
    return found, {name: value.item() for name, value in sums.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_parts_of_a_batch_add_up_to_it(size, physics):
    """Every term of the loss, and every gradient, is that of the whole batch, those of pairs of clips included."""
    state, batch = physics
    t, eps = state.process.draw(0, range(4), batch.video.shape[1:])
    with torch.random.fork_rng():  # experts that differ, so that the balance has something to say
        torch.manual_seed(0)
        state.used = torch.rand(len(state.used)).softmax(0)
    whole, terms = gradients(state, batch, t, eps, 0)
    parts, terms_of_parts = gradients(state, batch, t, eps, size)
    assert terms_of_parts == pytest.approx(terms, rel=1e-5) and terms.keys() == TERMS
    assert parts.keys() == whole.keys()
    apart = {name: (parts[name] - gradient).norm() for name, gradient in whole.items()}
    assert math.hypot(*apart.values()) < 1e-6 * math.hypot(*(gradient.norm() for gradient in whole.values()))
    for name, gradient in whole.items():
        assert apart[name] < 5e-3 * gradient.norm() + 1e-9, name  # the lift's is a difference of larger numbers


# -------------------------------------------------------------------------------------------------------- checkpointing
@pytest.mark.parametrize("fields, times", [
    (dict(), 1), (dict(checkpointing=True), 2), (dict(checkpointing=True, keep_attention=True), 1)], ids=str)
def test_how_often_attention_runs(fields, times, pools):
    """Once a block, twice where it is computed again, and once where it is kept; long clips take the fused kernel."""
    cfg = settings("", pools, frames=8, height=32, width=32, **fields)
    pool = data.open_pool(cfg, progress=False)
    tokenizer = data.Tokenizer.from_captions(pool.captions)
    state = State(cfg, len(tokenizer))
    batch = data.Clips(cfg, pool, tokenizer).batch(range(2))
    t, eps = state.process.draw(0, range(2), batch.video.shape[1:])
    (losses, *_), = losses_in_parts(state, batch, t, eps)
    losses["diffusion"].backward()  # a first one warms up nothing, but shows that it works twice
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: lambda *_, **__: 1}) as counter:
        (losses, *_), = losses_in_parts(state, batch, t, eps)
        losses["diffusion"].backward()
    assert counter.get_flop_counts()["Global"][kernel] == times * cfg.depth


# ------------------------------------------------------------------------------------------------ mistakes and restarts
@pytest.mark.parametrize("world, fields, said", [
    (3, dict(batch_size=4), "--batch_size 4 does not divide into 3 processes:"),
    (2, dict(batch_size=8, micro_batch=3), "into 2 processes and parts of --micro_batch 3"),
    (1, dict(batch_size=8, micro_batch=16), "parts of --micro_batch 16"),
])
def test_a_batch_that_does_not_divide_is_refused(world, fields, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert said in sentence(parallel.check_share, config.preset("debug", **fields))


def test_a_restart_goes_on_with_its_own_run_only(tmp_path, pools, monkeypatch, no_previews):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some run")
    run = launch(tmp_path / "run", pools, stop_at=5)
    cfg = settings(run, pools)
    assert go_on_after_restart(cfg) == cfg  # no restart
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert go_on_after_restart(cfg) == dataclasses.replace(cfg, resume=True)
    assert go_on_after_restart(settings(tmp_path / "new", pools)).resume is False

    # killed after the first validation and before the first save: nothing to go on from, and nothing is lost
    (run / "checkpoints" / "step000005.pt").unlink()
    assert names(run) == ["best.pt"]
    assert go_on_after_restart(cfg) == cfg and names(run) == []

    # another torchrun's run is left alone, and refused
    other = launch(tmp_path / "other", pools, stop_at=5)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another run")
    assert agent().startswith("another run") and go_on_after_restart(settings(other, pools)).resume is False
    assert names(other) == ["best.pt", "step000005.pt"]
    with pytest.raises(UserError, match="already holds a run"):
        train.main(settings(other, pools))


@pytest.mark.kill
@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_sentence(tmp_path, pools):
    """And a second torchrun on the same folder is refused, once, before that."""
    run = tmp_path / "run"
    fields = {**TEN, "config": "debug", "pool_dir": pools, "out_dir": run, "base_steps": 10000,
              "eval_every": 5000, "save_every": 5000}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", "train.py",
               *words_of(fields)]
    how = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
               text=True)
    begun = subprocess.Popen(command, **how)
    while begun.poll() is None and not (run / "log.jsonl").exists():
        time.sleep(0.1)
    second = subprocess.run(command, **how)
    assert second.returncode != 0 and second.stdout.count("Another process trains in") == 1
    assert "exitcode: 2" in second.stdout.replace("exitcode  : ", "exitcode: ")

    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(begun.pid)], capture_output=True, text=True).stdout
    os.kill(max(map(int, listed.split())), signal.SIGKILL)
    said = begun.communicate()[0]
    assert begun.returncode != 0
    assert re.search(r"Process [01] of 2 cannot go on at step \d+, because another one has ended: ", said)


# ------------------------------------------------------------------------------------------------------ the syntax tree
WAITING = {"first", "any_of", "gather", "total", "whole", "distribute", "look_over", "state_dict", "attach_branch",
           "training_step", "held_out_loss", "validate", "publish", "broadcast_object_list", "all_reduce", "all_gather",
           "full_tensor", "clip_grad_norm_", "barrier"}  # what every process must call
DRAWS = {"rand", "randn", "randperm", "randint", "normal_", "uniform_", "manual_seed", "build_backbone", "ProPhy"}


def called_under_a_rank(tree: ast.AST) -> list[str]:
    """Names of what is called under a condition that mentions a rank."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While) and "rank" in ast.unparse(node.test):
            bodies = [node.body, node.orelse]
            inside = [part for body in bodies for part in (body if isinstance(body, list) else [body])]
            calls = [call.func for part in inside for call in ast.walk(part) if isinstance(call, ast.Call)]
            found += [call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls]
    return found


@pytest.mark.parametrize("name", ["train.py", "state.py", "common/parallel.py", "common/run.py", "common/optim.py",
                                  "common/checkpoints.py", "official/branch.py"])
def test_no_process_waits_or_draws_alone(name):
    """A call that waits for all processes, or a draw from the shared stream, under a condition on the rank: the
    others would wait for ever, or be out of step."""
    called = set(called_under_a_rank(ast.parse((ROOT / name).read_text())))
    assert not called & (WAITING | DRAWS)


def test_the_syntax_test_sees_what_it_should():
    def seen(text):
        return called_under_a_rank(ast.parse(text))
    assert seen("if rank == 0:\n    parallel.total(x)") == ["total"]
    assert seen("y = whole(x) if config.rank()[0] else None") == ["whole"]
    assert seen("if step == 0:\n    parallel.total(x)") == []
