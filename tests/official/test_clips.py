"""Official models end to end:
clips against diffusers' pipelines, the branch trained on a cache, resumed, sampled."""
import dataclasses
import gc
import json
import math
import re
import shutil
import types

import imageio.v3 as iio
import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
pytest.importorskip("ftfy", reason="needs ftfy: pip install -r requirements-extra.txt")

import common.pictures  # noqa: E402
import common.store  # noqa: E402
import official.clips  # noqa: E402
import config  # noqa: E402
import experts  # noqa: E402
import model  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from config import UserError  # noqa: E402
from helpers import resave, rewrite, sentence, tiny_official, trained_branch, words_of  # noqa: E402
from tiny_weights import LINEAGES, PROMPT, SIZE, pipeline  # noqa: E402


@pytest.mark.parity
@pytest.mark.parametrize("name, solver, steps, more", [
    ("cogvideox", "", 5, {}), ("cogvideox", "dpm", 5, {}), ("cogvideox", "dpm", 7, dict(dynamic=True)),
    ("1.5", "", 4, {}),
    ("wan", "", 6, {}), ("wan", "wan-euler", 5, {}), ("wan", "", 4, dict(negative="smoke rises")),
], ids=str)
def test_clips_are_those_of_diffusers_pipeline(weights, name, solver, steps, more):
    """The same folder, prompt and seed:
    frames in [-1, 1] differ by less than 1e-3, so bytes by one level at most."""
    folder, sizes = weights[name], dict(height=16, width=32, frames=9)
    scheduler = {"dpm": diffusers.CogVideoXDPMScheduler,
                 "wan-euler": diffusers.FlowMatchEulerDiscreteScheduler}.get(solver)
    pipe = pipeline(name, folder, scheduler)
    if solver == "wan-euler":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    extra = dict(use_dynamic_cfg=True) if more.get("dynamic") else {}
    theirs = pipe(PROMPT, more.get("negative", ""), height=16, width=32, num_frames=9,
                  num_inference_steps=steps, guidance_scale=4.0,
                  generator=torch.Generator().manual_seed(3), output_type="np", **extra).frames[0]
    one = official.clips.OfficialModel(folder, solver=solver, dynamic=more.get("dynamic", False), **sizes)
    ours, _ = next(sample.generate(one, [PROMPT], seed=3, steps=steps, guidance=4.0,
                                   negative=more.get("negative", "")))
    assert ours.shape == theirs.shape and ours.std() > 2
    assert np.abs(ours / 255 - theirs).max() < 0.5 / 255 + 1e-3


USUAL = {  # fields of either lineage's schedule, each with another value than the one that is taken
    "cogvideox": dict(prediction_type="epsilon", beta_start=0.0001, beta_end=0.02, beta_schedule="linear",
                      num_train_timesteps=500, timestep_spacing="leading", rescale_betas_zero_snr=False,
                      trained_betas=[0.1], set_alpha_to_one=False, snr_shift_scale=0,
                      _class_name="DDIMScheduler"),
    "wan": dict(prediction_type="epsilon", num_train_timesteps=500, use_flow_sigmas=False,
                use_karras_sigmas=True, use_exponential_sigmas=True, use_beta_sigmas=True,
                use_dynamic_shifting=True, shift_terminal=0.1, solver_order=3, solver_type="bh1",
                predict_x0=False, lower_order_final=False, disable_corrector=[0], thresholding=True,
                final_sigmas_type="sigma_min", flow_shift=-3.0, _class_name="CogVideoXDDIMScheduler"),
}
SMALL = dict(frames=9, height=16, width=32)


@pytest.mark.parametrize("name, field", [(name, field) for name in USUAL for field in USUAL[name]])
def test_a_schedule_that_is_not_followed_is_refused_by_its_field(weights, tmp_path, name, field):
    folder = shutil.copytree(weights[name], tmp_path / "w")
    value = USUAL[name][field]
    rewrite(folder / "scheduler" / "scheduler_config.json", **{field: value})
    said = sentence(official.clips.OfficialModel, folder, **SMALL)
    assert repr(value) in said and (field in said or field == "_class_name")


@pytest.mark.parametrize("value", [0, -1, None, True, "3", math.inf, math.nan])
def test_a_shift_is_a_number_above_zero(weights, tmp_path, value):
    folder = shutil.copytree(weights["wan"], tmp_path / "w")
    rewrite(folder / "scheduler" / "scheduler_config.json", flow_shift=value)
    assert "flow_shift" in sentence(official.clips.OfficialModel, folder, **SMALL)


def test_what_a_schedule_does_not_say_has_diffusers_defaults(weights, tmp_path):
    folder = shutil.copytree(weights["cogvideox"], tmp_path / "w")
    path = folder / "scheduler" / "scheduler_config.json"
    told = json.loads(path.read_text())
    spacing = told.pop("timestep_spacing")
    path.write_text(json.dumps(told))
    assert "timestep_spacing = 'leading'" in sentence(official.clips.OfficialModel, folder, **SMALL)
    told.pop("snr_shift_scale")
    path.write_text(json.dumps(told | {"timestep_spacing": spacing}))
    ours = official.clips.OfficialModel(folder, **SMALL).process.alpha_bar
    theirs = diffusers.CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
    assert torch.allclose(ours.double(), theirs.double(), atol=1e-6)
    path.unlink()
    assert "scheduler_config.json" in sentence(official.clips.OfficialModel, folder, **SMALL)


@pytest.mark.parity
@pytest.mark.parametrize("solver", ["", "dpm"])
def test_steps_that_include_the_first_entry_of_the_table_are_those_of_diffusers(weights, tmp_path, solver):
    """The first files of CogVideoX say "linspace", and diffusers does so."""
    folder = shutil.copytree(weights["cogvideox"], tmp_path / "w")
    rewrite(folder / "scheduler" / "scheduler_config.json", timestep_spacing="linspace")
    pipe = pipeline("cogvideox", folder, diffusers.CogVideoXDPMScheduler if solver else None)
    theirs = pipe(PROMPT, "", height=16, width=32, num_frames=9, num_inference_steps=6, guidance_scale=4.0,
                  generator=torch.Generator().manual_seed(3), output_type="np").frames[0]
    one = official.clips.OfficialModel(folder, solver=solver, **SMALL)
    ours, _ = next(sample.generate(one, [PROMPT], seed=3, steps=6, guidance=4.0))
    assert np.abs(ours / 255 - theirs).max() < 0.5 / 255 + 1e-3
    for steps in (1, 6, 7, 50, 61, 333):
        pipe.scheduler.set_timesteps(steps)
        assert [step.model_time for step in one.process.plan(steps, "ddim")] == pipe.scheduler.timesteps.tolist()


def test_a_schedule_is_followed_by_the_fields_of_its_own_class(weights, tmp_path):
    folder = shutil.copytree(weights["wan"], tmp_path / "w")
    told = dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=7.0, flow_shift=3.0)  # left over
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(told))
    one = official.clips.OfficialModel(folder, **SMALL)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    theirs.set_timesteps(5)
    ours = torch.tensor([float(t) for t in one.process.times(5, one.solver)][:5])
    assert one.solver == "wan-euler" and torch.allclose(ours.double(), theirs.sigmas[:5].double(), atol=1e-6)
    path.write_text(json.dumps(told | {"stochastic_sampling": True}))
    assert "stochastic_sampling" in sentence(official.clips.OfficialModel, folder, **SMALL)


@pytest.mark.parametrize("rotary, shift", [(True, 1.0), (False, 3.0)])
def test_without_a_schedule_cogvideox_2b_has_its_own_shift(weights, tmp_path, rotary, shift):
    folder = shutil.copytree(weights["cogvideox"], tmp_path / "w")
    shutil.rmtree(folder / "scheduler")
    rewrite(folder / "transformer" / "config.json", use_rotary_positional_embeddings=rotary)
    assert official.clips.OfficialModel(folder, **SMALL).cfg.snr_shift == shift


@pytest.mark.parametrize("name, most", [("cogvideox", 226), ("wan", 512)])
def test_prompts_that_are_cut_are_counted(weights, capsys, name, most):
    one = official.clips.OfficialModel(weights[name], **SMALL)
    one.read(["ball " * 600] * 2 + ["a red ball", ""])
    assert f"1 of 3 prompts have more than {most} tokens and are cut" in capsys.readouterr().err
    one.read(["a red ball", ""])
    assert not capsys.readouterr().err


def test_a_run_does_not_go_on_beside_other_official_weights(weights, caches, tmp_path):
    folder = shutil.copytree(weights["wan"], tmp_path / "w")
    cfg = settings("wan", dict(wan=folder), caches, tmp_path / "run")
    train.main(dataclasses.replace(cfg, stop_at=3))
    published = (tmp_path / "run" / "branch.safetensors").read_bytes()
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    right = path.read_bytes()
    resave(path, lambda tensor: tensor * 1.01)
    stored = checkpoint(tmp_path / "run", 3)
    assert "others than those" in sentence(train.main, dataclasses.replace(cfg, resume=True))
    assert (tmp_path / "run" / "branch.safetensors").read_bytes() == published
    stored.pop("weights")  # as runs before had it: not known, so not refused
    train.State(cfg, 0).load_state_dict(stored)
    path.write_bytes(right)
    train.main(dataclasses.replace(cfg, resume=True))
    assert checkpoint(tmp_path / "run")["step"] == 6


def settings(lineage, folders, filled, out, **fields):
    quick = dict(physics_steps=6, warmup=1, physics_lr=1e-2, log_every=1, eval_every=3, save_every=100,
                 val_clips=2)
    places = dict(weights=str(folders[lineage]), cache=str(filled[lineage]), out_dir=str(out))
    return config.check(tiny_official(lineage,
                                      **{**SIZE, **quick, **places, "checkpointing": True, **fields}))


def checkpoint(run, step=6):
    return torch.load(run / "checkpoints" / f"step{step:06d}.pt", weights_only=True)


@pytest.mark.parametrize("name", LINEAGES)
def test_the_branch_trains_on_a_cache_resumes_to_the_bit_and_samples(weights, caches, tmp_path, name):
    cfg = settings(name, weights, caches, tmp_path / "whole")
    train.main(cfg)
    whole = checkpoint(tmp_path / "whole")
    assert not any(key.startswith("backbone.")
                   for key in whole["model"]), "frozen official weights are not stored again"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 6
    assert all(line["loss"] > 0 for line in lines if "loss" in line) and "held_out" in lines[-1]

    half = dataclasses.replace(cfg, out_dir=str(tmp_path / "half"))
    train.main(dataclasses.replace(half, stop_at=3))
    train.main(dataclasses.replace(half, resume=True))
    again = checkpoint(tmp_path / "half")
    assert all(torch.equal(value, again[part][key]) for part in ("model", "ema")
               for key, value in whole[part].items())
    published = [tmp_path / run / "branch.safetensors" for run in ("whole", "half")]
    assert published[0].read_bytes() == published[1].read_bytes()

    with pytest.raises(UserError, match="--weights"):
        sample.load_run(tmp_path / "whole")
    size = dict(frames=9, height=16, width=32)
    loaded = official.clips.OfficialModel(weights[name], branch=str(published[0]), **size)
    bare = official.clips.OfficialModel(weights[name], **size)
    assert isinstance(loaded.net, experts.ProPhy) and loaded.net.semantic.basis.width.abs().max() > 0
    clips = [next(sample.generate(one, [PROMPT], steps=3, guidance=6))[0] for one in (loaded, bare)]
    assert clips[0].shape == clips[1].shape == (9, 16, 32, 3) and not np.array_equal(*clips)


def test_checkpointing_goes_through_the_blocks_again_and_changes_no_bit(
        weights, caches, tmp_path, monkeypatch):
    calls, attend = {True: 0, False: 0}, model.attend

    def counted(*args):
        calls[flag] += 1
        return attend(*args)
    monkeypatch.setattr(model, "attend", counted)
    for flag in (True, False):
        train.main(settings("wan", weights, caches, tmp_path / str(flag), checkpointing=flag))
    # self- and cross-attention of the two physical blocks, and of the backbone block between them
    again = 2 * 2 + 2
    assert calls[True] - calls[False] == 6 * again
    a, b = checkpoint(tmp_path / "True"), checkpoint(tmp_path / "False")
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())


def test_the_best_weights_are_published_and_a_finished_run_that_lost_them_makes_them_again(
        weights, caches, tmp_path, capsys):
    cfg = settings("wan", weights, caches, tmp_path, eval_every=2)
    train.main(cfg)
    about, stored = common.store.read_about(tmp_path / "branch.safetensors"), checkpoint(tmp_path)
    scores = {line["step"]: line["held_out"]["diffusion"]
              for line in map(json.loads, (tmp_path / "log.jsonl").open()) if "held_out" in line}
    assert about["held_out"] == min(scores.values()) == scores[about["step"]]
    assert not (tmp_path / "checkpoints" / "best.pt").exists()
    kept = json.loads((tmp_path / "config.json").read_text())
    assert about["categories_present"] == kept["categories_present"]
    card = (tmp_path / "README.md").read_text()
    assert f"{min(scores.values()):.4f}" in card and "license: unknown" in card
    assert f"--weights {cfg.weights} --branch {tmp_path / 'branch.safetensors'}" in capsys.readouterr().out

    (tmp_path / "branch.safetensors").unlink()
    train.main(dataclasses.replace(cfg, resume=True))
    tensors, about = common.store.read_tensors(tmp_path / "branch.safetensors")
    assert (about["step"], about["held_out"]) == (6, scores[6])
    assert tensors.keys() == stored["ema"].keys()
    assert all(torch.equal(value, stored["ema"][key]) for key, value in tensors.items())


def test_a_backbone_that_was_trained_along_is_not_published(weights, caches, tmp_path):
    train.main(settings("wan", weights, caches, tmp_path, freeze_backbone=False, physics_steps=3))
    assert (tmp_path / "checkpoints" / "best.pt").exists() and not (tmp_path / "branch.safetensors").exists()


@pytest.mark.parametrize("name", LINEAGES)
def test_a_bf16_backbone_with_a_float32_branch_trains(weights, caches, tmp_path, name):
    """As on a GPU: frozen weights stored in half the room; what trains, and its averages, stay float32."""
    train.main(settings(name, weights, caches, tmp_path, precision="bf16", lora_rank=2))
    stored = checkpoint(tmp_path)
    assert all(value.dtype == torch.float32 for part in ("model", "ema") for value in stored[part].values())
    assert stored["model"]["semantic.basis.width"].abs().max() > 0
    assert any(key.endswith(".up") and value.abs().max() > 0 for key, value in stored["model"].items())


def test_lora_alone_trains_its_corrections_only(weights, caches, tmp_path):
    train.main(settings("cogvideox", weights, caches, tmp_path, physical_blocks="", lora_rank=2))
    stored = checkpoint(tmp_path)["model"]
    assert stored and all(key.endswith((".down", ".up")) for key in stored)
    assert all(value.abs().max() > 0 for key, value in stored.items())


def test_what_does_not_fit_is_one_sentence(weights, caches, tmp_path):
    for fields, word in ((dict(depth=4), "--depth"), (dict(cache=str(caches["wan"])), "lineage"),
                         (dict(weights=str(tmp_path / "none")), "none"),
                         (dict(cache=str(tmp_path / "none")), "none"), (dict(frames=13), "frames")):
        with pytest.raises(UserError, match=word):
            train.main(settings("cogvideox", weights, caches, tmp_path / "run", **fields))
    for fields, word in ((dict(lora_targets="to_q,nothing"), "--lora_targets"),
                         (dict(frames=10), "1 \\+ 4 m"), (dict(cache=""), "--cache"),
                         (dict(base_steps=5), "--base_steps"), (dict(width=40), "16")):
        with pytest.raises(UserError, match=word):
            settings("cogvideox", weights, caches, tmp_path / "run", **fields)


def test_sample_command_with_official_weights(weights, tmp_path, capsys):
    sample.main(["--weights", str(weights["wan"]), "--prompt", PROMPT, "--steps", "2", "--frames", "9",
                 "--height", "16", "--width", "32", "--out", str(tmp_path / "c.gif")])
    assert iio.imread(tmp_path / "c.gif").shape == (9, 16, 32, 3) and "wrote" in capsys.readouterr().out
    for flags, word in ((["--solver", "dpm"], "dpm"), (["--dynamic"], "CogVideoX"),
                        (["--frames", "8"], "1 \\+ 4 m"), (["--invert_experts"], "--branch"),
                        (["--run", "."], "not both"), (["--show_routing"], "needs a branch")):
        with pytest.raises(UserError, match=word):
            sample.main(["--weights", str(weights["wan"]), "--prompt", PROMPT, "--height", "16", "--width",
                         "32", *flags])
    with pytest.raises(UserError, match="--weights"):
        sample.main(["--prompt", PROMPT])


# --- routing pictures, and folders of clips -----------------------------------------------------------------
WIDE = dict(frames=9, height=32, width=64)  # three latent frames of 2 x 4 tokens


@pytest.fixture
def branches(weights, tmp_path):
    """{lineage: a branch beside the tiny weights}, whose captions were labelled with categories 0 and 4."""
    gc.freeze()  # the writer of films collects garbage each time
    made = {}
    for name, more in (("wan", {}), ("cogvideox", {}), ("1.5", dict(patch_t=2, positions="integer"))):
        lineage = "wan" if name == "wan" else "cogvideox"
        places = dict(weights=str(weights[name]), cache="none", out_dir=str(tmp_path / f"{name}_run"))
        trained_branch(tiny_official(lineage, **places, **more))
        made[name] = tmp_path / f"{name}_run" / "branch.safetensors"
    yield made
    gc.unfreeze()


def call(weights, name, *argv, size=WIDE):
    sample.main([*words_of(dict(weights=weights[name], prompt=PROMPT, steps=3, seed=2, **size)), *map(str, argv)])


@pytest.fixture
def saved(monkeypatch):
    """What the command would write."""
    found = []
    monkeypatch.setattr(sample, "save", lambda path, frames, fps: found.append((path, frames, fps)))
    return found


@pytest.mark.parametrize("name, token, lit", [
    ("wan", 0, [0]), ("wan", 2, [5, 6, 7, 8]), ("cogvideox", 1, [1, 2, 3, 4]),
    ("1.5", 0, [0]), ("1.5", 1, list(range(1, 9)))])  # pairs of latents, the first pair half padding
def test_a_planted_map_glows_over_its_token_and_over_the_frames_that_its_latents_decode_to(
        weights, branches, saved, monkeypatch, name, token, lit):
    forward = experts.ProPhy.forward

    def planted(self, *args, **named):
        out, routing = forward(self, *args, **named)
        grid = routing.refinement_lift.view(-1, 2 if name == "1.5" else 3, 2, 4, 17)
        grid.zero_()
        grid[:, token, 1, 3, 4] = 1  # the second of the two phenomena
        return out, routing
    monkeypatch.setattr(experts.ProPhy, "forward", planted)
    call(weights, name, "--branch", branches[name], "--show_routing", "--out", "clip.mp4")
    (_, frames, fps), = saved
    one = official.clips.OfficialModel(weights[name], branch=str(branches[name]), **WIDE)
    clip, routing = next(sample.generate(one, [PROMPT], seed=2, steps=3, guidance=one.cfg.guidance))
    assert len(frames) == 9 and fps == one.cfg.fps

    # The picture: the clip twice as large; below, as large as it is, the maps of both phenomena.
    gap, line = common.pictures.GAP, common.pictures.LINE
    assert np.array_equal(frames[:, gap + line + 2:][:, :64, gap:gap + 128], common.pictures.enlarge(clip, 2))
    below = frames[:, -gap - 32 - gap:][:, :32]  # a row of maps ends in a gap of its own
    dark = common.pictures.overlay(clip, np.zeros((9, 2, 4)), 1)
    plates = below[:, :, gap:gap + 64]
    assert (plates[..., 0] == plates[0, ..., 0]).all()  # "not seen" does not move
    glows = (below[:, :, 2 * gap + 64:][:, :, :64] != dark).any(-1)
    expected = np.zeros((9, 32, 64), bool)
    expected[lit, 16:, 48:] = True
    assert np.array_equal(glows, expected)
    assert routing.semantic.shape == (4,) and 0 < routing.t < 1


def test_latents_decode_to_the_frames_that_their_maps_are_laid_over(weights):
    """Wan's VAE is causal: a latent changes no frame before its own. Twice as many of one that begins with four."""
    one = official.clips.OfficialModel(weights["wan"], **WIDE)
    one.read([PROMPT])
    lift = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    routing = common.pictures.ClipRouting(lift, None, 0.5)
    number = one.shown(np.zeros((9, 32, 64, 3), np.uint8), routing)[1].lift.flatten()
    latent = torch.randn(1, 4, 3, 4, 8)
    plain = one.vae.decode(latent)
    for k in range(3):
        other = latent.clone()
        other[:, :, k] += 1
        changed = (one.vae.decode(other) != plain).flatten(3).any(-1).any(1).flatten()
        assert changed.int().argmax() == (number == k).argmax()

    cog = official.clips.OfficialModel(weights["cogvideox"], frames=5, height=32, width=64)
    clip, _ = next(sample.generate(cog, [PROMPT], steps=2))
    assert len(clip) == 8  # two latents, as diffusers decodes an even number of them
    shown = cog.shown(clip, common.pictures.ClipRouting(lift[:2], None, 0.5))[1].lift.flatten()
    assert shown.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name, shape, small", [
    ("cogvideox-5b", (49, 480, 720), (120, 180)),
    ("cogvideox1.5-5b", (81, 768, 1360), (192, 340)), ("wan-14b", (161, 720, 1280), (90, 160))])
def test_a_picture_of_a_clip_of_full_size_is_one_that_can_be_watched(name, shape, small):
    cfg = config.preset(name, frames=shape[0], height=shape[1], width=shape[2])
    tall = np.zeros((*shape, 3), np.uint8)
    tall[:, ::2] = 200
    lift = np.ones((*cfg.grid, 29), np.float32)
    one = types.SimpleNamespace(cfg=cfg, latents=1 + (shape[0] - 1) // 4)
    clip, routing = official.clips.OfficialModel.shown(one, tall, common.pictures.ClipRouting(lift, None, 0.5))
    assert clip.shape == (shape[0], *small, 3) and (clip == 100).all()
    assert routing.lift.shape == (shape[0], *cfg.grid[1:], 29)
    frame = common.pictures.ClipRouting(routing.lift[:1], np.ones(8, np.float32) / 8, 0.5)
    cell = common.pictures.routing_cell(clip[:1], "a ball " * 30, "", 2, frame, dict(enumerate("abcdefg" * 4)))
    assert cell.size / 3 * shape[0] < common.pictures.MOST_PIXELS and min(cell.shape[1:3]) > 600


def test_official_clips_without_and_with_the_branch_and_with_edited_experts(weights, branches, saved):
    both = [next(sample.generate(official.clips.OfficialModel(weights["wan"], branch=branch, **WIDE), [PROMPT],
                                 seed=2, steps=3, guidance=5.0)) for branch in ("", str(branches["wan"]))]
    call(weights, "wan", "--branch", branches["wan"], "--with_and_without")
    gap, top = common.pictures.GAP, common.pictures.GAP + common.pictures.LINE + 2
    for i, (clip, _) in enumerate(both):
        x = gap + i * (128 + gap)
        assert np.array_equal(saved[0][1][:, top:top + 64, x:x + 128], common.pictures.enlarge(clip, 2))
    assert not np.array_equal(both[0][0], both[1][0]) and both[0][1] is None
    assert saved[0][0].parent == branches["wan"].parent / "samples"

    call(weights, "wan", "--branch", branches["wan"], "--expert", "3=+9")  # the edited clip alone, as it is
    assert saved[1][1].shape == (9, 32, 64, 3) and not np.array_equal(saved[1][1], both[1][0])
    assert "1 to 4" in sentence(call, weights, "wan", "--branch", branches["wan"], "--expert", "5=1")
    call(weights, "wan", "--branch", branches["wan"], "--expert", "3=+9", "--show_routing", "--prompt", "ice")
    assert len(saved) == 4 and saved[2][0].stem.endswith("-0")  # plain and edited in one picture, one a prompt
    assert np.array_equal(saved[2][1][:, top:top + 64, gap:gap + 128], common.pictures.enlarge(both[1][0], 2))


def test_a_router_is_needed_to_show_one(weights, tmp_path):
    run = dict(weights=str(weights["wan"]), cache="none", out_dir=str(tmp_path / "run"))
    trained_branch(tiny_official("wan", semantic=False, refinement=False, injection="plain", **run))
    path = tmp_path / "run" / "branch.safetensors"
    assert "needs a router; give --branch" in sentence(call, weights, "wan", "--branch", path, "--show_routing")


@pytest.mark.parametrize("name", LINEAGES)
def test_a_folder_of_official_clips_goes_on_to_the_bit_and_belongs_to_one_branch(
        weights, branches, tmp_path, name):
    """Whatever else is read beside a prompt changes no bit of its clip."""
    texts = [PROMPT, "ice melts", "smoke rises and bounces on the floor " * 9, "a ball is red", "the floor"]

    def fill(folder, n_prompts, *argv):
        path = tmp_path / f"{n_prompts}.txt"
        path.write_text("\n".join(texts[:n_prompts]))
        sample.main([*words_of(dict(weights=weights[name], branch=branches[name], prompts=path, out=folder, steps=2,
                                    n=2, **SMALL)), *argv])
        return {file.name: file.read_bytes() for file in folder.glob("*.mp4")}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = fill(parts, 1)
    assert len(first) == 2 and first.items() <= fill(parts, 5).items()
    next(parts.glob("ice-melts-*-1.mp4")).unlink()
    films = fill(parts, 5)
    assert films == fill(whole, 5) and len(set(films.values())) == len(films) == 10

    # Of single clips, index i of a prompt is the same.
    one = official.clips.OfficialModel(weights[name], branch=str(branches[name]), **SMALL)
    clip, _ = next(sample.generate(one, [texts[3]], indices=[1], steps=2, guidance=one.cfg.guidance))
    common.pictures.save(tmp_path / "one.mp4", clip, one.cfg.fps)
    assert next(whole.glob("a-ball-is-red-*-1.mp4")).read_bytes() == (tmp_path / "one.mp4").read_bytes()

    trained_branch(tiny_official(name, weights=str(weights[name]), cache="none", lora_rank=1,
                                 out_dir=str(tmp_path / f"{name}_run")), step=124)
    assert "step 123, not 124" in sentence(fill, whole, 5)


@pytest.mark.parametrize("preset", ["full", "wan-14b", "small", "small-wan"])
def test_dry_run_counts_without_weights(preset, capsys):
    """Forward FLOPs of the backbone against the closed formula of the architecture."""
    train.main(config.check(config.preset(preset, dry_run=True)))
    out = capsys.readouterr().out
    cfg = config.preset(preset)
    N, L, D = int(np.prod(cfg.grid)), cfg.text_len, cfg.dim
    F = cfg.ffn or 4 * D
    if cfg.lineage == "wan":
        flops = 2 * (6 * D * D + 2 * D * F) * N + 4 * D * D * L + 4 * N * N * D + 4 * N * L * D
    else:
        flops = 2 * 12 * D * D * (N + L) + 4 * (N + L) ** 2 * D
    said = float(re.search(r"backbone forward ([\d.,e-]+), step", out)[1].replace(",", ""))
    assert abs(said - cfg.depth * flops / 1e12) < 0.01 * said
    assert "141 GB: " in out and f"{N:,} video" in out


def test_a_clip_that_no_memory_holds_is_refused_before_the_weights_are_read(weights):
    said = sentence(official.clips.OfficialModel, weights["wan"], frames=16377, height=16384, width=16384)
    assert re.match("One clip needs 105,[0-9]{3} GB of memory or more", said)
