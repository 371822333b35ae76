"""Official models as sample.generate takes them: clips as the official pipelines make them."""
import dataclasses
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
import diffusion
from common.files import read_json
from common.libraries import library
from common.pictures import MOST_PIXELS, ClipRouting
from common.run import refuse_beyond_memory
from common.store import read_about
from common.video import to_bytes
from config import Config, UserError
from experts import ProPhy, Routing
from official.branch import attach_branch, read_branch
from official.cost import input_size
from official.encoders import VAE, TextEncoder
from official.folder import Lineage, lineage_of, only_known
from official.weights import load_pretrained

# Of each lineage, the usual one first, the classes that scheduler_config.json may name: our solver,
# the field that we follow, and the values that we take beside diffusers' defaults.
COG_USUAL = dict(prediction_type="v_prediction", timestep_spacing="trailing",
                 rescale_betas_zero_snr=True)
WAN_USUAL = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
SCHEDULERS = {
    "cogvideox": {"CogVideoXDDIMScheduler": ("ddim", "snr_shift_scale", COG_USUAL),
                  "CogVideoXDPMScheduler": ("dpm", "snr_shift_scale", COG_USUAL)},
    "wan": {"UniPCMultistepScheduler": ("unipc", "flow_shift", WAN_USUAL),
            "FlowMatchEulerDiscreteScheduler": ("wan-euler", "shift", {})},
}
# Fields that change nothing as long as the others have these values.
IDLE = r"clip_|sample_max|steps_|dynamic_|base_|max_|time_shift"


class OfficialModel:
    """A folder in diffusers' layout, its clips made as diffusers' pipeline makes them from the same
    seed. Text encoder, network and VAE take turns on the device."""

    def __init__(self, weights, device: str = "cpu", dtype: torch.dtype = torch.float32,
                 branch: str = "", *, solver: str = "", dynamic: bool = False, tiled: bool = False,
                 **sizes: int):
        """branch: a file that train.py made beside the same weights. solver: empty is the one that
        scheduler/scheduler_config.json names, which the noise schedule comes from, too. sizes:
        frames, height, width; those not given, or 0, are the lineage's. Raises UserError.
        """
        self.weights = Path(weights)
        self.device = torch.device(device)
        self.dtype = dtype
        self.dynamic = dynamic
        self.tiled = tiled
        lineage = lineage_of(self.weights)
        cfg, usual, spacing = scheduled(lineage, self.weights / "scheduler")
        given = {name: size for name, size in sizes.items() if size}
        cfg = dataclasses.replace(cfg, **given)
        # The clip alone, as the VAE decodes it and as it is shown: float32, twice.
        refuse_beyond_memory(24 * cfg.frames * cfg.height * cfg.width, device, "One clip needs",
                             "--frames, --height or --width")
        published = read_branch(Path(branch), self.weights) if branch else None
        net = load_pretrained(weights, device, dtype)
        network = {name: getattr(net.cfg, name) for name in config.marked(config.NETWORK)}
        self.cfg = dataclasses.replace(cfg, **network)
        config.check_latent_size(self.cfg)
        self.info = {}  # what the branch's file says of itself
        if published:
            net = attach_branch(net, *published)
            self.info = read_about(Path(branch))
            theirs = published[0]
            self.cfg = dataclasses.replace(self.cfg, categories=theirs.categories,
                                           semantic_experts=theirs.semantic_experts)
        self.net = net.to(device).eval()
        self.process = diffusion.build(self.cfg)
        self.process.spacing = spacing
        self.solver = solver or usual

    def read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text (n, L, D_text) and lengths (n,), on the CPU. The text encoder then makes way for the
        VAE, so that whatever is wrong with either is said before the first step."""
        encoder = TextEncoder(self.weights, self.device, self.dtype)
        different = list(dict.fromkeys(prompts))
        if too_long := encoder.too_long(different):
            print(f"Warning: {too_long} of {len(different)} prompts have more than "
                  f"{encoder.lineage.preset.text_len} tokens and are cut.", file=sys.stderr)
        # One at a time: a clip is the same to the bit, whatever else is asked for.
        text, length = encoder(prompts, batch=1)
        self.vae = VAE(self.weights, self.device, self.dtype, self.tiled)
        return text.to(self.dtype), length

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, length: Tensor, edit):
        """The network's outputs, and of its Routing what pictures show (None of a bare backbone).
        One row after the other: half the memory of both at once."""
        rows = zip(x_t.to(self.dtype).split(1), t.split(1), text.split(1), length.split(1))
        if not isinstance(self.net, ProPhy):
            return torch.cat([self.net(*row) for row in rows]), None
        out, routings = zip(*(self.net(*row, edit) for row in rows))
        shown = {name: torch.cat([getattr(routing, name) for routing in routings])
                 for name in ("semantic", "refinement_lift")
                 if getattr(routings[0], name) is not None}
        return torch.cat(out), Routing(**shown)

    def draw(self, denoise: Callable, seed: int, index: Sequence[int], *how) -> np.ndarray:
        """Clips uint8 (B, F, H, W, 3). Clip i starts from generator seed + i, which goes on in
        solvers that draw noise. how: steps, guidance and watch of Process.sample.

        CogVideoX 1.5 works on pairs of latent frames: an odd number is made even in front, and what
        was added is dropped.
        """
        generators = [torch.Generator().manual_seed(seed + i) for i in index]
        shape = (len(index), *input_size(self.cfg))
        # Wan's latents are float32 all along.
        dtype = torch.float32 if self.cfg.lineage == "wan" else self.dtype
        noise = self.process.randn(shape, generators, dtype).to(self.device)
        x = self.process.sample(denoise, noise, *how, solver=self.solver, dynamic=self.dynamic,
                                generator=generators)
        return to_bytes(self.vae.decode(x[:, :, -self.latents:])).cpu().numpy()

    @property
    def latents(self) -> int:
        """Latent frames of a clip, those aside that were added in front."""
        return 1 + (self.cfg.frames - 1) // 4

    def shown(self, clip: np.ndarray, routing: ClipRouting | None):
        """A clip (F, H, W, 3) and its routing as a picture at scale 2 has room for them: the clip
        smaller by a whole number, the map of each decoded frame (F, h, w, E_cat).

        Of latent frames the first is one frame and each other four; where the VAE makes four of
        the first, too, F says so.
        """
        # A cell with all its maps is about 40 times as large as the small clip.
        F, H, W, _ = clip.shape
        fitting = (k for k in (1, 2, 4, 8) if H <= 192 * k and 40 * clip[..., 0].size <= MOST_PIXELS * k**2)
        k = next(fitting, 8 * self.cfg.patch)  # at most one pixel a token
        squares = clip.reshape(F, H // k, k, W // k, k, 3)
        clip = squares.mean((2, 4), dtype=np.float32).round().astype(np.uint8)
        if routing and routing.lift is not None:
            of_latents = routing.lift.repeat(self.cfg.patch_t, axis=0)[-self.latents:]
            at = (np.arange(F) + 4 * self.latents - F) // 4
            routing = dataclasses.replace(routing, lift=of_latents[at])
        return clip, routing


def scheduled(lineage: Lineage, folder: Path) -> tuple[Config, str, str]:
    """The lineage's Config with the noise schedule of scheduler_config.json, the solver's name, and
    CogVideoX's spacing of steps; all are the usual ones where there is no such folder. Raises
    UserError for a schedule that is not ours: what a file does not say, it leaves to diffusers'
    defaults."""
    known = SCHEDULERS[lineage.name]
    if not folder.is_dir():
        return lineage.preset, next(iter(known.values()))[0], "trailing"
    path = folder / "scheduler_config.json"
    stored = read_json(path)
    kind = stored.get("_class_name")
    if kind not in known:
        raise UserError(f"{path} is of {kind!r}; {' or '.join(known)} is expected.")
    solver, field, usual = known[kind]
    signature = inspect.signature(getattr(library("diffusers"), kind))
    defaults = {name: p.default for name, p in signature.parameters.items()}
    told = defaults | stored
    spacing = told.get("timestep_spacing")
    if lineage.name == "cogvideox" and spacing == "linspace":  # as its first files have it
        usual = usual | dict(timestep_spacing=spacing)
    fixed = {name: value for name, value in (defaults | usual).items()
             if name != field and not re.match(IDLE, name)}
    only_known(path, told, fixed)

    shift = told[field]
    if type(shift) not in (int, float) or not 0 < shift < math.inf:
        raise UserError(f"{path} has {field} = {shift!r}; a number above 0 is needed.")
    ours = "snr_shift" if lineage.name == "cogvideox" else "shift"
    return dataclasses.replace(lineage.preset, **{ours: float(shift)}), solver, spacing
