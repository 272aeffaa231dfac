"""Calibration: choose INT8 layers for a voice from speech, and add the INT8 graphs to the bundle if they pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from melrt.bundle import Bundle
from melrt.errors import CalibrationError
from melrt_calibration import timing
from melrt_calibration.bundle_graphs import FloatGraphs, write_int8
from melrt_calibration.data import CalibrationData, Sampling, load_data, read_pieces
from melrt_calibration.evaluation import Budget, Evaluator, Quality, decide, perceptual_facts
from melrt_calibration.network import Network
from melrt_calibration.progress import OnProgress, ProgressReporter
from melrt_calibration.repairs import Repair, choose_equalization, repair
from melrt_calibration.search import LayerSet, search
from melrt_calibration.sensitivity import Sensitivity, measure_sensitivities
from melrt_export.int8_plan import Int8Plan

STEPS = 11


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Settings of a calibration."""

    budget: Budget = field(default_factory=Budget)
    """Loss of quality that INT8 may cause."""
    sampling: Sampling = field(default_factory=Sampling)
    """Settings of the calibration data."""
    force: bool = False
    """Write INT8 even if it is not faster, or if no set of layers is within the budget (then with every layer)."""


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """Everything that a calibration measured and decided."""

    data: CalibrationData
    network: Network
    """Network with the chosen ranges and repairs."""
    powers: dict[str, float]
    """Power of the equalization, by tensor."""
    layers: list[Sensitivity]
    """Sensitivity of each convolution."""
    all_int8: Quality
    """Quality on held-out speech with all layers in INT8, before bias correction."""
    sets: list[LayerSet]
    """All measured sets of layers on held-out speech, the float graph first."""
    chosen: LayerSet
    """Chosen layers, with their quality after the repairs that were kept."""
    repairs: list[Repair]
    evaluated: dict[str, Quality]
    """Quality on the evaluation speech: `fp32`, `int8` and, if it was made, `int8-fp16`."""
    evaluator: Evaluator
    """Evaluator of that speech; the held-out speech if no other was given."""
    speedup: float
    """FP32's time over INT8's time for one window on one thread."""
    verdict: str
    """Sentence that says whether INT8 pays, and why."""
    written: bool
    """True if INT8 was written to the bundle."""

    @property
    def reference(self) -> Quality:
        """Quality of FP32 on held-out speech."""
        return self.sets[0].quality

    @property
    def plan(self) -> Int8Plan:
        """Plan of the INT8 layers."""
        return self.network.selected(self.chosen.names)


def calibrate(
    bundle: Bundle,
    speech: Sequence[Path],
    options: CalibrationOptions,
    evaluation_speech: Sequence[Path] = (),
    on_progress: OnProgress = lambda _: None,
) -> CalibrationResult:
    """Choose INT8 for a voice and add it to the bundle if it pays. The bundle changes in one step at the end, or not at all.

    Args:
        bundle: Bundle with FP32 graphs; if it has FP16 graphs too, the TensorRT form is made as well.
        speech: Recordings or mels to calibrate on; a fifth is held out, and every choice is measured on it.
        options: Budget and sampling.
        evaluation_speech: Other speech for the final evaluation; the held-out speech if empty.
        on_progress: Called as each step begins and after each measurement of a step.

    Raises:
        CalibrationError: No INT8 can be made from this speech, or the bundle has no FP32 graphs.
        BundleError: The bundle is damaged.
    """
    steps = ProgressReporter(STEPS, on_progress)
    steps.begin("reading the speech")
    graphs = FloatGraphs.read(bundle)
    data = load_data(speech, bundle.manifest, options.sampling)
    held_out = Evaluator(data.held_out, bundle.manifest.spec)
    final = final_evaluator(bundle, data, evaluation_speech, options.sampling.peak) or held_out
    window = timing.cut_window(max(data.held_out, key=lambda piece: piece.mel.shape[1]).mel)
    steps.begin("collecting statistics of the float network", len(data.windows))
    plain = Network.observed(graphs.models, data.windows, on_window=steps.advance)
    powers = choose_equalization(plain, held_out, steps)
    network, layers, all_int8 = measure_sensitivities(plain.equalized(powers), held_out, window, steps)
    sets, best = search(network, held_out, options.budget, layers, window, steps)
    network, chosen, repairs = repair(plain, network, best or LayerSet(network.names, all_int8), held_out, steps)
    steps.begin("evaluating and timing INT8 against FP32")
    evaluated = _evaluate(final, network, chosen.names, tensorrt=("edge", "tensorrt") in graphs.models)
    speedup = timing.measure_speedup(network.model((), "interior"), network.model(chosen.names, "interior"), window)
    perceptual = perceptual_facts(final, network.model(()), network.model(chosen.names))
    pays, verdict = decide(evaluated, options.budget, speedup, found=best is not None, perceptual=perceptual)
    written = pays or options.force
    steps.begin("writing the results")
    if written:
        write_int8(bundle, network, chosen.names, evaluated, graphs.entries, options.budget)
    return CalibrationResult(
        data, network, powers, layers, all_int8, sets, chosen, repairs, evaluated, final, speedup, verdict, written
    )  # fmt: skip


def final_evaluator(bundle: Bundle, data: CalibrationData, speech: Sequence[Path], peak: float | None) -> Evaluator | None:
    """Return the evaluator of other speech; None if none was given."""
    if not speech:
        return None
    pieces = read_pieces(speech, bundle.manifest, peak)
    if same := [piece.name for piece in pieces if piece.digest in data.digests]:
        raise CalibrationError(
            f"{', '.join(same)} is given both for calibration and for the final evaluation; give other speech for one of them."
        )
    return Evaluator(pieces, bundle.manifest.spec)


def _evaluate(evaluator: Evaluator, network: Network, names: Sequence[str], *, tensorrt: bool) -> dict[str, Quality]:
    qualities = {"fp32": evaluator.quality(network.model(())), "int8": evaluator.quality(network.model(names))}
    if tensorrt:
        qualities["int8-fp16"] = evaluator.quality(network.model(names, form="tensorrt"))
    return qualities
