"""The ablation: rows as data, equal parameters and time, what is kept and what is made again,
and the verdicts."""
import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

import ablate
import config
import evaluate
import sample
from common import ablation
from config import Config, Stopped, UserError
from experts import ProPhy, invert
from model import build_backbone

SMALL = config.preset("small")
SHARED = {"config": "small", "base_steps": 1000, "device": "cpu", "precision": "fp32", "compile": "off"}
TRAINED = [name for name, row in ablate.ROWS.items() if row.flags is not None]
SAME = {"default", "inverted", "exact", "few_default"}  # all parts, by other names


def parsed(name, **more):
    return config.parse(ablate.words(ablate.fields_of(name, 7) | {"init_from": "runs/x"} | more), "")


@pytest.mark.parametrize("name", TRAINED)
def test_each_rows_flags_parse_and_change_something_against_its_reference(name):
    first = ablate.reference_of(name)
    assert (parsed(name) == parsed(first)) == (name in SAME)


def test_unknown_rows_are_refused_in_a_sentence_that_lists_them():
    with pytest.raises(UserError, match="no 'nothing'.*paper, few, teachers.*default, inverted, backbone.*no_teacher"):
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


def test_rows_are_timed_apart_where_a_step_is_another_and_small_differences_are_none(monkeypatch):
    asked = {}

    def in_turns(functions, rounds):
        asked.update(functions)
        return {name: {"all parts": 1., "lora": 2., "semantic": .9}.get(name, 1.02) for name in functions}

    monkeypatch.setattr(ablate.bench, "in_turns", in_turns)
    monkeypatch.setattr(ablate.bench, "training_step", lambda cfg, stage: (cfg, stage))
    names = ("default", "lora", "no_balance", "semantic", "semantic_alone")
    rows = {name: dataclasses.replace(SMALL, **ablate.fields_of(name, 7)) for name in names}
    ratios = ablate.measure_ratios(SMALL, rows, 1)
    assert asked == {name: rows.get(name, SMALL) for name in ("all parts", "lora", "semantic", "semantic_alone")}
    assert ratios == {"default": 1, "lora": 2, "no_balance": 1, "semantic": .9, "semantic_alone": 1}


def section(runs=(), ratios=None, **more):
    """A section of a table's JSON with these {run: law error of its clips}, all as they would be made today."""
    one = {"asked": {"n": 1}, "shared": SHARED, "known": sorted(vars(SMALL)), "runs": {},
           "ratios": ratios or {"default": 1., "inverted": 1., "lora": 2.}}
    jobs = ablate.jobs_of(list(ablate.ROWS), range(3), one, SMALL)
    keys = {job.name: job.key for some in jobs.values() for job in some.values()}
    one["runs"] = {run: {"key": keys[run], "steps": 9, "trained": 1_250_000, "values": ablation.by_clip(scores(error)),
                         **MADE} for run, error in dict(runs).items()}
    return one | more


def test_only_rows_of_another_cost_are_trained_again_for_equal_time():
    jobs = ablate.jobs_of(["default", "lora", "inverted"], range(1), section(), SMALL)
    assert {place: (some[0].name, some[0].steps) for place, some in jobs.items()} == {
        ("default", "steps"): ("default-0", 1200), ("default", "time"): ("default-0", 1200),
        ("lora", "steps"): ("lora-0", 1200), ("lora", "time"): ("lora-0-time", 600),
        ("inverted", "steps"): ("inverted-0", 1200), ("inverted", "time"): ("inverted-0", 1200)}
    folders = {place: some[0].folder for place, some in jobs.items()}
    assert folders["inverted", "steps"] == folders["default", "steps"]  # the same run, looked at otherwise
    assert len({*folders.values()}) == 3
    assert all(some[0].base.folder == jobs["default", "steps"][0].base.folder for some in jobs.values())


def test_a_row_whose_time_is_not_known_has_no_runs_yet():
    assert list(ablate.jobs_of(["default", "bce", "backbone"], range(1), section(), SMALL)) == [
        ("default", "steps"), ("default", "time"), ("backbone", "steps")]


# ------------------------------------------------------------------------------------------------ the table
MADE = {"date": "2026-01-02", "revision": "abc", "machine": "x86_64 AVX2", "torch": "2.11", "base": "ff",
        "measured by": "dd"}


def scores(error, **more):
    return {"errors": [["collision", 1, error, True], ["melting", 1, error + .1, True],
                       ["melting", 2, .5, False], ["collision", 2, .7, True]],
            "dynamic": [1., 1., 1.], "elsewhere": [.1, .1, 0.], "held_out": [.04, .05], "held_out_weak": [.06, .07],
            "which_where": {"which: average precision": .5}, **more}


def seeds(*errors):
    return {seed: ablation.by_clip(scores(error)) for seed, error in enumerate(errors)}


def test_the_two_actors_of_a_clip_are_one_value():
    values = ablation.by_clip(scores(.2))
    assert values["two phenomena"] == [.6] and values["found"] == [1, 1, .5]
    assert values["law error"] == [.2, .3] and values["law: melting"] == [.3]
    assert values["motion elsewhere"] == [.1, .1]


def test_a_single_value_has_no_interval_and_decides_nothing():
    assert ablation.cell("micro AP", ablation.compared(seeds(.2), None)["micro AP"]) == "0.500"
    assert ablate.verdict("lora", (.2, math.nan)).endswith("cannot be told apart")


def test_pairing_cancels_what_clips_and_seeds_have_in_common():
    mean, half = ablation.compared(seeds(.2, .5, .8), seeds(.1, .4, .7))["law error"]
    assert mean == pytest.approx(.1) and half == pytest.approx(0, abs=1e-9)


def test_single_and_paired_phenomena_are_kept_apart():
    values = ablation.compared(seeds(.2, .2), None)
    assert values["law error"][0] == pytest.approx(.25) and values["two phenomena"][0] == pytest.approx(.6)
    assert values["found"][0] == pytest.approx(5 / 6, abs=1e-5)


@pytest.mark.parametrize("difference, words", [
    ([.2, .1], "same direction"), ([-.2, .1], "opposite"), ([.1, .1], "cannot be told apart")])
def test_a_worse_law_error_points_as_a_lower_score_of_the_paper(difference, words):
    assert ablate.verdict("lora", difference) == f"58.2 (-6.8): {words}"


def test_rows_that_the_paper_has_not_get_no_verdict():
    assert ablate.verdict("physical", [.2, .1]) == "" and ablate.verdict("default", [0., 0.]) == "65.0"


ALL = {"base-0": .9, "base-1": .8, "default-0": .2, "default-1": .3, "inverted-0": .5, "inverted-1": .6,
       "lora-0": .3, "lora-1": .4, "lora-0-time": .2, "lora-1-time": .1}


def test_rows_are_compared_with_the_first_of_their_group_run_by_run():
    lines = ablate.lines_of(section(ALL))
    assert {kind: list(rows) for kind, rows in lines.items()} == {
        "equal steps": ["default", "inverted", "backbone", "lora"], "equal time": ["default", "inverted", "lora"]}
    by = {kind: rows["lora"]["differences"]["law error"] for kind, rows in lines.items()}
    assert by["equal steps"] == pytest.approx([.1, 0], abs=1e-6)
    assert by["equal time"][0] == pytest.approx(-.1)
    assert lines["equal steps"]["lora"]["paper"] == "58.2 (-6.8): same direction"
    assert lines["equal steps"]["inverted"]["differences"]["law error"] == pytest.approx([.3, 0], abs=1e-6)


def test_a_row_tells_of_the_seeds_that_its_reference_has_too():
    some = {run: error for run, error in ALL.items() if run not in ("lora-0", "default-1")}
    lines = ablate.lines_of(section(some))
    assert list(lines["equal steps"]) == ["default", "inverted", "backbone"]
    assert {row["seeds"] for rows in lines.values() for row in rows.values()} == {1}
    assert all(row["paper"] == "" for row in lines["equal steps"].values())
    assert ablate.lines_of(section({"lora-0": .1})) == ablate.lines_of(section()) == {
        "equal steps": {}, "equal time": {}}


def test_runs_of_a_preset_that_changed_do_not_count(monkeypatch):
    before = section(ALL)
    monkeypatch.setitem(config.PRESETS, "small", config.PRESETS["small"] | {"negatives": .9})
    assert list(ablate.lines_of(before)["equal steps"]) == []
    mixed = before | {"runs": section(ALL)["runs"] | {"lora-1": before["runs"]["lora-1"]}}
    assert ablate.lines_of(mixed)["equal steps"]["lora"]["seeds"] == 1


def rows_of(text, name):
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith(f"| {name} ")]


def test_cells_hold_mean_and_interval_and_laws_have_a_table_of_their_own(tmp_path):
    one = section(ALL)
    ablation.write_table(tmp_path / "a.md", {"small": one}, {"small": ablate.lines_of(one)})
    text = (tmp_path / "a.md").read_text()
    law_errors, kept, routing, laws = rows_of(text, "backbone alone")
    assert law_errors[:6] == ["2", "1.25", "", "9", "0.900 ± 0.899", "0.600 ± 1.271"]
    assert kept[:2] == ["0.0450 ± 0.0636", "0.0000 ± 0.0000"] and routing[0] == "0.500 ± 0.000"
    assert "0.850 ± 0.635" in laws and "0.950 ± 0.635" in laws
    assert "equal time" in text and "equal time" not in ablation.tables({"equal steps": {}, "equal time": {}})
    assert "* n: 1" in text and "* revision: abc" in text and "* precision: fp32" in text


def test_the_json_keeps_every_clip_and_a_damaged_one_is_refused(tmp_path):
    one = section(ALL)
    ablation.write_table(tmp_path / "a.md", {"small": one, "small-wan": one}, {"small": {}, "small-wan": {}})
    read = ablation.read_table(tmp_path / "a.md")
    assert read == {name: one | {"lines": {}} for name in ("small", "small-wan")}
    assert ablation.read_table(tmp_path / "b.md") == {}
    data = tmp_path / "a.json"
    for text in (data.read_text().replace("0.06", "0.01"), "{}"):
        data.write_text(text)
        with pytest.raises(UserError, match="a.json is damaged"):
            ablation.read_table(tmp_path / "a.md")


def test_two_processes_add_to_one_table(tmp_path):
    flags = ablate.Flags(table=str(tmp_path / "t.md"))
    cfg = config.preset("debug", device="cpu", precision="fp32")
    path = tmp_path / "t.md"

    def opened(flags):
        return ablation.Table(path, "debug", ablate.open_section(ablation.read_table(path), flags, cfg),
                              lambda section: {})

    one, other = opened(flags), opened(flags)
    made = {"key": "k", "steps": 1, "trained": 0, "values": {}, **MADE}
    one.add("runs", {"a-0": made})
    other.add("runs", {"b-0": made})
    one.add("ratios", {"default": 1.})
    section = ablation.read_table(tmp_path / "t.md")["debug"]
    assert list(section["runs"]) == ["a-0", "b-0"] and section["ratios"] == {"default": 1.}
    with pytest.raises(UserError, match="another --n"):
        opened(dataclasses.replace(flags, n=3))


def test_the_commands_of_the_readme_are_not_refused_by_a_table_that_is_there():
    stored = ablation.read_table(Path(ablate.__file__).parent / ablate.Flags.table)
    cfg = dataclasses.replace(SMALL, precision="fp32", device="cpu")
    ablate.open_section(stored, ablate.Flags(), cfg)


def test_a_file_that_this_command_did_not_write_is_no_table(tmp_path):
    (tmp_path / "README.md").write_text("# Mine")
    for name in ("README.md", "table.txt"):
        with pytest.raises(UserError, match="--table is a Markdown file"):
            ablate.Flags(table=str(tmp_path / name)).check()


# -------------------------------------------------------------------------------------- kept, or made again
def test_a_run_has_another_key_only_where_what_it_learns_changes(monkeypatch):
    fields = SHARED | {"lora_rank": 3, "seed": 1, "threads": 1, "pool_dir": "a"}
    known = sorted(vars(SMALL))
    key = ablate.key_of(fields, known)
    assert ablate.key_of(fields | {"threads": 2, "pool_dir": "b"}, known) == key
    assert ablate.key_of(fields | {"lora_rank": 4}, known) != key
    assert ablate.key_of(fields | {"base_steps": 7}, known) != key
    # A field that came after the table was begun tells nothing at its default.
    older = [name for name in known if name != "ema"]
    assert ablate.key_of(fields, older) != ablate.key_of(fields | {"ema": .5}, older)
    new = ablate.key_of(fields, older)
    monkeypatch.setattr(Config, "ema", .5)
    assert ablate.key_of(fields, older) != new  # the same value is no default any more
    monkeypatch.setitem(config.PRESETS, "small", config.PRESETS["small"] | {"negatives": .9})
    assert ablate.key_of(fields, known) != key


@pytest.mark.parametrize("row, edit, trained", [("default", None, 3), ("inverted", invert, 3),
                                                ("semantic_alone", None, 2)])
def test_a_scored_run_tells_how_it_was_made_and_what_was_trained(whole, monkeypatch, tmp_path, row, edit, trained):
    asked = []
    monkeypatch.setattr(evaluate, "measure", lambda loaded, flags: asked.append(flags.edit) or scores(.1))
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    cfg = config.load(run / "config.json")
    stored = json.loads((run / "config.json").read_text()) | {"train_physical": row != "semantic_alone"}
    stored.pop("digest")
    (run / "config.json").write_text(json.dumps(stored))
    steps = {"base_steps": cfg.base_steps, "physics_steps": cfg.base_steps + cfg.physics_steps, "device": "cpu"}
    base = ablate.Job("base", "backbone", steps, "k", "base")
    shutil.copytree(run, tmp_path / "base")
    shutil.copy(run / "checkpoints/base.pt", tmp_path / f"base/checkpoints/step{cfg.base_steps:06d}.pt")
    made = ablate.score_run(tmp_path, ablate.Job("x", row, steps, "k", "run", base), {"n": 1})
    assert asked == [edit] and made["key"] == "k" and made["values"]["law error"] == [.1, .2]
    branch = ProPhy(build_backbone(cfg, 1), cfg)
    parts = [branch.semantic, branch.refinement, branch.physical][:trained]
    assert made["trained"] == sum(p.numel() for part in parts for p in part.parameters())
    backbone = sample.load_run(tmp_path / "base", "base")[1]
    weights = b"".join(p.detach().numpy().tobytes() for p in backbone.parameters())
    assert made["base"] == hashlib.sha256(weights).hexdigest()[:9]


def test_a_finished_run_is_kept_a_half_one_goes_on_and_an_interrupted_one_is_none(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    job = ablate.Job("row", "default", {"threads": 1, "base_steps": 4}, "k", "row-k")
    with pytest.raises(Stopped, match="interrupted"):  # train.py ended without an error, but not at its end
        ablate.train_run(tmp_path, job)
    folder = tmp_path / "row-k/checkpoints"
    folder.mkdir(parents=True)
    (folder / "step000002.pt").touch()
    with pytest.raises(Stopped, match="interrupted"):
        ablate.train_run(tmp_path, job)
    assert ["--resume" in flags for flags in calls] == [False, True]
    assert ["--threads" in flags for flags in calls] == [True, False]
    (folder / "step000004.pt").touch()
    assert ablate.train_run(tmp_path, job) == folder.parent and len(calls) == 2


def test_what_stage_one_alone_reads_is_not_given_to_a_row(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    shared = {"base_steps": 5, "lr": .1, "physics_lr": .2}
    base = ablate.Job("base", "backbone", shared | {"physics_steps": 0}, "k", "base-k")
    for job in (base, ablate.Job("row", "default", shared | {"physics_steps": 5}, "k", "row-k", base)):
        with pytest.raises(Stopped):
            ablate.train_run(tmp_path, job)
        config.parse(list(calls[-1]), "")  # which refuses an idle flag
    for name in ("--lr", "--base_steps"):
        assert [name in flags for flags in calls] == [True, False]
    assert calls[1][calls[1].index("--init_from") + 1] == str(tmp_path / "base-k")


def test_a_teachers_maps_are_made_once_after_those_that_they_are_made_of(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(ablate, "call", lambda script, *flags: calls.append(flags))
    cfg = config.preset("debug", pool_dir=str(tmp_path))
    jobs = [ablate.Job(f"shuffled-{seed}", "shuffled", {"teacher": "shuffled", "seed": seed}, "k", "f")
            for seed in (1, 2)]
    ablate.make_maps(cfg, jobs, tmp_path / "out")
    assert [flags[:2] for flags in calls] == [("--annotate", "tiny_vlm"), ("--annotate", "shuffled")]
    assert "--train_tiny" in calls[0]
    (tmp_path / "out/tiny_vlm").mkdir(parents=True)  # a VLM that was trained, and its maps were not finished
    ablate.make_maps(cfg, jobs[:1], tmp_path / "out")
    assert "--train_tiny" not in calls[2] and calls[2][:2] == ("--annotate", "tiny_vlm")
    ablate.make_maps(cfg, [ablate.Job("default-0", "default", {}, "k", "f")], tmp_path / "out")
    assert len(calls) == 4


def test_a_row_that_fails_is_named_and_the_others_go_on(capsys):
    done = []

    def work(job):
        if job.name == "bad":
            raise Stopped("no room.")
        done.append(job.name)
    jobs = [ablate.Job(name, "default", {}, "k", name) for name in ("bad", "good")]
    assert ablate.do_all(jobs, work, 1, 1) == {"bad": "no room."} and done == ["good"]
    assert "bad failed: no room." in capsys.readouterr().err


COMMAND = ["--config", "debug", "--seeds", "1", "--frames", "8", "--height", "32", "--width", "32",
           "--base_steps", "2", "--physics_steps", "2", "--world_clips", "16", "--val_clips", "4",
           "--preview_steps", "1", "--n", "1", "--pairs", "1", "--clips", "4", "--rounds", "1", "--threads", "1"]


def test_rows_of_debug_are_trained_scored_and_kept(tmp_path, pools, monkeypatch):
    """End to end. Started again without the runs' folder, nothing is trained and the table is the
    same; one row that has changed is made again, with the base that it needs."""
    table, out = tmp_path / "t.md", tmp_path / "out"
    monkeypatch.setattr(ablate, "measure_ratios", lambda cfg, rows, rounds: dict.fromkeys(rows, 1.))

    def start(*more):
        ablate.main(*config.parse_with(ablate.Flags, [*COMMAND, "--pool_dir", str(pools), "--out_dir", str(out),
                                                      "--table", str(table), *more], ""))
        return ablation.read_table(table)["debug"]

    first = start("--rows", "all_weights,inverted")
    assert list(first["runs"]) == ["base-0", "default-0", "all_weights-0", "inverted-0"]
    assert len(list(out.iterdir())) == 3
    text = table.read_text()
    assert text.count("| all weights trained on") == 8 and text.count("| backbone alone") == 4
    same = ("held-out loss", "held-out, weak")  # the experts alone are looked at otherwise
    runs = first["runs"]
    assert [runs["inverted-0"]["values"][name] == runs["default-0"]["values"][name] for name in same] == [True, True]
    assert len({run["base"] for run in runs.values()}) == 1

    shutil.rmtree(out)
    assert start("--rows", "all_weights,inverted") == first and table.read_text() == text
    assert not list(out.iterdir())

    row = dataclasses.replace(ablate.ROWS["all_weights"], flags=ablate.ALL_WEIGHTS | {"world_clips": 12})
    monkeypatch.setitem(ablate.ROWS, "all_weights", row)
    again = start("--rows", "all_weights")["runs"]
    assert [run for run in again if again[run] != runs[run]] == ["all_weights-0"]
    with pytest.raises(UserError, match="another --base_steps"):
        start("--base_steps", "3")
    with pytest.raises(UserError, match="needs both stages"):
        start("--physics_steps", "0")
