"""A run beside its method: device and precision, run folder, log, signals that end it.

A run folder holds `config.json` (every field, what `auto` became and why, versions),
`tokenizer.json`, `log.jsonl`, `checkpoints/` (common/checkpoints.py) and `samples/`.
"""
import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import config
from common import parallel
from common.files import is_intact, lock, read_json, sealed, write_text
from common.paths import no_trace
from config import Config, Stopped, UserError
from experts import ProPhy
from model import build_backbone


BINS = 4  # the log has the loss of so many equal ranges of t: the total hides which one improves


# --- device and precision -------------------------------------------------------------------------
def pick_device(name: str) -> str:
    """`auto` is the best there is: cuda, else mps, else cpu. Under torchrun cuda is a GPU a process.
    Raises UserError for one that is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = max(there, key=there.get)  # the first that is there
    if not there.get(name):
        raise UserError(f"--device {name} is not available here.")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return name


def pick_precision(name: str, device: str) -> str:
    """`auto` is bf16 on cuda, else fp32: the rule of every command that only uses a model."""
    if name != "auto":
        return name
    return "bf16" if device == "cuda" else "fp32"


def use_threads(cfg: Config) -> Config:
    """Give torch the threads that the config asks for (0 = every core, of which the processes that
    train together on this machine get equal shares). The config that comes back has their number."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(cfg.threads or max(1, os.cpu_count() // here))
    return dataclasses.replace(cfg, threads=torch.get_num_threads())


def resolve(cfg: Config) -> tuple[Config, dict[str, str]]:
    """Every `auto` replaced by what this machine makes of it, and {field: why}. Raises UserError.

    A training run is long, so its precision is measured and not guessed. Its threads must be set.
    """
    device = pick_device(cfg.device)
    found = {"device": device}
    why = {}
    if cfg.device == "auto":
        why["device"] = f"{device}: the best that torch sees here"
    if cfg.precision == "auto":
        gain = matmul_gain(device)
        precision = found["precision"] = "bf16" if gain > 1.2 else "fp32"
        why["precision"] = (f"{precision}: a bf16 matrix product runs {gain:.1f} times as fast as "
                            "fp32 here")
    if cfg.compile == "auto":
        found["compile"], reason = pick_compile(cfg.base_steps + cfg.physics_steps, device)
        why["compile"] = f"{found['compile']}: {reason}"
    return dataclasses.replace(cfg, **found), why


def pick_compile(steps: int, device: str) -> tuple[str, str]:
    """on or off, and the reason, for a run of so many steps."""
    if steps < 500 or device == "mps":
        return "off", f"{steps} steps on {device} would not pay"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "off", "no C++ compiler here"
    return "on", f"{steps} steps earn back the minute it takes"


def matmul_gain(device: str) -> float:
    """How many times as fast as fp32 a bf16 matrix product is, at the size of the small preset's
    widest layer."""
    def best_time(dtype):
        a = torch.ones(1920, 128, device=device, dtype=dtype)
        b = torch.ones(128, 512, device=device, dtype=dtype)
        # .item() waits for a GPU
        return min(timeit.repeat(lambda: (a @ b).sum().item(), number=1, repeat=20))
    try:
        return best_time(torch.float32) / best_time(torch.bfloat16)
    except RuntimeError:  # a device without bf16
        return 0.0


# --- the run folder -------------------------------------------------------------------------------
def open_run(cfg: Config) -> Path:
    """Make the run folder, or check that it can be gone on with. Raises UserError before anything
    is touched."""
    run = cfg.run_dir
    if cfg.resume:
        stored = config.load(run / "config.json")
        description(run)  # which refuses a damaged one
        may_change = config.marked(config.MAY_CHANGE)
        changed = [f"--{name}" for name, value in dataclasses.asdict(cfg).items()
                   if name not in may_change and value not in (getattr(stored, name), "auto")]
        if changed:
            raise UserError(f"--resume cannot change {', '.join(changed)}: {run} was started with "
                            "another value.")
        if not list((run / "checkpoints").glob("step*.pt")):
            raise UserError(f"{run} has no checkpoint to resume from; start it again without "
                            "--resume.")
    elif list(run.glob("checkpoints/*.pt")):
        raise UserError(f"{run} already holds a run: go on with --resume, or give another "
                        "--out_dir.")
    try:
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "samples").mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"The run folder {run} cannot be made ({e.strerror}).") from None
    return run


@contextlib.contextmanager
def only_run(cfg: Config) -> Iterator[Path]:
    """The run folder, held while the block lasts. Raises UserError where another process trains in
    it, or has done so since it was looked at."""
    run = cfg.run_dir
    folders = run / "samples", run / "checkpoints", run, Path(cfg.pool_dir)
    new = [folder for folder in folders if not folder.exists()]
    open_run(cfg)
    refusal = f"Another process trains in {run}: wait until it ends, or give another --out_dir."
    # What is new is another process's too, until the lock is had.
    with lock(run / "checkpoints", refusal), no_trace(new):
        run = open_run(cfg)
        for part in run.glob("checkpoints/*.part"):  # left by one that was killed
            part.unlink()
        yield run


def agent() -> str:
    """Which torchrun started this process, or "" where none did. It is the same after a restart."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {platform.node()} {os.getppid()}"


def go_on_after_restart(cfg: Config) -> Config:
    """After torchrun has started this process again, --resume where this torchrun's run has a
    checkpoint; without one, what the run left is cleared away."""
    config_file = cfg.run_dir / "config.json"
    if cfg.resume or not parallel.restarted() or not config_file.is_file():
        return cfg
    if description(cfg.run_dir).get("started_by") != agent():
        return cfg  # somebody else's run, which is refused
    if list(cfg.run_dir.glob("checkpoints/step*.pt")):
        return dataclasses.replace(cfg, resume=True)
    for path in cfg.run_dir.glob("checkpoints/*.pt"):
        path.unlink()
    return cfg


def check_data(cfg: Config, run: Path, keys: dict[str, str]) -> None:
    """Raises UserError, with what to do, unless the run was started with the clips of these keys.

    keys: {stage: a pool's, or a pool's and its maps' with a plus between them}. A stage that the run
    had no steps for before has no key to compare with. An older run has one key for both stages.
    """
    before = description(run)
    stored = before.get("data")
    for stage, key in keys.items():
        known = stored.get(stage, key) if isinstance(stored, dict) else str(stored)
        pool, _, maps = known.partition("+")
        if key not in (pool, f"{pool}+{maps}"):
            refuse_data(cfg, run, stage, before, key.startswith(f"{pool}+"))


def refuse_data(cfg: Config, run: Path, stage: str, before: dict, has_pool: bool) -> None:
    """Raise UserError: the clips of a stage are others, or where the run's pool is there its maps
    are. before: the run's description."""
    folder = cfg.base_data_dir if stage == "base" else ""
    what = f"The clips of {cfg.cache or folder or cfg.data_dir or 'the world'}"
    remedy = "put them back as they were, or start anew in another --out_dir"
    if has_pool:
        what = "The maps of --teacher"
    elif not (cfg.cache or cfg.data_dir):
        # The settings of a world are fixed, so that the code which draws it must have changed.
        revision = before.get("git") or "that started the run"
        remedy = f"go on with the code of revision {revision}, or "
        if (run / "checkpoints" / "base.pt").is_file():
            remedy += f"train stage two anew by --init_from {run} and another --out_dir"
        else:
            remedy += "start anew in another --out_dir"
    raise UserError(f"{what} are not those that {run} was started with, and --resume needs the "
                    f"same: {remedy}.")


def describe_run(run: Path, cfg: Config, why: dict[str, str], categories: list[int],
                 keys: dict[str, str], words: str | None) -> None:
    """Write config.json: every field, and with what the run is made.

    why: the reasons of `resolve`. categories: indices of those in the training clips. keys: of
    each stage's clips and maps. words: the key of the tokenizer, if there is one.
    """
    extra = {
        "resolved": why,
        "git": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "world_size": config.rank()[1],  # processes that train together
        "started_by": agent(),
        "categories_present": categories,
        "data": keys,
        "tokenizer": words,
    }
    text = json.dumps(sealed(dataclasses.asdict(cfg) | extra), indent=2)
    write_text(run / "config.json", text)


def description(run: Path) -> dict:
    """config.json as it is, with what `describe_run` wrote beside the fields of the config. Raises
    UserError where it is damaged."""
    stored = read_json(run / "config.json")
    if not is_intact(stored):
        raise UserError(f"{run / 'config.json'} is not as it was written: it is damaged, or "
                        "somebody changed it, who must then delete its last entry, the digest.")
    return stored


def git_revision() -> str:
    """The commit of this code, or "" where it is not known."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return result.stdout.strip()


def version_of(package: str) -> str:
    """Its version, found without importing it, or "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- what may stop it ----------------------------------------------------------------------------
@contextlib.contextmanager
def stop_at_full_disk(run: Path) -> Iterator[None]:
    """An error for want of room on the disk becomes a sentence: raises Stopped."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Stopped("The disk is full; free some space and go on with --resume "
                      f"({run} keeps its last checkpoint).") from None


@contextlib.contextmanager
def only_decorates(what: str) -> Iterator[None]:
    """An error in the block becomes a warning: what it makes is looked at, and nothing needs it."""
    try:
        yield
    except Exception as e:  # odd words and full disks raise errors of many types
        tqdm.write(f"Warning: {what} failed ({type(e).__name__}: {e}).", file=sys.stderr)


def refuse_beyond_memory(needed: float, device: str, what: str, remedy: str) -> None:
    """Raises UserError where something needs more bytes of memory than this machine has."""
    if str(device) != "cpu" or not hasattr(os, "sysconf"):  # Windows has none
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{what} {needed / 1e9:,.0f} GB of memory or more, and there are "
                        f"{there / 1e9:,.0f}: lower {remedy}.")


def check_memory(cfg: Config) -> None:
    """Raises UserError where model, optimizer and a batch need more memory than this machine has.
    They are counted too low rather than too high, on the meta device, which allocates nothing."""
    with torch.device("meta"):
        model = build_backbone(cfg, 2)
        if cfg.physics_steps:
            model = ProPhy(model, cfg)
    total = sum(p.numel() for p in model.parameters())
    # A weight takes 2 bytes or 4, and what is trained 12 more: gradient, average and a moment. Of
    # each clip the inputs of the blocks are kept.
    trained = 0 if cfg.freeze_backbone and not cfg.base_steps else 6 * total
    needed = 2 * (total + trained + cfg.batch_size * math.prod(cfg.grid) * cfg.dim * cfg.depth)
    refuse_beyond_memory(needed, cfg.device, "Model, optimizer and a batch need",
                         "--batch_size, the clip's size, --dim, --depth or the number of experts")


# --- the log, and the end -------------------------------------------------------------------------
class Log:
    """log.jsonl, one object a line. A resumed run first drops the lines of steps that it is about
    to take again, and damaged ones."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.writes = config.rank()[0] == 0  # one process of all
        if self.writes and path.exists():
            lines = path.read_text(errors="replace").splitlines()
            entries = list(map(_entry, lines))
            # The last one a killed run may have left half-written.
            if damaged := entries[:-1].count({}):
                print(f"{damaged} damaged lines of {path} are left out.", file=sys.stderr)
            kept = [line for line, entry in zip(lines, entries) if entry and _before(entry, step)]
            write_text(path, "".join(line + "\n" for line in kept))

    def write(self, **values) -> None:
        if not self.writes:
            return
        # What is not finite becomes null, because JSON has no NaN.
        finite = json.loads(json.dumps(values), parse_constant=lambda name: None)
        with self.path.open("a") as f:
            f.write(json.dumps(sealed(finite)) + "\n")


def read_log(path: Path) -> list[dict]:
    """What the lines of a log say, in their order; damaged ones are left out. Empty where there is
    no log."""
    if not path.is_file():
        return []
    lines = path.read_text(errors="replace").splitlines()
    return [entry for entry in map(_entry, lines) if entry]


def by_noise(per_clip: Tensor, t: Tensor) -> list[float | None]:
    """Mean diffusion loss of each range of t, cleanest first; None where no clip fell."""
    which = (t * BINS).long().clamp(max=BINS - 1)
    found = [per_clip[which == b] for b in range(BINS)]
    return [round(losses.mean().item(), 4) if len(losses) else None for losses in found]


def resources(state) -> dict:
    """What a step of a state.State used, for the log: the share of choices that went to each
    refinement expert, since a starved one is invisible in the losses; a GPU's memory."""
    found = {}
    if state.used is not None:
        found["experts"] = [round(share, 4) for share in state.used.tolist()]
    if state.device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated() / 1e9  # GB, the most so far
    return found


def _entry(line: str) -> dict:
    """What a line of the log says; {} where it is damaged."""
    try:
        entry = json.loads(line)
        return entry if "step" in entry and is_intact(entry) else {}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _before(entry: dict, step: int) -> bool:
    """Was this entry written before the checkpoint of `step`? Its validation was; its training step
    is still to come."""
    return entry["step"] < step or (entry["step"] == step > 0 and "held_out" in entry)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list to which Ctrl-C and SIGTERM add their number, and do nothing else, while the block
    lasts: the step in hand ends, and the run is saved."""
    requests = []
    numbers = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(s, lambda number, frame: requests.append(number)) for s in numbers]
    try:
        yield requests
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def million(parameters) -> str:
    """How many numbers there are in these parameters, as "1.23 M"."""
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"


def parameters(state) -> str:
    """How many parameters the stage of a state.State has, and trains."""
    if state.stage == "base":
        return f"stage one: backbone of {million(state.model.parameters())} parameters"
    backbone = million(state.model.backbone.parameters())
    branch = million(state.model.branch_state().values())
    return (f"stage two: backbone {backbone} + branch {branch}, "
            f"training {million(state.trained.values())}")
