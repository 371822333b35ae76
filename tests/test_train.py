"""train.py: each switch against the run without it,
losses that are no numbers, optimizers and losses by hand.

Almost every test runs the real `train.main` on ten steps of the debug preset.
"""
import dataclasses
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_of_torch

import align
import common.run
import config
import data
import sample
import train
import world
from common.optim import Muon, make_optimizers, orthogonalised
from config import Stopped, UserError
from helpers import ROOT
from helpers import drifting, json_of, sentence
from state import losses_in_parts
from runs import (
    SIX, TEN, TERMS, again, backbone_of, checkpoint, clips_trained_on, differences, held_out, launch, lines,
    names, same_run, settings, steps, training_calls)

pytestmark = pytest.mark.usefixtures("no_previews")
PIPES = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
REAL_PREVIEW = sample.preview


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


# --- switches -----------------------------------------------------------------------------------------------
BRANCH_SWITCHES = {  # field values -> terms of the loss in stage two; none of them may touch stage one
    "as_is": (dict(), TERMS),
    "no_semantic": (dict(semantic=False), TERMS - {"coarse", "semantic_balance"}),
    "no_refinement": (dict(refinement=False), {"diffusion", "coarse", "semantic_balance"}),
    "neither": (dict(semantic=False, refinement=False), {"diffusion"}),
    "plain": (dict(injection="plain"), TERMS),
    "zero": (dict(injection="zero"), TERMS),
    "copies": (dict(train_physical=False), TERMS),
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

    # the log has the terms it should, and before its first step a branch leaves the diffusion loss alone
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
    assert {name.startswith("backbone.")
            for name in mine["ema"]} == ({True, False} if switch == "free" else {False})

    # parts that are switched off do not exist, all others do and learn
    parts = {name.split(".")[0] for name in mine["model"]}
    off = {"no_semantic": {"semantic"}, "no_refinement": {"refinement"},
           "neither": {"semantic", "refinement"}}
    more = {"inject"} if switch == "zero" else set()
    assert parts == {"backbone", "semantic", "refinement", "physical"} - off.get(switch, set()) | more
    blocks = {name.split(".")[1] for name in mine["model"] if name.startswith("physical.")}
    assert blocks == ({"0"} if switch in ("first_block", "last_block") else {"0", "1"})
    assert bool(differences(mine["model"], reference["model"])) == (switch != "as_is")
    at = {"first_block": [0], "last_block": [1]}.get(switch, [0, 1])
    for i, stands_at in enumerate(at):
        name = "attn1.to_v.weight"
        copied = torch.equal(mine["model"][f"physical.{i}.{name}"],
                             base["ema"][f"blocks.{stands_at}.{name}"])
        assert copied == (switch == "copies")


@pytest.mark.parametrize("fields", [
    dict(optimizer="adamw"), dict(process="vpred", predict="v"), dict(process="vpred", predict="x"),
    dict(predict="v"),
    dict(predict="eps"), dict(schedule="constant"), dict(shift=1.0)], ids=str)
def test_a_switch_of_both_stages_trains(fields, six, go):
    run = go(**SIX, **fields)
    base, reference = checkpoint(run, "base.pt"), checkpoint(six, "base.pt")
    assert base["model"].keys() == reference["model"].keys()
    assert differences(base["model"], reference["model"])
    assert len(base["optimizers"]) == (1 if fields.get("optimizer") == "adamw" else 2)
    for line in lines(run):
        assert all(math.isfinite(value)
                   for value in (line.get("held_out") or {"loss": line.get("loss")}).values())
    backbone = backbone_of(checkpoint(run, "step000006.pt"))
    assert differences(backbone, base["ema"]) == []


@pytest.mark.parametrize("kept", [False, True])
def test_checkpointing_changes_no_bit(kept, six, go):
    run = go(**SIX, checkpointing=True, keep_attention=kept)
    for name in ("base.pt", "step000006.pt"):
        assert differences(checkpoint(run, name), checkpoint(six, name)) == []


def test_blocks_are_wrapped_once_in_either_stage(pools):
    """The branch's blocks are copies of blocks that were wrapped for stage one."""
    state = train.State(settings("", pools, checkpointing=True), 9)
    state.attach_branch()
    for block in (*state.model.backbone.blocks, *state.model.physical):
        inner = block.forward.args[0]
        assert block.forward.func is checkpoint_of_torch and inner.__self__ is block
        assert inner.__func__ is type(block).forward


# --- training trains ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_training_lowers_what_it_is_to_lower(tmp_path, pools):
    cfg = settings(tmp_path / "run", pools, base_steps=60, physics_steps=60, batch_size=8, world_clips=64,
                   val_clips=16,
                   warmup=5, eval_every=61, log_every=50, physics_lr=1e-2)
    train.main(cfg)
    run, pool = Path(cfg.out_dir), data.open_pool(cfg, progress=False)
    tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    fresh, clips = train.State(cfg, len(tokenizer)), data.Clips(cfg, pool, tokenizer)
    untrained = train.held_out_loss(fresh, clips)["diffusion"]
    # begun: after one step
    base, (begun, *_, done) = held_out(run, "base")[-1]["diffusion"], held_out(run, "physics")
    print("LEARN", untrained, base, begun, done)
    assert untrained > 1.5 and base < 0.45 and done["diffusion"] < 0.95 * base
    assert done["fine_align"] < 0.85 * begun["fine_align"] and done["coarse"] < 0.8 * begun["coarse"]


# --- init_from ----------------------------------------------------------------------------------------------
def test_init_from_takes_the_averaged_backbone_and_skips_stage_one(whole, go):
    run = go(init_from=str(whole[0]))
    assert [(line["step"], line["stage"]) for line in steps(run)] == [(i, "physics") for i in range(4)]
    rates = [train.learning_rate(settings("", ""), "physics", i) for i in range(4)]
    assert [line["lr"] for line in steps(run)] == pytest.approx(rates)
    stored, base = checkpoint(run, "step000004.pt"), checkpoint(whole[0], "base.pt")
    backbone = backbone_of(stored)
    assert differences(backbone, base["ema"]) == []
    assert differences(backbone, base["model"])  # the averages, not the last weights
    mine, its = (json_of(folder / "tokenizer.json") for folder in (run, whole[0]))
    assert mine == its


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


def test_init_from_counts_the_words_that_the_vocabulary_lacks(capsys):
    known = data.Tokenizer("a ball falls red rolls left on the".split())

    def check(*captions, length=24):
        data.check_words(known, captions, length, "--init_from runs/a")
        return capsys.readouterr().err
    assert check("a red ball", "A ball, red!") == ""
    assert "never read 1 of 5 words: cube;" in check("a ball falls", "a cube falls on")
    assert check("a red ball falls cube cube cube", length=4) == ""  # cut before the odd words
    said = {"these are too many": ["a cube slides", "smoke on glass"], "become the same": ["a cube falls on the left",
            "a disc falls on the left"], "no word of": ["a ball falls on the left", "smoke"]}
    for why, captions in said.items():
        assert why in sentence(check, *captions)
    check("a ball falls on the left", "")  # an empty caption has no word to lose
    few = check("a ball falls", "a cube falls red on left", "a disc falls red on left")
    assert "1 of 3 captions are not told apart" in few and "become the same" in few  # one odd pair stops nobody


def test_init_from_refuses_captions_of_another_language_and_leaves_no_folder(whole, go, tmp_path, monkeypatch):
    words = data.Tokenizer.load(whole[0] / "tokenizer.json").words
    monkeypatch.setattr(data.Tokenizer, "load", lambda path: data.Tokenizer([f"{word}x" for word in words]))
    said = sentence(go, init_from=str(whole[0]))
    assert f"--init_from {whole[0]} never read" in said and not (tmp_path / "run").exists()


# --- what each stage learns from ----------------------------------------------------------------------------
KINDS = ("true", "weak", "still")
ALL_WEIGHTS = dict(freeze_backbone=False, physical_blocks="")


def world_videos(cfg, physics):
    """The bytes of the world's training clips."""
    return {world.make_clip(cfg.world_seed, i, **world.drawing(cfg, physics=physics)).video.tobytes()
            for i in range(cfg.world_clips)}


def judged(run, stage):
    """The log's lines with held-out losses."""
    return [line for line in lines(run) if "held_out" in line and line["stage"] == stage]


def forgetting(run, stage="physics"):
    """The losses on stage one's held-out clips that they tell."""
    return [line["held_out_base"] for line in judged(run, stage) if "held_out_base" in line]


def small_films(folder, first, **captions):
    """A folder of films, which show other things for every number from `first` on; {name: caption}."""
    folder.mkdir()
    for seed, name in enumerate(captions, first):
        drifting(folder / f"{name}.mp4", seed)
    of_files = {f"{name}.mp4": said for name, said in captions.items()}
    (folder / "captions.json").write_text(json.dumps(of_files))
    return folder


@pytest.fixture
def folders(tmp_path):
    """General videos, and physical ones."""
    general = small_films(tmp_path / "general", 0, a="a street", b="a cat sleeps", c="one street")
    physical = small_films(tmp_path / "physical", 9, a="a ball falls", b="ice melts", c="the ice")
    return dict(base_data_dir=str(general), data_dir=str(physical))


@pytest.mark.parametrize("physics", KINDS)
def test_stage_one_trains_on_its_physics_and_stage_two_on_the_true_one(physics, go, monkeypatch):
    seen = clips_trained_on(monkeypatch)
    cfg = settings("", "", physics=physics)
    run = go(physics=physics)
    true = world_videos(cfg, "true")
    assert seen["physics"] <= true and len(seen["physics"]) > 8  # of 16: the last 16 positions of 40
    assert seen["base"] == world_videos(cfg, physics)
    assert bool(seen["base"] & true) == (physics == "true")
    keys = json_of(run / "config.json")["data"]
    assert keys.keys() == {"base", "physics"} and (keys["base"] == keys["physics"]) == (physics == "true")


@pytest.mark.parametrize("physics", KINDS)
def test_stage_two_logs_what_it_forgets_where_stage_one_had_other_clips(physics, go, pools, monkeypatch):
    run = go(physics=physics)
    assert judged(run, "base") and forgetting(run, "base") == []
    assert len(forgetting(run)) == (0 if physics == "true" else len(judged(run, "physics")))

    # The loss on either stage's held-out clips by the last checkpoint.
    cfg, tokenizer = config.load(run / "config.json"), data.Tokenizer.load(run / "tokenizer.json")
    state = train.State(cfg, len(tokenizer))
    state.load_state_dict(torch.load(run / "checkpoints" / "step000010.pt", weights_only=True))
    base, true = (train.held_out_loss(state, data.Clips(cfg, data.open_pool(cfg, False, stage), tokenizer))
                  for stage in ("base", "physics"))
    assert judged(run, "physics")[-1]["held_out"] == true
    assert forgetting(run)[-1:] == ([] if physics == "true" else [base["diffusion"]])
    assert (base == true) == (physics == "true")


@pytest.mark.parametrize("physics", ["true", "still"])
@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_of_either_physics_resumes_to_the_bit(physics, stop, go):
    complete = go("complete", physics=physics)
    assert same_run(again(go(physics=physics, stop_at=stop)), complete)


def test_own_videos_train_in_two_stages_and_their_words_are_all_known(folders, go, monkeypatch):
    seen = clips_trained_on(monkeypatch)
    fields = dict(folders, val_clips=1, caption_dropout=0.0)
    run = go(**fields)
    cfg = config.load(run / "config.json")
    for stage in ("base", "physics"):
        pool = data.open_pool(cfg, False, stage)
        assert seen[stage] and seen[stage] <= {pool.video[row].tobytes() for row in pool.train}
    assert not seen["base"] & seen["physics"]
    read = {word for stage in ("base", "physics") for pool in [data.open_pool(cfg, False, stage)]
            for row in pool.train for word in pool.captions[row].split()}
    assert set(json_of(run / "tokenizer.json")["words"]) == read
    assert len(forgetting(run)) == len(judged(run, "physics")) > 0
    for stop in (4, 8):
        assert same_run(again(go(f"stopped{stop}", stop_at=stop, **fields)), run)


def test_a_resumed_run_needs_the_videos_of_both_stages_as_they_were(folders, go, tmp_path):
    run = go(stop_at=4, val_clips=1, **folders)
    captions = Path(folders["base_data_dir"]) / "captions.json"
    captions.write_text(captions.read_text().replace("cat", "dog"))
    assert f"The clips of {folders['base_data_dir']} are not those that" in sentence(again, run)
    captions.write_text(captions.read_text().replace("dog", "cat"))
    captions = Path(folders["data_dir"]) / "captions.json"
    captions.write_text(captions.read_text().replace("ball", "cube"))
    assert f"The clips of {folders['data_dir']} are not those that" in sentence(again, run)


def test_one_folder_serves_both_stages_and_is_read_once(folders, go, monkeypatch):
    read, seen = [], clips_trained_on(monkeypatch)
    clips = data.VideoClips.clips
    monkeypatch.setattr(data.VideoClips, "clips",
                        lambda self, progress: read.append(1) or clips(self, progress))
    run = go(data_dir=folders["data_dir"], val_clips=1)
    assert read == [1] and seen["base"] == seen["physics"] and forgetting(run) == []


def test_init_from_takes_a_backbone_whatever_it_was_trained_on(go, tmp_path, monkeypatch):
    """Stage two learns from true physics then too; the clips of stage one are not there."""
    source = go("source", physics="still", physics_steps=0)
    seen = clips_trained_on(monkeypatch)
    run = go(init_from=str(source))
    assert not seen["base"] and seen["physics"] <= world_videos(settings("", ""), "true")
    assert json_of(run / "config.json")["data"].keys() == {"physics"} and forgetting(run) == []
    backbone = backbone_of(checkpoint(run, "step000004.pt"))
    assert differences(backbone, checkpoint(source, "base.pt")["ema"]) == []


def test_a_backbone_alone_goes_on_to_stage_two_by_resume(go):
    """As if the run had had both from the start."""
    complete, alone = go("complete"), go(physics_steps=0)
    assert json_of(alone / "config.json")["data"].keys() == {"base"}
    again(alone, "--physics_steps", TEN["physics_steps"])
    assert same_run(alone, complete)
    assert json_of(alone / "config.json")["data"] == json_of(complete / "config.json")["data"]


# --- all weights trained on: no branch ----------------------------------------------------------------------
@pytest.mark.parametrize("source", ["own", "other"])
def test_all_weights_are_trained_on_without_a_branch(source, whole, go):
    run = go(**ALL_WEIGHTS, **({"init_from": str(whole[0])} if source == "other" else {}))
    base = checkpoint(whole[0], "base.pt")["ema"]  # stage one is the same in either
    last = checkpoint(run, names(run)[-1])
    assert all(name.startswith("backbone.") for name in last["model"])
    assert last["ema"].keys() == last["model"].keys()
    moved = {name for name, p in backbone_of(last).items() if not torch.equal(p, base[name])}
    assert moved == base.keys()
    assert all(line.keys() & TERMS == {"diffusion"} for line in steps(run, "physics"))
    assert all(line["held_out"].keys() == {"diffusion"} for line in judged(run, "physics"))


@pytest.mark.parametrize("stop", [7, 9])
def test_all_weights_trained_on_resume_to_the_bit(stop, go):
    complete, run = go("complete", **ALL_WEIGHTS), go(stop_at=stop, **ALL_WEIGHTS)
    assert same_run(again(run), complete)


def test_all_weights_trained_on_are_what_sample_draws_with(go, tmp_path):
    """Its clips are others than the backbone's of before, by the same prompt and noise."""
    run = go(physics_lr=0.05, **ALL_WEIGHTS)
    drawn = []
    for name in ("last", "base"):
        out = tmp_path / f"{name}.gif"
        sample.main(["--run", str(run), "--checkpoint", name, "--prompt", "a red ball falls", "--n", "1",
                     "--steps", "2", "--out", str(out), "--device", "cpu"])
        drawn.append(iio.imread(out).astype(int))
    assert drawn[0].shape == drawn[1].shape and np.abs(drawn[0] - drawn[1]).max() > 30


# --- refused before any work --------------------------------------------------------------------------------
@pytest.mark.parametrize("fields, says", [
    (dict(init_from="nowhere"), "nowhere is no run folder"), (dict(teacher="nowhere"), "There are no maps in"),
    (dict(teacher="no/where"), "There are no maps in"), (dict(data_dir="nowhere"), "no folder of videos"),
    (dict(data_dir="nowhere", base_data_dir="gone"), "no folder of videos nowhere"),
    (dict(dim=2**15, heads=2**11, depth=8), "GB of memory"), (dict(batch_size=2**14, frames=256, height=128, width=128, physics_steps=0), "GB of memory"),
    (dict(physical_blocks="0", semantic_experts=2**12, dim=2**13, heads=2**9, height=128, width=128), "GB of memory"),
    (dict(world_clips=10**7, height=128, width=128, frames=256), "GB free")])
def test_what_cannot_work_is_refused_before_a_clip_is_drawn_and_leaves_no_folder(fields, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_or_build", lambda *_: pytest.fail("clips were drawn"))
    assert says in sentence(launch, tmp_path / "run", tmp_path / "pools", **fields)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_when_a_run_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    sentence(launch, tmp_path / "run", tmp_path / "pools", data_dir="nowhere")
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


# --- decoration ---------------------------------------------------------------------------------------------
def test_a_preview_that_fails_costs_a_warning_and_comes_after_the_save(whole, go, tmp_path, monkeypatch, capsys):
    saved = []

    def broken(path, *_):
        saved.append((path.stem, (tmp_path / "run" / "checkpoints" / f"{path.stem}.pt").exists()))
        raise ValueError("too many words")
    monkeypatch.setattr(sample, "preview", broken)
    run = go()
    assert saved == [("step000006", True), ("step000010", True)]
    assert capsys.readouterr().err.count("Warning: The preview failed (ValueError: too many words).") == 2
    assert differences(checkpoint(run, "step000010.pt"), checkpoint(whole[0], "step000010.pt")) == []


def test_what_is_to_be_pasted_is_quoted_for_the_shell(tmp_path, capsys):
    state = train.State(settings(tmp_path, ""), 5)
    state.step, state.best = state.total, 1.0
    train.conclude(state, None, Path("my runs/it's"), ['a "red" $ball `it` isn\'t'])
    command = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(command)[2:] == ["--run", "my runs/it's", "--prompt", 'a "red" $ball `it` isn\'t']
    train.conclude(state, None, Path("run"), ["word " * 25_000])
    assert len(capsys.readouterr().out) < 600


# --- losses that are no numbers -----------------------------------------------------------------------------
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
    training_calls(monkeypatch,
                   lambda n, state, batch, t, eps, losses: nan_loss(state, losses) if n == 2 else None)
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
    training_calls(monkeypatch,
                   lambda n, state, batch, t, eps, losses: nan_loss(state, losses) if n % 3 else None)
    run = go(log_every=100)
    skipped = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped if line.get("skipped")] == [1, 2, 4, 5, 7, 8]


@pytest.mark.slow
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path, pools):
    common = ["--config", "debug", "--out_dir", str(tmp_path / "run"), "--pool_dir", str(pools)]
    cases = {("--nonsense", "1"): "--nonsense", ("--data_dir", str(tmp_path / "nowhere")): "nowhere",
             ("--base_steps", "many"): "--base_steps"}
    programs = {flags: subprocess.Popen([sys.executable, "train.py", *common, *flags], **PIPES)
                for flags in cases}
    for flags, program in programs.items():
        out, err = program.communicate(timeout=240)
        assert program.returncode == 2 and err.count("\n") == 1 and err.endswith(".\n"), err
        assert cases[flags] in err and "Traceback" not in err + out


# --- a folder of real videos --------------------------------------------------------------------------------
@pytest.mark.slow
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
    assert sorted(path.name
                  for path in (run / "samples").iterdir()) == [f"step00000{i}.gif" for i in (2, 3, 4)]
    preview = iio.imread(run / "samples" / "step000004.gif")
    assert len(preview) == 4 and preview.shape[1] >= 128 and preview.std() > 1

    out = tmp_path / "clip.gif"
    sample.main(["--run", str(run), "--checkpoint", "last", "--prompt", "a block slides", "--n", "1",
                 "--steps", "2",
                 "--out", str(out), "--device", "cpu"])
    assert len(iio.imread(out)) == 4

    (folder / "captions.json").write_text(json.dumps(captions | {"a.mp4": "a block flies"}))
    with pytest.raises(UserError, match="are not those"):
        again(run)


# --- parts, by hand -----------------------------------------------------------------------------------------
def test_learning_rate_by_hand():
    cfg = config.preset("debug", lr=1.0, physics_lr=0.1, warmup=4, base_steps=10, physics_steps=20)
    rate = train.learning_rate
    assert [rate(cfg, "base", i)
            for i in (0, 1, 3, 4, 5, 9)] == pytest.approx([0.25, 0.5 * 0.9, 0.7, 0.6, 0.5, 0.1])
    assert [rate(cfg, "physics", i)
            for i in (0, 3, 10, 19)] == pytest.approx([0.025, 0.1 * 17 / 20, 0.05, 0.005])
    constant = dataclasses.replace(cfg, schedule="constant")
    assert [rate(constant, "base", i) for i in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert rate(constant, "physics", 19) == 0.1
    assert rate(dataclasses.replace(cfg, warmup=0), "base", 0) == 1.0


def test_muon_steps_as_torchs_own_does():
    """To the bit in bf16, in which torch always computes; in float32 as far as bf16 is exact."""
    torch.manual_seed(0)
    shapes = [(24, 24), (64, 24), (24, 64), (24, 24)]
    start = [torch.randn(shape) for shape in shapes]
    for dtype, least, most in ((torch.bfloat16, 0, 0), (torch.float32, 1e-4, 0.03)):
        ours, theirs = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
        optimizers = [Muon(ours, 0.01, 0.1, dtype),
                      torch.optim.Muon(theirs, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
        for _ in range(3):
            for p, q in zip(ours, theirs):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        for p, q, before in zip(ours, theirs, start):
            assert least <= (p - q).norm() / (q - before).norm() <= most


def test_muon_leaves_out_what_has_no_gradient():
    idle, moved = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    moved.grad = torch.eye(4)
    Muon([idle, moved], 0.1, 0.5).step()
    assert torch.equal(idle, torch.ones(4, 4)) and not torch.equal(moved, idle)


def test_muon_makes_singular_values_equal():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(5, 12, 40)))
    assert 0.5 < values.min() and values.max() < 1.3


def test_muon_has_the_block_matrices_and_nothing_is_twice(physics):
    state = physics[0]
    for frozen, trained in ((True, state.trained), (False, dict(state.model.named_parameters()))):
        muon, adamw = make_optimizers(trained, dataclasses.replace(state.cfg, weight_decay=0.3), 0.5)
        assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
        name_of = {id(p): name for name, p in trained.items()}
        group = lambda g: {name_of[id(p)] for p in g["params"]}
        matrices, (decayed, undecayed) = group(muon.param_groups[0]), map(group, adamw.param_groups)
        everything = [p for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
        assert len(everything) == len({id(p) for p in everything}) == len(trained)
        blocks = {name
                  for name in trained if re.match(r"(physical|backbone\.(text_encoder\.)?blocks)\.\d+\.",
                                                  name)}
        assert matrices == {name for name in blocks if trained[name].ndim == 2 and "norm" not in name}
        assert len(matrices) >= 12
        assert all(re.search(r"\.(to_q|to_k|to_v|to_out|ff\.[02])\.weight$", name) for name in matrices)
        assert {name for name, p in trained.items() if p.ndim == 1} <= undecayed and len(decayed) > 5
        assert {name for name in undecayed if trained[name].ndim > 1} <= {"refinement.bias"}  # see below
        assert [g["weight_decay"] for o in (muon, adamw) for g in o.param_groups] == [0.3, 0.3, 0.0]
        assert frozen == (not any(name.startswith("backbone.") for name in trained))
        assert all(g["lr"] == 0.5 for o in (muon, adamw) for g in o.param_groups)
        assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    rest = make_optimizers(state.trained, dataclasses.replace(state.cfg, optimizer="adamw"), 0.5)
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
    state = physics[0]
    t, eps = state.process.draw(0, range(4), batch.video.shape[1:])
    kept, state.cfg = state.cfg, dataclasses.replace(state.cfg, **fields)
    try:
        return next(losses_in_parts(state, batch, t, eps))[0].get("coarse")
    finally:
        state.cfg = kept


def test_a_dropped_caption_does_not_enter_the_coarse_loss(physics):
    batch = physics[1]
    assert (batch.text_length > 0).all() and (batch.categories.sum(1) > 0).all()
    assert coarse(physics, batch) is not None
    told = torch.tensor([True, False, True, True])
    dropped = dataclasses.replace(batch, text=batch.text * told[:, None],
                                  text_length=batch.text_length * told)
    changed = {i: dataclasses.replace(dropped, categories=batch.categories.clone()) for i in (1, 2)}
    for i, other in changed.items():
        other.categories[i] = 1 - other.categories[i]
    for kind in ("relative", "bce"):
        assert coarse(physics, dropped, coarse_loss=kind) == coarse(physics, changed[1], coarse_loss=kind)
        assert coarse(physics, dropped, coarse_loss=kind) != coarse(physics, changed[2], coarse_loss=kind)
        assert coarse(physics, dropped, coarse_loss=kind) != coarse(physics, batch, coarse_loss=kind)


def test_a_clip_without_label_does_not_enter_the_coarse_loss(physics):
    batch = physics[1]
    unlabelled = dataclasses.replace(batch, categories=batch.categories.clone())
    unlabelled.categories[1] = 0
    reworded = dataclasses.replace(unlabelled, text=batch.text.clone())
    reworded.text[1, 0] = 1 if batch.text[1, 0] != 1 else 2
    assert coarse(physics, unlabelled) == coarse(physics, reworded) != coarse(physics, batch)


@pytest.mark.parametrize("n_told, terms", [(0, set()), (1, {"bce"}), (2, {"bce", "relative"})])
def test_how_many_clips_the_coarse_loss_needs(physics, n_told, terms):
    batch, told = physics[1], torch.arange(4) < n_told
    few = dataclasses.replace(batch, text=batch.text * told[:, None], text_length=batch.text_length * told)
    assert {kind
            for kind in ("relative", "bce") if coarse(physics, few, coarse_loss=kind) is not None} == terms


def test_held_out_loss_is_the_mean_over_clips_whatever_the_batches(physics, pools):
    state = physics[0]
    cfg = dataclasses.replace(state.cfg, semantic=True)
    pool = data.open_pool(cfg, progress=False)
    clips, kept = data.Clips(cfg, pool, data.Tokenizer.from_captions(pool.captions)), state.cfg
    found = []
    try:
        for size in (4, 3, 1):
            state.cfg = dataclasses.replace(cfg, batch_size=size)
            found.append(train.held_out_loss(state, clips)["diffusion"])
    finally:
        state.cfg = kept
    assert found == pytest.approx([found[0]] * 3, rel=1e-5) and state.model.training
