"""Dynamic degree: VBench's thresholds by planted flows, the world's exact motion, a planted network."""
import sys
import types

import numpy as np
import pytest
import torch

import evaluate
import world
from benchmarks import dynamic
from helpers import drifting, sentence


def flows(lengths, share=.05, side=40):
    """Flows of pairs: of each one this share of the pixels is as long as its length says, and the rest is still."""
    found = np.zeros((len(lengths), side, side, 2))
    moving = int(share * side * side)
    for one, length in zip(found, lengths):
        one.reshape(-1, 2)[:moving] = np.array([.6, -.8]) * length
    return found


@pytest.mark.parametrize("frames, needed", [(8, 2), (6, 2), (10, 2), (16, 4), (49, 12), (4, 1)])
def test_enough_pairs_must_move(frames, needed):
    """round(4 F / 16), halves to the even number as Python rounds: 2 of 10 frames' 2.5."""
    for moving in range(min(needed + 2, frames)):
        planted = flows([7] * moving + [5] * (frames - 1 - moving))
        assert dynamic.is_dynamic(planted, 256) == (moving >= needed)
        assert dynamic.is_dynamic(planted[::-1], 256) == (moving >= needed)


def test_a_pair_moves_above_six_pixels_in_256():
    for side in (256, 480, 32):
        edge = 6 * side / 256
        assert dynamic.is_dynamic(flows([edge * 1.01] * 7), side) and not dynamic.is_dynamic(flows([edge * .99] * 7), side)
    assert not dynamic.is_dynamic(flows([6] * 7), 256)  # above, not at


def test_the_longest_twentieth_counts():
    assert dynamic.is_dynamic(flows([6.1] * 7, share=.05), 256) and dynamic.is_dynamic(flows([6.1] * 7, share=.9), 256)
    assert not dynamic.is_dynamic(flows([11.9] * 7, share=.025), 256)  # half of them: their mean is 5.95
    assert dynamic.is_dynamic(flows([12.1] * 7, share=.025), 256)


def test_the_worlds_flow_is_the_way_of_its_bodies():
    clip = world.make_clip(0, 3, frames=8, height=64, width=96, phenomenon="collision")
    actor = clip.actors[0]
    found = dynamic.exact_flows(actor)
    assert found.shape == (7, 64, 96, 2)
    for flow, mask, *states in zip(found, actor.mask, actor.states["position"], actor.states["position2"],
                                   np.diff(actor.states["position"], axis=0), np.diff(actor.states["position2"], axis=0)):
        assert not flow[~mask].any()
        for (x, y), step in zip(states[:2], states[2:]):  # at the middle of each puck
            assert mask[int(64 * y), int(64 * x)]
            assert flow[int(64 * y), int(64 * x)] == pytest.approx(64 * step)


def test_the_world_by_the_command(capsys, monkeypatch):
    monkeypatch.setattr(dynamic, "WORLD_CLIPS", 4)
    evaluate.main(["--dynamic", "world"])
    rows = {line.split("|")[1].strip(): line.split("|")[3].strip()
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    for name in dynamic.BODIES:
        assert rows[f"{name}, true"] == "1.000" and rows[f"{name}, still"] == "0.000"


class Planted(torch.nn.Module):
    """A flow network that finds everything moved by as many pixels as its one weight says."""
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, a, b, num_flow_updates):
        assert a.shape == b.shape and a.shape[1] == 3 and num_flow_updates == 20
        assert min(a.shape[2:]) >= 128 and not any(side % 8 for side in a.shape[2:])
        assert -1 <= a.min() < -.5 and .5 < a.max() <= 1
        return [None, torch.cat([self.shift.expand(len(a), 1, *a.shape[2:]), torch.zeros_like(a[:, :1])], 1)]


@pytest.fixture
def torchvision(monkeypatch):
    """As much of torchvision as is used, with a planted network."""
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    flow = types.ModuleType("torchvision.models.optical_flow")
    flow.raft_large = lambda weights: Planted()
    monkeypatch.setitem(sys.modules, flow.__name__, flow)


def test_videos_by_a_planted_network(tmp_path, capsys, torchvision):
    for seed in range(2):
        drifting(tmp_path / f"{seed}.mp4", seed, height=20, width=36)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    weights = tmp_path / "raft.pth"
    for shift, degree in ((6 * 20 / 256 * 1.01, "1.000"), (6 * 20 / 256 * .99, "0.000")):
        torch.save({"shift": torch.tensor(shift)}, weights)
        evaluate.main(["--dynamic", str(tmp_path), "--flow_weights", str(weights), "--device", "cpu"])
        out = capsys.readouterr().out
        assert f"| videos | 2     | {degree} " in out and "Skipped 1" in out and "bad.mp4" in out
    assert dynamic.read_frames(tmp_path / "0.mp4").shape == (12, 20, 36, 3)  # at 8 a second, all of them

    class Code:
        def __reduce__(self):
            return print, ("run",)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad.mp4").rename(tmp_path / "bad" / "bad.mp4")
    bad = ["--dynamic", str(tmp_path / "bad"), "--flow_weights", str(weights), "--device", "cpu"]
    assert "None of these videos can be read" in sentence(evaluate.main, bad) and not capsys.readouterr().out
    for wrong in (Code(), {"other": torch.zeros(1)}):
        torch.save(wrong, weights)
        said = sentence(evaluate.main, ["--dynamic", str(tmp_path), "--flow_weights", str(weights), "--device", "cpu"])
        assert "raft.pth cannot be loaded: " in said and "run" not in capsys.readouterr().out


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    drifting(tmp_path / "0.mp4", 0)
    videos = ["--dynamic", str(tmp_path)]
    assert "--flow_weights FILE" in sentence(evaluate.main, videos)
    assert "pip install torchvision" in sentence(evaluate.main, [*videos, "--flow_weights", "w", "--device", "cpu"])
    assert "there is no gone.mp4" in sentence(evaluate.main, ["--dynamic", "gone.mp4"])
    (tmp_path / "empty").mkdir()
    assert "there is no .mp4 in" in sentence(evaluate.main, ["--dynamic", str(tmp_path / "empty")])
