"""Train nanoProPhy: first a small video DiT, then the physical branch beside it, in one command.

    python train.py --config small              both stages, about 15 minutes on two CPU cores
    python train.py --config small --resume     go on after Ctrl-C, SIGTERM or a crash, to the bit
    python train.py --init_from runs/small ...  stage two alone, from another run's backbone

    resolve --> open_clips --> start_or_resume --> loop:  once in a while validate, save, preview
    `auto`      clips, words   State (state.py)           one step, fenced

From `main` on the file is a story. Inside its loop everything that happens once in a while comes
first, and the single training step is fenced. No random state is carried along: noise, clip order
and caption dropout are functions of (seed, position in the training order), so a checkpoint holds
weights, averages, optimizers and a step. Left out on purpose: what a run folder is made of
(common/run.py, common/checkpoints.py), optimizers (common/optim.py), and how official weights are
read (official/). Under torchrun several processes tell the same story, each with its share of the
clips; what only one of them may do stands in `parallel.first` (common/parallel.py).
"""
import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import config
import data
import report
import sample
from common import parallel
from common.checkpoints import averaged_base, build, load_newest, prune, save
from common.optim import learning_rate
from common.pool import telling_prompts
from common.run import (
    Log, by_noise, check_data, check_memory, describe_run, description, go_on_after_restart,
    only_decorates, only_run, parameters, pick_device, resolve, resources, stop_at_full_disk,
    stop_requests, use_threads)
from config import Config, Stopped, UserError
from state import State, held_out_loss


# --- the story ------------------------------------------------------------------------------------
def main(cfg: Config) -> None:
    """Raises UserError before work starts, and Stopped when it cannot go on."""
    if cfg.dry_run:
        from official import cost
        return cost.plan(config.check(cfg))
    if cfg.init_from:  # stage one is skipped, whatever its length
        cfg = dataclasses.replace(cfg, base_steps=0)
    cfg = use_threads(config.check(cfg))
    # The first process decides, writes and refuses for all: what it finds, the others are told.
    with parallel.together() as now, contextlib.ExitStack() as held:
        parallel.first(parallel.check_share, cfg)
        cfg, why = parallel.first(lambda: resolve(go_on_after_restart(cfg)))
        pick_device(cfg.device)  # a GPU each
        check_memory(cfg)
        run = parallel.first(held.enter_context, only_run(cfg))  # nothing was written before
        with stop_at_full_disk(run):
            train(cfg, run, why, now)


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


def train(cfg: Config, run: Path, why: dict[str, str], now: dict) -> None:
    """The whole run, in the order in which things happen: one function, read from top to bottom.
    why: the reasons of `resolve`. now: where the "step" is noted, for a sentence at its end."""
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
        parallel.first(tokenizer.save, run / "tokenizer.json")
    last = list(clips.values())[-1]  # of the run's last stage, which it is for
    parallel.first(describe_run, run, cfg, why, last.categories_present, keys(clips),
                   tokenizer.key if tokenizer else None)
    log = Log(run / "log.jsonl", state.step)  # without the steps that will be taken again
    prompts = telling_prompts(last)
    for sentence in why.values():
        print(sentence)
    for some in {one.key: one for one in clips.values()}.values():  # of one pool it is said once
        parallel.first(warn, some, cfg)

    # --- the loop
    rank = config.rank()[0]  # of the processes that share each step's clips
    batches = None  # of this stage
    begun = state.step  # where this process started
    bad = 0  # steps in a row that were not finite
    clock = time.perf_counter() - state.seconds  # when the run would have started without a pause
    bar = tqdm(total=state.total, initial=begun, unit="step", smoothing=0.05, dynamic_ncols=True,
               file=sys.stdout if rank else sys.stderr)  # of the others stdout goes nowhere
    with stop_requests() as requests, bar:
        if not state.stage_over:
            bar.write(parameters(state))
        while True:
            moved = state.step > begun  # or there is nothing new to validate and to save
            asked = parallel.any_of(bool(requests))
            stopping = asked or (moved and state.step == cfg.stop_at)

            # Once in a while the averaged weights meet held-out clips, and are kept if they are the
            # best so far.
            if moved and state.due(cfg.eval_every):
                validate(state, clips, run, log)

            # Once in a while, and before the program ends, all that is needed to go on is saved.
            if moved and (stopping or state.due(cfg.save_every)):
                newest = run / "checkpoints" / f"step{state.step:06d}.pt"
                must = stopping or state.stage_over
                if state.stage_over and state.stage == "base":
                    keep(state, run / "checkpoints" / "base.pt", must)  # for --init_from
                if keep(state, newest, must):
                    parallel.first(prune, newest)

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
                batches = None
                bar.write(parameters(state))
            if batches is None:
                batches = read_ahead(clips[state.stage], cfg, state.step, state.end)

            # --------------------------------- the training step ----------------------------------
            before = time.perf_counter()
            positions, batch = next(batches)
            waited = time.perf_counter() - before
            batch = batch.to(state.device)
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
                bins = by_noise(parallel.gather(per_clip), parallel.gather(t))
                log.write(step=state.step, stage=state.stage, seconds=state.seconds, **values,
                          grad_norm=grad_norm.item(), lr=lr, by_noise=bins, waited=waited,
                          skipped=not finite, **resources(state))
                rate = (bar.format_dict["rate"] or 0) * cfg.batch_size
                bar.set_postfix_str(f"{state.stage} loss {values['loss']:.3f}, {rate:.0f} clips/s")
            state.step += 1
            now["step"] = state.step
            bar.update()
    conclude(state, last, run, list(prompts))


# --- what the loop takes its clips from -----------------------------------------------------------
def read_ahead(clips: data.Clips, cfg: Config, step: int, end: int) -> Iterator:
    """-> (positions in the training order, the batch) of this process, for each step up to `end`. A
    thread reads the next one while a step computes."""
    rank, world = config.rank()
    share = cfg.batch_size // world

    def read(step: int) -> tuple[range, data.Batch]:
        start = step * cfg.batch_size + rank * share
        positions = range(start, start + share)
        return positions, clips.batch(positions)

    # One step ahead is enough: a disk that keeps up has a whole step's time for it.
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, step)
        for following in range(step + 1, end):
            positions, batch = coming.result()
            coming = reader.submit(read, following)
            yield positions, batch
        yield coming.result()


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
    before, now = state.best, held_out["diffusion"]
    if now < before:
        state.best = now
        if state.publishable:
            publish(state, clips["physics"], run, now)
        elif not keep(state, run / "checkpoints" / "best.pt", must=False):
            state.best = before


def keep(state: State, path: Path, must: bool) -> bool:
    """Save a checkpoint. Where the disk will not take it, the run goes on, says so, and False comes
    back; raises Stopped where it `must` be saved."""
    contents = state.state_dict()  # of all processes: each has a part of it
    try:
        parallel.first(save, contents, path)
    except Stopped as e:
        if must:
            raise
        if not getattr(e, "said", False):  # by the first process
            print(f"{e} The run goes on and tries again at its next save.", file=sys.stderr)
        return False
    return True


def publish(state: State, clips: data.Clips, run: Path, loss: float) -> None:
    """branch.safetensors and its card: the averaged branch, for others with the same weights."""
    from official import branch
    branch.publish(state, run, loss, clips.categories_present)


def preview(state: State, run: Path, tokenizer: data.Tokenizer, prompts: dict) -> None:
    """A GIF in samples/ of what the averaged weights draw at these {prompt: its categories}."""
    stored = state.state_dict()
    if config.rank()[0] == 0:  # the others wait at the next step
        model = build(state.cfg, state.vocabulary, stored).to(state.device).eval()
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
        if not parallel.first(branch.is_file):  # it was lost: the last step's weights make it again
            publish(state, clips, run, held_out_loss(state, clips)["diffusion"])
    print(f"Done: {run}, held-out diffusion loss {state.best:.4f}.")
    if state.cfg.report and config.rank()[0] == 0:
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
    config.entry(lambda: main(config.parse(sys.argv[1:], about)), ranks=True)
