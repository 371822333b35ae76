"""What a run would cost: parameters, FLOPs and memory of a step, counted on the meta device."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from experts import ProPhy
from model import build_backbone


GIB = 2**30
CARDS = (24, 80, 141)  # GB of memory that a GPU may have
WORLDS = (1, 8, 64)  # GPUs


def input_size(cfg: Config) -> tuple[int, int, int, int]:
    """(C, F, H, W) of what the network sees: pixels, or latents padded to whole patches."""
    frames, rows, columns = cfg.grid
    return cfg.channels, frames * cfg.patch_t, rows * cfg.patch, columns * cfg.patch


def block_cost(backbone: nn.Module, cfg: Config) -> tuple[float, float, int, int]:
    """One block on one clip, forward, on the meta device and in bf16, as torch counts it.

    -> FLOPs of its linear layers, and of its attention; bytes that autograd keeps of it, and bytes
    of its input. Scores of attention are left out, as no fused kernel keeps them.
    """
    backbone.bfloat16()
    x = torch.zeros(1, *input_size(cfg)).bfloat16()
    text = torch.ones(1, cfg.text_len).long()
    if cfg.text_dim:
        text = torch.zeros(1, cfg.text_len, cfg.text_dim).bfloat16()
    tokens, condition = backbone.embed(x, torch.zeros(1), text)
    weights = {p.untyped_storage() for p in backbone.parameters()}
    kept = {}  # storage -> its bytes

    def keep(saved: Tensor) -> Tensor:
        S = tokens.shape[1]
        scores = saved.ndim > 2 and saved.shape[-2] == S and saved.shape[-1] in (S, cfg.text_len)
        storage = saved.untyped_storage()  # several views share one
        if not scores and storage not in weights:
            kept[storage] = storage.nbytes()
        return saved

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        backbone.blocks[0](tokens, condition)
    flops = counter.get_flop_counts()["Global"]
    # On the meta device it may be counted as the two products that it is made of.
    names = ("attention", "bmm")
    attention = sum(n for operation, n in flops.items() if any(name in str(operation) for name in names))
    return sum(flops.values()) - attention, attention, sum(kept.values()), tokens.nbytes


@dataclass
class Cost:
    """What a step of the last stage of a run costs, counted from shapes."""
    backbone: int  # parameters
    branch: int
    trained: int
    forward: float  # FLOPs of a clip through the backbone alone
    step: float  # of a clip, forward and backward
    useful: float  # the same as it is usually counted: without what attention's kernel makes again
    again: float  # more with --checkpointing
    weights: float  # bytes; of a trained one 4, of a frozen one 2
    states: float  # bytes of gradients, moments and averages
    plain: float  # bytes of activations of a clip
    lean: float  # with --checkpointing
    whole: float  # bytes that a GPU of several holds undivided while it uses them


def count(cfg: Config) -> Cost:
    """On the meta device. Embeddings, head, routers and experts (a percent or two) are left out of
    FLOPs and activations."""
    stage_two = cfg.physics_steps > 0
    with torch.device("meta"):
        backbone = build_backbone(cfg, vocabulary=120)
        model = ProPhy(backbone, cfg) if stage_two else backbone
        total = sum(p.numel() for p in model.parameters())
        branch = sum(p.numel() for p in model.branch_state().values()) if stage_two else 0
        linear, attention, kept, entry = block_cost(backbone, cfg)
        one = sum(p.numel() for p in backbone.blocks[0].parameters())
    frozen = stage_two and cfg.freeze_backbone
    trained = branch if frozen else total

    # No gradient passes the blocks up to the first that a physical block stands beside, unless LoRA
    # sits in them or the backbone trains along.
    copies = len(cfg.physical_at) if stage_two else 0
    in_place = cfg.injection == "place"  # the neighbour of a physical block is not computed then
    run = cfg.depth - copies * in_place
    shut = frozen and copies and not cfg.lora_rank
    passed = run - (cfg.physical_at[0] + (not in_place) if shut else 0)

    # A linear layer's backward pass costs one forward for its input and, if it trains, one for its
    # weight; that of attention costs 2.5, as its kernel makes the scores again.
    block = linear + attention
    in_backbone = (1 if frozen else 2) * linear + 2.5 * attention
    in_branch = 2 * linear + 2.5 * attention
    step = (run + copies) * block + (passed * in_backbone + copies * in_branch)
    scores_again = 0.5 * attention * (passed + copies)

    # --keep_attention keeps an output as large as the input, and does not compute it again.
    attention_again = 0 if cfg.keep_attention else attention
    inputs = 2 * entry if cfg.keep_attention else entry

    # Frozen weights are kept in bf16; trained ones in float32, with gradient, moments and average.
    # Undivided are two blocks, as the next one is on its way, and all that stands outside of them.
    return Cost(
        backbone=total - branch,
        branch=branch,
        trained=trained,
        forward=cfg.depth * block,
        step=step,
        useful=step - scores_again,
        again=(passed + copies) * (linear + attention_again),
        weights=2 * (total - trained) + 4 * trained,
        states=16 * trained,
        plain=(passed + copies) * kept,
        lean=(passed + copies) * inputs + kept,
        whole=2 * (2 * one + total - (cfg.depth + copies) * one))


def plan(cfg: Config) -> None:
    """--dry_run: print parameters, tokens, FLOPs and memory of a step."""
    c = count(cfg)
    print(f"{cfg.config}: {cfg.lineage}, {cfg.frames} frames of {cfg.height} x {cfg.width}, "
          f"{math.prod(cfg.grid):,} video + {cfg.text_len} text tokens\n"
          f"parameters: backbone {c.backbone / 1e6:,.2f} M, branch {c.branch / 1e6:,.2f} M, "
          f"trained {c.trained / 1e6:,.2f} M\n"
          f"TFLOPs a clip: backbone forward {c.forward / 1e12:,.4g}, step {c.step / 1e12:,.4g}, "
          f"with --checkpointing {(c.step + c.again) / 1e12:,.4g}; {cfg.batch_size} a step\n"
          f"memory in GiB: weights {c.weights / GIB:,.1f}, "
          f"gradients, optimizer and average {c.states / GIB:,.1f}, activations of a clip "
          f"{c.plain / GIB:,.1f}, with --checkpointing {c.lean / GIB:,.1f}")
    for gpus in WORLDS:
        print(on_gpus(cfg, gpus, c))


def on_gpus(cfg: Config, gpus: int, c: Cost) -> str:
    """What each of so many GPUs needs, and which cards have it, in one line."""
    clips = cfg.micro_batch or max(1, cfg.batch_size // gpus)
    fixed = (c.weights + c.states) / gpus + (c.whole if gpus > 1 else 0)
    needed = {"": fixed + clips * c.plain, " with --checkpointing": fixed + clips * c.lean}
    said = []
    for card in CARDS:
        room = 0.94 * card * 1e9  # workspace and fragmentation take the rest
        how = next((how for how, n in needed.items() if n < room), None)
        said.append(f"{card} GB: {'does not fit' if how is None else 'fits' + how}")
    sizes = " or ".join(f"{n / GIB:,.1f}{how}" for how, n in needed.items())
    return (f"{gpus} GPU{'s' * (gpus > 1)}, {clips} clip{'s' * (clips > 1)} at once, GiB each: {sizes}; "
            f"{', '.join(said)}")
