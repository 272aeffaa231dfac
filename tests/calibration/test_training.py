"""Calibration with training: learned ranges, and one command that plans, trains, evaluates and continues where it was interrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import library

from melrt.bundle import Bundle
from melrt.errors import CalibrationError
from melrt.files.audio import read_audio, resample
from melrt_calibration import timing, training
from melrt_calibration.calibrate import CalibrationOptions
from melrt_calibration.data import Piece, Sampling, load_data
from melrt_calibration.evaluation import Budget, Evaluator
from melrt_calibration.progress import Progress
from melrt_calibration.requantize import Requantized
from melrt_calibration.training import TrainingOptions, calibrate_and_train
from melrt_export.assets import RECORDING
from melrt_export.checkpoints import load_checkpoint, native, training_run
from melrt_export.generator.config import GeneratorConfig
from melrt_export.graph.deploy import deploy_graph
from melrt_export.int8_plan import Int8Plan, LayerPlan, Range, read_plan
from melrt_export.parity import probe_mel, verify
from melrt_export.training import step
from melrt_export.training.activation_ranges import ActivationRanges, read_trained_plan, trained_plan
from melrt_export.training.config import DataConfig, DiscriminatorConfig, Int8Form, LossConfig, TrainingConfig
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.quantized import DistillationLoss, quantize
from melrt_export.training.state import FILE as STATE
from melrt_export.training.voice import create_voice

pytestmark = pytest.mark.usefixtures("one_thread")

ANY = CalibrationOptions(Budget(10.0, 100.0), Sampling(windows=8))


@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
@pytest.mark.parametrize(("low", "high"), [(-9.0, 9.0), (-0.3, 0.5)], ids=["too wide", "too narrow"])
def test_training_finds_a_range_with_less_error(form: Int8Form, low: float, high: float) -> None:
    """The ends move towards those of the values, from -1 to 2 in two channels with different factors."""
    given = Range(low, high, "minmax")
    plan = Int8Plan((LayerPlan("x", given, given, (1.0,)),))
    owner = torch.nn.Module()
    rounded = ActivationRanges(plan, form, owner).activation(given, (1.0, 4.0))
    x = (3 * torch.rand(1, 2, 500, generator=torch.Generator().manual_seed(0)) - 1) * torch.tensor([1.0, 4.0])[:, None]
    optimizer = torch.optim.Adam(owner.parameters(), 0.01)
    errors = []
    for _ in range(20):
        error = (rounded(x) - x).square().mean()
        errors.append(error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.2 * errors[0]
    found = trained_plan(owner, plan).layers[0].input
    assert found.method == "trained"
    assert abs(found.high - 2) < 0.75 * abs(high - 2)
    if form == "cpu":  # the symmetric grid of TensorRT has one end
        assert abs(found.low + 1) < 0.75 * abs(low + 1)


def every_convolution(generator: torch.nn.Module) -> Int8Plan:
    """Return a plan with equalization for each convolution; blocks are merged."""
    layers = []
    for name, conv in generator.named_modules():
        if not isinstance(conv, torch.nn.Conv1d | torch.nn.ConvTranspose1d) or name.endswith("shortcut"):
            continue
        parts, phases = 1 + name.endswith("pointwise"), conv.stride[0] if isinstance(conv, torch.nn.ConvTranspose1d) else 1
        scales, by_input, by_output = (0.1,) * (conv.out_channels * phases), (1.5,) * (conv.in_channels * parts), (0.5,) * conv.out_channels
        name = name.replace("pointwise", "merged")
        layers.append(LayerPlan(name, Range(-1.0, 2.0, "mse"), Range(-2.0, 1.0, "mse"), scales, by_input, by_output))
    return Int8Plan(tuple(layers))


@pytest.mark.parametrize("learn_ranges", [True, False])
def test_a_step_needs_only_the_device_and_never_waits_for_it(learn_ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device refuses values from another device, as a GPU does, and has no values that a step could wait for."""

    def moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        for part in module.modules():
            for parameter in part.parameters(recurse=False):
                there = torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, there)  # as on a GPU, the parameter remains the same object
            part._buffers.update({name: torch.empty_like(value, device=device) for name, value in part._buffers.items()})
        return module

    def rounded(x: torch.Tensor, *grid: object) -> tuple[torch.Tensor, torch.Tensor]:
        assert {value.device.type for value in (x, *grid[:3])} == {"meta"}
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)

    config = TrainingConfig(
        "run", DataConfig(""), generator=GeneratorConfig(channels=16, upsample_scales=(8, 8, 4), stacks=1),
        losses=LossConfig(adversarial=0, feature_matching=0, mel=5.0), discriminator=DiscriminatorConfig(scales=1, channels=4, layers=1),
    )  # fmt: skip
    voice = create_voice(config)
    teacher = quantize(voice, every_convolution(voice.generator), "cpu", learn_ranges=learn_ranges)
    monkeypatch.setattr(torch.nn.Module, "to", moved)
    monkeypatch.setattr(step, "_optimizer", lambda network, rate, _: torch.optim.Adam(network.parameters(), rate))  # not fused
    meta = torch.device("meta")
    with library._scoped_library("aten", "IMPL") as missing:
        missing.impl("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", rounded, "Meta")
        distillation = DistillationLoss(teacher.to(meta), 1.0)
        one = step.AdversarialStep(config, voice, ProcessGroup(meta), {"distillation": distillation})
        values = one(torch.empty(2, 8192, device=meta), 0)
    assert {value.device for value in values.values()} == {meta}
    assert all(parameter.grad is not None for parameter in one.generator.parameters())


@pytest.fixture
def voice(make_voice, tmp_path: Path) -> Path:
    return make_voice(GeneratorConfig(in_channels=8, channels=16, upsample_scales=(4, 2), stacks=2), tmp_path)[0]


@pytest.fixture
def speech(voice: Path, tmp_path: Path) -> Path:
    rate = Bundle.open(voice).manifest.spec.sample_rate
    audio = resample(read_audio(RECORDING, 22050), 22050, rate)[: 6 * rate]
    (tmp_path / "speech").mkdir()
    for i, part in enumerate(np.array_split(np.tile(audio, 2), 4)):
        soundfile.write(tmp_path / "speech" / f"{i}.wav", part * (1 - 0.1 * i), rate)
    return tmp_path / "speech"


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learning rates after each step of the trainings that follow. INT8 is measured as faster."""
    found: list[float] = []

    def on_losses(_: object, step: int, values: Mapping[str, float]) -> None:
        assert values.keys() >= {"mel", "distillation"}
        found.append(values["learning_rate"])

    monkeypatch.setattr(training._Progress, "on_losses", on_losses)
    monkeypatch.setattr(timing, "measure_speedup", lambda *_: 2.0)
    return found


def test_an_interrupted_training_continues_and_leaves_fp32_as_it_is(voice: Path, speech: Path, tmp_path: Path, rates: list[float]) -> None:
    bundle = Bundle.open(voice)
    before = {path.name: path.read_bytes() for path in voice.iterdir()}
    options = TrainingOptions(tmp_path / "checkpoint", tmp_path / "run", steps=10, batch=1, calibration=ANY)
    seen: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        seen.append(progress)
        if progress.text == "training in INT8" and progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_and_train(bundle, [speech], options, on_progress=interrupt)
    assert {path.name: path.read_bytes() for path in voice.iterdir()} == before
    planned = (tmp_path / "run" / "plan.json").read_bytes()
    assert [p.step for p in seen if not p.done] == list(range(1, 7)), "all steps up to the training are counted"

    with pytest.raises(CalibrationError, match="begun with another steps"):
        calibrate_and_train(bundle, [speech], TrainingOptions(options.checkpoint, options.run, 11, 1, calibration=ANY))
    seen.clear()
    result = calibrate_and_train(bundle, [speech], options, on_progress=seen.append)
    assert (tmp_path / "run" / "plan.json").read_bytes() == planned
    assert [p.done for p in seen if p.text == "training in INT8"][:2] == [0, 4], "four steps were saved"
    assert [p.step for p in seen if not p.done] == list(range(1, seen[0].steps + 1))
    check_finished(tmp_path / "run", load_data([speech], bundle.manifest, ANY.sampling).held_out, result)
    assert rates[-10:] == pytest.approx([1e-4 * (1 - step / 10) for step in range(1, 11)]), "the control's rate falls to zero"
    assert result.written
    assert result.names == Int8Plan.loads(planned).names
    assert "FP32 trained as long" in result.verdict
    check_written(Bundle.open(voice), before, Int8Plan.loads(planned))
    trained = len(rates)
    assert calibrate_and_train(bundle, [speech], replace(options, calibration=replace(ANY, force=True))).written
    assert len(rates) == trained, "with --force a finished run is evaluated and written, but not trained again"


def check_written(bundle: Bundle, before: Mapping[str, bytes], start: Int8Plan) -> None:
    """Check that a bundle has its FP32 graphs as before, and INT8 with every layer of the plan in its trained ranges."""
    assert {entry.file: bundle.read(entry) for entry in bundle.find("onnx", precision="fp32")}.items() <= before.items()
    written = read_plan(bundle)
    assert written.names == start.names
    assert all(
        layer.input.method == "trained" and layer.input != old.input for layer, old in zip(written.layers, start.layers, strict=True)
    )
    assert all(row.passed for row in verify(bundle))


def check_finished(run: Path, held_out: Sequence[Piece], result: Requantized) -> None:
    """Check the choices of a finished run: layers, recordings, the best step and the control."""
    assert Int8Plan.loads((run / "plan.json").read_bytes()).names[-1] == "last", "the budget allows every stage"
    train, other = ((run / f"{part}.txt").read_text().splitlines() for part in ("train", "held-out"))
    assert (len(train), len(other), len({*train, *other})) == (3, 1, 4), "no recording is in both parts"
    control = load_checkpoint(run / "control" / "best")
    assert read_trained_plan(control.source) == Int8Plan(()), "the control was trained without rounding"
    quality = Evaluator(held_out, control.spec).quality(deploy_graph(control.config, control.weights, "fp32", "edge"))
    assert result.evaluated["control"].log_mel_error == pytest.approx(quality.log_mel_error)
    for _, log_mel, error in training_run.read_header(run / "plan" / STATE)["validations"]:
        assert error == log_mel, "the log-mel, which the budget limits, chooses the best step"


def test_a_training_that_cannot_begin_is_refused(
    voice: Path, speech: Path, tmp_path: Path, make_voice, melrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    make_voice(GeneratorConfig(in_channels=8, channels=16, upsample_scales=(4, 2), stacks=2, final_tanh=False), tmp_path / "other")
    mels = tmp_path / "mels"
    mels.mkdir()
    for seed in range(4):
        np.save(mels / f"{seed}.npy", probe_mel(Bundle.open(voice).manifest.spec, 3000, seed) - np.float32(2))
    own, run = tmp_path / "checkpoint", ("--run", tmp_path / "run", "--windows", "8")
    trained = load_checkpoint(own)
    native.save(tmp_path / "trained", replace(trained, weights={name: 2 * value for name, value in trained.weights.items()}))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for arguments, message in (
        ((speech, "--train", tmp_path / "other" / "checkpoint", *run), "has another architecture"),
        ((speech, "--train", tmp_path / "trained", *run), "is not the checkpoint that"),
        ((mels, "--train", own, *run), "Mels have no audio to train on"),
        ((speech, "--train", own, "--run", speech), "is not empty and holds no run"),
        ((speech, "--train", own, "--steps", "3"), "steps is 3"),
        ((speech, "--train", own, "--device", "gpu"), "gpu"),
        ((speech, "--train", own, "--device", "cuda"), "finds no GPU on this machine"),
        ((speech, "--train", own, "--report", tmp_path / "x.html"), "leave one of them out"),
    ):
        code, _, err = melrt("calibrate", voice, *arguments)
        assert code == 2, err
        assert message in err
    assert not (tmp_path / "run").exists()
