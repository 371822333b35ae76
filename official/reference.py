"""Diffusers' transformers as a reference for ours: the same architecture, arguments and weights.

Needs diffusers (requirements-extra.txt).
"""
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import Config, Stopped
from model import build_backbone
from official.cost import input_size
from official.weights import COG_NAMES, WAN_NAMES, from_stored, renamed, their_config


def their_model(cfg: Config) -> tuple[nn.Module, Callable]:
    """-> diffusers' model of this config, freshly initialised, and the same as a function of
    (x, t, text)."""
    import diffusers
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    fields = their_config(cfg)
    net = getattr(diffusers, fields.pop("_class_name"))(**fields).to(cfg.device)

    def wan(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return net(x, t, text, return_dict=False)[0]

    rope = None
    if cfg.lineage != "wan" and cfg.positions != "sincos":
        # On the grid that a model was trained on, the only one timed here, "fitted" is integers.
        frames, *size = cfg.grid
        rope = get_3d_rotary_pos_embed(cfg.dim // cfg.heads, None, size, frames, grid_type="slice",
                                       max_size=size, device=cfg.device)

    def cogvideox(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        video = net(x.transpose(1, 2), text, t, image_rotary_emb=rope, return_dict=False)[0]
        return video.transpose(1, 2)
    return net, wan if cfg.lineage == "wan" else cogvideox


def blocks_of(theirs: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer of diffusers, which calls them otherwise for each lineage."""
    return theirs.transformer_blocks if hasattr(theirs, "transformer_blocks") else theirs.blocks


def official_pair(cfg: Config, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Callable]:
    """-> our model, diffusers' model, and that as a function of (x, t, text). Both have the same
    random weights."""
    theirs, call_theirs = their_model(cfg)
    for p in theirs.parameters():  # not `.to(dtype)`: diffusers keeps the rotary buffers in float32
        p.data = p.data.to(dtype)
    with torch.device("meta"):
        ours = build_backbone(cfg)
    names = WAN_NAMES if cfg.lineage == "wan" else COG_NAMES
    stored = theirs.state_dict()
    ours.load_state_dict({name: from_stored(name, stored[renamed(name, names)], cfg)
                          for name in ours.state_dict()}, assign=True)
    return ours, theirs, call_theirs


# --- both sides, with the same weights -----------------------------------------------------------
class Side(NamedTuple):
    """Ours or diffusers', of a pair with the same weights and inputs."""
    blocks: list[nn.Module]  # what --compile compiles
    call: Callable  # the forward pass
    leaves: list[Tensor]  # what the backward pass finds gradients of
    watched: list[Tensor]  # two of them, the first and the last in the network, to compare

    def run(self) -> None:
        """Forward and backward."""
        output = self.call()
        output.backward(torch.ones_like(output))
        for one in self.leaves:
            one.grad = None


def official_inputs(cfg: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, F, H, W), t (B,), text (B, L, D_text) of the config's size."""
    x = torch.randn(cfg.batch_size, *input_size(cfg), device=cfg.device, dtype=dtype)
    text = torch.randn(cfg.batch_size, cfg.text_len, cfg.text_dim, device=cfg.device, dtype=dtype)
    return x, torch.full((cfg.batch_size,), 500, device=cfg.device), text


def whole_models(cfg: Config, dtype: torch.dtype) -> dict[str, Side]:
    """-> {side: model}."""
    ours, theirs, call_theirs = official_pair(cfg, dtype)
    inputs = official_inputs(cfg, dtype)
    their_blocks = blocks_of(theirs)
    last = their_blocks[-1].ff if cfg.lineage == "cogvideox" else their_blocks[-1].ffn
    watched = [ours.blocks[0].attn1.to_q.weight, ours.blocks[-1].ff[2].weight]
    their_watched = [their_blocks[0].attn1.to_q.weight, last.net[2].weight]
    return {
        "ours": Side([*ours.blocks], partial(ours, *inputs), [*ours.parameters()], watched),
        "diffusers": Side([*their_blocks], partial(call_theirs, *inputs), [*theirs.parameters()],
                          their_watched),
    }


@torch.no_grad()
def difference(ours: Callable, theirs: Callable) -> float:
    """Largest difference of what two calls return, as a share of the largest number.

    Raises Stopped when it is more than rounding: times of two different things mean nothing.
    """
    a, b = ours(), theirs()
    share = ((a - b).abs().max() / b.abs().max()).item()
    if not share < (1e-4 if a.dtype == torch.float32 else 5e-2):
        raise Stopped(f"Ours and diffusers' outputs differ by {share:.1e} of the largest number; "
                      "nothing was timed.")
    return share


def gradients_apart(ours: Side, theirs: Side) -> float:
    """Distance of the gradients of the watched weights, as a share of their norm, the larger one.

    Raises Stopped when it is more than rounding.
    """
    found = []
    for side in (ours, theirs):
        loss = side.call().float().square().mean()
        found.append(torch.autograd.grad(loss, side.watched))
    share = max(((a - b).norm() / b.norm()).item() for a, b in zip(*found))
    if not share < (1e-4 if ours.watched[0].dtype == torch.float32 else 5e-2):
        raise Stopped(f"Ours and diffusers' gradients differ by {share:.1e} of their norm; nothing was "
                      "timed.")
    return share
