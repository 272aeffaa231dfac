"""A model repository for NVIDIA Triton Inference Server: per voice a model for whole mels and one for streams.

```
REPOSITORY/lj/config.pbtxt            whole mels: HTTP or gRPC
REPOSITORY/lj/warmup/probe            the mel of the warm-up (a stream warms itself up)
REPOSITORY/lj/1/                      a version: model.py, serving.json, voice.melrt
REPOSITORY/lj_stream/...              the same, decoupled: gRPC
```

The server's Python needs melrt and one engine, nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from melrt.bundle import Bundle
from melrt.errors import BundleError
from melrt.files.atomic import atomic_folder, atomic_write
from melrt.serving.triton.voice import BUNDLE, SERVING, Serving, probe_mel

CONFIG = "config.pbtxt"
STREAM = "_stream"
PROBE = "probe"
WARM_UP = "warmup"  # where Triton looks for it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# More than any `max_streams`: a sequence beyond Triton's own limit would wait without a word; melrt's refuses it.
MANY = 1 << 16
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """One of a voice's two models."""

    name: str
    """The folder's, and Triton's."""
    streams: bool
    """Decoupled: audio as it is ready."""


def models_of(voice: str) -> tuple[Model, Model]:
    """The models of a voice: whole mels, streams."""
    return Model(voice, streams=False), Model(voice + STREAM, streams=True)


def add_voice(repository: Path, name: str, bundle: Bundle, serving: Serving) -> int:
    """Add a voice, or its next version, and serve that; older versions stay to go back to.

    Args:
        repository: The model repository; made if it is not there.
        name: Of the voice's models.
        bundle: Copied, each file verified.
        serving: How.

    Returns:
        The version.

    Raises:
        BundleError: A damaged bundle, or a name that cannot be a model's.
    """
    if not _NAME.fullmatch(name) or name.endswith(STREAM):
        raise BundleError(
            f"{name!r} cannot be a voice's name; it has letters, digits, `_`, `.` and `-`, and no {STREAM} at its end. "
            "Give another with --name."
        )
    probe_mel(bundle)  # before anything is written
    version = 1 + max((number for model in models_of(name) for number in versions(repository / model.name)), default=0)
    for model in models_of(name):
        with atomic_folder(repository / model.name / str(version)) as folder:
            (folder / "model.py").write_text(_code(model))
            (folder / SERVING).write_text(serving.dumps())
            Bundle.create(folder / BUNDLE, bundle.manifest, ((artifact, bundle.read(artifact)) for artifact in bundle.manifest.artifacts))
    use_version(repository, name, version)
    return version


def use_version(repository: Path, name: str, version: int) -> None:
    """Serve a version of a voice that is there, as it was once added.

    Raises:
        BundleError: It is not.
    """
    for model in models_of(name):
        if version not in (there := versions(repository / model.name)):
            which = f"has versions {', '.join(map(str, there))}" if there else "is no voice of this repository"
            raise BundleError(f"{repository / model.name} {which}; {version} is not there to be served.")
    for model in models_of(name):
        place = repository / model.name
        bundle = Bundle.open(place / str(version) / BUNDLE)
        probe = probe_mel(bundle)
        config = model_config(model, probe.shape, Serving.loads((place / str(version) / SERVING).read_text()), version)
        if not model.streams:
            _replace(place / WARM_UP / PROBE, probe.tobytes())
        _replace(place / CONFIG, str(text_format.MessageToString(config)).encode())


def versions(model: Path) -> list[int]:
    """Those that are there, oldest first."""
    return sorted(int(folder.name) for folder in model.glob("[0-9]*") if folder.name.isdecimal() and (folder / BUNDLE).is_dir())


def model_config(model: Model, probe: tuple[int, ...], serving: Serving, version: int) -> pb.ModelConfig:
    """Triton's configuration of a model.

    Args:
        model: Which.
        probe: Shape (M, T) of the warm-up's mel.
        serving: How.
        version: To serve.
    """
    config = pb.ModelConfig(name=model.name, backend="python")
    config.input.add(name="mel", data_type=pb.TYPE_FP32, dims=[probe[0], -1])
    config.output.add(name="audio", data_type=pb.TYPE_INT16 if serving.sample_format == "int16" else pb.TYPE_FP32, dims=[-1])
    config.version_policy.specific.versions.append(version)
    _place(config, serving, priority=1 if model.streams else 2)
    if model.streams:
        _streams(config, serving)
    else:
        _queue(config, serving)
        _warm_up(config, probe)
    return config


def _place(config: pb.ModelConfig, serving: Serving, priority: int) -> None:
    group = config.instance_group.add(count=serving.instances)
    if serving.gpus:
        group.kind = pb.ModelInstanceGroup.KIND_GPU
        group.gpus.extend(serving.gpus)
    group.rate_limiter.priority = priority  # streams first, where the server runs with --rate-limit=execution_count


def _queue(config: pb.ModelConfig, serving: Serving) -> None:
    """Bounded and with a time-out; requests are not joined here, but window by window in melrt."""
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = math.ceil(serving.queue_timeout * MICROSECONDS)
    policy.allow_timeout_override = True
    policy.max_queue_size = serving.max_queue


def _streams(config: pb.ModelConfig, serving: Serving) -> None:
    config.model_transaction_policy.decoupled = True
    config.sequence_batching.max_sequence_idle_microseconds = math.ceil(serving.timeout * MICROSECONDS)
    config.sequence_batching.oldest.max_candidate_sequences = MANY


def _warm_up(config: pb.ModelConfig, shape: Sequence[int]) -> None:
    sample = config.model_warmup.add(name=PROBE, batch_size=1, count=1)  # with a batch size of 0 Triton skips it
    sample.inputs["mel"].CopyFrom(pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=shape, input_data_file=PROBE))


def _code(model: Model) -> str:
    return (resources.files("melrt.serving.triton") / "models" / ("stream.py" if model.streams else "whole.py")).read_text()


def _replace(file: Path, content: bytes) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(content)
