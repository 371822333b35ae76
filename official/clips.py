"""Clips of official models, as the official pipelines make them."""
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import diffusion
from common.files import read_json
from common.video import to_bytes
from config import Config, UserError
from experts import ProPhy
from official.branch import attach_branch, read_branch
from official.encoders import VAE, TextEncoder
from official.folder import Lineage, lineage_of
from official.weights import load_pretrained

SOLVERS = {  # class in scheduler_config.json: ours, where it is not the lineage's usual one
    "CogVideoXDPMScheduler": "dpm",
    "FlowMatchEulerDiscreteScheduler": "wan-euler",
}


def load_official(weights, device: str = "cpu", dtype: torch.dtype = torch.float32,
                  branch: str = "", **sizes):
    """-> cfg, model, process, solver of a folder in diffusers' layout: the backbone, or with `branch`
    (a file that train.py made beside the same weights) the backbone with its branch.

    The noise schedule and the solver are those of scheduler/scheduler_config.json. `sizes` (frames,
    height, width) that are not given are the lineage's. Raises UserError.
    """
    weights = Path(weights)
    lineage = lineage_of(weights)
    published = read_branch(Path(branch), weights) if branch else None
    model = load_pretrained(weights, device, dtype)
    cfg, solver = scheduled(model.cfg, lineage, weights / "scheduler" / "scheduler_config.json")
    sizes = {name: sizes.get(name) or getattr(lineage, name) for name in ("frames", "height", "width")}
    cfg = dataclasses.replace(cfg, **sizes)
    config.check_latent_size(cfg)
    if published:
        model = attach_branch(model, *published)
    return cfg, model.to(device).eval(), diffusion.build(cfg), solver


def scheduled(cfg: Config, lineage: Lineage, path: Path) -> tuple[Config, str]:
    """The Config with the noise schedule of scheduler_config.json, and the solver's name. Without
    that file both are the lineage's usual ones. Raises UserError."""
    stored = read_json(path) if path.exists() else {}
    try:
        snr_shift = float(stored.get("snr_shift_scale") or 1)
        shift = float(stored.get("flow_shift") or stored.get("shift") or 5)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}).") from None
    process, usual = ("vpred", "ddim") if lineage.name == "cogvideox" else ("flow", "unipc")
    cfg = dataclasses.replace(cfg, fps=lineage.fps, guidance=lineage.guidance, predict="v",
                              process=process, snr_shift=snr_shift, shift=shift)
    return cfg, SOLVERS.get(stored.get("_class_name"), usual)


@torch.no_grad()
def generate_official(weights, loaded, prompts: list[str], *, negative: str = "", seed: int = 0,
                      steps: int = 50, guidance: float = 6.0, solver: str = "",
                      dynamic: bool = False, tiled: bool = False, edit=None, device: str = "cpu",
                      dtype: torch.dtype = torch.float32) -> Iterator[np.ndarray]:
    """One clip a prompt, uint8 (F, H, W, 3), as diffusers' pipeline makes it from the same folder and
    seed.

    loaded: what load_official gave. Text encoder, network and VAE take turns on the device. Prompt i
    starts from generator seed + i. CogVideoX 1.5 works on pairs of latent frames: an odd number is
    made even in front, and what was added is dropped.
    """
    cfg, model, process, usual_solver = loaded
    words, lengths = TextEncoder(weights, device, dtype)(prompts + [negative])
    vae = VAE(weights, device, dtype, tiled)
    patches = (cfg.patch_t, cfg.patch, cfg.patch)
    grid = tuple(n * p for n, p in zip(cfg.grid, patches))  # of the latent, an even number of frames
    wanted = 1 + (cfg.frames - 1) // 4  # latent frames
    kept_in = torch.float32 if cfg.lineage == "wan" else dtype  # Wan's latents are float32 all along
    for i in tqdm(range(len(prompts)), desc="clips", unit="clip"):
        generator = torch.Generator().manual_seed(seed + i)
        noise = process.randn((1, cfg.channels, *grid), generator, kept_in).to(device)
        which = [i] if guidance == 1 else [i, len(prompts)]  # the prompt, and what to lead away from
        text = words[which].to(device, dtype)
        length = lengths[which].to(device)

        def denoise(x_t, t):
            # One after the other: half the memory of both at once.
            out = []
            for y, n in zip(text.split(1), length.split(1)):
                given = (x_t.to(dtype), t, y, n)
                out.append(model(*given, edit)[0] if isinstance(model, ProPhy) else model(*given))
            return out[0], out[1] if len(out) == 2 else None

        x = process.sample(denoise, noise, steps, guidance, solver=solver or usual_solver,
                           dynamic=dynamic, generator=generator)
        frames = vae.decode(x[:, :, grid[0] - wanted:])[0]  # (3, F, H, W)
        yield to_bytes(frames).cpu().numpy()
