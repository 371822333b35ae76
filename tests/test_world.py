"""The world keeps its own laws, its masks are true, and its captions say what is to be seen."""
import itertools
import re

import numpy as np
import pytest

import common.pictures
import physics.phenomena
import world
from physics.phenomena import COLOURS, FLOOR, PHENOMENA
from world import make_clip

SEEDS = range(8)
MOVED = 40  # of 255: a change a person would notice; less is antialiasing
BALLISTIC = ("rigid body motion", "elastic motion")


def alone(name, index=0, **options):
    """A clip with one phenomenon and no decoy, and that phenomenon."""
    clip = make_clip(5, index, phenomenon=name, **{"decoys": 0} | options)
    return clip, clip.actors[0]


def towards(pixels, colour):
    """How far pixels (..., 3) are on the way from the night to a colour: exact where only these two mix."""
    way = np.array(colour) - physics.phenomena.NIGHT
    return (pixels - physics.phenomena.NIGHT) @ way / (way @ way)


# ---------------------------------------------------------------------------------------------------- laws, true states

@pytest.mark.parametrize("index", SEEDS)
def test_projectile_is_a_parabola(index):
    a = alone("rigid body motion", index, frames=40)[1]
    y, dt = a.states["position"], 1 / 40
    assert np.allclose(np.diff(y[:, 1], 2) / dt ** 2, 2.4)
    assert np.allclose(np.diff(y[:, 0], 2), 0) and np.allclose(np.diff(y[:, 0]) / dt, a.params["vx"])
    assert np.allclose((y[1:] - y[:-1]) / dt, (a.states["velocity"][1:] + a.states["velocity"][:-1]) / 2)
    assert y[:, 1].max() + a.params["radius"] < FLOOR and .1 < np.argmin(y[:, 1]) / 40 < .9  # free flight, up and down


@pytest.mark.parametrize("index", SEEDS)
def test_bounce_loses_energy_by_restitution(index):
    a = alone("elastic motion", index, frames=200)[1]
    y, v = a.states["position"][:, 1], a.states["velocity"][:, 1]
    turns = np.flatnonzero(np.diff(v) < 0)  # gravity only ever adds downward speed; contacts take it
    assert len(turns) >= 1 and (y + a.params["radius"]).max() <= FLOOR + 1e-9
    free = np.setdiff1d(np.arange(len(v) - 1), turns)
    energy = v ** 2 / 2 - a.params["gravity"] * y
    assert np.allclose(energy[free], energy[free + 1])
    height = a.params["gravity"] * (FLOOR - a.params["radius"])  # energies counted from the floor
    for i in turns:
        assert (energy[i + 1] + height) / (energy[i] + height) == pytest.approx(.8 ** 2)
    assert np.allclose(np.diff(v)[free] * 200, 2.4)


@pytest.mark.parametrize("index", SEEDS)
def test_collision_conserves_momentum_and_energy(index):
    a = alone("collision", index, frames=200)[1]
    m, m2, v, v2 = a.params["mass"], a.params["mass2"], a.states["velocity"][:, 1], a.states["velocity2"][:, 1]
    assert m / m2 == pytest.approx((a.params["radius"] / a.params["radius2"]) ** 2)
    assert np.allclose(m * v + m2 * v2, m * v[0] + m2 * v2[0])
    assert np.allclose(m * v ** 2 + m2 * v2 ** 2, m * v[0] ** 2 + m2 * v2[0] ** 2)
    assert abs(v[-1] - v[0]) > .1  # something was exchanged
    gap = abs(a.states["position"] - a.states["position2"])[:, 1] - a.params["radius"] - a.params["radius2"]
    assert gap.min() > -1e-9 and abs(np.argmin(gap) / 200 - a.params["contact_time"]) < .01 and gap.min() < .005
    for k in ("", "2"):
        walk = np.diff(a.states["position" + k][:, 1]) * 200
        calm = np.abs(np.arange(199) / 200 - a.params["contact_time"]) > .01
        assert np.allclose(walk[calm], a.states["velocity" + k][:-1, 1][calm])


def test_linear_laws():
    """Each of these quantities changes by a constant rate, and one that is known."""
    rules = {  # name: (what grows evenly, its rate)
        "liquid motion": (lambda a: a.states["level"] * a.params["width"], lambda a: .11),
        "gas motion": (lambda a: a.states["sigma"] ** 2, lambda a: 2 * .0022),
        "deformation": (lambda a: a.states["height"], lambda a: -a.params["press_speed"]),
        "melting": (lambda a: a.states["side"] ** 2, lambda a: -.035),
        "vaporization": (lambda a: a.states["diameter"] ** 2, lambda a: -.055),
        "combustion": (lambda a: a.states["height"], lambda a: -.25),
        "reflection": (lambda a: a.states["angle_in"], lambda a: a.params["omega"]),
        "refraction": (lambda a: a.states["angle_in"], lambda a: a.params["omega"]),
        "explosion": (lambda a: a.states["radius"] ** 2, lambda a: .044)}
    for (name, (quantity, rate)), index in itertools.product(rules.items(), SEEDS):
        a = alone(name, index)[1]
        assert np.allclose(np.diff(quantity(a)) * 12, rate(a)), name


@pytest.mark.parametrize("index", SEEDS)
def test_what_is_conserved_and_how_light_goes(index):
    states = {name: alone(name, index)[1].states for name in PHENOMENA}
    soft, ice, smoke = states["deformation"], states["melting"], states["gas motion"]
    assert np.allclose(soft["height"] * soft["width"], soft["height"][0] * soft["width"][0])
    water = ice["level"] * (2 * physics.phenomena.Melting.half - ice["side"])
    assert np.allclose(ice["side"] ** 2 + water, ice["side"][0] ** 2) and (ice["level"] < ice["side"]).all()
    assert np.allclose(smoke["peak"] * smoke["sigma"] ** 2, smoke["sigma"][0] ** 2)  # as much smoke as ever
    assert np.allclose(np.diff(smoke["position"][:, 1], 2), 0) and smoke["position"][-1, 1] < .5
    assert np.array_equal(states["reflection"]["angle_in"], states["reflection"]["angle_out"])
    bent = states["refraction"]
    assert np.allclose(np.sin(bent["angle_in"]), 1.33 * np.sin(bent["angle_out"]))


# --------------------------------------------------------------------------------------- pictures agree with the states

def centre_of(picture):
    """Weighted mean place of (F, H, W), in canvas units: (F, 2)."""
    height = picture.shape[1]
    places = (np.indices(picture.shape[1:])[::-1] + .5).reshape(2, -1) / height
    flat = picture.reshape(len(picture), -1)
    return flat @ places.T / flat.sum(1, keepdims=True)


@pytest.mark.parametrize("name", ["rigid body motion", "elastic motion", "gas motion", "explosion"])
def test_drawn_where_the_state_says(name):
    for index in SEEDS:
        clip, a = alone(name, index, height=128, width=128)
        assert np.abs(centre_of(a.mask.astype(float)) - a.states["position"]).max() < 1 / 128


def test_drawn_areas_are_the_true_areas():
    for index in SEEDS:
        clip, a = alone("vaporization", index, height=128, width=128)
        drop = (a.mask & (np.arange(128) / 128 > .5)[:, None]).sum((1, 2)) / 128 ** 2  # its rim counts whole
        rim = np.pi * a.states["diameter"] / 128 / 2
        assert np.allclose(drop - rim, np.pi * a.states["diameter"] ** 2 / 4, rtol=.06)
        clip, a = alone("melting", index, height=128, width=128)
        bright = np.abs(clip.video / 255. - COLOURS[a.colour]).max(-1) < .02
        area, side = bright.sum((1, 2)) / 128 ** 2, a.states["side"]  # without the half-covered rim
        assert (area <= side ** 2).all() and (area >= (side - 2 / 128) ** 2).all()
        beside = clip.video[:, :115, int((a.box[0] + .05) * 128)] / 255  # a column of the tray beside the block
        share = towards(beside, .5 * np.array(COLOURS[a.colour]) + .04)
        assert np.allclose(share.sum(1) / 128, a.states["level"], atol=1 / 128)
        clip, a = alone("liquid motion", index)
        column = int((a.box[0] + .25) * 32) + 2  # right of the stream, inside the vessel
        share = towards(clip.video[:, :, column] / 255, COLOURS[a.colour])
        assert np.allclose(share.sum(1) / 32, a.states["level"], atol=1.6 / 32)  # the surface's highlight adds a little


def test_beams_point_where_the_angles_say():
    for name, index in itertools.product(("reflection", "refraction"), SEEDS):
        clip, a = alone(name, index, height=128, width=128)
        hit = a.states["position"][0]
        places = (np.indices((128, 128))[::-1] + .5) / 128 - hit[:, None, None]
        far = np.hypot(*places)
        for key, upper in (("angle_in", True), ("angle_out", False)):
            part = a.mask & ((places[1] < 0) == upper) & (far > .12) & (far < .24)
            x, y = (np.array([(p * m).sum() / m.sum() for m in part]) for p in places)
            angle = np.arctan2(np.abs(y), -x) if name == "reflection" else np.arctan2(np.abs(x), np.abs(y))
            assert np.abs(angle - a.states[key]).max() < .04, (name, index, key)


# ---------------------------------------------------------------------------------------------------------------- masks

@pytest.mark.parametrize("name", PHENOMENA)
@pytest.mark.parametrize("frames, size", [(12, 32), (24, 64), (12, 17)])
def test_masks_cover_what_moves_and_only_their_cell(name, frames, size):
    for index in SEEDS:
        clip, a = alone(name, index, frames=frames, height=size, width=size, decoys=1)
        change = np.abs(np.diff(clip.video.astype(int), axis=0)).max(-1)
        assert np.abs(clip.video[-1].astype(int) - clip.video[0]).max() > MOVED  # it does move
        assert not (change * ~(a.mask[1:] | a.mask[:-1]) > MOVED).any()
        half = np.zeros(size, bool)
        half[:(size + 1) // 2] = True
        assert not a.mask[:, :, ~half if a.side == "left" else half].any()


@pytest.mark.parametrize("name", PHENOMENA)
def test_masks_are_big_enough_for_tokens_and_not_the_whole_cell(name):
    for index in range(40):
        mask = alone(name, index)[1].mask
        tokens = mask.reshape(6, 2, 4, 8, 4, 8).mean((1, 3, 5)) >= .25
        assert tokens.any((1, 2)).mean() >= .5, index  # somewhere, most of the time: a ball may straddle four tokens
        assert mask.mean() < .3, index  # the cell itself is .5


def test_standing_wax_and_furniture_are_not_where_it_happens():
    a = alone("combustion")[1]
    rows = (np.arange(32) + .5) / 32
    below = rows[None] > FLOOR - a.states["height"][:, None] + .1
    assert not a.mask[np.broadcast_to(below[..., None], a.mask.shape)].any()
    for name in PHENOMENA:
        if name not in ("melting", "collision"):  # these stand on or cover the floor
            assert not alone(name)[1].mask[:, rows > FLOOR + .05].any(), name


@pytest.mark.parametrize("two", [0, 1])
def test_masks_spare_the_decoys(two):
    """The same scene with and without its decoy: the difference is the decoy, it is still, and no mask touches it."""
    seen = 0
    for index in range(60):
        plain, clip = (make_clip(9, index, two=two, decoys=d) for d in (0, 1))
        decoy = (plain.video != clip.video).any(-1)
        seen += decoy.any()
        assert len(clip.actors) == 1 + two
        for a, b in zip(plain.actors, clip.actors):
            assert np.array_equal(a.mask, b.mask) and not (a.mask & decoy).any()
        assert (clip.video[0][decoy[0]] == clip.video[-1][decoy[0]]).all() and (decoy == decoy[0]).all()
    assert seen == 60


def test_everything_stays_in_its_cell():
    """Nothing is cut off by the edge of its half: the outermost pixels never change. (Panels and trays do not move.)"""
    for name, ood, index in itertools.product(PHENOMENA, ("", "speed", "radius", "gravity"), SEEDS):
        if ood == "gravity" and name not in BALLISTIC:
            continue
        a = alone(name, index, height=128, width=128, ood=ood)[1]
        x0, x1 = round(a.box[0] * 128), round(a.box[2] * 128)
        assert not a.mask[:, :, [x0, x1 - 1]].any(), (name, ood, index)
        assert name == "liquid motion" or not a.mask[:, [0, -1]].any(), (name, ood, index)


# --------------------------------------------------------------------------------------------------------------- scenes

def same_scene(a, b):
    return a.caption == b.caption and [x.params for x in a.actors] == [x.params for x in b.actors]


def test_a_clip_is_a_function_of_seed_and_index():
    a, b, c, d = make_clip(1, 2), make_clip(1, 2), make_clip(1, 3), make_clip(2, 2)
    assert same_scene(a, b) and np.array_equal(a.video, b.video)
    assert not np.array_equal(a.video, c.video) and not np.array_equal(a.video, d.video)
    assert (a.video.dtype, a.video.shape) == (np.uint8, (12, 32, 32, 3)) and isinstance(a.caption, str)


def test_frame_count_and_size_show_the_same_scene():
    for index in range(30):
        clip, fine, big = (make_clip(3, index, **k) for k in ({}, {"frames": 24}, {"height": 64, "width": 64}))
        assert same_scene(clip, fine) and same_scene(clip, big)
        assert np.array_equal(clip.video, fine.video[::2])
        for a, b in zip(clip.actors, fine.actors):
            assert all(np.allclose(v, b.states[k][::2]) for k, v in a.states.items())
        coarse = big.video.reshape(12, 32, 2, 32, 2, 3).mean((2, 4))
        assert np.abs(coarse - clip.video).mean() < 3


@pytest.mark.parametrize("height, width", [(17, 40), (40, 17), (16, 16), (128, 128), (33, 65), (16, 128), (128, 16)])
def test_any_size(height, width):
    scale = min(height, width)
    for index in range(12):
        clip = make_clip(4, index, height=height, width=width, two=.5, decoys=1)
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
    clips = [make_clip(6, i, frames=2, height=16, width=16, decoys=decoys, two=two) for i in range(400)]
    bare = [make_clip(6, i, frames=2, height=16, width=16, decoys=0, two=two) for i in range(400)]
    with_decoy = np.mean([not np.array_equal(a.video, b.video) for a, b in zip(clips, bare)])
    assert with_decoy == pytest.approx(decoys, abs=.07)
    assert np.mean([len(c.actors) == 2 for c in clips]) == pytest.approx(two, abs=.07)
    for clip in clips:
        assert clip.categories == sorted({a.category for a in clip.actors}) and len(clip.categories) == len(clip.actors)
        assert all(physics.phenomena.CATEGORIES[a.category] == a.phenomenon for a in clip.actors)
    assert {a.phenomenon for c in clips for a in c.actors} == set(PHENOMENA)


def test_by_default_some_phenomena_are_seen_alone():
    clips = [make_clip(6, i, frames=2, height=16, width=16) for i in range(300)]
    decoy = "left.*right|right.*left|beside|next|near"
    plain = [c for c in clips if len(c.actors) == 1 and not re.search(decoy, c.caption)]
    assert 15 < len(plain) < 60


def test_colour_cues_give_each_phenomenon_its_own():
    actors = [a for i in range(200) for a in make_clip(7, i, frames=2, height=16, width=16, colour_cues=True).actors]
    own = {(a.phenomenon, a.colour) for a in actors}
    assert len(own) == len(PHENOMENA) == len({colour for _, colour in own})
    free = [a for i in range(200) for a in make_clip(7, i, frames=2, height=16, width=16).actors]
    assert all(len({a.colour for a in free if a.phenomenon == name}) >= 4 for name in PHENOMENA)


@pytest.mark.parametrize("role", ["speed", "radius", "gravity"])
def test_out_of_distribution_leaves_the_training_interval(role):
    for name, one in PHENOMENA.items():
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
    mixed = {a.phenomenon for i in range(80) for a in make_clip(8, i, frames=2, ood=role).actors}
    assert mixed == {n for n, one in PHENOMENA.items() if any(s.role == role for s in one.spans.values())}


# ------------------------------------------------------------------------------------------------------------- captions

def test_captions_are_short_and_plain():
    words = set()
    for index, (decoys, two) in itertools.product(range(500), ((.6, .4), (1, 1), (1, 0))):
        caption = make_clip(10, index, frames=2, height=16, width=16, decoys=decoys, two=two).caption
        assert re.fullmatch(r"[a-z]+([,.]? [a-z]+)*\.", caption), caption
        assert len(caption.split()) <= 24, caption
        words |= set(re.findall("[a-z]+", caption))
    assert 80 <= len(words) <= 120, len(words)


def test_captions_tell_phenomenon_colour_and_side():
    told = {}
    for name, one in PHENOMENA.items():
        for phrase in one.phrases:
            assert told.setdefault(phrase.replace("{s}", ""), name) == name and "{c}" in phrase
    for index, two in itertools.product(range(300), (0, 1)):
        clip = make_clip(11, index, frames=2, height=16, width=16, two=two)
        for a in clip.actors:
            said = sorted((p for p, name in told.items() if name == a.phenomenon and p.format(c=a.colour, d=a.colour2)
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
    for name, word in itertools.product(PHENOMENA, ("small", "large")):
        sizes = []
        for index in range(60):
            clip, a = alone(name, index, frames=2, height=16, width=16)
            if word in clip.caption:
                key, span = next((k, s) for k, s in PHENOMENA[name].spans.items() if s.role == "radius")
                sizes.append((a.params[key] - span.low) / (span.high - span.low))
        assert not sizes or (max(sizes) < 1 / 3 if word == "small" else min(sizes) > 2 / 3), name
        assert sizes or name in ("collision", "reflection", "refraction"), name


def test_decoys_are_mentioned():
    spoken = [p for one in PHENOMENA.values() for p in one.decoy_phrases]
    for index, two in itertools.product(range(150), (0, 1)):
        caption = make_clip(12, index, frames=2, height=16, width=16, decoys=1, two=two).caption
        assert any(p.format(c=c) in caption for p in spoken for c in COLOURS), caption


# --------------------------------------------------------------------------------------------------- errors and helpers

@pytest.mark.parametrize("wrong", [
    {"height": 15}, {"width": 129}, {"frames": 1}, {"frames": 257}, {"decoys": 1.1}, {"two": -.1}, {"ood": "mass"},
    {"phenomenon": "magic"}, {"phenomenon": "solidification"}, {"phenomenon": "melting", "ood": "gravity"},
    {"height": 32.5}, {"seed": -1}, {"index": -1}])
def test_impossible_wishes_are_one_sentence(wrong):
    with pytest.raises(ValueError) as caught:
        make_clip(**{"seed": 0, "index": 0} | wrong)
    message = str(caught.value)
    assert "\n" not in message and str(list(wrong.values())[-1]) in message


def test_picture_helpers():
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    big = common.pictures.enlarge(frames, 5)
    assert big.shape == (2, 15, 20, 3) and np.array_equal(big[:, 2::5, 2::5], frames)
    mask = np.zeros((2, 3, 4), bool)
    mask[1, 2, 3] = True
    tinted = common.pictures.tint(frames, mask, (255, 0, 255), 1)
    assert np.array_equal(tinted[~mask], frames[~mask]) and tinted[1, 2, 3].tolist() == [255, 0, 255]
    wide = np.zeros((2, 8, 120, 3), np.uint8)
    short, long = common.pictures.annotate(wide, "a ball"), common.pictures.annotate(wide, "a ball and many more words than fit on a line")
    assert long.shape[1] > short.shape[1] > 8 and short[:, 8:].max() > 150 and not short[:, :8].any()
    assert common.pictures.annotate(wide, "a ball", lines=4).shape[1] > short.shape[1]


def test_preview_is_a_gif_of_everything(tmp_path, capsys):
    iio = pytest.importorskip("imageio.v3")
    path = tmp_path / "preview.gif"
    world.main(["--preview", str(path), "--frames", "4", "--size", "16"])
    frames = iio.imread(path)
    assert frames.shape == world.preview(0, 16, 4).shape and len(list(tmp_path.iterdir())) == 1
    assert np.abs(frames.astype(int) - world.preview(0, 16, 4)).mean() < 4  # 256 colours a frame
    info = iio.immeta(path, plugin="pillow")
    assert (info["duration"], info["loop"]) == (500, 0)  # one second takes two, again and again


@pytest.mark.parametrize("arguments", [[], ["--frames", "x"], ["--preview", "x.gif", "--size", "7"], ["--nonsense"],
                                       ["--preview", "no/such/folder/x.gif", "--size", "16", "--frames", "2"],
                                       ["--preview", "x.gif", "--ood", "mass"], ["--preview", "x.gif", "--seed", "-1"]])
def test_wrong_arguments_are_one_sentence(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        world.main(arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2 and not said.out and len(said.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
