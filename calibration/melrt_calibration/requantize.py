"""INT8 with weights that were trained in it. Layers and ranges are those of the bundle's plan.

In float such weights are not what they are in INT8: the bundle's float graphs keep their own, and are what INT8 is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.bundle import Bundle
from melrt.errors import CalibrationError
from melrt_calibration import timing
from melrt_calibration.calibrate import FINAL_ROUNDS, PRECISIONS, SOURCES, Options, decide, float_graphs, write
from melrt_calibration.data import read
from melrt_calibration.evaluation import Evaluator, Quality
from melrt_calibration.network import Network
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.graph.deploy import deploy_graph
from melrt_export.int8_plan import read_plan


@dataclass(frozen=True, slots=True)
class Requantized:
    """What weights trained in INT8 are worth."""

    names: tuple[str, ...]
    """The layers in INT8."""
    judged: dict[str, Quality]
    """`fp32` is the bundle's, `int8` and, where made, `int8-fp16` have the trained weights."""
    speedup: float
    """FP32's time over INT8's, one window on one thread."""
    verdict: str
    written: bool


def requantize(
    bundle: Bundle, weights: Path, speech: Sequence[Path], options: Options, on_step: Callable[[str], None] = lambda _: None
) -> Requantized:
    """Give a calibrated voice's INT8 graphs weights that were trained with its plan; its plan says which layers, and with which ranges.

    Args:
        bundle: The voice that the training started from, with its INT8 plan and its float graphs.
        weights: The checkpoint that the training left.
        speech: To judge by; none of it should have been trained on.
        options: Budget, against the bundle's FP32, and the recordings' peak.
        on_step: Called with a few words as each step begins.

    Raises:
        CalibrationError: The bundle has no plan or no FP32 graphs, or the checkpoint is of another architecture or convention.
        CheckpointError: The checkpoint cannot be read.
    """
    on_step("reading the weights and the speech")
    plan, (sources, floats) = read_plan(bundle), float_graphs(bundle)
    checkpoint = _of_the_same_shape(load_checkpoint(weights), bundle)
    network = Network.planned(
        {(graph, form): deploy_graph(checkpoint.config, checkpoint.weights, SOURCES[form], graph) for graph, form in sources}, plan
    )
    judge = Evaluator(read(speech, bundle.manifest, options.sampling.peak), bundle.manifest.spec)
    on_step("judging")
    qualities = {"fp32": judge.quality(floats["edge", "cpu"])}
    qualities |= {PRECISIONS[form]: judge.quality(network.model(plan.names, form=form)) for graph, form in sources if graph == "edge"}
    on_step("timing")
    mel = timing.window(max(judge.pieces, key=lambda piece: piece.mel.shape[1]).mel)
    seconds = timing.seconds({"fp32": floats["interior", "cpu"], "int8": network.model(plan.names, "interior")}, mel, rounds=FINAL_ROUNDS)
    speedup = float(np.median(seconds["fp32"] / seconds["int8"]))
    pays, verdict = decide(qualities, options.budget, speedup, found=True)
    written = pays or options.force
    if written:
        on_step("writing")
        write(bundle, network, plan.names, qualities, sources, options.budget)
    return Requantized(plan.names, qualities, speedup, verdict, written)


def _of_the_same_shape(checkpoint: Checkpoint, bundle: Bundle) -> Checkpoint:
    for what, mine, theirs in (
        ("architecture", checkpoint.config.to_dict(), dict(bundle.manifest.architecture)),
        ("mel convention", checkpoint.spec, bundle.manifest.spec),
    ):
        if mine != theirs:
            raise CalibrationError(
                f"{checkpoint.source} has another {what} than {bundle.path}: {mine} against {theirs}. "
                "Give the checkpoint of a training that started from this voice, with its plan under [quantization]."
            )
    return checkpoint
