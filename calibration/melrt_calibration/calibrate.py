"""Calibration, from a bundle and real speech to INT8 graphs in the bundle, or to the verdict that INT8 does not pay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Artifact, Bundle
from melrt.errors import CalibrationError
from melrt.planning.windows import GraphKind
from melrt_calibration import timing
from melrt_calibration.bias_correction import corrected
from melrt_calibration.data import Data, Sampling, load, read
from melrt_calibration.equalization import POWERS, tensors
from melrt_calibration.evaluation import Budget, Evaluator, Quality
from melrt_calibration.network import Network
from melrt_calibration.qdq import Form
from melrt_calibration.search import Point, Sensitivity, search, sensitivities
from melrt_export.graph.deploy import GraphPrecision
from melrt_export.int8_plan import Plan
from melrt_export.parity import Difference, inside, reference_pair

logger = logging.getLogger(__name__)
Step = Callable[[str], None]

PRECISIONS: dict[Form, str] = {"cpu": "int8", "tensorrt": "int8-fp16"}
SOURCES: dict[Form, GraphPrecision] = {"cpu": "fp32", "tensorrt": "fp16"}
GRAPHS: tuple[GraphKind, ...] = ("edge", "interior")
PLAN_FILE = "int8.plan.json"
# Less than this is within what two runs of one graph differ by.
WORTH = 1.05
FINAL_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Options:
    """How to calibrate."""

    budget: Budget = field(default_factory=Budget)
    sampling: Sampling = field(default_factory=Sampling)
    force: bool = False
    """Write INT8 even if it is not faster, or nothing is within the budget (then every layer)."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What one repair changed, on the layers finally chosen and on all."""

    name: str
    chosen: Quality
    all_layers: Quality


@dataclass(frozen=True, slots=True)
class Result:
    """What calibration found."""

    data: Data
    network: Network
    reference: Quality
    """Of FP32 on held-out speech."""
    powers: dict[str, float]
    """Of the equalization, by tensor."""
    layers: list[Sensitivity]
    points: list[Point]
    chosen: Point
    """Its quality after all repairs that were kept."""
    repairs: list[Repair]
    judged: dict[str, Quality]
    """On the speech given for judging (or else the held-out): `fp32`, `int8` and, where made, `int8-fp16`."""
    judge: Evaluator
    """Of that speech."""
    speedup: float
    """FP32's time over INT8's, one window on one thread."""
    verdict: str
    written: bool

    @property
    def plan(self) -> Plan:
        """The INT8 layers."""
        return self.network.plan.only(frozenset(self.chosen.names))


def calibrate(
    bundle: Bundle, speech: Sequence[Path], options: Options, judged: Sequence[Path] = (), on_step: Step = lambda _: None
) -> Result:
    """Choose INT8 for a voice, and add it to the bundle where it pays; the bundle changes in one step at the end or not at all.

    Args:
        bundle: With FP32 graphs; with FP16 graphs the form for TensorRT is made too.
        speech: Audio or mels to calibrate on; a fifth is held out and judges every choice.
        options: Budget and sampling.
        judged: Other speech for the last judgement; the held-out speech if there is none.
        on_step: Called with a few words as each step begins.

    Raises:
        CalibrationError: Speech from which no INT8 can be made.
        BundleError: The bundle lacks FP32 graphs, or is damaged.
    """
    on_step("reading the speech")
    sources, graphs = float_graphs(bundle)
    data = load(speech, bundle.manifest, options.sampling)
    final = Evaluator(read(judged, bundle.manifest, options.sampling.peak), bundle.manifest.spec) if judged else None
    _refuse_overlap(data, final)
    judge = Evaluator(data.held_out, bundle.manifest.spec)
    on_step("observing")
    plain = Network.observed(graphs, data.windows)
    powers = _powers(plain, judge, on_step)
    network = plain.equalized(powers)
    mel = timing.window(max(data.held_out, key=lambda p: p.mel.shape[1]).mel)
    network, layers = sensitivities(network, judge, mel, on_step)
    points, best = search(network, judge, options.budget, layers, mel, on_step)
    chosen = best or Point(network.names, judge.quality(network.model(network.names)))
    network, chosen, repairs = _repair(plain, network, chosen, judge, on_step, equalized=any(powers.values()))
    on_step("the last judgement")
    final = final or judge
    qualities = {"fp32": final.quality(network.model(())), "int8": final.quality(network.model(chosen.names))}
    if ("edge", "tensorrt") in graphs:
        qualities["int8-fp16"] = final.quality(network.model(chosen.names, form="tensorrt"))
    seconds = timing.seconds(
        {"fp32": network.model((), "interior"), "int8": network.model(chosen.names, "interior")}, mel, rounds=FINAL_ROUNDS
    )
    speedup = float(np.median(seconds["fp32"] / seconds["int8"]))
    pays, verdict = decide(qualities, options.budget, speedup, found=best is not None)
    result = Result(
        data, network, points[0].quality, powers, layers, points, chosen, repairs, qualities, final, speedup, verdict,
        pays or options.force,
    )  # fmt: skip
    if result.written:
        on_step("writing")
        write(bundle, network, chosen.names, qualities, sources, options.budget)
    return result


def float_graphs(bundle: Bundle) -> tuple[dict[tuple[GraphKind, Form], Artifact], dict[tuple[GraphKind, Form], onnx.ModelProto]]:
    """What INT8 is made from, and held against: FP32 graphs, and FP16 ones if there are any.

    Raises:
        CalibrationError: There are no FP32 graphs.
    """
    sources: dict[tuple[GraphKind, Form], Artifact] = {}
    for form, precision in SOURCES.items():
        found = {graph: bundle.find("onnx", graph=graph, precision=precision) for graph in GRAPHS}
        if all(found.values()):
            sources |= {(graph, form): entries[0] for graph, entries in found.items()}
        elif form == "cpu":
            raise CalibrationError(f"{bundle.path} has no FP32 graphs to calibrate; export it with `--precision fp32`.")
        else:
            logger.warning("%s has no FP16 graphs: INT8 for TensorRT is left out. Export it with `--precision fp16` too.", bundle.path)
    return sources, {key: onnx.load_from_string(bundle.read(entry)) for key, entry in sources.items()}


def _refuse_overlap(data: Data, final: Evaluator | None) -> None:
    if final is None:
        return
    if same := [piece.name for piece in final.pieces if piece.digest in data.digests]:
        raise CalibrationError(f"{', '.join(same)} is both to calibrate on and to be judged by; give other speech for one of them.")


def _powers(plain: Network, judge: Evaluator, on_step: Step) -> dict[str, float]:
    """How much to equalize, by stage: the power whose layers, alone in INT8, cost least."""
    every = list(tensors(dict.fromkeys(plain.names)))
    made: dict[float, Network] = {}
    for power in POWERS:
        on_step(f"equalizing, power {power:g}")
        made[power] = plain.equalized({t.takers[0]: power for t in every}) if power else plain
    best: dict[str, float] = {}
    for stage in dict.fromkeys(_stage(t.takers[0]) for t in every):
        on_step(f"equalizing {stage}")
        group = [t for t in every if _stage(t.takers[0]) == stage]
        layers = {name for t in group for name in (*t.makers, *t.takers)}
        errors = {power: judge.quality(network.model(layers)).log_mel_error for power, network in made.items()}
        power = min(errors, key=lambda p: errors[p])
        best |= {t.takers[0]: power for t in group}
    return best


def _stage(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _repair(
    plain: Network, network: Network, chosen: Point, judge: Evaluator, on_step: Step, *, equalized: bool
) -> tuple[Network, Point, list[Repair]]:
    """Correct biases, keep them if that measures better, and tell what each repair brought."""

    def row(name: str, one: Network, other: Network | None = None) -> Repair:
        on_step(f"measuring {name}")
        return Repair(name, judge.quality(one.model(chosen.names)), judge.quality((other or one).model(one.names)))

    minmax = Network.observed(plain.graphs, plain.windows, "minmax")
    fixed, fixed_all = corrected(network, chosen.names), corrected(network, network.names)
    repairs = [
        row("min-max ranges", minmax),
        row("mean-squared-error ranges", plain),
        row("equalization, ranges by measurement", network),
        row("bias correction", fixed, fixed_all),
    ]
    kept = fixed if repairs[3].chosen.log_mel_error < repairs[2].chosen.log_mel_error else network
    applied = {"equalization": equalized, "bias correction": kept is fixed}
    names = tuple(name for name, done in applied.items() if done)
    quality = repairs[3].chosen if kept is fixed else repairs[2].chosen
    return replace(kept, plan=replace(kept.plan, repairs=names)), replace(chosen, quality=quality), repairs


def decide(qualities: dict[str, Quality], budget: Budget, speedup: float, *, found: bool) -> tuple[bool, str]:
    """Whether INT8 pays, and why or why not; `found`: whether any set of layers was within the budget."""
    above, louder = qualities["int8"].above(qualities["fp32"]), qualities["int8"].louder(qualities["fp32"])
    facts = f"{speedup:.2f} times FP32's speed on this CPU, log-mel error {100 * above:+.1f} %, silence {louder:+.1f} dB"
    if not found:
        return False, f"no set of INT8 layers is faster than FP32 within the budget; all layers in INT8: {facts}."
    if speedup < WORTH:
        return False, f"INT8 does not pay here: {facts}."
    if not budget.holds(qualities["int8"], qualities["fp32"]):
        return False, f"out of the budget on the judged speech: {facts}."
    return True, f"INT8 pays: {facts}."


def write(
    bundle: Bundle,
    network: Network,
    names: Sequence[str],
    judged: Mapping[str, Quality],
    sources: Mapping[tuple[GraphKind, Form], Artifact],
    budget: Budget,
) -> None:
    """All graphs with these layers in INT8, and the plan, in one step; of the form for TensorRT only if it is within the budget too."""
    files: list[tuple[Artifact, bytes]] = []
    for (graph, form), _ in sources.items():
        precision = PRECISIONS[form]
        above = judged[precision].above(judged["fp32"])
        if form == "tensorrt" and not budget.holds(judged[precision], judged["fp32"]):
            logger.warning("the form for TensorRT is out of the budget (%+.1f %%) and left out", 100 * above)
            break
        model = network.model(names, graph, form).SerializeToString(deterministic=True)
        facts = _facts(bundle, graph, model) | {"log_mel_above_fp32": round(above, 5)}
        entry = Artifact.of(
            f"{graph}.{precision}.onnx", model, "onnx", graph=graph, precision=precision, target={"layers": len(names)}, quality=facts
        )
        files.append((entry, model))
    plan = network.plan.only(frozenset(names)).dumps().encode()
    files.append((Artifact.of(PLAN_FILE, plan, "plan", precision="int8"), plan))
    bundle.add_all(files, made_from=tuple(sources.values()))


def _facts(bundle: Bundle, graph: GraphKind, model: bytes) -> dict[str, float]:
    """Against PyTorch on the bundle's probe: what `melrt verify` holds this graph to on other machines."""
    mel, reference = reference_pair(bundle)
    field, hop = bundle.manifest.receptive_field, bundle.manifest.spec.hop
    output = OnnxModel(model, threads=1).run(mel)
    return Difference.between(*(inside(graph, np.asarray(a), field, hop) for a in (reference, output))).facts()
