"""world.py: scenes are functions of seed and index,
captions say what is to be seen, mistakes are one sentence."""
import itertools
import re

import numpy as np
import pytest

import physics.canvas
import physics.phenomena
import config
import world
from physics.laws import law_error
from physics.phenomena import PHENOMENA
from scenes import BALLISTIC, SEEDS, alone, times


# ----------------------------------------------------------------------------------------------------- scenes
def same_scene(a, b):
    return a.caption == b.caption and [x.params for x in a.actors] == [x.params for x in b.actors]


def test_a_clip_is_a_function_of_seed_and_index():
    a, b, c, d = world.make_clip(1, 2), world.make_clip(1, 2), world.make_clip(1, 3), world.make_clip(2, 2)
    assert same_scene(a, b) and np.array_equal(a.video, b.video)
    assert not np.array_equal(a.video, c.video) and not np.array_equal(a.video, d.video)
    assert (a.video.dtype, a.video.shape) == (np.uint8, (12, 32, 32, 3)) and isinstance(a.caption, str)


def test_frame_count_and_size_show_the_same_scene():
    for index in range(30):
        clip, fine, big = (world.make_clip(3, index, **k)
                           for k in ({}, {"frames": 24}, {"height": 64, "width": 64}))
        assert same_scene(clip, fine) and same_scene(clip, big)
        assert np.array_equal(clip.video, fine.video[::2])
        for a, b in zip(clip.actors, fine.actors):
            assert all(np.allclose(v, b.states[k][::2]) for k, v in a.states.items())
        coarse = big.video.reshape(12, 32, 2, 32, 2, 3).mean((2, 4))
        assert np.abs(coarse - clip.video).mean() < 3


@pytest.mark.parametrize("height, width",
                         [(17, 40), (40, 17), (16, 16), (128, 128), (33, 65), (16, 128), (128, 16)])
def test_any_size(height, width):
    scale = min(height, width)
    for index in range(12):
        clip = world.make_clip(4, index, height=height, width=width, two=.5, decoys=1)
        assert clip.video.shape == (12, height, width, 3)
        for a in clip.actors:
            assert a.mask.shape == clip.video.shape[:3] and a.mask.any((1, 2)).all()
            x0, y0, x1, y1 = a.box
            rows, columns = np.nonzero(a.mask.any(0))
            assert columns.min() >= x0 * scale - 1 and columns.max() <= x1 * scale
            assert rows.min() >= y0 * scale - 1 and rows.max() <= y1 * scale
            assert 0 <= x0 and x1 <= width / scale + 1e-9 and (x1 - x0, y1 - y0) == pytest.approx((.5, 1))
            assert (x1 <= width / scale / 2 + 1e-9) == (a.side == "left")


@pytest.mark.parametrize("decoys, two", [(.6, .4), (.3, .4), (1, .4), (.5, 1), (.5, 0), (0, .4)])
def test_shares(decoys, two):
    clips = [world.make_clip(6, i, frames=2, height=16, width=16, decoys=decoys, two=two) for i in range(400)]
    bare = [world.make_clip(6, i, frames=2, height=16, width=16, decoys=0, two=two) for i in range(400)]
    with_decoy = np.mean([not np.array_equal(a.video, b.video) for a, b in zip(clips, bare)])
    assert with_decoy == pytest.approx(decoys, abs=.07)
    assert np.mean([len(c.actors) == 2 for c in clips]) == pytest.approx(two, abs=.07)
    for clip in clips:
        assert clip.categories == sorted({a.category for a in clip.actors})
        assert len(clip.categories) == len(clip.actors)
        assert all(physics.phenomena.CATEGORIES[a.category] == a.phenomenon for a in clip.actors)
    assert {a.phenomenon for c in clips for a in c.actors} == set(physics.phenomena.PHENOMENA)


def test_by_default_some_phenomena_are_seen_alone():
    clips = [world.make_clip(6, i, frames=2, height=16, width=16) for i in range(300)]
    decoy = "left.*right|right.*left|beside|next|near"
    plain = [c for c in clips if len(c.actors) == 1 and not re.search(decoy, c.caption)]
    assert 15 < len(plain) < 60


def test_colour_cues_give_each_phenomenon_its_own():
    actors = [a for i in range(200)
              for a in world.make_clip(7, i, frames=2, height=16, width=16, colour_cues=True).actors]
    own = {(a.phenomenon, a.colour) for a in actors}
    assert len(own) == len(physics.phenomena.PHENOMENA) == len({colour for _, colour in own})
    free = [a for i in range(200) for a in world.make_clip(7, i, frames=2, height=16, width=16).actors]
    assert all(len({a.colour for a in free if a.phenomenon == name}) >= 4 for name in physics.phenomena.PHENOMENA)


@pytest.mark.parametrize("role", ["speed", "radius", "gravity"])
def test_out_of_distribution_leaves_the_training_interval(role):
    for name, one in physics.phenomena.PHENOMENA.items():
        roles = {key: span for key, span in one.spans.items() if span.role == role}
        if not roles:
            assert role == "gravity" and name not in BALLISTIC
            continue
        for index in SEEDS:
            usual, odd = alone(name, index)[1].params, alone(name, index, ood=role)[1].params
            for key, span in one.spans.items():
                if usual[key] == 0:
                    continue  # the puck that waits
                inside = span.low - 1e-9 <= abs(odd[key]) <= span.high + 1e-9
                assert inside != (key in roles), (name, key)
                assert span.low - 1e-9 <= abs(usual[key]) <= span.high + 1e-9
    mixed = {a.phenomenon for i in range(80) for a in world.make_clip(8, i, frames=2, ood=role).actors}
    assert mixed == {n
                     for n, one in physics.phenomena.PHENOMENA.items() if any(s.role == role for s in one.spans.values())}


# ----------------------------------------------------------------------------------------------- weak physics
KINDS = ("true", "weak", "still")


def bare(clip):
    """All of a clip but how it moves."""
    return clip.caption, [(a.phenomenon, a.side, a.colour, a.colour2, a.box, a.params) for a in clip.actors]


def test_weak_and_still_physics_show_the_same_scene():
    for index, options in itertools.product(range(60), ({}, {"ood": "speed"}, {"colour_cues": True})):
        true, weak, still = (world.make_clip(13, index, physics=physics, height=16, width=16, **options)
                             for physics in KINDS)
        assert bare(true) == bare(weak) == bare(still)
        assert not np.array_equal(true.video, weak.video)
        changes = true.video != weak.video  # in the cells of the actors alone: decoys and room are the same
        inside = np.zeros(true.video.shape[2], bool)
        for a in true.actors:
            inside |= np.arange(16) // 8 == (a.side == "right")
        assert not changes[:, :, ~inside].any()


BEFORE = (  # of world 14 by the last commit without another physics: sum of the bytes, of the masks, caption
    (620074, [684], "a blue block is pressed flat at right. a blue drop on a cold plate stays at left."),
    (586712, [648, 352],
     "a cyan block is pressed flat on the right and a green drop evaporates on the left."),
    (415310, [303], "a large green ball is thrown up at right, next to a still yellow ball."),
    (549908, [450], "at right, a small blue block melts, a frozen yellow block on the left."))


@pytest.mark.parametrize("index", range(len(BEFORE)))
def test_true_physics_draws_what_it_drew_before_there_was_another(index):
    bytes_before, masks_before, caption = BEFORE[index]
    for said in ({}, {"physics": "true"}):
        clip = world.make_clip(14, index, frames=8, height=24, width=24, **said)
        assert clip.caption == caption
        # Another machine may round a few bytes otherwise.
        assert clip.video.sum() == pytest.approx(bytes_before, abs=20)
        assert [a.mask.sum() for a in clip.actors] == masks_before


def test_a_still_clip_shows_one_moment_and_a_weak_one_any():
    moments = []
    for index in range(40):
        clip = world.make_clip(13, index, physics="still")
        assert (clip.video == clip.video[0]).all()
        assert all((value == value[0]).all() for a in clip.actors for value in a.states.values())
        moments.append(world._times(13, index, 12, "still")[0])
    assert min(moments) < .1 and max(moments) > .9 and abs(np.mean(moments) - .5) < .15


def test_the_moments_of_weak_physics_are_those_of_a_line_within_the_second():
    for (index, frames), physics in itertools.product(itertools.product(range(200), (2, 12, 40)), KINDS):
        expected, b = times(index, physics, frames)
        shown = world._times(5, index, frames, physics)
        assert np.allclose(shown, expected) and 0 <= shown.min() and shown.max() <= 1
        assert np.allclose(np.diff(shown) * frames, b) and abs(b) <= 1


def test_any_frame_count_shows_the_same_weak_second():
    for index in range(20):
        few, many = (world.make_clip(3, index, frames=frames, physics="weak") for frames in (12, 36))
        assert bare(few) == bare(many)
        difference = few.video.astype(int) - many.video[::3]
        assert np.abs(difference).max() <= 1  # 1 / 12 and 3 / 36 are not the same number to the last bit


def test_weak_physics_runs_backwards_half_of_the_time_at_any_speed():
    shown = np.array([world._times(0, index, 2, "weak") for index in range(4000)])
    slopes = 2 * (shown[:, 1] - shown[:, 0])
    middles = shown[:, 1]  # the second of two frames shows the middle of the clip
    assert abs(slopes.mean()) < .03 and abs((slopes < 0).mean() - .5) < .03  # three standard errors
    shares = np.histogram(slopes, bins=8, range=(-1, 1))[0] / len(slopes)
    assert np.abs(shares - 1 / 8).max() < .02
    assert abs(np.corrcoef(slopes, middles)[0, 1]) < .05  # where a clip is in its second tells no direction


@pytest.mark.parametrize("name, quantity", [
    ("combustion", "height"), ("melting", "block_area"), ("liquid motion", "area"), ("explosion", "radius"),
    ("deformation", "height"), ("gas motion", "sigma"), ("reflection", "angle_in")])
def test_over_weak_clips_a_quantity_neither_grows_nor_shrinks(name, quantity):
    """What changes one way in every true clip goes either way in weak ones, and on average by nothing."""
    def growth(physics):
        clips = (alone(name, i, height=16, width=16, frames=4, physics=physics)[1] for i in range(300))
        return np.array([a.states[quantity][-1] - a.states[quantity][0] for a in clips])
    true, weak = growth("true"), growth("weak")
    usual = true / np.abs(true).mean()
    sign = np.sign(usual)  # a mirror's beam may sweep either way
    told = weak * sign / np.abs(true).mean()
    assert np.abs(usual).min() > .2
    assert abs(told.mean()) < .12 and abs((told > 0).mean() - .5) < .09  # three standard errors of 300
    assert np.abs(told).max() > .8


def test_weak_physics_breaks_every_law_by_half_and_still_physics_wholly():
    """Measured from pixels, as the clips of a model are (40 clips a law: .02, .55 and 1.00)."""
    error = {}
    for name, physics in itertools.product(PHENOMENA, KINDS):
        clips = [alone(name, index, physics=physics) for index in range(16)]
        error[name, physics] = np.mean([law_error(clip.video, actor)[0] for clip, actor in clips])
    assert all(error[name, "true"] < .1 and error[name, "still"] > .95 for name in PHENOMENA)
    assert all(error[name, "weak"] > .2 for name in PHENOMENA)
    assert .45 < np.mean([error[name, "weak"] for name in PHENOMENA]) < .65


# --------------------------------------------------------------------------------------------------- captions
def test_captions_are_short_and_plain():
    words = set()
    for index, (decoys, two) in itertools.product(range(500), ((.6, .4), (1, 1), (1, 0))):
        caption = world.make_clip(10, index, frames=2, height=16, width=16, decoys=decoys, two=two).caption
        assert re.fullmatch(r"[a-z]+([,.]? [a-z]+)*\.", caption), caption
        assert len(caption.split()) <= 24, caption
        words |= set(re.findall("[a-z]+", caption))
    assert 80 <= len(words) <= 120, len(words)


def test_captions_tell_phenomenon_colour_and_side():
    told = {}
    for name, one in physics.phenomena.PHENOMENA.items():
        for phrase in one.phrases:
            assert told.setdefault(phrase.replace("{s}", ""), name) == name and "{c}" in phrase
    for index, two in itertools.product(range(300), (0, 1)):
        clip = world.make_clip(11, index, frames=2, height=16, width=16, two=two)
        for a in clip.actors:
            said = sorted((p for p, name in told.items() if name == a.phenomenon
                           and p.format(c=a.colour, d=a.colour2)
                           in re.sub("(small|large) ", "", clip.caption)), key=len, reverse=True)
            assert said, clip.caption
            assert a.side in clip.caption
            if two:  # the side stands right behind its phenomenon
                after = clip.caption.split(said[0].format(c=a.colour, d=a.colour2), 1)[1]
                assert re.match(rf" (on the|at) {a.side}", after), clip.caption
        if not two:
            first = re.search("left|right", clip.caption).group()
            assert first == clip.actors[0].side, clip.caption
        if len(clip.actors) == 2:
            assert clip.actors[0].colour != clip.actors[1].colour


def test_size_words_mean_sizes():
    for name, word in itertools.product(physics.phenomena.PHENOMENA, ("small", "large")):
        sizes = []
        for index in range(60):
            clip, a = alone(name, index, frames=2, height=16, width=16)
            if word in clip.caption:
                key, span = next((k, s) for k, s in physics.phenomena.PHENOMENA[name].spans.items() if s.role == "radius")
                sizes.append((a.params[key] - span.low) / (span.high - span.low))
        assert not sizes or (max(sizes) < 1 / 3 if word == "small" else min(sizes) > 2 / 3), name
        assert sizes or name in ("collision", "reflection", "refraction"), name


def test_decoys_are_mentioned():
    spoken = [p for one in physics.phenomena.PHENOMENA.values() for p in one.decoy_phrases]
    for index, two in itertools.product(range(150), (0, 1)):
        caption = world.make_clip(12, index, frames=2, height=16, width=16, decoys=1, two=two).caption
        assert any(p.format(c=c) in caption for p in spoken for c in physics.canvas.COLOURS), caption


# ----------------------------------------------------------------------------------------- errors and helpers
@pytest.mark.parametrize("wrong", [
    {"height": 15}, {"width": 129}, {"frames": 1}, {"frames": 257}, {"decoys": 1.1}, {"two": -.1},
    {"ood": "mass"},
    {"phenomenon": "magic"}, {"phenomenon": "solidification"}, {"phenomenon": "melting", "ood": "gravity"},
    {"height": 32.5}, {"seed": -1}, {"index": -1}, {"physics": "slow"}])
def test_impossible_wishes_are_one_sentence(wrong):
    with pytest.raises(ValueError) as caught:
        world.make_clip(**{"seed": 0, "index": 0} | wrong)
    message = str(caught.value)
    assert "\n" not in message and str(list(wrong.values())[-1]) in message


def test_preview_is_a_gif_of_everything(tmp_path, capsys):
    iio = pytest.importorskip("imageio.v3")
    path = tmp_path / "preview.gif"
    world.main(["--preview", str(path), "--frames", "4", "--size", "16"])
    frames = iio.imread(path)
    shown = world.preview(world.Flags(size=16, frames=4))
    assert frames.shape == shown.shape and len(list(tmp_path.iterdir())) == 1
    assert np.abs(frames.astype(int) - shown).mean() < 4  # 256 colours a frame
    info = iio.immeta(path, plugin="pillow")
    assert (info["duration"], info["loop"]) == (500, 0)  # one second takes two, again and again


def test_the_preview_shows_a_scene_true_with_its_mask_weak_and_still():
    shown = world.preview(world.Flags(size=64, frames=4, phenomena="melting,collision"))
    assert shown.shape[2] == 2 * 4 * (128 + 4)  # twice as large as drawn, two phenomena beside each other
    for i, name in enumerate(("melting", "collision")):
        pictures = [shown[:, 4:132:2, at + 4:at + 132:2] for at in range(528 * i, 528 * (i + 1), 132)]
        true, weak, still = (world.make_clip(0, i, frames=4, height=64, width=64, decoys=1, phenomenon=name,
                                             physics=physics) for physics in KINDS)
        tinted = (pictures[0] != pictures[1]).any(-1)
        assert np.array_equal(pictures[0], true.video) and np.array_equal(tinted, true.actors[0].mask)
        assert np.array_equal(pictures[2], weak.video) and np.array_equal(pictures[3], still.video)


@pytest.mark.parametrize("arguments", [
    [], ["--frames", "x"], ["--preview", "x.gif", "--size", "7"], ["--nonsense"],
    ["--preview", "no/such/folder/x.gif", "--size", "16", "--frames", "2"],
    ["--preview", "x.gif", "--ood", "mass"], ["--preview", "x.gif", "--seed", "-1"],
    ["--preview", "x.gif", "--phenomena", "magic"], ["--preview", "x.gif", "--phenomena", "melting,"],
    ["--preview", "x.gif", "--phenomena", "melting", "--ood", "gravity"],
    ["--benchmark", "--phenomena", "melting"]])
def test_wrong_arguments_are_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        config.entry(world.main, arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2 and not said.out and len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
