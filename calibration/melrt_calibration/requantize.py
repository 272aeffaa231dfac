"""Requantization: give a voice's INT8 graphs weights that were trained in INT8. Layers and ranges remain those of the bundle's plan.

Such weights are not usable in float. The bundle's float graphs therefore keep their own weights, and INT8 is compared with those graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from melrt.bundle import Bundle
from melrt.errors import CalibrationError
from melrt_calibration import timing
from melrt_calibration.bundle_graphs import FLOAT_PRECISIONS, INT8_PRECISIONS, FloatGraphs, write_int8
from melrt_calibration.calibrate import CalibrationOptions
from melrt_calibration.data import read_pieces
from melrt_calibration.evaluation import Evaluator, Quality, decide, perceptual_facts
from melrt_calibration.network import Network
from melrt_calibration.progress import OnProgress, ProgressReporter
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.checkpoints.archives import is_archive
from melrt_export.graph.deploy import deploy_graph
from melrt_export.int8_plan import Int8Plan, read_plan
from melrt_export.training.activation_ranges import read_trained_plan

STEPS = 4


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of a training in INT8."""

    weights: Checkpoint
    """Trained weights."""
    plan: Int8Plan
    """Layers and ranges that they were trained with."""
    control: Checkpoint | None = None
    """Weights trained as long in FP32, whose quality is added to the verdict."""


@dataclass(frozen=True, slots=True)
class Requantized:
    """Result of a requantization."""

    names: tuple[str, ...]
    """Layers in INT8."""
    evaluated: dict[str, Quality]
    """Quality of the bundle's `fp32`, of `int8` and, if it was made, `int8-fp16` with the trained weights, and of the `control` if any."""
    speedup: float
    """FP32's time over INT8's time for one window on one thread."""
    verdict: str
    """Sentence that says whether INT8 pays, and why."""
    written: bool
    """True if INT8 was written to the bundle."""


def requantize(
    bundle: Bundle, weights: Path, speech: Sequence[Path], options: CalibrationOptions, on_progress: OnProgress = lambda _: None
) -> Requantized:
    """Give a calibrated voice's INT8 graphs weights that were trained with its plan.

    The layers and their ranges are those of the bundle's plan, or those that were trained and saved with the weights.

    Args:
        bundle: Voice that the training started from, with its INT8 plan and its float graphs.
        weights: Checkpoint from that training.
        speech: Speech for the evaluation, none of which should have been in the training.
        options: Budget, relative to the bundle's FP32, and the peak of the recordings.
        on_progress: Called as each step begins.

    Raises:
        CalibrationError: The bundle has no plan or no FP32 graphs, or the checkpoint has another architecture or mel convention.
        CheckpointError: The checkpoint cannot be read.
    """
    steps = ProgressReporter(STEPS, on_progress)
    steps.begin("reading the checkpoint and the speech")
    bundle_plan, graphs = read_plan(bundle), FloatGraphs.read(bundle)
    if is_archive(weights):
        raise CalibrationError(f"{weights} is an archive, in which trained ranges are not looked for. Unpack it, and give its folder.")
    checkpoint = load_matching(weights, bundle)
    evaluator = Evaluator(read_pieces(speech, bundle.manifest, options.sampling.peak), bundle.manifest.spec)
    plan = read_trained_plan(checkpoint.source) or bundle_plan
    return compare_trained(bundle, graphs, Trained(checkpoint, plan), evaluator, options, steps)


def compare_trained(
    bundle: Bundle,
    graphs: FloatGraphs,
    trained: Trained,
    evaluator: Evaluator,
    options: CalibrationOptions,
    steps: ProgressReporter,
) -> Requantized:
    """Compare INT8 with trained weights with the bundle's FP32, and write it if it pays. It makes three steps of progress.

    Args:
        bundle: Voice that the training started from.
        graphs: Its float graphs.
        trained: Result of the training.
        evaluator: Evaluation speech.
        options: Budget.
        steps: Progress of the run.
    """
    plan, checkpoint, control = trained.plan, trained.weights, trained.control
    models = {
        (graph, form): deploy_graph(checkpoint.config, checkpoint.weights, FLOAT_PRECISIONS[form], graph) for graph, form in graphs.entries
    }
    network = Network.planned(models, plan)
    steps.begin("evaluating INT8 against FP32")
    qualities = {"fp32": evaluator.quality(graphs.models["edge", "cpu"])}
    for graph, form in graphs.entries:
        if graph == "edge":
            qualities[INT8_PRECISIONS[form]] = evaluator.quality(network.model(plan.names, form=form))
    if control is not None:
        qualities["control"] = evaluator.quality(deploy_graph(control.config, control.weights, "fp32", "edge"))
    steps.begin("timing INT8 against FP32")
    window = timing.cut_window(max(evaluator.pieces, key=lambda piece: piece.mel.shape[1]).mel)
    speedup = timing.measure_speedup(graphs.models["interior", "cpu"], network.model(plan.names, "interior"), window)
    perceptual = perceptual_facts(evaluator, graphs.models["edge", "cpu"], network.model(plan.names))
    pays, verdict = decide(qualities, options.budget, speedup, found=True, perceptual=perceptual)
    written = pays or options.force
    steps.begin("writing the results")
    if written:
        write_int8(bundle, network, plan.names, qualities, graphs.entries, options.budget)
    return Requantized(plan.names, qualities, speedup, verdict, written)


def load_matching(weights: Path, bundle: Bundle) -> Checkpoint:
    """Load a checkpoint of the bundle's architecture and mel convention."""
    checkpoint = load_checkpoint(weights)
    for name, actual, expected in (
        ("architecture", checkpoint.config.to_dict(), dict(bundle.manifest.architecture)),
        ("mel convention", checkpoint.spec.to_dict(), bundle.manifest.spec.to_dict()),
    ):
        if actual != expected:
            keys = [key for key in {**expected, **actual} if actual.get(key) != expected.get(key)]
            differences = "; ".join(f"{key} is {actual.get(key)}, not {expected.get(key)}" for key in keys)
            raise CalibrationError(
                f"{checkpoint.source} has another {name} than {bundle.path}: {differences}. "
                "Give the checkpoint of a training that started from this voice, with its plan under [quantization]."
            )
    return checkpoint
