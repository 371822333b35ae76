"""Train nanoProPhy: first a small video DiT, then the physical branch beside it, in one command.

    python train.py --config small              both stages, about 15 minutes on two CPU cores
    python train.py --config small --resume     go on after Ctrl-C, SIGTERM or a crash, to the bit
    python train.py --init_from runs/small ...  stage two alone, from another run's backbone

    resolve --> open_clips --> start_or_resume --> loop:  once in a while validate, save, preview
    `auto`      clips, words   State                      one step, fenced

From `main` on the file is a story. Inside its loop everything that happens once in a while comes
first, and the single training step is fenced. No random state is carried along: noise, clip order
and caption dropout are functions of (seed, position in the training order), so a checkpoint holds
weights, averages, optimizers and a step. Left out on purpose: what a run folder is made of
(common/run.py), optimizers (common/optim.py), and how official weights are read (official/).
"""
import contextlib
import dataclasses
import functools
import math
import shlex
import sys
import time
import types
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import align
import config
import data
import diffusion
import report
import sample
from common.optim import learning_rate, make_optimizers
from common.pool import telling_prompts
from common.run import (
    Log, averaged_base, by_noise, check_data, check_memory, describe_run, description, load_newest,
    only_decorates, only_run, parameters, resolve, save, save_and_prune, stop_at_full_disk,
    stop_requests, use_threads)
from config import Config, Stopped, UserError
from experts import ProPhy
from model import build_backbone


HELD_OUT_SEED = 2**31  # noise of the held-out split, the same in every run


# --- model, averages, optimizers ------------------------------------------------------------------
class State:
    """What training changes: model, averaged weights, optimizers, step, stage, best loss."""

    def __init__(self, cfg: Config, vocabulary: int):
        self.cfg = cfg
        self.device = torch.device(cfg.device)  # `auto` is resolved by now
        self.process = diffusion.build(cfg)  # how noise is added, and what is predicted
        self.step = 0  # steps taken
        self.total = cfg.base_steps + cfg.physics_steps  # steps of both stages
        self.seconds = 0.0  # that they took
        torch.manual_seed(cfg.seed)  # of the initial weights alone
        if cfg.weights:
            from official import open_backbone
            self.model, self.fingerprint = open_backbone(cfg, self.device)
        else:
            self.model = build_backbone(cfg, vocabulary).to(self.device)
        self.begin("base", 0, cfg.base_steps, cfg.lr)  # the loop leaves a stage of no steps at once

    def begin(self, stage: str, start: int, end: int, lr: float) -> None:
        """Fresh averages and optimizers for what this stage trains, from step `start` to `end`."""
        self.stage = stage  # base | physics
        self.start = start
        self.end = end
        self.best = math.inf  # lowest held-out loss of this stage
        prepare_blocks(self.model, self.cfg)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizers = make_optimizers(self.trained, self.cfg, lr)

    def attach_branch(self) -> None:
        """Stage two: the branch beside the *averaged* backbone, which a frozen one then stays."""
        cfg = self.cfg
        self.model.load_state_dict(self.ema, strict=False)  # these are what one would publish
        torch.manual_seed(cfg.seed + 1)  # a run resumed at the border builds the same branch
        self.model = ProPhy(self.model, cfg).to(self.device)
        self.model.init_from_backbone()
        self.model.backbone.requires_grad_(not cfg.freeze_backbone)
        for p in self.model.branch_state().values():  # LoRA's corrections sit inside the backbone
            p.data = p.data.float()  # what is trained is kept in float32
            p.requires_grad_(True)
        self.model.physical.requires_grad_(cfg.train_physical)
        self.begin("physics", cfg.base_steps, self.total, cfg.physics_lr)

    # ------------------------------------- the training step --------------------------------------
    def training_step(self, batch: data.Batch, t: Tensor, eps: Tensor, lr: float):
        """One step, at times t (B,), with noise eps (shaped as batch.x) and this learning rate.

        -> {"loss": Eq. 6, and each of its terms}, the diffusion loss of each clip (B,), the norm of
        the gradient before clipping, and whether both are finite. Where not, nothing changes.
        """
        losses, per_clip = losses_of(self, batch, t, eps)
        loss = align.total_loss(losses, self.cfg)  # Eq. 6
        loss.backward()  # fills p.grad of what this stage trains
        grad_norm = nn.utils.clip_grad_norm_(self.trained.values(), self.cfg.clip)
        finite = math.isfinite(loss.item()) and math.isfinite(grad_norm.item())

        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # also where the step was skipped
        if finite:
            self.update_ema()
        return {"loss": loss, **losses}, per_clip, grad_norm, finite
    # ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self) -> None:
        """The averages take up the model's weights."""
        # Early in a stage the decay is smaller, so that the average forgets the initial weights.
        taken = self.step - self.start
        decay = min(self.cfg.ema, (1 + taken) / (10 + taken))
        for name, p in self.trained.items():
            self.ema[name].lerp_(p, 1 - decay)

    @contextlib.contextmanager
    def averaged(self):
        """The model with its averaged weights, in eval mode, as long as the `with` block lasts."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self.model.load_state_dict(self.ema, strict=False)  # it holds what is trained
        self.model.eval()
        try:
            # Uncompiled: each new batch size would be compiled, for a few uses.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            self.model.train()
            self.model.load_state_dict(kept, strict=False)

    @property
    def finished(self) -> bool:
        """Are all steps of both stages taken?"""
        return self.step >= self.total

    @property
    def stage_over(self) -> bool:
        """Are all steps of this stage taken?"""
        return self.step >= self.end

    def due(self, every: int) -> bool:
        """Is it time for what happens every so many steps (0 = never) and at a stage's end?"""
        return self.stage_over or (every > 0 and self.step % every == 0)

    @property
    def publishable(self) -> bool:
        """Does what is trained stand beside frozen official weights, so that others can use it?"""
        return bool(self.cfg.weights and self.cfg.freeze_backbone and self.stage == "physics")

    def state_dict(self) -> dict:
        """The contents of a checkpoint."""
        model = self.model.state_dict()
        beside = {}
        if self.publishable:  # official weights have files of their own
            model = {name: value for name, value in model.items() if name in self.trained}
            beside["weights"] = self.fingerprint  # which ones
        return beside | {
            "step": self.step,  # clips, noise and dropout follow from it
            "stage": self.stage,  # base | physics
            "best": self.best,  # lowest held-out loss of this stage
            "seconds": self.seconds,  # of training, over all restarts
            "model": model,  # as trained, not averaged
            "ema": self.ema,  # of what this stage trains
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, stored: dict) -> None:
        """Go on from the contents of a checkpoint. The state must be a fresh one."""
        if stored["stage"] == "physics":
            self.attach_branch()
        official = self.model.state_dict() if self.cfg.weights else {}  # not in the file
        if official and stored.get("weights", self.fingerprint) != self.fingerprint:
            raise UserError(f"The files in --weights {self.cfg.weights} are others than those that "
                            "this run was started beside: put those back.")
        self.model.load_state_dict(official | stored["model"])
        for optimizer, moments in zip(self.optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        self.ema = stored["ema"]
        self.step = stored["step"]
        self.best = stored["best"]
        self.seconds = stored["seconds"]


def prepare_blocks(model: nn.Module, cfg: Config) -> None:
    """Make the blocks ready for a stage, in a fixed order: checkpointing, then compile.

    Both wrap `forward` alone, so that the names in a saved file stay. Each stage starts from the
    class's own `forward`, because the branch's blocks are copies of some that were wrapped already.
    """
    backbone = getattr(model, "backbone", model)  # stage one has a bare one
    blocks = [*backbone.blocks, *getattr(model, "physical", ())]
    if cfg.checkpointing:  # keep a block's input, and compute the rest again in the backward pass
        for block in blocks:
            forward = types.MethodType(type(block).forward, block)
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    if cfg.compile == "on":
        words = backbone.text_encoder.blocks if backbone.text_encoder else []
        for block in [*words, *blocks]:
            block.compile(dynamic=False)


# --- losses ---------------------------------------------------------------------------------------
def losses_of(state: State, batch: data.Batch, t: Tensor, eps: Tensor) -> tuple[dict, Tensor]:
    """The terms of Eq. 6 that this stage has, unweighted; the diffusion loss of each clip (B,)."""
    cfg = state.cfg
    x_t = state.process.noise(batch.x, t, eps)  # (B, C, F, H, W), as prediction and eps are
    with torch.autocast(state.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
        out = state.model(x_t, state.process.model_time(t), batch.text, batch.text_length)
    prediction, routing = out if state.stage == "physics" else (out, None)
    per_clip = state.process.loss(prediction, t, batch.x, eps)
    losses = {"diffusion": per_clip.mean()}

    # Which physics a clip holds (Eq. 3-4), of the clips that have a caption and a label.
    if routing and routing.semantic_lift is not None:
        labelled = align.labelled(batch.text_length, batch.categories)  # (B,)
        needed = 2 if cfg.coarse_loss == "relative" else 1  # "relative" compares pairs of clips
        if labelled.sum() >= needed:
            p_s, q_s = routing.semantic_lift[labelled], batch.categories[labelled]
            losses["coarse"] = align.coarse_loss(p_s, q_s, cfg.coarse_loss, cfg.reduction)
            losses["semantic_balance"] = align.semantic_balance_loss(routing.semantic[labelled])

    # Where it happens (Eq. 5), taught by the world's exact masks or by a teacher's maps.
    if routing and routing.refinement_lift is not None:
        target, mask = batch.target, batch.target_mask
        if batch.maps is not None:
            target, mask = align.map_target(
                batch.maps, batch.background, batch.categories, cfg.negatives, cfg.background)
        p_r = routing.refinement_lift
        losses["fine_align"] = align.fine_align_loss(p_r, target, mask, cfg.reduction)
        losses["balance"] = align.balance_loss(routing.refinement, routing.chosen)
    return losses, per_clip.detach()


def held_out_loss(state: State, clips: data.Clips) -> dict[str, float]:
    """Losses of the averaged weights on the held-out clips, at the same times and noise always."""
    n = len(clips.pool.held)
    size = state.cfg.batch_size
    totals = {}  # a sum over clips, so that a shorter last batch weighs less
    with state.averaged():
        for first in range(0, n, size):
            positions = range(n)[first:first + size]
            batch = clips.batch(positions, train=False).to(state.device)
            t, eps = state.process.draw(HELD_OUT_SEED, positions, batch.x.shape[1:], state.device)
            losses, _ = losses_of(state, batch, t, eps)
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.item() * len(positions) / n
    return totals


# --- the story ------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    """Raises UserError before work starts, and Stopped when it cannot go on."""
    if cfg.dry_run:
        from official import cost
        return cost.plan(config.check(cfg))
    if cfg.init_from:  # stage one is skipped, whatever its length
        cfg = dataclasses.replace(cfg, base_steps=0)
    cfg, why = resolve(use_threads(config.check(cfg)))
    check_memory(cfg)
    with only_run(cfg) as run, stop_at_full_disk(run):  # nothing was written before
        train(cfg, run, why)


def open_clips(cfg: Config, run: Path):
    """-> {stage: the clips it learns from}, and the tokenizer of their captions. Raises UserError.

    Stage one learns how things look, from clips whose physics is weak or from general videos, and
    stage two how they move. A stage without steps has no clips. What an official model learns from
    was encoded beforehand, words and all: no tokenizer then.
    """
    if cfg.teacher:
        from vlm import open_maps
        if not cfg.resume:  # maps that are not there are missed before the clips are drawn
            open_maps(cfg)
    if cfg.latent:
        from official import cache
        pools = {"physics": cache.open_cache(cfg, cfg.cache, cache.identity(cfg.weights))}
    else:
        pools = data.open_pools(cfg)
    if cfg.resume:  # before the maps are opened: those of other clips would not be found
        check_data(cfg, run, {stage: pool.key for stage, pool in pools.items()})
    maps = {}  # without --teacher there are the world's exact masks, or none
    if cfg.teacher:
        maps["physics"] = open_maps(cfg, pools["physics"])
    if cfg.latent:
        return {"physics": cache.Latents(cfg, pools["physics"], maps.get("physics"))}, None

    captions = [pool.captions[row] for pool in pools.values() for row in pool.train]
    if cfg.resume:  # a resumed run needs its own folder only
        tokenizer = data.Tokenizer.load(run / "tokenizer.json")
    elif cfg.init_from:
        tokenizer = data.Tokenizer.load(Path(cfg.init_from) / "tokenizer.json")
        data.check_words(tokenizer, captions, cfg.text_len, f"--init_from {cfg.init_from}")
    else:
        tokenizer = data.Tokenizer.from_captions(captions)
    return {stage: data.Clips(cfg, pool, tokenizer, maps.get(stage))
            for stage, pool in pools.items()}, tokenizer


def start_or_resume(cfg: Config, run: Path, clips: dict[str, data.Clips], words: int,
                    base: dict[str, Tensor] | None) -> State:
    """A State with new weights, or those of `base`, or those this run had. Raises UserError."""
    if cfg.resume:
        check_data(cfg, run, keys(clips))
    state = State(cfg, words)
    if cfg.resume:
        state.load_state_dict(load_newest(run / "checkpoints", state.device))
        # Steps of stage two count from the end of stage one, which may move only while it lasts.
        started_with = description(run)["base_steps"]
        possible = cfg.base_steps >= state.step
        if state.stage == "physics":
            possible = cfg.base_steps == started_with
        if not possible:
            raise UserError(f"--base_steps {cfg.base_steps} cannot be: {run} stands at step "
                            f"{state.step}, and its stage one had {started_with}.")
    elif base:
        state.ema = base
        state.model.load_state_dict(state.ema)
    return state


def train(cfg: Config, run: Path, why: dict[str, str]) -> None:
    """The whole run, in the order in which things happen: one function, read from top to bottom."""
    # --- what is learned from, and what learns
    base = None  # weights of another run, which are read before clips are drawn
    if cfg.init_from and not cfg.resume:
        base = averaged_base(cfg, torch.device(cfg.device))
    clips, tokenizer = open_clips(cfg, run)
    state = start_or_resume(cfg, run, clips, len(tokenizer) if tokenizer else 0, base)
    del base  # so that stage two frees what it replaces

    # --- the run folder says what was started, and the terminal too
    if cfg.resume:  # nothing is `auto` any more: the reasons are those of the start
        why = description(run).get("resolved", why)
    if tokenizer:
        tokenizer.save(run / "tokenizer.json")
    last = list(clips.values())[-1]  # of the run's last stage, which it is for
    describe_run(run, cfg, why, last.categories_present, keys(clips),
                 tokenizer.key if tokenizer else None)
    log = Log(run / "log.jsonl", state.step)  # without the steps that will be taken again
    prompts = telling_prompts(last)
    for sentence in why.values():
        print(sentence)
    for some in {one.key: one for one in clips.values()}.values():  # of one pool it is said once
        warn(some, cfg)

    # --- the loop
    begun = state.step  # where this process started
    bad = 0  # steps in a row that were not finite
    clock = time.perf_counter() - state.seconds  # when the run would have started without a pause
    bar = tqdm(total=state.total, initial=begun, unit="step", smoothing=0.05, dynamic_ncols=True)
    with stop_requests() as requests, bar:
        if not state.stage_over:
            bar.write(parameters(state))
        while True:
            moved = state.step > begun  # or there is nothing new to validate and to save
            stopping = bool(requests) or (moved and state.step == cfg.stop_at)

            # Once in a while the averaged weights meet held-out clips, and are kept if they are the
            # best so far.
            if moved and state.due(cfg.eval_every):
                validate(state, clips, run, log)

            # Once in a while, and before the program ends, all that is needed to go on is saved.
            if moved and (stopping or state.due(cfg.save_every)):
                if state.stage_over and state.stage == "base":
                    save(state.state_dict(), run / "checkpoints" / "base.pt")  # for --init_from
                save_and_prune(state.state_dict(), run / "checkpoints", state.step)

            # Once in a while they draw clips to look at, once all is saved. An official model would
            # take minutes for each, so that is left to sample.py.
            if moved and state.due(cfg.preview_every) and not cfg.latent:
                with only_decorates("The preview"):
                    preview(state, run, tokenizer, prompts)
            if stopping or state.finished:
                break

            # Once in a run stage two begins: the branch is attached to the averaged backbone.
            if state.stage_over:
                state.attach_branch()
                bar.write(parameters(state))

            # --------------------------------- the training step ----------------------------------
            positions = range(state.step * cfg.batch_size, (state.step + 1) * cfg.batch_size)
            asked = time.perf_counter()
            batch = clips[state.stage].batch(positions).to(state.device)
            waited = time.perf_counter() - asked
            # Noise belongs to the position too, so that it never depends on the size of a batch.
            t, eps = state.process.draw(cfg.seed, positions, batch.x.shape[1:], state.device)
            lr = learning_rate(cfg, state.stage, state.step - state.start)
            losses, per_clip, grad_norm, finite = state.training_step(batch, t, eps, lr)
            state.seconds = time.perf_counter() - clock
            # --------------------------------------------------------------------------------------

            # A step that was not finite changed nothing, and one now and then is harmless. Three in
            # a row mean that the run has diverged.
            bad = 0 if finite else bad + 1
            if bad == 3:
                raise Stopped(f"The loss was not finite three steps in a row (step {state.step}); "
                              "try a lower --lr, --precision fp32 or a lower --clip. The "
                              f"checkpoints in {run} are from before.")

            # Once in a while the step that was just taken is logged.
            if state.step % cfg.log_every == 0 or not finite:
                values = {name: value.item() for name, value in losses.items()}
                log.write(step=state.step, stage=state.stage, seconds=state.seconds, **values,
                          grad_norm=grad_norm.item(), lr=lr, by_noise=by_noise(per_clip, t),
                          waited=waited, skipped=not finite)
                rate = (bar.format_dict["rate"] or 0) * cfg.batch_size
                bar.set_postfix_str(f"{state.stage} loss {values['loss']:.3f}, {rate:.0f} clips/s")
            state.step += 1
            bar.update()
    conclude(state, last, run, list(prompts))


# --- what the loop does once in a while -----------------------------------------------------------
def validate(state: State, clips: dict[str, data.Clips], run: Path, log: Log) -> None:
    """Log the held-out loss. The best weights so far are saved, or published where they can be.

    Stage two also logs the loss on stage one's clips: how much of them it forgets.
    """
    held_out = held_out_loss(state, clips[state.stage])
    other = {}
    base = clips.get("base")
    if state.stage == "physics" and base and base.pool.key != clips["physics"].pool.key:
        other["held_out_base"] = held_out_loss(state, base)["diffusion"]
    log.write(step=state.step, stage=state.stage, seconds=state.seconds, held_out=held_out, **other)
    if held_out["diffusion"] < state.best:
        state.best = held_out["diffusion"]
        if state.publishable:
            publish(state, clips["physics"], run, state.best)
        else:
            save(state.state_dict(), run / "checkpoints" / "best.pt")


def publish(state: State, clips: data.Clips, run: Path, loss: float) -> None:
    """branch.safetensors and its card: the averaged branch, for others with the same weights."""
    from official import branch
    branch.publish(state, run, loss, clips.categories_present)


def preview(state: State, run: Path, tokenizer: data.Tokenizer, prompts: dict) -> None:
    """A GIF in samples/ of what the averaged weights draw at these {prompt: its categories}."""
    with state.averaged() as model:
        drawn = sample.RunModel(state.cfg, model, state.process, tokenizer, state.cfg.precision)
        sample.preview(run / "samples" / f"step{state.step:06d}.gif", drawn, prompts)


def conclude(state: State, clips: data.Clips, run: Path, prompts: list[str]) -> None:
    """Say how the run ended, and what can be done next. A run that is done gets its page."""
    if not state.finished:
        print(f"Stopped at step {state.step} of {state.total} and saved; go on with --resume.")
        return
    from_run = f"--run {shlex.quote(str(run))}"
    if state.publishable:
        branch = run / "branch.safetensors"
        from_run = shlex.join(["--weights", state.cfg.weights, "--branch", str(branch)])
        if not branch.is_file():  # it was lost: the last step's weights make it again
            publish(state, clips, run, held_out_loss(state, clips)["diffusion"])
    print(f"Done: {run}, held-out diffusion loss {state.best:.4f}.")
    if state.cfg.report:
        with only_decorates("The report"):
            page = run / "report.html"
            report.write_page(page, [run], prompts=prompts[:4], device=state.cfg.device)
            print(f"Look at {page}: curves, clips, and where the router looks.")
    if state.publishable or not state.cfg.latent:
        print(f"Next:\npython sample.py {from_run} --prompt {shlex.quote(prompts[0][:300])}")


def keys(clips: dict[str, data.Clips]) -> dict[str, str]:
    """{stage: key of all that shapes the clips it learns from}."""
    return {stage: some.key for stage, some in clips.items()}


def warn(clips: data.Clips, cfg: Config) -> None:
    """Say what of the clips will not be learned from."""
    if clips.unmapped:
        print(f"{clips.unmapped} of {len(clips)} training clips have no map in {clips.maps.folder}:"
              " L_fine_align skips them.", file=sys.stderr)
    if clips.cut:
        print(f"{clips.cut} captions have more than {cfg.text_len} words and are cut (--text_len).",
              file=sys.stderr)


if __name__ == "__main__":
    about = "Train nanoProPhy: a video DiT, then its physical branch."
    config.entry(lambda: main(config.parse(sys.argv[1:], about)))
