"""Run folders: a run cut in two against the whole one to the bit; logs, checkpoints, full disks;
what resuming refuses."""
import dataclasses
import errno
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import common.checkpoints
import common.run
import config
import data
import sample
import train
from config import Stopped, UserError
from helpers import ROOT, flip, json_of, rewrite, sentence
from runs import (
    TERMS, again, checkpoint, contents, differences, held_out, Interrupted, launch, lines, names, recorded,
    same_run, settings, steps, training_calls)

pytestmark = pytest.mark.usefixtures("no_previews")


# --- a run cut in two is the run ----------------------------------------------------------------------------
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
    """Guards the tests above:
    states differ from step to step and hold momenta; other seeds are fed otherwise."""
    run, fed = whole
    early, late = checkpoint(go(stop_at=8), "step000008.pt"), checkpoint(run, "step000010.pt")
    changed = differences(early, late)
    moments = {entry.split("/")[-1] for entry in changed if "/optimizers/" in entry}
    assert {"exp_avg", "exp_avg_sq", "momentum_buffer", "step"} <= moments
    assert any(entry.startswith("/ema/") for entry in changed)
    assert any(entry.startswith("/model/") for entry in changed)
    assert len({str(batch) for batch in fed}) == 10
    assert [batch[0] for batch in fed] == ["base"] * 6 + ["physics"] * 4
    assert [batch[1][0] for batch in fed] == list(range(0, 40, 4))
    other = go("seed", seed=1, stop_at=1)
    assert differences(checkpoint(other, "step000001.pt"),
                       checkpoint(go("first", stop_at=1), "step000001.pt"))


@pytest.mark.kill
@pytest.mark.slow
def test_signals_save_and_end_with_0(go, tmp_path, pools):
    """SIGINT in stage one and SIGTERM in stage two, sent to the program itself."""
    long = dict(base_steps=40, physics_steps=40)
    cfg = settings(tmp_path / "cut", pools, **long)
    given = [text
             for field, value in dataclasses.asdict(cfg).items() if value != getattr(config.Config(), field)
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
        assert names(run)[-1] == f"step{step:06d}.pt" and stored["step"] == step < 80
        assert stored["stage"] == stage
    again(run)
    whole = go("whole", **long)
    assert differences(checkpoint(run, "step000080.pt"), checkpoint(whole, "step000080.pt")) == []
    assert lines(run) == lines(whole)


# --- the log and config.json --------------------------------------------------------------------------------
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


def test_what_a_killed_save_left_is_cleared_away(go):
    run = go(stop_at=3)
    left = run / "checkpoints" / "step000006.pt.123.part"
    left.write_bytes(b"half a checkpoint")
    assert names(again(run)) == ["base.pt", "best.pt", "step000006.pt", "step000010.pt"] and not left.exists()


def test_log_says_what_design_promises(whole):
    for line in steps(whole[0]):
        terms = {"diffusion"} if line["stage"] == "base" else TERMS
        always = {"step", "stage", "loss", "grad_norm", "lr", "by_noise", "skipped"}
        assert line.keys() - {"experts"} == always | terms and ("experts" in line) == ("balance" in line)
        assert sum(line.get("experts", [1])) == pytest.approx(1, abs=1e-3)
        assert not line["skipped"]
        weights = dict(diffusion=1, coarse=0.1, semantic_balance=0, fine_align=0.02, balance=0.01)
        assert line["loss"] == pytest.approx(sum(weights[term] * line[term] for term in terms), abs=2e-6)
        assert len(line["by_noise"]) == common.run.BINS
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
        worlds = stored["data"]  # true physics in stage two, and weak physics before
        assert all(key.startswith("world-") for key in worlds.values()) and stored["world_size"] == 1
        assert worlds.keys() == {"base", "physics"} and worlds["base"] != worlds["physics"]
        assert stored["python"] == platform.python_version()
        assert stored["transformers"] == common.run.version_of("transformers")
    assert common.run.version_of("no such package") == ""


# --- saves --------------------------------------------------------------------------------------------------
def full_after_some_bytes(state, f):
    f.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def wrapped(state, f):  # as torch reports a failing file
    f.write(b"half a checkpoint")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def full(file, fsync=os.fsync):
    """There is room for config.json and its like, but not for a checkpoint."""
    if os.fstat(file).st_size > 100_000:
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(file)


@pytest.mark.parametrize("owner, name, fails", [
    (torch, "save", full_after_some_bytes), (torch, "save", wrapped), (os, "fsync", full)],
    ids=["write", "torch", "fsync"])
def test_a_full_disk_leaves_the_checkpoints_before(owner, name, fails, whole, go, monkeypatch, capsys):
    """The run goes on without the saves that fail, and says so of each; the end of a stage must be saved."""
    run = go(save_every=2, stop_at=3)
    before = contents(run / "checkpoints")
    assert "best.pt" in before
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        patch.setattr(owner, name, fails)
        again(run)
    failed = r"The checkpoint \S*/{} could not be written \(.*\); the previous one is intact\."
    warned = capsys.readouterr().err
    for victim in ("step000004", "best"):
        assert re.search(failed.format(rf"{victim}\.pt") + " The run goes on and tries again at its next save", warned)
    assert re.fullmatch(failed.format(r"base\.pt"), str(caught.value))
    assert contents(run / "checkpoints") == before  # and no .tmp
    again(run)
    assert differences(checkpoint(run, "step000010.pt"), checkpoint(whole[0], "step000010.pt")) == []


def test_a_disk_that_has_room_again_costs_nothing(whole, go, monkeypatch):
    """One save fails, and so does one of the best weights; the run ends as if nothing had happened."""
    real, failing = torch.save, {"step000002.pt", "best.pt"}

    def save(contents, file):
        name = Path(file.name).name.split(".pt")[0] + ".pt"
        if name in failing:
            failing.discard(name)
            full_after_some_bytes(contents, file)
        real(contents, file)
    monkeypatch.setattr(torch, "save", save)
    assert same_run(go(save_every=2), whole[0]) and failing == set()


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


def weight_of(path):
    """Where in a checkpoint the numbers of its largest weight stand."""
    largest = max(zipfile.ZipFile(path).infolist(), key=lambda part: part.file_size)
    return largest.header_offset + largest.file_size // 2


def test_a_flipped_bit_in_a_checkpoint_is_noticed_and_the_one_before_is_taken(whole, go, capsys):
    run = go(save_every=2, stop_at=5)
    newest = run / "checkpoints" / "step000005.pt"
    flip(newest, weight_of(newest))
    torch.load(newest, weights_only=True)  # torch does not notice
    capsys.readouterr()
    again(run, "--stop_at", 0)
    assert "step000005.pt is damaged (BadZipFile); trying the one before" in capsys.readouterr().err
    assert differences(checkpoint(run, "step000010.pt"), checkpoint(whole[0], "step000010.pt")) == []


def test_a_part_of_a_checkpoint_that_calls_itself_a_folder_is_noticed(go):
    """A bit of the archive's list, which no checksum covers: torch then leaves its memory as it is."""
    path = go(stop_at=3) / "checkpoints" / "step000003.pt"
    entry = path.read_bytes().rindex(b"PK\x01\x02")
    flip(path, entry + 38, bit=4)  # MS-DOS's mark of a folder
    with pytest.raises(zipfile.BadZipFile):
        common.checkpoints.read_checkpoint(path)


def test_a_flipped_bit_in_best_or_base_is_one_sentence(whole, tmp_path, pools):
    run = shutil.copytree(whole[0], tmp_path / "copy")
    for name in ("best.pt", "base.pt"):
        flip(run / "checkpoints" / name, weight_of(run / "checkpoints" / name))
    assert "best.pt is damaged" in sentence(sample.load_run, run)
    assert "base.pt cannot be read" in sentence(launch, tmp_path / "new", pools, init_from=str(run))


def test_a_damaged_line_of_the_log_is_left_out_and_said(whole, go, capsys):
    run = go(stop_at=3)
    log = run / "log.jsonl"
    flip(log, log.read_bytes().index(b'"loss": ') + 11, bit=0)  # another digit of a loss
    flip(log, log.read_bytes().index(b"\n") + 5, bit=7)  # no UTF-8 any more
    again(run)
    assert f"2 damaged lines of {log} are left out." in capsys.readouterr().err
    assert len(lines(run)) == len(lines(whole[0])) - 2


def test_a_log_of_before_has_no_digests_and_is_kept(whole, go):
    run = go(stop_at=3)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    old = [{name: value for name, value in entry.items() if name != "digest"} for entry in entries]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in old))
    again(run)
    assert lines(run) == lines(whole[0])


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


# --- refusals -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(tmp_path_factory, pools):
    """A run stopped at step 3 of 6 + 4. Not to be written into."""
    return launch(tmp_path_factory.mktemp("stopped") / "run", pools, stop_at=3)


@pytest.fixture
def half(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "half")


@pytest.mark.parametrize("field, value", [
    ("lr", 0.5), ("seed", 3), ("dim", 64), ("semantic", "false"), ("physical_blocks", "0"), ("batch_size", 8),
    ("process", "vpred"), ("world_seed", 2), ("threads", 2), ("data_dir", "x"), ("val_clips", 5),
    ("precision", "bf16"),
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
    again(moved, "--physics_steps", 6, "--log_every", 3, "--eval_every", 4, "--save_every", 5,
          "--preview_steps", 2,
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
    with pytest.raises(UserError,
                       match="already holds a run: go on with --resume, or give another --out_dir"):
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


def test_words_in_another_order_are_noticed(half, tmp_path, pools):
    """The list of another run: as long, whole in itself, and other ids for all words."""
    words = json_of(half / "tokenizer.json")["words"]
    data.Tokenizer(words[1:] + words[:1]).save(half / "tokenizer.json")
    said = "tokenizer.json is not the tokenizer that .* was trained with"
    with pytest.raises(UserError, match=said):
        again(half)
    with pytest.raises(UserError, match=said):
        sample.load_run(half)
    shutil.copy(half / "checkpoints" / "step000003.pt", half / "checkpoints" / "base.pt")
    with pytest.raises(UserError, match=said):
        launch(tmp_path / "new", pools, init_from=str(half))


def test_words_that_changed_within_the_file_are_noticed(half, tmp_path):
    lone = shutil.copy(half / "tokenizer.json", tmp_path / "tokenizer.json")  # without a config.json
    words = json_of(lone)["words"]
    lone.write_text(json.dumps(json_of(lone) | {"words": words[::-1]}))
    assert "is damaged: its words are not those" in sentence(data.Tokenizer.load, lone)


def test_a_setting_that_changed_in_config_json_is_noticed(half):
    """A resumed run would take the new value for the one it was started with."""
    path = half / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="config.json is not as it was written"):
        again(half)
    with pytest.raises(UserError, match="config.json is not as it was written"):
        sample.load_run(half)


def test_a_run_of_before_without_digests_goes_on(half, whole):
    rewrite(half / "config.json", tokenizer=None)
    rewrite(half / "tokenizer.json")
    again(half)
    assert same_run(half, whole[0]) and "digest" in json_of(half / "tokenizer.json")
    stored = json_of(half / "config.json")
    assert stored["tokenizer"] == data.Tokenizer.load(half / "tokenizer.json").key


# --- two writers
def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on(whole, go, tmp_path, monkeypatch):
    """Also before the first save, when the folder looks as if it held no run."""
    refused = []

    def second(n, *_):
        if n in (2, 7):
            start = functools.partial(go, seed=1) if n == 2 else functools.partial(again, tmp_path / "run")
            before = contents(tmp_path / "run")
            with pytest.raises(UserError, match="Another process trains in .*/run: wait until it ends"):
                start()
            refused.append(contents(tmp_path / "run") == before)
    with monkeypatch.context() as patch:
        training_calls(patch, second)
        run = go()
    assert refused == [True, True] and same_run(run, whole[0])


def test_a_second_training_is_refused_where_the_first_ended_meanwhile(go, monkeypatch):
    """Between its look at the folder and its lock."""
    real, looks = common.run.open_run, []

    def looked(cfg):
        run = real(cfg)
        looks.append(cfg.seed)
        if looks == [1]:
            go(stop_at=1)
        return run
    monkeypatch.setattr(common.run, "open_run", looked)
    with pytest.raises(UserError, match="already holds a run"):
        go(seed=1)
    assert looks[0] == 1


def test_resume_refuses_other_clips(half, monkeypatch):
    # as another world.py would, these clips get another key
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    with pytest.raises(UserError, match="The clips of the world are not those") as caught:
        again(half)
    revision = json_of(half / "config.json")["git"] or "that started the run"
    said = str(caught.value)
    assert f"go on with the code of revision {revision}, or start anew in another --out_dir." in said
    (half / "checkpoints" / "base.pt").write_bytes(b"")  # stage one was finished
    with pytest.raises(UserError, match=f"or train stage two anew by --init_from {half} and another"):
        again(half)


def test_data_that_is_not_the_worlds_is_to_be_put_back(half):
    """Clips and maps have a key each, with a plus between them."""
    def refused(key, **fields):
        with pytest.raises(UserError, match="put them back as they were, or start anew") as caught:
            common.run.check_data(config.preset("debug", **fields), half, {"base": key})
        return str(caught.value)
    key = json_of(half / "config.json")["data"]["base"]
    common.run.check_data(config.preset("debug"), half, {"base": key})
    assert refused("folder-1", data_dir="films").startswith("The clips of films are not those")
    assert refused(f"{key}+1", teacher="sal").startswith("The maps of --teacher are not those")
    rewrite(half / "config.json", data=f"{key}+2")  # as an older run has it: of both stages
    common.run.check_data(config.preset("debug"), half, {"base": key})  # before maps are opened
    common.run.check_data(config.preset("debug"), half, {"base": f"{key}+2"})
    refused(f"{key}+1", teacher="sal")


PIPES = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
