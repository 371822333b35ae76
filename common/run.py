"""A run's folder, log and device: what `auto` means here, and what is written beside the checkpoints."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch

import config
from common.files import write_text
from config import Config, UserError


def pick_device(name: str) -> str:
    """`auto` is the best there is: cuda, else mps, else cpu. Raises UserError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(name, name == "auto"):
        raise UserError(f"--device {name} is not available here.")
    return next(d for d in there if there[d]) if name == "auto" else name


def pick_precision(name: str, device: str) -> str:
    """`auto` is bf16 on cuda, else fp32: the rule for weights that are only run. A training run
    measures instead, see resolve."""
    if name == "auto":
        return "bf16" if device == "cuda" else "fp32"
    return name


def resolve(cfg: Config) -> tuple[Config, dict[str, str]]:
    """Replace every `auto` by what this machine makes of it; also the reasons, {field: sentence}.
    Sets the thread count."""
    torch.set_num_threads(cfg.threads or os.cpu_count())
    device = pick_device(cfg.device)
    why = {}
    found = dict(threads=torch.get_num_threads(), device=device)
    if cfg.device == "auto":
        why["device"] = f"{device}: the best that torch sees here"
    if cfg.precision == "auto":
        gain = matmul_gain(device)
        found["precision"] = "bf16" if gain > 1.2 else "fp32"
        why["precision"] = (f"{found['precision']}: a bf16 matrix product runs {gain:.1f} times as fast "
                            "as fp32 here")
    if cfg.compile == "auto":
        found["compile"], reason = pick_compile(cfg.base_steps + cfg.physics_steps, device)
        why["compile"] = f"{found['compile']}: {reason}"
    return dataclasses.replace(cfg, **found), why


def pick_compile(steps: int, device: str) -> tuple[str, str]:
    """Whether compiling pays for a run of so many steps, "on" or "off", and the reason."""
    if steps < 500 or device == "mps":
        return "off", f"{steps} steps on {device} would not pay"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "off", "no C++ compiler here"
    return "on", f"{steps} steps earn back the minute it takes"


def matmul_gain(device: str) -> float:
    """How many times as fast as fp32 a bf16 matrix product is, at the size of the small preset's widest layer."""
    def best_time(dtype):
        a, b = torch.ones(1920, 128, device=device, dtype=dtype), torch.ones(128, 512, device=device, dtype=dtype)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            (a @ b).sum().item()  # .item() waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times)
    try:
        return best_time(torch.float32) / best_time(torch.bfloat16)
    except RuntimeError:  # a device without bf16
        return 0.0


def open_run(cfg: Config) -> Path:
    """Make the run folder, or check that it can be gone on with. Raises UserError before anything is touched."""
    run = cfg.run_dir
    if cfg.resume:
        stored = config.load(run / "config.json")
        may_change = config.marked(config.MAY_CHANGE)
        changed = [f"--{name}" for name, value in dataclasses.asdict(cfg).items()
                   if name not in may_change and value not in (getattr(stored, name), "auto")]
        if changed:
            raise UserError(f"--resume cannot change {', '.join(changed)}: {run} was started with another value.")
        if not list((run / "checkpoints").glob("step*.pt")):
            raise UserError(f"{run} has no checkpoint to resume from; start it again without --resume.")
    elif list(run.glob("checkpoints/*.pt")):
        raise UserError(f"{run} already holds a run: go on with --resume, or give another --out_dir.")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "samples").mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"The run folder {run} cannot be made ({e.strerror}).") from None
    return run


def git_revision() -> str:
    try:
        here = Path(__file__).parent
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe_run(run: Path, cfg: Config, why: dict, categories: list[int], key: str) -> None:
    """config.json: every field, what `auto` became and why, and what the run was made with and from."""
    extra = dict(resolved=why, git=git_revision(), torch=torch.__version__, categories_present=categories, data=key)
    write_text(run / "config.json", json.dumps(dataclasses.asdict(cfg) | extra, indent=2))


class Log:
    """log.jsonl, one object a line. A resumed run first drops the lines of steps it is about to take again."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _before(line, step)]
            write_text(path, "".join(line + "\n" for line in lines))

    def write(self, **values) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(_tidy(values)) + "\n")


def _before(line: str, step: int) -> bool:
    """Was this line written before the checkpoint of `step`? Its validation was, its training step is still to come."""
    try:
        entry = json.loads(line)
        return entry["step"] < step or (entry["step"] == step > 0 and "held_out" in entry)
    except (ValueError, KeyError):  # the last line of a killed run may be half-written
        return False


def _tidy(value):
    """What is not finite becomes null, because JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tidy(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
