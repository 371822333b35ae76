"""Official models as sample.generate takes them: clips as the official pipelines make them."""
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import config
import diffusion
from common.files import read_json
from common.video import to_bytes
from config import Config, UserError
from experts import ProPhy
from official.branch import attach_branch, read_branch
from official.cost import input_size
from official.encoders import VAE, TextEncoder
from official.folder import Lineage, lineage_of
from official.weights import load_pretrained

SOLVERS = {  # class in scheduler_config.json: ours, where it is not the lineage's usual one
    "CogVideoXDPMScheduler": "dpm",
    "FlowMatchEulerDiscreteScheduler": "wan-euler",
}


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
        published = read_branch(Path(branch), self.weights) if branch else None
        net = load_pretrained(weights, device, dtype)
        schedule = self.weights / "scheduler" / "scheduler_config.json"
        cfg, usual = scheduled(net.cfg, lineage, schedule)
        given = {name: size for name, size in sizes.items() if size}
        self.cfg = dataclasses.replace(cfg, **given)
        config.check_latent_size(self.cfg)
        if published:
            net = attach_branch(net, *published)
        self.net = net.to(device).eval()
        self.process = diffusion.build(self.cfg)
        self.solver = solver or usual

    def read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Text (n, L, D_text) and lengths (n,), on the CPU. The text encoder then makes way for the
        VAE, so that whatever is wrong with either is said before the first step."""
        text, length = TextEncoder(self.weights, self.device, self.dtype)(prompts)
        self.vae = VAE(self.weights, self.device, self.dtype, self.tiled)
        return text.to(self.dtype), length

    def predict(self, x_t: Tensor, t: Tensor, text: Tensor, length: Tensor, edit):
        """The network's outputs, and None in place of a Routing. One row after the other: half the
        memory of both at once."""
        rows = zip(x_t.to(self.dtype).split(1), t.split(1), text.split(1), length.split(1))
        if isinstance(self.net, ProPhy):
            return torch.cat([self.net(*row, edit)[0] for row in rows]), None
        return torch.cat([self.net(*row) for row in rows]), None

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
        wanted = 1 + (self.cfg.frames - 1) // 4  # latent frames
        return to_bytes(self.vae.decode(x[:, :, -wanted:])).cpu().numpy()


def scheduled(cfg: Config, lineage: Lineage, path: Path) -> tuple[Config, str]:
    """The lineage's Config with the network of cfg and the noise schedule of scheduler_config.json,
    and the solver's name. Without that file both are the lineage's usual ones. Raises UserError."""
    stored = read_json(path) if path.exists() else {}
    try:
        snr_shift = float(stored.get("snr_shift_scale") or 1)
        shift = float(stored.get("flow_shift") or stored.get("shift") or 5)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}).") from None
    network = {name: getattr(cfg, name) for name in config.marked(config.NETWORK)}
    cfg = dataclasses.replace(lineage.preset, **network, snr_shift=snr_shift, shift=shift)
    solver = "unipc" if lineage.name == "wan" else "ddim"
    return cfg, SOLVERS.get(stored.get("_class_name"), solver)
