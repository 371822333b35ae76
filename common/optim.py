"""What turns gradients into steps: Muon and AdamW, the learning rate over a stage, averaged weights."""
import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.parallel import settle, slice_like, whole
from config import Config


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for matrices (m, n).

    The rule is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw": an orthogonal update
    gets the size that AdamW's would have, so that one learning rate serves both. torch computes it
    in bf16 always, one matrix after the other. A CPU without bf16 instructions, as in most laptops,
    then spends three quarters of a training step there. Here matrices of one shape go together, in
    a dtype that the machine is quick at. Of a divided model every process orthogonalises all of
    them, because a slice is not enough: for a large one take AdamW.
    """
    MOMENTUM = 0.95

    def __init__(self, params, lr: float, weight_decay: float, dtype: torch.dtype = torch.float32):
        """dtype: of the products that orthogonalise. Parameters and momentum keep their own."""
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            # The updates by the shape of their matrices: {(m, n): [(parameter, update)]}.
            shapes = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                update = whole(p.grad.lerp(momentum, self.MOMENTUM), everywhere=True)  # Nesterov's
                shapes.setdefault(p.shape, []).append((p, update))

            # All matrices of one shape are orthogonalised together.
            for shape, some in shapes.items():
                stack = torch.stack([update for _, update in some])
                size = 0.2 * math.sqrt(max(shape))
                for (p, _), update in zip(some, orthogonalised(stack.to(self.dtype))):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(slice_like(update.to(p.dtype), p), alpha=-group["lr"] * size)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(k, m, n) -> the same with all singular values near 1 (between .7 and 1.2), by five steps of
    Newton-Schulz with Jordan's coefficients, which rise steeply at zero."""
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices  # the smaller side first: fewer products
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.mT if tall else X


def make_optimizers(trained: dict[str, nn.Parameter], cfg: Config,
                    lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the 2-D matrices of blocks and AdamW on the rest, or AdamW alone.

    trained: {name: parameter}. Vectors and biases do not decay.
    """
    muon, decayed, plain = [], [], []
    for name, p in trained.items():
        in_block = ("blocks." in name or name.startswith("physical.")) and "norm" not in name
        if cfg.optimizer == "muon" and in_block and p.ndim == 2:
            muon.append(p)
        elif p.ndim >= 2 and not name.endswith("bias"):  # the experts' biases stand in one table
            decayed.append(p)
        else:
            plain.append(p)

    decay = cfg.weight_decay
    groups = [dict(params=decayed, weight_decay=decay), dict(params=plain, weight_decay=0.0)]
    fused = torch.device(cfg.device).type == "cuda"  # one kernel for all parameters
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    if not muon:
        return [adamw]
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    return [Muon(muon, lr, decay, dtype), adamw]


def learning_rate(cfg: Config, stage: str, stage_step: int) -> float:
    """Linear warm-up, then linear to zero at the stage's end, or constant.

    stage: base | physics. stage_step: steps taken in it.
    """
    if stage == "base":
        peak, steps = cfg.lr, cfg.base_steps
    else:
        peak, steps = cfg.physics_lr, cfg.physics_steps
    rise = min(1.0, (stage_step + 1) / max(cfg.warmup, 1))
    return peak * rise * (1.0 if cfg.schedule == "constant" else 1 - stage_step / steps)


def restore(optimizer: torch.optim.Optimizer, stored: dict) -> None:
    """Go on from the state_dict of an optimizer of the same parameters, whole or divided."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {name: slice_like(value, parameters[i]) for name, value in of_one.items()}
             for i, of_one in stored["state"].items()}
    optimizer.load_state_dict({**stored, "state": state})


# --- averages -------------------------------------------------------------------------------------
@torch.no_grad()
def update_averages(ema: dict[str, Tensor], trained: dict[str, Tensor], decay: float,
                    taken: int) -> None:
    """The averages take up the weights; taken: how many steps their stage had before."""
    # Early in a stage the decay is smaller, so that the average forgets the initial weights.
    decay = min(decay, (1 + taken) / (10 + taken))
    for name, p in trained.items():
        ema[name].lerp_(p, 1 - decay)


@contextlib.contextmanager
def averaged(model: nn.Module, trained: dict[str, Tensor],
             ema: dict[str, Tensor]) -> Iterator[nn.Module]:
    """The model with its averages in place of what is trained, in eval mode, as long as the `with`
    block lasts."""
    kept = {name: p.detach().clone() for name, p in trained.items()}
    settle(model)
    model.load_state_dict(ema, strict=False)  # it holds what is trained
    model.eval()
    try:
        # Uncompiled: each new batch size would be compiled, for a few uses.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        model.train()
        settle(model)
        model.load_state_dict(kept, strict=False)
