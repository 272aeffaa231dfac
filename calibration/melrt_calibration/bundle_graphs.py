"""Graphs of a bundle: read the float graphs that INT8 is made from, and write the INT8 graphs and their plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Artifact, Bundle
from melrt.errors import CalibrationError
from melrt.planning.windows import GraphKind
from melrt_calibration.evaluation import Budget, Quality
from melrt_calibration.network import GraphKey, Network
from melrt_calibration.qdq import Form
from melrt_export.graph.deploy import GraphPrecision
from melrt_export.parity import Difference, exact_samples

logger = logging.getLogger(__name__)

FLOAT_PRECISIONS: dict[Form, GraphPrecision] = {"cpu": "fp32", "tensorrt": "fp16"}
INT8_PRECISIONS: dict[Form, str] = {"cpu": "int8", "tensorrt": "int8-fp16"}
GRAPHS: tuple[GraphKind, ...] = ("edge", "interior")
PLAN_FILE = "int8.plan.json"


@dataclass(frozen=True, slots=True)
class FloatGraphs:
    """Float graphs of a bundle: FP32 graphs, and FP16 graphs if the bundle has them."""

    entries: Mapping[GraphKey, Artifact]
    models: Mapping[GraphKey, onnx.ModelProto]

    @classmethod
    def read(cls, bundle: Bundle) -> FloatGraphs:
        """Read the float graphs.

        Raises:
            CalibrationError: The bundle has no FP32 graphs.
        """
        entries: dict[GraphKey, Artifact] = {}
        for form, precision in FLOAT_PRECISIONS.items():
            found = {graph: bundle.find("onnx", graph=graph, precision=precision) for graph in GRAPHS}
            if all(found.values()):
                entries |= {(graph, form): matches[0] for graph, matches in found.items()}
            elif form == "cpu":
                raise CalibrationError(f"{bundle.path} has no FP32 graphs to calibrate; export the voice with `--precision fp32`.")
            else:
                logger.warning(
                    "%s has no FP16 graphs, so INT8 for TensorRT is not made. To include it, export the voice with `--precision fp16` too.",
                    bundle.path,
                )
        return cls(entries, {key: onnx.load_from_string(bundle.read(entry)) for key, entry in entries.items()})


def write_int8(
    bundle: Bundle,
    network: Network,
    names: Sequence[str],
    qualities: Mapping[str, Quality],
    sources: Mapping[GraphKey, Artifact],
    budget: Budget,
) -> None:
    """Write all graphs with these layers in INT8 and the plan in one step; the TensorRT form only if it is within the budget too."""
    files: list[tuple[Artifact, bytes]] = []
    for graph, form in sources:
        precision = INT8_PRECISIONS[form]
        increase = qualities[precision].error_increase(qualities["fp32"])
        if form == "tensorrt" and not budget.allows(qualities[precision], qualities["fp32"]):
            logger.warning("The TensorRT form exceeds the budget (log-mel error %+.1f %%) and is not written.", 100 * increase)
            break
        model = network.model(names, graph, form).SerializeToString(deterministic=True)
        quality = _difference_on_probe(bundle, graph, model) | {"log_mel_above_fp32": round(increase, 5)}
        entry = Artifact.of(
            f"{graph}.{precision}.onnx", model, "onnx", graph=graph, precision=precision, target={"layers": len(names)}, quality=quality
        )
        files.append((entry, model))
    plan = network.selected(names).dumps().encode()
    files.append((Artifact.of(PLAN_FILE, plan, "plan", precision="int8"), plan))
    bundle.add_all(files, made_from=tuple(sources.values()))


def _difference_on_probe(bundle: Bundle, graph: GraphKind, model: bytes) -> dict[str, float]:
    """Compare a graph with PyTorch on the bundle's probe; `melrt verify` compares with these values on other machines."""
    mel, reference = bundle.probe()
    field, hop = bundle.manifest.receptive_field, bundle.manifest.spec.hop
    output = OnnxModel(model, threads=1).run(mel)
    return Difference.between(*(exact_samples(graph, audio, field, hop) for audio in (reference, output))).facts()
