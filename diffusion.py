"""Noising, targets, loss and sampling: both lineages of video diffusion behind one interface.

In plain flow matching, with a network that predicts x, this file says:

    t, eps = draw(seed, index)                            # time and noise of a training clip
    x_t = (1 - t) * x + t * eps                           # noise
    loss = ((network(x_t, 1000 * t) - x) / t) ** 2        # loss: that of v = eps - x

    x_t = eps                                             # sample
    for t, t_next in pairwise([1.0, 0.9, ... 0.1, 0.0]):
        x_hat = network(x_t, 1000 * t)
        eps_hat = (x_t - (1 - t) * x_hat) / t
        x_t = (1 - t_next) * x_hat + t_next * eps_hat     # Direct.step

In general x_t = a(t) x + s(t) eps, where t = 0 is data and t = 1 is noise, whatever the lineage.
`FlowMatching` (Wan, and our small models) has a = 1 - t, s = t. `VPrediction` (CogVideoX) has
a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) on a table of 1000 steps that ends in exactly no
signal. Everything else is shared:

* The network may output x, v or eps. All three are turned into an estimate of x, and the loss is
  always that of v: ||v_hat - v||^2 = ||x_hat - x||^2 / s^2 for both lineages. In pixel space it is
  decisive to predict x: a token is an 8 x 8 patch, of which the noise fills every dimension and the
  clip only a few.
* There is one sampling loop: network -> guidance -> estimate of x -> a `Solver`, which moves to the
  next time knowing x alone. The simplest one puts x and eps together again: for flow matching this
  *is* the Euler step, for CogVideoX it *is* DDIM. The official schedulers stand at the end.

Shapes: x, x_t, eps and predictions (B, C, F, H, W); t (B,) in [0, 1]. A network hears the time in
its lineage's own unit, `model_time`, which is made here and nowhere else.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, stream

TABLE = 1000  # steps that CogVideoX was trained on, 0..999; `steps` are those of sampling
GOLDEN = (math.sqrt(5) - 1) / 2  # steps of this length, round and round, fill [0, 1) most evenly


class Step(NamedTuple):
    """One step of sampling."""

    model_time: float  # the time that the network hears, in its own unit
    t: float  # where the step starts, in 0..1
    t_next: float  # where it ends


class Process:
    """What both lineages share.

    A subclass defines `coefficients` (a and s of a time), `v` and `x_from_v`, `warp` (uniform
    numbers -> training times), `plan` (the steps of sampling) and `model_time`.
    """

    s_min = 0.05  # the loss's 1 / s^2 is cut here, or nearly clean clips would outweigh all others
    solvers = ()  # names in SOLVERS that it can be sampled with; the first is the default
    layout = (0, 1, 2, 3, 4)  # of latents in diffusers' pipeline: an order of (B, C, F, H, W)

    def __init__(self, predict: str):
        self.predict = predict

    # --- training
    def draw(self, seed: int, index, shape, device="cpu") -> tuple[Tensor, Tensor]:
        """Times (B,) and noise (B, *shape) of the positions `index` of the training order.

        Each is a function of (seed, position) alone. Times follow the golden-ratio sequence: every
        clip's t has the training distribution, and any run of consecutive clips covers it evenly,
        which independent draws do not.
        """
        start = stream(seed, "time").random()  # the seed moves the whole sequence
        u = torch.tensor([(start + int(i) * GOLDEN) % 1 for i in index], dtype=torch.float64)
        eps = np.stack([stream(seed, "noise", int(i)).standard_normal(tuple(shape), np.float32)
                        for i in index])
        # float64 until the times are warped: at both ends of u small differences become large.
        return self.warp(u).float().to(device), torch.from_numpy(eps).to(device)

    def per_clip(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of times (B,), each (B, 1, 1, 1, 1), so that they multiply clips."""
        a, s = self.coefficients(t)
        return a.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)

    def noise(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = a x + s eps."""
        a, s = self.per_clip(t)
        return a * x + s * eps

    def to_x(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as an estimate of the clean clip."""
        a, s = self.per_clip(t)
        if self.predict == "x":
            return prediction
        if self.predict == "eps":
            # At pure noise (a = 0) eps says nothing of x: the quotient is kept finite.
            return (x_t - s * prediction) / a.clamp(min=self.s_min)
        return self.x_from_v(prediction, x_t, a, s)

    def loss(self, prediction: Tensor, t: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """Per-clip loss (B,): mean squared error of v, whatever the network predicts."""
        a, s = self.per_clip(t)
        prediction = prediction.float()
        if self.predict == "v":  # no division, so it is exact at every t
            error = prediction - self.v(x, eps, a, s)
        elif self.predict == "eps":  # v_hat - v = (eps_hat - eps) / a
            error = (prediction - eps) / a.clamp(min=self.s_min)
        else:  # v_hat - v = (x - x_hat) / s
            error = (prediction - x) / s.clamp(min=self.s_min)
        return error.square().flatten(1).mean(1)  # over all numbers of a clip

    # --- sampling
    def chosen(self, solver: str | None) -> str:
        """The solver's name, None being the default; raises ValueError for one it does not have."""
        if solver not in (None, *self.solvers):
            raise ValueError(f"{type(self).__name__} has no solver {solver!r}: "
                             f"choose from {', '.join(self.solvers)}.")
        return solver or self.solvers[0]

    def times(self, steps: int, solver: str | None = None) -> list[float]:
        """The times that `sample` starts its steps from, and 0.

        Raises ValueError for what this process cannot do.
        """
        return [step.t for step in self.plan(steps, self.chosen(solver))] + [0.0]

    def randn(self, shape, generator=None, dtype=torch.float32, device="cpu") -> Tensor:
        """Standard normal (B, C, F, H, W).

        A torch.Generator gives the numbers that it gives diffusers' pipeline of this lineage (for
        the same dtype); a list of B generators makes each clip depend on its own alone.
        """
        if isinstance(generator, list):
            clips = [self.randn((1, *shape[1:]), one, dtype, device) for one in generator]
            return torch.cat(clips)
        # Drawn where the generator lives and in the pipeline's layout, then brought into ours.
        where = device if generator is None else generator.device
        theirs = [shape[i] for i in self.layout]
        z = torch.randn(theirs, generator=generator, dtype=dtype, device=where)
        return z.permute(self.layout).contiguous().to(device)

    @torch.no_grad()
    def sample(self, denoise, noise: Tensor, steps: int, guidance: float = 1.0, watch=None, *,
               solver: str | None = None, dynamic: bool = False, generator=None) -> Tensor:
        """Noise (B, C, F, H, W) -> clips, in `steps` steps of a solver named in `self.solvers`.

        denoise(x_t, model_time) returns two raw outputs of the network: the conditional one, and
        the unconditional one, which may be None if guidance is 1.
        guidance: classifier-free, u + guidance (c - u) in float32; 1 uses c as it is.
        watch(t) is called after each step with the time it started from: progress bars and routing
        pictures hang there.
        dynamic: vary the guidance as CogVideoX's pipeline may.
        generator (see `randn`; None is torch's global one) feeds "dpm", the one solver that draws
        noise.

        x_t has the dtype of `noise` after every step: float32 for Wan and the small models, that
        of the text (bf16) in CogVideoX's pipeline.
        """
        solver = self.chosen(solver)
        move = SOLVERS[solver](
            lambda: self.randn(noise.shape, generator, noise.dtype, noise.device))
        x_t = noise
        for model_time, t, t_next in self.plan(steps, solver):
            # The network speaks, with and without the text.
            w = self.dynamic(guidance, model_time, steps) if dynamic else guidance
            heard = torch.full((len(x_t),), model_time, device=x_t.device)  # (B,)
            conditional, unconditional = denoise(x_t, heard)
            prediction = conditional.float()
            if guidance != 1:
                u = unconditional.float()
                prediction = u + w * (prediction - u)

            # Its output becomes an estimate of the clean clip, and that is all a solver sees.
            x = self.to_x(prediction, x_t, torch.full((len(x_t),), t, device=x_t.device))
            x_t = move.step(x_t, x, self.endpoint(t), self.endpoint(t_next)).to(noise.dtype)
            if watch:
                watch(t)
        return x_t

    def endpoint(self, t: float) -> tuple[Tensor, Tensor]:
        """a and s at one end of a step, float64 scalars."""
        return self.coefficients(torch.tensor(t).double())  # float32 first, as t is in training

    def dynamic(self, guidance: float, step: int, steps: int) -> float:
        raise ValueError("Dynamic guidance belongs to CogVideoX; "
                         f"{type(self).__name__} has none.")


class FlowMatching(Process):
    """Rectified flow: x_t = (1 - t) x + t eps, v = eps - x (Liu et al. 2022; as in Wan2.1).

    Training times are logit-normal (Esser et al. 2024), t = sigmoid(N(mean, std)), then shifted:
    shift t / (1 + (shift - 1) t). Solvers: "euler"; "wan-euler" and "unipc" are those of diffusers'
    WanPipeline, which differ from it in the grid of times too.
    """

    solvers = ("euler", "wan-euler", "unipc")

    def __init__(self, predict: str = "x", mean: float = 0.0, std: float = 1.0, shift: float = 1.0):
        super().__init__(predict)
        self.mean = mean
        self.std = std
        self.shift = shift

    def coefficients(self, t):
        return 1 - t, t  # a, s

    def v(self, x, eps, a, s):
        return eps - x  # dx_t / dt: the straight way from data to noise

    def x_from_v(self, v, x_t, a, s):
        return x_t - s * v  # (1 - t) x + t eps - t (eps - x) = x

    def shifted(self, t):  # a shift above 1 moves times towards noise, as large clips need
        return self.shift * t / (1 + (self.shift - 1) * t)

    def warp(self, u: Tensor) -> Tensor:
        """Uniform numbers -> training times, through the inverse of the normal distribution."""
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))  # finite at both ends
        return self.shifted(torch.sigmoid(self.mean + self.std * normal))

    def plan(self, steps: int, solver: str) -> list[Step]:
        """Every step of a solver. For "euler" the times fall evenly from 1 to 0, then are shifted
        (DiffSynth's grid too)."""
        even = [1 - i / steps for i in range(steps)]
        if solver != "euler":
            even = even_times_of_wan(self, steps, solver)
        times = [self.shifted(t) for t in even] + [0.0]
        heard = self.model_time(torch.tensor(times)).tolist()
        if solver == "unipc":
            times[0] -= 1e-6  # keeps lambda finite
            heard = [int(1000 * t) for t in times]  # the network gets floor(1000 t), the solver t
        return [Step(*one) for one in zip(heard, times, times[1:])]

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that Wan's network was trained with: 1000 sigma."""
        return 1000 * t


class VPrediction(Process):
    """CogVideoX's variance-preserving process, v = a eps - s x (Salimans & Ho 2022).

    It has 1000 steps of scaled-linear betas with an SNR shift and zero terminal SNR; t is
    step / 999, and step -1 is the clean clip. Solvers: "ddim", which its authors advise for 2B,
    and "dpm", for 5B; both are diffusers' CogVideoX schedulers.
    """

    solvers = ("ddim", "dpm")
    layout = (0, 2, 1, 3, 4)  # (B, F, C, H, W)
    spacing = "trailing"  # of the steps, or "linspace", which includes 0: weights' files may say so

    def __init__(self, predict: str = "v", snr_shift: float = 1.0):
        super().__init__(predict)
        # The order is the reference's (betas, cumulative product, shift, rescale), in float64, so
        # that alpha_bar[999] is exactly 0.
        root = torch.linspace(0.00085**0.5, 0.0120**0.5, TABLE, dtype=torch.float64)
        alpha_bar = (1 - root**2).cumprod(0)
        alpha_bar = alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)
        # Lin et al. 2023: the last step must hold no signal at all, and the first stays as it is.
        root = alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        self.alpha_bar = root.square()

    def step_of(self, t: Tensor) -> Tensor:
        """Time in 0..1 -> integer step 0..999; -1 behind the end, where the clip is clean."""
        return (t.double() * 999).round().long()

    def coefficients(self, t):
        step = self.step_of(t)
        alpha_bar = self.alpha_bar.to(t.device)[step].masked_fill(step < 0, 1)  # 1: no noise
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def v(self, x, eps, a, s):
        return a * eps - s * x  # x_t turned by a right angle in the plane of x and eps

    def x_from_v(self, v, x_t, a, s):
        return a * x_t - s * v  # a (a x + s eps) - s (a eps - s x) = x

    def warp(self, u: Tensor) -> Tensor:
        """Uniform numbers -> training times, every step equally often."""
        return (u * TABLE).floor().clamp(max=999) / 999

    def plan(self, steps: int, solver: str) -> list[Step]:
        """Every step of a solver, "trailing": 999, 979, ... 19 for 50 of them.

        A solver goes 1000 // steps down. Where steps does not divide 1000, that is not quite where
        the network is told to be next, and the last step may end at the table's first entry, not
        at clean data: this is diffusers' way. Not copied is its step too many, at -1, which it
        takes where 1000 / steps is rounded down (61, 103, ...).
        """
        if steps > TABLE:
            raise ValueError(f"v-prediction has {TABLE} steps; {steps} cannot be taken.")
        starts = np.arange(TABLE, 0, -TABLE / steps)[:steps]
        starts = starts.round().astype(int) - 1  # numpy's rounding of halves, as in the reference
        if self.spacing == "linspace":
            starts = np.linspace(0, TABLE - 1, steps).round().astype(int)[::-1]
        down = TABLE // steps
        return [Step(n, n / 999, (n - down) / 999) for n in starts.tolist()]

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that CogVideoX's network was trained with: the integer step 0..999."""
        return self.step_of(t)

    def dynamic(self, guidance: float, step: int, steps: int) -> float:
        """CogVideoXPipeline's `use_dynamic_cfg`: the guidance of one step.

        It sets a step of 0..999 against the number of steps, so that guidance leaps between 1 and
        1 + guidance instead of growing. Its authors know, and the clips they show were made so.
        """
        return 1 + guidance * (1 - math.cos(math.pi * ((steps - step) / steps) ** 5.0)) / 2


def build(cfg: Config) -> Process:
    """The process that a config names."""
    if cfg.process == "vpred":
        return VPrediction(cfg.predict, cfg.snr_shift)
    return FlowMatching(cfg.predict, cfg.time_mean, cfg.time_std, cfg.shift)


# --- solvers ----------------------------------------------------------------------------------
class Solver:
    """step(x_t, x, start, end) -> x_t at the next time, from x, the estimate of the clean clip.

    start = (a, s) and end = (a', s') are float64 scalars and leave x_t its dtype; `normal()` draws
    noise shaped as x_t. One object samples one batch.
    """

    def __init__(self, normal):
        self.normal = normal


class Direct(Solver):
    """Euler and DDIM (arXiv 2010.02502, eta = 0): x and the eps that goes with it stay constant
    over the step."""

    def step(self, x_t, x, start, end):
        a, s, a_next, s_next = (c.float().to(x_t.device) for c in (*start, *end))  # scalars
        eps = (x_t - a * x) / s  # the noise that x leaves over
        return a_next * x + s_next * eps


# --- the official schedulers: nothing above needs them, but clips of official models do -------
# Letters: lambda = log(a / s), from -inf (noise) to +inf (data), and h, its growth over a step. A
# prime marks the next time (a', s'). x_0 is the estimate of x made now, x_1 the one of a step ago.
#
# Both solvers start from the exact solution, in which x alone is unknown (DPM-Solver++, arXiv
# 2211.01095, Proposition 4.1):
#
#     x_next = s'/s x_t + s' integral of e^lambda x(lambda) from lambda to lambda'
#            = s'/s x_t + a' (1 - e^-h) (mean of x over the step, weighted with e^lambda)
def log_snr(a: Tensor, s: Tensor) -> Tensor:
    """lambda; infinite at both ends of time, which the solvers count on: e^-inf = 0."""
    return (a / s).log()


class DPM(Solver):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), as CogVideoXDPMScheduler.

    Every step puts fresh noise z ~ N(0, 1) in:

        x_next = s'/s e^-h x_t + a' (1 - e^-2h) D + s' sqrt(1 - e^-2h) z
        D = (1 + 1/2r) x_0 - 1/2r x_1,   r = h_before / h

    D is the line through two estimates, half a step ahead. The first step, which has no x_1, and
    one to clean data are of first order: D = x_0.
    """

    past = None  # lambda and x of the step before

    def step(self, x_t, x, start, end):
        s = start[1]
        a_next, s_next = end
        lam = log_snr(*start)
        h = log_snr(*end) - lam
        D = x  # first order, unless a past can be used
        z = self.normal()
        if self.past and s_next > 0:
            lam_1, x_1 = self.past
            r = (lam - lam_1) / h
            D = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * x_1
            # The reference draws twice and uses the second, so that a seed means the same here.
            z = self.normal()
        self.past = lam, x
        new = -torch.expm1(-2 * h)  # 1 - e^-2h, exact for small h
        return s_next / s * torch.exp(-h) * x_t + new * a_next * D + s_next * new.sqrt() * z


class UniPC(Solver):
    """UniPC of order 2, B(h) = e^h - 1 ("bh2"), on x (arXiv 2302.04867), as
    UniPCMultistepScheduler.

        x_next = s'/s x_t + a' (1 - e^-h) (x_0 + sum of rho_k D_k),   D_k = (x_k - x_0) / r_k

    r_k = (lambda_k - lambda) / h is where estimate x_k was made: 0 is the start of the step, 1 its
    end, and the past is negative. A step first corrects (UniC): the network has just spoken at the
    predicted place; with its x there, r_k = 1, the move to it is made once more. That x stays, and
    the network is not asked again. Then the step predicts the next place from there (UniP).

    With one D, rho = 1/2. With two, x(r) is the parabola through three estimates and the bracket
    its exact mean. The first prediction has no past; the last, where h is infinite, uses none.
    """

    def __init__(self, normal):
        super().__init__(normal)
        self.past = []  # (x_t, x, (a, s)) of the step before, and of this one

    def step(self, x_t, x, start, end):
        if self.past:  # correct, then predict
            x_t = self.move(start, x)
        self.past = [*self.past[-1:], (x_t, x, start)]
        return self.move(end)

    def move(self, end, x_next=None):
        """From the newest place in the past to `end`, corrected if the estimate there is known."""
        x_t, x, start = self.past[-1]
        a_next, s_next = end
        lam = log_snr(*start)
        h = log_snr(*end) - lam
        weight = -torch.expm1(-h)  # 1 - e^-h

        # The differences D_k: to the estimate of a step ago, and to the one at the next place.
        D = []
        if len(self.past) == 2 and s_next > 0:
            _, x_1, before = self.past[0]
            r = (log_snr(*before) - lam) / h
            D.append((x_1 - x) / r)
        if x_next is not None:
            D.append(x_next - x)

        # A parabola's mean is made of those of r and r^2 on 0..1, weighted with e^(hr):
        # rho_1 + rho_2 must be the first, and r rho_1 + rho_2 the second.
        rho = [0.5]  # with one D, or none
        if len(D) == 2:
            mean_r = 1 / weight - 1 / h
            mean_r2 = 1 / weight - 2 * mean_r / h
            rho_1 = (mean_r - mean_r2) / (1 - r)
            rho = [rho_1, mean_r - rho_1]
        mean = x + sum(p * d for p, d in zip(rho, D))  # of x over the step
        return s_next / start[1] * x_t + a_next * weight * mean


SOLVERS = {"ddim": Direct, "euler": Direct, "wan-euler": Direct, "dpm": DPM, "unipc": UniPC}


def even_times_of_wan(process: FlowMatching, steps: int, solver: str) -> list[float]:
    """Where the steps of WanPipeline's solvers start, before the shift, evenly:

    wan-euler  1 .. 0.001, N of them, then 0; the 0.001 is shifted twice
               (FlowMatchEulerDiscreteScheduler)
    unipc      1 .. 0.001, N + 1 of them, the last becoming 0 (UniPCMultistepScheduler)
    """
    if solver == "unipc":
        return np.linspace(1, 0.001, steps + 1)[:-1].tolist()
    last = process.shifted(torch.tensor(0.001)).item()
    return np.linspace(1, last, steps).tolist()
