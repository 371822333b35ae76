"""evaluate.py: location priors and attention by hand; tables and measures say what they should."""
import dataclasses
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import physics.laws
import physics.canvas
import physics.phenomena
import config
import data
import evaluate
import experts
import model
import sample
import world
from common import score
from config import UserError
from helpers import ROOT, perturbed, rewrite, write_run


# --- localisation -------------------------------------------------------------------------------------------
def test_words_are_those_of_the_phenomenon():
    cfg = config.preset("small", text_len=40)
    for i in range(150):
        clip = world.make_clip(1, i, decoys=1, two=.5)
        words, found = data.Tokenizer.split(clip.caption), evaluate.occurrences(clip, cfg)
        assert len(found) == len(clip.actors)
        for sight, actor in zip(found, clip.actors):
            said = [words[i] for i in sight.words]
            assert 4 <= len(said) <= 9 and actor.colour in said
            assert not {"still", "left", "right", "beside"} & {*said}
            if not actor.colour2:  # the caption's other colours are those of other things
                assert len({*said} & {*physics.canvas.COLOURS}) == 1
        assert len({place for sight in found
                    for place in sight.words}) == sum(len(sight.words) for sight in found)


def test_priors_know_the_place_better_with_the_side_and_less_than_the_masks():
    cfg = config.preset("small", world_clips=400)
    priors, means = evaluate.location_priors(cfg), []
    for i in range(60):
        clip = world.make_clip(0, 10_000 + i, **world.drawing(cfg))
        for sight in filter(lambda sight: sight.scorable, evaluate.occurrences(clip, cfg)):
            means.append([score.auc(m, sight.positive) for m in (
                priors[sight.category], priors[sight.category, sight.side], sight.positive)])
    prior, sided, exact = np.mean(means, 0)
    assert .6 < prior < sided - .02 and sided < exact == 1


def test_attention_is_read_at_the_words_alone():
    cfg = config.preset("debug")
    net = perturbed(model.build_backbone(cfg, 12))
    text, length = torch.tensor([[2, 3, 4] + [0] * 21, [5, 6] + [0] * 22]), torch.tensor([3, 2])
    x, time = torch.randn(2, 3, 4, 16, 16), torch.tensor([500., 500.])
    with torch.no_grad():
        maps = evaluate.attention_maps(net, x, time, text, length)
        tokens, condition = net.embed(x, time, text, length)
        second = net.blocks[1].attention_map(net.blocks[0](tokens, condition), condition)  # (B, h, N, L)
    plain, share = maps.unbind(2)
    assert maps.shape == (2, cfg.depth, 2, cfg.heads, 32, 24)
    assert torch.allclose(plain[:, 1, :, :, 0], second[..., 0]) and plain[0, ..., 3:].eq(0).all()
    assert torch.allclose(share.sum(-1), torch.ones(2, cfg.depth, cfg.heads, 32))
    assert torch.allclose(share[1, ..., 0], plain[1, ..., 0] / plain[1, ..., :2].sum(-1))


# --- the command --------------------------------------------------------------------------------------------
CFG = config.preset("debug", frames=8, height=32, width=32, patch=8, world_clips=40, preview_steps=2)
CAPTIONS = [world.make_clip(0, i).caption for i in range(200)]


def run_folder(folder, cfg=CFG, branch=True):
    return write_run(folder, cfg, CAPTIONS, branch, "best.pt")


def run_main(*argv):
    counts = {"laws": ["--n", "1", "--pairs", "2"], "localisation": ["--clips", "6"]}
    used = [word for part, words in counts.items() if part == argv[-1] or argv[-2] != "--only" for word in words]
    evaluate.main([*map(str, argv), *used, "--batch", "4"])


def test_the_whole_command(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    run_main("--run", run)
    shown, stored = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    rows = stored["laws"]["rows"]
    assert list(rows) == ["simulator", "frames shuffled", "reversed", "frozen", "weak physics", "wrong caption",
                          "noise", "backbone alone", "with the branch"]
    true = rows["simulator"]
    assert true["all"] < .05 and true["two"] < .05 and rows["noise"]["all"] == rows["frozen"]["all"] == 1
    assert min(rows[name][column] for name in ("frames shuffled", "wrong caption") for column in ("all", "two")) > .7
    assert f"| simulator       | 1.000 | {true['all']:.3f} | {true['two']:.3f} |" in shown
    assert [line.split(":")[0] for line in shown.split("error:\n")[1].splitlines()[:3]] == [
        "backbone alone", "with the branch", "simulator"]
    for row in ("reversed", "weak physics"):  # each law that the corruption can break, by a wide margin
        for name, law in physics.laws.LAWS.items():
            assert (rows[row][law.__name__] > .6) == (name not in physics.laws.LAWFUL[row])
    assert "reversed: these hold all the same: gravity, collision, refraction, mirror." in shown
    assert set(physics.laws.LAWS[name].__name__ for name in physics.laws.LAWS) < set(rows["with the branch"])
    places = stored["localisation"]["rows"]
    assert [name for name in places if name.startswith("where")] == [
        f"where: {name}" for name in ("location prior", "prior given the side", "backbone's best attention",
                                      "refinement maps")]
    levels = ["chance", "70% noise", "50% noise", "20% noise"]
    assert all(list(row) == (["chance", "any noise"] if name.startswith("text") else levels)
               for name, row in places.items())
    assert stored["localisation"]["scored"] >= 6
    assert "prior given the side" in shown and "layer" in shown

    before = (run / "evaluation.json").stat().st_mtime_ns
    run_main("--run", run)  # nothing changed: nothing is done again, and the same is printed
    again = capsys.readouterr().out
    assert (run / "evaluation.json").stat().st_mtime_ns == before and "as evaluation.json has them" in again
    assert set(shown.splitlines()) < set(again.splitlines())
    run_main("--run", run, "--guidance", 3, "--only", "laws")
    changed = json.loads((run / "evaluation.json").read_text())
    assert changed["laws"]["settings"]["guidance"] == 3 and changed["localisation"] == stored["localisation"]
    assert list(run.glob("*.part")) == []

    (run / "evaluation.json").write_text("[half-writ")
    other = run_folder(tmp_path / "other", dataclasses.replace(CFG, seed=1), branch=False)
    capsys.readouterr()
    run_main("--run", run, "--run", other, "--seed", 2)
    last = capsys.readouterr().out.split("2 runs, laws")[1]
    tables = [json.loads((one / "evaluation.json").read_text()) for one in (run, other)]
    assert "with the branch" not in tables[1]["laws"]["rows"]
    assert all(name.startswith("where") for name in tables[1]["localisation"]["rows"])
    values = [table["localisation"]["rows"]["where: backbone's best attention"]["50% noise"] for table in tables]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in last and "refinement maps" not in last
    assert np.std(values) > 0


def test_generated_clips_are_judged_by_their_captions(tmp_path, monkeypatch):
    """A model that draws what its caption says, made of the world itself, gets the simulator's row."""
    loaded = sample.load_run(run_folder(tmp_path / "run", branch=False))
    honest, drawn = world.make_clip, {}

    def make_clip(*args, **how):
        clip = honest(*args, **how)
        if how["physics"] == "true":
            drawn[clip.caption] = clip.video
        return clip
    monkeypatch.setattr(world, "make_clip", make_clip)
    monkeypatch.setattr(sample, "generate", lambda model, prompts, **how: (
        (drawn[prompt], None) for prompt in prompts))
    monkeypatch.setattr(evaluate, "MANY", 1)
    flags = evaluate.Flags(n=1, pairs=2, steps=2, guidance=1, batch=4, precision="fp32")
    rows = evaluate.law_table(loaded, flags)["rows"]
    assert rows["backbone alone"] == rows["simulator"] and rows["simulator"]["found"] == 1


def test_exact_maps_score_one(tmp_path, monkeypatch):
    """A router that knows the masks is given 1, a constant one 1/2;
    so is the one head that knows them, which is found. A phenomenon without positive tokens is left out."""
    loaded = cfg, *_ = sample.load_run(run_folder(tmp_path / "run"))
    clips, batch, N, honest = 6, 4, int(np.prod(CFG.grid)), evaluate.occurrences
    indices = [i for _ in evaluate.LEVELS
               for first, n in ((evaluate.SELECTED, clips // 2), (evaluate.SCORED, clips))
               for i in range(first, first + n)]
    again, knows, hidden = list(indices), True, ""

    def judged(i):
        return world.make_clip(evaluate.JUDGED_SEED, i, **world.drawing(cfg, decoys=1.))

    def sights(clip, cfg):
        return [dataclasses.replace(one, positive=one.positive & (actor.phenomenon != hidden))
                for one, actor in zip(honest(clip, cfg), clip.actors)]

    def forward(self, x, t, text, text_length=None, edit=None):
        lift = torch.zeros(len(x), N, cfg.categories)
        for row, i in zip(lift, indices):
            for sight in sights(judged(i), cfg):
                row[:, sight.category] = torch.from_numpy(sight.positive).float() * knows
        return x, experts.Routing(refinement_lift=lift)

    def attention_maps(backbone, x_t, time, text, length):
        maps = torch.rand(len(x_t), cfg.depth, 2, cfg.heads, N, text.shape[1])
        for one in maps:
            for sight in sights(judged(indices.pop(0)), cfg):
                one[1, 1, 0, :, sight.words] = torch.from_numpy(sight.positive).float()[:, None]
        return maps
    monkeypatch.setattr(experts.ProPhy, "forward", forward)
    monkeypatch.setattr(evaluate, "attention_maps", attention_maps)
    monkeypatch.setattr(evaluate, "occurrences", sights)
    for knows, hidden, expected in ((True, "", 1), (False, "", .5), (True, "melting", 1)):
        indices[:] = again
        flags = evaluate.Flags(clips=clips, batch=batch, precision="fp32")
        table = evaluate.localisation_table(loaded, flags)
        rows = table["rows"]
        assert set(rows["where: refinement maps"].values()) == {.5, expected} and not indices
        assert set(rows["where: backbone's best attention"].values()) == {.5, 1}
        if knows and not hidden:  # the maps are the masks
            assert all({*row.values()} == {row["chance"], 1} for name, row in rows.items() if name[:5] == "which")
            assert 0 < rows["which: average precision"]["chance"] < .2
        if not knows:
            assert all(len({*row.values()}) == 1 for name, row in rows.items() if name[:5] == "which")
        assert set(table["attention"].values()) == {"layer 1, head 0, share"}
        scenes = [judged(i) for i in range(evaluate.SCORED, evaluate.SCORED + clips)]
        shown = [actor.phenomenon for scene in scenes for actor in scene.actors]
        assert "melting" in shown and table["skipped"] == shown.count(hidden)
        assert table["scored"] + table["skipped"] == len(shown)
        priors = evaluate.location_priors(cfg)
        scored = [one for scene in scenes for one in sights(scene, cfg)]
        for row, key in (("where: location prior", lambda one: one.category),
                         ("where: prior given the side", lambda one: (one.category, one.side))):
            values = [score.auc(priors.get(key(one), np.zeros(N)), one.positive)
                      for one in scored if one.scorable]
            assert set(rows[row].values()) == {.5, np.mean(values)}


def test_a_wrong_caption_tells_of_nothing_in_its_clip():
    flags = dataclasses.replace(evaluate.Flags(), n=2, pairs=1)
    scenes = evaluate.scenes_to_judge(CFG, flags)
    assert [len(scene.actors) for scene in scenes] == [1] * 24 + [2]
    judged = physics.laws.judge([evaluate.another(scenes, i).video for i in range(25)], scenes)
    assert [row[:2] for row in judged[:24]] == [[name, 1] for name in physics.laws.LAWS for _ in range(2)]
    assert min(error for _, n, error, _ in judged if n == 1) > .9
    for i, scene in enumerate(scenes):
        other = evaluate.another(scenes, i)
        assert other.actors[0].side != scene.actors[0].side and not {*other.categories} & {*scene.categories}


# --- what ablate.py measures --------------------------------------------------------------------------------
def measured(loaded, **how):
    """evaluate.measure of few clips."""
    few = dict(n=1, pairs=2, clips=6, seed=0, steps=2, guidance=1., batch=5, precision="fp32", judged_seed=998,
               edit=None)
    return evaluate.measure(loaded, types.SimpleNamespace(**few | how))


def test_measure_counts_what_its_flags_ask_for(tmp_path):
    loaded = sample.load_run(run_folder(tmp_path / "run"))
    found = json.loads(json.dumps(measured(loaded)))
    assert [row[:2] for row in found["errors"][:12]] == [[name, 1] for name in physics.laws.LAWS]
    assert [n for _, n, *_ in found["errors"][12:]] == [2] * 4 and len(found["dynamic"]) == len(found["elsewhere"]) == 14
    assert len(found["held_out"]) == len(found["held_out_weak"]) == 6 and found["held_out"] != found["held_out_weak"]
    assert {name.split(":")[0] for name in found["which_where"]} == {"where", "which", "text"}
    # Another batch size moves rounding alone, another world everything.
    again = measured(loaded, batch=3)
    assert again["held_out"] == pytest.approx(found["held_out"], rel=1e-4)
    other = measured(loaded, judged_seed=999)
    assert other["held_out"] != pytest.approx(found["held_out"], rel=1e-2)
    bare = sample.load_run(run_folder(tmp_path / "bare", branch=False))
    assert measured(bare)["which_where"] == {}


def test_the_tables_say_what_measure_says(tmp_path):
    loaded = sample.load_run(run_folder(tmp_path / "run"))
    found = measured(loaded, judged_seed=evaluate.JUDGED_SEED)
    flags = evaluate.Flags(n=1, pairs=2, clips=6, steps=2, guidance=1., batch=5, precision="fp32")
    assert evaluate.law_table(loaded, flags)["rows"]["with the branch"] == physics.laws.law_means(found["errors"])
    rows = evaluate.localisation_table(loaded, flags)["rows"]
    assert found["which_where"] == {name: row.get("50% noise", row.get("any noise"))
                                    for name, row in rows.items() if name in found["which_where"]}


def test_an_edit_changes_the_clips_and_the_losses(tmp_path):
    loaded = sample.load_run(run_folder(tmp_path / "run"))
    plain, same, flipped = (measured(loaded, edit=edit) for edit in (None, lambda logits: logits, experts.invert))
    assert plain == same and plain["dynamic"] != flipped["dynamic"] and plain["held_out"] != flipped["held_out"]
    assert plain["which_where"]["text: entropy"] != flipped["which_where"]["text: entropy"]


def test_held_out_losses_are_those_of_the_prediction(tmp_path, monkeypatch):
    """A network that knows the clips loses nothing, and one that is off by t on flow matching 1 everywhere."""
    loaded = cfg, _, process, *_ = sample.load_run(run_folder(tmp_path / "run", branch=False))
    indices = range(evaluate.SCORED, evaluate.SCORED + 6)
    shown = np.stack([world.make_clip(998, i, **world.drawing(cfg, physics="weak")).video for i in indices])
    x = torch.from_numpy(shown / np.float32(127.5) - 1).permute(0, 4, 1, 2, 3)
    t = process.draw(0, indices, x.shape[1:])[0]
    assert process.predict == "x"
    for off in (0, 1):
        left = iter((x + off * t[:, None, None, None, None]).split(5))
        monkeypatch.setattr(sample.RunModel, "predict", lambda *_: (next(left), None))
        flags = types.SimpleNamespace(clips=6, seed=0, batch=5, precision="fp32", judged_seed=998, edit=None)
        assert evaluate.held_out_losses(loaded, flags, "weak") == pytest.approx([off] * 6, abs=1e-3)


def test_two_that_measure_one_run_keep_each_others_tables(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    flags = evaluate.Flags(run=[str(run)])

    def laws(*_):  # takes so long that another process measures and writes the other table
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "PARTS", {"localisation": lambda *_: {"rows": {"maps": {"clean": 0.75}}}})
            evaluate.evaluate_run(run, flags)
        return {"rows": {"noise": {"se": 0.25}}}

    monkeypatch.setattr(evaluate, "PARTS", {"laws": laws})
    evaluate.evaluate_run(run, flags)
    assert set(evaluate.read_stored(run / "evaluation.json")) == {"laws", "localisation"}

    # A number that changed on the disk is measured again, and tables of before have no digest.
    path = run / "evaluation.json"
    rewrite(path)
    assert set(evaluate.read_stored(path)) == {"laws", "localisation"}
    evaluate.evaluate_run(run, dataclasses.replace(flags, pairs=17))
    path.write_text(path.read_text().replace("0.75", "0.95"))
    assert evaluate.read_stored(path) == {}


def test_mistakes_are_one_sentence(tmp_path):
    run = run_folder(tmp_path / "run")
    small = run_folder(tmp_path / "small", config.preset("debug", preview_steps=2))
    videos = run_folder(tmp_path / "videos", dataclasses.replace(CFG, data_dir="clips"))
    sliced = run_folder(tmp_path / "sliced", dataclasses.replace(CFG, process="vpred"))
    for argv, said in (
            ((), "--run"), (("--run", tmp_path / "none"), "no run folder"),
            (("--run", run, "--wrong", 1), "--wrong"),
            (("--run", run, "--only", "looks"), "looks"), (("--run", run, "--steps", -1), "--steps"),
            (("--run", run, "--only", "laws", "--clips", 9), "--clips"), (("--run", run, "--seed", 2**65), "--seed"),
            (("--run", run, "--only", "localisation", "--guidance", 2), "--guidance"),
            (("--run", run, "--clips", 10**11), "--clips"), (("--run", run, "--steps", 10**11), "--steps"),
            (("--run", run, "--seed", "x"), "x"), (("--run", run, "--guidance", "nan"), "--guidance"),
            (("--run", run, "--checkpoint", "last"), "checkpoint"),
            (("--run", sliced, "--steps", 2000), "1000 steps"),
            (("--run", videos), "trained on videos"), (("--run", small), "8 frames of 32 pixels")):
        with pytest.raises(UserError, match=said) as told:
            evaluate.main(list(map(str, argv)))
        assert "\n" not in str(told.value)
    run_main("--run", small, "--only", "localisation")
    assert list(evaluate.read_stored(small / "evaluation.json")) == ["localisation"]
    command = [sys.executable, ROOT / "evaluate.py", "--run", run, "--n", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "--n must be 1 or more, not 0." and not done.stdout
