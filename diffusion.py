"""Noising, targets, loss and sampling: both lineages of video diffusion behind one interface. No weights.

    x_t = a(t) x + s(t) eps                      t = 0 is data, t = 1 is noise, whatever the lineage

`FlowMatching` (Wan, and our small models) has a = 1 - t, s = t. `VPrediction` (CogVideoX) has a = sqrt(alpha_bar),
s = sqrt(1 - alpha_bar) on a table of 1000 steps that ends in exactly no signal. Everything else is shared:

* the network may output x, v or eps; all three are turned into an estimate of x, and the loss is always that of v,
  ||v_hat - v||^2 = ||x_hat - x||^2 / s^2 for both lineages. In pixel space predicting x is decisive: a token is an 8 x 8
  patch of which the noise fills every dimension and the clip only a few.
* one deterministic sampler: estimate x and eps, put them together again at the next time. For flow matching this *is*
  the Euler step, for CogVideoX it *is* DDIM.

Shapes: x, x_t, eps and predictions (B, C, F, H, W); t (B,) in [0, 1].
"""
import math

import numpy as np
import torch
from torch import Tensor

GOLDEN = (math.sqrt(5) - 1) / 2


def per_clip(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) so that it multiplies x."""
    return t.view(-1, *[1] * (x.dim() - 1))


class Process:
    """What both lineages share. A subclass says `coefficients`, `warp` (uniform -> training time), `times` and
    `model_time`."""

    s_min = 0.05  # the loss's 1 / s^2 is cut here, or nearly clean clips would outweigh all others

    def __init__(self, predict: str):
        self.predict = predict

    def draw(self, seed: int, index, shape) -> tuple[Tensor, Tensor]:
        """Times (B,) and noise (B, *shape) of the stream positions `index`: each a function of (seed, position) alone.

        Times follow the golden-ratio sequence: every clip's t has the training distribution, and any run of consecutive
        clips covers it evenly, which independent draws do not.
        """
        start = np.random.default_rng([seed, 0]).random()
        u = torch.tensor([(start + int(i) * GOLDEN) % 1 for i in index], dtype=torch.float64)
        rngs = (np.random.default_rng([seed, 1, int(i)]) for i in index)
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

    @torch.no_grad()
    def sample(self, denoise, noise: Tensor, steps: int, guidance: float = 1.0, unconditional=None,
               watch=None) -> Tensor:
        """Noise (B, C, F, H, W) -> clips, in `steps` deterministic steps (Euler for flow, DDIM for v-prediction).

        `denoise(x_t, model_time)` and `unconditional(x_t, model_time)` return the network's raw output, joined by
        classifier-free guidance u + guidance (c - u); guidance 1 never calls the second. `watch(t)` is called after
        each step with the time it started from: progress bars and routing pictures hang there.
        """
        x_t, times = noise, self.times(steps)
        for now, then in zip(times[:-1], times[1:]):
            t, t_next = (torch.full((len(x_t),), time, device=x_t.device) for time in (now, then))
            prediction = denoise(x_t, self.model_time(t)).float()
            if guidance != 1:
                u = unconditional(x_t, self.model_time(t)).float()
                prediction = u + guidance * (prediction - u)
            x = self.to_x(prediction, x_t, t)
            a, s = self.coefficients(t)
            eps = (x_t - per_clip(a, x) * x) / per_clip(s, x)
            x_t = self.noise(x, t_next, eps) if then > 0 else x
            if watch:
                watch(now)
        return x_t


class FlowMatching(Process):
    """Rectified flow: x_t = (1 - t) x + t eps, v = eps - x (Liu et al. 2022; the convention of Wan2.1).

    Training times are logit-normal (Esser et al. 2024), t = sigmoid(N(mean, std)), then shifted: s t / (1 + (s - 1) t).
    """

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

    def times(self, steps: int) -> list[float]:
        """1 = t_0 > ... > t_steps = 0, even before the shift."""
        return [self.shifted(1 - i / steps) for i in range(steps + 1)]

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that Wan's network was trained with: 1000 sigma."""
        return 1000 * t


class VPrediction(Process):
    """CogVideoX's variance-preserving process: 1000 steps, scaled-linear betas, SNR shift, zero terminal SNR.

    The table is made in float64 in the order of the reference (betas, cumulative product, shift, rescale), so that
    alpha_bar[999] is exactly 0. v = a eps - s x (Salimans & Ho 2022). t is step / 999.
    """

    steps = 1000

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
        alpha_bar = self.alpha_bar.to(t.device)[self.step_of(t)]
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def v(self, x, eps, a, s):
        return a * eps - s * x

    def x_from_v(self, v, x_t, a, s):
        return a * x_t - s * v

    def warp(self, u: Tensor) -> Tensor:
        return (u * self.steps).floor().clamp(max=self.steps - 1) / (self.steps - 1)

    def times(self, steps: int) -> list[float]:
        """"Trailing" steps: 999, 979, ... 19 for 50, then 0 meaning clean data (alpha_bar = 1, not the table's first
        entry)."""
        if steps > self.steps:
            raise ValueError(f"v-prediction has {self.steps} steps; {steps} cannot be taken.")
        first = [round(self.steps - i * self.steps / steps) - 1 for i in range(steps)]
        return [n / (self.steps - 1) for n in first] + [0.0]

    def model_time(self, t: Tensor) -> Tensor:
        """The unit that CogVideoX's network was trained with: the integer step 0..999."""
        return self.step_of(t)


def build(cfg) -> Process:
    """The process a config names."""
    if cfg.process == "vpred":
        return VPrediction(cfg.predict, cfg.snr_shift)
    return FlowMatching(cfg.predict, cfg.time_mean, cfg.time_std, cfg.shift)
