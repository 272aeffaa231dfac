"""The export of a checkpoint as a bundle: read and fold it, build the deploy graphs, compare each with PyTorch, and write them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from melrt import __version__
from melrt.backends.cpu_choice import LOG_MEL
from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Artifact, Bundle, Manifest
from melrt.errors import CheckpointError, ConfigError, ParityError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_distance, mel_from_audio
from melrt.mel.level_check import Levels
from melrt.planning.windows import GraphKind
from melrt_export.assets import RECORDING
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.generator.receptive_field import receptive_field
from melrt_export.generator.reference import PyTorchReference
from melrt_export.graph.deploy import GraphPrecision, deploy_graph
from melrt_export.parity import PROBE_FRAMES, Difference, exact_samples, probe_mel, reference_files, runnable

PRECISIONS: tuple[GraphPrecision, ...] = ("fp32", "fp16", "bf16")
# bf16 is left out: a bundle that holds it lets `auto` choose it, and so change the audio's rounding. The exporter decides that.
DEFAULT_PRECISIONS: tuple[GraphPrecision, ...] = ("fp32", "fp16")
GRAPHS: tuple[GraphKind, ...] = ("edge", "interior")
OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export."""

    precisions: Sequence[GraphPrecision] = DEFAULT_PRECISIONS
    """Precisions of the graphs to write."""
    name: str | None = None
    """Name of the voice; None for the checkpoint's name."""
    overwrite: bool = False
    """True to replace an existing bundle."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Additional entries for the manifest's provenance; training adds its validation figures."""

    def __post_init__(self) -> None:
        if unknown := [p for p in self.precisions if p not in PRECISIONS]:
            raise ConfigError(f"precision {', '.join(unknown)} cannot be exported; choose from {', '.join(PRECISIONS)}.")
        if not self.precisions:
            raise ConfigError(f"no precision to export; choose from {', '.join(PRECISIONS)}.")

    @property
    def steps(self) -> int:
        """Number of steps in an export with these options."""
        return 3 + len(self.precisions) * len(GRAPHS)


def export_voice(
    source: str | os.PathLike[str], out: str | os.PathLike[str], options: ExportOptions | None = None, on_step: OnStep = lambda _: None
) -> Bundle:
    """Export a checkpoint as a verified bundle. If the export fails, no bundle is written.

    Args:
        source: A checkpoint file or folder, see `load_checkpoint`.
        out: The bundle to write.
        options: Precisions, name and overwriting.
        on_step: Called with a short description when a step begins; there are `options.steps` steps.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ParityError: The output of a graph differs too much from PyTorch's.
        BundleError: `out` exists.
    """
    options = options or ExportOptions()
    Bundle.check_place(out, overwrite=options.overwrite)
    on_step("reading the checkpoint")
    checkpoint = load_checkpoint(source)
    _check_output(checkpoint)
    name = options.name or checkpoint.name
    command = f"melrt export {Path(source).name} --name {name}"
    provenance = {**_provenance(checkpoint), "command": command, **options.provenance}
    on_step("computing the reference output with PyTorch")
    field = receptive_field(checkpoint.config)
    mel = probe_mel(checkpoint.spec, max(PROBE_FRAMES, field.smallest_input, field.context + 1))[None]
    reference = PyTorchReference(checkpoint.config, checkpoint.weights)
    references = reference_files(mel, reference.audio(mel))
    files = []
    for precision in options.precisions:
        for graph in GRAPHS:
            on_step(f"building the {graph} graph in {precision.upper()} and comparing it with PyTorch")
            files.append(_graph_file(checkpoint, reference, graph, precision, {"name": name, **provenance}))
    on_step("writing the bundle")
    manifest = Manifest(
        name=name, spec=checkpoint.spec, architecture=checkpoint.config.to_dict(), receptive_field=field, edges=checkpoint.edges,
        normalization=checkpoint.normalization, levels=_levels(checkpoint), parameters=checkpoint.config.parameters,
        flop_per_second=checkpoint.config.flop_per_frame * checkpoint.spec.sample_rate / checkpoint.spec.hop, provenance=provenance,
    )  # fmt: skip
    return Bundle.create(out, manifest, [*files, *references], overwrite=options.overwrite)


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "source": checkpoint.source.name, "sha256": checkpoint.sha256, "format": checkpoint.format, "tool": f"melrt {__version__}",
    }  # fmt: skip


def _check_output(checkpoint: Checkpoint) -> None:
    config, hop = checkpoint.config, checkpoint.spec.hop
    if config.out_channels != config.subbands or config.hop != hop:
        raise CheckpointError(
            f"{checkpoint.source} has a generator with {config.out_channels} output channels and a hop of {config.hop}; "
            f"its mel convention needs 1 channel and a hop of {hop}."
        )


def _levels(checkpoint: Checkpoint) -> Levels | None:
    if checkpoint.lacks_statistics:
        return Levels(0.0, 1.0, normalized=True)
    if not checkpoint.spec.unit:
        return None  # magnitudes without a logarithm have no typical level
    return Levels.expected(checkpoint.spec, checkpoint.normalization)


def _graph_file(
    checkpoint: Checkpoint, reference: PyTorchReference, graph: GraphKind, precision: GraphPrecision, provenance: dict[str, str]
) -> tuple[Artifact, bytes]:
    metadata = {f"melrt.{key}": value for key, value in provenance.items()}
    metadata |= {
        "melrt.graph": graph,
        "melrt.precision": precision,
        "melrt.mel": json.dumps(checkpoint.spec.to_dict(), sort_keys=True),
    }
    graph_model = deploy_graph(checkpoint.config, checkpoint.weights, precision, graph, metadata)
    model = graph_model.SerializeToString(deterministic=True)
    file = f"{graph}.{precision}.onnx"
    session = runnable(model, precision)
    quality = _compare(file, session, checkpoint, reference, graph, precision)
    if precision == "bf16" and not checkpoint.lacks_statistics:
        quality |= {LOG_MEL: _log_mel_increase(session, checkpoint, reference, graph)}
    target = {"opset": graph_model.opset_import[0].version}
    return Artifact.of(file, model, "onnx", graph=graph, precision=precision, target=target, quality=quality), model


def _log_mel_increase(session: OnnxModel, checkpoint: Checkpoint, reference: PyTorchReference, graph: GraphKind) -> float:
    """Return the relative increase of the log-mel error over FP32's on a recording of speech, where the graph is exact."""
    spec, field = checkpoint.spec, receptive_field(checkpoint.config)
    mel = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
    left, right = (field.left, field.right) if graph == "interior" else (0, 0)
    inside = mel[:, left : mel.shape[1] - right]
    audio = (exact_samples(graph, one, field, spec.hop)[0] for one in (session.run(mel[None]), reference.audio(mel[None])))
    error, exact = (mel_distance(inside, one, spec) for one in audio)
    return round(error / exact - 1, 5)


def _compare(
    file: str, session: OnnxModel, checkpoint: Checkpoint, reference: PyTorchReference, graph: GraphKind, precision: GraphPrecision
) -> dict[str, float]:
    """Compare a model with PyTorch at several batch sizes and lengths, and return the worst values.

    Raises:
        ParityError: The model differs too much from PyTorch.
    """
    field = receptive_field(checkpoint.config)
    smallest = field.smallest_input if graph == "edge" else max(field.context + 1, field.smallest_input)
    worst: dict[str, float] = {}
    for batch, frames in ((1, max(PROBE_FRAMES, smallest)), (2, smallest), (3, smallest + 37)):
        mel = np.stack([probe_mel(checkpoint.spec, frames, seed) for seed in range(batch)])
        expected = reference.audio(mel)
        outputs = {"": session.run(mel)}
        if precision == "fp16":
            # On a CPU, ONNX Runtime computes a half-precision graph in float32, so that only its weights are rounded. PyTorch's half
            # precision shows the effect of a GPU, which rounds after each layer.
            outputs["half_"] = reference.half_audio(mel)
        for prefix, output in outputs.items():
            difference = Difference.between(*(exact_samples(graph, audio, field, checkpoint.config.hop) for audio in (expected, output)))
            if not difference.passes(precision):
                raise ParityError(
                    f"{file} differs from PyTorch at batch {batch} with {frames} frames: the largest difference is "
                    f"{difference.max_abs:.1e}, the SNR is {difference.snr_db:.1f} dB, and the limit is {difference.limit(precision)}. "
                    "Nothing was written."
                )
            facts = difference.facts()
            worst[f"{prefix}max_abs"] = max(worst.get(f"{prefix}max_abs", 0.0), facts["max_abs"])
            worst[f"{prefix}snr_db"] = min(worst.get(f"{prefix}snr_db", 999.0), facts["snr_db"])
    return worst
