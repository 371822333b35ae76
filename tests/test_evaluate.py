"""evaluate.py: detectors measure the laws of true clips and nothing else; AUC and tables say what they should."""
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import physics.phenomena
import config
import data
import evaluate
import sample
import world
from config import UserError
from physics.laws import LAWS, Scene, law_error, law_errors
from experts import ProPhy, Routing
from model import build_backbone
from physics.phenomena import Span

ROOT = Path(__file__).parent.parent
SIZES = [(12, 32, 32), (8, 32, 32), (9, 47, 80)]  # frames, height, width


def draw(name, n=8, size=(12, 32, 32), **how):
    frames, height, width = size
    return [world.make_clip(7, i, frames=frames, height=height, width=width, phenomenon=name, two=0, **how)
            for i in range(n)]


def errors(clips, change=lambda video, i: video):
    return np.array([law_error(change(clip.video, i), Scene.of(clip.actors[0]))[0] for i, clip in enumerate(clips)])


# --- detectors --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAWS)
def test_true_clips_obey_and_spoilt_ones_do_not(name, size):
    clips, frames = draw(name, size=size), size[0]
    true = errors(clips)
    assert true.mean() < .1 and true.max() < .2
    assert errors(clips * 2, lambda video, i: video[np.random.default_rng(i).permutation(frames)]).mean() > .75
    for still in (0, frames // 2):
        assert errors(clips, lambda video, i: video[[still] * frames]).min() > .99
    assert errors(clips, lambda video, i: np.random.default_rng(i).integers(0, 256, video.shape, np.uint8)).min() == 1


@pytest.mark.parametrize("name", LAWS)
def test_the_wrong_colour_or_side_is_not_found(name):
    for clip in draw(name, n=3, decoys=0):
        scene = Scene.of(clip.actors[0])
        width = .5 * clip.video.shape[2] / clip.video.shape[1]
        x0, y0, x1, y1 = scene.box
        to = width if scene.box[0] < width else -width
        assert law_error(clip.video, scene)[1]
        assert law_error(clip.video, dataclasses.replace(scene, box=(x0 + to, y0, x1 + to, y1))) == (1, False)
        for colour in set(physics.phenomena.COLOURS) - {scene.colour, scene.colour2}:
            assert law_error(clip.video, dataclasses.replace(scene, colour=colour)) == (1, False)


@pytest.mark.parametrize("name", LAWS)
def test_a_still_look_alike_on_the_wrong_side_obeys_nothing(name):
    for clip in draw(name, n=12, decoys=1):
        scene = Scene.of(clip.actors[0])
        x0, y0, x1, y1 = scene.box
        to = .5 if x0 < .5 else -.5
        for colour in physics.phenomena.COLOURS:
            wrong = dataclasses.replace(scene, box=(x0 + to, y0, x1 + to, y1), colour=colour)
            assert law_error(clip.video, wrong)[0] > .99


@pytest.mark.parametrize("name", LAWS)
def test_a_little_blur_and_noise_change_little(name):
    """As generated clips have them: every pixel shares with its neighbours, and wanders by 6 of 255."""
    def worse(video, i):
        x = np.pad(video.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        x = .6 * x[:, 1:-1, 1:-1] + .1 * (x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:])
        return np.clip(x + np.random.default_rng(i).normal(0, 6, x.shape), 0, 255).astype(np.uint8)
    assert errors(draw(name), worse).mean() < .15


@pytest.mark.parametrize("name, parameter, value, error", [
    ("rigid body motion", "gravity", 3.6, .5), ("rigid body motion", "gravity", 1.8, .25),
    ("elastic motion", "restitution", .6, .25), ("elastic motion", "gravity", 3., .25),
    ("liquid motion", "flux", .077, .3), ("gas motion", "diffusivity", .0011, .5), ("combustion", "burn_rate", .2, .2),
    ("melting", "melt_rate", .0245, .3), ("vaporization", "rate", .033, .4), ("explosion", "blast", .0308, .3),
    ("refraction", "refractive_index", 1.2, .13 / .33), ("refraction", "omega", .27, .4),
    ("reflection", "omega", .33, .4), ("deformation", "press_speed", .09, .4)])
def test_a_wrong_constant_of_nature_gives_its_relative_error(name, parameter, value, error, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(physics.phenomena.PHENOMENA[name].spans, parameter, Span(value, value))
        clips = draw(name, size=(12, 64, 64))
    assert errors(clips) == pytest.approx(error, abs=.08)


def bent(**change):
    """A phenomenon's states with some replaced: name=function of all states."""
    def states(self, p, t):
        true = type(self).states(self, p, t)
        return true | {name: function(true) for name, function in change.items()}
    return states


@pytest.mark.parametrize("name, change, error", [
    ("reflection", dict(angle_out=lambda s: .8 * s["angle_in"]), .2),
    ("reflection", dict(angle_out=lambda s: 0 * s["angle_in"] + .8), 1),  # stays while the beam in sweeps
    ("refraction", dict(angle_out=lambda s: s["angle_in"]), 1),  # unbent
    ("deformation", dict(width=lambda s: s["width"][0] + 0 * s["width"]), 1),  # not squeezed out
    ("deformation", dict(width=lambda s: np.sqrt(s["width"] * s["width"][0])), .5),
    ("melting", dict(level=lambda s: 0 * s["level"] + .001), 1),  # the lost area is nowhere
    ("melting", dict(level=lambda s: s["level"] / 2 + .001), .5),
    ("gas motion", dict(sigma=lambda s: s["sigma"][0] + 0 * s["sigma"]), 1)])  # fades, does not spread
def test_a_broken_relation_gives_its_error(name, change, error, monkeypatch):
    with monkeypatch.context() as patch:
        one = physics.phenomena.PHENOMENA[name]
        patch.setattr(one, "states", bent(**change).__get__(one), raising=False)
        clips = draw(name, size=(12, 64, 64))
    assert errors(clips) == pytest.approx(error, abs=.1)


@pytest.mark.parametrize("after, error", [
    (lambda p, centre: (p["velocity"], p["velocity2"]), 1),  # through each other
    (lambda p, centre: (centre, centre), .5)])  # sticking together: momentum kept, energy not
def test_pucks_must_exchange_their_motion(after, error, monkeypatch):
    honest = physics.phenomena.Collision.derive

    def derive(self, p, rng):
        honest(self, p, rng)
        centre = (p["mass"] * p["velocity"] + p["mass2"] * p["velocity2"]) / (p["mass"] + p["mass2"])
        p["velocity_after"], p["velocity2_after"] = after(p, centre)
    with monkeypatch.context() as patch:
        patch.setattr(physics.phenomena.Collision, "derive", derive)
        clips = draw("collision", size=(12, 64, 64))
    measured = errors(clips)
    assert measured.min() > .4 if error == 1 else measured == pytest.approx(error, abs=.08)


def test_momentum_that_is_lost_is_measured(monkeypatch):
    honest, lost = physics.phenomena.Collision.derive, []

    def derive(self, p, rng):  # the second puck leaves as it should, the first stays where it was hit
        honest(self, p, rng)
        p["velocity_after"] = 0.
        m, m2 = p["mass"], p["mass2"]
        u, u_after = p["velocity"] - p["velocity2"], -p["velocity2_after"]
        change = abs(m * p["velocity"] + m2 * (p["velocity2"] - p["velocity2_after"]))
        lost.append(max(change / (m * abs(p["velocity"]) + m2 * abs(p["velocity2"])), abs(1 + u_after / u) / 2))
    with monkeypatch.context() as patch:
        patch.setattr(physics.phenomena.Collision, "derive", derive)
        clips = draw("collision", size=(12, 64, 64), decoys=0)
    assert np.ptp(lost) > .1 and errors(clips) == pytest.approx(np.minimum(lost, 1), abs=.08)


def test_means_over_laws_weigh_laws_evenly():
    clips = draw("combustion", 3) + draw("explosion", 1)
    scenes, videos = [Scene.of(clip.actors[0]) for clip in clips], [clip.video for clip in clips]
    videos[0] = videos[0][::-1]  # the candle grows
    videos[3] = np.zeros_like(videos[3])
    table = law_errors(videos, scenes)
    assert table["found"] == .75 and table["blast"] == 1 and table["candle"] == pytest.approx(1 / 3, abs=.02)
    assert table["seven"] == table["candle"] and table["all"] == (table["candle"] + 1) / 2
    one = [law_error(video, scene)[0] for video, scene in zip(videos, scenes)]
    assert table["se"] == pytest.approx(np.std(one[:3]) / 3 ** .5 / 2)
    with pytest.raises(ValueError):
        law_errors(videos, scenes[:2])


# --- localisation -----------------------------------------------------------------------------------------------------
def test_auc_counts_pairs():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 10**6):  # with many ties, with few, with none
        scores, positive = rng.integers(0, levels, 60), rng.random(60) < .3
        pairs = [(p > q) + (p == q) / 2 for p in scores[positive] for q in scores[~positive]]
        assert evaluate.auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert evaluate.auc(positive, positive) == 1 and evaluate.auc(~positive, positive) == 0
    assert evaluate.auc(np.zeros(60), positive) == .5


def test_words_are_those_of_the_phenomenon():
    cfg = config.preset("small", text_len=40)
    for i in range(150):
        clip = world.make_clip(1, i, decoys=1, two=.5)
        words, found = data.Tokenizer.split(clip.caption), evaluate.sights(clip, cfg)
        assert len(found) == len(clip.actors)
        for sight, actor in zip(found, clip.actors):
            said = [words[i] for i in sight.words]
            assert 4 <= len(said) <= 9 and actor.colour in said and not {"still", "left", "right", "beside"} & {*said}
            if not actor.colour2:  # the caption's other colours are those of other things
                assert len({*said} & {*physics.phenomena.COLOURS}) == 1
        assert len({place for sight in found for place in sight.words}) == sum(len(sight.words) for sight in found)


def test_priors_know_the_place_better_with_the_side_and_less_than_the_masks():
    cfg = config.preset("small", world_clips=400)
    priors, means = evaluate.location_priors(cfg), []
    for i in range(60):
        clip = world.make_clip(0, 10_000 + i, **evaluate.drawing(cfg))
        for sight in filter(lambda sight: sight.scorable, evaluate.sights(clip, cfg)):
            means.append([evaluate.auc(m, sight.positive) for m in (
                priors[sight.category], priors[sight.category, sight.side], sight.positive)])
    prior, sided, exact = np.mean(means, 0)
    assert .6 < prior < sided - .02 and sided < exact == 1


def test_attention_is_read_at_the_words_alone():
    cfg = config.preset("debug")
    model = perturbed(build_backbone(cfg, 12))
    text, length = torch.tensor([[2, 3, 4] + [0] * 21, [5, 6] + [0] * 22]), torch.tensor([3, 2])
    x, time = torch.randn(2, 3, 4, 16, 16), torch.tensor([500., 500.])
    with torch.no_grad():
        maps = evaluate.attention_maps(model, x, time, text, length)
        tokens, condition = model.embed(x, time, text, length)
        second = model.blocks[1].attention_map(model.blocks[0](tokens, condition), condition)  # (B, h, N, L)
    plain, share = maps.unbind(2)
    assert maps.shape == (2, cfg.depth, 2, cfg.heads, 32, 24)
    assert torch.allclose(plain[:, 1, :, :, 0], second[..., 0]) and plain[0, ..., 3:].eq(0).all()
    assert torch.allclose(share.sum(-1), torch.ones(2, cfg.depth, cfg.heads, 32))
    assert torch.allclose(share[1, ..., 0], plain[1, ..., 0] / plain[1, ..., :2].sum(-1))


# --- the command ------------------------------------------------------------------------------------------------------
CFG = config.preset("debug", frames=8, height=32, width=32, patch=8, world_clips=40, preview_steps=2)


def perturbed(module):
    """Zero-initialised layers would make every clip grey: shake all weights."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * .1)
    return module.eval()


def write_run(folder, cfg=CFG, branch=True):
    """A run folder as train.py leaves it, with random weights."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    tokenizer = data.Tokenizer.from_captions(world.make_clip(0, i).caption for i in range(200))
    tokenizer.save(folder / "tokenizer.json")
    model = build_backbone(cfg, len(tokenizer))
    model = perturbed(ProPhy(model, cfg) if branch else model)
    torch.save(dict(step=5, stage="physics" if branch else "base", model=model.state_dict(), ema={}),
               folder / "checkpoints" / "best.pt")
    return folder


def run_main(*argv):
    evaluate.main([*map(str, argv), "--n", "1", "--clips", "6", "--batch", "4"])


def test_the_whole_command(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    run_main("--run", run)
    shown, stored = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    rows = stored["laws"]["rows"]
    assert list(rows) == ["simulator", "frames shuffled", "frozen", "noise", "generated", "backbone alone"]
    assert rows["simulator"]["all"] < .1 and rows["noise"]["all"] == rows["frozen"]["all"] == 1
    assert rows["frames shuffled"]["all"] > .7
    assert f"| simulator       | 1.000 | {rows['simulator']['seven']:.3f} | {rows['simulator']['all']:.3f} |" in shown
    assert set(LAWS[name].__name__ for name in LAWS) < set(rows["generated"])
    places = stored["localisation"]["rows"]
    assert list(places) == ["refinement maps", "location prior", "prior given the side", "backbone's best attention"]
    assert all(list(row) == ["70% noise", "50% noise", "20% noise"] for row in places.values())
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
    assert list((run).glob("*.tmp")) == []

    (run / "evaluation.json").write_text("[half-writ")
    other = write_run(tmp_path / "other", dataclasses.replace(CFG, seed=1), branch=False)
    capsys.readouterr()
    run_main("--run", run, "--run", other, "--seed", 2)
    last = capsys.readouterr().out.split("2 runs, laws")[1]
    tables = [json.loads((one / "evaluation.json").read_text()) for one in (run, other)]
    assert "backbone alone" not in tables[1]["laws"]["rows"]
    assert "refinement maps" not in tables[1]["localisation"]["rows"]
    values = [table["localisation"]["rows"]["backbone's best attention"]["50% noise"] for table in tables]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in last and "refinement maps" not in last
    assert np.std(values) > 0


def test_generated_clips_are_judged_by_their_captions(tmp_path, monkeypatch):
    """A model that draws what its caption says, made of the world itself, gets the simulator's row."""
    loaded = sample.load_run(write_run(tmp_path / "run", branch=False))
    honest, drawn = world.make_clip, {}

    def make_clip(*args, **how):
        clip = honest(*args, **how)
        drawn[clip.caption] = clip.video
        return clip
    monkeypatch.setattr(world, "make_clip", make_clip)
    monkeypatch.setattr(sample, "generate", lambda model, process, tokenizer, cfg, prompts, **how: (
        np.stack([drawn[prompt] for prompt in prompts]), None))
    rows = evaluate.law_table(loaded, 4, n=1, seed=0, steps=2, guidance=1, precision="fp32")["rows"]
    assert rows["generated"] == rows["simulator"] and rows["generated"]["found"] == 1


def test_exact_maps_score_one(tmp_path, monkeypatch):
    """A router that knows the masks is given 1, a constant one 1/2; so is the one head that knows them, which is found.
    A phenomenon without positive tokens is left out."""
    loaded = cfg, *_ = sample.load_run(write_run(tmp_path / "run"))
    clips, batch, N, honest = 6, 4, int(np.prod(CFG.grid)), evaluate.sights
    indices = [i for _ in evaluate.LEVELS for first, n in ((evaluate.SELECTED, clips // 2), (evaluate.SCORED, clips))
               for i in range(first, first + n)]
    again, knows, hidden = list(indices), True, ""

    def sights(clip, cfg):
        return [dataclasses.replace(one, positive=one.positive & (actor.phenomenon != hidden))
                for one, actor in zip(honest(clip, cfg), clip.actors)]

    def forward(self, x, t, text, text_length=None, edit=None):
        lift = torch.zeros(len(x), N, cfg.categories)
        for row, i in zip(lift, indices):
            for sight in sights(world.make_clip(0, i, **evaluate.drawing(cfg, decoys=1.)), cfg):
                row[:, sight.category] = torch.from_numpy(sight.positive).float() * knows
        return x, Routing(refinement_lift=lift)

    def attention_maps(backbone, x_t, time, text, length):
        maps = torch.rand(len(x_t), cfg.depth, 2, cfg.heads, N, text.shape[1])
        for one in maps:
            for sight in sights(world.make_clip(0, indices.pop(0), **evaluate.drawing(cfg, decoys=1.)), cfg):
                one[1, 1, 0, :, sight.words] = torch.from_numpy(sight.positive).float()[:, None]
        return maps
    monkeypatch.setattr(ProPhy, "forward", forward)
    monkeypatch.setattr(evaluate, "attention_maps", attention_maps)
    monkeypatch.setattr(evaluate, "sights", sights)
    for knows, hidden, expected in ((True, "", 1), (False, "", .5), (True, "liquid motion", 1)):
        indices[:] = again
        table = evaluate.localisation_table(loaded, batch, clips, seed=0, ood="", precision="fp32")
        assert set(table["rows"]["refinement maps"].values()) == {expected} and not indices
        assert set(table["rows"]["backbone's best attention"].values()) == {1}
        assert set(table["attention"].values()) == {"layer 1, head 0, share"}
        scenes = [world.make_clip(0, i, **evaluate.drawing(cfg, decoys=1.))
                  for i in range(evaluate.SCORED, evaluate.SCORED + clips)]
        shown = [actor.phenomenon for scene in scenes for actor in scene.actors]
        assert "liquid motion" in shown and table["skipped"] == shown.count(hidden)
        assert table["scored"] + table["skipped"] == len(shown)
        priors, scored = evaluate.location_priors(cfg), [one for scene in scenes for one in sights(scene, cfg)]
        for row, key in (("location prior", lambda one: one.category),
                         ("prior given the side", lambda one: (one.category, one.side))):
            values = [evaluate.auc(priors.get(key(one), np.zeros(N)), one.positive) for one in scored if one.scorable]
            assert set(table["rows"][row].values()) == {np.mean(values)}


def test_mistakes_are_one_sentence(tmp_path):
    run, small = write_run(tmp_path / "run"), write_run(tmp_path / "small", config.preset("debug", preview_steps=2))
    videos = write_run(tmp_path / "videos", dataclasses.replace(CFG, data_dir="clips"))
    sliced = write_run(tmp_path / "sliced", dataclasses.replace(CFG, process="vpred"))
    for argv, said in (
            ((), "--run"), (("--run", tmp_path / "none"), "no run folder"), (("--run", run, "--wrong", 1), "--wrong"),
            (("--run", run, "--only", "looks"), "looks"), (("--run", run, "--steps", -1), "--steps"),
            (("--run", run, "--seed", "x"), "x"), (("--run", run, "--guidance", "nan"), "--guidance"),
            (("--run", run, "--checkpoint", "last"), "checkpoint"), (("--run", sliced, "--steps", 2000), "1000 steps"),
            (("--run", videos), "trained on videos"), (("--run", small), "8 frames of 32 pixels")):
        with pytest.raises(UserError, match=said) as told:
            evaluate.main(list(map(str, argv)))
        assert "\n" not in str(told.value)
    run_main("--run", small, "--only", "localisation")
    assert list(json.loads((small / "evaluation.json").read_text())) == ["localisation"]
    command = [sys.executable, ROOT / "evaluate.py", "--run", run, "--n", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "--n must be 1 or more, not 0." and not done.stdout
