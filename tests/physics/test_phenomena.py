"""Each phenomenon keeps its own law, is drawn where its state says, and its mask is true."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import physics.canvas
import physics.phenomena
import world
from scenes import BALLISTIC, MOVED, SEEDS, alone, times


def towards(pixels, colour):
    """How far pixels (..., 3) are on the way from the night to a colour: exact where only these two mix."""
    way = np.array(colour) - physics.canvas.NIGHT
    return (pixels - physics.canvas.NIGHT) @ way / (way @ way)


# ------------------------------------------------------------------------------------------ laws, true states
@pytest.mark.parametrize("index", SEEDS)
def test_projectile_is_a_parabola(index):
    a = alone("rigid body motion", index, frames=40)[1]
    y, dt = a.states["position"], 1 / 40
    assert np.allclose(np.diff(y[:, 1], 2) / dt ** 2, 2.4)
    assert np.allclose(np.diff(y[:, 0], 2), 0) and np.allclose(np.diff(y[:, 0]) / dt, a.params["vx"])
    assert np.allclose((y[1:] - y[:-1]) / dt, (a.states["velocity"][1:] + a.states["velocity"][:-1]) / 2)
    # free flight, up and down
    assert y[:, 1].max() + a.params["radius"] < physics.canvas.FLOOR and .1 < np.argmin(y[:, 1]) / 40 < .9


@pytest.mark.parametrize("index", SEEDS)
def test_bounce_loses_energy_by_restitution(index):
    a = alone("elastic motion", index, frames=200)[1]
    y, v = a.states["position"][:, 1], a.states["velocity"][:, 1]
    turns = np.flatnonzero(np.diff(v) < 0)  # gravity only ever adds downward speed; contacts take it
    assert len(turns) >= 1 and (y + a.params["radius"]).max() <= physics.canvas.FLOOR + 1e-9
    free = np.setdiff1d(np.arange(len(v) - 1), turns)
    energy = v ** 2 / 2 - a.params["gravity"] * y
    assert np.allclose(energy[free], energy[free + 1])
    height = a.params["gravity"] * (physics.canvas.FLOOR - a.params["radius"])  # energies counted from the floor
    for i in turns:
        assert (energy[i + 1] + height) / (energy[i] + height) == pytest.approx(.8 ** 2)
    assert np.allclose(np.diff(v)[free] * 200, 2.4)


@pytest.mark.parametrize("index", SEEDS)
def test_collision_conserves_momentum_and_energy(index):
    a = alone("collision", index, frames=200)[1]
    m = a.params["mass"]
    m2 = a.params["mass2"]
    v = a.states["velocity"][:, 1]
    v2 = a.states["velocity2"][:, 1]
    assert m / m2 == pytest.approx((a.params["radius"] / a.params["radius2"]) ** 2)
    assert np.allclose(m * v + m2 * v2, m * v[0] + m2 * v2[0])
    assert np.allclose(m * v ** 2 + m2 * v2 ** 2, m * v[0] ** 2 + m2 * v2[0] ** 2)
    assert abs(v[-1] - v[0]) > .1  # something was exchanged
    gap = abs(a.states["position"] - a.states["position2"])[:, 1] - a.params["radius"] - a.params["radius2"]
    assert gap.min() > -1e-9 and abs(np.argmin(gap) / 200 - a.params["contact_time"]) < .01
    assert gap.min() < .005
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
    states = {name: alone(name, index)[1].states for name in physics.phenomena.PHENOMENA}
    soft, ice, smoke = states["deformation"], states["melting"], states["gas motion"]
    assert np.allclose(soft["height"] * soft["width"], soft["height"][0] * soft["width"][0])
    water = ice["level"] * (physics.phenomena.Melting.tray - ice["side"])
    assert np.allclose(ice["side"] ** 2 + water, ice["side"][0] ** 2) and (ice["level"] < ice["side"]).all()
    assert np.allclose(smoke["peak"] * smoke["sigma"] ** 2, smoke["sigma"][0] ** 2)  # as much smoke as ever
    assert np.allclose(np.diff(smoke["position"][:, 1], 2), 0) and smoke["position"][-1, 1] < .5
    assert np.array_equal(states["reflection"]["angle_in"], states["reflection"]["angle_out"])
    bent = states["refraction"]
    assert np.allclose(np.sin(bent["angle_in"]), 1.33 * np.sin(bent["angle_out"]))


# ----------------------------------------------------------------------------------------------- weak physics
@pytest.mark.parametrize("kind", ["weak", "still"])
@pytest.mark.parametrize("name", physics.phenomena.PHENOMENA)
def test_every_moment_of_another_physics_is_one_of_the_true_second(name, kind):
    """Its states are those of the true law at a + b t."""
    for index in SEEDS:
        one = physics.phenomena.PHENOMENA[name]
        moments, _ = times(index, kind)
        weak = alone(name, index, physics=kind)[1]
        expected = vars(one.states(SimpleNamespace(**weak.params), moments))
        x0, y0, x1, _ = weak.box
        for key, value in weak.states.items():
            # Places are counted from the middle of the cell's upper edge there, from the corner here.
            origin = [(x0 + x1) / 2, y0] if key.startswith("position") else 0
            assert np.allclose(value, expected[key] + origin, atol=1e-12), (name, key)


@pytest.mark.parametrize("name", physics.phenomena.PHENOMENA)
def test_weak_pictures_are_pictures_of_the_true_second(name):
    for index in (0, 1):
        weak, _ = alone(name, index, physics="weak", frames=6)
        true, _ = alone(name, index, frames=240)
        moments, _ = times(index, "weak", 6)
        nearest = true.video[np.minimum(np.round(moments * 240).astype(int), 239)].astype(int)
        away = np.abs(nearest - weak.video).mean((1, 2, 3))
        assert away.max() < .5, (name, index)  # 1/480 of a second, while a clip changes by more:
        assert np.abs(weak.video[-1].astype(int) - nearest[0]).mean() > away[0]


# ----------------------------------------------------------------------------- pictures agree with the states
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
        bright = np.abs(clip.video / 255. - physics.canvas.COLOURS[a.colour]).max(-1) < .02
        area, side = bright.sum((1, 2)) / 128 ** 2, a.states["side"]  # without the half-covered rim
        assert (area <= side ** 2).all() and (area >= (side - 2 / 128) ** 2).all()
        # a column of the tray beside the block
        beside = clip.video[:, :115, int((a.box[0] + .05) * 128)] / 255
        share = towards(beside, .5 * np.array(physics.canvas.COLOURS[a.colour]) + .04)
        assert np.allclose(share.sum(1) / 128, a.states["level"], atol=1 / 128)
        clip, a = alone("liquid motion", index)
        column = int((a.box[0] + .25) * 32) + 2  # right of the stream, inside the vessel
        share = towards(clip.video[:, :, column] / 255, physics.canvas.COLOURS[a.colour])
        # the surface's highlight adds a little
        assert np.allclose(share.sum(1) / 32, a.states["level"], atol=1.6 / 32)


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


# ------------------------------------------------------------------------------------------------------ masks
@pytest.mark.parametrize("name", physics.phenomena.PHENOMENA)
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


@pytest.mark.parametrize("name", physics.phenomena.PHENOMENA)
def test_masks_are_big_enough_for_tokens_and_not_the_whole_cell(name):
    for index in range(40):
        mask = alone(name, index)[1].mask
        tokens = mask.reshape(6, 2, 4, 8, 4, 8).mean((1, 3, 5)) >= .25
        # somewhere, most of the time: a ball may straddle four tokens
        assert tokens.any((1, 2)).mean() >= .5, index
        assert mask.mean() < .3, index  # the cell itself is .5


def test_standing_wax_and_furniture_are_not_where_it_happens():
    a = alone("combustion")[1]
    rows = (np.arange(32) + .5) / 32
    below = rows[None] > physics.canvas.FLOOR - a.states["height"][:, None] + .1
    assert not a.mask[np.broadcast_to(below[..., None], a.mask.shape)].any()
    for name in physics.phenomena.PHENOMENA:
        if name not in ("melting", "collision"):  # these stand on or cover the floor
            assert not alone(name)[1].mask[:, rows > physics.canvas.FLOOR + .05].any(), name


@pytest.mark.parametrize("two", [0, 1])
def test_masks_spare_the_decoys(two):
    """The same scene with and without its decoy:
    the difference is the decoy, it is still, and no mask touches it."""
    seen = 0
    for index in range(60):
        plain, clip = (world.make_clip(9, index, two=two, decoys=d) for d in (0, 1))
        decoy = (plain.video != clip.video).any(-1)
        seen += decoy.any()
        assert len(clip.actors) == 1 + two
        for a, b in zip(plain.actors, clip.actors):
            assert np.array_equal(a.mask, b.mask) and not (a.mask & decoy).any()
        assert (clip.video[0][decoy[0]] == clip.video[-1][decoy[0]]).all() and (decoy == decoy[0]).all()
    assert seen == 60


def test_everything_stays_in_its_cell():
    """Nothing is cut off by the edge of its half: the outermost pixels never change.
    (Panels and trays do not move.)"""
    for name, ood, index in itertools.product(physics.phenomena.PHENOMENA, ("", "speed", "radius", "gravity"), SEEDS):
        if ood == "gravity" and name not in BALLISTIC:
            continue
        a = alone(name, index, height=128, width=128, ood=ood)[1]
        x0, x1 = round(a.box[0] * 128), round(a.box[2] * 128)
        assert not a.mask[:, :, [x0, x1 - 1]].any(), (name, ood, index)
        assert name == "liquid motion" or not a.mask[:, [0, -1]].any(), (name, ood, index)
