"""The ablation: rows as data, equal parameters and time, what is kept and what is made again,
and the verdicts."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import ablate
import config
import evaluate
from common import ablation
from config import Stopped, UserError
from experts import ProPhy, invert
from model import build_backbone

SMALL = config.preset("small")
TRAINED = [name for name, row in ablate.ROWS.items() if row.flags is not None]
SAME = {"default", "exact", "few_default"}  # all parts, by other names


def parsed(name, **more):
    return config.parse(ablate.words(ablate.fields_of(name, 7) | {"init_from": "runs/x"} | more), "")


@pytest.mark.parametrize("name", TRAINED)
def test_each_rows_flags_parse_and_change_something_against_its_reference(name):
    first = ablate.reference_of(name)
    assert (parsed(name) == parsed(first)) == (name in SAME)


def test_unknown_rows_are_refused_in_a_sentence_that_lists_them():
    with pytest.raises(UserError, match="no 'nothing'.*paper, few, teachers.*default, backbone.*no_teacher"):
        ablate.chosen("lora,nothing")


def test_a_group_or_a_name_brings_the_row_that_it_is_compared_with():
    assert ablate.chosen("lora") == ["default", "lora"]
    assert ablate.chosen("few,shuffled") == [*ablate.GROUPS["few"], "exact", "shuffled"]
    assert ablate.chosen("") == list(ablate.ROWS)


def parameters(cfg):
    return sum(p.numel() for p in ProPhy(build_backbone(cfg, 1), cfg).branch_state().values())


def test_no_other_rank_of_lora_has_parameters_nearer_to_the_branch():
    cfg = config.preset("debug")
    rank = ablate.equal_rank(cfg)
    away = {r: abs(parameters(dataclasses.replace(cfg, physical_blocks="", lora_rank=r)) - parameters(cfg))
            for r in (rank - 1, rank, rank + 1)}
    assert min(away, key=away.get) == rank


@pytest.mark.parametrize("ratio, steps", [(1.0, 1200), (0.5, 2400), (1.5, 800), (1.501, 799), (1000, 1)])
def test_equal_time_is_as_many_whole_steps_as_fit(ratio, steps):
    assert ablate.steps_in_time(1200, ratio) == steps


def test_only_rows_of_another_cost_are_trained_again_for_equal_time():
    fields = {name: ablate.fields_of(name, 7) for name in ("default", "lora", "no_balance")}
    jobs = ablate.jobs_of(fields, {"default": 1.0, "lora": 0.5, "no_balance": 1.0}, SMALL, 1, Path("o"))[1]
    assert {job.name: job.steps for job in jobs} == {
        "default-0": 1200, "lora-0": 1200, "lora-0-time": 2400, "no_balance-0": 1200}


# ------------------------------------------------------------------------------------------------ the table
def scores(error, **more):
    return {"errors": [["collision", 1, error, True], ["melting", 1, error + .1, True], ["melting", 2, .5, False]],
            "dynamic": [1., 1., 1.], "held_out": [.04, .05], "held_out_weak": [.06, .07],
            "which_where": {}, **more}


def seeds(*errors):
    return [ablation.by_clip(scores(error)) for error in errors]


def test_pairing_cancels_what_clips_and_seeds_have_in_common():
    mean, half = ablation.compared(seeds(.2, .5, .8), seeds(.1, .4, .7))["law error"]
    assert mean == pytest.approx(.1) and half == pytest.approx(0, abs=1e-9)


def test_single_and_paired_phenomena_are_kept_apart():
    values = ablation.compared(seeds(.2, .2), None)
    assert values["law error"][0] == pytest.approx(.25) and values["two phenomena"][0] == .5
    assert values["found"][0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("difference, words", [
    ([.2, .1], "same direction"), ([-.2, .1], "opposite"), ([.1, .1], "cannot be told apart")])
def test_a_worse_law_error_points_as_a_lower_score_of_the_paper(difference, words):
    assert ablate.verdict("lora", difference) == f"58.2 (-6.8): {words}"


def test_rows_that_the_paper_has_not_get_no_verdict():
    assert ablate.verdict("physical", [.2, .1]) == "" and ablate.verdict("default", [0., 0.]) == "65.0"


MADE = {"date": "2026-01-02", "revision": "abc", "machine": "x86_64 avx2", "torch": "2.11"}


def section(runs, ratios):
    """A section of a table's JSON with these {run: law error of its clips}."""
    return {"asked": {"n": 1}, "seeds": 2, "ratios": ratios, "runs": {
        run: {"steps": 9, "trained": 1_250_000, "made": MADE, "values": ablation.by_clip(scores(error))}
        for run, error in runs.items()}}


ALL = {"base-0": .9, "base-1": .8, "default-0": .2, "default-1": .3, "lora-0": .3, "lora-1": .4,
       "lora-0-time": .2, "lora-1-time": .1}


def test_rows_are_compared_with_the_first_of_their_group_run_by_run():
    lines = ablate.lines_of(section(ALL, {"default": 1., "lora": 2.}))
    assert {kind: list(rows) for kind, rows in lines.items()} == {
        "equal steps": ["default", "backbone", "lora"], "equal time": ["default", "lora"]}
    by = {kind: rows["lora"]["differences"]["law error"] for kind, rows in lines.items()}
    assert by["equal steps"] == pytest.approx([.1, 0], abs=1e-6)
    assert by["equal time"][0] == pytest.approx(-.1)
    assert lines["equal steps"]["lora"]["paper"] == "58.2 (-6.8): same direction"


def test_a_row_is_told_of_when_all_its_seeds_are_there_and_those_of_its_reference():
    some = {run: error for run, error in ALL.items() if run != "lora-1"}
    assert "lora" not in ablate.lines_of(section(some, {"default": 1., "lora": 2.}))["equal steps"]
    some = {run: error for run, error in ALL.items() if run != "default-1"}
    assert ablate.lines_of(section(some, {"default": 1., "lora": 2.})) == {"equal steps": {}, "equal time": {}}


def test_cells_hold_mean_and_interval_and_laws_have_a_table_of_their_own(tmp_path):
    one = section(ALL, {"default": 1.})
    ablation.write_table(tmp_path / "a.md", {"small": one}, {"small": ablate.lines_of(one)})
    text = (tmp_path / "a.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in text.splitlines() if line.startswith("| backbone alone")]
    assert rows[0][:6] == ["backbone alone", "1.25", "", "9", "0.900 ± 0.899", "0.500 ± 0.000"]
    assert rows[1] == ["backbone alone", "0.850 ± 0.635", "0.950 ± 0.635"]
    assert "* n: 1" in text and "* revision: abc" in text


def test_the_json_keeps_every_clip_and_a_damaged_one_is_refused(tmp_path):
    one = section(ALL, {"default": 1.})
    ablation.write_table(tmp_path / "a.md", {"small": one, "small-wan": one}, {"small": {}, "small-wan": {}})
    assert ablation.read_table(tmp_path / "a.md") == {"small": one, "small-wan": one}
    assert ablation.read_table(tmp_path / "b.md") == {}
    data = tmp_path / "a.json"
    data.write_text(data.read_text().replace("0.06", "0.01"))
    with pytest.raises(UserError, match="a.json is damaged"):
        ablation.read_table(tmp_path / "a.md")


# -------------------------------------------------------------------------------------- kept, or made again
def test_a_run_has_another_key_only_where_what_it_learns_changes(monkeypatch):
    job = ablate.Job("row-0", "lora", {"lora_rank": 3, "init_from": "here", "seed": 1}, 4)
    shared = {"config": "small", "threads": 1, "pool_dir": "a"}
    key = ablate.key_of(job, shared)
    elsewhere = dataclasses.replace(job, fields=job.fields | {"init_from": "there"})
    assert ablate.key_of(elsewhere, shared | {"threads": 2, "pool_dir": "b"}) == key
    for other in (dataclasses.replace(job, steps=5), dataclasses.replace(job, fields=job.fields | {"lora_rank": 4})):
        assert ablate.key_of(other, shared) != key
    monkeypatch.setitem(config.PRESETS, "small", config.PRESETS["small"] | {"negatives": .9})
    assert ablate.key_of(job, shared) != key


@pytest.mark.parametrize("row, inverted", [("default", True), ("lora", False)])
def test_a_scored_run_is_kept_clip_by_clip_and_inverted_where_others_are_compared_with_it(
        whole, monkeypatch, row, inverted):
    calls = []
    monkeypatch.setattr(evaluate, "measure", lambda loaded, flags: calls.append(flags.edit) or scores(.1))
    made = ablate.score_run(Path(whole[0]), ablate.Job("x", row, {}, 7), {"n": 1})
    assert calls == [None, invert][:1 + inverted]
    assert ("inversion" in made["values"]) == inverted
    assert made["steps"] == 7 and made["trained"] > 0 and made["values"]["law error"] == [.1, .2]


def test_a_finished_run_is_kept_a_half_one_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    job = ablate.Job("row", "default", {"seed": 3}, 4)
    ablate.train_run(tmp_path, job, {"threads": 1})
    folder = tmp_path / "row/checkpoints"
    folder.mkdir(parents=True)
    (folder / "step000002.pt").touch()
    ablate.train_run(tmp_path, job, {"threads": 1})
    assert ["--resume" in flags for flags in calls] == [False, True]
    assert ["--threads" in flags for flags in calls] == [True, False]

    (folder / "step000004.pt").touch()
    stored = vars(config.preset("debug", seed=3))
    (tmp_path / "row/config.json").write_text(json.dumps(stored))
    ablate.train_run(tmp_path, job, {"threads": 1})
    assert len(calls) == 2
    (tmp_path / "row/config.json").write_text(json.dumps(stored | {"seed": 4}))
    with pytest.raises(UserError, match="was trained with another --seed"):
        ablate.train_run(tmp_path, job, {"threads": 1})


def test_what_stage_one_alone_reads_is_not_given_to_a_row(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    shared = {"base_steps": 5, "lr": .1, "physics_lr": .2}
    for name, fields in (("base", {"physics_steps": 0}), ("row", {"init_from": "base"})):
        ablate.train_run(tmp_path, ablate.Job(name, "default", fields, 5), shared)
        config.parse(list(calls[-1]), "")  # which refuses an idle flag
    for name in ("--lr", "--base_steps"):
        assert [name in flags for flags in calls] == [True, False]


def test_a_row_that_fails_is_named_and_the_others_go_on(capsys):
    done = []

    def work(job):
        if job.name == "bad":
            raise Stopped("no room.")
        done.append(job.name)
    jobs = [ablate.Job(name, "default", {}, 1) for name in ("bad", "good")]
    assert ablate.do_all(jobs, work, 1, 1) == {"bad": "no room."} and done == ["good"]
    assert "bad failed: no room." in capsys.readouterr().err


def test_two_rows_of_debug_are_trained_scored_and_kept(tmp_path, pools, monkeypatch):
    """End to end. Started again without the runs' folder, nothing is trained and the table is the
    same; one row that has changed is made again, with the base that it needs."""
    table = tmp_path / "t.md"
    command = ["--config", "debug", "--rows", "all_weights", "--seeds", "1",
               "--out_dir", str(tmp_path / "out"), "--table", str(table),
               "--frames", "8", "--height", "32", "--width", "32", "--base_steps", "2",
               "--physics_steps", "2",
               "--world_clips", "16", "--val_clips", "4", "--preview_steps", "1", "--pool_dir", str(pools),
               "--n", "1", "--pairs", "1", "--clips", "4", "--rounds", "1", "--threads", "1"]
    ablate.main(*config.parse_with(ablate.Flags, command, ""))
    first = ablation.read_table(table)["debug"]
    assert {"default-0", "all_weights-0"} <= set(first["runs"])
    text = table.read_text()
    assert text.count("| all weights trained on") == 4 and text.count("| backbone alone") == 2

    shutil.rmtree(tmp_path / "out")
    ablate.main(*config.parse_with(ablate.Flags, command, ""))
    assert ablation.read_table(table)["debug"] == first and table.read_text() == text
    assert not list((tmp_path / "out").iterdir())

    row = dataclasses.replace(ablate.ROWS["all_weights"], flags=ablate.ALL_WEIGHTS | {"world_clips": 12})
    monkeypatch.setitem(ablate.ROWS, "all_weights", row)
    ablate.main(*config.parse_with(ablate.Flags, command, ""))
    again = ablation.read_table(table)["debug"]["runs"]
    assert [run for run in again if again[run] != first["runs"][run]] == [
        run for run in again if run.startswith("all_weights")]
    with pytest.raises(UserError, match="another --base_steps"):
        ablate.main(*config.parse_with(ablate.Flags, [*command, "--base_steps", "3"], ""))
