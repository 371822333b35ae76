"""What turns gradients into steps: Muon and AdamW, and the learning rate over a stage."""
import torch
from torch import nn

from config import Config


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
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    if not muon:
        return [adamw]
    # Matched RMS: an orthogonalised update gets the size that AdamW's would have, so that one
    # learning rate serves both.
    matched = dict(weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [torch.optim.Muon(muon, lr=lr, **matched), adamw]


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
