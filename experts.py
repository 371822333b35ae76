"""The physical branch of ProPhy (arXiv 2512.05564): which physics a clip holds, then where it is.

    embed --> block 0 --(+)--> physical block --> block 2 --> ... --> physical block --> head
                         ^      in place of 1                    (attention, REB, feed-forward)
               text --> SEB

* Semantic Expert Block (SEB, Eq. 1): a router reads the text and mixes E_s learnable basis maps,
  softly, into the tokens in front of the first physical block.
* Physical blocks: the backbone's own architecture, starting from the weights of the block they
  stand beside.
* Refinement Expert Block (REB, Eq. 2), inside the last physical block: each token is sent to its
  top-k experts of E_r.

How a physical block joins is ours, and decides how well the branch learns (docs/experiments.md):
* `place`: it reads its neighbour's tokens, and its output takes the place of the neighbour's. The
  sum tokens + (physical(tokens) - block(tokens)) is the same thing, and the neighbour need not be
  computed. What one physical block adds, the next one reads.
* `plain` and `zero` are the layout of the paper's figure: the physical blocks are a stream beside
  the backbone, which starts from the embedded tokens and the basis maps, and the output of each is
  added to that of its neighbour; as it is, or through a zero-initialised linear layer, as in
  ControlNet.
Basis maps and experts start at zero. But for `plain`, the untrained branch therefore changes
nothing, to the bit. Of a backbone this file knows the block contract alone, which model.py states.

Letters: B clips, N = f h w video tokens on a grid of f times, h rows and w columns, D width,
L text tokens, S = text and video tokens together, E_s semantic and E_r refinement experts,
E_cat phenomena, k experts a token, R ranks of a factorised map.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config

Grid = tuple[int, int, int]  # video tokens along time, height, width


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
    """Expert inversion (the paper's Figure 8), an `edit` for ProPhy: the least likely physics
    becomes the likeliest."""
    return -logits


# --- semantic experts: which physics ----------------------------------------------------------
class FullMaps(nn.Module):
    """The paper's basis maps B_e: one number for each expert, channel and token."""

    def __init__(self, cfg: Config):
        super().__init__()
        # B_e, (E_s, D, f, h, w). Random maps would be noise that the blocks must first unlearn.
        self.maps = nn.Parameter(torch.zeros(cfg.semantic_experts, cfg.dim, *cfg.grid))

    def forward(self, rho: Tensor, grid: Grid) -> Tensor:
        """Weights rho (B, E_s) and a grid -> the mix of the maps (B, N, D)."""
        maps = self.maps
        if grid != maps.shape[2:]:
            maps = F.interpolate(maps, grid, mode="trilinear", align_corners=False)
        return torch.einsum("be,edn->bnd", rho.type_as(maps), maps.flatten(2))


class FactoredMaps(nn.Module):
    """B_e = sum over R ranks of time (f) x space (h, w) x width (D), outer products (ours).

    A full map of CogVideoX-5B has 54 M numbers and its 64 factors have 0.3 M, which is what a
    published branch can afford.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        f, h, w = cfg.grid
        experts, R = cfg.semantic_experts, cfg.map_rank
        # Factors of time start nearly constant, so that a fresh map does not flicker.
        self.time = nn.Parameter(1 + 0.02 * torch.randn(experts * R, 1, f))
        self.space = nn.Parameter(torch.randn(experts * R, 1, h, w))
        self.width = nn.Parameter(torch.zeros(experts, R, cfg.dim))  # so that the maps are zero

    def forward(self, rho: Tensor, grid: Grid) -> Tensor:
        """Weights rho (B, E_s) and a grid -> the mix of the maps (B, N, D)."""
        f, h, w = grid
        time = self.time  # (E_s R, 1, f)
        space = self.space  # (E_s R, 1, h, w)
        if (f, h, w) != (time.shape[-1], *space.shape[-2:]):
            time = F.interpolate(time, f, mode="linear", align_corners=False)
            space = F.interpolate(space, (h, w), mode="bilinear", align_corners=False)
        # The weights rho go to the short factor, so no map is ever laid out for a single expert.
        places = torch.einsum("kf,ks->fsk", time[:, 0], space[:, 0].flatten(1))  # (f, h w, E_s R)
        mixed = rho.type_as(self.width)[:, :, None, None] * self.width  # (B, E_s, R, D)
        return places.flatten(0, 1) @ mixed.flatten(1, 2)


class SemanticExpertBlock(nn.Module):
    """X~ = X + sum_e rho_s[e] B_e, with a learnable map B_e (N, D) for each kind of physics (Eq. 1).

    All experts take part: a hard top-k collapses at the small batches of video training. A map
    belongs to one token grid and is interpolated to any other (ours).
    """

    def __init__(self, cfg: Config, text_dim: int):
        super().__init__()
        self.temperature = cfg.semantic_temperature
        self.router = nn.Sequential(  # its depth is ours
            nn.Linear(text_dim, text_dim), nn.SiLU(), nn.Linear(text_dim, cfg.semantic_experts))
        self.basis = FactoredMaps(cfg) if cfg.map_rank else FullMaps(cfg)
        self.lift = nn.Linear(cfg.semantic_experts, cfg.categories)

    def route(self, y: Tensor, length: Tensor, edit=None) -> tuple[Tensor, Tensor, Tensor]:
        """Text -> logits (B, E_s), weights rho_s (B, E_s), and their lift (B, E_cat).

        y (B, L, D_text) is the text embedding, of which `length` (B,) rows are real words.
        """
        # The text is pooled to the mean of its real words (ours); to zero where there is none.
        real = torch.arange(y.shape[1], device=y.device) < length[:, None]  # (B, L)
        pooled = (y * real[..., None]).sum(1) / length.clamp(min=1)[:, None]  # (B, D_text)
        logits = self.router(pooled.type_as(self.router[0].weight))  # T5's output may be bf16
        if edit is not None:
            logits = edit(logits)
        rho = (logits.float() / self.temperature).softmax(dim=-1)
        return logits, rho, self.lift(rho.type_as(self.lift.weight))

    def forward(self, x: Tensor, rho: Tensor, grid: Grid) -> Tensor:
        """Video tokens (B, N, D) of the given grid, mixed with the maps."""
        return x + self.basis(rho, grid).type_as(x)  # Eq. 1


# --- refinement experts: where ----------------------------------------------------------------
class RefinementExpertBlock(nn.Module):
    """x' = x + sum over the top k of rho_r[i] e_i(x), each expert e_i a linear layer (Eq. 2).

    Router and experts read x normalised, as every other layer of a block does (ours). The tokens
    of a last block are large: a router that reads them as they are is one-hot from the first step
    on, sends all tokens to one or two experts, and learns nothing more. The residual is ours, and
    so is the start of all experts at zero. `renormalise` divides the chosen weights by their sum,
    so that a router that grows sharper does not change the size of x'.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        dim, experts = cfg.dim, cfg.refinement_experts
        self.router = nn.Linear(dim, experts)  # its depth is ours
        # All experts stand in one table each of weights and biases: e_i(x) = x W_i + b_i.
        self.weight = nn.Parameter(torch.zeros(experts, dim, dim))
        self.bias = nn.Parameter(torch.zeros(experts, dim))
        self.lift = nn.Sequential(nn.Linear(experts, 64), nn.SiLU(), nn.Linear(64, cfg.categories))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video tokens (B, N, D) -> refined (B, N, D), rho_r (B, N, E_r), its lift P'_r of Eq. 5
        (B, N, E_cat), chosen (B, N, k)."""
        z = F.layer_norm(x.float(), x.shape[-1:]).type_as(self.weight)
        rho = self.router(z).float().softmax(dim=-1)  # over all experts, before the choice
        gate, chosen = rho.topk(self.cfg.top_k, dim=-1)  # (B, N, k) each
        if self.cfg.renormalise:
            gate = gate / gate.sum(-1, keepdim=True)
        # To `dispatch` the tokens of all clips are one list (B N, ...).
        y = dispatch(z.flatten(0, 1), gate.flatten(0, 1), chosen.flatten(0, 1),
                     self.weight, self.bias).view_as(x)

        # An MLP learns slowly from inputs of 1 / E_r: times E_r (ours), an even share reads as 1.
        lift = self.lift((rho * len(self.weight)).type_as(self.weight))
        return x + y.type_as(x), rho, lift, chosen  # Eq. 2


@torch.compiler.disable  # segment sizes depend on the data, so compiled code would stop here anyway
def dispatch(x: Tensor, gate: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum_j gate[:, j] (x W_chosen[:, j] + b_chosen[:, j]): each expert sees its tokens alone.

    x (M, D), gate and chosen (M, k), weight (E, D, D), bias (E, D) -> (M, D). Sorting the M k
    choices by expert makes every expert's tokens one contiguous segment, so the work is that of k
    experts a token, not of all E. Example with M = 3, k = 1, E = 2:

        chosen [1, 0, 1] -> order [1, 0, 2], ends [1, 3]: expert 0 gets token 1, expert 1 the rest
    """
    M, k = chosen.shape
    order = chosen.flatten().argsort(stable=True)  # (M k,) choices, expert by expert
    owner = chosen.flatten()[order]  # (M k,) the expert of each, rising
    ends = torch.searchsorted(owner, torch.arange(len(weight), device=x.device), right=True)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    segments = x[order // k].to(dtype)  # choice c belongs to token c // k
    one_kernel = x.is_cuda and dtype == torch.bfloat16
    y = grouped_product(segments, weight.to(dtype), bias.to(dtype), ends, one_kernel)
    # Back to the order of tokens, by the inverse permutation. A gather adds gradients in a fixed
    # order, where index_add would not do so on a GPU, and two runs would differ.
    y = y[order.argsort()].view(M, k, -1)
    return (gate[..., None].type_as(y) * y).sum(1).type_as(x)


def grouped_product(x: Tensor, weight: Tensor, bias: Tensor, ends: Tensor,
                    one_kernel: bool) -> Tensor:
    """x W_e + b_e: of expert 0 for the rows of x up to ends[0], of expert 1 up to ends[1], and so on.

    In one kernel of a GPU the ends stay a tensor, for which Python would have to wait. It wants rows
    of whole 16 bytes and a short dtype, and a CPU gains nothing by it.
    """
    sizes = ends.diff(prepend=ends.new_zeros(1))
    if one_kernel:
        biases = bias.repeat_interleave(sizes, dim=0, output_size=len(x))
        return F.grouped_mm(x, weight, offs=ends.int()) + biases
    segments = x.split(sizes.tolist())
    return torch.cat([torch.addmm(b, rows, w) for rows, w, b in zip(segments, weight, bias)])


# --- the branch -------------------------------------------------------------------------------
class ProPhy(nn.Module):
    """A backbone with the physical branch beside it.

        prediction, routing = model(x, t, text, text_length, edit=None)

    Three separate steps: build; load the backbone; `init_from_backbone()`, which matters where the
    backbone was loaded after building. A checkpoint that is loaded later overwrites all of it.
    `edit` maps semantic logits (B, E_s) to others, for example `invert`.
    """

    def __init__(self, backbone: nn.Module, cfg: Config):
        super().__init__()
        self.backbone = backbone
        self.at = cfg.physical_at  # rising indices of the backbone blocks with one beside them
        self.leaves_backbone = cfg.freeze_backbone and not cfg.lora_rank  # as stage one made it
        # Without physical blocks nothing would read what the experts do to the tokens.
        self.semantic = self.refinement = None
        if cfg.semantic and self.at:
            self.semantic = SemanticExpertBlock(cfg, backbone.text_dim)
        self.physical = nn.ModuleList(copy.deepcopy(backbone.blocks[i]) for i in self.at)
        # LoRA comes after the copies were made, because these train all their weights anyway.
        if cfg.lora_rank:
            add_lora(backbone, cfg)
        if cfg.refinement and self.at:
            self.refinement = RefinementExpertBlock(cfg)
        # Zero-initialised injection: the untrained branch adds nothing to the backbone's tokens.
        # These layers get the first gradient of the diffusion loss, and pass it on once they are
        # not zero; the routers learn from the alignment losses from the first step on.
        self.in_place = cfg.injection == "place"
        self.inject = nn.ModuleList(
            nn.Linear(cfg.dim, cfg.dim) if cfg.injection == "zero" else nn.Identity()
            for _ in self.at)
        for parameter in self.inject.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def init_from_backbone(self) -> None:
        """Each physical block starts as a copy of the backbone block it stands beside."""
        for i, block in zip(self.at, self.physical):
            # Not strict, because LoRA's corrections are left behind.
            block.load_state_dict(self.backbone.blocks[i].state_dict(), strict=False)

    def branch_state(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all that is not the backbone's own: stage two trains this, and a
        lab publishes it."""
        return {name: p for name, p in self.named_parameters()
                if not name.startswith("backbone.") or name.endswith((".down", ".up"))}  # LoRA's

    def route(self, text: Tensor, text_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which physics, from the words alone -> rho_s (B, E_s), its lift (B, E_cat)."""
        y, text_length = self.backbone.encode_text(text, text_length)
        return self.semantic.route(y, text_length)[1:]

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_length: Tensor | None = None,
                edit=None) -> tuple[Tensor, Routing]:
        """The backbone's arguments, and `edit` -> prediction, shaped as x, and its Routing."""
        tokens, condition = self.backbone.embed(x, t, text, text_length)
        n = condition.n_text  # text tokens stand in front, and no expert touches them
        routing = Routing()

        # Which physics: the weights of the basis maps, and what they add to a stream of tokens.
        if self.semantic is not None:
            found = self.semantic.route(condition.text, condition.text_length, edit)
            routing.semantic_logits, routing.semantic, routing.semantic_lift = found

        def with_maps(stream: Tensor) -> Tensor:
            if self.semantic is None:
                return stream
            video = self.semantic(stream[:, n:], routing.semantic, condition.grid)
            return torch.cat([stream[:, :n], video], dim=1)

        # Where: this runs in the middle of the last physical block. It returns what it finds and
        # stores nothing outside, because checkpointing calls it twice.
        def refine(hidden: Tensor) -> tuple[Tensor, list[Tensor]]:  # of (B, S, D)
            video, *found = self.refinement(hidden[:, n:])
            return torch.cat([hidden[:, :n], video], dim=1), found

        branch = None if self.in_place else with_maps(tokens)
        for i, block in enumerate(self.backbone.blocks):
            if i not in self.at:
                tokens = block(tokens, condition)
                continue

            # A physical block reads the branch, or in place the tokens that its neighbour would.
            j = self.at.index(i)
            if self.in_place:
                branch = with_maps(tokens) if j == 0 else tokens
            if i == self.at[-1] and self.refinement is not None:
                branch, found = self.physical[j](branch, condition, refine)
                routing.refinement, routing.refinement_lift, routing.chosen = found
            else:
                branch = self.physical[j](branch, condition)

            # Its output is what its neighbour's would be, or is added to that.
            if self.in_place:
                tokens = branch
                continue
            tokens = block(tokens, condition)
            video = tokens[:, n:] + self.inject[j](branch[:, n:])
            tokens = torch.cat([tokens[:, :n], video], dim=1)
        return self.backbone.head(tokens, condition), routing


# --- the paper's rival ------------------------------------------------------------------------
class LoRA(nn.Linear):
    """y = W x + b + (alpha / r) U D x: a frozen linear layer and a trained correction of rank r.

    (Hu et al. 2021.) U starts at zero, so an untrained one changes nothing, to the bit. W and b
    keep their names in the state dict.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        # The meta device takes no memory for weights that are replaced at once.
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        device = linear.weight.device
        down = torch.randn(rank, linear.in_features, device=device) * linear.in_features**-0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        # The correction keeps the dtype of its own weights: float32 beside a bf16 backbone.
        correction = F.linear(F.linear(x.type_as(self.down), self.down), self.up)
        y = super().forward(x)
        return y + self.scale * correction.type_as(y)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A linear layer with the correction in its weight."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        correction = self.scale * self.up @ self.down
        linear.weight = nn.Parameter(self.weight + correction.type_as(self.weight))
        linear.bias = self.bias
        return linear


def add_lora(backbone: nn.Module, cfg: Config) -> None:
    """Put a LoRA around every linear layer of the backbone's blocks whose last name is a target,
    such as "to_q"."""
    targets = cfg.lora_targets.split(",")
    for name, module in list(backbone.blocks.named_modules()):  # a list: the loop changes them
        if isinstance(module, nn.Linear) and name.split(".")[-1] in targets:
            lora = LoRA(module, cfg.lora_rank, cfg.lora_alpha or cfg.lora_rank)
            backbone.blocks.set_submodule(name, lora)


def merge_lora(backbone: nn.Module) -> None:
    """Turn every LoRA of the backbone's blocks back into one linear layer."""
    for name, module in list(backbone.blocks.named_modules()):
        if isinstance(module, LoRA):
            backbone.blocks.set_submodule(name, module.merged())
