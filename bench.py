"""How fast, and where the time goes. Everything compared is timed in turns within one run, because
only such ratios mean much.

    python bench.py                 tables 1 to 4, eager and compiled (ten minutes on two CPU cores)
    python bench.py --compile off   eager only
    python bench.py --full          table 5 alone; needs a CUDA GPU, where it takes a few minutes

1. The training step of a preset, base and with the branch: ms, clips a second, share of each part.
2. Sorted expert dispatch against dense experts (every expert on every token), forward and backward.
3. The base DiT's training step against diffusers' CogVideoXTransformer3DModel at the same width,
   depth, tokens, text, optimizer and precision.
4. Forward and backward of both official architectures against diffusers' modules: same shapes, same
   weights.
5. Whole training steps of the official models at their native token counts, with all weights
   trained against diffusers, and with the branch: seconds, share of the chip's peak, memory. With
   --device cpu the same code runs on a few tokens and prints ratios only.

Tables 3 to 5 need diffusers (requirements-extra.txt); without it 3 and 4 are left out with a
sentence. Before 4 is timed, both sides must give the same output and the same gradients.

Letters: B clips, C channels, F H W grid, N tokens, L text tokens, D width, E experts, M = B N.
"""
import gc
import math
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import config
import experts
from common.run import resolve, use_threads
from common.score import table_head, table_line
from config import Config, UserError
from data import Batch
from model import build_backbone
from official import cost, reference
from state import State


VOCABULARY = 120
NEEDS_DIFFUSERS = ("The comparison with diffusers needs it installed: "
                   "pip install -r requirements-extra.txt")


@dataclass(frozen=True)
class Flags:
    """What bench.py is asked for, beside the fields of a config."""
    full: bool = False  # table 5 alone: training steps of full-size models, which need a GPU


# --- what all tables use --------------------------------------------------------------------------
def clock() -> float:
    """Now, in seconds, once a GPU has done what it was given: kernels run behind the code."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(functions: dict[str, Callable], rounds: int) -> dict[str, float]:
    """{name: median seconds} of functions called in turns, so that a busy moment of the machine
    falls on all of them."""
    times = {name: [] for name in functions}
    for _ in tqdm(range(2 + rounds), desc=" against ".join(functions), leave=False):
        for name, function in functions.items():
            times[name].append(timeit.timeit(function, timer=clock, number=1))
    # The first two calls compile and fill caches.
    return {name: float(np.median(seconds[2:])) for name, seconds in times.items()}


def say(cells: Iterable[str]) -> None:
    """Print a table's next line, which may have taken a minute, at once."""
    print(table_line(cells), flush=True)


def ms(seconds: float) -> str:
    """Milliseconds, for a table."""
    return f"{seconds * 1e3:.0f}"


def faster(seconds: dict[str, float]) -> str:
    """Diffusers' time over ours."""
    return f"{seconds['diffusers'] / seconds['ours']:.2f}"


def autocast(cfg: Config):
    """The precision of a training step."""
    bf16 = cfg.precision == "bf16"
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=bf16)


def compile_all(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks anew: code for eight models in one process would run the ninth eagerly."""
    torch.compiler.reset()
    for block in blocks:
        block.compile(dynamic=False)


def random_batch(cfg: Config) -> Batch:
    """A batch of the right shapes: speed does not depend on what is in it."""
    B = cfg.batch_size
    maps = B, math.prod(cfg.grid), cfg.categories  # (B, N, E_cat)
    text = torch.randint(2, VOCABULARY, (B, cfg.text_len))
    if cfg.text_dim:
        text = torch.randn(B, cfg.text_len, cfg.text_dim)
    batch = Batch(
        video=None if cfg.latent else torch.rand(B, *cost.input_size(cfg)) * 2 - 1,
        latent=torch.randn(B, *cost.input_size(cfg)) if cfg.latent else None,
        text=text,
        text_length=torch.randint(1, cfg.text_len + 1, (B,)),
        caption=[""] * B,
        categories=(torch.rand(B, cfg.categories) < 0.2).float(),
        target=(torch.rand(maps) < 0.2).float(),
        target_mask=torch.ones(maps),
        index=torch.arange(B))
    return batch.to(cfg.device)


# --- 1. the training step -------------------------------------------------------------------------
def training_step(cfg: Config, stage: str) -> tuple[Callable, list[float]]:
    """-> a function that takes one training step of train.py, and the list to which each step adds
    the five times between which its four parts lie."""
    state = State(cfg, VOCABULARY)
    if stage == "physics":
        state.step = cfg.base_steps
        state.attach_branch()
    batch = random_batch(cfg)
    marks = []

    def mark(*_) -> None:
        marks.append(clock())

    # The step is train.py's own; two hooks note when its forward and its backward pass have ended.
    state.model.register_forward_hook(mark)
    state.optimizers[0].register_step_pre_hook(mark)

    def step() -> None:
        mark()
        noise = state.process.draw(0, range(cfg.batch_size), batch.x.shape[1:])
        t, eps = (part.to(cfg.device) for part in noise)
        mark()
        state.training_step(batch, t, eps, lr=1e-6)  # a step that diverges would be skipped
        mark()
    return step, marks


def step_table(cfg: Config, rounds: int) -> None:
    """Print the training step of both stages, and how its time is spent."""
    with_branch = "with branch, backbone frozen" if cfg.freeze_backbone else "with branch"
    steps = {"base": training_step(cfg, "base"), with_branch: training_step(cfg, "physics")}
    seconds = in_turns({name: step for name, (step, _) in steps.items()}, rounds)
    print(f"\n`{cfg.config}`, batch {cfg.batch_size}, {cfg.precision}, compile {cfg.compile}\n")
    print(table_head(["training step", "ms", "clips/s", "noise", "forward", "losses, backward",
                      "optimizer, average"]))
    for name, (_, marks) in steps.items():
        parts = np.diff(np.reshape(marks, (-1, 5)))  # (steps, 4) seconds
        shares = np.median(parts, axis=0) / seconds[name]
        say([name, ms(seconds[name]), f"{cfg.batch_size / seconds[name]:.0f}",
             *(f"{share:.0%}" for share in shares)])


# --- 1b. how cost grows with the clip -------------------------------------------------------------
CLIPS = ((12, 32, 32), (12, 64, 64), (24, 64, 64), (24, 96, 96))  # frames, height, width


def growth_table(cfg: Config, rounds: int) -> None:
    """Print what a token of the base's training step costs in clips of several sizes, because
    attention compares all pairs of them."""
    sizes = {}
    for frames, height, width in CLIPS:
        at = replace(cfg, frames=frames, height=height, width=width, batch_size=4)
        sizes[math.prod(at.grid)] = training_step(at, "base")[0]
    seconds = in_turns({f"{tokens} tokens": step for tokens, step in sizes.items()}, rounds)
    each = {name: taken / 4 / tokens for tokens, (name, taken) in zip(sizes, seconds.items())}
    least = min(each.values())
    print("\nA token of a clip, base's training step, four clips: "
          + ", ".join(f"{name} {one / least:.2f}" for name, one in each.items())
          + f" (1 = {least * 1e6:.0f} microseconds).")


# --- 2. expert dispatch ---------------------------------------------------------------------------
def dense(x: Tensor, gate: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What experts.dispatch computes, with every expert on every token."""
    every = torch.einsum("md,edf->mef", x, weight) + bias  # (M, E, D)
    weights = gate.new_zeros(len(x), len(weight)).scatter(1, chosen, gate)  # (M, E)
    return (weights[..., None].type_as(every) * every).sum(1)


def dispatch_table(cfg: Config, rounds: int) -> None:
    """Print sorted against dense experts, for few and for many of them."""
    D = cfg.dim
    M = cfg.batch_size * math.prod(cfg.grid)
    for E in (8, 32):
        x, weight, bias = (torch.randn(shape, device=cfg.device, requires_grad=True)
                           for shape in ((M, D), (E, D, D), (E, D)))
        gate, chosen = torch.rand(M, E, device=cfg.device).softmax(-1).topk(cfg.top_k)

        def run(function) -> None:
            with autocast(cfg):
                y = function(x, gate, chosen, weight, bias)
            y.float().square().mean().backward()

        functions = {"dense": dense, "sorted": experts.dispatch}
        seconds = in_turns({name: partial(run, f) for name, f in functions.items()}, rounds)
        print(f"\nExperts, {M} tokens, top {cfg.top_k} of {E}, forward and backward: sorted dispatch "
              f"takes {seconds['sorted'] / seconds['dense']:.2f} of dense.")


# --- 3. the training step against diffusers -------------------------------------------------------
def plain_step(cfg: Config, model: nn.Module, call: Callable, target: Tensor) -> Callable:
    """-> a function that takes one step of AdamW on the squared error of what `call` returns."""
    fused = torch.device(cfg.device).type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def run() -> None:
        with autocast(cfg):
            prediction = call()
        F.mse_loss(prediction.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return run


def reference_table(cfg: Config, rounds: int) -> None:
    """Print the base's training step against diffusers'."""
    theirs, call_theirs = reference.their_model(replace(cfg, positions="integer", text_dim=cfg.dim))
    ours = build_backbone(cfg, VOCABULARY).to(cfg.device)
    batch = random_batch(cfg)
    y = torch.randn(cfg.batch_size, cfg.text_len, cfg.dim, device=cfg.device)
    t = torch.rand(cfg.batch_size, device=cfg.device) * 999
    if cfg.compile == "on":
        compile_all([*ours.blocks, *reference.blocks_of(theirs)])

    our_call = partial(ours, batch.x, t, batch.text, batch.text_length)
    their_call = partial(call_theirs, batch.x, t, y)
    steps = {"ours": plain_step(cfg, ours, our_call, batch.x),
             "diffusers": plain_step(cfg, theirs, their_call, batch.x)}
    seconds = in_turns(steps, rounds)
    print("\nTraining step of the base against diffusers' CogVideoXTransformer3DModel, "
          f"{cfg.precision}, compile {cfg.compile}: {faster(seconds)} times as fast "
          f"({ms(seconds['ours'])} against {ms(seconds['diffusers'])} ms).")


# --- 4. official architectures against diffusers --------------------------------------------
def compared(sides: dict[str, reference.Side], modes: list[str],
             rounds: int) -> Iterator[tuple[str, dict[str, float], str]]:
    """Time forward and backward of ours and diffusers', which must agree.

    modes: of compile, "off" before "on". -> for each of them (mode, {side: seconds}, how much the
    outputs and gradients differ).
    """
    ours, theirs = sides.values()
    outputs = reference.difference(ours.call, theirs.call)
    apart = f"{max(outputs, reference.gradients_apart(ours, theirs)):.0e}"
    for mode in modes:
        if mode == "on":
            compile_all(ours.blocks + theirs.blocks)
        yield mode, in_turns({name: side.run for name, side in sides.items()}, rounds), apart


def resized(name: str, **fields) -> Config:
    """An official preset at another size, as if it had been trained on it."""
    cfg = replace(config.preset(name), **fields)
    return replace(cfg, fit_height=cfg.grid[1], fit_width=cfg.grid[2])


# --- 4. whole models, narrow ----------------------------------------------------------------------
def official_sizes(device: str) -> dict[str, Config]:
    """{name: config} of table 4. "medium" has so many tokens that a CPU takes the fused attention
    kernel."""
    sizes = {
        "tiny": dict(frames=9, height=128, width=128, depth=4, dim=128, text_dim=128, text_len=24,
                     batch_size=4),
        "medium": dict(frames=17, height=256, width=256, depth=2, dim=384, text_dim=512,
                       text_len=64, batch_size=1),
    }
    lineages = {"CogVideoX": ("cogvideox-5b", 64), "Wan": ("wan-1.3b", 128)}  # widths of a head
    return {f"{lineage}, {size}": resized(preset, **fields, heads=fields["dim"] // width,
                                          ffn=4 * fields["dim"], time_dim=64, freq_dim=64,
                                          device=device)
            for lineage, (preset, width) in lineages.items() for size, fields in sizes.items()}


def official_table(sizes: dict[str, Config], modes: list[str], rounds: int) -> None:
    """Print forward + backward of whole models, ours and diffusers', in both precisions."""
    # With TF32 diffusers' patch convolution would be less exact than our linear layer.
    torch.backends.cudnn.allow_tf32 = False
    print("\nForward + backward against diffusers' modules at the same shapes, with the same "
          "weights\n")
    print(table_head(["model", "tokens", "precision", "compile", "ours, ms", "diffusers, ms",
                      "diffusers / ours", "outputs differ by"]))
    for name, cfg in sizes.items():
        tokens = f"{cfg.batch_size} x {math.prod(cfg.grid)}"
        for dtype in (torch.float32, torch.bfloat16):
            for mode, seconds, apart in compared(reference.whole_models(cfg, dtype), modes, rounds):
                say([name, tokens, str(dtype)[6:], mode, *map(ms, seconds.values()),
                     faster(seconds), apart])


# --- 5. full-size training steps ------------------------------------------------------------------
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOPs a second, by their makers
MODES = {  # what stage two trains
    "all weights": dict(freeze_backbone=False, physical_blocks=""),
    "frozen + branch": dict(freeze_backbone=True),
}
FEW_LAYERS = 8  # of a pair, so that two models with their moments fit; every layer costs the same


def full_sizes(device: str) -> dict[str, Config]:
    """{preset: config}: as they are on a GPU, narrow and with a few tokens on a CPU."""
    narrow = dict(frames=5, height=64, width=96, text_len=16, text_dim=24, time_dim=32, freq_dim=32,
                  ffn=256, depth=4, physical_blocks="1,3")
    found = {}
    for name, heads in (("cogvideox-5b", 64), ("wan-1.3b", 128)):
        few = narrow | dict(dim=2 * heads, heads=2) if device == "cpu" else {}
        found[name] = resized(name, **few, batch_size=1, physics_steps=1, device=device,
                              precision="bf16" if device == "cuda" else "fp32", coarse_weight=0.0)
    return found


def matmul_peak(device: str) -> float:
    """FLOPs a second of a large square bf16 matrix product, best of 30."""
    n = 8192 if device == "cuda" else 256  # some CPUs take a minute for more
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / min(timeit.repeat(lambda: a @ b, timer=clock, number=1, repeat=30))


def their_step(cfg: Config) -> Callable:
    """One training step of diffusers' model of this size, as people run it: autocast, its own
    checkpointing where the config has it, AdamW on all weights."""
    theirs, call = reference.their_model(cfg)
    if cfg.checkpointing:
        theirs.enable_gradient_checkpointing()
    if cfg.compile == "on":
        compile_all(reference.blocks_of(theirs))
    theirs.train()
    x, t, text = reference.official_inputs(cfg, torch.float32)
    return plain_step(cfg, theirs, lambda: call(x, t, text), x)


def kernel_of(step: Callable) -> str:
    """The attention kernel that a step ran, as torch's profiler names it; "" on a CPU."""
    if not torch.cuda.is_available():
        return ""
    with torch.profiler.profile() as profile:
        step()
    names = [event.key for event in profile.key_averages()]
    words = ("cudnn", "flash", "fmha", "efficient")
    return next((name[:40] for name in names if any(word in name.lower() for word in words)), "unfused")


def full_table(sizes: dict[str, Config], modes: list[str], rounds: int) -> None:
    """Print whole training steps: pairs of a few layers, ours and diffusers', then ours alone."""
    device = next(iter(sizes.values())).device
    on_gpu = device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "a few tokens on a CPU: ratios only"
    peak = next((flops for name, flops in PEAKS.items() if name in where), matmul_peak(device))
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(f"\n`python {command}`: {where}, {date.today()}, torch {torch.__version__}. Training steps "
          f"of one clip; share of {peak / 1e12:.0f} TFLOP/s.\n")
    print(table_head(["model", "trained", "layers", "checkpointing", "compile", "diffusers' time / ours",
                      "s a clip", "tokens a second", "share of peak", "GiB at most", "attention"]))
    for name, cfg in sizes.items():
        for kind, fields in MODES.items():
            for compiled in modes:
                rival = kind == "all weights"  # which is all that theirs can train here
                layers = min(cfg.depth, FEW_LAYERS) if rival else cfg.depth
                at = replace(cfg, **fields, depth=layers, compile=compiled)
                full_row(name, kind, at, rival, rounds, peak if on_gpu else None)


def full_row(name: str, kind: str, cfg: Config, rival: bool, rounds: int, peak: float | None) -> None:
    """Print one line of it. peak: FLOPs a second; None leaves out what means nothing on a CPU."""
    with torch.device(cfg.device):  # random weights of billions are slow to draw on a CPU
        steps = {"ours": training_step(cfg, "physics")[0]}
        if rival:
            steps["diffusers"] = their_step(cfg)
    if peak:
        torch.cuda.reset_peak_memory_stats()
        steps["ours"]()
        memory = torch.cuda.max_memory_allocated() / cost.GIB
    seconds = in_turns(steps, rounds)
    cells = ["", "", "", "", ""]
    if peak:
        taken = seconds["ours"]
        tokens = math.prod(cfg.grid) + cfg.text_len * (cfg.lineage == "cogvideox")
        cells = [f"{taken:.2f}", f"{tokens / taken:,.0f}", f"{cost.count(cfg).useful / taken / peak:.0%}",
                 f"{memory:.1f}", kernel_of(steps["ours"])]
    say([name, kind, str(cfg.depth), "on" if cfg.checkpointing else "off", cfg.compile,
         faster(seconds) if rival else "", *cells])
    del steps  # its models must go before the next ones come
    gc.collect()


# --- the command ----------------------------------------------------------------------------------
def main(cfg: Config, full: bool = False, rounds: int = 30) -> None:
    """Print the tables. Raises UserError where they cannot be made, and Stopped where outputs
    differ."""
    if full and cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--full times full-size models and needs a CUDA GPU; --device cpu tries it "
                        "on a few tokens.")
    cfg, why = resolve(use_threads(cfg))
    modes = ["off"] if cfg.compile == "off" else ["off", "on"]
    installed = find_spec("diffusers") is not None
    if full:
        if not installed:
            raise UserError(NEEDS_DIFFUSERS)
        return full_table(full_sizes(cfg.device), modes, min(rounds, 5))

    print(f"torch {torch.__version__}, {cfg.device}, {cfg.threads} threads")
    for sentence in why.values():
        print(sentence)
    dispatch_table(cfg, rounds)
    for mode in modes:
        step_table(replace(cfg, compile=mode), rounds)
        if mode == "off":  # code for each size would be compiled
            growth_table(replace(cfg, compile=mode), rounds // 5)
        for precision in ("fp32", "bf16") if installed else ():
            reference_table(replace(cfg, compile=mode, precision=precision), rounds)
    if installed:
        official_table(official_sizes(cfg.device), modes, rounds // 5)
    else:
        print("\n" + NEEDS_DIFFUSERS)


def from_command_line(argv: list[str]) -> None:
    """`main` with the flags of a command line."""
    flags, cfg = config.parse_with(
        Flags, argv, "Time the training step, the experts and the blocks against references.")
    main(cfg, full=flags.full)


if __name__ == "__main__":
    config.entry(from_command_line, sys.argv[1:])
