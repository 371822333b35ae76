"""The frozen backbone that stage two stands beside, when it comes from somebody else's weights."""
import torch
from torch import nn

import config
from common.run import same_architecture
from config import Config
from common.libraries import fingerprint
from official.folder import network_folder
from official.weights import load_pretrained


def open_backbone(cfg: Config, device: torch.device) -> tuple[nn.Module, str]:
    """--weights: the frozen model of a folder in diffusers' layout, and its files' fingerprint.

    Raises UserError where they are of another architecture than cfg says.
    """
    half = cfg.precision == "bf16" and cfg.freeze_backbone  # what trains is kept in float32
    dtype = torch.bfloat16 if half else torch.float32
    model = load_pretrained(cfg.weights, device, dtype)
    same_architecture(f"--weights {cfg.weights}", model.cfg, cfg, config.NETWORK)
    model.requires_grad_(False)  # it has no optimizer and no average until stage two says so
    return model, fingerprint(network_folder(cfg.weights))
