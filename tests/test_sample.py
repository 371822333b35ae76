"""sample.py: clips depend on seed and index alone,
pictures show what was generated, mistakes are one sentence."""
import csv
import dataclasses
import gc
import json
import pickle
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common.clips
import common.pictures
import physics.phenomena
import config
import data
import diffusion
import experts
import model
import helpers
import sample
from config import UserError
from helpers import PRESENT, ROOT, perturbed, write_run

CFG = config.preset("debug")  # clips of 4 x 16 x 16
PROMPTS = ["a red ball bounces", "a candle burns on the left", "blue smoke rises", "a ball",
           "a red candle on the left"]


def run_folder(folder, cfg=CFG, branch=True):
    return write_run(folder, cfg, PROMPTS, branch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("physics") / "run")


@pytest.fixture(scope="module")
def loaded(run):
    return sample.load_run(run)


def clips(loaded, prompts=PROMPTS, **settings):
    cfg, net, process, tokenizer, _ = loaded
    settings = dict(steps=4, progress=False) | settings
    one = sample.RunModel(cfg, settings.pop("model", net), process, tokenizer,
                          settings.pop("precision", "fp32"))
    videos, routings = zip(*sample.generate(one, prompts, **settings))
    return np.stack(videos), list(routings)


def levels_apart(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


# --- generate -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_clip_does_not_depend_on_its_batch(loaded, guidance):
    together, routings = clips(loaded, guidance=guidance, batch=8)
    assert together.shape == (5, CFG.frames, CFG.height, CFG.width, 3) and together.dtype == np.uint8
    assert together.std() > 20  # clips that are all black would agree too
    for batch in (1, 3):
        apart, others = clips(loaded, guidance=guidance, batch=batch)
        assert levels_apart(apart, together) <= 1
        assert all(np.allclose(a.lift, b.lift, atol=1e-4) for a, b in zip(routings, others))
    alone, _ = clips(loaded, PROMPTS[3:4], indices=[3], guidance=guidance)
    assert levels_apart(alone[0], together[3]) <= 1


def test_a_clip_depends_on_seed_index_and_prompt(loaded):
    same, _ = clips(loaded, [PROMPTS[0]] * 3, indices=[0, 1, 0])
    assert np.array_equal(same[0], same[2]) and levels_apart(same[0], same[1]) > 20
    other_seed, _ = clips(loaded, PROMPTS[:1], seed=1)
    other_prompt, _ = clips(loaded, PROMPTS[1:2])
    assert levels_apart(same[0], other_seed[0]) > 20 and levels_apart(same[0], other_prompt[0]) > 1


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guidance_against_two_separate_calls(loaded, guidance):
    cfg, net, process, tokenizer, _ = loaded
    text, length = tokenizer.encode_all(PROMPTS[1:2], cfg.text_len)
    noise = process.draw(7, [0], (3, 4, 16, 16))[1]
    nothing = torch.zeros_like(text), torch.tensor([0])
    x = process.sample(lambda x, t: (net(x, t, text, length)[0], net(x, t, *nothing)[0]), noise, 4, guidance)
    expected = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert levels_apart(clips(loaded, PROMPTS[1:2], seed=7, guidance=guidance)[0][0], expected) <= 1


def test_guidance_one_never_asks_for_the_empty_caption(loaded, monkeypatch):
    lengths, forward = [], experts.ProPhy.forward

    def spy(self, x, t, text, text_length=None, edit=None):
        lengths.extend(text_length.tolist())
        return forward(self, x, t, text, text_length, edit)

    monkeypatch.setattr(experts.ProPhy, "forward", spy)
    clips(loaded, guidance=1)
    assert len(lengths) == 5 * 4 and 0 not in lengths
    lengths.clear()
    clips(loaded, guidance=1.5)
    assert len(lengths) == 2 * 5 * 4 and lengths.count(0) == 5 * 4


def test_untrained_branch_is_the_bare_backbone(loaded):
    backbone = perturbed(model.build_backbone(CFG, len(loaded[3])))
    fresh = experts.ProPhy(backbone, CFG).eval()
    fresh.init_from_backbone()
    bare, none = clips(loaded, model=backbone)
    branched, routings = clips(loaded, model=fresh)
    assert np.array_equal(bare, branched)
    assert none == [None] * 5 and routings[0].lift.shape == (*CFG.grid, CFG.categories)


def test_routing_is_that_of_the_step_nearest_half(loaded, monkeypatch):
    cfg, net, process, tokenizer, _ = loaded
    seen, forward = {}, experts.ProPhy.forward

    def spy(self, x, t, *rest, **named):
        out = forward(self, x, t, *rest, **named)
        seen[round(t[0].item())] = out[1]
        return out

    monkeypatch.setattr(experts.ProPhy, "forward", spy)
    _, routings = clips(loaded, steps=5)
    t = routings[0].t
    # shifted by 3: 1, .92, .82, .67, .43
    nearest = sorted(process.times(5)[:-1], key=lambda time: abs(time - 0.5))[0]
    assert abs(t - nearest) < 1e-6 and abs(nearest - 3 / 7) < 1e-6 and len(seen) == 5
    for i, routing in enumerate(routings):
        expected = seen[round(1000 * t)]
        assert np.array_equal(routing.lift.reshape(-1, cfg.categories), expected.refinement_lift[i].numpy())
        assert np.array_equal(routing.semantic, expected.semantic[i].numpy())


def test_inversion_flips_the_semantic_router_and_its_clip(loaded):
    plain, routings = clips(loaded)
    inverted, flipped = clips(loaded, edit=experts.invert)
    for a, b in zip(routings, flipped):  # softmax(l) softmax(-l) is the same number for every expert
        product = a.semantic * b.semantic
        assert np.allclose(product, product[0], rtol=1e-4) and abs(a.semantic - b.semantic).max() > 1e-3
        assert np.array_equal(a.semantic.argsort(), b.semantic.argsort()[::-1])
    assert levels_apart(plain, inverted) > 1


def test_bf16_stays_near_fp32_and_nan_becomes_a_colour(loaded):
    a, b = clips(loaded)[0], clips(loaded, precision="bf16")[0]
    assert 0 < np.abs(a.astype(int) - b.astype(int)).mean() < 4
    broken = perturbed(model.build_backbone(CFG, len(loaded[3])))
    torch.nn.init.constant_(broken.proj_out.bias, float("nan"))
    assert (clips(loaded, model=broken)[0] == 128).all()


# --- run folder ---------------------------------------------------------------------------------------------
def test_load_run_takes_the_averages_where_there_are_any(run, loaded):
    cfg, net, process, tokenizer, info = loaded
    stored = torch.load(run / "checkpoints" / "step000050.pt", weights_only=True)
    assert info == dict(step=50, stage="physics", categories_present=PRESENT) and not net.training
    assert cfg == CFG
    state = net.state_dict()
    assert torch.equal(state["physical.0.ff.2.bias"], 2 * stored["model"]["physical.0.ff.2.bias"])
    assert torch.equal(state["backbone.proj_out.weight"], stored["model"]["backbone.proj_out.weight"])
    assert isinstance(process, diffusion.FlowMatching) and tokenizer.unknown("a red zebra") == ["zebra"]


def test_which_checkpoint(tmp_path):
    run = run_folder(tmp_path / "run", branch=False)
    folder = run / "checkpoints"
    stored = torch.load(folder / "step000050.pt", weights_only=True)
    for name, step in (("step1000000", 1_000_000), ("step000090", 90), ("base", 30)):
        torch.save(stored | dict(step=step), folder / f"{name}.pt")
    (folder / "step2000000.tmp").write_bytes(b"half a checkpoint")
    for name, step in (("best", 1_000_000), ("last", 1_000_000), ("base", 30), ("step000090.pt", 90)):
        assert sample.load_run(run, name)[4]["step"] == step
    torch.save(stored | dict(step=7), folder / "best.pt")
    assert sample.load_run(run)[4]["step"] == 7
    assert isinstance(sample.load_run(run)[1], model.Backbone)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def damage(kind: str, run: Path) -> None:
    path = run / "checkpoints" / "step000050.pt"
    stored = torch.load(path, weights_only=True)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(run / "bang")))
    elif kind == "torch pickle":
        torch.save(stored | dict(step=Bomb(run / "bang")), path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "missing key":
        torch.save({k: v for k, v in stored.items() if k != "ema"}, path)
    elif kind == "strange average":
        torch.save(stored | dict(ema=stored["ema"] | {"nobody.weight": torch.zeros(1)}), path)
    elif kind == "another model":
        torch.save(stored | dict(model=model.build_backbone(CFG, 9).state_dict()), path)
    elif kind == "another config":
        (run / "config.json").write_text(
            json.dumps(json.loads((run / "config.json").read_text()) | dict(dim=64)))
    elif kind == "another tokenizer":
        data.Tokenizer(["one", "two"]).save(run / "tokenizer.json")
    elif kind == "no checkpoint":
        path.unlink()
    elif kind == "no tokenizer":
        (run / "tokenizer.json").unlink()
    elif kind == "half a config":
        (run / "config.json").write_text((run / "config.json").read_text()[:100])
    elif kind == "no config":
        (run / "config.json").unlink()


@pytest.mark.parametrize("kind, sentence", [
    *[(kind, "is damaged or no checkpoint")
      for kind in ("truncated", "empty", "text", "pickle", "torch pickle")],
    *[(kind, "does not fit")
      for kind in ("list", "missing key", "strange average", "another model", "another config",
                                          "another tokenizer")],
    ("no checkpoint", "holds no checkpoint yet"), ("no tokenizer", "tokenizer.json is missing"),
    ("half a config", "is not a config"), ("no config", "is no run folder")])
def test_a_broken_run_is_one_sentence(tmp_path, kind, sentence):
    run = run_folder(tmp_path / "run")
    damage(kind, run)
    with pytest.raises(UserError, match=sentence) as e:
        sample.load_run(run)
    assert "\n" not in str(e.value) and str(run) in str(e.value)
    assert not (run / "bang").exists()  # no code of the file has run


def test_preview_shows_one_noise_without_and_with_the_branch_and_where_it_looked(loaded, tmp_path, monkeypatch):
    cfg, net, process, tokenizer, _ = loaded
    lift = np.zeros((*CFG.grid, 17), np.float32)
    lift[:, 1, 1, 4], lift[..., 3], lift[..., 11] = 0.9, 1.0, 0.2  # 3 peaks, but is not in the prompt
    generate = sample.generate

    def looked(model, *rest, **named):
        """The real clips, a routing that is known."""
        for clip, routing in generate(model, *rest, **named):
            yield clip, routing and common.pictures.ClipRouting(lift, None, 0.5)

    monkeypatch.setattr(sample, "generate", looked)
    saved = []
    monkeypatch.setattr(sample, "save_gif", lambda path, frames, fps: saved.append((frames, fps)))
    one = sample.RunModel(cfg, net, process, tokenizer)
    sample.preview("p.gif", one, {PROMPTS[0]: PRESENT})
    how = dict(seed=cfg.seed, steps=cfg.preview_steps, guidance=cfg.guidance)
    bare, _ = clips(loaded, PROMPTS[:1], model=net.backbone, **how)
    branched, _ = clips(loaded, PROMPTS[:1], **how)
    (frames, fps), = saved
    large = [common.pictures.enlarge(clip, 8) for clip in (bare[0], branched[0])]  # 16 pixels become 128
    heat = common.pictures.overlay(branched[0], lift[..., 4], 8)
    gap, top = common.pictures.GAP, common.pictures.GAP + common.pictures.LINE + 2
    for i, expected in enumerate((*large, heat)):
        x = gap + i * (128 + gap)
        assert np.array_equal(frames[:, top : top + 128, x : x + 128], expected)
    assert not np.array_equal(*large) and fps == 4  # a world clip lasts one second


def test_preview_of_stage_one_shows_single_clips(loaded, monkeypatch):
    cfg, net, process, tokenizer, _ = loaded
    saved = []
    monkeypatch.setattr(sample, "save_gif", lambda path, frames, fps: saved.append(frames))
    sample.preview("p.gif", sample.RunModel(cfg, net.backbone, process, tokenizer), {PROMPTS[0]: PRESENT})
    bare, _ = clips(loaded, PROMPTS[:1], model=net.backbone, seed=cfg.seed, steps=cfg.preview_steps,
                    guidance=cfg.guidance)
    cell = common.pictures.plain_cell(bare[0], PROMPTS[0], "", 8)
    assert np.array_equal(saved[0], common.pictures.sheet([cell]))


# --- command ------------------------------------------------------------------------------------------------
@pytest.fixture
def command(run, monkeypatch):
    """Run main in-process with a few steps; returns the frames and the rate it would save."""
    def call(*argv, folder=run):
        saved = []
        monkeypatch.setattr(sample, "save", lambda path, frames, fps: saved.append((path, frames, fps)))
        sample.main(["--run", str(folder), "--steps", "4", "--batch", "3", "--scale", "8", *argv])
        return saved[0]
    return call


def test_command_writes_the_clips_it_generated(run, loaded, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "clip.gif"
    size = ["--n", "2", "--steps", "4", "--scale", "8"]
    sample.main(["--run", str(run), "--prompt", PROMPTS[0], *size, "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    videos, _ = clips(loaded, [PROMPTS[0]] * 2)
    back, g = iio.imread(out)[..., :3].astype(int), common.pictures.GAP
    wrapped = len(common.pictures.wrap(PROMPTS[0], 128))
    assert back.shape[:3] == (4, 128 + 6 + wrapped * common.pictures.LINE + 2 * g, 2 * (128 + 2 * g))
    for i in range(2):
        shown = back[:, g : g + 128, i * (128 + 2 * g) + g :][:, :, :128]
        own, other = (np.abs(shown - common.pictures.enlarge(video, 8)).mean() for video in (videos[i], videos[1 - i]))
        assert own < other / 3


def test_command_repeats_indices_for_each_prompt(command, loaded, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    path, frames, fps = command("--prompt", PROMPTS[0], "--prompts", str(tmp_path / "prompts.txt"), "--n",
                                "2")
    videos, _ = clips(loaded, [p for p in PROMPTS[:3] for _ in range(2)], indices=[0, 1] * 3, batch=3)
    cells = [common.pictures.plain_cell(video, PROMPTS[i // 2], "", 8) for i, video in enumerate(videos)]
    assert np.array_equal(frames, common.pictures.sheet(cells, 1, 2))
    assert fps == 4 and path.name == "a-red-ball-bounces.gif" and path.parent.name == "samples"
    assert path.parent.is_dir()


def test_no_branch_is_the_backbone(command, loaded):
    _, frames, _ = command("--prompt", PROMPTS[0], "--n", "1", "--no_branch")
    videos, _ = clips(loaded, PROMPTS[:1], model=loaded[1].backbone)
    assert np.array_equal(frames, common.pictures.sheet([common.pictures.plain_cell(videos[0], PROMPTS[0], "", 8)]))
    assert not np.array_equal(frames, command("--prompt", PROMPTS[0], "--n", "1")[1])


def test_show_routing_and_inversion_side_by_side(command, loaded):
    _, frames, _ = command("--prompt", PROMPTS[0], "--n", "1", "--show_routing", "--invert_experts")
    names, cells = {i: physics.phenomena.CATEGORIES[i] for i in PRESENT}, []
    for label, edit in (("plain", None), ("inverted", experts.invert)):
        videos, routings = clips(loaded, PROMPTS[:1], edit=edit)
        cells.append(common.pictures.routing_cell(videos[0], PROMPTS[0], label, 8, routings[0], names))
        third = common.pictures.heat_map(videos[0], routings[0].lift[..., PRESENT[2]], 4)
        x = 2 * (64 + common.pictures.GAP)
        # the last of three maps
        assert np.array_equal(cells[-1][:, -64 - common.pictures.GAP : -common.pictures.GAP, x : x + 64], third)
    assert np.array_equal(frames, common.pictures.sheet(cells, 2)) and not np.array_equal(*cells)


def test_with_and_without_shows_the_bare_backbone_and_the_branch_from_one_noise(command, loaded):
    path, frames, _ = command("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--n", "1", "--with_and_without")
    bare, _ = clips(loaded, PROMPTS[:2], indices=[0, 0], model=loaded[1].backbone)
    branched, routings = clips(loaded, PROMPTS[:2], indices=[0, 0])
    names = {i: physics.phenomena.CATEGORIES[i] for i in PRESENT}
    cells = [common.pictures.comparison_cell(*row, 8, names)
             for row in zip(bare, branched, routings, PROMPTS)]
    assert np.array_equal(frames, common.pictures.sheet(cells, 1, 1)) and "with-and-without" in path.name
    top = common.pictures.LINE + 2
    assert np.array_equal(cells[0][:, top : top + 128, :128], common.pictures.enlarge(bare[0], 8))
    assert not np.array_equal(bare, branched)


def test_an_expert_raised_by_hand_gains_exactly_that_logit(run, loaded):
    flags = sample.Flags(run=str(run), expert=["3=+2", "1=-1.5", "3=1"])
    one = sample.RunModel(*loaded[:4])
    edit = sample.edit_of(flags, one, "")
    assert edit(torch.zeros(2, CFG.semantic_experts)).tolist() == [[-1.5, 0, 3, 0]] * 2
    _, plain = clips(loaded)
    _, raised = clips(loaded, edit=edit)
    for a, b in zip(plain, raised):  # softmax: odds against expert 2 grow by exp of the change
        odds = (b.semantic / b.semantic[1]) / (a.semantic / a.semantic[1])
        assert np.allclose(odds, np.exp([-1.5, 0, 3, 0]), rtol=1e-4)


def test_raised_experts_stand_beside_the_plain_clip(command, loaded):
    _, frames, _ = command("--prompt", PROMPTS[0], "--n", "1", "--expert", "3=+2", "--expert", "1=-9")
    shift = torch.tensor([-9., 0, 2, 0])
    cells = [common.pictures.plain_cell(clips(loaded, PROMPTS[:1], edit=edit)[0][0], PROMPTS[0], label, 8)
             for label, edit in (("plain", None), ("expert 3=+2 1=-9", lambda logits: logits + shift))]
    assert np.array_equal(frames, common.pictures.sheet(cells, 2)) and not np.array_equal(*cells)


def test_unknown_and_surplus_words_are_warned_of_once(command, capsys):
    command("--prompt", "a purple zebra bounces", "--prompt", "zebra " + "ball " * 30, "--n", "2",
            "--invert_experts")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]
    assert len(lines) == 2 and "purple, zebra;" in lines[0] and "bounces" not in lines[0]
    assert "24 words" in lines[1]
    command("--prompt", PROMPTS[0], "--n", "1")
    assert "Warning" not in capsys.readouterr().err


def test_folder_runs_play_at_their_own_rate(tmp_path, command):
    run = run_folder(tmp_path / "run", dataclasses.replace(CFG, data_dir="clips", fps=5.0))
    assert command("--prompt", "a ball", "--n", "1", folder=run)[2] == 5
    assert command("--prompt", "a ball", "--n", "1", "--fps", "9", folder=run)[2] == 9


@pytest.mark.parametrize("argv, sentence", [
    (["--prompt", ""], "is empty"), (["--prompt", " ...! "], "is empty"), ([], "Say what to generate"),
    (["--prompt", "a ball", "--n", "0"], "--n must be 1 or more"),
    (["--prompt", "a ball", "--n", "x"], "--n: invalid int"),
    (["--prompt", "a ball", "--steps", "0"], "--steps must be"),
    (["--prompt", "a ball", "--seed", "-1"], "--seed must be"),
    (["--prompt", "a ball", "--guidance", "nan"], "--guidance must be"),
    (["--prompt", "a ball", "--fps", "inf"], "--fps must be"),
    (["--prompt", "a ball", "--batch", "-2"], "--batch must be"),
    (["--prompt", "a ball", "--colour", "red"], "--colour"),
    (["--prompt", "a ball", "--device", "tpu"], "--device"),
    (["--prompt", "a ball", "--out", "clip.avi"], "gif or .mp4"),
    (["--prompt", "a ball", "--out", "clip"], "gif or .mp4"),
    (["--prompts", "nowhere.txt"], "cannot be read"),
    (["--prompt", "a ball", "--fps", "1e9"], "--fps must be"), (["--prompt", "a ball", "--fps", "120"], "0.01 to 100 for a .gif"),
    (["--prompt", "a ball", "--fps", "0.001", "--out", "a.mp4"], "0.01 to 1000 for a .mp4"),
    (["--prompt", "a ball", "--steps", "100000000000"], "--steps"), (["--prompt", "a ball", "--seed", str(2**65)], "--seed"),
    (["--prompt", "a ball", "--batch", str(10**23)], "--batch"), (["--prompt", "a ball", "--height", "160000"], "--height"),
    (["--prompt", "a ball", "--out", "/proc/new.gif"], "cannot be written"),
    (["--prompt", "a ball", "--out", "n" * 250 + ".gif"], "cannot be written"),
    (["--prompt", "a ball", "--checkpoint", "step000777"], "There is no"),
    (["--prompt", "a ball", "--checkpoint", "base"], "step000050.pt"),
    (["--prompt", "a ball", "--no_branch", "--show_routing"], "leaves out"),
    (["--prompt", "a ball", "--no_branch", "--invert_experts"], "leaves out"),
    (["--prompt", "a ball", "--no_branch", "--with_and_without"], "leaves out"),
    (["--prompt", "a ball", "--no_branch", "--expert", "1=2"], "leaves out"),
    (["--prompt", "a ball", "--expert", "1=2", "--invert_experts"], "Give one of"),
    (["--prompt", "a ball", "--with_and_without", "--expert", "1=2"], "Give one of"),
    (["--prompt", "a ball", "--with_and_without", "--show_routing"], "Give one of"),
    *[(["--prompt", "a ball", "--expert", bad], "must be NUMBER=CHANGE")
      for bad in ("3=x", "3", "=2", "3=nan", "3=inf", "3=1e9", "3=100", "3=+-2", "")],
    (["--prompt", "a ball", "--expert", "0=1"], "1 to 4"), (["--prompt", "a ball", "--expert", "5=1"], "1 to 4"),
    (["--prompt", "a ball", "--n", "3000"], "lower --n or --scale"),
    (["--prompt", "a ball", "--batch", "0"], "--batch must be 1 or more"),
    (["--prompt", "a ball", "--names", "vbench"], "--names is for"),
    (["--prompt", "a ball", "--names", "short"], "--names must be one of readable, vbench"),
    (["--prompt", "a ball", "--column", "text"], "--column is for")])
def test_bad_input_is_one_sentence_before_any_work(run, monkeypatch, argv, sentence):
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("it began to sample"))
    with pytest.raises(UserError) as e:
        sample.main(["--run", str(run), *argv])
    assert sentence in str(e.value) and "\n" not in str(e.value)


def test_an_out_that_cannot_be_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("it began to sample"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gif").mkdir()
    for out, sentence in (("file/clip.gif", "cannot be made"), ("folder.gif", "cannot be written")):
        with pytest.raises(UserError, match=sentence):
            sample.main(["--run", str(run), "--prompt", "a ball", "--out", str(tmp_path / out)])
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, sentence in (("empty.txt", "holds no prompt"), ("binary.txt", "as UTF-8 text")):
        with pytest.raises(UserError, match=sentence):
            sample.main(["--run", str(run), "--prompts", str(tmp_path / name)])


@pytest.mark.parametrize("argv", ["--checkpoint last", "--batch 4", "--scale 2", "--negative x --guidance 1"])
def test_a_flag_that_another_makes_idle_is_refused(argv):
    name = argv.split()[0]
    assert f"{name} changes something only without" in helpers.sentence(
        sample.main, ["--weights", "w", "--prompt", "a ball", *argv.split()])


@pytest.mark.parametrize("argv, sentence", [
    (["--expert", "3=x"], "must be NUMBER=CHANGE"), (["--no_branch", "--expert", "3=1"], "leaves out"),
    (["--with_and_without"], "needs a branch"), (["--show_routing"], "needs a branch"),
    (["--expert", "3=1"], "needs a branch")])
def test_official_weights_refuse_before_they_are_read(argv, sentence):
    assert sentence in helpers.sentence(sample.main, ["--weights", "nowhere", "--prompt", "a ball", *argv])


def test_a_file_of_prompts_has_no_byte_order_mark_and_ends_lines_at_line_ends_alone(tmp_path):
    """str.splitlines would make seven prompts of the third."""
    odd = "a ball\u2028falls\x0con\x0bthe\x1cred\x85left\u2029wall"
    (tmp_path / "p.txt").write_bytes(f"\ufeffa red ball\r\na cube\n\n{odd}\r a disc ".encode())
    flags = sample.Flags(run="r", prompts=str(tmp_path / "p.txt"))
    assert sample.all_prompts(flags) == [(line, line) for line in ("a red ball", "a cube", odd, "a disc")]


def test_flags_that_the_model_cannot_serve_are_refused(tmp_path):
    base = run_folder(tmp_path / "base", branch=False)
    fine = run_folder(tmp_path / "fine", dataclasses.replace(CFG, semantic=False))
    vpred = run_folder(tmp_path / "vpred", dataclasses.replace(CFG, process="vpred", predict="v"))
    lora = run_folder(tmp_path / "lora", dataclasses.replace(CFG, lora_rank=2))
    along = run_folder(tmp_path / "along", dataclasses.replace(CFG, freeze_backbone=False))
    for run, flags, sentence in ((base, ["--show_routing"], "needs a router"),
                                 (base, ["--invert_experts"], "semantic router"),
                                 (base, ["--expert", "1=2"], "semantic router"),
                                 (fine, ["--expert", "1=2"], "semantic router"),
                                 (base, ["--with_and_without"], "needs a branch"),
                                 (lora, ["--with_and_without"], "Stage two changed the backbone"),
                                 (along, ["--no_branch"], "Stage two changed the backbone"),
                                 (fine, ["--invert_experts"], "semantic router"),
                                 (vpred, ["--steps", "1001"], "1000")):
        with pytest.raises(UserError, match=sentence):
            sample.main(["--run", str(run), "--prompt", "a ball", *flags])


# --- a folder of clips --------------------------------------------------------------------------------------
TABLE = [("A ball, red; it's \"fast\"", "a red ball bounces"), ("wet/dry " * 40, "blue smoke rises"),
         ("红球", "a candle burns on the left"), ("a ball", "a ball")]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "table.csv"
    gc.freeze()  # the writer of films collects garbage each time
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("caption", "longer"), *TABLE])
    yield path
    gc.unfreeze()


def fill(run, table, out, **flags):
    """Fill a folder; returns the rows of its table."""
    flags = dict(run=run, prompts=table, out=out, n=2, steps=3, scale=2) | flags
    if str(flags["prompts"]).endswith(".csv"):
        flags.setdefault("column", "longer")
    sample.main(helpers.words_of(flags))
    with open(Path(out) / "clips.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def films(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.mp4")}


def test_a_folder_holds_each_clip_by_its_seed_and_index_and_says_what_it_is(run, table, loaded, tmp_path):
    rows = fill(run, table, tmp_path / "clips", seed=5)
    assert [(row["caption"], row["prompt"]) for row in rows] == [pair for pair in TABLE for _ in range(2)]
    assert [row["index"] for row in rows] == ["0", "1"] * 4 and {row["seed"] for row in rows} == {"5"}
    videos, _ = clips(loaded, [row["prompt"] for row in rows], indices=[0, 1] * 4, seed=5, steps=3)
    distance = np.zeros((8, 8))
    for i, row in enumerate(rows):
        shown = iio.imread(row["videopath"], plugin="pyav")
        assert shown.shape == (4, 32, 32, 3)
        for j, video in enumerate(videos):
            distance[i, j] = np.abs(shown.astype(int) - common.pictures.enlarge(video, 2)).mean()
    assert (distance.argmin(1) == range(8)).all()  # an mp4 loses something, not which clip it is
    names = helpers.json_of(tmp_path / "clips" / "prompts.json")
    assert names == {Path(row["videopath"]).name: row["caption"] for row in rows}


def test_a_killed_command_goes_on_and_ends_with_the_folder_of_an_undisturbed_one(run, table, tmp_path, monkeypatch):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    fill(run, table, calm, n=6)
    flags = dict(run=run, prompts=table, out=killed, n=6, steps=3, scale=2, column="longer")
    assert helpers.killed_when(lambda: len(films(killed)) >= 2, ["sample.py", *helpers.words_of(flags)])
    first = films(killed)
    assert 2 <= len(first) < 24 and first.items() <= films(calm).items()
    (killed / f"{min(first)}.77.part").write_bytes(b"half a film")

    made, save = [], common.clips.save
    monkeypatch.setattr(common.clips, "save", lambda path, *rest: (made.append(path.name), save(path, *rest)))
    rows = fill(run, table, killed, n=6)
    assert len(made) == len(set(made)) == 24 - len(first) and not set(made) & set(first)
    assert films(killed) == films(calm) and len(rows) == 24 and not list(killed.glob("*.part"))
    made.clear()
    fill(run, table, killed, n=6)
    assert not made  # nothing is left to do


@pytest.mark.slow
def test_processes_of_torchrun_share_a_folder(run, table, tmp_path):
    rows = fill(run, table, tmp_path / "alone")
    flags = dict(run=run, prompts=table, out=tmp_path / "shared", n=2, steps=3, scale=2, column="longer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", "sample.py"]
    done = subprocess.run([*command, *helpers.words_of(flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("4 clips, 0 of them") == 2, done.stderr
    alone, shared = (helpers.files_of(tmp_path / name) for name in ("alone", "shared"))
    assert shared.keys() == alone.keys()  # no lock stays behind
    for name in alone.keys() - {"clips.csv"}:
        assert shared[name] == alone[name], name
    assert fill(run, table, tmp_path / "shared") == [
        row | {"videopath": row["videopath"].replace("alone", "shared")} for row in rows]


def test_a_share_of_a_folder_is_every_second_clip(run, table, tmp_path, monkeypatch):
    whole = [Path(row["videopath"]).name for row in fill(run, table, tmp_path / "whole", n=1)]
    for number in range(2):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        rows = fill(run, table, tmp_path / "shared", n=1)
        made = whole[::2] if number == 0 else whole
        assert [Path(row["videopath"]).name for row in rows] == made and set(films(tmp_path / "shared")) == set(made)
    with common.clips.only_writer(tmp_path / "shared"):
        monkeypatch.setenv("RANK", "0")  # the other share is free, the folder as a whole is not
        fill(run, table, tmp_path / "shared", n=1)
        monkeypatch.delenv("WORLD_SIZE")
        assert "Another process fills" in helpers.sentence(fill, run, table, tmp_path / "shared", n=1)


def test_more_rows_and_more_clips_leave_what_is_there(run, table, tmp_path, capsys):
    few = tmp_path / "few.csv"
    few.write_bytes(b"".join(table.read_bytes().splitlines(True)[:2]))
    fill(run, few, tmp_path / "grown", n=1)
    first = films(tmp_path / "grown")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").glob("*.mp4")}
    assert len(first) == 1
    fill(run, table, tmp_path / "grown")
    fill(run, table, tmp_path / "whole")
    assert films(tmp_path / "grown") == films(tmp_path / "whole") and len(films(tmp_path / "whole")) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert "8 clips, 1 of them are" in capsys.readouterr().out


def test_a_file_of_lines_fills_a_folder_too_and_a_double_prompt_is_sampled_once(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a ball\na red ball bounces\n\na ball\n")
    rows = fill(run, tmp_path / "p.txt", tmp_path / "clips", names="vbench")
    assert [Path(row["videopath"]).name for row in rows] == [
        "a ball-0.mp4", "a ball-1.mp4", "a red ball bounces-0.mp4", "a red ball bounces-1.mp4"]
    assert all(row["caption"] == row["prompt"] for row in rows)
    assert "1 of 3 prompts repeat others, and are sampled once" in capsys.readouterr().out


def test_edited_experts_fill_a_folder_with_edited_clips(run, table, loaded, tmp_path):
    plain, inverted = (fill(run, table, tmp_path / name, n=1, **more)
                       for name, more in (("a", {}), ("b", dict(invert_experts="true"))))
    assert films(tmp_path / "a").keys() == films(tmp_path / "b").keys()
    videos, _ = clips(loaded, [TABLE[0][1]], edit=experts.invert, steps=3)
    shown = [iio.imread(rows[0]["videopath"], plugin="pyav").astype(int) for rows in (plain, inverted)]
    near = [np.abs(one - common.pictures.enlarge(videos[0], 2)).mean() for one in shown]
    assert near[1] < near[0]


@pytest.mark.parametrize("change, said", [
    (dict(seed=1), "seed 0, not 1"), (dict(steps=4), "steps 3, not 4"), (dict(scale=3), "scale 2, not 3"),
    (dict(guidance=2), "guidance 1.5, not 2.0"), (dict(column="caption"), "column 'longer', not 'caption'"),
    (dict(checkpoint="last"), "checkpoint 'best', not 'last'"), (dict(names="vbench"), "names"),
    (dict(precision="bf16"), "precision 'fp32', not 'bf16'"), (dict(no_branch="true"), "no_branch False, not True"),
    (dict(expert="1=2"), "expert [], not ['1=2']")])
def test_a_folder_is_not_gone_on_with_under_other_settings(run, tmp_path, monkeypatch, change, said):
    (tmp_path / "p.csv").write_text("caption,longer\na ball,a red ball\n")
    fill(run, tmp_path / "p.csv", tmp_path / "clips", n=1)
    before = helpers.files_of(tmp_path / "clips")
    monkeypatch.setattr(sample, "generate", lambda *a, **k: pytest.fail("it began to sample"))
    found = helpers.sentence(fill, run, tmp_path / "p.csv", tmp_path / "clips", **dict(n=3) | change)
    assert said in found and "give another --out" in found
    assert helpers.files_of(tmp_path / "clips") == before


def test_a_folder_belongs_to_one_state_of_its_run_wherever_one_stands(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    (tmp_path / "p.txt").write_text("a ball\n")
    fill(run, tmp_path / "p.txt", tmp_path / "clips", n=1)
    monkeypatch.chdir(tmp_path)
    assert len(fill("run", "p.txt", "clips", n=2)) == 2
    path = run / "checkpoints" / "step000050.pt"
    torch.save(torch.load(path, weights_only=True) | dict(step=90), path)
    assert "step 50, not 90" in helpers.sentence(fill, run, "p.txt", "clips", n=3)


def test_a_second_process_in_the_same_folder_is_refused(run, table, tmp_path):
    with common.clips.only_writer(tmp_path):
        assert "Another process fills" in helpers.sentence(fill, run, table, tmp_path)


@pytest.mark.slow
def test_as_a_program(run, tmp_path):
    def call(*argv):
        return subprocess.run([sys.executable, ROOT / "sample.py", *argv], capture_output=True, text=True,
                              cwd=tmp_path)
    wrong = call("--run", "nowhere", "--prompt", "a ball")
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert "nowhere" in wrong.stderr
    right = call("--run", str(run), "--prompt", "a ball", "--n", "1", "--steps", "2", "--out", "clip.mp4")
    assert right.returncode == 0 and right.stdout.strip() == "wrote clip.mp4"
    assert "Traceback" not in right.stderr
    assert len(iio.imread(tmp_path / "clip.mp4", plugin="pyav")) == CFG.frames
    (tmp_path / "p.csv").write_text("caption\n\"a ball, red\"\n")
    folder = call("--run", str(run), "--prompts", "p.csv", "--steps", "2", "--out", "clips")
    assert folder.returncode == 0 and folder.stdout.splitlines()[-1] == "wrote clips/clips.csv"
    again = call("--run", str(run), "--prompts", "p.csv", "--steps", "3", "--out", "clips")
    assert again.returncode == 2 and again.stderr == (
        "The clips in clips were made with steps 2, not 3: go on with that, or give another --out.\n")
