"""Calibration with training: plan whole stages in INT8, train their weights and ranges to the rounding, and write INT8 if it pays.

A second training with the same losses, recordings and steps, but without rounding, is evaluated too. It shows how much of the result is
due to more training rather than to training in INT8. The float graphs of the bundle keep their weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from melrt.bundle import Bundle
from melrt.checks import check_fields, number, one_of, whole
from melrt.errors import CalibrationError
from melrt.files.atomic import atomic_write
from melrt_calibration.bundle_graphs import FloatGraphs
from melrt_calibration.calibrate import CalibrationOptions, final_evaluator
from melrt_calibration.data import AUDIO_SUFFIXES, CalibrationData, list_files, load_data
from melrt_calibration.evaluation import Evaluator
from melrt_calibration.network import Network
from melrt_calibration.progress import OnProgress, ProgressReporter
from melrt_calibration.repairs import choose_equalization
from melrt_calibration.requantize import Requantized, Trained, compare_trained, load_matching
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.int8_plan import Int8Plan
from melrt_export.training.activation_ranges import read_trained_plan
from melrt_export.training.config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    MachineConfig,
    OptimizerConfig,
    QuantizationConfig,
    ScheduleConfig,
    TrainingConfig,
)
from melrt_export.training.distributed import ProcessGroup, choose_device
from melrt_export.training.state import FILE as STATE
from melrt_export.training.trainer import Trainer

PLANNING_STEPS, OTHER_STEPS = 4, 6
# A plan may exceed the budget by this factor before training, which removed 62 to 78 % of the error that INT8 added to two voices.
PLANNED_SHARE = 10.0
PLAN, CONTROL, SETTINGS = "plan.json", "control.json", "settings.json"
VALIDATIONS, SAVES = 10, 50


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """Settings of the training."""

    checkpoint: Path
    """Checkpoint that the bundle was exported from."""
    run: Path
    """Folder of the run; a run that was interrupted continues from it."""
    steps: int = 1400
    """Training steps, from 10 to 1000000, in INT8 and again for the control."""
    batch: int = 4
    """Segments of 8192 samples in one step, from 1 to 65536."""
    learning_rate: float = 1e-4
    """Learning rate of the first step, from which it falls linearly to zero."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the training; `auto` takes a GPU if there is one. A run can continue on another device."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """Budget of the result and sampling of the observed windows."""

    def __post_init__(self) -> None:
        rules = {"steps": whole(10, 1_000_000), "batch": whole(1, 1 << 16), "learning_rate": number(1e-9, 1)}
        check_fields(self, rules | {"device": one_of("auto", "cpu", "cuda")}, "training in INT8")


def calibrate_and_train(
    bundle: Bundle,
    speech: Sequence[Path],
    options: TrainingOptions,
    evaluation_speech: Sequence[Path] = (),
    on_progress: OnProgress = lambda _: None,
) -> Requantized:
    """Plan INT8, train it and a control in FP32, evaluate both, and add INT8 to the bundle if it pays.

    Args:
        bundle: Bundle with FP32 graphs.
        speech: Recordings. A fifth is held out; it chooses the plan and the best step.
        options: Checkpoint, run folder and settings. A call with the folder of an interrupted run continues it.
        evaluation_speech: Other speech for the final evaluation; the held-out speech if empty.
        on_progress: Called as each step begins, and after each measurement or training step.

    Raises:
        CalibrationError: The checkpoint is not that of the bundle, the run folder has other settings, or no stage can be in INT8.
        TrainingError: The device is `cuda` and there is none, or the recordings cannot be used for training.
    """
    processes = ProcessGroup(choose_device(MachineConfig(options.device)))
    run, sampling = options.run, options.calibration.sampling
    planned = (run / PLAN).is_file()
    steps = ProgressReporter(OTHER_STEPS + PLANNING_STEPS * (not planned), on_progress)
    steps.begin("reading the speech and the graphs")
    checkpoint = _load_source(options.checkpoint, bundle)
    data = load_data(speech, bundle.manifest, sampling)
    _prepare_run(run, _settings(checkpoint, data, options), speech, data)
    graphs = FloatGraphs.read(bundle)
    held_out = Evaluator(data.held_out, bundle.manifest.spec)
    evaluator = final_evaluator(bundle, data, evaluation_speech, sampling.peak) or held_out
    if not planned:
        _save_plan(run / PLAN, _plan_stages(graphs, data, held_out, options, steps))
        _save_plan(run / CONTROL, Int8Plan(()))
    steps.begin("training in INT8", options.steps)
    trained = _train(_config(options, PLAN), processes, steps)
    steps.begin("training as long without rounding", options.steps)
    control = load_checkpoint(_train(_config(options, CONTROL), processes, steps))
    weights = load_checkpoint(trained)
    plan = read_trained_plan(weights.source)
    assert plan is not None
    return compare_trained(bundle, graphs, Trained(weights, plan, control), evaluator, options.calibration, steps)


def _load_source(path: Path, bundle: Bundle) -> Checkpoint:
    """Load the checkpoint that the bundle was exported from."""
    checkpoint = load_matching(path, bundle)
    expected = bundle.manifest.provenance.get("sha256")
    if expected and checkpoint.sha256 != expected:
        raise CalibrationError(
            f"{checkpoint.source} is not the checkpoint that {bundle.path} was exported from: its SHA-256 is {checkpoint.sha256[:12]}..., "
            f"and the bundle names {expected[:12]}.... Give that checkpoint, or export this one."
        )
    return checkpoint


def _settings(checkpoint: Checkpoint, data: CalibrationData, options: TrainingOptions) -> dict[str, Any]:
    """Return everything that two calls must have in common to continue one run."""
    return {
        "checkpoint": checkpoint.sha256, "speech": sorted(digest.hex()[:16] for digest in data.digests),
        "steps": options.steps, "batch": options.batch, "learning_rate": options.learning_rate,
        "sampling": asdict(options.calibration.sampling), "budget": asdict(options.calibration.budget),
    }  # fmt: skip


def _prepare_run(run: Path, settings: dict[str, Any], speech: Sequence[Path], data: CalibrationData) -> None:
    """Write the run's settings and lists of recordings, or check that the run was begun with the same settings."""
    path = run / SETTINGS
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := [name for name in settings if settings[name] != before.get(name)]:
            raise CalibrationError(
                f"{run} was begun with another {' and '.join(differing)}. Repeat the command with the same settings to continue it, "
                "or name another folder with --run."
            )
        return
    if run.exists() and any(run.iterdir()):
        raise CalibrationError(f"{run} is not empty and holds no run of `melrt calibrate --train`. Name another folder with --run.")
    held_out = {piece.recording for piece in data.held_out}
    recordings = [path for path in list_files(speech) if path.suffix.lower() in AUDIO_SUFFIXES]
    parts = {"train": [p for p in recordings if str(p) not in held_out], "held-out": [p for p in recordings if str(p) in held_out]}
    if not all(parts.values()):
        raise CalibrationError(
            f"Training needs at least two recordings; the speech has {len(recordings)} .wav or .flac files. Mels have no audio to train on."
        )
    run.mkdir(parents=True, exist_ok=True)
    for name, files in parts.items():
        _write(run / f"{name}.txt", "".join(f"{file.resolve()}\n" for file in files))
    _write(path, json.dumps(settings, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _save_plan(path: Path, plan: Int8Plan) -> None:
    _write(path, plan.dumps())


def _plan_stages(
    graphs: FloatGraphs, data: CalibrationData, held_out: Evaluator, options: TrainingOptions, steps: ProgressReporter
) -> Int8Plan:
    """Plan the largest number of whole stages, from the first, whose error before training is within a multiple of the budget.

    Whole stages keep bytes between their convolutions. A choice layer by layer would need a sensitivity for each of them, and training
    changes these.
    """
    steps.begin("collecting statistics of the float network", len(data.windows))
    plain = Network.observed(graphs.models, data.windows, on_window=steps.advance)
    network = plain.equalized(choose_equalization(plain, held_out, steps))
    reference = held_out.quality(network.model(()))
    ends = [
        i for i in range(1, len(network.names) + 1) if i == len(network.names) or _stage(network.names[i]) != _stage(network.names[i - 1])
    ]
    steps.begin("choosing the stages", len(ends))
    most = PLANNED_SHARE * options.calibration.budget.log_mel
    for end in reversed(ends):
        names = network.names[:end]
        increase = held_out.quality(network.model(names)).error_increase(reference)
        steps.advance()
        if increase <= most:
            return network.selected(names)
    raise CalibrationError(
        f"Even the first convolution alone in INT8 adds {increase:.1%} of error before training; the plan may add {most:.1%}, "
        f"{PLANNED_SHARE:g} times the budget. A larger --budget allows more."
    )


def _stage(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _config(options: TrainingOptions, plan: str) -> TrainingConfig:
    """Return the configuration of one training; a plan without layers trains in FP32 with the same losses."""
    run, every, save_every = options.run, max(1, options.steps // VALIDATIONS), max(1, options.steps // SAVES)
    return TrainingConfig(
        run=str(run / plan.removesuffix(".json")), start_from=str(options.checkpoint), seed=options.calibration.sampling.seed,
        data=DataConfig(str(run / "train.txt"), str(run / "held-out.txt"), batch=options.batch, workers=0,
                        peak=options.calibration.sampling.peak or 1.0, unusable="skip"),
        discriminator=DiscriminatorConfig(scales=1, channels=4, layers=1),  # not trained, but part of each saved state
        losses=LossConfig(adversarial=0.0, feature_matching=0.0, mel=5.0),
        quantization=QuantizationConfig(str(run / plan), learn_ranges=True),
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, zero_at=options.steps),
        machine=MachineConfig(options.device),
        schedule=ScheduleConfig(options.steps, log_every=every, validate_every=every, best="log_mel", save_every=save_every),
    )  # fmt: skip


def _train(config: TrainingConfig, processes: ProcessGroup, steps: ProgressReporter) -> Path:
    """Train until the end, from the saved state if there is one, and return the best checkpoint."""
    trainer = Trainer(config, resume=(Path(config.run) / STATE).is_file(), processes=processes)
    trainer.callbacks = [_Progress(steps)]
    steps.advance(trainer.history.step)
    return trainer.run().best


class _Progress:
    """Reports each training step."""

    def __init__(self, steps: ProgressReporter) -> None:
        self._steps = steps

    def on_step(self, step: int) -> None:
        self._steps.advance()

    def on_losses(self, step: int, values: object) -> None:
        pass

    def on_validation(self, validation: object, best: bool) -> None:
        pass
