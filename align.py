"""The three losses that teach the routers, and the target that a teacher's attention maps become.

    L = L_diffusion + 0.1 L_coarse + 0.02 L_fine_align + 0.01 L_fine_balance
                                                           (Eq. 6; the weights stand in config.py)

L_coarse tells the semantic router *which* physics a clip holds, L_fine_align tells the refinement
router *where* it is, and L_fine_balance keeps all of its experts in use. This file also says which
clips enter L_coarse. All functions are pure. By default the target is the exact masks of the
synthetic clips (data.py, `Clips.targets`); with --teacher it is made here, by `map_target`, of the
attention maps that teacher.py has written.

Experts have no names. A router's weights are therefore *lifted*: a small learned linear layer maps
them from experts to the named phenomena, where they can be compared with labels and masks.

Letters: B clips, N video tokens, E_s semantic and E_r refinement experts, E_cat phenomena,
k experts per token.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config


def labelled(text_length: Tensor, categories: Tensor) -> Tensor:
    """Which clips enter L_coarse, (B,) bool: those with a caption and at least one label.

    text_length (B,) is 0 where the caption was dropped for guidance: the router then has nothing
    to read. categories (B, E_cat) are multi-hot labels: without one there is nothing to compare.
    """
    return (text_length > 0) & (categories.sum(1) > 0)


def coarse_loss(p_s: Tensor, q_s: Tensor, kind: str = "relative",
                reduction: str = "mean") -> Tensor:
    """L_coarse (Eq. 3-4): clips with alike physics should be routed alike.

    p_s (B, E_cat): the semantic router's weights rho_s, lifted to the categories.
    q_s (B, E_cat): multi-hot labels, at least one per clip (see `labelled`).
    kind: "relative" compares the cosine similarity of every pair of clips in P_s and in Q_s, so
    that no lifted weight needs a fixed meaning. "bce" reads p_s as logits of the named phenomena:
    this is the paper's ablation.
    reduction: over pairs (over entries for "bce"). The paper prints a sum; the mean is ours,
    because a sum over pairs grows with B^2.

    Raises ValueError for a batch of one under "relative", which has no pair. train.py does not
    ask where fewer than two clips are labelled.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(p_s.float(), q_s.float(), reduction=reduction)
    if len(p_s) < 2:
        raise ValueError("L_coarse compares pairs of clips; a batch of one has none.")
    P = _cosines(p_s)  # Eq. 3
    Q = _cosines(q_s)
    # Both matrices are symmetric with ones on the diagonal, so each pair is taken once.
    i, j = torch.triu_indices(len(P), len(P), offset=1, device=P.device)
    error = (P[i, j] - Q[i, j]).square()  # Eq. 4
    return error.sum() if reduction == "sum" else error.mean()


def fine_align_loss(p_r: Tensor, target: Tensor, mask: Tensor, reduction: str = "mean",
                    total: Tensor | None = None) -> Tensor:
    """L_fine_align (Eq. 5): sum over M > 0 of M (P'_r - Q_r)^2; all three are (B, N, E_cat).

    p_r: refinement probabilities, lifted to the categories and not bounded. mask: 0 leaves an entry
    out, and its gradient is then exactly zero; values between 0 and 1 give it less weight. The mean
    (ours) is over the mask's total, so that the weight does not depend on the resolution. An empty
    mask gives 0. total: of the mask of the whole batch, where these clips are a part of one: the
    losses of the parts then add up to that of the batch.
    """
    error = torch.where(mask > 0, mask * (p_r.float() - target).square(), 0).sum()
    total = mask.sum() if total is None else total
    return error if reduction == "sum" else error / total.clamp(min=1e-6)


def choices(chosen: Tensor, E_r: int) -> Tensor:
    """How often each of E_r experts was chosen, (E_r,) float32; chosen (..., k) are their indices."""
    counts = torch.zeros(E_r, device=chosen.device)
    # torch.bincount would make a GPU wait for the largest index.
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.float))


def balance_loss(rho_r: Tensor, chosen: Tensor, f: Tensor | None = None) -> Tensor:
    """L_fine_balance, the load-balancing loss of Switch Transformers: E_r sum_i f_i p_i.

    (Fedus et al. 2021, Eq. 4.) rho_r (B, N, E_r) are router probabilities, chosen (B, N, k) the
    indices of the experts taken. f_i is expert i's share of all choices, p_i its mean probability.
    Even use gives 1; everything through one expert gives E_r. Only p carries a gradient.

    f (E_r,): shares to take in place of these clips' own. In training they are those of the step
    before (ours): the loss is then a sum over clips, so that a batch can be computed in parts, on
    any number of processes, and is the same.
    """
    E_r = rho_r.shape[-1]
    if f is None:
        f = choices(chosen, E_r) / chosen.numel()
    return E_r * (f * rho_r.float().flatten(0, -2).mean(0)).sum()


def semantic_balance_loss(rho_s: Tensor) -> Tensor:
    """Ours: E_s sum_e p_e^2, with p_e the mean weight of semantic expert e over the clips.

    rho_s (B, E_s). Even use over the clips gives 1, and everything through one expert E_s. L_coarse
    compares clips and does not care how many experts it does that with; unused basis maps would
    learn nothing.
    """
    return rho_s.shape[1] * rho_s.float().mean(0).square().sum()


def relative(maps: Tensor, background: Tensor, kind: str = "subtract") -> Tensor:
    """Attention (...) against that of a generic question (...): positive where it drew more.

    Both are densities (uniform attention is 1). kind: "subtract" is the paper's; "divide" (arXiv
    2502.17422) gives weight to places that a generic question ignores; "none" compares with
    uniform attention.
    """
    if kind == "none":
        return maps - 1
    if kind == "subtract":
        return maps - background
    return maps / background.clamp(min=1e-3) - 1


def map_target(maps: Tensor, background: Tensor, categories: Tensor, negatives: float = 0.0,
               kind: str = "subtract") -> tuple[Tensor, Tensor]:
    """A teacher's attention maps -> (target Q_r, mask M), both (B, N, E_cat), for fine_align_loss.

    maps (B, N, E_cat): attention of the answer about each phenomenon, as a density (uniform
    attention is 1). background (B, N): the same for a generic question. NaN means that the teacher
    says nothing. The paper's rule: M is 1 where the category is annotated as present (categories
    (B, E_cat)) and the difference (`relative`) is positive. The target is the difference over its
    largest value in the clip, so that it lies in 0..1 (ours). `negatives` (0 is the paper's) is
    the weight of a pull to zero at the other tokens of present categories.
    """
    difference = relative(maps, background[..., None], kind)
    present = (categories[:, None] > 0) & difference.isfinite()  # (B, N, E_cat)
    positive = present & (difference > 0)
    target = torch.where(positive, difference, 0)
    # The clamp is for clips without a positive token: 0 / 0 would make the whole loss NaN.
    target = target / target.amax(dim=1, keepdim=True).clamp(min=1e-6)
    return target, positive + negatives * (present & ~positive)


def total_loss(losses: dict[str, Tensor], cfg: Config) -> Tensor:
    """Eq. 6: the weighted sum of the terms that are there; a stage or a switch leaves some out."""
    weights = {
        "diffusion": 1.0,
        "coarse": cfg.coarse_weight,
        "fine_align": cfg.fine_weight,
        "balance": cfg.balance_weight,
        "semantic_balance": cfg.semantic_balance_weight,
    }
    return sum(weights[name] * loss for name, loss in losses.items())


def _cosines(vectors: Tensor) -> Tensor:
    """(B, E_cat) -> the cosine similarity of every pair of rows, (B, B) float32."""
    vectors = F.normalize(vectors.float(), dim=-1)
    return vectors @ vectors.T
