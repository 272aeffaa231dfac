"""From a checkpoint to a bundle: load, fold, build the deploy graphs, hold each against PyTorch, write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from melrt import __version__
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Artifact, Bundle, Manifest
from melrt.errors import CheckpointError, ParityError
from melrt.mel.level_check import Levels
from melrt.planning.windows import GraphKind
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.generator.receptive_field import receptive_field
from melrt_export.graph.deploy import OPSET, GraphPrecision, deploy_graph
from melrt_export.parity import PROBE_FRAMES, Difference, inside, probe_mel, pytorch_audio, reference_files

PRECISIONS: tuple[GraphPrecision, ...] = ("fp32", "fp16")
GRAPHS: tuple[GraphKind, ...] = ("edge", "interior")
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export."""

    precisions: Sequence[GraphPrecision] = PRECISIONS
    """Which graphs to write."""
    name: str | None = None
    """The voice's name; the checkpoint's own if None."""
    overwrite: bool = False
    """Replace an existing bundle."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """More about where the weights come from, for the manifest; a training puts its validation figures here."""

    def __post_init__(self) -> None:
        if unknown := [p for p in self.precisions if p not in PRECISIONS]:
            raise CheckpointError(f"precision {', '.join(unknown)} cannot be exported; choose from {', '.join(PRECISIONS)}.")
        if not self.precisions:
            raise CheckpointError(f"no precision to export; choose from {', '.join(PRECISIONS)}.")


def export_voice(
    source: str | os.PathLike[str], out: str | os.PathLike[str], options: ExportOptions | None = None, on_step: Step = lambda _: None
) -> Bundle:
    """Export a checkpoint as a verified bundle; it appears whole or not at all.

    Args:
        source: A checkpoint file or folder, see `load_checkpoint`.
        out: The bundle to write.
        options: Precisions, name, overwriting.
        on_step: Called with a few words as each step begins.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ParityError: A graph's output is not PyTorch's; nothing is written.
        BundleError: `out` exists.
    """
    options = options or ExportOptions()
    Bundle.check_place(out, overwrite=options.overwrite)
    on_step("reading the checkpoint")
    checkpoint = load_checkpoint(source)
    if checkpoint.config.out_channels != checkpoint.config.subbands or checkpoint.config.hop != checkpoint.spec.hop:
        raise CheckpointError(
            f"{checkpoint.source} gives {checkpoint.config.out_channels} channels with a hop of {checkpoint.config.hop}; "
            f"a voice of this convention has 1 channel and a hop of {checkpoint.spec.hop}."
        )
    name = options.name or checkpoint.name
    provenance = {
        "source": checkpoint.source.name, "sha256": checkpoint.sha256, "format": checkpoint.format, "tool": f"melrt {__version__}",
        "command": f"melrt export {Path(source).name} --name {name}", **options.provenance,
    }  # fmt: skip
    on_step("running PyTorch")
    field = receptive_field(checkpoint.config)
    mel = probe_mel(checkpoint.spec, max(PROBE_FRAMES, field.smallest_input, field.context + 1))[None]
    reference = pytorch_audio(checkpoint, mel)
    files = []
    for precision in options.precisions:
        for graph in GRAPHS:
            on_step(f"building and checking {graph} {precision}")
            files.append(_graph_file(checkpoint, graph, precision, {"name": name, **provenance}))
    on_step("writing the bundle")
    manifest = Manifest(
        name=name, spec=checkpoint.spec, architecture=checkpoint.config.to_dict(), receptive_field=field,
        edges=checkpoint.edges,
        normalization=checkpoint.normalization, levels=_levels(checkpoint), parameters=checkpoint.config.parameters,
        flop_per_second=checkpoint.config.flop_per_frame * checkpoint.spec.sample_rate / checkpoint.spec.hop, provenance=provenance,
    )  # fmt: skip
    return Bundle.create(out, manifest, [*files, *reference_files(mel, reference)], overwrite=options.overwrite)


def _levels(checkpoint: Checkpoint) -> Levels | None:
    if checkpoint.lacks_statistics:
        return Levels(0.0, 1.0, normalized=True)
    if not checkpoint.spec.unit:
        return None  # magnitudes without a logarithm have no level to go by
    return Levels.of(checkpoint.spec, checkpoint.normalization)


def _graph_file(checkpoint: Checkpoint, graph: GraphKind, precision: GraphPrecision, provenance: dict[str, str]) -> tuple[Artifact, bytes]:
    metadata = {f"melrt.{key}": value for key, value in provenance.items()}
    metadata |= {
        "melrt.graph": graph,
        "melrt.precision": precision,
        "melrt.mel": json.dumps(checkpoint.spec.to_dict(), sort_keys=True),
    }
    model = deploy_graph(checkpoint.config, checkpoint.weights, precision, graph, metadata).SerializeToString(deterministic=True)
    file = f"{graph}.{precision}.onnx"
    quality = _check(file, model, checkpoint, graph, precision)
    return Artifact.of(file, model, "onnx", graph=graph, precision=precision, target={"opset": OPSET}, quality=quality), model


def _check(file: str, model: bytes, checkpoint: Checkpoint, graph: GraphKind, precision: GraphPrecision) -> dict[str, float]:
    """Hold a model against PyTorch at several batch sizes and lengths; returns the worst of what was measured."""
    session = OnnxModel(model)
    field = receptive_field(checkpoint.config)
    smallest = field.smallest_input if graph == "edge" else max(field.context + 1, field.smallest_input)
    worst: dict[str, float] = {}
    for batch, frames in ((1, max(PROBE_FRAMES, smallest)), (2, smallest), (3, smallest + 37)):
        mel = np.stack([probe_mel(checkpoint.spec, frames, seed) for seed in range(batch)])
        reference = pytorch_audio(checkpoint, mel)
        outputs = {"": session.run(mel)}
        if precision == "fp16":
            # ONNX Runtime computes a half graph in float32 on a CPU: only the weights are rounded. What a GPU's rounding
            # after each layer does, PyTorch's half precision shows.
            outputs["half_"] = pytorch_audio(checkpoint, mel, half=True)
        for prefix, output in outputs.items():
            difference = Difference.between(*(inside(graph, audio, field, checkpoint.config.hop) for audio in (reference, output)))
            if not difference.passes(precision):
                raise ParityError(
                    f"{file}: batch {batch}, {frames} frames: max abs {difference.max_abs:.1e}, SNR {difference.snr_db:.1f} dB against "
                    f"PyTorch; the limit is {difference.limit(precision)}. Nothing was written."
                )
            facts = difference.facts()
            worst[f"{prefix}max_abs"] = max(worst.get(f"{prefix}max_abs", 0.0), facts["max_abs"])
            worst[f"{prefix}snr_db"] = min(worst.get(f"{prefix}snr_db", 999.0), facts["snr_db"])
    return worst
