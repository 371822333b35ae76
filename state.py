"""What training changes, and one step of it: model, averages, optimizers; the terms of Eq. 6.

    batch  --losses_in_parts-->  terms  --training_step-->  gradients, weights, averages

train.py tells when what happens. A step's batch may be spread over several processes, each of which
may take its share in parts (common/parallel.py): the terms are then parts of the same sums, and the
step is that of one process.

Letters: B clips, N video tokens, E_s semantic and E_r refinement experts, E_cat phenomena.
"""
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import align
import config
import data
import diffusion
from common import parallel
from common.optim import averaged, make_optimizers, restore, update_averages
from config import Config, UserError
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
        self.vocabulary = vocabulary
        self.used = None  # (E_r,) shares of the choices that each expert got in the step before
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
        parallel.distribute(self.model, self.cfg, divide=end > start)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.optimizers = make_optimizers(self.trained, self.cfg, lr)

    def attach_branch(self) -> None:
        """Stage two: the branch beside the *averaged* backbone, which a frozen one then stays."""
        cfg = self.cfg
        averages = parallel.whole(self.ema, everywhere=True)  # these are what one would publish
        backbone = self.model
        world = config.rank()[1]
        if cfg.base_steps and world > 1:  # a divided one cannot be copied
            backbone = build_backbone(cfg, self.vocabulary).to(self.device)
        backbone.load_state_dict(averages, strict=False)
        torch.manual_seed(cfg.seed + 1)  # a run resumed at the border builds the same branch
        self.model = ProPhy(backbone, cfg).to(self.device)
        self.model.init_from_backbone()
        self.model.backbone.requires_grad_(not cfg.freeze_backbone)
        for p in self.model.branch_state().values():  # LoRA's corrections sit inside the backbone
            p.data = p.data.float()  # what is trained is kept in float32
            p.requires_grad_(True)
        self.model.physical.requires_grad_(cfg.train_physical)
        if self.model.refinement is not None:  # before the first step they are taken as even
            E_r = cfg.refinement_experts
            self.used = torch.full((E_r,), 1 / E_r, device=self.device)
        self.begin("physics", cfg.base_steps, self.total, cfg.physics_lr)

    # ------------------------------------- the training step --------------------------------------
    def training_step(self, batch: data.Batch, t: Tensor, eps: Tensor, lr: float):
        """One step on this process's clips, at times t (B,), with noise eps (shaped as batch.x) and
        this learning rate.

        -> {"loss": Eq. 6, and each of its terms}, of the clips of all processes; the diffusion loss
        of each clip here (B,); the norm of the gradient before clipping; whether both are finite.
        Where not, nothing changes.
        """
        world = config.rank()[1]
        sums = {}
        per_clip = []
        for losses, of_part, used in losses_in_parts(self, batch, t, eps):
            # Fills p.grad of what this stage trains. A divided model takes the mean of the
            # gradients of all processes, and these are parts of a sum.
            (world * align.total_loss(losses, self.cfg)).backward()
            parallel.add_up(sums, losses if used is None else losses | {"used": used}, world)
            per_clip.append(of_part)
        losses = parallel.total(sums)
        used = losses.pop("used", None)
        loss = align.total_loss(losses, self.cfg)  # Eq. 6, of all clips
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.cfg.clip)
        grad_norm = parallel.whole(norm, everywhere=True)
        finite = math.isfinite(loss.item()) and math.isfinite(grad_norm.item())

        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # also where the step was skipped
        if finite:
            update_averages(self.ema, self.trained, self.cfg.ema, self.step - self.start)
            self.used = used if used is None else used / used.sum()
        return {"loss": loss, **losses}, torch.cat(per_clip), grad_norm, finite
    # ----------------------------------------------------------------------------------------------

    def averaged(self):
        """The model with its averaged weights, in eval mode, as long as a `with` block lasts."""
        return averaged(self.model, self.trained, self.ema)

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
        """The contents of a checkpoint: those of one process, however many there are. Every process
        calls it, and the first one gets them."""
        parallel.settle(self.model)
        model = self.model.state_dict()
        beside = {}
        if self.publishable:  # official weights have files of their own
            model = {name: value for name, value in model.items() if name in self.trained}
            beside["weights"] = self.fingerprint  # which ones
        return parallel.whole(beside | {
            "step": self.step,  # clips, noise and dropout follow from it
            "stage": self.stage,  # base | physics
            "best": self.best,  # lowest held-out loss of this stage
            "seconds": self.seconds,  # of training, over all restarts
            "model": model,  # as trained, not averaged
            "ema": self.ema,  # of what this stage trains
            "used": self.used,  # experts, in the step before
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        })

    def load_state_dict(self, stored: dict) -> None:
        """Go on from the contents of a checkpoint. The state must be a fresh one."""
        if stored["stage"] == "physics":
            self.attach_branch()
        official = self.model.state_dict() if self.cfg.weights else {}  # not in the file
        if official and stored.get("weights", self.fingerprint) != self.fingerprint:
            raise UserError(f"The files in --weights {self.cfg.weights} are others than those that "
                            "this run was started beside: put those back.")
        weights = official | stored["model"]
        now = self.model.state_dict()
        self.model.load_state_dict({name: parallel.slice_like(value, now.get(name))
                                    for name, value in weights.items()})
        for optimizer, moments in zip(self.optimizers, stored["optimizers"], strict=True):
            restore(optimizer, moments)
        self.ema = {name: parallel.slice_like(value, self.trained.get(name))
                    for name, value in stored["ema"].items()}
        self.used = stored.get("used", self.used)  # runs from before it was kept start even
        self.step = stored["step"]
        self.best = stored["best"]
        self.seconds = stored["seconds"]


# --- losses ---------------------------------------------------------------------------------------
def losses_in_parts(state: State, batch: data.Batch, t: Tensor, eps: Tensor,
                    alone: bool = False) -> Iterator:
    """`losses_of` some clips, --micro_batch of them at a time, or as many as a step gives to a process.
    alone: they are the whole batch, and no other process has a part of it."""
    batch = with_target(batch, state.cfg)
    size = state.cfg.micro_batch or max(1, state.cfg.batch_size // config.rank()[1])
    with precision_of(state):
        whole = parallel.look_over(state.model, batch, size, alone)
    for part, (some, here) in parallel.parts(batch, size, whole):
        yield losses_of(state, some, t[part], eps[part], here)


def with_target(batch: data.Batch, cfg: Config) -> data.Batch:
    """Where it happens, taught by the world's exact masks, or by a teacher's maps where there are
    any."""
    if batch.maps is None:
        return batch
    target, mask = align.map_target(
        batch.maps, batch.background, batch.categories, cfg.negatives, cfg.background)
    return dataclasses.replace(batch, target=target, target_mask=mask, maps=None, background=None)


def precision_of(state: State):
    """The context in which the network runs."""
    bf16 = state.cfg.precision == "bf16"
    return torch.autocast(state.device.type, torch.bfloat16, enabled=bf16)


def losses_of(state: State, batch: data.Batch, t: Tensor, eps: Tensor,
              whole: parallel.Whole) -> tuple[dict, Tensor, Tensor | None]:
    """The terms of Eq. 6 that this stage has, unweighted; the diffusion loss of each clip (B,); how
    often each refinement expert was chosen (E_r,).

    Of a part of a batch the terms are parts of a sum, but for those that are of pairs of clips.
    """
    cfg = state.cfg
    x_t = state.process.noise(batch.x, t, eps)  # (B, C, F, H, W), as prediction and eps are
    with precision_of(state):
        out = state.model(x_t, state.process.model_time(t), batch.text, batch.text_length)
    prediction, routing = out if state.stage == "physics" else (out, None)
    per_clip = state.process.loss(prediction, t, batch.x, eps)
    share = len(t) / whole.clips
    losses = {"diffusion": share * per_clip.mean()}
    used = None

    # Which physics a clip holds (Eq. 3-4), of the clips that have a caption and a label.
    if routing and routing.semantic_lift is not None:
        needed = 2 if cfg.coarse_loss == "relative" else 1  # "relative" compares pairs of clips
        if whole.labelled.sum() >= needed:
            rho_s = whole.rows(routing.semantic, 0)[whole.labelled]
            p_s = whole.rows(routing.semantic_lift, 1)[whole.labelled]
            q_s = whole.categories[whole.labelled]
            losses["coarse"] = align.coarse_loss(p_s, q_s, cfg.coarse_loss, cfg.reduction)
            losses["semantic_balance"] = align.semantic_balance_loss(rho_s)

    # Where it happens (Eq. 5).
    if routing and routing.refinement_lift is not None:
        losses["fine_align"] = align.fine_align_loss(
            routing.refinement_lift, batch.target, batch.target_mask, cfg.reduction, whole.mask)
        balance = align.balance_loss(routing.refinement, routing.chosen, state.used)
        losses["balance"] = share * balance
        used = align.choices(routing.chosen, cfg.refinement_experts)
    return losses, per_clip.detach(), used


def held_out_loss(state: State, clips: data.Clips) -> dict[str, float]:
    """Losses of the averaged weights on the held-out clips, at the same times and noise always.
    Every process computes all of them: they are few."""
    n = len(clips.pool.held)
    size = state.cfg.batch_size
    totals = {}  # a sum over clips, so that a shorter last batch weighs less
    with state.averaged():
        for first in range(0, n, size):
            positions = range(n)[first:first + size]
            batch = clips.batch(positions, train=False).to(state.device)
            t, eps = state.process.draw(HELD_OUT_SEED, positions, batch.x.shape[1:], state.device)
            sums = {}
            for losses, *_ in losses_in_parts(state, batch, t, eps, alone=True):
                parallel.add_up(sums, losses, 1)
            for name, loss in sums.items():
                totals[name] = totals.get(name, 0.0) + loss.item() * len(positions) / n
    return totals
