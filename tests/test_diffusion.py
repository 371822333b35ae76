"""diffusion.py against closed forms, the Gaussian that can be solved by hand,
and the schedulers of diffusers."""
import math
from itertools import pairwise

import pytest
import torch
from torch.special import ndtri

import config
import diffusion
import seams

pytestmark = pytest.mark.quick
BOTH = {"flow": diffusion.FlowMatching, "vpred": diffusion.VPrediction}
SHAPE = (2, 3, 4, 5)  # C F H W


@pytest.fixture(params=BOTH)
def kind(request):
    return request.param


def pair(batch: int, seed: int = 0):
    """A clip and a noise, (B, C, F, H, W) each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *SHAPE, generator=g), torch.randn(batch, *SHAPE, generator=g)


def a_and_s(process, t):
    """The coefficients of x_t = a x + s eps from their definition, (B, 1, 1, 1, 1) in float64."""
    t = t.double().view(-1, 1, 1, 1, 1)
    if isinstance(process, diffusion.FlowMatching):
        return 1 - t, t
    alpha_bar = process.alpha_bar[(t * 999).round().long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def true_v(process, x, eps, t):
    a, s = a_and_s(process, t)
    return eps.double() - x.double() if isinstance(process, diffusion.FlowMatching) else a * eps - s * x


def exact(process, x, eps, t):
    """What a network that knows x and eps outputs."""
    return {"x": x, "eps": eps, "v": true_v(process, x, eps, t).float()}[process.predict]


def alone(network):
    """A network as `sample` wants it: its output, and no unconditional one."""
    return lambda x_t, model_time: (network(x_t, model_time), None)


def both(network, unconditional):
    """A network and another for the empty text, as `sample` wants them for guidance."""
    return lambda x_t, model_time: (network(x_t, model_time), unconditional(x_t, model_time))


# --- noising
def test_flow_endpoints_are_exact():
    (x, eps), process = pair(3), diffusion.FlowMatching()
    assert torch.equal(process.noise(x, torch.zeros(3), eps), x)
    assert torch.equal(process.noise(x, torch.ones(3), eps), eps)
    torch.testing.assert_close(process.noise(x, torch.full((3,), 0.25), eps), 0.75 * x + 0.25 * eps)


@pytest.mark.parametrize("snr_shift", [1, 3])
def test_vpred_endpoints(snr_shift):
    (x, eps), process = pair(3), diffusion.VPrediction(snr_shift=snr_shift)
    assert process.alpha_bar[-1] == 0  # zero terminal SNR is exactly zero, in float64 already
    a, s = process.coefficients(torch.ones(1))
    assert a == 0 and s == 1
    assert torch.equal(process.noise(x, torch.ones(3), eps), eps)
    first = 1 - 0.00085  # the first beta; the rescaling keeps it
    first = first / (snr_shift + (1 - snr_shift) * first)
    torch.testing.assert_close(process.noise(x, torch.zeros(3), eps),
                               math.sqrt(first) * x + math.sqrt(1 - first) * eps)


def test_at_pure_noise_v_is_minus_x_to_the_bit():
    (x, eps), process, t = pair(3), diffusion.VPrediction(), torch.ones(3)
    assert torch.equal(process.to_x(-x, eps, t), x)
    assert torch.equal(process.loss(-x, t, x, eps), torch.zeros(3))


def test_signal_falls_with_time(kind):
    a, s = BOTH[kind]().coefficients(torch.linspace(0, 1, 1000))
    assert (a.diff() < 0).all() and (s.diff() > 0).all()


# --- predictions and loss
@pytest.mark.parametrize("predict", ["x", "v", "eps"])
def test_an_exact_denoiser_has_no_loss_and_gives_back_x(kind, predict):
    process, t = BOTH[kind](predict), torch.tensor([0.06, 0.3, 0.5, 0.9, 0.94, 0.98])
    x, eps = pair(len(t))
    x_t = process.noise(x, t, eps)
    assert process.loss(exact(process, x, eps, t), t, x, eps).max() < 1e-8
    few = t < 0.9  # eps near pure noise says nothing of x
    torch.testing.assert_close(process.to_x(exact(process, x, eps, t), x_t, t)[few], x[few], atol=1e-4,
                               rtol=0)


@pytest.mark.parametrize("predict", ["x", "v", "eps"])
def test_loss_is_the_mean_squared_error_of_v(kind, predict):
    """||v_hat - v||^2, with v_hat from the definition of v and the network's output, whatever that is."""
    process, t = BOTH[kind](predict), torch.tensor([0.1, 0.2, 0.5, 0.8])
    (x, eps), (prediction, _) = pair(4), pair(4, seed=1)
    x_t = process.noise(x, t, eps)
    a, s = a_and_s(process, t)
    x_hat, eps_hat = prediction.double(), prediction.double()
    if predict == "x":
        eps_hat = (x_t - a * x_hat) / s
    else:
        x_hat = (x_t - s * eps_hat) / a
    v_hat = prediction if predict == "v" else true_v(process, x_hat, eps_hat, t)
    expected = (v_hat - true_v(process, x, eps, t)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(process.loss(prediction, t, x, eps), expected.float(), rtol=1e-4,
                               atol=1e-6)


def test_the_weight_of_nearly_clean_clips_is_cut():
    process, t = diffusion.FlowMatching("x"), torch.tensor([0.001])
    x, eps = pair(1)
    loss = process.loss(x + 1, t, x, eps)
    torch.testing.assert_close(loss, torch.tensor([1 / 0.05**2]))


# --- draws
def test_draw_is_a_function_of_seed_and_position_alone(kind):
    process = BOTH[kind]()
    t, eps = process.draw(3, range(5), SHAPE)
    for i in (4, 0, 2):  # alone, and in another order
        t_1, eps_1 = process.draw(3, [i], SHAPE)
        assert torch.equal(t_1[0], t[i]) and torch.equal(eps_1[0], eps[i])
    other_t, other_eps = process.draw(4, range(5), SHAPE)
    assert (other_t != t).any() and (other_eps != eps).all(dim=0).any()
    assert len({e.sum().item() for e in eps}) == 5 and t.dtype == eps.dtype == torch.float32
    assert eps.shape == (5, *SHAPE)


def test_drawn_noise_is_standard_normal():
    _, eps = diffusion.FlowMatching().draw(0, range(200), SHAPE)
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5 and abs(eps.var() - 1) < 4 * (2 / n) ** 0.5  # four standard errors
    neighbours = (eps[1:] * eps[:-1]).mean()
    assert abs(neighbours) < 4 / n**0.5


QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)


@pytest.mark.parametrize("mean, std, shift", [(0.0, 1.0, 1.0), (0.6, 1.0, 1.0), (-0.5, 0.7, 3.0)])
def test_flow_times_are_logit_normal(mean, std, shift):
    """logit t ~ N(mean, std^2); the shift s t / (1 + (s - 1) t) adds log s to the logit."""
    t, _ = diffusion.FlowMatching("x", mean, std, shift).draw(0, range(4000), (1,))
    expected = mean + math.log(shift) + std * ndtri(QUANTILES)
    torch.testing.assert_close(t.double().logit().quantile(QUANTILES), expected, atol=0.01, rtol=0)


def test_each_single_clip_has_the_training_distribution():
    """Over seeds, one position: the evenness of a run of clips must not cost any clip its distribution."""
    t = torch.cat([diffusion.FlowMatching().draw(seed, [7], (1,))[0]
                   for seed in range(1000)]).double().logit().sort().values
    u = torch.special.ndtr(t)
    distance = (u - (torch.arange(1000) + 0.5) / 1000).abs().max()
    assert distance < 1.63 / 1000**0.5  # Kolmogorov-Smirnov, 1 %


def test_a_run_of_clips_covers_the_times_evenly():
    t, _ = diffusion.FlowMatching().draw(0, range(1000, 1032), (1,))
    u = torch.special.ndtr(t.double().logit()).sort().values
    assert (u - (torch.arange(32) + 0.5) / 32).abs().max() < 0.06  # independent draws: about 0.15


def test_vpred_draws_every_step_equally_often():
    process = diffusion.VPrediction()
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    steps = process.model_time(process.warp(u).float())
    # through float32 and back, to the bit
    assert torch.equal(steps, torch.arange(1000).repeat_interleave(10))


def test_shift_formula():
    process = diffusion.FlowMatching(shift=3.0)
    assert process.times(4) == pytest.approx([1, 3 * 0.75 / 2.5, 0.75, 0.75 / 1.5, 0])
    assert process.times(4)[0] == 1 and process.times(4)[-1] == 0
    assert diffusion.FlowMatching().times(5) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])


# --- units
def test_the_network_receives_its_lineages_unit():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(diffusion.FlowMatching().model_time(t), torch.tensor([0.0, 500.0, 1000.0]))
    step = diffusion.VPrediction().model_time(t)
    assert step.dtype == torch.int64 and step.tolist() == [0, 500, 999]  # 499.5 rounds to even
    heard = []
    network = alone(lambda x, t: heard.append(t.tolist()) or x)
    diffusion.VPrediction().sample(network, torch.randn(2, *SHAPE), 50)
    assert heard == [[n, n] for n in range(999, 0, -20)]


def test_vpred_has_no_more_than_its_steps():
    assert [round(t * 999) for t in diffusion.VPrediction().times(1000)[:-1]] == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="1000"):
        diffusion.VPrediction().times(1001)


# --- sampling
def denoiser(process, mean: float, sd: float):
    """The exact denoiser of clips whose every number is N(mean, sd^2):
    E[x | x_t] turned into the process's own output."""
    def denoise(x_t, model_time):
        t = (model_time / (1000 if isinstance(process, diffusion.FlowMatching) else 999)).float()
        a, s = a_and_s(process, t)
        x = mean + a * sd**2 / (a**2 * sd**2 + s**2) * (x_t - a * mean)
        eps = (x_t - a * x) / s
        return {"x": x, "eps": eps, "v": true_v(process, x, eps, t)}[process.predict]
    return denoise


def test_a_gaussian_is_sampled_to_its_mean_and_variance(kind):
    """The deterministic flow from N(0, 1) to N(mean, sd^2) is mean + sd eps.
    Euler's error is of first order: half the step, half the error."""
    process, mean, sd = BOTH[kind]("v"), 0.7, 0.4
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    error = {}
    for steps in (125, 250, 500):
        x = process.sample(alone(denoiser(process, mean, sd)), noise, steps)
        error[steps] = (x - (mean + sd * noise)).abs().max().item()
        assert abs(x.mean() - (mean + sd * noise.mean())) < 1 / steps
        assert abs(x.std() / (sd * noise.std()) - 1) < 8 / steps
    assert 1.6 < error[125] / error[250] < 2.4 and 1.6 < error[250] / error[500] < 2.4


def test_x_v_and_eps_predictions_give_equal_samples(kind):
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    # mean 0: at pure noise eps says x = 0
    samples = [p.sample(alone(denoiser(p, 0.0, 0.5)), noise, 10) for p in map(BOTH[kind], ("x", "v", "eps"))]
    assert samples[0].std() > 0.2
    torch.testing.assert_close(samples[1], samples[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(samples[2], samples[0], atol=2e-5, rtol=0)


def wavy(x_t, model_time):
    """A stand-in for a network: smooth, dependent on the time, and the same for any batch."""
    return torch.sin(2 * x_t + model_time.view(-1, 1, 1, 1, 1) / 300) * 0.8


def visited(process, noise, steps, network=wavy, **how):
    """x_t as the network sees it at every step, and the sample at the end."""
    path = []
    path.append(process.sample(alone(lambda x, t: path.append(x) or network(x, t)), noise, steps, **how))
    return path


def test_the_default_solver_to_the_bit(kind):
    """The deterministic step of part 1, written out:
    published samples of the small models stay what they are."""
    process, noise = BOTH[kind]("x", **{"flow": {"shift": 3.0}, "vpred": {}}[kind]), torch.randn(2, *SHAPE)
    x_t = noise
    for now, then in pairwise(process.times(10)):
        t = torch.full((2,), now)
        x = process.to_x(wavy(x_t, process.model_time(t)), x_t, t)
        a, s = (c.view(-1, 1, 1, 1, 1) for c in process.coefficients(t))
        x_t = process.noise(x, torch.full((2,), then), (x_t - a * x) / s) if then > 0 else x
    assert torch.equal(process.sample(alone(wavy), noise, 10), x_t)
    by_name = process.sample(alone(wavy), noise, 10, solver={"flow": "euler", "vpred": "ddim"}[kind])
    assert torch.equal(by_name, x_t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sampling_is_euler(shift):
    process, noise = diffusion.FlowMatching("v", shift=shift), torch.randn(2, *SHAPE)
    path, x = visited(process, noise, 20), noise.double()
    for i in range(20):
        torch.testing.assert_close(path[i], x.float(), atol=2e-5, rtol=0)
        now, then = (shift * u / (1 + (shift - 1) * u) for u in (1 - i / 20, 1 - (i + 1) / 20))
        x = x + (then - now) * wavy(x, torch.tensor([1000 * now]))  # dx/dt = v = eps - x
    torch.testing.assert_close(path[20], x.float(), atol=2e-5, rtol=0)


# --- solvers against diffusers' schedulers
STEPS = [50, 25, 7, 30, 2, 1]


def cogvideox_scheduler(kind="DDIM", steps=None, snr_shift=1.0, prediction_type="v_prediction"):
    diffusers = pytest.importorskip("diffusers",
                                    reason="needs diffusers: pip install -r requirements-extra.txt")
    made = getattr(diffusers, f"CogVideoX{kind}Scheduler")(
        snr_shift_scale=snr_shift, prediction_type=prediction_type, rescale_betas_zero_snr=True,
        timestep_spacing="trailing")
    return made.set_timesteps(steps) or made if steps else made


def wan_scheduler(solver, steps, shift):
    diffusers = pytest.importorskip("diffusers",
                                    reason="needs diffusers: pip install -r requirements-extra.txt")
    made = (diffusers.FlowMatchEulerDiscreteScheduler(shift=shift) if solver == "wan-euler" else
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift,
                                              prediction_type="flow_prediction"))
    made.set_timesteps(steps)
    made.set_begin_index(0)  # as WanPipeline does
    return made


def told(process, steps, solver):
    """What the network is told, step by step; one tensor."""
    heard = []
    process.sample(alone(lambda x, t: heard.append(t) or x), torch.zeros(1, *SHAPE), steps, solver=solver)
    return torch.cat(heard)


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parity
@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_the_noise_table_is_cogvideoxs(snr_shift):
    reference = cogvideox_scheduler(snr_shift=snr_shift).alphas_cumprod
    table = diffusion.VPrediction(snr_shift=snr_shift).alpha_bar
    torch.testing.assert_close(table, reference, rtol=2e-15, atol=0)  # float64 roundings of the same product
    assert table[-1] == reference[-1] == 0


@pytest.mark.parity
def test_cogvideoxs_steps_for_every_number_of_them():
    process, scheduler, extra = diffusion.VPrediction(), cogvideox_scheduler(), []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        reference = scheduler.timesteps.tolist()
        plan = process.plan(n, "ddim")
        assert [step for step, _, _ in plan] == reference[:n]
        assert [round(999 * then) for _, _, then in plan] == [step - 1000 // n for step in reference[:n]]
        extra += reference[n:]  # 62 numbers of steps get one more, at -1, from a rounding inside np.arange
    assert set(extra) == {-1} and len(extra) < 100
    assert torch.equal(told(process, 30, "dpm"), cogvideox_scheduler(steps=30).timesteps)


@pytest.mark.parity
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("predict, prediction_type", [("v", "v_prediction"), ("x", "sample")])
@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_ddim_is_cogvideoxs_step_by_step(predict, prediction_type, snr_shift, steps):
    """Not to the bit: ours makes eps and puts it together with x, the reference joins x_t and x.
    Numbers reach 5: 1e-6 is two roundings."""
    scheduler, noise = cogvideox_scheduler("DDIM", steps, snr_shift, prediction_type), torch.randn(2, *SHAPE)
    path = visited(diffusion.VPrediction(predict, snr_shift), noise, steps, solver="ddim")
    for step, x_t, after in zip(scheduler.timesteps, path, path[1:]):
        assert largest(scheduler.step(wavy(x_t, step.view(1)), int(step), x_t).prev_sample, after) <= 1e-6


def dpm_path(scheduler, noise, seed):
    """CogVideoXPipeline's loop in its own layout (B, F, C, H, W), given back in ours."""
    x_t = noise.transpose(1, 2)
    x = None
    generator = torch.Generator().manual_seed(seed)
    before = None
    path = [noise]
    for step in scheduler.timesteps:
        x_t, x = scheduler.step(wavy(x_t, step.view(1)), x, step, before, x_t, generator=generator)
        x_t, before = x_t.to(noise.dtype), step
        path.append(x_t.transpose(1, 2))
    return path


@pytest.mark.parity
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("predict, prediction_type", [("v", "v_prediction"), ("x", "sample")])
@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
def test_dpm_is_cogvideoxs_to_the_bit_seed_included(predict, prediction_type, snr_shift, steps):
    noise = torch.randn(2, *SHAPE)
    path = visited(diffusion.VPrediction(predict, snr_shift), noise, steps, solver="dpm",
                   generator=torch.Generator().manual_seed(5))
    reference = dpm_path(cogvideox_scheduler("DPM", steps, snr_shift, prediction_type), noise, seed=5)
    assert len(path) == len(reference) == steps + 1 and all(map(torch.equal, path, reference))


@pytest.mark.parity
@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_bf16_noise_keeps_x_t_in_bf16(solver):
    """The same draws as the reference in bf16,
    and one step apart by bf16 roundings only (it multiplies in bf16, we in float32)."""
    noise, scheduler = torch.randn(2, *SHAPE).bfloat16(), cogvideox_scheduler(solver.upper(), 20)
    x, before, ours, generator = None, None, *(torch.Generator().manual_seed(5) for _ in range(2))
    path = visited(diffusion.VPrediction(), noise, 20, solver=solver, generator=ours)
    assert all(x_t.dtype == torch.bfloat16 for x_t in path)
    for step, x_t, after in zip(scheduler.timesteps, path, path[1:]):
        x_t = x_t.transpose(1, 2)
        if solver == "ddim":
            expected = scheduler.step(wavy(x_t, step.view(1)).float(), int(step), x_t).prev_sample
        else:
            expected, x = scheduler.step(wavy(x_t, step.view(1)).float(), x, step, before, x_t,
                                         generator=generator)
        before = step
        torch.testing.assert_close(after.float(), expected.transpose(1, 2).float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parity
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("solver", ["wan-euler", "unipc"])
def test_wans_grids_to_the_bit(solver, shift, steps):
    scheduler, process = wan_scheduler(solver, steps, shift), diffusion.FlowMatching("v", shift=shift)
    heard = told(process, steps, solver)
    assert torch.equal(torch.tensor(process.times(steps, solver)), scheduler.sigmas)
    # int64 of unipc, float32 of Euler
    assert torch.equal(heard, scheduler.timesteps) and heard.dtype == scheduler.timesteps.dtype


@pytest.mark.parity
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_wans_euler_step_by_step(shift, steps):
    """Not to the bit, as DDIM: the reference adds (sigma' - sigma) v to x_t."""
    scheduler, noise = wan_scheduler("wan-euler", steps, shift), torch.randn(2, *SHAPE)
    path = visited(diffusion.FlowMatching("v", shift=shift), noise, steps, solver="wan-euler")
    for t, x_t, after in zip(scheduler.timesteps, path, path[1:]):
        assert largest(scheduler.step(wavy(x_t, t.view(1)), t, x_t).prev_sample, after) <= 1e-6


@pytest.mark.parity
@pytest.mark.parametrize("steps", STEPS + [3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_unipc_is_diffusers_all_the_way(shift, steps):
    """Differences add up here; the reference takes its logarithms in float32."""
    scheduler, noise = wan_scheduler("unipc", steps, shift), torch.randn(2, *SHAPE)
    path, x_t = visited(diffusion.FlowMatching("v", shift=shift), noise, steps, solver="unipc"), noise
    for t, after in zip(scheduler.timesteps, path[1:]):
        x_t = scheduler.step(wavy(x_t, t.view(1)), t, x_t).prev_sample
        assert largest(x_t, after) < 2e-5


# --- solvers against the Gaussian, and their noise
def test_unipc_is_of_third_order():
    """Half the step, an eighth of the error half-way to the clip:
    second order predicted, one more from the corrector. (Euler: a half.)"""
    process, noise, error = diffusion.FlowMatching("v"), torch.randn(4, *SHAPE), []
    for steps in (10, 20, 40):
        times = process.times(steps, "unipc")
        clock, t = iter(times), times[steps // 2]
        # the exact time, not the one cut off
        network = lambda x, _: denoiser(process, 0.7, 0.4)(x, torch.full((4,), 1000 * next(clock)))
        exact_flow = (1 - t) * 0.7 + math.sqrt((1 - t) ** 2 * 0.4**2 + t**2) * noise
        error.append(largest(visited(process, noise, steps, network, solver="unipc")[steps // 2], exact_flow))
    assert error[0] / error[1] > 6 and error[1] / error[2] > 6


def test_dpm_samples_the_gaussian_in_mean_and_variance():
    """Fresh noise in every step, and yet the spread of the data comes out:
    what is put in must match what is taken away."""
    process = diffusion.VPrediction("v")
    noise = torch.randn(200, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = process.sample(alone(denoiser(process, 0.7, 0.4)), noise, 200, solver="dpm",
                       generator=torch.Generator().manual_seed(0))
    assert abs(x.mean() - 0.7) < 0.01 and abs(x.std() - 0.4) < 0.01
    # the first noise is forgotten
    assert abs(torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1]) < 0.05


def test_noise_has_diffusers_layout(kind):
    """(B, F, C, H, W) in CogVideoX's pipeline, (B, C, F, H, W) in Wan's;
    a list of generators is a generator a clip, as there."""
    process, (C, F, H, W) = BOTH[kind](), SHAPE
    seeded = lambda seed=3: torch.Generator().manual_seed(seed)

    def one_clip(g):
        if kind == "vpred":
            return torch.randn(1, F, C, H, W, generator=g).transpose(1, 2)
        return torch.randn(1, *SHAPE, generator=g)
    first, second = (one_clip(seeded(i)) for i in (3, 4))
    assert torch.equal(process.randn((1, *SHAPE), seeded()), first)
    assert process.randn((1, *SHAPE), seeded()).is_contiguous()
    assert torch.equal(process.randn((2, *SHAPE), [seeded(3), seeded(4)]), torch.cat([first, second]))
    assert process.randn((1, *SHAPE), seeded(), torch.bfloat16).dtype == torch.bfloat16


def test_dpm_is_a_function_of_its_generators():
    process = diffusion.VPrediction()
    noise = torch.randn(3, *SHAPE)
    seeded = lambda *seeds: [torch.Generator().manual_seed(i) for i in seeds]
    whole = process.sample(alone(wavy), noise, 6, solver="dpm", generator=seeded(0, 1, 2))
    one = lambda i: process.sample(alone(wavy), noise[i : i + 1], 6, solver="dpm", generator=seeded(i))[0]
    assert all(torch.equal(one(i), whole[i]) for i in range(3))
    assert not torch.equal(process.sample(alone(wavy), noise, 6, solver="dpm", generator=seeded(3, 1, 2))[0],
                           whole[0])
    assert process.sample(alone(wavy), noise, 6, solver="dpm").isfinite().all()  # without one: torch's own


def test_an_unknown_solver_is_refused_in_a_sentence(kind):
    process, other = BOTH[kind](), {"flow": "dpm", "vpred": "unipc"}[kind]
    for call in (lambda: process.times(5, other),
                 lambda: process.sample(alone(wavy), torch.zeros(1, *SHAPE), 5, solver=other)):
        with pytest.raises(ValueError,
                           match=f"no solver '{other}': choose from {', '.join(process.solvers)}"):
            call()
    assert {name for both in BOTH.values() for name in both.solvers} == set(diffusion.SOLVERS)


# --- guidance
@pytest.mark.parametrize("solver", list(diffusion.SOLVERS))
def test_guidance_1_is_the_conditional_model(solver):
    process, noise = next(p("v") for p in BOTH.values() if solver in p.solvers), torch.randn(2, *SHAPE)
    poison = both(wavy, lambda x_t, model_time: torch.full_like(x_t, torch.nan))  # seen wherever it is used
    guided, free = (process.sample(denoise, noise, 5, solver=solver,
                                   generator=torch.Generator().manual_seed(0), **how)
                    for denoise, how in ((poison, dict(guidance=1)), (alone(wavy), {})))
    assert torch.equal(guided, free)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.5, 6.0])
def test_guidance_formula(kind, w):
    """u + w (c - u) at every step, which is the sample of a network that outputs just that."""
    process, noise = BOTH[kind]("v"), torch.randn(2, *SHAPE)
    other = lambda x, t: torch.cos(x) * 0.3
    guided = process.sample(both(wavy, other), noise, 5, guidance=w)
    joined = lambda x, t: (1 - w) * other(x, t) + w * wavy(x, t)
    torch.testing.assert_close(guided, process.sample(alone(joined), noise, 5), atol=1e-4, rtol=1e-4)


@pytest.mark.parity
def test_dynamic_guidance_is_the_pipelines():
    """The expression that stands in diffusers' CogVideoXPipeline, read there and evaluated."""
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")
    formula = seams.dynamic_guidance()
    for steps in (50, 25, 7):
        for step, _, _ in diffusion.VPrediction().plan(steps, "dpm"):
            expected = eval(formula,
                            dict(math=math, guidance_scale=6.0, num_inference_steps=steps,
                                 t=torch.tensor(step)))
            assert diffusion.VPrediction().dynamic(6.0, step, steps) == expected


def test_dynamic_guidance_leaps():
    weights = [diffusion.VPrediction().dynamic(6.0, step, 50)
               for step, _, _ in diffusion.VPrediction().plan(50, "dpm")]
    assert weights[:5] == pytest.approx([2.29, 2.54, 6.97, 6.42, 2.79], abs=0.005)
    assert sum(weights) / 50 == pytest.approx(3.8, abs=0.05)
    process, noise, other = diffusion.VPrediction(), torch.randn(2, *SHAPE), lambda x, t: torch.cos(x) * 0.3
    weight = lambda t: process.dynamic(6.0, int(t[0]), 10)
    guided = process.sample(both(wavy, other), noise, 10, 6.0, dynamic=True)
    joined = lambda x, t: other(x, t) + weight(t) * (wavy(x, t) - other(x, t))
    torch.testing.assert_close(guided, process.sample(alone(joined), noise, 10))
    with pytest.raises(ValueError, match="CogVideoX"):
        diffusion.FlowMatching().sample(both(wavy, other), noise, 10, 6.0, dynamic=True)


def test_guidance_is_float32_whatever_the_network_gives():
    noise, other = torch.randn(2, *SHAPE), lambda x, t: (torch.cos(x) * 0.3).bfloat16()
    network = lambda x, t: wavy(x, t).bfloat16()
    joined = lambda x, t: other(x, t).float() + 6.0 * (network(x, t).float() - other(x, t).float())
    assert torch.equal(diffusion.VPrediction().sample(both(network, other), noise, 5, 6.0),
                       diffusion.VPrediction().sample(alone(joined), noise, 5))


def test_a_sampled_clip_does_not_depend_on_its_batch(kind):
    process, noise = BOTH[kind]("x"), torch.randn(3, *SHAPE)
    whole = process.sample(alone(wavy), noise, 6)
    assert all(torch.equal(process.sample(alone(wavy), noise[i : i + 1], 6)[0], whole[i]) for i in range(3))


def test_watch_hears_each_steps_start(kind):
    process = BOTH[kind]()
    for solver in (None, *process.solvers):
        heard = []
        process.sample(alone(wavy), torch.randn(1, *SHAPE), 7, watch=heard.append, solver=solver)
        assert heard == process.times(7, solver)[:-1]


def test_build_hands_every_field_on():
    flow = diffusion.build(config.preset(predict="eps", time_mean=0.3, time_std=0.7, shift=2.0))
    assert isinstance(flow, diffusion.FlowMatching)
    assert (flow.predict, flow.mean, flow.std, flow.shift) == ("eps", 0.3, 0.7, 2.0)
    vpred = diffusion.build(config.preset(process="vpred", predict="v", snr_shift=3.0))
    assert isinstance(vpred, diffusion.VPrediction) and vpred.predict == "v"
    assert torch.equal(vpred.alpha_bar, diffusion.VPrediction("v", 3.0).alpha_bar)
