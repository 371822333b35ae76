"""VBench's dynamic degree, the share of clips in motion, by VBench's thresholds.

The flow is taken between frames 1/8 s apart. Of videos a network of torchvision tells it (VBench
has another training of the same RAFT); of the world's clips it is known exactly. The figure rewards
any fast motion, right or wrong: it says nothing of physics.

Letters: F frames, H W pixels.
"""
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

import world
from benchmarks.intervals import wilson
from common import score
from common.files import join_some
from common.libraries import library_error_as_sentence
from common.run import pick_device
from common.video import reason_of
from config import UserError

PAIRS_A_SECOND = 8
FASTEST = .05  # share of the pixels whose flow counts
MOVES = 6 / 256  # flow of a pair that moves, in shorter sides of the picture
WORLD = "world"  # stands for the world's own clips
WORLD_CLIPS = 50  # of each phenomenon
BODIES = ("rigid body motion", "elastic motion", "collision", "gas motion")  # that change place


def is_dynamic(flows, shorter_side: int) -> bool:
    """Does a clip move? flows: (F - 1, H, W, 2) in pixels, of its pairs of frames.

    A pair moves if the mean of its longest 5 % of flows does, and a clip if round(F / 4) pairs do.
    """
    moving = 0
    for flow in flows:
        lengths = np.sort(np.hypot(flow[..., 0], flow[..., 1]), axis=None)
        count = max(int(FASTEST * lengths.size), 1)
        moving += bool(lengths[-count:].mean() > MOVES * shorter_side)
    return moving >= round(4 * (len(flows) + 1) / 16)


# --- the world ----------------------------------------------------------------------------------
def exact_flows(actor) -> np.ndarray:
    """(F - 1, H, W, 2) pixels: each pixel of an actor's mask moves as the body next to it."""
    H, W = actor.mask.shape[1:]
    scale = min(H, W)
    places = [scale * value for name, value in actor.states.items() if name.startswith("position")]
    places = np.stack(places, 1)  # (F, bodies, 2), x before y
    steps = np.diff(places, axis=0)
    pixels = np.stack(np.meshgrid(np.arange(W), np.arange(H)), -1) + .5  # (H, W, 2)
    flows = np.zeros((*actor.mask.shape, 2))[1:]
    for flow, mask, bodies, step in zip(flows, actor.mask, places, steps):
        far = np.linalg.norm(pixels[:, :, None] - bodies, axis=-1)  # (H, W, bodies)
        flow[mask] = step[far.argmin(-1)][mask]
    return flows


def of_world() -> dict[str, list[bool]]:
    """{phenomenon and physics: is each clip in motion?}."""
    found = {}
    for name in BODIES:
        for physics in ("true", "weak", "still"):
            drawn = (world.make_clip(0, i, frames=PAIRS_A_SECOND, height=64, width=64,
                                     physics=physics, phenomenon=name) for i in range(WORLD_CLIPS))
            found[f"{name}, {physics}"] = [
                is_dynamic(exact_flows(clip.actors[0]), 64) for clip in drawn]
    return found


# --- videos -------------------------------------------------------------------------------------
def read_frames(path: Path) -> np.ndarray:
    """(F, H, W, 3) uint8 frames 1/8 s apart, or as near as whole frames are. Raises what decoders
    raise, and ValueError where there are not two."""
    fps = iio.immeta(path, plugin="pyav")["fps"]
    every = max(round(fps / PAIRS_A_SECOND), 1)
    frames = [frame for i, frame in enumerate(iio.imiter(path, plugin="pyav")) if i % every == 0]
    if len(frames) < 2:
        raise ValueError("too short for a pair of frames")
    return np.stack(frames)


def raft(weights: str, device: str):
    """frames (F, H, W, 3) -> their flows (F - 1, H, W, 2), by torchvision's RAFT. Raises UserError
    where the library or its weights are not there."""
    try:
        from torchvision.models.optical_flow import raft_large
    except (ImportError, RuntimeError) as e:  # the latter where it is of another torch
        raise UserError("--dynamic on videos needs torchvision, which cannot be imported "
                        f"({reason_of(e)}): pip install torchvision.") from None
    model = raft_large(weights=None)
    with library_error_as_sentence(Path(weights)):  # damaged, pickled code, of another network
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model = model.to(device).eval()

    @torch.no_grad()
    def flows(frames):
        H, W = frames.shape[1:3]
        x = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1  # (F, 3, H, W)
        # It takes sides that divide by 8, of 128 pixels or more.
        right, below = (max(-side % 8, 128 - side) for side in (W, H))
        x = torch.nn.functional.pad(x, (0, right, 0, below), mode="replicate").to(device)
        pairs = (model(a[None], b[None], num_flow_updates=20)[-1][0] for a, b in zip(x, x[1:]))
        return np.stack([pair[:, :H, :W].movedim(0, -1).cpu().numpy() for pair in pairs])
    return flows


def videos_in(places: list[str]) -> list[Path]:
    """The .mp4 files among files and folders. Raises UserError."""
    found = []
    for place in map(Path, places):
        found += sorted(place.glob("*.mp4")) if place.is_dir() else [place]
    absent = [str(path) for path in found if not path.is_file()]
    if absent or not found:
        wrong = join_some(absent, 3) or f".mp4 in {join_some(places, 3)}"
        raise UserError(f"--dynamic takes folders of .mp4 files, or such files, or the word "
                        f"{WORLD}; there is no {wrong}.")
    return found


def of_videos(places: list[str], weights: str, device: str) -> dict[str, list[bool]]:
    """{"videos": is each one in motion?}; those that cannot be read are named. Raises UserError."""
    paths = videos_in(places)
    if not weights:
        raise UserError("--dynamic on videos needs --flow_weights FILE, weights of torchvision's "
                        "raft_large.")
    flows = raft(weights, pick_device(device))
    found = []
    skipped = []
    for path in paths:
        try:
            frames = read_frames(path)
        except Exception as e:  # whatever decoders make of a bad file concerns that file alone
            skipped.append(f"{path} ({reason_of(e)})")
            continue
        found.append(is_dynamic(flows(frames), min(frames.shape[1:3])))
    if not found:
        raise UserError(f"None of these videos can be read: {join_some(skipped, 3)}.")
    if skipped:
        print(f"Skipped {len(skipped)}: {join_some(skipped, 3)}.")
    return {"videos": found}


def show_degree(places: list[str], weights: str, device: str) -> None:
    """--dynamic: print the dynamic degree. Raises UserError."""
    found = of_world() if places == [WORLD] else of_videos(places, weights, device)
    rows = {name: {"clips": str(len(moves)), "dynamic degree": sum(moves) / len(moves),
                   "95 %": "{:.3f} to {:.3f}".format(*wilson(sum(moves), len(moves)))}
            for name, moves in found.items()}
    print(score.markdown(rows))
    print("VBench's thresholds on frames 1/8 s apart. Any fast motion counts, right or wrong: it "
          "is no figure of physics.")
