"""Checkpoints of a run: written whole, found by name, read without unpickling code, made a model of.

A checkpoint is a plain dict, which state.py spells out. It is the same for any number of processes.
"""
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

import config
from common.files import whole_file
from common.run import description
from config import Config, Stopped, UserError
from experts import ProPhy
from model import Backbone, build_backbone


# --- checkpoints ----------------------------------------------------------------------------------
def save(contents: dict, path: Path) -> None:
    """Write a checkpoint whole, or leave the one that is there. Raises Stopped when the disk will
    not take it."""
    try:
        with whole_file(path) as part, open(part, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as e:  # torch wraps some write errors in RuntimeError
        raise Stopped(f"The checkpoint {path} could not be written ({e}); the previous one is "
                      "intact.") from None


def prune(newest: Path) -> None:
    """Of the checkpoints of steps keep the newest and the one before.

    Later ones are damaged ones that were passed over: they count for nothing.
    """
    for old in sorted(p for p in newest.parent.glob("step*.pt") if p <= newest)[:-2]:
        old.unlink()


def find_checkpoint(folder: Path, name: str) -> Path:
    """The file that best | last | base | a file's own name stands for. Raises UserError where there
    is none."""
    steps = {int(path.stem[4:]): path for path in folder.glob("step*.pt")
             if path.stem[4:].isdecimal()}
    if name == "last" or (name == "best" and not (folder / "best.pt").is_file()):
        if not steps:
            raise UserError(f"{folder} holds no checkpoint yet: train first, or wait for the first "
                            "save.")
        return steps[max(steps)]
    path = folder / (name if name.endswith(".pt") else f"{name}.pt")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.pt"))) or "no checkpoint"
        raise UserError(f"There is no {path}; its folder holds {there}.")
    return path


def read_checkpoint(path: Path, device="cpu") -> dict:
    """What `save` wrote, without unpickling code. Raises errors of many types where the file is
    damaged, FileNotFoundError where there is none.

    A checkpoint is a zip archive, whose parts have checksums that torch.load does not look at.
    """
    with zipfile.ZipFile(path) as archive:
        # Nor has a part the mark of a folder, for which torch would leave the memory as it is.
        if archive.testzip() or any(part.external_attr for part in archive.infolist()):
            raise zipfile.BadZipFile("its checksum is another")
    return torch.load(path, map_location=device, weights_only=True)


def load_newest(folder: Path, device: torch.device) -> dict:
    """The newest checkpoint that reads; a damaged one is named and passed over. Raises UserError
    when none does."""
    for path in sorted(folder.glob("step*.pt"), reverse=True):
        try:
            return read_checkpoint(path, device)
        except Exception as e:  # a truncated zip raises one of many types
            print(f"{path} is damaged ({type(e).__name__}); trying the one before.",
                  file=sys.stderr)
    raise UserError(f"No checkpoint in {folder} can be read; start again without --resume in "
                    "another --out_dir.")


def build(cfg: Config, vocabulary: int, stored: dict) -> Backbone | ProPhy:
    """The model of a checkpoint's contents, with its averaged weights. Raises errors of many types
    where these do not fit."""
    model = build_backbone(cfg, vocabulary)
    if stored["stage"] == "physics":
        model = ProPhy(model, cfg)
    model.load_state_dict(stored["model"] | stored["ema"])  # averages are of what was trained
    return model


def same_architecture(source: str, theirs: Config, ours: Config, *marks: str) -> None:
    """Raises UserError where the backbone of `source`, such as "--weights DIR", has another value
    than this run in a field with one of the marks."""
    def as_built(cfg: Config, name: str):
        if name == "ffn":
            return cfg.ffn or 4 * cfg.dim
        if name == "time_dim" and cfg.lineage == "wan":
            return None  # a Wan has no such layer
        return getattr(cfg, name)

    for mark in marks:
        for name in config.marked(mark):
            if as_built(theirs, name) != as_built(ours, name):
                raise UserError(f"{source} has --{name} {getattr(theirs, name)}, this run "
                                f"{getattr(ours, name)}.")


def averaged_base(cfg: Config, device: torch.device) -> dict[str, Tensor]:
    """--init_from: the averaged backbone of another run of the same shape. Raises UserError."""
    other = Path(cfg.init_from)
    theirs = config.load(other / "config.json")
    description(other)  # which refuses a damaged one
    same_architecture(f"--init_from {other}", theirs, cfg, config.NETWORK, config.INIT)
    path = other / "checkpoints" / "base.pt"
    try:
        return read_checkpoint(path, device)["ema"]
    except FileNotFoundError:
        raise UserError(f"{other} has not finished its stage one: it has no checkpoints/base.pt."
                        ) from None
    except Exception as e:  # a damaged archive raises one of many types
        raise UserError(f"{path} cannot be read ({type(e).__name__}).") from None
