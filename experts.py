"""The physical branch of ProPhy (arXiv 2512.05564): which physics a clip holds, then which token follows which.

    backbone:   embed ----> block 0 ----> block 1 ----(+)----> block 2 ----> ... ----(+)----> head
                  |                                    ^                               ^
                  |                                 inject                          inject
                  |                                    |                               |
    branch:       +-> SEB ---------------------> physical block ----> ... ----> physical block
                       ^                                                 (attention, REB, feed-forward)
                   text y

* Semantic Expert Block (SEB, Eq. 1): a router reads the text and mixes E_s learnable basis maps, softly, into the
  tokens.
* Physical blocks: the backbone's own architecture, starting from the weights of the block they stand beside.
* Refinement Expert Block (REB, Eq. 2), inside the last physical block: each token is sent to its top-k experts of E_r.

Of a backbone this file knows the block contract alone (model.py says it). Untrained, the branch changes nothing, to
the bit: injection is a zero-initialised linear (ours, as in ControlNet; the paper's figure draws a plain +, which is
a switch).

Letters: B clips, N = T' h w video tokens, D width, L text tokens, E_s, E_r experts, E_cat phenomena, k experts a token.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Routing:
    """What losses and pictures need of one forward; None where the part is switched off."""

    semantic_logits: Tensor | None = None  # (B, E_s)
    semantic: Tensor | None = None  # rho_s (B, E_s), rows sum to 1
    semantic_lift: Tensor | None = None  # rho_s lifted to the categories (B, E_cat)
    refinement: Tensor | None = None  # rho_r (B, N, E_r), rows sum to 1
    refinement_lift: Tensor | None = None  # P'_r (B, N, E_cat)
    chosen: Tensor | None = None  # top-k experts of each token (B, N, k)


def invert(logits: Tensor) -> Tensor:
    """Expert inversion (the paper's Figure 8): the least likely physics becomes the likeliest. An `edit` for ProPhy."""
    return -logits


class FullMaps(nn.Module):
    """The paper's basis maps, a number an expert, token and channel: rho (B, E_s), grid -> their mix (B, N, D)."""

    def __init__(self, grid: tuple[int, int, int], dim: int, experts: int):
        super().__init__()
        self.maps = nn.Parameter(torch.randn(experts, dim, *grid) * 0.02)  # B_e, (E_s, D, T', h, w)

    def forward(self, rho: Tensor, grid: tuple[int, int, int]) -> Tensor:
        maps = self.maps
        if tuple(grid) != tuple(maps.shape[2:]):
            maps = F.interpolate(maps, grid, mode="trilinear", align_corners=False)
        return torch.einsum("be,edn->bnd", rho.type_as(maps), maps.flatten(2))


class FactoredMaps(nn.Module):
    """B_e = sum over R ranks of time (T') x space (h, w) x width (D), outer products (ours).

    A full map of CogVideoX-5B has 54 M numbers, its 64 factors 0.3 M: that is what a published branch can afford.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int, experts: int, rank: int):
        super().__init__()
        T, h, w = grid
        self.time = nn.Parameter(1 + 0.02 * torch.randn(experts * rank, 1, T))  # nearly constant at first
        self.space = nn.Parameter(torch.randn(experts * rank, 1, h, w))
        self.width = nn.Parameter(torch.randn(experts, rank, dim) * 0.02 * rank**-0.5)

    def forward(self, rho: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (T, h, w), (E, R, D) = grid, self.width.shape
        time, space = self.time, self.space
        if (T, h, w) != (time.shape[-1], *space.shape[-2:]):
            time = F.interpolate(time, T, mode="linear", align_corners=False)
            space = F.interpolate(space, (h, w), mode="bilinear", align_corners=False)
        where = torch.einsum("kt,ks->tsk", time[:, 0], space[:, 0].flatten(1)).flatten(0, 1)  # (N, E R)
        width = (rho.type_as(self.width)[:, :, None, None] * self.width).flatten(1, 2)  # (B, E R, D)
        return where @ width


class SemanticExpertBlock(nn.Module):
    """X~ = X + sum_e rho_s[e] B_e, with one learnable map B_e (N, D) for each kind of physical knowledge (Eq. 1).

    All experts take part: a hard top-k collapses at the small batches of video training. A map is tied to one token
    grid and is interpolated to any other (ours). Its rank 0 means full maps.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int, text_dim: int, experts: int, categories: int,
                 rank: int = 0):
        super().__init__()
        # its depth is ours
        self.router = nn.Sequential(nn.Linear(text_dim, text_dim), nn.SiLU(), nn.Linear(text_dim, experts))
        self.basis = FactoredMaps(grid, dim, experts, rank) if rank else FullMaps(grid, dim, experts)
        self.lift = nn.Linear(experts, categories)

    def route(self, y: Tensor, length: Tensor, edit=None) -> tuple[Tensor, Tensor, Tensor]:
        """Text y (B, L, D_text), of which `length` (B,) rows are real -> logits, rho_s (B, E_s) and their lift (B,
        E_cat)."""
        real = torch.arange(y.shape[1], device=y.device) < length[:, None]  # (B, L)
        pooled = (y * real[..., None]).sum(1) / length.clamp(min=1)[:, None]  # mean of real tokens (ours); 0 if none
        logits = self.router(pooled.type_as(self.router[0].weight))  # T5's output may be bf16
        if edit is not None:
            logits = edit(logits)
        rho = logits.float().softmax(dim=-1)
        return logits, rho, self.lift(rho.type_as(self.lift.weight))

    def forward(self, x: Tensor, rho: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Video tokens (B, N, D) of the given grid, mixed with the maps."""
        return x + self.basis(rho, grid).type_as(x)  # Eq. 1


class RefinementExpertBlock(nn.Module):
    """x' = sum over the top k of rho_r[i] e_i(x), each expert e_i a linear layer (Eq. 2).

    A residual around it and no renormalisation of the chosen weights are ours, and switches.
    """

    def __init__(self, dim: int, experts: int, k: int, categories: int, residual: bool = True,
                 renormalise: bool = False):
        super().__init__()
        self.k, self.residual, self.renormalise = k, residual, renormalise
        self.router = nn.Linear(dim, experts)  # depth: ours
        self.weight = nn.Parameter(torch.randn(experts, dim, dim) * dim**-0.5)  # e_i(x) = x W_i + b_i
        self.bias = nn.Parameter(torch.zeros(experts, dim))
        self.lift = nn.Sequential(nn.Linear(experts, 64), nn.SiLU(), nn.Linear(64, categories))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Video tokens (B, N, D) -> their refinement (B, N, D), rho_r (B, N, E_r), chosen experts (B, N, k)."""
        rho = self.router(x).float().softmax(dim=-1)
        gate, chosen = rho.topk(self.k, dim=-1)
        if self.renormalise:
            gate = gate / gate.sum(-1, keepdim=True)
        y = dispatch(x.flatten(0, 1), gate.flatten(0, 1), chosen.flatten(0, 1), self.weight, self.bias).view_as(x)
        return x + y if self.residual else y, rho, chosen

    def lifted(self, rho: Tensor) -> Tensor:
        """P'_r of Eq. 5: rho_r (B, N, E_r) through the MLP -> (B, N, E_cat). Times E_r (ours), so that an expert's even
        share reads as 1 and not as 1 / E_r, from which an MLP learns slowly."""
        return self.lift((rho * rho.shape[-1]).type_as(self.lift[0].weight))


@torch.compiler.disable  # segment sizes depend on the data; compiled code would break the graph here anyway
def dispatch(x: Tensor, gate: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum_j gate[:, j] * (x W_chosen[:, j] + b_chosen[:, j]), visiting each expert once with just its tokens.

    x (M, D), gate and chosen (M, k), weight (E, D, D), bias (E, D) -> (M, D). Sorting the M k choices by expert makes
    every expert's tokens one contiguous segment, so the work is that of k experts a token, not of all E.
    """
    M, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # (M k,) choices, expert by expert
    sizes = chosen.flatten().bincount(minlength=len(weight)).tolist()
    segments = x[order // k].split(sizes)
    y = torch.cat([torch.addmm(b, segment, w) for segment, w, b in zip(segments, weight, bias)])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(M * k, device=order.device))  # inverse permutation
    y = y[back].view(M, k, -1)  # a gather adds in a fixed order, where index_add would not on a GPU
    return (gate[..., None].type_as(y) * y).sum(1).type_as(x)


class ProPhy(nn.Module):
    """A backbone with the physical branch beside it: `(prediction, Routing) = model(x, t, text, text_length,
    edit=None)`.

    Three separate steps: build; load the backbone; `init_from_backbone()`, which a resumed run skips. `edit` maps
    semantic logits (B, E_s) to others, for example `invert`.
    """

    def __init__(self, backbone: nn.Module, cfg):
        super().__init__()
        self.backbone, self.at, dim = backbone, cfg.physical_at, cfg.dim
        self.semantic = self.refinement = None
        if cfg.semantic and self.at:  # without physical blocks nothing would read its tokens
            self.semantic = SemanticExpertBlock(cfg.grid, dim, backbone.text_dim, cfg.semantic_experts, cfg.categories,
                                                cfg.map_rank)
        self.physical = nn.ModuleList(copy.deepcopy(backbone.blocks[i]) for i in self.at)
        if cfg.lora_rank:  # after the copies, which train all their weights anyway
            add_lora(backbone, cfg.lora_rank, cfg.lora_alpha or cfg.lora_rank, cfg.lora_targets.split(","))
        if cfg.refinement and self.at:
            self.refinement = RefinementExpertBlock(dim, cfg.refinement_experts, cfg.top_k, cfg.categories,
                                                    cfg.residual, cfg.renormalise)
        self.inject = nn.ModuleList(nn.Linear(dim, dim) if cfg.injection == "zero" else nn.Identity() for _ in self.at)
        for linear in self.inject:
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def init_from_backbone(self) -> None:
        """Each physical block starts as a copy of the backbone block it stands beside."""
        for i, block in zip(self.at, self.physical):
            block.load_state_dict(own_state(self.backbone.blocks[i]))

    def branch_state(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all that is not the backbone's own: what stage two trains, and what a lab publishes."""
        return {name: p for name, p in self.named_parameters()
                if not name.startswith("backbone.") or name.endswith(LORA_NAMES)}

    def branch_parameters(self) -> list[nn.Parameter]:
        return list(self.branch_state().values())

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None,
                edit=None) -> tuple[Tensor, Routing]:
        tokens, condition = self.backbone.embed(x, t, text, text_length)
        n, routing = condition.n_text, Routing()
        branch = tokens
        if self.semantic is not None:
            logits, rho, lift = self.semantic.route(condition.text, condition.text_length, edit)
            routing.semantic_logits, routing.semantic, routing.semantic_lift = logits, rho, lift
            branch = torch.cat([tokens[:, :n], self.semantic(tokens[:, n:], rho, condition.grid)], dim=1)

        def refine(h: Tensor) -> Tensor:  # (B, S, D), called inside the last physical block
            video, routing.refinement, routing.chosen = self.refinement(h[:, n:])
            routing.refinement_lift = self.refinement.lifted(routing.refinement)
            return torch.cat([h[:, :n], video], dim=1)

        for i, block in enumerate(self.backbone.blocks):
            tokens = block(tokens, condition)
            if i in self.at:
                j = self.at.index(i)
                last = j == len(self.at) - 1
                branch = self.physical[j](branch, condition, refine if last and self.refinement is not None else None)
                tokens = torch.cat([tokens[:, :n], tokens[:, n:] + self.inject[j](branch[:, n:])], dim=1)
        return self.backbone.head(tokens, condition), routing


# --- the paper's rival ------------------------------------------------------------------------------------------------
class LoRA(nn.Linear):
    """y = W x + b + (alpha / r) U D x: a frozen linear layer with a trained correction of rank r (Hu et al. 2021).

    U starts at zero, so an untrained one changes nothing, to the bit. W and b keep their names.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, device=device) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        correction = F.linear(F.linear(x.type_as(self.down), self.down), self.up)
        y = super().forward(x)
        return y + self.scale * correction.type_as(y)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer with the correction in its weight."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.weight + (self.scale * self.up @ self.down).type_as(self.weight))
        linear.bias = self.bias
        return linear

LORA_NAMES = (".down", ".up")


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict without LoRA's corrections."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(LORA_NAMES)}


def put(block: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the sub-module of this dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(owner), leaf, module)


def add_lora(backbone: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Put a LoRA around every linear layer of the backbone's blocks whose last name is a target, such as "to_q"."""
    for block in backbone.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
                put(block, name, LoRA(module, rank, alpha))


def merge_lora(backbone: nn.Module) -> None:
    """Turn every LoRA of the backbone's blocks back into one linear layer."""
    for block in backbone.blocks:
        for name, module in list(block.named_modules()):
            if isinstance(module, LoRA):
                put(block, name, module.merged())
