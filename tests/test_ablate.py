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
from experts import ProPhy
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
    return {"errors": [["thrown", 1, error, True], ["bounce", 1, error + .1, True], ["smoke", 2, .5, False]],
            "dynamic": [1., 1., 1.], "held_out": [.04, .05], "held_out_weak": [.06, .07],
            "which_where": {}, **more}


def seeds(*errors):
    return {seed: ablation.by_clip(scores(error)) for seed, error in enumerate(errors)}


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


def line(name, **more):
    return {"row": name, "steps": 9, "ratio": .5, "trained": 1_250_000, "paper": "",
            "values": {"law error": [.25, .0123], "held-out loss": [.04125, .0001], "law: smoke": [.5, .1]},
            "differences": dict.fromkeys(ablation.DIFFERENCES, [.1, .01])} | more


def test_cells_hold_mean_and_interval_and_laws_have_a_table_of_their_own(tmp_path):
    ablation.write_table(tmp_path / "a.md", {"config": "small"}, {"equal steps": {"x": line("the row")}})
    rows = [[cell.strip() for cell in text.split("|")[1:-1]]
            for text in (tmp_path / "a.md").read_text().splitlines() if text.startswith("| the row")]
    assert rows == [["the row", "1.25", "0.50", "9", "0.250 ± 0.012", "0.0413 ± 0.0001", "0.100 ± 0.010",
                     "0.100 ± 0.010", "0.1000 ± 0.0100", ""], ["the row", "0.500 ± 0.100"]]


def test_another_configs_section_stays(tmp_path):
    path = tmp_path / "a.md"
    for name, row in (("small", "old"), ("small-wan", "other"), ("small", "new")):
        ablation.write_table(path, {"config": name}, {"equal steps": {"x": line(row)}})
    assert "| other" in path.read_text() and "| new" in path.read_text() and "| old" not in path.read_text()


# -------------------------------------------------------------------------------------- kept, or made again
@pytest.fixture
def measured(whole, monkeypatch, tmp_path):
    """A finished run, and the list of the times that it was measured."""
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    calls = []
    monkeypatch.setattr(evaluate, "measure", lambda loaded, flags: calls.append(flags) or scores(.1))
    return run, calls


def test_scores_are_made_once_and_again_with_other_settings(measured):
    run, calls = measured
    first = ablate.score_run(run, {"n": 1})
    assert ablate.score_run(run, {"n": 1}) == first and len(calls) == 1
    assert ablate.score_run(run, {"n": 2})["measured"]["n"] == 2 and len(calls) == 2


def test_damaged_scores_are_made_again(measured):
    run, calls = measured
    first = ablate.score_run(run, {"n": 1})
    (run / "scores.json").write_text((run / "scores.json").read_text().replace("0.06", "0.01"))
    assert ablate.score_run(run, {"n": 1}) == first and len(calls) == 2


def test_a_finished_run_is_kept_a_half_one_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    job = ablate.Job("row", {"seed": 3}, 4)
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
        ablate.train_run(tmp_path, ablate.Job(name, fields, 5), shared)
        config.parse(list(calls[-1]), "")  # which refuses an idle flag
    for name in ("--lr", "--base_steps"):
        assert [name in flags for flags in calls] == [True, False]


def test_a_row_that_fails_is_named_and_the_others_go_on(capsys):
    def work(job):
        if job.name == "bad":
            raise Stopped("no room.")
        return {"of": job.name}
    jobs = [ablate.Job(name, {}, 1) for name in ("bad", "good")]
    assert ablate.do_all(jobs, work, 1, 1) == ({"good": {"of": "good"}}, {"bad": "no room."})
    assert "bad failed: no room." in capsys.readouterr().err


def test_two_rows_of_debug_are_trained_scored_and_kept(tmp_path, pools, capsys):
    """End to end; started again, nothing is trained and the table is the same."""
    table = tmp_path / "t.md"
    command = ["--config", "debug", "--rows", "all_weights", "--seeds", "1",
               "--out_dir", str(tmp_path / "out"), "--table", str(table),
               "--frames", "8", "--height", "32", "--width", "32", "--base_steps", "2",
               "--physics_steps", "2",
               "--world_clips", "16", "--val_clips", "4", "--preview_steps", "1", "--pool_dir", str(pools),
               "--n", "1", "--pairs", "1", "--clips", "4", "--rounds", "1", "--threads", "1"]
    ablate.main(*config.parse_with(ablate.Flags, command, ""))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    first = json.loads(table.with_suffix(".json").read_text())["debug"]["lines"]
    assert list(first["equal steps"]) == list(first["equal time"]) == ["default", "all_weights"]
    ours = first["equal steps"]["all_weights"]
    assert ours["differences"]["held-out loss"][0] == pytest.approx(
        ours["values"]["held-out loss"][0] - first["equal steps"]["default"]["values"]["held-out loss"][0])
    ablate.main(*config.parse_with(ablate.Flags, command, ""))
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert json.loads(table.with_suffix(".json").read_text())["debug"]["lines"] == first
    with pytest.raises(UserError, match="another --base_steps"):
        ablate.main(*config.parse_with(ablate.Flags, [*command, "--base_steps", "3"], ""))
