"""The tiny teacher:
what it is taught, what a question may see, that it learns, and the report that judges maps."""
import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import physics.phenomena
from vlm import qwen as vlm_qwen
from vlm import speed as vlm_speed
from vlm import report as vlm_report
from vlm import tiny as vlm_tiny
import align
import config
import data
import world
from helpers import ROOT

CFG = config.preset("debug", colour_cues=True, frames=4, height=32, width=32)


def test_it_is_a_qwen_of_a_tenth_of_a_million_parameters_with_its_own_settings(tiny):
    assert tiny.config.model_type == "qwen2_5_vl"
    assert sum(p.numel() for p in tiny.model.parameters()) < 250_000
    settings = tiny.settings()
    assert settings.question_for("rigid body motion") == "is there rigid body motion"
    assert settings.background == vlm_tiny.TINY_SETTINGS["background"]
    assert tiny.settings(rows="answer").rows == "answer"


def test_a_name_is_one_word_and_every_word_is_known(tiny):
    for name in physics.phenomena.PHENOMENA:
        ids = tiny.tokenizer(vlm_tiny.TINY_SETTINGS["question"].format(name=name)).input_ids
        assert len(ids) == 3 and 0 not in ids and tiny.tokenizer.decode(ids[-1:]) == name
    assert 0 not in tiny.tokenizer("what is the background yes no nothing").input_ids


@pytest.mark.parametrize("still", [False, True])
def test_lessons_are_true_and_ask_for_look_alikes(still):
    rng, foreign = np.random.default_rng(0), 0
    for index in range(200):
        clip = world.make_clip(0, index, decoys=1, colour_cues=True)
        shown = {actor.phenomenon for actor in clip.actors}
        asked = vlm_tiny.lessons(clip, still, rng)
        assert asked[0] == (vlm_tiny.TINY_SETTINGS["background"], "nothing")
        names = [question.removeprefix("is there ") for question, _ in asked[1:]]
        answers = dict(zip(names, (answer for _, answer in asked[1:])))
        assert {name for name, answer in answers.items() if answer == "yes"} == (set() if still else shown)
        # one that is not to be seen
        assert {name for name in names if answers[name] == "no" and name not in shown}
        alike = {name for name in names if names.count(name) >= 2} - shown
        for name in alike:  # what the caption calls a still look-alike of it
            words = [phrase.split()[-1] for phrase in physics.phenomena.PHENOMENA[name].decoy_phrases]
            assert any(word in clip.caption for word in words)
        assert all(names.count(name) == (2 if still else 3) for name in shown)
        foreign += bool(alike)
    assert foreign > 30


def test_a_photograph_stands_still_and_has_no_colour_cues():
    rng, colours = np.random.default_rng(0), set()
    for _ in range(30):
        clip = vlm_tiny.photograph(CFG, rng)
        assert (clip.video == clip.video[0]).all() and clip.video.shape == (4, 32, 32, 3)
        colours |= {(actor.phenomenon, actor.colour) for actor in clip.actors}
    assert any(colour != physics.phenomena.PHENOMENA[name].cue for name, colour in colours)


def test_a_branch_sees_the_video_and_itself_and_no_other_branch(tiny):
    grid = (2, 8, 8)
    asked = [[("is there melting", "yes"), ("is there collision", "no")], [("is there melting", "no")]]
    ids, labels, places, mask = vlm_tiny.pack_questions(tiny, asked, grid, 4)
    P, N = vlm_tiny.KEPT + 2, 128
    assert ids[0, :P].tolist() == [4] + [tiny.video_id] * vlm_tiny.KEPT + [5]
    said = tiny.tokenizer.decode(ids[0, P:]).replace(" ", "")
    assert said == "istheremeltingyes<|end|>istherecollisionno<|end|>"
    first, second = slice(P, P + 5), slice(P + 5, P + 10)
    triangle = torch.ones(5, 5).tril().bool()
    assert torch.equal(mask[0, 0, first, first], triangle)
    assert torch.equal(mask[0, 0, second, second], triangle)
    assert not mask[0, 0, second, first].any() and not mask[0, 0, first, second].any()
    assert torch.equal(mask[0, 0, :P, :P], torch.ones(P, P).tril().bool()) and not mask[0, 0, :P, P:].any()
    # the second row's padding sees itself alone
    assert mask[0, 0, P:, :P].all() and not mask[1, 0, second, :P].any()
    # the row of the name predicts the answer, that of the answer the end; nothing else is learned
    want = {P + 2: "yes", P + 3: "<|end|>", P + 7: "no", P + 8: "<|end|>"}
    assert {int(i): tiny.tokenizer.decode([int(labels[0, i])]) for i in (labels[0] > 0).nonzero()} == want
    # every token stands where it would stand behind the whole video, or attention would turn otherwise than
    # in use
    whole, _ = tiny.prompt("?", grid, 4)
    alone = tiny.positions(whole + ids[0, first].tolist(), grid, 4)[:, 0]  # (3, 2 + N + 5)
    assert torch.equal(places[:, 0, first], alone[:, -5:])
    assert torch.equal(places[:, 0, second], alone[:, -5:])
    assert torch.equal(places[0, 0, :P], torch.cat([alone[0, :1 + vlm_tiny.KEPT], alone[0, 1 + N:2 + N]]))
    # the one axis that turns is the same for all of the video
    assert len(set(alone[0, 1:1 + N].tolist())) == 1


# 16 tokens are fewer than KEPT
@pytest.mark.parametrize("frames, height, kept", [(4, 32, vlm_tiny.KEPT), (2, 16, 16)])
def test_glimpses_are_different_tokens_of_their_own_clip_each_drawn_once(tiny, frames, height, kept):
    videos = np.random.default_rng(0).integers(0, 256, (2, frames, height, height, 3), dtype=np.uint8)
    pixels, grid = vlm_tiny.glimpses(tiny, [world.Clip(video, "", []) for video in videos],
                                    torch.Generator().manual_seed(0))
    assert grid == (frames // 2, height // 4, height // 4)
    drawn = pixels.view(2, vlm_tiny.GLIMPSES, kept, -1)
    for own, glimpses in zip(tiny.pictures.patches(videos)[0].chunk(2), drawn):
        found = [[int((own == token).all(1).nonzero()) for token in glimpse] for glimpse in glimpses]
        assert all(len(set(glimpse)) == kept for glimpse in found)
        assert len(set(map(tuple, found))) == vlm_tiny.GLIMPSES


@pytest.mark.parametrize("size",
                         [dict(frames=2, height=16, width=16), dict(frames=3, height=32, width=48),
                          dict(colour_cues=False)])
def test_other_sizes_and_worlds_are_taught_too(tiny, size):
    cfg = dataclasses.replace(CFG, world_clips=1, **size)
    loss = vlm_tiny.answer_loss(tiny, cfg, 4, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert loss.isfinite() and loss > 0


def test_a_dropped_head_says_nothing_and_the_others_make_up_for_it():
    found = vlm_tiny.drop_heads(torch.Generator().manual_seed(0), None, None, None, 1.0, torch.ones(64, 8, 4, 3)).flatten(2)
    heads = found.unflatten(-1, (4, 3))
    assert heads.unique().tolist() == pytest.approx([0, 1 / .7]) and (heads == heads[..., :1]).all()
    assert found.mean().item() == pytest.approx(1, abs=.06)


def trained(folder, cfg, steps):
    vlm = vlm_qwen.VLM.from_folder(folder)
    vlm.model.requires_grad_(True)
    vlm_tiny.train_tiny(vlm, cfg, minutes=1, steps=steps)
    return vlm


@pytest.mark.slow
def test_training_teaches_it_to_look(tmp_path, monkeypatch):
    """Its loss falls on clips that it never saw,
    and rises again when it is shown another clip than the one it is asked about."""
    vlm_tiny.write_tiny(tmp_path / "vlm", seed=0)
    cfg, before = dataclasses.replace(CFG, frames=2, two=0.0), vlm_qwen.VLM.from_folder(tmp_path / "vlm")
    vlm, glimpses = trained(tmp_path / "vlm", cfg, 120), vlm_tiny.glimpses
    loss = held_out(vlm, cfg)
    assert loss < .5 * held_out(before, cfg)

    def of_another_clip(vlm, clips, random):
        pixels, grid = glimpses(vlm, clips, random)
        return pixels.roll(2 * len(pixels) // len(clips), 0), grid  # of the next real one, or photograph
    monkeypatch.setattr(vlm_tiny, "glimpses", of_another_clip)
    assert loss < .9 * held_out(vlm, cfg)
    old = dict(before.model.named_parameters())
    assert all(not torch.equal(p, old[name])
               for name, p in vlm.model.named_parameters() if "patch_embed" in name
               or "q_proj.weight" in name)


@pytest.mark.slow
def test_the_same_steps_give_the_same_weights_and_leave_it_in_eval_mode(tmp_path):
    vlm_tiny.write_tiny(tmp_path / "vlm", seed=0)
    one, two = (trained(tmp_path / "vlm", CFG, 8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))
    assert not one.model.training


@torch.no_grad()
def held_out(vlm, cfg) -> float:
    """Loss of the answers about 16 clips that training did not draw."""
    other = dataclasses.replace(cfg, world_seed=cfg.world_seed + 1)
    return vlm_tiny.answer_loss(vlm, other, 16, np.random.default_rng(5),
                               torch.Generator().manual_seed(5)).item()


def test_measures_against_hand_counted_numbers():
    positive, objects = np.array([1, 1, 0, 0, 0], bool), np.array([1, 1, 1, 0, 0], bool)
    found = vlm_report.measures(np.array([4.0, 1.0, 2.0, 0.0, 0.0]), positive, objects)
    assert found["AUC"] == pytest.approx(5 / 6) and found["AUC objects"] == pytest.approx(1 / 2)
    assert found["pointing"] == 1.0 and found["IoU"] == pytest.approx(1 / 3)  # above 2: tokens 0 and 2
    alone = vlm_report.measures(np.array([0.0, 0, 0, 1, 0]), positive, positive)
    assert math.isnan(alone["AUC objects"]) and alone["pointing"] == 0.0


def test_layer_bands_cover_all_layers_and_name_the_default():
    found = vlm_report.bands(28)
    assert sorted(sum((layers for band, layers in found.items() if band not in ("default", "all")),
                      [])) == list(range(28)) == found["all"]
    assert found["default"] == list(range(14, 22)) and vlm_report.bands(1)["default"] == [0]
    assert vlm_report.bands(2)["default"] == [1]


def test_a_map_that_is_the_mask_wins_the_report_and_its_opposite_loses(tiny, monkeypatch):
    """The report's plumbing with a VLM that looks exactly where truth is,
    and one that looks everywhere else."""
    clips = vlm_report.held_out_clips(CFG, 6)
    grid = (2, 8, 8)

    def looking(sign):
        def ask_about(videos, fps, names, settings, kinds=(), layers=None, batch=0):
            clip = next(clip for clip in clips if clip.video is videos[0])
            maps = [data.resample(torch.from_numpy(actor.mask).float(), grid) * sign + (sign < 0)
                    for actor in clip.actors] + [torch.full(grid, .5)]
            return [[vlm_qwen.AnswerAttention("yes", m.expand(1, 3, *grid) / m.numel(), False)
                     for m in maps]]
        return ask_about
    for sign, best in ((1, True), (-1, False)):
        monkeypatch.setattr(tiny, "ask_about", looking(sign))
        rows = vlm_report.report(tiny, tiny.settings(), clips, 0)["rows"]
        value = rows["predict, layers default, subtract"]["AUC"]
        assert value > .99 if best else value < .01
    assert {"frame differences", "location prior"} <= set(rows)


def test_the_report_counts_what_is_affirmed_and_is_not_there(tiny, monkeypatch):
    clips = vlm_report.held_out_clips(CFG, 6)
    asked = []

    def ask_about(videos, fps, names, settings, **_):
        here = {actor.phenomenon for clip in clips if clip.video is videos[0] for actor in clip.actors}
        asked.append((here, names[0]))
        # one false friend
        answers = ["yes" if name in here or name == asked[0][1][-1] else "no" for name in names[0]]
        return [[vlm_qwen.AnswerAttention(answer, torch.rand(1, 3, 2, 8, 8), False)
                 for answer in (*answers, "nothing")]]
    monkeypatch.setattr(tiny, "ask_about", ask_about)
    found = vlm_report.report(tiny, tiny.settings(), clips, 0)
    wrong = [names[-1] == asked[0][1][-1] for _, names in asked]
    assert all(len(names) == len(here) + 1 and names[-1] not in here for here, names in asked)
    assert not all(wrong)
    assert found["answers that affirm what is there"] == 1
    assert found["what is not"] == pytest.approx(np.mean(wrong))


def test_divide_and_none_and_subtract_rank_a_token_differently():
    maps, background = torch.tensor([2.0, 1.0]), torch.tensor([1.5, .2])
    assert align.relative(maps, background, "none").argmax() == 0
    assert align.relative(maps, background).tolist() == pytest.approx([.5, .8])
    assert align.relative(maps, background, "divide").tolist() == pytest.approx([1 / 3, 4.0])


def test_seven_billion_parameters():
    import transformers
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(**vlm_speed.SEVEN_B, **vlm_tiny.TOKEN_IDS))
    # as Qwen2.5-VL-7B-Instruct counts itself
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(8.29e9, rel=.01)


def test_the_door_of_the_room_does_not_wait_for_transformers():
    """train.py opens map files through it, and needs no VLM for that."""
    code = "import sys, vlm; sys.exit('transformers' in sys.modules or not set(vlm.__all__) <= set(dir(vlm)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_folder_of_maps_goes_on_after_heads_could_be_chosen(tiny):
    """maps.json of older versions holds the setting; without it their folders would be refused."""
    assert tiny.identity(tiny.settings(), fps=8.0).keys() == {
        "format", "vlm", "dtype", "layers", "template", "fps", "question", "background", "answer", "words",
        "rows", "heads", "sinks"}
    assert tiny.identity(tiny.settings())["heads"] == ""
