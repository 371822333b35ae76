"""How fast, and where the time goes. Everything compared is timed in turns within one run, because only such ratios
mean much.

    python bench.py                 tables 1 to 4, eager and compiled (about ten minutes on two CPU cores)
    python bench.py --compile off   eager only
    python bench.py --blocks        table 5 alone; needs a CUDA GPU, where it takes a few minutes

1. The training step of a preset, base and with the branch: ms, clips a second, and the share of each part of the step.
2. Sorted expert dispatch against dense experts (every expert on every token), forward and backward.
3. The base DiT's training step against diffusers' CogVideoXTransformer3DModel at the same width, depth, tokens, text,
   optimizer and precision.
4. Forward and backward of both official architectures against diffusers' modules: same shapes, same weights.
5. One full-size block of the official models at its native token count against diffusers' block, as a share of what
   the chip reaches in a matrix product. With --device cpu the same code runs on a few tokens and prints ratios only.

Tables 3 to 5 need diffusers (requirements-extra.txt); without it 3 and 4 are left out with a sentence. Before 4 and 5
are timed, both sides must give the same output.
"""
import gc
import math
import statistics
import sys
import time
from dataclasses import replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import config
import diffusion
import experts
import train
from align import total_loss
from common.run import resolve
from config import Config, Stopped, UserError
from model import build_backbone
from official.cost import GIB, block_cost
from official.weights import COG_NAMES, WAN_NAMES, from_stored, renamed, their_config


VOCABULARY = 120
NEEDS_DIFFUSERS = "The comparison with diffusers needs it installed: pip install -r requirements-extra.txt"


def clock() -> float:
    """Now, in seconds, once a GPU has done what it was given: kernels run behind the code that calls them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(functions: dict, rounds: int) -> dict[str, float]:
    """{name: median seconds} of functions called in turns, so that a busy moment of the machine falls on all of
    them."""
    for function in functions.values():  # the first calls compile and fill caches
        function()
        function()
    times = {name: [] for name in functions}
    for _ in tqdm(range(rounds), desc=" against ".join(functions), leave=False):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def random_batch(cfg: Config) -> SimpleNamespace:
    """A batch of the right shapes: speed does not depend on what is in it."""
    B, N, E = cfg.batch_size, cfg.grid[0] * cfg.grid[1] * cfg.grid[2], cfg.categories
    length = torch.randint(1, cfg.text_len + 1, (B,))
    text = torch.randint(2, VOCABULARY, (B, cfg.text_len)) * (torch.arange(cfg.text_len) < length[:, None])
    fields = dict(x=torch.rand(B, 3, cfg.frames, cfg.height, cfg.width) * 2 - 1, text=text, text_length=length,
                  categories=(torch.rand(B, E) < 0.2).float(), target=(torch.rand(B, N, E) < 0.2).float(),
                  target_mask=torch.ones(B, N, E))
    return SimpleNamespace(maps=None, **{name: value.to(cfg.device) for name, value in fields.items()})


def compile_all(blocks) -> None:
    torch.compiler.reset()  # code compiled for eight models in one process runs eager for the ninth
    for block in blocks:
        block.compile(dynamic=False)


# --- 1. the training step ---------------------------------------------------------------------------------------------
def training_step(cfg: Config, stage: str):
    """-> a function that takes one training step as train.py does, and the list of (part, seconds) it appends to."""
    state, process, batch, parts = train.State(cfg, VOCABULARY), diffusion.build(cfg), random_batch(cfg), []
    if stage == "physics":
        state.attach_branch()

    def step():
        marks = [clock()]
        t, eps = (v.to(cfg.device) for v in process.draw(0, range(cfg.batch_size), batch.x.shape[1:]))
        marks.append(clock())
        losses, _ = train.losses_of(state, process, batch, t, eps)
        marks.append(clock())
        total_loss(losses, cfg).backward()
        marks.append(clock())
        torch.nn.utils.clip_grad_norm_(state.trained.values(), cfg.clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.update_ema()
        marks.append(clock())
        parts.append([b - a for a, b in zip(marks, marks[1:])])
    return step, parts


def step_table(cfg: Config, rounds: int) -> None:
    """Print the training step of both stages, and how its time is spent."""
    print(f"\n`{cfg.config}`, batch {cfg.batch_size}, {cfg.precision}, compile {cfg.compile}\n")
    print("| training step | ms | clips/s | noise | forward | backward | optimizer, average |")
    print("|---|---|---|---|---|---|---|")
    steps = {stage: training_step(cfg, stage) for stage in ("base", "physics")}
    seconds = in_turns({stage: step for stage, (step, _) in steps.items()}, rounds)
    for stage, (_, parts) in steps.items():
        shares = [statistics.median(p) / seconds[stage] for p in zip(*parts)]
        name = {"base": "base", "physics": "with branch" + ", backbone frozen" * cfg.freeze_backbone}[stage]
        print(f"| {name} | {seconds[stage] * 1e3:.0f} | {cfg.batch_size / seconds[stage]:.0f} | "
              + " | ".join(f"{s:.0%}" for s in shares) + " |")


# --- 2. expert dispatch -----------------------------------------------------------------------------------------------
def dense(x, gate, chosen, weight, bias):
    """What dispatch computes, with every expert on every token."""
    every = torch.einsum("md,edf->mef", x, weight) + bias  # (M, E, D)
    weights = torch.zeros(len(x), len(weight), device=x.device, dtype=gate.dtype).scatter(1, chosen, gate)
    return (weights[..., None].type_as(every) * every).sum(1)


def dispatch_table(cfg: Config, rounds: int) -> None:
    """Print sorted against dense experts."""
    E, k, D = cfg.refinement_experts, cfg.top_k, cfg.dim
    M = cfg.batch_size * cfg.grid[0] * cfg.grid[1] * cfg.grid[2]
    x, weight, bias = torch.randn(M, D), torch.randn(E, D, D), torch.randn(E, D)
    x, weight, bias = (v.to(cfg.device).requires_grad_() for v in (x, weight, bias))
    gate, chosen = torch.rand(M, E, device=cfg.device).softmax(-1).topk(k)

    def run(function):
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            y = function(x, gate, chosen, weight, bias)
        y.float().square().mean().backward()
    seconds = in_turns({"dense": lambda: run(dense), "sorted": lambda: run(experts.dispatch)}, rounds)
    print(f"\nExperts, {M} tokens, top {k} of {E}, forward and backward: sorted dispatch takes "
          f"{seconds['sorted'] / seconds['dense']:.2f} of dense.")


# --- 3. the training step against diffusers ---------------------------------------------------------------------------
def their_model(cfg: Config):
    """-> diffusers' model of this config, freshly initialised, and the same as a function of (x, t, text)."""
    import diffusers
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    fields = their_config(cfg)
    net = getattr(diffusers, fields.pop("_class_name"))(**fields).to(cfg.device)
    if cfg.lineage == "wan":
        return net, lambda x, t, text: net(x, t, text, return_dict=False)[0]
    (T, h, w), rope = cfg.grid, None
    if cfg.positions != "sincos":  # on the grid a model was trained on, the only one timed here, "fitted" is integers
        rope = get_3d_rotary_pos_embed(cfg.dim // cfg.heads, None, (h, w), T, grid_type="slice", max_size=(h, w),
                                       device=cfg.device)

    def call(x, t, text):
        return net(x.transpose(1, 2), text, t, image_rotary_emb=rope, return_dict=False)[0].transpose(1, 2)
    return net, call


def blocks_of(theirs):
    return theirs.transformer_blocks if hasattr(theirs, "transformer_blocks") else theirs.blocks


def product_share(function) -> float:
    """The share of a call's CPU time that goes into matrix products, as torch's profiler has it (eager code only)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "scaled_dot_product"
    return sum(t for name, t in times.items() if any(part in name for part in products)) / sum(times.values())


def reference_table(cfg: Config, rounds: int) -> None:
    """Print the base's training step against diffusers'."""
    theirs, call_theirs = their_model(replace(cfg, positions="integer", text_dim=cfg.dim))
    ours, batch = build_backbone(cfg, VOCABULARY).to(cfg.device), random_batch(cfg)
    y = torch.randn(cfg.batch_size, cfg.text_len, cfg.dim, device=cfg.device)
    t = torch.rand(cfg.batch_size, device=cfg.device) * 999
    if cfg.compile == "on":
        compile_all([*ours.blocks, *blocks_of(theirs)])

    def step(model, call):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def run():
            with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.precision == "bf16"):
                prediction = call()
            F.mse_loss(prediction.float(), batch.x).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return run
    steps = {"diffusers": step(theirs, lambda: call_theirs(batch.x, t, y)),
             "ours": step(ours, lambda: ours(batch.x, t, batch.text, batch.text_length))}
    seconds = in_turns(steps, rounds)
    print(f"\nTraining step of the base against diffusers' CogVideoXTransformer3DModel, {cfg.precision}, compile "
          f"{cfg.compile}: {seconds['diffusers'] / seconds['ours']:.2f} times as fast "
          f"({seconds['ours'] * 1e3:.0f} against {seconds['diffusers'] * 1e3:.0f} ms).")
    if cfg.compile == "off" and cfg.device == "cpu":
        share = {name: product_share(step) for name, step in steps.items()}
        print("Of it in matrix products and fused attention, in which both do the same work: ours "
              f"{share['ours']:.0%}, diffusers {share['diffusers']:.0%}.")


# --- 4. official architectures against diffusers ----------------------------------------------------------------------
def resized(name: str, frames: int, height: int, width: int, **fields) -> Config:
    """An official preset at another size, as if it had been trained on it."""
    cfg = replace(config.preset(name), frames=frames, height=height, width=width, **fields)
    return replace(cfg, fit_height=cfg.grid[1], fit_width=cfg.grid[2])


def official_sizes(device: str) -> dict[str, Config]:
    """{name: config} of table 4. "medium" has so many tokens that a CPU takes the fused attention kernel."""
    tiny = dict(frames=9, height=128, width=128, depth=4, dim=128, text_dim=128, text_len=24, batch_size=4)
    medium = dict(frames=17, height=256, width=256, depth=2, dim=384, text_dim=512, text_len=64, batch_size=1)
    cog = dict(name="cogvideox-5b", time_dim=64, device=device)
    wan = dict(name="wan-1.3b", freq_dim=64, device=device)
    return {"CogVideoX, tiny": resized(**cog, **tiny, heads=2), "CogVideoX, medium": resized(**cog, **medium, heads=6),
            "Wan, tiny": resized(**wan, **tiny, heads=1, ffn=512),
            "Wan, medium": resized(**wan, **medium, heads=3, ffn=1536)}


def official_pair(cfg: Config, dtype: torch.dtype):
    """-> our model, diffusers' model, and that as a function of (x, t, text). Both have the same random weights."""
    theirs, call_theirs = their_model(cfg)
    for p in theirs.parameters():  # not `.to(dtype)`: diffusers, too, keeps the rotary tables (buffers) in float32
        p.data = p.data.to(dtype)
    with torch.device("meta"):
        ours = build_backbone(cfg)
    stored, names = theirs.state_dict(), WAN_NAMES if cfg.lineage == "wan" else COG_NAMES
    ours.load_state_dict({name: from_stored(name, stored[renamed(name, names)], cfg) for name in ours.state_dict()},
                         assign=True)
    return ours, theirs, call_theirs


def official_inputs(cfg: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, F, H, W), t (B,), text (B, L, D_text) of the config's size."""
    size = [n * p for n, p in zip(cfg.grid, (cfg.patch_t, cfg.patch, cfg.patch))]
    x = torch.randn(cfg.batch_size, cfg.channels, *size, device=cfg.device, dtype=dtype)
    text = torch.randn(cfg.batch_size, cfg.text_len, cfg.text_dim, device=cfg.device, dtype=dtype)
    return x, torch.full((cfg.batch_size,), 500, device=cfg.device), text


def forward_backward(call, leaves: list[Tensor]):
    """-> a function that runs `call`, and then back to the gradients of all leaves, which it drops."""
    def run():
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for leaf in leaves:
            leaf.grad = None
    return run


@torch.no_grad()
def difference(ours, theirs) -> float:
    """Largest difference of what two calls return, as a share of the largest number. Raises Stopped when it is more
    than rounding: a ratio of times would then compare two different things."""
    a, b = ours(), theirs()
    b = torch.cat(b[::-1], dim=1) if isinstance(b, tuple) else b  # diffusers' CogVideoX block returns (video, text)
    share = ((a - b).abs().max() / b.abs().max()).item()
    if not share < (1e-4 if a.dtype == torch.float32 else 5e-2):
        raise Stopped(f"Ours and diffusers' outputs differ by {share:.1e} of the largest number; nothing was timed.")
    return share


def official_table(sizes: dict[str, Config], modes: list[str], rounds: int) -> None:
    """Print forward + backward of whole models, ours and diffusers', eager and compiled, in both precisions."""
    torch.backends.cudnn.allow_tf32 = False  # or diffusers' patch convolution is less exact than our linear layer
    print("\nForward + backward against diffusers' modules at the same shapes, with the same weights\n")
    print("| model | tokens | precision | compile | ours, ms | diffusers, ms | diffusers / ours | outputs differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for name, cfg in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs, call_theirs = official_pair(cfg, dtype)
            x, t, text = official_inputs(cfg, dtype)
            calls = {"diffusers": lambda: call_theirs(x, t, text), "ours": lambda: ours(x, t, text)}
            apart = difference(calls["ours"], calls["diffusers"])
            runs = {key: forward_backward(calls[key], list(net.parameters()))
                    for key, net in (("diffusers", theirs), ("ours", ours))}
            for mode in modes:
                if mode == "on":
                    compile_all([*ours.blocks, *blocks_of(theirs)])
                seconds = in_turns(runs, rounds)
                print(f"| {name} | {cfg.batch_size} x {math.prod(cfg.grid)} | {str(dtype)[6:]} | {mode} | "
                      f"{seconds['ours'] * 1e3:.0f} | {seconds['diffusers'] * 1e3:.0f} | "
                      f"{seconds['diffusers'] / seconds['ours']:.2f} | {apart:.0e} |", flush=True)


# --- 5. full-size blocks ----------------------------------------------------------------------------------------------
def full_sizes(device: str) -> dict[str, Config]:
    """{preset: config with one block}: native token counts on a GPU, a few tokens on a CPU."""
    one = dict(depth=1, batch_size=1, device=device)
    names = "cogvideox-2b", "cogvideox-5b", "wan-1.3b"
    if device == "cpu":
        return {name: resized(name, frames=5, height=64, width=96, text_len=16, **one) for name in names}
    return {name: replace(config.preset(name), **one) for name in names}


def one_block(cfg: Config, dtype: torch.dtype) -> dict[str, tuple]:
    """-> {side: (block, its call, what it has gradients for)} of ours and diffusers' block, with the same weights and
    inputs. Inputs have gradients too, as in the middle of a network."""
    ours, theirs, call_theirs = official_pair(cfg, dtype)
    their_block, seen = blocks_of(theirs)[0], []
    x, t, text = official_inputs(cfg, dtype)
    with torch.no_grad():
        tokens, condition = ours.embed(x, t, text)
        # What diffusers' model hands to its block is noted on the way in, so that no signature is repeated here.
        hook = their_block.register_forward_pre_hook(lambda block, *inputs: seen.append(inputs), with_kwargs=True)
        call_theirs(x, t, text)
        hook.remove()

    def leaf(v):
        return v.clone().requires_grad_() if isinstance(v, Tensor) else v  # rotary tables, in a tuple, stay as they are
    tokens = leaf(tokens)
    condition = replace(condition, time=leaf(condition.time), context=leaf(condition.context))
    args, kwargs = [leaf(v) for v in seen[0][0]], {name: leaf(v) for name, v in seen[0][1].items()}
    inputs = {"ours": (tokens, condition.time, condition.context), "diffusers": (*args, *kwargs.values())}
    calls = {"ours": lambda: ours.blocks[0](tokens, condition), "diffusers": lambda: their_block(*args, **kwargs)}
    blocks = {"ours": ours.blocks[0], "diffusers": their_block}
    return {side: (blocks[side], calls[side],
                   [*blocks[side].parameters(), *(v for v in inputs[side] if isinstance(v, Tensor))])
            for side in blocks}


def block_flops(cfg: Config) -> float:
    """FLOPs of a block's matrix products on one clip, forward and backward: backward costs two products for each one
    of the forward. What a fused attention kernel computes again is not counted, as it is not in the usual figures."""
    with torch.device("meta"):
        linear, attention, *_ = block_cost(build_backbone(cfg), cfg)
    return 3 * (linear + attention)


def matmul_peak(device: str) -> float:
    """FLOPs a second of a large square bf16 matrix product, best of 30."""
    n, times = 8192 if device == "cuda" else 1024, []
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(30):
        start = clock()
        a @ b
        times.append(clock() - start)
    return 2 * n**3 / min(times)


def added_memory(run) -> float:
    """GiB of the GPU that a call needs beyond what lay there before: what autograd keeps, and gradients."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def block_rows(name: str, cfg: Config, modes: list[str], peak: float, rounds: int) -> None:
    """Print the rows of one model. Its tensors die with this function, before the next model is laid out."""
    sides, flops = one_block(cfg, torch.bfloat16), block_flops(cfg)
    apart = difference(sides["ours"][1], sides["diffusers"][1])
    runs = {side: forward_backward(call, leaves) for side, (_, call, leaves) in sides.items()}
    for mode in modes:
        if mode == "on":
            compile_all(block for block, _, _ in sides.values())
        seconds = in_turns(runs, rounds)
        both = lambda value: " / ".join(value(side) for side in ("ours", "diffusers"))
        cells = [f"{math.prod(cfg.grid):,} + {cfg.text_len}", mode, f"{seconds['diffusers'] / seconds['ours']:.2f}",
                 both(lambda side: f"{flops / seconds[side] / peak:.0%}")]
        if cfg.device == "cuda":  # on a CPU, where a few tokens try the code, only ratios say anything
            cells += [both(lambda side: f"{seconds[side] * 1e3:.2f}"),
                      both(lambda side: f"{flops / seconds[side] / 1e12:.0f}"),
                      both(lambda side: f"{added_memory(runs[side]):.2f}")]
        print(f"| {name} | {' | '.join(cells)} | {apart:.0e} |", flush=True)


def block_table(sizes: dict[str, Config], modes: list[str], rounds: int) -> None:
    """Print one block of each model, forward and backward, bf16 weights, batch 1, ours against diffusers'."""
    device = next(iter(sizes.values())).device
    peak = matmul_peak(device)
    where, columns = "a few tokens on a CPU", []
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {peak / 1e12:.0f} TFLOP/s in a large matmul"
        columns = ["ms", "TFLOP/s", "GiB added"]
    print(f"\n`python {' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`: {where}, {date.today()}, torch "
          f"{torch.__version__}. One block, batch 1, bf16, forward + backward; pairs are ours / diffusers'.\n")
    columns = ["block of", "video + text tokens", "compile", "diffusers' time / ours", "share of a large matmul",
               *columns, "outputs differ by"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, cfg in sizes.items():
        block_rows(name, cfg, modes, peak, rounds)
        torch.compiler.reset()
        gc.collect()  # compiled code and hooks make circles
        torch.cuda.empty_cache()


def main(cfg: Config, blocks: bool = False, rounds: int = 30) -> None:
    if blocks and cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError("--blocks times full-size blocks and needs a CUDA GPU; --device cpu tries it on a few tokens.")
    cfg, why = resolve(cfg)
    modes, reference = ["off"] if cfg.compile == "off" else ["off", "on"], find_spec("diffusers")
    if blocks:
        if not reference:
            raise UserError(NEEDS_DIFFUSERS)
        return block_table(full_sizes(cfg.device), modes, rounds if cfg.device == "cuda" else 3)
    print(f"torch {torch.__version__}, {cfg.device}, {cfg.threads} threads")
    for sentence in why.values():
        print(sentence)
    dispatch_table(cfg, rounds)
    for mode in modes:
        step_table(replace(cfg, compile=mode), rounds)
        for precision in ("fp32", "bf16") if reference else ():
            reference_table(replace(cfg, compile=mode, precision=precision), rounds)
    if reference:
        official_table(official_sizes(cfg.device), modes, rounds // 5)
    else:
        print("\n" + NEEDS_DIFFUSERS)


def from_command_line(argv: list[str]) -> None:
    """--blocks is the one flag that is no field of the config."""
    cfg = config.parse([word for word in argv if word != "--blocks"], "Time the training step, the experts and the "
                       "blocks against references; --blocks alone times one full-size block of each official model.")
    main(cfg, blocks="--blocks" in argv)


if __name__ == "__main__":
    config.entry(from_command_line, sys.argv[1:])
