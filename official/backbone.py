"""The frozen backbone that stage two stands beside, when it comes from somebody else's weights."""
import torch
from torch import nn

from config import Config, UserError
from official.folder import fingerprint, network_folder
from official.weights import load_pretrained


# A preset and the weights that a run names must agree in these fields.
ARCHITECTURE = ("lineage", "dim", "depth", "heads", "ffn", "patch_t", "patch", "positions",
                "text_len", "text_dim", "channels")


def open_backbone(cfg: Config, device: torch.device) -> tuple[nn.Module, str]:
    """--weights: the frozen model of a folder in diffusers' layout, and its files' fingerprint.

    Raises UserError where they are of another architecture than cfg says.
    """
    half = cfg.precision == "bf16" and cfg.freeze_backbone  # what trains is kept in float32
    dtype = torch.bfloat16 if half else torch.float32
    model = load_pretrained(cfg.weights, device, dtype)
    for name in ARCHITECTURE:
        theirs, ours = getattr(model.cfg, name), getattr(cfg, name)
        if name == "ffn":  # 0 stands for 4 D
            theirs, ours = theirs or 4 * model.cfg.dim, ours or 4 * cfg.dim
        if theirs != ours:
            raise UserError(f"--weights {cfg.weights} has --{name} {theirs}, this run {ours}.")
    model.requires_grad_(False)  # it has no optimizer and no average until stage two says so
    return model, fingerprint(network_folder(cfg.weights))
