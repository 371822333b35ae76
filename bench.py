"""How fast, and where the time goes. Everything compared is timed in turns within one run, because
only such ratios mean much.

    python bench.py                 tables 1 to 4, eager and compiled (ten minutes on two CPU cores)
    python bench.py --compile off   eager only
    python bench.py --blocks        table 5 alone; needs a CUDA GPU, where it takes a few minutes

1. The training step of a preset, base and with the branch: ms, clips a second, share of each part.
2. Sorted expert dispatch against dense experts (every expert on every token), forward and backward.
3. The base DiT's training step against diffusers' CogVideoXTransformer3DModel at the same width,
   depth, tokens, text, optimizer and precision.
4. Forward and backward of both official architectures against diffusers' modules: same shapes, same
   weights.
5. One full-size block of the official models at its native token count against diffusers' block, as
   a share of what the chip reaches in a matrix product. With --device cpu the same code runs on a
   few tokens and prints ratios only.

Tables 3 to 5 need diffusers (requirements-extra.txt); without it 3 and 4 are left out with a
sentence. Before 4 and 5 are timed, both sides must give the same output.

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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import config
import experts
from common.run import resolve, use_threads
from common.score import table_head, table_line
from config import Config, Stopped, UserError
from data import Batch
from model import Condition, build_backbone
from official import cost, reference
from state import State


VOCABULARY = 120
NEEDS_DIFFUSERS = ("The comparison with diffusers needs it installed: "
                   "pip install -r requirements-extra.txt")


@dataclass(frozen=True)
class Flags:
    """What bench.py is asked for, beside the fields of a config."""
    blocks: bool = False  # table 5 alone: one full-size block of each official model


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
    batch = Batch(
        video=torch.rand(B, 3, cfg.frames, cfg.height, cfg.width) * 2 - 1,
        text=torch.randint(2, VOCABULARY, (B, cfg.text_len)),
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


# --- 2. expert dispatch ---------------------------------------------------------------------------
def dense(x: Tensor, gate: Tensor, chosen: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What experts.dispatch computes, with every expert on every token."""
    every = torch.einsum("md,edf->mef", x, weight) + bias  # (M, E, D)
    weights = gate.new_zeros(len(x), len(weight)).scatter(1, chosen, gate)  # (M, E)
    return (weights[..., None].type_as(every) * every).sum(1)


def dispatch_table(cfg: Config, rounds: int) -> None:
    """Print sorted against dense experts."""
    E = cfg.refinement_experts
    D = cfg.dim
    M = cfg.batch_size * math.prod(cfg.grid)
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
def product_share(function: Callable) -> float:
    """The share of a call's CPU time that goes into matrix products, as torch's profiler has it
    (eager code only)."""
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear",
                "scaled_dot_product")
    with torch.profiler.profile() as profile:
        function()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    inside = sum(t for name, t in times.items() if any(part in name for part in products))
    return inside / sum(times.values())


def plain_step(cfg: Config, model: nn.Module, call: Callable, target: Tensor) -> Callable:
    """-> a function that takes one step of AdamW on the squared error of what `call` returns."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

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
    if cfg.compile == "off" and cfg.device == "cpu":
        share = {name: product_share(step) for name, step in steps.items()}
        print("Of it in matrix products and fused attention, in which both do the same work: ours "
              f"{share['ours']:.0%}, diffusers {share['diffusers']:.0%}.")


# --- 4 and 5. official architectures against diffusers --------------------------------------------
class Side(NamedTuple):
    """Ours or diffusers', of a pair with the same weights and inputs."""
    blocks: list[nn.Module]  # what --compile compiles
    call: Callable  # the forward pass
    leaves: list[Tensor]  # what the backward pass finds gradients of

    def run(self) -> None:
        """Forward and backward."""
        outputs = self.call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for one in self.leaves:
            one.grad = None


@torch.no_grad()
def difference(ours: Callable, theirs: Callable) -> float:
    """Largest difference of what two calls return, as a share of the largest number.

    Raises Stopped when it is more than rounding: times of two different things mean nothing.
    """
    a, b = ours(), theirs()
    if isinstance(b, tuple):  # diffusers' CogVideoX block returns (video, text)
        b = torch.cat(b[::-1], dim=1)
    share = ((a - b).abs().max() / b.abs().max()).item()
    if not share < (1e-4 if a.dtype == torch.float32 else 5e-2):
        raise Stopped(f"Ours and diffusers' outputs differ by {share:.1e} of the largest number; "
                      "nothing was timed.")
    return share


def compared(sides: dict[str, Side], modes: list[str],
             rounds: int) -> Iterator[tuple[str, dict[str, float], str]]:
    """Time forward and backward of ours and diffusers', which must agree.

    modes: of compile, "off" before "on". -> for each of them (mode, {side: seconds}, how much the
    outputs differ).
    """
    ours, theirs = sides.values()
    apart = f"{difference(ours.call, theirs.call):.0e}"
    for mode in modes:
        if mode == "on":
            compile_all(ours.blocks + theirs.blocks)
        yield mode, in_turns({name: side.run for name, side in sides.items()}, rounds), apart


def resized(name: str, **fields) -> Config:
    """An official preset at another size, as if it had been trained on it."""
    cfg = replace(config.preset(name), **fields)
    return replace(cfg, fit_height=cfg.grid[1], fit_width=cfg.grid[2])


def official_inputs(cfg: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, F, H, W), t (B,), text (B, L, D_text) of the config's size."""
    x = torch.randn(cfg.batch_size, *cost.input_size(cfg), device=cfg.device, dtype=dtype)
    text = torch.randn(cfg.batch_size, cfg.text_len, cfg.text_dim, device=cfg.device, dtype=dtype)
    return x, torch.full((cfg.batch_size,), 500, device=cfg.device), text


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


def whole_models(cfg: Config, dtype: torch.dtype) -> dict[str, Side]:
    """-> {side: model}."""
    ours, theirs, call_theirs = reference.official_pair(cfg, dtype)
    inputs = official_inputs(cfg, dtype)
    their_blocks = reference.blocks_of(theirs)
    return {
        "ours": Side([*ours.blocks], partial(ours, *inputs), [*ours.parameters()]),
        "diffusers": Side([*their_blocks], partial(call_theirs, *inputs), [*theirs.parameters()]),
    }


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
            for mode, seconds, apart in compared(whole_models(cfg, dtype), modes, rounds):
                say([name, tokens, str(dtype)[6:], mode, *map(ms, seconds.values()),
                     faster(seconds), apart])


# --- 5. full-size blocks --------------------------------------------------------------------------
def full_sizes(device: str) -> dict[str, Config]:
    """{preset: config with one block}: native token counts on a GPU, a few tokens on a CPU."""
    few = dict(frames=5, height=64, width=96, text_len=16) if device == "cpu" else {}
    return {name: resized(name, **few, depth=1, batch_size=1, device=device)
            for name in ("cogvideox-2b", "cogvideox-5b", "wan-1.3b")}


def first_block(model: Side) -> Side:
    """The first block of a model, called with what the model gives to it. These inputs have
    gradients too, as in the middle of a network."""
    block = model.blocks[0]
    leaves = [*block.parameters()]
    seen = []  # the block, its arguments, and its keyword arguments
    hook = block.register_forward_pre_hook(lambda *given: seen.extend(given), with_kwargs=True)
    with torch.no_grad():
        model.call()
    hook.remove()

    def own(value):
        if isinstance(value, Condition):  # of ours
            return replace(value, time=own(value.time), context=own(value.context))
        if not isinstance(value, Tensor):  # such as rotary tables in a tuple
            return value
        leaves.append(value.clone().requires_grad_())
        return leaves[-1]

    _, args, kwargs = seen
    inputs = {name: own(value) for name, value in kwargs.items()}
    return Side([block], partial(block, *map(own, args), **inputs), leaves)


def one_block(cfg: Config, dtype: torch.dtype) -> dict[str, Side]:
    """-> {side: its first block}."""
    return {name: first_block(model) for name, model in whole_models(cfg, dtype).items()}


def matmul_peak(device: str) -> float:
    """FLOPs a second of a large square bf16 matrix product, best of 30."""
    n = 8192 if device == "cuda" else 256  # some CPUs take a minute for more
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / min(timeit.repeat(lambda: a @ b, timer=clock, number=1, repeat=30))


def added_memory(run: Callable) -> float:
    """GiB of the GPU that a call needs beyond what lay there before: what autograd keeps, and
    gradients."""
    gc.collect()  # models of earlier rows, which compiled code and hooks tie into circles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / cost.GIB


def pair(ours_and_theirs: Iterable[float], form: str) -> str:
    """Ours / diffusers', for a table."""
    return " / ".join(format(value, form) for value in ours_and_theirs)


def block_table(sizes: dict[str, Config], modes: list[str], rounds: int, device: str) -> None:
    """Print one block of each model, forward and backward, bf16, batch 1, ours and diffusers'."""
    on_gpu = device == "cuda"  # on a CPU a few tokens try the code: only ratios say anything
    peak = matmul_peak(device)
    where = "a few tokens on a CPU"
    columns = []
    if on_gpu:
        where = f"{torch.cuda.get_device_name()}, {peak / 1e12:.0f} TFLOP/s in a large matmul"
        columns = ["ms", "TFLOP/s", "GiB added"]
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    print(f"\n`python {command}`: {where}, {date.today()}, torch {torch.__version__}. One block, "
          "batch 1, bf16, forward + backward; pairs are ours / diffusers'.\n")
    print(table_head(["block of", "video + text tokens", "compile", "diffusers' time / ours",
                      "share of a large matmul", *columns, "outputs differ by"]))

    for name, cfg in sizes.items():
        tokens = f"{math.prod(cfg.grid):,} + {cfg.text_len}"
        flops = cost.block_flops(cfg)
        sides = one_block(cfg, torch.bfloat16)
        for mode, seconds, apart in compared(sides, modes, rounds):
            taken = np.array([*seconds.values()])  # (2,), as speed is
            speed = flops / taken  # FLOPs a second
            cells = [pair(speed / peak, ".0%")]
            if on_gpu:
                added = [added_memory(side.run) for side in sides.values()]
                cells += [pair(taken * 1e3, ".2f"), pair(speed / 1e12, ".0f"), pair(added, ".2f")]
            say([name, tokens, mode, faster(seconds), *cells, apart])


# --- the command ----------------------------------------------------------------------------------
def main(cfg: Config, blocks: bool = False, rounds: int = 30) -> None:
    """Print the tables. Raises UserError where they cannot be made, and Stopped where outputs
    differ."""
    if blocks and cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--blocks times full-size blocks and needs a CUDA GPU; --device cpu tries "
                        "it on a few tokens.")
    cfg, why = resolve(use_threads(cfg))
    modes = ["off"] if cfg.compile == "off" else ["off", "on"]
    installed = find_spec("diffusers") is not None
    if blocks:
        if not installed:
            raise UserError(NEEDS_DIFFUSERS)
        rounds = rounds if cfg.device == "cuda" else 3
        return block_table(full_sizes(cfg.device), modes, rounds, cfg.device)

    print(f"torch {torch.__version__}, {cfg.device}, {cfg.threads} threads")
    for sentence in why.values():
        print(sentence)
    dispatch_table(cfg, rounds)
    for mode in modes:
        step_table(replace(cfg, compile=mode), rounds)
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
    main(cfg, blocks=flags.blocks)


if __name__ == "__main__":
    config.entry(from_command_line, sys.argv[1:])
