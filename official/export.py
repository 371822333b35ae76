"""A run that trained an official backbone along, as a folder that everybody's tools read.

    OUT/transformer/           the averaged backbone in diffusers' layout, LoRA merged into it
    OUT/branch.safetensors     its physical branch
    OUT/vae/, tokenizer/ ...   the other parts of the official weights, linked where the disk can

`sample.py --weights OUT --branch OUT/branch.safetensors` samples from it. A run beside frozen
weights needs none of this: its branch.safetensors is attached to the official folder itself.
"""
import dataclasses
import os
import shutil
from pathlib import Path

import torch

import config
from common.files import whole_folder
from common.libraries import fingerprint
from common.checkpoints import read_checkpoint
from common.run import description
from config import Config, Stopped, UserError
from experts import ProPhy, merge_lora
from official.branch import write_branch
from official.weights import load_pretrained, save_pretrained

# The parts of a folder of weights beside its transformer.
PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


def export_run(run: Path, out: Path) -> None:
    """Write OUT whole or not at all. Raises UserError for a run without a trained official
    backbone, or where OUT is there already; Stopped when the disk is full."""
    cfg = config.load(run / "config.json")
    if not cfg.weights or cfg.freeze_backbone:
        raise UserError(f"{run} has no official backbone of its own to export: it was not trained "
                        "with --weights and --freeze_backbone false.")
    if out.exists():
        raise UserError(f"{out} is there already: give another --out.")
    model, stored = trained_model(cfg, run / "checkpoints" / "best.pt")
    present = description(run).get("categories_present", [])

    # LoRA's corrections become part of the matrices they correct: nobody else's tools know of them.
    branch = {name: p for name, p in model.branch_state().items()
              if not name.startswith("backbone.")}
    merge_lora(model.backbone)
    alone = config.check(dataclasses.replace(cfg, lora_rank=0, dry_run=True))
    try:
        with whole_folder(out) as folder:
            save_pretrained(model.backbone, folder / "transformer")
            for part in PARTS:
                source = Path(cfg.weights) / part
                if source.is_dir():
                    shutil.copytree(source, folder / part, copy_function=link_or_copy)
            if branch:
                weights = fingerprint(folder / "transformer")
                write_branch(folder, alone, model.backbone.cfg, branch, weights,
                             step=stored["step"], held_out=stored["best"],
                             categories_present=present)
    except OSError as e:
        raise Stopped(f"{out} could not be written: {e.strerror or e}.") from None


def trained_model(cfg: Config, path: Path) -> tuple[ProPhy, dict]:
    """The averaged model of a checkpoint, and the checkpoint. Raises UserError."""
    try:
        stored = read_checkpoint(path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}: the run has not been validated yet.") from None
    except Exception as e:  # a damaged archive raises one of many types
        raise UserError(f"{path} is damaged or no checkpoint ({type(e).__name__}).") from None
    model = ProPhy(load_pretrained(cfg.weights, dtype=torch.float32), cfg)
    try:
        model.load_state_dict(stored["model"])
        model.load_state_dict(stored["ema"], strict=False)  # it holds what was trained
    except (KeyError, RuntimeError):
        raise UserError(f"{path} does not fit the weights in {cfg.weights}.") from None
    return model, stored


def link_or_copy(source: str, target: str) -> None:
    """A file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
