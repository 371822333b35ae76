"""How fast, and where the time goes. Everything compared is timed in turns within one run, because only such ratios
mean much.

    python bench.py                 every table, eager and compiled (about five minutes on two CPU cores)
    python bench.py --compile off   eager only

1. The training step of a preset, base and with the branch: ms, clips a second, and the share of each part of the step.
2. Sorted expert dispatch against dense experts (every expert on every token), forward and backward.
3. The base DiT's training step against diffusers' CogVideoXTransformer3DModel at the same width, depth, tokens, text,
optimizer
   and precision (needs diffusers from requirements-extra.txt; left out with a sentence where it is missing).
"""
import dataclasses
import statistics
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import diffusion
import experts
import train
from config import Config
from model import build_backbone

VOCABULARY = 120


def in_turns(functions: dict, rounds: int) -> dict[str, float]:
    """{name: median seconds} of functions called in turns, so that a busy moment of the machine falls on all of
    them."""
    for function in functions.values():  # the first calls compile and fill caches
        function()
        function()
    times = {name: [] for name in functions}
    for _ in tqdm(range(rounds), desc=" against ".join(functions), leave=False):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def random_batch(cfg: Config) -> SimpleNamespace:
    """A batch of the right shapes: speed does not depend on what is in it."""
    B, N, E = cfg.batch_size, cfg.grid[0] * cfg.grid[1] * cfg.grid[2], cfg.categories
    length = torch.randint(1, cfg.text_len + 1, (B,))
    text = torch.randint(2, VOCABULARY, (B, cfg.text_len)) * (torch.arange(cfg.text_len) < length[:, None])
    fields = dict(x=torch.rand(B, 3, cfg.frames, cfg.height, cfg.width) * 2 - 1, text=text, text_length=length,
                  categories=(torch.rand(B, E) < 0.2).float(), target=(torch.rand(B, N, E) < 0.2).float(),
                  target_mask=torch.ones(B, N, E))
    return SimpleNamespace(**{name: value.to(cfg.device) for name, value in fields.items()})


# --- 1. the training step ---------------------------------------------------------------------------------------------
def training_step(cfg: Config, stage: str):
    """-> a function that takes one training step as train.py does, and the list of (part, seconds) it appends to."""
    state, process, batch, parts = train.State(cfg, VOCABULARY), diffusion.build(cfg), random_batch(cfg), []
    if stage == "physics":
        state.attach_branch()

    def step():
        marks = [time.perf_counter()]
        t, eps = (v.to(cfg.device) for v in process.draw(0, range(cfg.batch_size), batch.x.shape[1:]))
        marks.append(time.perf_counter())
        losses, _ = train.losses_of(state, process, batch, t, eps)
        marks.append(time.perf_counter())
        train.total_loss(losses, cfg).backward()
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(state.trained.values(), cfg.clip)
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.update_ema()
        marks.append(time.perf_counter())
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


# --- 3. against diffusers ---------------------------------------------------------------------------------------------
def reference_model(cfg: Config):
    """diffusers' CogVideoX at this config's size, with its rotary table, as a function of (x, t, text embedding)."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    T, h, w = cfg.grid
    model = CogVideoXTransformer3DModel(
        num_attention_heads=cfg.heads, attention_head_dim=cfg.dim // cfg.heads, in_channels=3, out_channels=3,
        time_embed_dim=cfg.time_dim, text_embed_dim=cfg.dim, num_layers=cfg.depth, sample_width=cfg.width,
        sample_height=cfg.height, sample_frames=cfg.frames, patch_size=cfg.patch, patch_size_t=cfg.patch_t,
        max_text_seq_length=cfg.text_len, use_rotary_positional_embeddings=True).to(cfg.device)
    rope = get_3d_rotary_pos_embed(cfg.dim // cfg.heads, ((0, 0), (h, w)), (h, w), T, grid_type="slice",
                                   max_size=(h, w), device=cfg.device)

    def call(x, t, y):
        return model(x.transpose(1, 2), y, t, image_rotary_emb=rope, return_dict=False)[0].transpose(1, 2)
    return model, call


def product_share(function) -> float:
    """The share of a call's CPU time that goes into matrix products, as torch's profiler has it (eager code only)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "scaled_dot_product"
    return sum(t for name, t in times.items() if any(part in name for part in products)) / sum(times.values())


def reference_table(cfg: Config, rounds: int) -> None:
    """Print the base's training step against diffusers'."""
    try:
        theirs, call_theirs = reference_model(cfg)
    except ImportError:
        print("\nThe comparison with diffusers needs it installed: pip install -r requirements-extra.txt")
        return
    ours, batch = build_backbone(cfg, VOCABULARY).to(cfg.device), random_batch(cfg)
    y = torch.randn(cfg.batch_size, cfg.text_len, cfg.dim, device=cfg.device)
    t = torch.rand(cfg.batch_size, device=cfg.device) * 999
    if cfg.compile == "on":
        for block in [*ours.blocks, *theirs.transformer_blocks]:
            block.compile(dynamic=False)

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


def main(cfg: Config, rounds: int = 30) -> None:
    cfg, why = train.resolve(cfg)
    print(f"torch {torch.__version__}, {cfg.device}, {cfg.threads} threads")
    for sentence in why.values():
        print(sentence)
    dispatch_table(cfg, rounds)
    for mode in (["off"] if cfg.compile == "off" else ["off", "on"]):
        step_table(dataclasses.replace(cfg, compile=mode), rounds)
        for precision in ("fp32", "bf16"):
            reference_table(dataclasses.replace(cfg, compile=mode, precision=precision), rounds)


if __name__ == "__main__":
    config.entry(lambda: main(config.parse(sys.argv[1:], "Time the training step and the experts against references.")))
