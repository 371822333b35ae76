"""The Qwen-VL wrapper's looking, against `output_attentions` of eager models,
`generate` and transformers' processor.

What could go wrong silently is planted on purpose, and must be noticed.
"""
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the teacher needs transformers: pip install -r requirements.txt")

from vlm import attention as vlm_attention  # noqa: E402
from vlm import maps as vlm_maps  # noqa: E402
from vlm import pixels as vlm_pixels  # noqa: E402
from vlm import qwen as vlm_qwen  # noqa: E402
from vlm import settings as vlm_settings  # noqa: E402
import seams  # noqa: E402
import teacher  # noqa: E402
from config import Stopped, UserError  # noqa: E402
from helpers import resave, rewrite, sentence, shorten  # noqa: E402
from tiny_vlm import (  # noqa: E402
    FAMILIES, PICTURES, TEMPLATE, expected, inputs_of, make_vlm, official_pixels)

pytestmark = pytest.mark.parity
FPS = 3.0


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def vlm(vlm_folders, family):
    return vlm_qwen.VLM.from_folder(vlm_folders[family])


def clip(seed=0, frames=6, height=16, width=24):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


QUESTIONS = [["where is fire?", "what?"], ["tell me about the ice and the water", "a"]]
# a special token in the midst: its row, and the row that predicts it, say nothing
ANSWER = "top <|im_start|>left"


def check_maps(vlm, eager, family, videos, fps=FPS, questions=QUESTIONS, answer=ANSWER, batch=0,
               tolerance=1e-6):
    """Do all rows of all layers look where the eager model looks?"""
    layers = list(range(vlm.n_layers))
    looks = vlm.ask(videos, fps, questions, vlm_qwen.Settings(answer=answer), vlm_settings.KINDS, layers,
                    batch)
    for video, asked, found in zip(videos, questions, looks, strict=True):
        for question, look in zip(asked, found, strict=True):
            right, _ = expected(eager[family], family, vlm.tokenizer, video, fps, question, answer)
            right = right.mean(1)  # (layers, kinds, N)
            assert look.maps.shape == (len(layers), 3, 3, 2, 3) and look.maps.dtype == torch.float32
            assert (look.maps.flatten(2) - right).abs().max() < tolerance
            assert torch.allclose(look.mass(1), right[:, 1].sum(-1), atol=1e-5)


def check_answers(vlm, eager, family, videos, fps=FPS, questions=QUESTIONS, words=12, batch=0):
    """Are the answers those of `generate`?"""
    said = vlm.ask(videos, fps, questions, vlm_qwen.Settings(words=words), batch=batch)
    for video, asked, looks in zip(videos, questions, said, strict=True):
        for question, look in zip(asked, looks, strict=True):
            inputs = inputs_of(family, vlm.tokenizer, video, fps, question)
            ids = eager[family].generate(**inputs, max_new_tokens=words,
                                         do_sample=False)[0, inputs["input_ids"].shape[1]:]
            assert look.answer == vlm.tokenizer.decode(ids, skip_special_tokens=True)


def refusal(call, *args, **kwargs):
    """The sentence with which this one clip, question or folder is refused."""
    return sentence(call, *args, error=vlm_qwen.VLMError, **kwargs)


# ------------------------------------------------------------------------------------------------- extraction
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_maps_are_those_of_output_attentions(vlm, eager, family, batch):
    """Several videos, questions of several lengths, the prefix shared: as one eager pass over everything."""
    check_maps(vlm, eager, family, [clip(0), clip(1)], batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl_moe"])
def test_other_families_that_are_built_alike(family, tmp_path):
    """Nothing in `VLM` names them: they have what is needed. (Qwen2-VL knows nothing of seconds.)"""
    vlm = vlm_qwen.VLM.from_folder(make_vlm(tmp_path, family))
    kind = transformers.AutoModelForImageTextToText
    eager = {family: kind.from_pretrained(tmp_path, attn_implementation="eager").eval()}
    check_maps(vlm, eager, family, [clip(0), clip(1)])
    check_answers(vlm, eager, family, [clip(0), clip(1)])
    assert {*FAMILIES, family} <= set(vlm_qwen.TRIED)


def test_layers_that_do_not_see_the_whole_video_are_refused(vlm_folders, tmp_path):
    """Attention in a window over the text would leave most of the video out of every map."""
    folder = Path(shutil.copytree(vlm_folders["qwen2_5_vl"], tmp_path / "sliding"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rewrite(folder / "config.json",
            text_config={**text, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 2,
                                                 "use_sliding_window": True, "sliding_window": 8})
    assert "layers are full_attention, sliding_attention" in refusal(vlm_qwen.VLM.from_folder, folder)


def test_one_question_about_one_video(vlm, eager, family):
    check_maps(vlm, eager, family, [clip(2)], questions=[["where is the fire?"]], answer="left")


def test_settings_choose_rows_and_layers(vlm):
    """`ask` without kinds and layers gives the part of the whole that the settings name."""
    video, asked = clip(3), [["where is the fire?"]]
    whole = vlm.ask([video], FPS, asked, vlm_qwen.Settings(answer=ANSWER), vlm_settings.KINDS,
                    list(range(5)))[0][0].maps
    for k, kind in enumerate(vlm_settings.KINDS):
        part = vlm.ask([video], FPS, asked,
                       vlm_qwen.Settings(answer=ANSWER, rows=kind, layers="1-3"))[0][0].maps
        assert part.shape == (3, 1, 3, 2, 3) and torch.allclose(part[:, 0], whole[1:4, k], atol=1e-7)
    default = vlm.ask([video], FPS, asked, vlm_qwen.Settings(answer=ANSWER))[0][0]
    # of five layers 5 // 2 up to before 4
    assert torch.allclose(default.maps[:, 0], whole[2:4, 1], atol=1e-7)
    density = whole[2:4, 1].mean(0) / whole[2:4, 1].mean(0).sum() * 18
    assert torch.allclose(default.density(), density, atol=1e-5) and abs(default.density().mean() - 1) < 1e-6
    cut = default.density(sinks=.9)
    capped = density.clamp(max=np.quantile(density.numpy(), .9))
    assert torch.allclose(cut, capped / capped.mean(), atol=1e-5)


def test_given_answers_go_to_their_questions(vlm):
    """In batches that cut across videos: as if each had been asked alone."""
    asked, answers = [["a?", "bb?"], ["c?"]], [["left", "top right"], ["low"]]
    found = vlm.ask([clip(0), clip(1)], FPS, asked, vlm_qwen.Settings(), batch=2, answers=answers)
    for video, questions, given, looks in zip((clip(0), clip(1)), asked, answers, found):
        for question, answer, look in zip(questions, given, looks, strict=True):
            alone = vlm.ask([video], FPS, [[question]], vlm_qwen.Settings(answer=answer))[0][0]
            assert look.answer == answer and torch.allclose(look.maps, alone.maps, atol=1e-6)


def test_which_layers():
    assert vlm_settings.layers_of("", 28) == list(range(14, 22))
    assert vlm_settings.layers_of("", 64) == list(range(32, 51))
    assert vlm_settings.layers_of("", 2) == [1] and vlm_settings.layers_of("", 1) == [0]
    assert vlm_settings.layers_of("3", 5) == [3]


@pytest.mark.slow
def test_answers_are_those_of_generate(vlm, eager, family):
    check_answers(vlm, eager, family, [clip(0), clip(1)])
    check_answers(vlm, eager, family, [clip(0), clip(1)], batch=1)
    # time runs past height and width
    check_answers(vlm, eager, family, [clip(4, frames=10)], fps=1.0, questions=QUESTIONS[:1])


def test_an_answer_ends_where_the_model_ends_it(vlm, eager, family):
    """Each answer's third letter made an end: `generate` stops there, and so must all, at their own time."""
    said = vlm.ask([clip(0)], FPS, [QUESTIONS[0]], vlm_qwen.Settings(words=6))[0]
    ends = sorted({vlm.tokenizer(look.answer[at]).input_ids[0] for at, look in zip((2, 4), said)})
    vlm.end_ids = set(ends)
    stopped = vlm.ask([clip(0)], FPS, [QUESTIONS[0]], vlm_qwen.Settings(words=6))[0]
    for question, look in zip(QUESTIONS[0], stopped):
        inputs = inputs_of(family, vlm.tokenizer, clip(0), FPS, question)
        ids = eager[family].generate(**inputs, max_new_tokens=6, do_sample=False,
                                     eos_token_id=ends)[0, inputs["input_ids"].shape[1]:]
        assert look.answer == "".join(vlm.tokenizer.decode(i) for i in ids.tolist() if i not in ends) != ""
    assert any(len(a.answer) < len(b.answer) for a, b in zip(stopped, said))


@pytest.mark.parametrize("fps", [1.0, 4.0, 7.5])
def test_positions_are_the_models_own(vlm, eager, family, fps, monkeypatch):
    """Of the whole prompt and answer, at several rates: those of prefix, question and answer put together."""
    seen = []
    monkeypatch.setattr(vlm_qwen.VLM, "run", lambda self, ids, places, *more, real=vlm_qwen.VLM.run, **named:
                        (seen.append(places), real(self, ids, places, *more, **named))[1])
    question, video = "where?", clip(4, frames=10)
    _, right = expected(eager[family], family, vlm.tokenizer, video, fps, question, "left")
    vlm.ask([video], fps, [[question]], vlm_qwen.Settings(answer="left"))
    ours = torch.cat([ids[-3:] for ids in seen], dim=2)
    assert torch.equal(ours, right)
    # time runs on past the video's height and width
    assert (right[0].diff() < 0).any() or family == "qwen3_vl" or fps > 4


def test_density_ignores_heads_that_ignore_the_video():
    """A head with a thousandth of its attention on the video weighs a thousandth."""
    maps = torch.tensor([[.5, .1, .3], [.0001, .0007, .0001]]).view(2, 1, 1, 1, 3)
    look = vlm_qwen.AnswerAttention("", maps, False)
    assert torch.allclose(look.density().flatten(), torch.tensor([.5001, .1007, .3001]) / .9009 * 3,
                          atol=1e-6)
    assert torch.allclose(look.mass(), torch.tensor([.9, .0009]))


# --------------------------------------------------------------------------------- what must not go unnoticed
TRAPS = {}  # {what is wrong: (function that plants it, families, what sees it)}


def trap(families=FAMILIES, seen_by=check_maps, **how):
    """Put the function below on the list:
    called with monkeypatch and a VLM it makes the mistake that it is named by."""
    def register(plant):
        TRAPS[plant.__name__.replace("_", " ")] = plant, families, functools.partial(seen_by, **how)
        return plant
    return register


@trap()
def frames_are_taken_for_24_a_second(patch, vlm):
    positions, prompt = vlm_qwen.VLM.positions, vlm_qwen.VLM.prompt
    patch.setattr(vlm_qwen.VLM, "positions", lambda self, ids, grid, fps: positions(self, ids, grid, 24.0))
    patch.setattr(vlm_qwen.VLM, "prompt", lambda self, text, grid, fps: prompt(self, text, grid, 24.0))


@trap(families=FAMILIES[:1])
def no_seconds_a_row(patch, vlm):
    rope = vlm.core.get_rope_index
    patch.setattr(vlm.core, "get_rope_index", lambda *a, second_per_grid_ts, **k: rope(*a, **k))


@trap()
def no_token_types(patch, vlm):
    patch.setattr(vlm_qwen.VLM, "positions",
                  lambda self, ids, grid, fps: torch.arange(len(ids)).expand(3, 1, -1))


@trap(seen_by=check_answers)
def no_mask_over_padding(patch, vlm):
    run = vlm_qwen.VLM.run
    patch.setattr(vlm_qwen.VLM, "run", lambda self, ids, places, cache, mask=None, **more:
                  run(self, ids, places, cache, **more))


@trap()
def places_of_patches_before_merging(patch, vlm):
    def positions(self, ids, grid, fps):
        thw = torch.tensor([[grid[0], 4 * grid[1], 4 * grid[2]]])
        kinds = torch.tensor([[2 * (token == self.video_id) for token in ids]])
        places, _ = self.core.get_rope_index(torch.tensor([ids]), mm_token_type_ids=kinds, video_grid_thw=thw,
                                             second_per_grid_ts=torch.tensor([2 / fps]))
        return places[..., :len(ids)]
    patch.setattr(vlm_qwen.VLM, "positions", positions)


@trap()
def a_grid_before_merging(patch, vlm):
    vlm.pictures = dataclasses.replace(vlm.pictures, merge=1)


@trap()
def special_tokens_are_kept(patch, vlm):
    vlm.special_ids = set()


@trap()
def rows_one_too_late(patch, vlm):
    rows_of = vlm_qwen.VLM.rows_of
    patch.setattr(vlm_qwen.VLM, "rows_of",
                  lambda self, kind, s, a: [row + 1 for row in rows_of(self, kind, s, a)])


@trap(families=FAMILIES[1:])
def a_run_of_columns(patch, vlm):
    prefill = vlm_qwen.VLM.prefill

    def run(self, videos, fps):
        prefix = prefill(self, videos, fps)
        together = prefix.video_at[-1] - torch.arange(len(prefix.video_at)).flip(0)
        return dataclasses.replace(prefix, video_at=together)
    patch.setattr(vlm_qwen.VLM, "prefill", run)


@trap()
def groups_of_heads_dealt_in_turn(patch, vlm):
    maps_of = vlm_attention.RowMaps.maps_of
    patch.setattr(vlm_attention.RowMaps, "maps_of", lambda self, rows, query, key, scaling:
                  maps_of(self, rows, query[[0, 2, 1, 3]], key, scaling))


@trap(families=FAMILIES[1:])
def no_norm_of_queries(patch, vlm):
    for name, parameter in vlm.model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data.fill_(1)


@trap()
def pixels_in_rows_not_in_merged_cells(patch, vlm):
    patches = vlm_pixels.Pictures.patches

    def rows(self, videos, device):
        pixels, (t, h, w) = patches(self, videos, device)
        x = pixels.view(-1, h // 2, w // 2, 2, 2, pixels.shape[1]).transpose(2, 3)
        return x.reshape(len(pixels), -1), (t, h, w)
    patch.setattr(vlm_pixels.Pictures, "patches", rows)


@trap()
def owners_in_disorder(patch, vlm):
    fork = vlm_qwen.VLM.fork
    patch.setattr(vlm_qwen.VLM, "fork", lambda self, prefix, owners: fork(self, prefix, owners[::-1]))


@trap()
def time_axis_of_the_answer_starts_anew(patch, vlm):
    padded = vlm_qwen.VLM.padded

    def anew(self, prefix, tails):
        ids, places = padded(self, prefix, tails)
        return ids, places - places[:, :, :1]
    patch.setattr(vlm_qwen.VLM, "padded", anew)


@trap()
def the_mask_is_not_registered(patch, vlm):
    masks = transformers.AttentionMaskInterface()
    without = {name: mask for name, mask in masks.items() if name != vlm_attention.ATTENTION}
    patch.setattr(transformers.AttentionMaskInterface, "_global_mapping", without)


@pytest.mark.parametrize("mistake, family",
                         [(name, family) for name, (_, of, _) in TRAPS.items() for family in of])
def test_mistakes_that_say_nothing_are_noticed(vlm_folders, eager, family, mistake, monkeypatch):
    plant, _, seen_by = TRAPS[mistake]
    vlm = vlm_qwen.VLM.from_folder(vlm_folders[family])
    check = functools.partial(seen_by, vlm, eager, family, [clip(0), clip(1)])
    check()
    with monkeypatch.context() as patch:
        plant(patch, vlm)
        with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError, UserError)):
            check()


# ----------------------------------------------------------------------------------------------------- memory
MEMORY = """
from vlm import qwen as vlm_qwen
import os, resource, sys, numpy as np, torch
torch.set_num_threads(1)
import teacher
vlm = vlm_qwen.VLM.from_folder(sys.argv[1])
video = np.random.default_rng(0).integers(0, 256, (20, 56, 56, 3), dtype=np.uint8)  # 1,960 tokens
settings = vlm_qwen.Settings(answer="on the left", question="", layers="0-5")
pixels, grid = vlm.pictures.patches([video])
ids, _ = vlm.prompt("?", (10, 14, 14), 2.0)

def plain(**more):
    with torch.no_grad():
        places = vlm.positions(ids, (10, 14, 14), 2.0)
        return vlm.core(input_ids=torch.tensor([ids]), position_ids=places, pixel_values_videos=pixels,
                        video_grid_thw=torch.tensor([grid]), **more)

def ours():
    vlm.ask([video], 2.0, [["what?", "where is fire?"]], settings)

def eager():
    vlm.model.set_attn_implementation({"text_config": "eager"})
    assert len(plain(use_cache=False, output_attentions=True).attentions) == 6

for run in (lambda: None, lambda: plain(use_cache=True), ours, eager):
    if not (child := os.fork()):
        run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="measures memory in forked processes")
def test_looking_takes_less_than_twice_the_memory_of_the_model(tmp_path):
    """Peaks over the loaded model, 2,000 tokens.
    That of every matrix of attention is there to show that the test could fail."""
    folder = make_vlm(tmp_path, "qwen2_5_vl", layers=6, merge=1, hidden_size=128, num_attention_heads=16,
                      num_key_value_heads=4,
                      initializer_range=.05)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES | dict(max_pixels=2**20)))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True,
                          cwd=Path(teacher.__file__).parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, plain, ours, every = map(int, done.stdout.split())
    seen = loaded, plain, ours, every
    assert loaded < plain and ours - loaded < 2 * (plain - loaded) < every - loaded, seen


# -------------------------------------------------------------------------------------------- order and grids
def still(vlm):
    """Without attention in the vision tower a token shows its own cell alone;
    windows are still sorted and put back."""
    for name, parameter in vlm.model.named_parameters():
        if "visual" in name and "attn.proj" in name:  # as the published checkpoints name it
            torch.nn.init.zeros_(parameter)


@pytest.mark.parametrize("windows", [True, False])
def test_each_cell_comes_out_at_its_place(vlm_folders, windows, monkeypatch):
    """Flip one cell of 8 x 8 pixels and two frames:
    of the map's layer 0, whose keys know one token each, that token alone moves against the rest.
    One head alone is watched: a mean over heads would move everywhere."""
    maps_of = vlm_attention.RowMaps.maps_of
    monkeypatch.setattr(vlm_attention.RowMaps, "maps_of", lambda self, rows, query, key, scaling:
                        maps_of(self, rows, query[1:2], key[:1], scaling))
    for family in FAMILIES:
        vlm = vlm_qwen.VLM.from_folder(vlm_folders[family])
        still(vlm)
        if family == "qwen2_5_vl":
            vlm.model.model.visual.fullatt_block_indexes = [] if windows else [0, 1]
        video = clip(5, frames=6, height=24, width=40)
        settings = vlm_qwen.Settings(answer="a", layers="0")
        cells = [(0, 0, 0), (0, 0, 4), (0, 2, 0), (1, 1, 3), (2, 2, 4), (2, 0, 1)]
        flipped = [video.copy() for _ in cells]
        for (t, h, w), one in zip(cells, flipped):
            one[2 * t:2 * t + 2, 8 * h:8 * h + 8, 8 * w:8 * w + 8] ^= 255
        maps = [looks[0].maps[0, 0].double()
                for looks in vlm.ask([video, *flipped], FPS, [["where?"]] * 7, settings)]
        for cell, one in zip(cells, maps[1:]):
            assert one.shape == (3, 3, 5)
            change = (one / maps[0]).log()
            change = (change - change.median()).abs()
            assert change[cell] > 1e-2 and (change > 1e-4).sum() == 1


def test_columns_of_qwen3_are_not_one_run(vlm_folders):
    for family, runs in zip(FAMILIES, (1, 3)):
        vlm = vlm_qwen.VLM.from_folder(vlm_folders[family])
        prefix = vlm.prefill([clip()], FPS)
        gaps = (prefix.video_at.diff() > 1).sum() + 1
        assert prefix.grid == (3, 2, 3) and len(prefix.video_at) == 18 and gaps == runs
        assert all(prefix.ids[i] == vlm.video_id for i in prefix.video_at)
        assert prefix.ids.count(vlm.video_id) == 18
        text = vlm.tokenizer.decode(prefix.ids)
        # middles of pairs at 3 fps: 1/6, 5/6, 3/2
        assert [f"<{s} seconds>" in text for s in ("0.2", "0.8", "1.5")] == [runs == 3] * 3


@pytest.mark.parametrize("size", [(16, 24), (19, 30), (50, 90), (7, 8), (100, 40)])
def test_pixels_are_those_of_transformers(vlm, size):
    """With and without resizing;
    the processor's bicubic filter rounds elsewhere, by a level or two at most."""
    # no overshoot is cut
    video = np.kron(clip(6, 4, 5, 5) // 2 + 64, np.ones((1, 20, 20, 1), np.uint8))[:, :size[0], :size[1]]
    pixels, grid = vlm.pictures.patches([video])
    right, right_grid = official_pixels(video)
    level = max(1 / 255 / s for s in PICTURES["image_std"])
    assert list(grid) == right_grid and pixels.shape == right.shape
    assert (pixels - right).abs().max() < (1e-5 if size == (16, 24) else 2.1 * level)
    assert (pixels - right).abs().mean() < .1 * level
    squares = np.kron(clip(6, 4, 5, 5), np.ones((1, 20, 20, 1), np.uint8))[:, :size[0], :size[1]]
    sharp, _ = vlm.pictures.patches([squares])
    mean, std = (torch.tensor(PICTURES[name]).view(3, 1) for name in ("image_mean", "image_std"))
    levels = (sharp.view(-1, 3, 32) * std + mean) * 255  # bytes again, as the processor's
    assert (levels - levels.round()).abs().max() < 1e-3 and -1e-3 < levels.min() and levels.max() < 255 + 1e-3


def test_patches_of_several_videos_and_of_odd_ones(vlm):
    odd, even = clip(7, frames=5), clip(8, frames=6)
    pixels, grid = vlm.pictures.patches([odd])
    again, same = vlm.pictures.patches([np.concatenate([odd, odd[-1:]])])
    assert grid == same == (3, 4, 6) and torch.equal(pixels, again)
    assert torch.allclose(pixels, official_pixels(odd)[0], atol=1e-5)
    both, _ = vlm.pictures.patches([even, clip(9)])
    assert torch.equal(both, torch.cat([vlm.pictures.patches([even])[0], vlm.pictures.patches([clip(9)])[0]]))


def test_the_resize_rule_is_smart_resize(vlm):
    rng = np.random.default_rng(0)
    sizes = [(480, 720), (1080, 1920), (720, 405), (14, 14), (27, 100),
             *map(tuple, rng.integers(16, 1200, (300, 2)).tolist())]
    for patch, least, most in ((14, 56 * 56, 14 * 14 * 4 * 1280), (16, 65536, 200_000), (4, 64, 4096)):
        vlm.pictures = dataclasses.replace(vlm.pictures, patch=patch, least=least, most=most)
        for height, width in sizes:
            right = seams.resize_rule(max(height, patch), max(width, patch), 2 * patch, least, most)
            assert vlm.pictures.size_for(max(height, patch), max(width, patch)) == right, (patch, height, width)
    vlm.pictures = dataclasses.replace(vlm.pictures, patch=14, least=56 * 56, most=14 * 14 * 4 * 1280)
    assert vlm.pictures.size_for(480, 720, 350_000) == (476, 728)


def test_aligned_frames_are_what_latents_show():
    pairs = vlm_maps.aligned_frames(49).reshape(-1, 2)
    assert pairs.tolist() == [[0, 0], [2, 3], *([4 * j - 2, 4 * j - 1] for j in range(2, 13))]
    assert pairs[-1].tolist() == [46, 47]
    # the latent's own middle
    assert (pairs.mean(1)[1:] == [np.mean(range(4 * j - 3, 4 * j + 1)) for j in range(1, 13)]).all()
    assert vlm_maps.aligned_frames(1).tolist() == [0, 0] and len(vlm_maps.aligned_frames(81)) == 42
    for n in (48, 50, 51, 0, -3):
        assert "1 + 4 m frames" in refusal(vlm_maps.aligned_frames, n)
        assert str(n) in refusal(vlm_maps.aligned_frames, n)
    assert vlm_maps.uniform_frames(49, 4).tolist() == [6, 18, 30, 42]
    assert vlm_maps.uniform_frames(8, 8).tolist() == list(range(8))


# ----------------------------------------------------------------------------------------------------- errors
def test_wrong_videos_are_one_sentence(vlm):
    say = functools.partial(refusal, vlm.ask, fps=FPS, questions=[["?"]])
    assert "has 1 frame(s) but the model merges 2" in say([clip(frames=1)])
    assert "got shape (6, 16, 24)" in say([clip()[..., 0]])
    assert "got shape (6, 16, 24, 4)" in say([np.zeros((6, 16, 24, 4), np.uint8)])
    assert "from 0 to 255; got float32" in say([clip() / np.float32(127.5) - 1])


def test_a_truncated_prompt_is_named(vlm, monkeypatch):
    real = type(vlm.tokenizer).__call__
    monkeypatch.setattr(type(vlm.tokenizer), "__call__",
                        lambda self, text, **k: real(self, text, **k, truncation=True, max_length=20))
    said = refusal(vlm.ask, [clip()], FPS, [["?"]])
    assert "<|video_pad|> tokens (id 4) but the video has 3x2x3 = 18 tokens. Was the prompt truncated" in said


def test_a_question_with_a_place_for_another_video_is_refused(vlm):
    assert "no single place" in refusal(vlm.ask, [clip()], FPS,
                                        [["<|vision_start|><|video_pad|><|vision_end|>?"]])


@pytest.fixture
def copy(vlm_folders, family, tmp_path):
    return Path(shutil.copytree(vlm_folders[family], tmp_path / "copy"))


def shift(folder):
    """The tokenizer of another checkpoint: the same words by other numbers."""
    tokens = json.loads((folder / "tokenizer.json").read_text())
    swap = {"<|video_pad|>": 5, "<|vision_start|>": 4}
    tokens["model"]["vocab"].update(swap)
    for token in tokens["added_tokens"]:
        token["id"] = swap.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


def spoil(folder, change):
    resave(folder / "model.safetensors", change,
           lambda name, tensor: "layers.1.self_attn.q_proj.weight" in name)


def without_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")


HARMS = {
    "nothing there": (lambda f: shutil.rmtree(f), UserError, "config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), UserError, "not JSON"),
    "another family": (lambda f: rewrite(f / "config.json", model_type="llava", text_config={}),
                       vlm_qwen.VLMError,
                       "'llava', which lacks positions along time, height and width"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), UserError, "safetensors"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), UserError, "pickled"),
    "cut short": (lambda f: shorten(f / "model.safetensors"), UserError, "damaged"),
    "a tensor gone": (lambda f: spoil(f, lambda t: None), UserError, "lacks"),
    "another shape": (lambda f: spoil(f, lambda t: t[:, :-8].contiguous()), UserError, "does not fit"),
    "NaN": (lambda f: spoil(f, lambda t: t * float("nan")), UserError, "not finite"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
                     vlm_qwen.VLMError,
                     "There is no "),
    "no words": (lambda f: (f / "tokenizer.json").write_text("{}"), UserError, "cannot be loaded"),
    "another tokenizer": (shift, vlm_qwen.VLMError,
                          "disagree on the ids of <|video_pad|> (5 and 4). "
                          "Load both from the same checkpoint"),
    "no place for a video": (without_template, vlm_qwen.VLMError, "no chat template with a place for a video"),
    "no JSON of pixels": (lambda f: (f / "preprocessor_config.json").write_text("["), UserError,
                          "preprocessor_config.json"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_broken_folders_are_one_sentence(copy, harm):
    break_it, error, words = HARMS[harm]
    break_it(copy)
    assert words in sentence(vlm_qwen.VLM.from_folder, copy, error=error)


def test_where_older_checkpoints_keep_template_and_sizes(copy):
    without_template(copy)
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (copy / "preprocessor_config.json").unlink()
    (copy / "video_preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 100, "longest_edge": 5000}}))
    vlm = vlm_qwen.VLM.from_folder(copy)
    assert vlm.template == TEMPLATE and (vlm.pictures.least, vlm.pictures.most) == (100, 5000)
    assert vlm.pictures.mean == transformers.image_utils.OPENAI_CLIP_MEAN
    assert vlm.pictures.std == transformers.image_utils.OPENAI_CLIP_STD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_are_not_finite_are_named(vlm, dtype):
    """float16 ends at 65504: weights that float32 bears overflow in it, as Qwen's activations do."""
    vlm.model.to(dtype)
    with torch.no_grad():
        weights = dict(vlm.model.named_parameters())
        name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
        weights[name].mul_(float("nan") if dtype == torch.float32 else 60000)
    said = refusal(vlm.ask, [clip()], FPS, [["?"]], vlm_qwen.Settings(answer="a", layers="0-4"))
    assert f"layer 2 is not finite ({dtype})" in said and "bfloat16" in said


def test_bf16_looks_where_float32_looks(vlm_folders, family):
    vlms = [vlm_qwen.VLM.from_folder(vlm_folders[family], dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)]
    looks = [vlm.ask([clip()], FPS, [["where?"]], vlm_qwen.Settings(answer="left"))[0][0] for vlm in vlms]
    assert looks[1].maps.dtype == torch.float32
    a, b = (look.density().flatten() for look in looks)
    assert (a - b).norm() < .15 * a.norm() and torch.nn.functional.cosine_similarity(a, b, dim=0) > .99


def test_an_empty_answer_is_empty(vlm):
    look = vlm.ask([clip()], FPS, [["?"]], vlm_qwen.Settings(answer="<|im_start|><|im_end|>"))[0][0]
    assert look.empty and look.answer == "" and (look.maps == 0).all() and look.density().isfinite().all()
    vlm.end_ids = set(range(200))  # the model ends at once
    look = vlm.ask([clip()], FPS, [["?"]], vlm_qwen.Settings())[0][0]
    assert look.empty and look.answer == ""


def test_full_memory_says_what_helps_in_order(vlm, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 97.12 GiB.\nMore lines.")
    monkeypatch.setattr(vlm_attention.RowMaps, "__call__", full)
    said = sentence(vlm.ask, [clip()], FPS, [["?", "what?"]], vlm_qwen.Settings(), error=Stopped)
    at = [said.index(word)
          for word in ("--batch 1", "--pixels", "--frames", "--dtype bf16", "--answer", "smaller VLM")]
    assert at == sorted(at) and "2 questions at once" in said and "5 layers" in said
    assert "(6, 16, 24, 3)" in said


@pytest.mark.parametrize("given, words", [
    (dict(layers="5"), "--layers is first-last, from 0 to 4 here, not '5'"), (dict(layers="3-2"), "--layers"),
    (dict(layers="a-b"), "--layers"),
    (dict(layers="-1"), "--layers"),
    (dict(rows="tokens"), "--rows must be one of question, predict, answer"),
    (dict(question="Where is {nom}?"),
     "--question has a place for {name} and {cue}, --answer for {name}, not 'nom'"),
     (dict(question="{"), "--question"),
    (dict(question="{}"), "--question"), (dict(question="{name.x}"), "--question"),
    (dict(question="{name[x]}"), "--question"),
    (dict(answer="{cue}"), "--answer for {name}, not 'cue'"),
    (dict(sinks=0.0), "--sinks"), (dict(sinks=1.5), "--sinks"), (dict(sinks=float("nan")), "--sinks"),
    (dict(words=0), "--words")])
def test_wrong_settings_are_one_sentence(vlm_folders, given, words):
    assert words in sentence(vlm_qwen.VLM.from_folder(vlm_folders["qwen2_5_vl"]).settings, **given)


@pytest.mark.parametrize("stored, ends", [(2, {0, 2}), ([2, 1], {0, 1, 2}), (None, {0})])
def test_ends_are_those_of_generation_config_and_tokenizer(copy, stored, ends):
    rewrite(copy / "generation_config.json", eos_token_id=stored)
    rewrite(copy / "config.json",
            text_config={**json.loads((copy / "config.json").read_text())["text_config"],
                         "eos_token_id": stored})
    assert vlm_qwen.VLM.from_folder(copy).end_ids == ends


def test_settings_come_from_the_folder_unless_given(copy):
    (copy / "teacher.json").write_text(json.dumps(dict(words=7, rows="answer")))
    vlm = vlm_qwen.VLM.from_folder(copy)
    assert vlm.settings(rows=None) == vlm_qwen.Settings(words=7, rows="answer")
    assert vlm.settings(rows="question", words=None).rows == "question"
    (copy / "teacher.json").write_text(json.dumps(dict(words="7", mood="good")))
    assert "mood, words" in sentence(vlm_qwen.VLM.from_folder(copy).settings)
