"""The objective of one training step: the signs of its terms, the precision it computes in, and the learning rate."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from melrt.errors import ConfigError
from melrt.files.audio import read_audio
from melrt_benchmarks.training.bench import PlainLoop
from melrt_export.assets import RECORDING
from melrt_export.generator.config import GeneratorConfig
from melrt_export.training.coarse_losses import CoarseLosses
from melrt_export.training.config import DataConfig, DiscriminatorConfig, LossConfig, MachineConfig, OptimizerConfig, TrainingConfig
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.losses import adversarial_loss, feature_matching_loss
from melrt_export.training.mel import LogMel
from melrt_export.training.step import AdversarialStep
from melrt_export.training.voice import create_voice

# Ours runs recording and synthesis through the discriminators together, so sums over a batch have another order.
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def segments() -> torch.Tensor:
    audio = read_audio(RECORDING, 22050)
    return torch.from_numpy(np.ascontiguousarray(audio[:16384].reshape(2, 8192)))


def small_step(precision: str = "float32", optimizer: OptimizerConfig | None = None) -> AdversarialStep:
    config = TrainingConfig(
        "", DataConfig(""), generator=GeneratorConfig(channels=32), discriminator=DiscriminatorConfig(channels=4, layers=2),
        losses=LossConfig(adversarial=2.0, feature_matching=10.0, mel=1.0), optimizer=optimizer or OptimizerConfig(),
        machine=MachineConfig(precision=precision),  # type: ignore[arg-type]
    )  # fmt: skip
    return AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})


def test_the_generator_minimizes_each_term_with_its_weight(segments: torch.Tensor) -> None:
    values = small_step()(segments, 0)
    expected = 2 * values["adversarial"] + 10 * values["feature_matching"] + values["mel"]
    assert float(values["generator"]) == pytest.approx(float(expected), rel=1e-5)


def test_coarse_terms_are_in_the_objective(segments: torch.Tensor) -> None:
    losses = LossConfig(adversarial=0, feature_matching=0, energy=1.0, level=2.0, comb=0.5)
    config = TrainingConfig("", DataConfig(""), generator=GeneratorConfig(channels=32), losses=losses)
    values = AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})(segments, 0)
    assert values.keys() == {"energy", "level", "comb", "generator"}
    assert float(values["generator"]) == pytest.approx(float(values["energy"] + 2 * values["level"] + values["comb"] / 2), rel=1e-5)


def test_each_coarse_loss_finds_its_fault(segments: torch.Tensor) -> None:
    """The fault of one measure raises it far more than the others, in the units of the natural logarithm of power."""
    losses, time = CoarseLosses(hop=256), torch.arange(8192) / 22050
    tones = sum(torch.sin(2 * torch.pi * 22050 / 256 * harmonic * time + harmonic) for harmonic in range(12, 46))
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1, segments.shape).astype(np.float32))
    faults = {
        "level": segments / 2,  # 2 ln 2 = 1.39
        "comb": segments + 0.003 * tones,  # -50 dB each
        "energy": segments + 0.003 * noise * (segments.abs() < 0.01),  # in the pauses
    }
    found = {
        fault: {name: float(getattr(losses, name)(segments, output)) for name in ("energy", "level", "comb")}
        for fault, output in faults.items()
    }
    assert found["level"]["level"] == pytest.approx(1.386, abs=0.05)
    assert found["level"]["comb"] < 0.1
    assert found["comb"]["comb"] > 3 * found["comb"]["level"]
    assert found["energy"]["energy"] > 3 * found["energy"]["level"]
    assert found["comb"]["comb"] > 3 * found["energy"]["comb"]
    same = [float(getattr(losses, name)(segments, segments)) for name in ("energy", "level", "comb")]
    assert same == [0, 0, 0]
    short = segments[:, :2048]
    assert all(np.isfinite(float(getattr(losses, name)(short, short / 2))) for name in ("energy", "level", "comb"))


def test_a_step_uses_the_chosen_adversarial_loss(segments: torch.Tensor) -> None:
    """Random discriminators score near 0, where the hinge losses are 6 and 0, and the squared distances are 1 and 1."""
    found = {}
    for form in ("hinge", "least_squares"):
        config = TrainingConfig(
            "", DataConfig(""), generator=GeneratorConfig(channels=32), discriminator=DiscriminatorConfig(channels=4, layers=2),
            losses=LossConfig(adversarial_form=form),
        )  # fmt: skip
        values = AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})(segments, 0)
        found[form] = [float(values[name]) for name in ("discriminator", "adversarial")]
    assert found["hinge"] == pytest.approx([6, 0], abs=0.3)
    assert found["least_squares"] == pytest.approx([1, 1], abs=0.3)


def test_a_step_equals_that_of_an_independent_loop(segments: torch.Tensor) -> None:
    """Adam's first moment is half the gradient. Its first step moves a weight by the learning rate against the gradient's sign."""
    config = TrainingConfig("", DataConfig(""), generator=GeneratorConfig(channels=32))
    step = AdversarialStep(config, create_voice(config), ProcessGroup(torch.device("cpu")), {})
    before = {name: value.clone() for name, value in step.generator.named_parameters()}
    plain = PlainLoop(copy.deepcopy(step.generator), copy.deepcopy(step.discriminator), config.mel)
    step(segments[:, :4096], 0)
    plain(segments[:, :4096])
    pairs = ((step.generator, plain.generator), (step.discriminator, plain.discriminator))
    optimizers = ((step.generator_optimizer, plain.generator_optimizer), (step.discriminator_optimizer, plain.discriminator_optimizer))
    for networks, states in zip(pairs, optimizers, strict=True):
        for (name, ours), theirs in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
            mine, other = states[0].state[ours]["exp_avg"], states[1].state[theirs]["exp_avg"]
            if name.endswith("layers.6.bias"):
                assert max(mine.abs().max(), other.abs().max()) < 1e-7, "recording and synthesis pull the score with the same weight"
                continue
            error = GRADIENT_TOLERANCE * other.abs().max()
            assert error > 0, name
            assert (mine - other).abs().max() < error, name
            clear = other.abs() > error  # the sign of smaller gradients is rounding
            assert torch.allclose(ours[clear], theirs[clear], rtol=0, atol=1e-6), name
    moved = {name: float((value - before[name]).detach().abs().max()) for name, value in step.generator.named_parameters()}
    assert all(1e-6 < distance < 1.01e-4 for distance in moved.values()), "every weight moves, at most by the learning rate"


def test_better_scores_and_closer_features_lower_the_losses() -> None:
    low, high = ([[torch.ones(2, 4), torch.full((2, 1), score)]] * 3 for score in (-1.0, 1.0))
    assert adversarial_loss(high) < adversarial_loss(low)
    real, near, far = ([[torch.full((2, 4), x)] * 4] for x in (1.0, 1.1, 2.0))
    assert 0 < feature_matching_loss(real, near, "neurips") < feature_matching_loss(real, far, "neurips")


def test_a_lower_precision_computes_in_it(segments: torch.Tensor) -> None:
    for precision, expected in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        step = small_step(precision)
        types: list[torch.dtype] = []
        for network in (step.generator.first, step.discriminator):
            layer = next(m for m in network.modules() if isinstance(m, torch.nn.Conv1d))
            layer.register_forward_hook(lambda module, inputs, output, types=types: types.append(output.dtype))
        step(segments, 0)
        assert set(types) == {expected}
        assert len(types) > 2, "generator and discriminator"


def test_the_waveform_is_computed_in_float32(segments: torch.Tensor) -> None:
    """Last convolution, tanh and filter bank under autocast equal those that get the same features in float32."""
    shape = GeneratorConfig(channels=32, upsample_scales=(8, 4, 2), out_channels=4, pqmf_taps=62)
    config = TrainingConfig("", DataConfig(""), generator=shape)
    generator = create_voice(config).generator
    features: list[torch.Tensor] = []
    generator.stages.register_forward_hook(lambda module, inputs, output: features.append(output))
    mel = LogMel(config.mel).frames(segments)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            output = generator(mel)
        slope = generator.config.resolved_last_slope
        expected = generator.pqmf(torch.tanh(generator.last(torch.nn.functional.leaky_relu(features[0], slope).float())))
    assert features[0].dtype == torch.bfloat16
    assert output.dtype == torch.float32
    assert output.abs().max() > 1e-3
    assert torch.equal(output, expected)


def test_the_learning_rate_falls(segments: torch.Tensor) -> None:
    step = small_step(optimizer=OptimizerConfig(1e-3, 2e-3, decay_from=10, half_life=20))
    for at, factor in ((0, 1.0), (10, 1.0), (50, 0.25)):
        step(segments, at)
        assert step.generator_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)
        assert step.discriminator_optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 * factor)


def test_the_learning_rate_halves_at_milestones() -> None:
    """ParallelWaveGAN's MultiStepLR: the step with the number of the milestone is the first with the smaller rate."""
    schedule = OptimizerConfig(milestones=(10, 30))
    assert [schedule.rate_factor(at) for at in (0, 9, 10, 29, 30, 90)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    for settings in ({"milestones": (30, 10)}, {"milestones": (10, 10)}, {"milestones": (10,), "half_life": 5}):
        with pytest.raises(ConfigError, match="list each step once in ascending order, and leave half_life and zero_at at 0"):
            OptimizerConfig(**settings)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_limited_gradients_and_amsgrad(segments: torch.Tensor, precision: str) -> None:
    """Adam's first moment is half the gradient after one step, so its norm is half the limit; float16's scale is removed before."""
    limits = OptimizerConfig(1e-3, 1e-3, epsilon=1e-6, amsgrad=True, gradient_limit=0.5, discriminator_gradient_limit=1e-3)
    step = small_step(precision, optimizer=limits)
    if precision == "float16":
        step.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # the default overflows at first, and such steps are left out
    step(segments, 0)
    for optimizer, limit in ((step.generator_optimizer, 0.5), (step.discriminator_optimizer, 1e-3)):
        states = optimizer.state.values()
        assert {float(state["step"]) for state in states} == {1.0}
        norm = torch.stack([state["exp_avg"].norm() for state in states]).norm()
        assert norm == pytest.approx(limit / 2, rel=1e-3)
        assert all(torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"]) for state in states)
        assert optimizer.param_groups[0]["eps"] == 1e-6


def test_the_learning_rate_falls_linearly_to_zero() -> None:
    assert [OptimizerConfig(zero_at=40).rate_factor(at) for at in (0, 10, 39, 50)] == pytest.approx([1, 0.75, 0.025, 0])
    assert [OptimizerConfig(decay_from=10, zero_at=30).rate_factor(at) for at in (10, 25)] == pytest.approx([1, 0.25])
    for settings in ({"zero_at": 40, "half_life": 5}, {"zero_at": 40, "decay_from": 40}):
        with pytest.raises(ConfigError, match="set only one of zero_at and half_life, and zero_at to a step after decay_from"):
            OptimizerConfig(**settings)
