"""Runs of ten steps of the debug preset by the real `train.main`, and what they leave:
checkpoints and logs, compared."""
import json

import torch

import config
import sample
import state
import train

TEN = dict(base_steps=6, physics_steps=4, batch_size=4, world_clips=16, val_clips=4, log_every=1,
           eval_every=3,
           save_every=100, preview_steps=1, guidance=1.0, threads=1, device="cpu", warmup=2,
           report=False)
SIX = dict(base_steps=4, physics_steps=2)  # gates start shut, so block matrices first move in step three
CLOCK = {"seconds", "waited", "digest"}  # what the wall clock changes in a line of the log
TERMS = {"diffusion", "coarse", "semantic_balance", "fine_align", "balance"}


class Interrupted(Exception):
    """A kill, as far as one process can play it: it passes through everything and nothing is saved."""


def without_previews(patch):
    """A preview costs more than ten steps."""
    patch.setattr(sample, "preview", lambda *_, **__: None)


# ---------------------------------------------------------------------------------------------- starting them
def settings(out, pools, **overrides):
    return config.preset("debug", **{**TEN, "pool_dir": str(pools), "out_dir": str(out), **overrides})


def launch(out, pools, **overrides):
    train.main(settings(out, pools, **overrides))
    return out


def again(run, *flags):
    """Resume as the command line does."""
    train.main(config.parse(["--config", "debug", "--out_dir", str(run), "--resume", *map(str, flags)], ""))
    return run


# -------------------------------------------------------------------------------------------- what they leave
def checkpoint(run, name):
    stored = torch.load(run / "checkpoints" / name, weights_only=True)
    return {key: value for key, value in stored.items() if key != "seconds"}


def backbone_of(stored):
    return {name.removeprefix("backbone."): p
            for name, p in stored["model"].items() if name.startswith("backbone.")}


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(run):
    """The log, in JSON as the standard has it (no NaN), without the wall clock."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")
    log = [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log]


def steps(run, stage=None):
    return [line for line in lines(run) if "loss" in line and line["stage"] == (stage or line["stage"])]


def held_out(run, stage):
    return [line["held_out"] for line in lines(run) if "held_out" in line and line["stage"] == stage]


def differences(a, b, at=""):
    """Paths at which two nests of dicts, lists, tensors and numbers differ, to the bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for key in a for d in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f"{at}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    return [] if type(a) is type(b) and a == b else [at]


def same_run(run, other):
    """Same weights, averages, optimizers, step and best in every
    checkpoint that both must have, and the same log."""
    for name in ("step000010.pt", "best.pt", "base.pt"):
        assert differences(checkpoint(run, name), checkpoint(other, name), name) == []
    assert lines(run) == lines(other)
    return True


def training_calls(patch, what):
    """Call what(n, state, batch, t, eps, losses) -> losses at the n-th training step;
    held-out batches pass by."""
    plain, seen = state.losses_of, []

    def losses_of(now, batch, t, eps, whole):
        losses, *more = plain(now, batch, t, eps, whole)
        if now.model.training:
            seen.append(now.step)
            losses = what(len(seen) - 1, now, batch, t, eps, losses) or losses
        return losses, *more
    patch.setattr(state, "losses_of", losses_of)


def clips_trained_on(patch):
    """The sets that the bytes of all clips trained on will be put into: {stage: {of (F, H, W, 3)}}."""
    seen = {"base": set(), "physics": set()}

    def record(n, state, batch, t, eps, losses):
        pixels = ((batch.video + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        seen[state.stage].update(clip.numpy().tobytes() for clip in pixels)
    training_calls(patch, record)
    return seen


def recorded(patch):
    """The list that every training batch will be put into: where, what clips and words, which noise."""
    fed = []

    def record(n, state, batch, t, eps, losses):
        # whoever draws from the global stream must not matter, the border's new weights included
        torch.rand(1)
        fed.append((state.stage, batch.index.tolist(), batch.video.sum().item(), batch.text.tolist(),
                    t.tolist(),
                    eps.sum().item()))
    training_calls(patch, record)
    return fed
