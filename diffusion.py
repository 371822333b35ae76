"""Noising, targets, loss and samplers: both lineages of video diffusion behind one interface. No weights.

    x_t = a(t) x + s(t) eps                      t = 0 is data, t = 1 is noise, whatever the lineage

`FlowMatching` (Wan, and our small models) has a = 1 - t, s = t. `VPrediction` (CogVideoX) has a = sqrt(alpha_bar),
s = sqrt(1 - alpha_bar) on a table of 1000 steps that ends in exactly no signal. Everything else is shared:

* the network may output x, v or eps; all three are turned into an estimate of x, and the loss is always that of v,
  ||v_hat - v||^2 = ||x_hat - x||^2 / s^2 for both lineages. In pixel space predicting x is decisive: a token is an
  8 x 8 patch of which the noise fills every dimension and the clip only a few.
* one sampling loop: network -> guidance -> estimate of x -> a `Solver` that moves to the next time knowing x alone.
  The simplest puts x and eps together again: for flow matching this *is* the Euler step, for CogVideoX it *is* DDIM.

Shapes: x, x_t, eps and predictions (B, C, F, H, W); t (B,) in [0, 1].
Solvers: lambda = log(a / s), from -inf (noise) to +inf (data), and h, its growth over a step. A dash marks the next
time (a', s'); x_0 is the estimate of x made now, x_1 the one of a step ago.
"""
import math

import numpy as np
import torch
from torch import Tensor

from config import stream


GOLDEN = (math.sqrt(5) - 1) / 2


def per_clip(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) so that it multiplies x."""
    return t.view(-1, *[1] * (x.dim() - 1))


class Process:
    """What both lineages share. A subclass says `coefficients`, `warp` (uniform -> training time), `plan` and
    `model_time`."""

    s_min = 0.05  # the loss's 1 / s^2 is cut here, or nearly clean clips would outweigh all others
    solvers = ()  # names in SOLVERS that it can be sampled with; the first is the default
    layout = (0, 1, 2, 3, 4)  # of latents in diffusers' pipeline: an order of (B, C, F, H, W)

    def __init__(self, predict: str):
        self.predict = predict

    def draw(self, seed: int, index, shape) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise (B, *shape) of the stream positions `index`: each a function of (seed, position) alone.

        Times follow the golden-ratio sequence: every clip's t has the training distribution, and any run of consecutive
        clips covers it evenly, which independent draws do not.
        """
        start = stream(seed, "time").random()
        u = torch.tensor([(start + int(i) * GOLDEN) % 1 for i in index], dtype=torch.float64)
        rngs = (stream(seed, "noise", int(i)) for i in index)
        eps = np.stack([rng.standard_normal(tuple(shape), np.float32) for rng in rngs])
        return self.warp(u).float(), torch.from_numpy(eps)

    def noise(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = a x + s eps."""
        a, s = self.coefficients(t)
        return per_clip(a, x) * x + per_clip(s, x) * eps

    def to_x(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as an estimate of the clean clip."""
        a, s = (per_clip(c, x_t) for c in self.coefficients(t))
        if self.predict == "x":
            return prediction
        if self.predict == "eps":  # at pure noise (a = 0) eps says nothing of x: keep the quotient finite
            return (x_t - s * prediction) / a.clamp(min=self.s_min)
        return self.x_from_v(prediction, x_t, a, s)

    def loss(self, prediction: Tensor, x_t: Tensor, t: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """Per-clip loss (B,): mean squared error of v, whatever the network predicts."""
        a, s = (per_clip(c, x) for c in self.coefficients(t))
        prediction = prediction.float()
        if self.predict == "v":  # no division: exact at every t
            error = prediction - self.v(x, eps, a, s)
        elif self.predict == "eps":  # v_hat - v = (eps_hat - eps) / a
            error = (prediction - eps) / a.clamp(min=self.s_min)
        else:
            error = (self.to_x(prediction, x_t, t) - x) / s.clamp(min=self.s_min)
        return error.square().flatten(1).mean(1)

    def chosen(self, solver: str | None) -> str:
        """The solver's name, None being the default; raises ValueError for one that this process has not."""
        if solver not in (None, *self.solvers):
            raise ValueError(f"{type(self).__name__} has no solver {solver!r}: choose from {', '.join(self.solvers)}.")
        return solver or self.solvers[0]

    def times(self, steps: int, solver: str | None = None) -> list[float]:
        """The times that `sample` starts its steps from, and 0; raises ValueError for what this process cannot do."""
        return [now for _, now, _ in self.plan(steps, self.chosen(solver))] + [0.0]

    def randn(self, shape, generator=None, dtype=torch.float32, device="cpu") -> Tensor:
        """Standard normal (B, C, F, H, W). A torch.Generator gives the numbers that it gives diffusers' pipeline of
        this lineage (for the same dtype); a list of B generators makes each clip depend on its own alone."""
        if isinstance(generator, list):
            return torch.cat([self.randn((1, *shape[1:]), one, dtype, device) for one in generator])
        where = device if generator is None else generator.device
        z = torch.randn([shape[i] for i in self.layout], generator=generator, dtype=dtype, device=where)
        return z.permute(self.layout).contiguous().to(device)

    @torch.no_grad()
    def sample(self, denoise, noise: Tensor, steps: int, guidance: float = 1.0, unconditional=None, watch=None, *,
               solver: str | None = None, dynamic: bool = False, generator=None) -> Tensor:
        """Noise (B, C, F, H, W) -> clips, in `steps` steps of a solver named in `self.solvers`.

        `denoise(x_t, model_time)` and `unconditional(x_t, model_time)` return the network's raw output, joined in
        float32 by classifier-free guidance u + guidance (c - u); guidance 1 never calls the second. `dynamic` varies
        guidance as CogVideoX's pipeline may. `watch(t)` is called after each step with the time it started from:
        progress bars and routing pictures hang there. `generator` (see `randn`; None: torch's global one) feeds "dpm",
        the one solver that draws noise. x_t is cast to the dtype of `noise` after every step: float32 for Wan and the
        small models, that of the text (bf16) in CogVideoX's pipeline.
        """
        solver = self.chosen(solver)
        solve = SOLVERS[solver](lambda: self.randn(noise.shape, generator, noise.dtype, noise.device))
        x_t = noise
        for told, now, then in self.plan(steps, solver):
            w = self.dynamic(guidance, told, steps) if dynamic else guidance
            t, model_time = (torch.full((len(x_t),), value, device=x_t.device) for value in (now, told))
            prediction = denoise(x_t, model_time).float()
            if guidance != 1:
                u = unconditional(x_t, model_time).float()
                prediction = u + w * (prediction - u)
            x = self.to_x(prediction, x_t, t)
            ends = (self.coefficients(torch.tensor(time).double()) for time in (now, then))  # float32 first, as t is
            x_t = solve.step(x_t, x, *ends).to(noise.dtype)
            if watch:
                watch(now)
        return x_t

    def dynamic(self, guidance, step, steps):
        raise ValueError(f"Dynamic guidance belongs to CogVideoX; {type(self).__name__} has none.")


class FlowMatching(Process):
    """Rectified flow: x_t = (1 - t) x + t eps, v = eps - x (Liu et al. 2022; the convention of Wan2.1).

    Training times are logit-normal (Esser et al. 2024), t = sigmoid(N(mean, std)), then shifted: s t / (1 + (s - 1) t).
    Solvers: "euler"; "wan-euler" and "unipc" are those of diffusers' WanPipeline, which differ from it in the grid too.
    """

    solvers = ("euler", "wan-euler", "unipc")

    def __init__(self, predict: str = "x", mean: float = 0.0, std: float = 1.0, shift: float = 1.0):
        super().__init__(predict)
        self.mean, self.std, self.shift = mean, std, shift

    def coefficients(self, t):
        return 1 - t, t

    def v(self, x, eps, a, s):
        return eps - x

    def x_from_v(self, v, x_t, a, s):
        return x_t - s * v

    def shifted(self, t):
        return self.shift * t / (1 + (self.shift - 1) * t)

    def warp(self, u: Tensor) -> Tensor:
        normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        return self.shifted(torch.sigmoid(self.mean + self.std * normal))

    def plan(self, steps: int, solver: str) -> list[tuple[float, float, float]]:
        """(what the network is told, time, next time) of every step. Even before the shift, the times are

        euler      1 .. 0, N + 1 of them (DiffSynth's grid too);
        wan-euler  1 .. 0.001, N of them, then 0; the 0.001 is shifted twice (FlowMatchEulerDiscreteScheduler);
        unipc      1 .. 0.001, N + 1 of them, the last becoming 0 (UniPCMultistepScheduler). A millionth off the first
                   keeps lambda finite. The network is told whole thousandths, cut off; the solver's time is exact.
        """
        even = {"euler": [1 - i / steps for i in range(steps)],
                "wan-euler": np.linspace(1, self.shifted(torch.tensor(0.001)).item(), steps).tolist(),
                "unipc": np.linspace(1, 0.001, steps + 1)[:-1].tolist()}
        times = [self.shifted(t) for t in even[solver]] + [0.0]
        told = self.model_time(torch.tensor(times)).tolist()
        if solver == "unipc":
            times[0] -= 1e-6
            told = [int(1000 * t) for t in times]
        return list(zip(told, times, times[1:]))

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that Wan's network was trained with: 1000 sigma."""
        return 1000 * t


class VPrediction(Process):
    """CogVideoX's variance-preserving process: 1000 steps, scaled-linear betas, SNR shift, zero terminal SNR.

    The table is made in float64 in the order of the reference (betas, cumulative product, shift, rescale), so that
    alpha_bar[999] is exactly 0. v = a eps - s x (Salimans & Ho 2022). t is step / 999; step -1 is the clean clip.
    Solvers: "ddim", which its authors advise for 2B, and "dpm", for 5B; both as diffusers' CogVideoX schedulers.
    """

    steps = 1000
    solvers = ("ddim", "dpm")
    layout = (0, 2, 1, 3, 4)  # (B, F, C, H, W)

    def __init__(self, predict: str = "v", snr_shift: float = 1.0):
        super().__init__(predict)
        betas = torch.linspace(0.00085**0.5, 0.0120**0.5, self.steps, dtype=torch.float64) ** 2
        alpha_bar = (1 - betas).cumprod(0)
        alpha_bar = alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)
        root = alpha_bar.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])  # Lin et al. 2023: no signal at all at the last step
        self.alpha_bar = root.square()

    def step_of(self, t: Tensor) -> Tensor:
        return (t.double() * (self.steps - 1)).round().long()

    def coefficients(self, t):
        step = self.step_of(t)
        alpha_bar = self.alpha_bar.to(t.device)[step].masked_fill(step < 0, 1)
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def v(self, x, eps, a, s):
        return a * eps - s * x

    def x_from_v(self, v, x_t, a, s):
        return a * x_t - s * v

    def warp(self, u: Tensor) -> Tensor:
        return (u * self.steps).floor().clamp(max=self.steps - 1) / (self.steps - 1)

    def plan(self, steps: int, solver: str) -> list[tuple[int, float, float]]:
        """(what the network is told, time, next time) of every step, "trailing": 999, 979, ... 19 for 50.

        A solver goes 1000 // steps down. Where steps does not divide 1000, that is not quite where the network is told
        to be next, and the last step may end at the table's first entry, not at clean data: diffusers' way. Not copied
        is its step too many, at -1, where 1000 / steps is rounded down (61, 103, ...).
        """
        if steps > self.steps:
            raise ValueError(f"v-prediction has {self.steps} steps; {steps} cannot be taken.")
        first = np.arange(self.steps, 0, -self.steps / steps)[:steps].round().astype(int) - 1  # halves fall as there
        return [(n, n / (self.steps - 1), (n - self.steps // steps) / (self.steps - 1)) for n in first.tolist()]

    def dynamic(self, guidance: float, step: int, steps: int) -> float:
        """CogVideoXPipeline's `use_dynamic_cfg`. It sets a step of 0..999 against the number of steps, so that guidance
        leaps between 1 and 1 + guidance instead of growing; the authors know, and what they show was made so."""
        return 1 + guidance * (1 - math.cos(math.pi * ((steps - step) / steps) ** 5.0)) / 2

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that CogVideoX's network was trained with: the integer step 0..999."""
        return self.step_of(t)


# --- solvers ----------------------------------------------------------------------------------------------------------
class Solver:
    """`step(x_t, x, now, then)` -> x_t at the next time, from x, the network's estimate of the clean clip.

    `now` = (a, s) and `then` = (a', s') are float64 scalars and leave x_t its dtype; `normal()` draws noise shaped as
    x_t. One object samples one batch. All but "dpm" start from the exact solution, in which x alone is unknown
    (DPM-Solver++, arXiv 2211.01095, Proposition 4.1):

        x_then = s'/s x_now + s' integral of e^lambda x(lambda) from lambda to lambda'
               = s'/s x_now + a' (1 - e^-h) (mean of x over the step, weighted with e^lambda)
    """

    def __init__(self, normal):
        self.normal, self.past = normal, []


def log_snr(a: Tensor, s: Tensor) -> Tensor:
    """lambda; infinite at both ends of time, which the solvers count on: e^-inf = 0."""
    return (a / s).log()


class Direct(Solver):
    """Euler and DDIM (arXiv 2010.02502, eta = 0): x is constant over the step, and so is the eps that goes with it."""

    def step(self, x_t, x, now, then):
        a, s, a_next, s_next = (c.float().to(x_t.device) for c in (*now, *then))
        eps = (x_t - a * x) / s
        return a_next * x + s_next * eps


class DPM(Solver):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), as CogVideoXDPMScheduler: every step puts fresh noise z ~ N(0, 1) in.

        x_then = s'/s e^-h x_now + a' (1 - e^-2h) D + s' sqrt(1 - e^-2h) z
        D = (1 + 1/2r) x_0 - 1/2r x_1,   r = h_before / h          the line through two estimates, half a step ahead

    The first step, which has no x_1, and one to clean data are of first order: D = x_0.
    """

    def step(self, x_t, x, now, then):
        (_, s), (a_next, s_next), lam = now, then, log_snr(*now)
        h, D, z = log_snr(*then) - lam, x, self.normal()
        if self.past and s_next > 0:
            lam_1, x_1 = self.past
            r = (lam - lam_1) / h
            D = (1 + 1 / (2 * r)) * x - 1 / (2 * r) * x_1
            z = self.normal()  # the reference draws twice and uses the second: so a seed means the same here
        self.past = lam, x
        new = -torch.expm1(-2 * h)
        return s_next / s * torch.exp(-h) * x_t + new * a_next * D + s_next * new.sqrt() * z


class UniPC(Solver):
    """UniPC of order 2, B(h) = e^h - 1 ("bh2"), on x (arXiv 2302.04867), as UniPCMultistepScheduler.

        x_then = s'/s x_now + a' (1 - e^-h) (x_0 + sum of rho_k D_k),   D_k = (x_k - x_0) / r_k

    r_k = (lambda_k - lambda) / h is where estimate x_k was made: now is 0, then 1, the past negative. A step corrects
    (UniC): the network has just spoken at the predicted place; with its x there, r_k = 1, the move to it is made once
    more. That x stays, the network is not asked again. Then it predicts the next place from the corrected one (UniP).

    With one D, rho = 1/2. With two, x(r) is the parabola through three estimates and the bracket its exact mean. The
    first prediction has no past and the last, where h is infinite, uses none.
    """

    def step(self, x_t, x, now, then):
        if self.past:
            x_t = self.move(now, x)
        self.past = [*self.past[-1:], (x_t, x, now)]
        return self.move(then)

    def move(self, then, x_then=None):
        (x_t, x, now), (a_next, s_next), D, rho = self.past[-1], then, [], [0.5]
        lam = log_snr(*now)
        h = log_snr(*then) - lam
        weight = -torch.expm1(-h)
        if len(self.past) == 2 and s_next > 0:
            _, x_1, before = self.past[0]
            r = (log_snr(*before) - lam) / h
            D.append((x_1 - x) / r)
        if x_then is not None:
            D.append(x_then - x)
        if len(D) == 2:  # the means of r and r^2 on 0..1, weighted with e^(hr), which a parabola's mean is made of
            mean_r = 1 / weight - 1 / h  # rho_1 + rho_2 must be this,
            mean_r2 = 1 / weight - 2 * mean_r / h  # and r rho_1 + rho_2 this
            rho_1 = (mean_r - mean_r2) / (1 - r)
            rho = [rho_1, mean_r - rho_1]
        mean = x + sum(p * d for p, d in zip(rho, D))
        return s_next / now[1] * x_t + a_next * weight * mean

SOLVERS = {"ddim": Direct, "euler": Direct, "wan-euler": Direct, "dpm": DPM, "unipc": UniPC}


def build(cfg) -> Process:
    """The process a config names."""
    if cfg.process == "vpred":
        return VPrediction(cfg.predict, cfg.snr_shift)
    return FlowMatching(cfg.predict, cfg.time_mean, cfg.time_std, cfg.shift)
