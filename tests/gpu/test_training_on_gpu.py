"""Training on a GPU: its gradients are the CPU's, a step waits for nothing, a stopped run resumes, and NCCL and compilation work."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from melrt.files.audio import read_audio
from melrt_export.assets import RECORDING

torch = pytest.importorskip("torch", reason="training needs PyTorch")

from melrt_export.generator.config import GeneratorConfig  # noqa: E402
from melrt_export.int8_plan import Int8Plan, LayerPlan, Range  # noqa: E402
from melrt_export.training.config import (  # noqa: E402
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    MachineConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from melrt_export.training.distributed import ProcessGroup  # noqa: E402
from melrt_export.training.quantized import DistillationLoss, quantize  # noqa: E402
from melrt_export.training.state import FILE  # noqa: E402
from melrt_export.training.step import AdversarialStep  # noqa: E402
from melrt_export.training.trainer import Trainer  # noqa: E402
from melrt_export.training.voice import create_voice  # noqa: E402

# PyTorch warns about the machine (TF32, cuDNN's plans, forks of a process with threads). Such warnings are shown, and fail nothing.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
GPU = "cuda"
# Learning rate at which float32 weights do not change, so that every step has the same gradients.
NO_RATE = 1e-9
# Steps after which Adam's first moment is the gradient to 0.1 %. GradScaler leaves steps out while it looks for its scale.
STEPS = 16
# Distance of all gradients of a network, relative to their norm. On a CPU, bfloat16 gave 0.37 for the generator.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.15}
# The same in INT8, where values between two bytes can round the other way. On a CPU, a batch louder by 1e-6 gave 2e-4.
INT8_TOLERANCE = 0.01


@pytest.fixture(autouse=True)
def exact_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN compute float32 in float32, and in the same order every time."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def config(precision: str = "float32", rate: float = NO_RATE, **changes: object) -> TrainingConfig:
    """Return a config with every term and small networks: a multi-band voice and two discriminators."""
    shape = GeneratorConfig(channels=64, upsample_scales=(8, 4, 2), stacks=2, out_channels=4, pqmf_taps=62)
    values = {
        "data": DataConfig("", batch=4),
        "generator": shape,
        "discriminator": DiscriminatorConfig(scales=2, channels=4, layers=3),
        "losses": LossConfig(stft=1.0, mel=5.0),
        "optimizer": OptimizerConfig(learning_rate=rate, discriminator_learning_rate=rate, average=0.9),
        "machine": MachineConfig(precision=precision),
    }
    return TrainingConfig("run", **values | changes)


def step_on(device: str, precision: str = "float32", **changes: object) -> tuple[AdversarialStep, torch.Tensor]:
    """Return a training step and a batch of speech on a device."""
    one = config(precision, **changes)
    batch = read_audio(RECORDING, 22050)[22050 : 22050 + 4 * 8192].reshape(4, 8192)
    return AdversarialStep(one, create_voice(one), ProcessGroup(torch.device(device)), {}), torch.from_numpy(batch).to(device)


@functools.cache
def gradients(device: str, precision: str = "float32") -> tuple[dict[str, float], list[np.ndarray]]:
    """Return losses and the gradients of both networks after some steps."""
    step, batch = step_on(device, precision)
    for i in range(STEPS):
        values = step(batch, i)
    return {name: float(value) for name, value in values.items()}, moments(step)


def moments(step: AdversarialStep) -> list[np.ndarray]:
    """Return the first moment that Adam keeps of the gradients of generator and discriminators."""
    return [moment(step.generator, step.generator_optimizer), moment(step.discriminator, step.discriminator_optimizer)]


def moment(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> np.ndarray:
    return torch.cat([optimizer.state[parameter]["exp_avg"].flatten() for parameter in network.parameters()]).cpu().numpy()


def distance(one: np.ndarray, reference: np.ndarray) -> float:
    """Return the distance of all gradients of a network, relative to their norm."""
    assert np.isfinite(one).all()
    return float(np.linalg.norm(one - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_gradients_are_the_cpus(precision: str) -> None:
    expected, references = gradients("cpu")
    losses, found = gradients(GPU, precision)
    tolerance = TOLERANCES[precision]
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=tolerance / 2, abs=tolerance / 2), name
    for reference, one in zip(references, found, strict=True):
        print(f"{precision}: relative distance of the gradients {distance(one, reference):.1e}")
        assert distance(one, reference) < tolerance


@pytest.mark.parametrize("precision", TOLERANCES)
def test_step_does_not_wait_for_the_gpu(precision: str) -> None:
    step, batch = step_on(GPU, precision)
    for i in range(3):
        step(batch, i)
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = step(batch, 3)
        with pytest.raises(RuntimeError, match="synchroniz"):
            values["generator"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@functools.cache
def quantized_step(device: str, learn_ranges: bool) -> tuple[AdversarialStep, torch.Tensor]:
    """Return a step of a training in INT8 after some steps, and its batch. The second convolution of each block is equalized."""
    one = config(losses=LossConfig(adversarial=0.0, feature_matching=0.0, mel=5.0))
    voice, (_, batch) = create_voice(one), step_on(device)
    layers = [
        LayerPlan(name, Range(-3.0, 5.0, "mse"), Range(-6.0, 4.0, "mse"), (0.1,) * conv.out_channels, (1.5,) * conv.in_channels)
        for name, conv in voice.generator.named_modules()
        if name.endswith("dilated")
    ]
    teacher = quantize(voice, Int8Plan(tuple(layers)), "cpu", learn_ranges=learn_ranges).to(device)
    step = AdversarialStep(one, voice, ProcessGroup(torch.device(device)), {"distillation": DistillationLoss(teacher, 1.0)})
    for i in range(STEPS):
        step(batch, i)
    return step, batch


@pytest.mark.parametrize("learn_ranges", [True, False])
def test_int8_gradients_are_the_cpus_without_a_wait(learn_ranges: bool) -> None:
    steps = {device: quantized_step(device, learn_ranges)[0] for device in ("cpu", GPU)}
    reference, one = (moment(step.generator, step.generator_optimizer) for step in steps.values())
    print(f"INT8: relative distance of the gradients {distance(one, reference):.1e}")
    assert distance(one, reference) < INT8_TOLERANCE
    step, batch = quantized_step(GPU, learn_ranges)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch, STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fused_adam_equals_the_plain_one() -> None:
    step, _ = step_on(GPU)
    network = copy.deepcopy(step.generator)
    plain = torch.optim.Adam(network.parameters(), betas=config().optimizer.betas, fused=False, foreach=False)
    fused = step.generator_optimizer
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    noise = torch.Generator(GPU).manual_seed(0)
    for i in range(5):
        for one, other in zip(step.generator.parameters(), network.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=noise, device=GPU)
            other.grad = one.grad.clone()
        for optimizer in (plain, fused):
            optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            optimizer.step()
    one, other = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (step.generator, network))
    assert (other - before).abs().mean() > 1e-4
    assert (one - other).abs().max() < 1e-6


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """Distances are relative to the way that the weights went. Without Adam's moments the distance would be 0.2."""
    audio = read_audio(RECORDING, 22050)
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", audio[22050:66150], 22050)
    data = DataConfig(str(tmp_path / "train"), str(tmp_path / "validation"), batch=4, workers=1)
    base = config(rate=1e-4, data=data, schedule=ScheduleConfig(steps=8))

    def weights(name: str, *stops: int) -> dict[str, np.ndarray]:
        for i, until in enumerate(stops):
            trainer = Trainer(replace(base, run=str(tmp_path / name)), resume=i > 0, processes=ProcessGroup(torch.device(GPU)))
            trainer.run(until)
        return load_file(tmp_path / name / FILE)

    start, whole, parts = weights("start", 0), weights("whole", 8), weights("parts", 4, 8)
    for network in ("generator.", "discriminator.", "average."):
        names = [name for name in start if name.startswith(network)]
        way, apart = (sum(float(np.abs(a[name] - b[name]).sum()) for name in names) for a, b in ((whole, start), (whole, parts)))
        print(f"{network} distance {apart / way:.1e} of the way")
        assert way > 0
        assert apart < 0.02 * way


def test_averaging_over_nccl_keeps_the_gradients_of_one_process(tmp_path: Path) -> None:
    """The group has one process, and the training treats it like one of several."""
    plain, batch = step_on(GPU)
    parallel, _ = step_on(GPU)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        processes = ProcessGroup(torch.device(GPU, 0), 0, 2)
        parallel._processes = processes
        parallel.parallelize()
        assert processes.sum(2.0, 0.5) == [2.0, 0.5]
        assert processes.broadcast(lambda: "corpus") == "corpus"
        processes.barrier()
        for i in range(2):
            plain(batch, i)
            parallel(batch, i)
        for reference, one in zip(moments(plain), moments(parallel), strict=True):
            assert distance(one, reference) < TOLERANCES["float32"]
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_networks_have_the_same_gradients() -> None:
    """The smallest networks, because each of their layers takes seconds to compile."""
    shape = GeneratorConfig(channels=16, upsample_scales=(16, 16), stacks=1)
    small = {"generator": shape, "discriminator": DiscriminatorConfig(scales=1, channels=4, layers=1)}
    plain, batch = step_on(GPU, **small)
    compiled, _ = step_on(GPU, **small, machine=MachineConfig(compile=True))
    for i in range(2):
        plain(batch, i)
        compiled(batch, i)
    for reference, one in zip(moments(plain), moments(compiled), strict=True):
        assert distance(one, reference) < TOLERANCES["float32"]
