"""Diffusers' transformers as a reference for ours: the same architecture, arguments and weights.

Needs diffusers (requirements-extra.txt).
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import Config
from model import build_backbone
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
