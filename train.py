"""Train nanoProPhy: first a small video DiT on the clips, then the physical branch beside it, in one command.

    python train.py --config small              both stages, about twelve minutes on two CPU cores
    python train.py --config small --resume     go on after Ctrl-C, SIGTERM or a crash, to the bit
    python train.py --init_from runs/small ...  stage two alone, from another run's backbone

The file reads in the order in which things happen: settle what `auto` means, open the run folder, open the clips,
then one loop over steps. Inside the loop everything that happens once in a while (validation, preview, saving, the
change of stage) comes first, and the single training step is fenced at the end. No random state is carried along:
noise, clip order and caption dropout are functions of (seed, position in the stream), so a checkpoint holds weights,
averages, optimizers and a step.
"""
import contextlib
import dataclasses
import errno
import functools
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import align
import config
import data
import diffusion
import sample
from align import total_loss
from common.files import whole_file
from common.run import Log, describe_run, open_run, resolve
from config import Config, Stopped, UserError
from experts import ProPhy
from model import build_backbone
from official.branch import publish
from official.cache import Latents, open_cache
from official.cost import plan
from official.folder import fingerprint, identity, network_folder
from official.weights import load_pretrained
from vlm.maps import open_maps


SHAPE = "lineage", "dim", "depth", "heads", "patch_t", "patch", "positions", "text_len"  # what weights must agree in
BINS = 4  # the log has the diffusion loss of this many equal ranges of t: a loss says little, where it sits says more
HELD_OUT_SEED = 2**31  # noise of the held-out split, the same in every run


# --- model, averages, optimizers --------------------------------------------------------------------------------------
class State:
    """All that a checkpoint holds: model, averaged weights, optimizers, step, stage, best held-out loss."""

    def __init__(self, cfg: Config, vocabulary: int):
        self.cfg, self.device = cfg, torch.device(cfg.device)
        self.step, self.seconds = 0, 0.0
        torch.manual_seed(cfg.seed)
        if cfg.weights:
            half = cfg.precision == "bf16" and cfg.freeze_backbone  # what trains is kept in float32
            self.model: nn.Module = load_pretrained(cfg.weights, self.device, torch.bfloat16 if half else torch.float32)
            same_architecture(cfg, self.model.cfg)
            self.fingerprint = fingerprint(network_folder(cfg.weights))
            self.model.requires_grad_(False)  # stage one is skipped: no optimizer, no average of it
        else:
            self.model = build_backbone(cfg, vocabulary).to(self.device)
        if cfg.checkpointing:  # around `forward`, so that names stay; the branch's copies bring it along
            for block in self.model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        self.begin("base", cfg.lr)

    def begin(self, stage: str, lr: float) -> None:
        """Fresh averages and optimizers for what this stage trains."""
        self.stage, self.best = stage, math.inf
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizers = make_optimizers(self.trained, self.cfg, lr)
        if self.cfg.compile == "on":
            backbone = self.model.backbone if self.stage == "physics" else self.model
            branch = self.model.physical if self.stage == "physics" else []
            words = backbone.text_encoder.blocks if backbone.text_encoder else []
            for block in [*words, *backbone.blocks, *branch]:
                block.compile(dynamic=False)

    def attach_branch(self) -> None:
        """Stage two: the branch beside the *averaged* backbone (the weights one would publish), which stays frozen
        unless told otherwise."""
        self.load_ema()
        torch.manual_seed(self.cfg.seed + 1)  # so that a run resumed at the border builds the same branch
        self.model = ProPhy(self.model, self.cfg).to(self.device)
        self.model.init_from_backbone()
        self.model.backbone.requires_grad_(not self.cfg.freeze_backbone)
        for parameter in self.model.branch_parameters():  # LoRA's corrections sit inside the backbone
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.begin("physics", self.cfg.physics_lr)

    @torch.no_grad()
    def load_ema(self) -> None:
        for name, p in self.trained.items():
            p.copy_(self.ema[name])

    @torch.no_grad()
    def update_ema(self) -> None:
        decay = min(self.cfg.ema, (1 + self.stage_step) / (10 + self.stage_step))  # the young forget their random start
        for name, p in self.trained.items():
            self.ema[name].lerp_(p, 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The model with its averaged weights, in eval mode and uncompiled, for as long as the `with` block lasts."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self.load_ema()
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            self.model.train()
            with torch.no_grad():
                for name, p in self.trained.items():
                    p.copy_(kept[name])

    @property
    def stage_step(self) -> int:
        return self.step - (self.cfg.base_steps if self.stage == "physics" else 0)

    @property
    def publishable(self) -> bool:
        """Does what is trained stand beside frozen official weights, so that others can attach it to theirs?"""
        return bool(self.cfg.weights and self.cfg.freeze_backbone and self.stage == "physics")

    def stored(self) -> dict:
        """The weights that no other file has: of frozen official ones, what stands beside them."""
        official = self.publishable
        return {name: v for name, v in self.model.state_dict().items() if not official or name in self.trained}

    def state_dict(self) -> dict:
        return dict(step=self.step, stage=self.stage, best=self.best, seconds=self.seconds, model=self.stored(),
                    ema=self.ema, optimizers=[o.state_dict() for o in self.optimizers])

    def load_state_dict(self, state: dict) -> None:
        if state["stage"] == "physics":
            self.attach_branch()
        official = self.model.state_dict() if self.cfg.weights else {}  # of these only what was trained is in the file
        self.model.load_state_dict(official | state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        with torch.no_grad():
            for name, average in self.ema.items():
                average.copy_(state["ema"][name])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]


def same_architecture(cfg: Config, theirs: Config) -> None:
    """Raises UserError where --weights are of another model than the preset."""
    for name in (*SHAPE, "text_dim", "channels", "ffn"):
        a, b = getattr(theirs, name), getattr(cfg, name)
        if (a or 4 * theirs.dim if name == "ffn" else a) != (b or 4 * cfg.dim if name == "ffn" else b):
            raise UserError(f"--weights {cfg.weights} has --{name} {a}, this run {b}.")


def make_optimizers(trained: dict[str, nn.Parameter], cfg: Config, lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the 2-D matrices of blocks and AdamW on the rest, or AdamW alone. Vectors and biases do not decay."""
    def is_block_matrix(name, p):
        return p.ndim == 2 and ("blocks." in name or name.startswith("physical.")) and "norm" not in name
    muon, decayed, plain = [], [], []
    for name, p in trained.items():
        matrix = p.ndim >= 2 and not name.endswith("bias")  # the experts' biases stand in one table
        (muon if cfg.optimizer == "muon" and is_block_matrix(name, p) else decayed if matrix else plain).append(p)
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=plain, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    if not muon:
        return [adamw]
    # Matched RMS: an orthogonalised update is scaled to the size AdamW's would have, so one learning rate serves both.
    return [torch.optim.Muon(muon, lr=lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw]


def learning_rate(cfg: Config, stage: str, stage_step: int) -> float:
    """Linear warm-up, then linear to zero at the stage's end, or constant."""
    peak, steps = (cfg.lr, cfg.base_steps) if stage == "base" else (cfg.physics_lr, cfg.physics_steps)
    rise = min(1.0, (stage_step + 1) / max(cfg.warmup, 1))
    return peak * rise * (1.0 if cfg.schedule == "constant" else 1 - stage_step / steps)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def save(state: State, path: Path) -> None:
    """Write a checkpoint to a temporary name, flush it to disk, rename. Raises Stopped when the disk will not take
    it."""
    try:
        with whole_file(path) as part, open(part, "wb") as file:
            torch.save(state.state_dict(), file)
    except (OSError, RuntimeError) as e:  # torch wraps some write errors in RuntimeError
        raise Stopped(f"The checkpoint {path} could not be written ({e}); the previous one is intact.") from None


def save_and_prune(state: State, folder: Path) -> None:
    """Save, and keep this and the one before. Later ones are damaged ones that were passed over: they count for
    nothing."""
    path = folder / f"step{state.step:06d}.pt"
    save(state, path)
    for old in sorted(p for p in folder.glob("step*.pt") if p <= path)[:-2]:
        old.unlink()


def load_newest(state: State, folder: Path) -> None:
    """The newest checkpoint that reads; a damaged one is named and passed over."""
    for path in sorted(folder.glob("step*.pt"), reverse=True):
        try:
            stored = torch.load(path, map_location=state.device, weights_only=True)
        except Exception as e:  # a truncated zip raises one of many types
            print(f"{path} is damaged ({type(e).__name__}); trying the one before.", file=sys.stderr)
            continue
        return state.load_state_dict(stored)
    raise UserError(f"No checkpoint in {folder} can be read; start again without --resume in another --out_dir.")


def take_backbone(state: State, cfg: Config) -> None:
    """--init_from: the averaged backbone of another run, whose shape must be this run's."""
    other = Path(cfg.init_from)
    theirs = config.load(other / "config.json")
    for name in (*SHAPE, "text_depth", "time_dim", "process", "predict"):
        if getattr(theirs, name) != getattr(cfg, name):
            raise UserError(f"--init_from {other} has --{name} {getattr(theirs, name)}, this run {getattr(cfg, name)}.")
    path = other / "checkpoints" / "base.pt"
    try:
        stored = torch.load(path, map_location=state.device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{other} has not finished its stage one: it has no checkpoints/base.pt.") from None
    except Exception as e:
        raise UserError(f"{path} cannot be read ({type(e).__name__}).") from None
    state.model.load_state_dict(stored["ema"])
    state.ema = {name: average.clone() for name, average in stored["ema"].items()}


# --- losses -----------------------------------------------------------------------------------------------------------
def losses_of(state: State, process: diffusion.Process, batch: data.Batch, t: Tensor,
              eps: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every term of Eq. 6 that this stage has, unweighted, and the diffusion loss a clip (B,)."""
    cfg, x = state.cfg, batch.x
    x_t = process.noise(x, t, eps)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        out = state.model(x_t, process.model_time(t), batch.text, batch.text_length)
    prediction, routing = out if state.stage == "physics" else (out, None)
    per_clip = process.loss(prediction, x_t, t, x, eps)
    losses = {"diffusion": per_clip.mean()}
    if routing and routing.semantic_lift is not None:
        told = (batch.text_length > 0) & (batch.categories.sum(1) > 0)  # others have nothing to be routed by
        if told.sum() > (cfg.coarse_loss == "relative"):
            p_s, q_s = routing.semantic_lift[told], batch.categories[told]
            losses["coarse"] = align.coarse_loss(p_s, q_s, cfg.coarse_loss, cfg.reduction)
    if routing and routing.refinement_lift is not None:
        p_r, target, mask = routing.refinement_lift, batch.target, batch.target_mask
        if batch.maps is not None:
            target, mask = align.map_target(batch.maps, batch.background, batch.categories, cfg.negatives,
                                            cfg.background)
        losses["fine_align"] = align.fine_align_loss(p_r, target, mask, cfg.reduction)
        losses["balance"] = align.balance_loss(routing.refinement, routing.chosen)
    return losses, per_clip.detach()


def held_out_loss(state: State, process: diffusion.Process, clips: data.Clips) -> dict[str, float]:
    """Losses of the averaged weights on the held-out clips, at fixed times and noise: comparable within and between
    runs."""
    n, size, totals = len(clips.pool.held), state.cfg.batch_size, {}
    with state.averaged():
        for first in range(0, n, size):
            positions = range(first, min(first + size, n))
            batch = clips.batch(positions, train=False).to(state.device)
            t, eps = process.draw(HELD_OUT_SEED, positions, batch.x.shape[1:])
            losses, _ = losses_of(state, process, batch, t.to(state.device), eps.to(state.device))
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.item() * len(positions) / n
    return totals


def preview_prompts(clips: data.Clips, most: int = 8) -> dict[str, list[int]]:
    """{caption: its categories} of held-out clips, first those that show something the ones before do not."""
    shown, first, rest = set(), {}, {}
    for row in clips.pool.held:
        present = clips.categories[row].nonzero().flatten().tolist()
        (first if set(present) - shown else rest)[clips.pool.captions[row]] = present
        shown |= set(present)
    told = {caption: present for caption, present in (first | rest).items() if caption.strip()}
    return dict(list(told.items())[:most]) or {"a clip": []}


def by_noise(per_clip: Tensor, t: Tensor) -> list[float | None]:
    """Mean diffusion loss of each range of t, cleanest first; None where no clip fell."""
    which = (t * BINS).long().clamp(max=BINS - 1)
    return [round(per_clip[which == b].mean().item(), 4) if (which == b).any() else None for b in range(BINS)]


# --- the story --------------------------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    """Check, settle `auto`, open the run folder, train. Raises UserError before work starts, Stopped when it cannot go
    on."""
    if cfg.dry_run:
        return plan(config.check(cfg))
    if cfg.init_from:  # stage one is skipped, whatever its length
        cfg = dataclasses.replace(cfg, base_steps=0)
    cfg, why = resolve(config.check(cfg))
    run = open_run(cfg)
    try:
        train(cfg, run, why)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Stopped(f"The disk is full; free some space and go on with --resume ({run} keeps its last checkpoint)."
                      ) from None


def train(cfg: Config, run: Path, why: dict[str, str]) -> None:
    """The whole run, in the order in which things happen. One function on purpose: it is read top to bottom."""
    # --- clips and words
    if cfg.latent:  # clips and words were encoded beforehand
        pool = open_cache(cfg, cfg.cache, identity(cfg.weights))
        clips, tokenizer = Latents(cfg, pool, open_maps(cfg, pool)), None
    else:
        pool = data.open_pool(cfg)
        if cfg.resume or cfg.init_from:
            words = run if cfg.resume else Path(cfg.init_from)  # a resumed run needs its own folder only
            tokenizer = data.Tokenizer.load(words / "tokenizer.json")
        else:
            tokenizer = data.Tokenizer.from_captions([pool.captions[row] for row in pool.train])
        clips = data.Clips(cfg, pool, tokenizer, open_maps(cfg, pool))
    process = diffusion.build(cfg)
    if cfg.resume:
        stored = json.loads((run / "config.json").read_text())
        why = stored.get("resolved", why)
        if stored.get("data") != clips.key:
            raise UserError(f"The clips of {cfg.data_dir or 'the world'} are not those that {run} was started with, or "
                            "the maps of --teacher are not; --resume needs the same.")

    # --- weights, new or as they were
    state = State(cfg, len(tokenizer) if tokenizer else 0)
    if cfg.resume:
        load_newest(state, run / "checkpoints")
        if cfg.base_steps < state.step if state.stage == "base" else cfg.base_steps != stored["base_steps"]:
            raise UserError(f"--base_steps {cfg.base_steps} cannot be: {run} stands at step {state.step}, and its "
                            f"stage one had {stored['base_steps']}.")
    elif cfg.init_from:
        take_backbone(state, cfg)
    if tokenizer:
        tokenizer.save(run / "tokenizer.json")
    describe_run(run, cfg, why, clips.categories_present, clips.key)
    log, prompts = Log(run / "log.jsonl", state.step), preview_prompts(clips)
    for sentence in why.values():
        print(sentence)
    if clips.unmapped:
        print(f"{clips.unmapped} of {len(clips)} training clips have no map in {clips.maps.folder}: L_fine_align skips "
              "them.", file=sys.stderr)
    if clips.cut:
        print(f"{clips.cut} captions have more than {cfg.text_len} words and are cut (--text_len).", file=sys.stderr)

    # --- Ctrl-C and SIGTERM end the run after the step in hand
    stop = []
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    total, begun, bad = cfg.base_steps + cfg.physics_steps, state.step, 0
    bar = tqdm(total=total, initial=state.step, unit="step", smoothing=0.05, dynamic_ncols=True)
    clock = time.perf_counter() - state.seconds
    try:
        while True:
            # --- once in a while, before the step: the change of stage, validation, preview, saving
            border = state.stage == "base" and state.step == cfg.base_steps
            stopping = bool(stop) or state.step == cfg.stop_at > begun
            last = state.step >= total
            if state.step > begun:
                state.seconds = time.perf_counter() - clock
                if border or last or state.step % cfg.eval_every == 0:
                    held_out = held_out_loss(state, process, clips)
                    log.write(step=state.step, stage=state.stage, seconds=state.seconds, held_out=held_out)
                    if held_out["diffusion"] < state.best:
                        state.best = held_out["diffusion"]
                        if state.publishable:
                            publish(state, run, state.best, clips.categories_present)
                        else:
                            save(state, run / "checkpoints" / "best.pt")
                seen = border or last or (cfg.preview_every and state.step % cfg.preview_every == 0)
                if seen and not cfg.latent:  # clips of an official model take minutes each: sample.py makes them
                    with state.averaged() as model:
                        sample.preview(run / "samples" / f"step{state.step:06d}.gif", model, process, tokenizer, cfg,
                                       list(prompts), present=list(prompts.values()), seed=cfg.seed,
                                       steps=cfg.preview_steps, guidance=cfg.guidance, precision=cfg.precision)
                if border:
                    save(state, run / "checkpoints" / "base.pt")
                if border or last or stopping or state.step % cfg.save_every == 0:
                    save_and_prune(state, run / "checkpoints")
            if last or stopping:
                break
            if border:
                state.attach_branch()
                describe_parameters(state, bar)
            elif state.step == begun:
                describe_parameters(state, bar)

            # ---------------------------------------- the training step ----------------------------------------
            positions = range(state.step * cfg.batch_size, (state.step + 1) * cfg.batch_size)
            batch = clips.batch(positions).to(state.device)
            t, eps = process.draw(cfg.seed, positions, batch.x.shape[1:])
            t, eps = t.to(state.device), eps.to(state.device)
            lr = learning_rate(cfg, state.stage, state.stage_step)
            losses, per_clip = losses_of(state, process, batch, t, eps)
            loss = total_loss(losses, cfg)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(state.trained.values(), cfg.clip)
            finite = math.isfinite(loss.item()) and math.isfinite(grad_norm.item())
            for optimizer in state.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if finite:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if finite:
                state.update_ema()
            # ---------------------------------------------------------------------------------------------------

            bad = 0 if finite else bad + 1
            if bad == 3:
                raise Stopped(f"The loss was not finite three steps in a row (step {state.step}); try a lower --lr, "
                              f"--precision fp32 or a lower --clip. The checkpoints in {run} are from before.")
            if state.step % cfg.log_every == 0 or not finite:
                parts = {name: value.item() for name, value in losses.items()}
                log.write(step=state.step, stage=state.stage, seconds=time.perf_counter() - clock, loss=loss.item(),
                          **parts, grad_norm=grad_norm.item(), lr=lr, by_noise=by_noise(per_clip, t),
                          skipped=not finite)
                rate = bar.format_dict["rate"] or 0
                bar.set_postfix_str(f"{state.stage} loss {loss.item():.3f}, {rate * cfg.batch_size:.0f} clips/s")
            state.step += 1
            bar.update()
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if last:
        branch, from_run = run / "branch.safetensors", f"--run {run}"
        if state.publishable:
            from_run = f"--weights {cfg.weights} --branch {branch}"
            if not branch.is_file():  # the finished run lost it: made again, by --resume, from the last step's weights
                loss = held_out_loss(state, process, clips)["diffusion"]
                publish(state, run, loss, clips.categories_present)
        print(f"Done: {run}, held-out diffusion loss {state.best:.4f}.")
        if state.publishable or not cfg.latent:
            print(f"Next:\npython sample.py {from_run} --prompt \"{next(iter(prompts))}\"")
    else:
        print(f"Stopped at step {state.step} of {total} and saved; go on with --resume.")


def describe_parameters(state: State, bar: tqdm) -> None:
    """Parameter counts of this stage, said above the progress bar."""
    count = lambda parameters: f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"
    if state.stage == "base":
        bar.write(f"stage one: backbone of {count(state.model.parameters())} parameters")
    else:
        backbone, branch = count(state.model.backbone.parameters()), count(state.model.branch_parameters())
        bar.write(f"stage two: backbone {backbone} + branch {branch}, training {count(state.trained.values())}")


if __name__ == "__main__":
    config.entry(lambda: main(config.parse(sys.argv[1:], "Train nanoProPhy: a video DiT, then its physical branch.")))
