"""Clips of official models, as the official pipelines make them."""
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import diffusion
from config import UserError
from experts import ProPhy
from official.branch import attach_branch, read_branch
from official.encoders import VAE, TextEncoder
from official.folder import lineage_of
from official.weights import load_pretrained


def load_official(weights, device: str = "cpu", dtype: torch.dtype = torch.float32, branch: str = "", **sizes):
    """-> cfg, model, process, solver of a folder in diffusers' layout: the backbone, or with `branch` (a file that
    train.py made beside the same weights) the backbone with its branch.

    The noise schedule and the solver are those of scheduler/scheduler_config.json. `sizes` (frames, height, width) that
    are not given are the lineage's. Raises UserError.
    """
    weights, lineage = Path(weights), lineage_of(weights)
    published = read_branch(Path(branch), weights) if branch else None
    model = load_pretrained(weights, device, dtype)
    path = weights / "scheduler" / "scheduler_config.json"
    try:
        stored = json.loads(path.read_text())
        kind, snr_shift = stored.get("_class_name", ""), float(stored.get("snr_shift_scale") or 1)
        shift = float(stored.get("flow_shift") or stored.get("shift") or 5)
    except FileNotFoundError:
        kind, snr_shift, shift = "", 1.0, 5.0
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}).") from None
    cfg = dataclasses.replace(
        model.cfg, fps=lineage.fps, guidance=lineage.guidance, snr_shift=snr_shift, shift=shift,
        predict="v", process="vpred" if lineage.name == "cogvideox" else "flow",
        **{name: sizes.get(name) or getattr(lineage, name) for name in ("frames", "height", "width")})
    config.check_latent_size(cfg)
    process = diffusion.build(cfg)
    solver = {"CogVideoXDPMScheduler": "dpm", "FlowMatchEulerDiscreteScheduler": "wan-euler"}.get(
        kind, "ddim" if cfg.process == "vpred" else "unipc")
    if published:
        model = attach_branch(model, *published)
    return cfg, model.to(device).eval(), process, solver


@torch.no_grad()
def generate_official(weights, loaded, prompts: list[str], *, negative: str = "", seed: int = 0, steps: int = 50,
                      guidance: float = 6.0, solver: str = "", dynamic: bool = False, tiled: bool = False,
                      edit=None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[np.ndarray]:
    """One clip a prompt, uint8 (F, H, W, 3), as diffusers' pipeline makes it from the same folder and seed.

    Text encoder, network and VAE take turns on the device. Prompt i starts from generator seed + i. CogVideoX 1.5 works
    on pairs of latent frames: an odd number is made even in front, and what was added is dropped.
    """
    cfg, model, process, first_choice = loaded
    words, lengths = TextEncoder(weights, device, dtype)(prompts + [negative])
    vae = VAE(weights, device, dtype, tiled)
    grid = tuple(n * p for n, p in zip(cfg.grid, (cfg.patch_t, cfg.patch, cfg.patch)))  # of the latent, even frames
    wanted, copies = 1 + (cfg.frames - 1) // 4, 1 if guidance == 1 else 2
    for i in tqdm(range(len(prompts)), desc="clips", unit="clip"):
        generator = torch.Generator().manual_seed(seed + i)
        keep = torch.float32 if cfg.lineage == "wan" else dtype  # Wan's latents stay float32 from step to step
        noise = process.randn((1, cfg.channels, *grid), generator, keep).to(device)
        which = [i, len(prompts)][:copies]
        text, length = words[which].to(device, dtype), lengths[which].to(device)

        def denoise(x_t, t):
            out = []
            for y, n in zip(text.split(1), length.split(1)):  # one after the other: half the memory of both at once
                given = (x_t.to(dtype), t, y, n)
                out.append(model(*given, edit)[0] if isinstance(model, ProPhy) else model(*given))
            return out[0], out[1] if copies == 2 else None
        x = process.sample(denoise, noise, steps, guidance, solver=solver or first_choice, dynamic=dynamic,
                           generator=generator)
        frames = vae.decode(x[:, :, grid[0] - wanted :])[0]  # (3, F, H, W)
        yield ((frames.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
