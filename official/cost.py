"""What a run would cost: parameters, FLOPs and memory of a step, counted on the meta device."""
import math

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from experts import ProPhy
from model import build_backbone


GIB = 2**30


def block_cost(backbone: nn.Module, cfg: Config) -> tuple[float, float, int, int]:
    """One block on one clip, on the meta device: FLOPs of its linear layers and of its attention, forward; bytes that
    autograd keeps of it, and bytes of its input. Counted by torch, in bf16; scores are left out, as no fused kernel
    keeps them."""
    backbone.bfloat16()
    x = torch.zeros(1, cfg.channels, *(n * p for n, p in zip(cfg.grid, (cfg.patch_t, cfg.patch, cfg.patch))))
    text = torch.zeros(1, cfg.text_len, cfg.text_dim).bfloat16() if cfg.text_dim else torch.ones(1, cfg.text_len).long()
    tokens, condition = backbone.embed(x.bfloat16(), torch.zeros(1), text)
    kept, weights = {}, {p.untyped_storage() for p in backbone.parameters()}

    def keep(saved: Tensor) -> Tensor:
        S = tokens.shape[1]
        scores = saved.ndim > 2 and saved.shape[-2] == S and saved.shape[-1] in (S, cfg.text_len)
        if not scores and saved.untyped_storage() not in weights:
            kept[saved.untyped_storage()] = saved.untyped_storage().nbytes()
        return saved
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        backbone.blocks[0](tokens, condition)
    flops = counter.get_flop_counts()["Global"]
    attention = sum(n for operation, n in flops.items() if "attention" in str(operation))
    return sum(flops.values()) - attention, attention, sum(kept.values()), tokens.nbytes


def plan(cfg: Config) -> None:
    """--dry_run: parameters, tokens, FLOPs and memory of a step, from shapes alone: no weights are needed.

    Embeddings, head, routers and experts (a percent or two) are left out of FLOPs and activations. Backward: a linear
    layer costs one forward for its input and, if it trains, one for its weight; attention 2.5, as its kernel makes the
    scores again. No gradient passes the backbone's blocks up to the first physical one. Memory: frozen weights in bf16,
    trained ones in float32 with gradient, two moments and average.
    """
    with torch.device("meta"):
        backbone = build_backbone(cfg, vocabulary=120)
        model = ProPhy(backbone, cfg) if cfg.physics_steps else backbone
        total = sum(p.numel() for p in model.parameters())
        branch = sum(p.numel() for p in model.branch_parameters()) if cfg.physics_steps else 0
        linear, attention, kept, entry = block_cost(backbone, cfg)
    frozen = cfg.physics_steps and cfg.freeze_backbone
    trained = branch if frozen else total
    copies = len(cfg.physical_at) if cfg.physics_steps else 0
    first = cfg.physical_at[0] + 1 if frozen and copies and not cfg.lora_rank else 0
    passed = cfg.depth - first  # blocks of the backbone that a gradient passes
    forward = (cfg.depth + copies) * (linear + attention)
    backward = passed * ((1 if frozen else 2) * linear + 2.5 * attention) + copies * (2 * linear + 2.5 * attention)
    again = (passed + copies) * (linear + attention)
    weights, states = 2 * (total - trained) + 4 * trained, 16 * trained
    plain = (passed + copies) * kept * cfg.batch_size
    lean = ((passed + copies) * entry + kept) * cfg.batch_size
    print(f"{cfg.config}: {cfg.lineage}, {cfg.frames} frames of {cfg.height} x {cfg.width}, "
          f"{math.prod(cfg.grid):,} video + {cfg.text_len} text tokens\n"
          f"parameters: backbone {(total - branch) / 1e6:,.2f} M, branch {branch / 1e6:,.2f} M, trained "
          f"{trained / 1e6:,.2f} M\n"
          f"TFLOPs a clip: backbone forward {cfg.depth * (linear + attention) / 1e12:,.4g}, step "
          f"{(forward + backward) / 1e12:,.4g}, with --checkpointing {(forward + backward + again) / 1e12:,.4g}; "
          f"{cfg.batch_size} a step\n"
          f"memory in GiB: weights {weights / GIB:,.1f}, gradients, optimizer and average {states / GIB:,.1f}, "
          f"activations {plain / GIB:,.1f}, with --checkpointing {lean / GIB:,.1f} (batch {cfg.batch_size})")
    for card in (24, 80, 141):
        room = 0.94 * card * 1e9 - weights - states  # the rest goes to kernels' workspace and fragmentation
        lean_fits = "fits with --checkpointing" if lean < room else "does not fit"
        print(f"{card} GB: {'fits' if plain < room else lean_fits}")
