"""branch.safetensors: a physical branch that stands beside official weights, written, read and
described."""
import dataclasses
import json
import sys
from pathlib import Path

import safetensors
import torch
from torch import Tensor

import config
import data
from common import parallel
from common.files import is_intact, join_some, write_text
from common.libraries import fingerprint
from common.store import checksum, shapes_of, write_tensors
from config import BRANCH, NETWORK, Config, UserError, marked
from experts import ProPhy
from model import build_backbone
from official.folder import network_folder
from official.weights import read_config

BRANCH_FORMAT = 1  # of branch.safetensors


def read_branch(path: Path, weights: Path) -> tuple[Config, dict[str, Tensor]]:
    """branch.safetensors -> the Config that builds its ProPhy beside these weights, and tensors.

    Raises UserError, with one sentence and before the weights are read, for a file that is damaged,
    of another version, or for another architecture. Other weights of the same architecture are a
    warning only: somebody may have stored the same ones in another dtype or in other pieces.
    """
    # What the file says of itself, and its tensors.
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"There is no {path}: a run of train.py makes it at its first "
                        "validation.") from None
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged or no safetensors file ({e}); pickled files are not "
                        "opened.") from None
    if not isinstance(about, dict) or about.get("branch_format") != BRANCH_FORMAT:
        raise UserError(f"{path} is no branch of format {BRANCH_FORMAT}, the one that this version "
                        "of train.py writes.")

    # The branch that it describes must be the one that it holds.
    folder = network_folder(weights)
    theirs = read_config(folder)[0]
    try:
        cfg = branch_config(about, theirs)
        with torch.device("meta"):
            model = ProPhy(build_backbone(theirs), cfg)
        wanted = {name: p.shape for name, p in model.branch_state().items()}
    except UserError as e:
        raise UserError(f"{path} cannot be attached to {weights}: {e}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as e:
        raise UserError(f"{path} describes no branch ({type(e).__name__}: {e}).") from None
    found = {name: p.shape for name, p in tensors.items() if p.is_floating_point()}
    odd = sorted(name for name in {*tensors, *wanted} if found.get(name) != wanted.get(name))
    if odd:
        raise UserError(f"{path} holds another branch than its header describes: "
                        f"{join_some(odd, 3)}.")

    # The numbers themselves.
    if checksum(tensors) != about.get("checksum") or not is_intact(about | shapes_of(tensors)):
        raise UserError(f"{path} is damaged: its checksum is another.")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{path} holds numbers that are not finite: {join_some(bad, 3)}.")
    if about.get("weights") != fingerprint(folder):
        print(f"Warning: {path} was trained beside other files than those in {weights}; that is "
              "right only if they hold the same weights, stored in another way.", file=sys.stderr)
    return cfg, tensors


def branch_config(about: dict, theirs: Config) -> Config:
    """What a branch's header describes, beside a backbone of `theirs`. Raises UserError where that
    is another one, and KeyError, TypeError or ValueError for a header that describes nothing."""
    for name in marked(NETWORK):
        fitting = about["fits"][name]
        found = getattr(theirs, name)
        if fitting != found:
            raise UserError(f"it was trained beside a model of --{name} {fitting}, not {found}.")
    fields = config.stored_fields({name: about["branch"][name] for name in marked(BRANCH)})
    return config.check(dataclasses.replace(theirs, base_steps=0, dry_run=True, **fields))


@torch.no_grad()
def attach_branch(backbone, cfg: Config, tensors: dict[str, Tensor]) -> ProPhy:
    """The backbone with the branch that read_branch found, in the backbone's dtype; a physical
    block keeps in float32 what the block beside it does."""
    model = ProPhy(backbone, cfg)
    for name, p in model.branch_state().items():
        dtype = p.dtype if name.startswith("physical.") else backbone.patch_proj.weight.dtype
        p.data = tensors[name].to(p.device, dtype, copy=True)  # no tie to the file
    return model


def publish(state, run: Path, held_out: float, present: list[int]) -> None:
    """What a run beside frozen official weights gives to others: branch.safetensors, and README.md,
    its model card."""
    averages = parallel.whole(state.ema)
    about = dict(step=state.step, held_out=held_out, categories_present=present)
    parallel.first(lambda: write_branch(run, state.cfg, state.model.backbone.cfg, averages,
                                        state.fingerprint, **about))


def write_branch(folder: Path, cfg: Config, theirs: Config, averages: dict[str, Tensor],
                 weights: str, **about) -> None:
    """branch.safetensors: the averaged weights of branch and LoRA, and in its header all that
    sample.py needs to attach them; beside it README.md, the model card.

    theirs: the backbone's Config. weights: the fingerprint of the backbone's files. about: step,
    held_out, categories_present. A run in fp32 is stored to the bit. One in bf16 rounded its
    matrices to bf16 in every product: they are stored so, in half the room; norms, biases and Wan's
    tables of modulation stay float32.
    """
    tensors = {}
    for name, average in averages.items():
        half = cfg.precision == "bf16" and average.ndim > 1 and not name.endswith("table")
        tensors[name] = average.to("cpu", torch.bfloat16 if half else torch.float32)
    about = dict(branch_format=BRANCH_FORMAT, weights=weights, **about,
                 branch={name: getattr(cfg, name) for name in marked(BRANCH)},
                 fits={name: getattr(theirs, name) for name in marked(NETWORK)})
    write_tensors(folder / "branch.safetensors", tensors, about, "export")
    write_text(folder / "README.md", model_card(cfg, about))


# Licences: the lines at the top of a model card, and what the card says in words.
APACHE = (
    "license: apache-2.0",
    "the Apache License 2.0: pass its text on with this file, and say that the weights were "
    "changed.",
)
COGVIDEOX = (
    "license: other\nlicense_name: cogvideox-license\n"
    "license_link: https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE",
    "the CogVideoX LICENSE: pass its text on with this file; commercial use needs a registration "
    "with the authors of those weights.",
)
UNKNOWN = (
    "license: unknown",
    "**not known here, as they are none of the official architectures: fill it in, here and at "
    "the top, before this file is published.**",
)
UPSTREAM = {  # preset: its official weights on Hugging Face, their licence
    "cogvideox-2b": ("THUDM/CogVideoX-2b", APACHE),
    "cogvideox-5b": ("THUDM/CogVideoX-5b", COGVIDEOX),
    "cogvideox1.5-5b": ("THUDM/CogVideoX1.5-5B", COGVIDEOX),
    "wan-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", APACHE),
    "wan-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", APACHE),
}
# What a model card tells of the run, beside all that shapes the branch.
TOLD = (
    "seed", "precision", "batch_size", "optimizer", "physics_lr", "schedule", "warmup",
    "weight_decay", "clip", "ema", "caption_dropout", "coarse_weight", "fine_weight",
    "balance_weight", "coarse_loss", "reduction", "negatives", "teacher", "background",
)
CARD = """---
{front}
library_name: nanoprophy
pipeline_tag: text-to-video
tags:
- text-to-video
- physics
- prophy
---

# {what}, for {upstream}

`branch.safetensors` is no video model by itself: it is attached to the weights of {upstream},
beside which it was trained while they stayed as they are. Made with nanoProPhy, an independent
implementation of [ProPhy](https://arxiv.org/abs/2512.05564).

## How to attach it

```bash
python sample.py --weights DIR --branch branch.safetensors --prompt "a red ball falls on the floor"
```

`DIR` is the folder of those weights in diffusers' layout; its transformer had the fingerprint
`{weights}`, and sample.py warns of another one. Clips may have other sizes than those it was
trained on.

## How it was trained

Averaged weights of step {step}, of {physics_steps} planned. Diffusion loss on held-out clips, at
fixed times and noise: {held_out:.4f}. Nothing else was measured by the run: how its clips look, and
which laws they obey, is not said here. Phenomena that the captions were labelled with: {phenomena}.

| setting | value |
|---|---|
{settings}

## Licence

This file was made from the weights of {upstream}, and their licence goes with it. That is {licence}
Where `DIR` was somebody's changed version of them, name that version, and its licence, instead.
"""


def model_card(cfg: Config, about: dict) -> str:
    """README.md beside a branch, as Hugging Face reads it; about: the header of
    branch.safetensors."""
    # The official weights that the backbone's shape belongs to, if it belongs to any.
    fits = about["fits"]
    same = ("lineage", "dim", "depth", "heads", "patch_t", "positions")
    upstream = f"a {fits['lineage']} transformer of width {fits['dim']}"
    front, licence = UNKNOWN
    for name, (base, licences) in UPSTREAM.items():
        if all(getattr(config.preset(name), field) == fits[field] for field in same):
            upstream = base
            front, licence = licences
            front += f"\nbase_model: {base}\nbase_model_relation: adapter"

    # What was trained, and how.
    what = ["Physical branch"] if cfg.physical_at else []
    if cfg.lora_rank:
        what.append(f"LoRA of rank {cfg.lora_rank}")
    names = data.category_names(cfg)
    phenomena = [names[i] for i in about["categories_present"]]
    rows = [f"| {field} | {getattr(cfg, field)} |" for field in (*marked(BRANCH), *TOLD)]
    return CARD.format(
        **about,
        front=front,
        licence=licence,
        what=" and ".join(what),
        upstream=upstream,
        physics_steps=cfg.physics_steps,
        phenomena=", ".join(phenomena) or "none",
        settings="\n".join(rows))
