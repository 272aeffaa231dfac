"""A model repository for NVIDIA Triton Inference Server. Each voice has one model for whole mels and one for streams.

```
REPOSITORY/lj/config.pbtxt            whole mels: HTTP or gRPC
REPOSITORY/lj/warmup/probe            the mel with which Triton warms the model up
REPOSITORY/lj/1/                      a version: model.py, serving.json, voice.melrt
REPOSITORY/lj_stream/...              streams: decoupled, gRPC; the model warms itself up
```

The server's Python needs melrt and one inference engine, nothing else.
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
from melrt.errors import ConfigError
from melrt.files.atomic import atomic_folder, atomic_write
from melrt.serving.triton.voice import BUNDLE, SERVING, ServingConfig, warm_up_mel

CONFIG = "config.pbtxt"
STREAM_SUFFIX = "_stream"
WARM_UP_FOLDER = "warmup"  # Triton's name for it
WARM_UP_FILE = "probe"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# Larger than any `max_streams`: Triton would silently hold a sequence beyond its own limit, where melrt refuses it with an error.
MAX_SEQUENCES = 1 << 16
MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Model:
    """One of the two models of a voice."""

    name: str
    """Name of the model and of its folder."""
    streams: bool
    """True for the decoupled model, which sends audio as soon as it is ready."""


def models_of(voice: str) -> tuple[Model, Model]:
    """Return the models of a voice: whole mels, streams."""
    return Model(voice, streams=False), Model(voice + STREAM_SUFFIX, streams=True)


def add_voice(repository: Path, name: str, bundle: Bundle, serving: ServingConfig) -> int:
    """Add a voice, or the next version of it, and serve this version; older versions are kept.

    Args:
        repository: Folder of the model repository; made if it does not exist.
        name: Name of the voice's model for whole mels.
        bundle: Voice to copy; each file is verified.
        serving: Settings of this version.

    Returns:
        The number of the new version.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: The name is not allowed.
    """
    if not _NAME.fullmatch(name) or name.endswith(STREAM_SUFFIX):
        raise ConfigError(
            f"the voice's name is {name!r}; it must have only letters, digits, `_`, `.` and `-`, begin with a letter or digit, "
            f"and not end in {STREAM_SUFFIX}. Give another with --name."
        )
    warm_up_mel(bundle)  # fails before anything is written
    version = 1 + max((number for model in models_of(name) for number in versions(repository / model.name)), default=0)
    for model in models_of(name):
        with atomic_folder(repository / model.name / str(version)) as folder:
            (folder / "model.py").write_text(_model_code(model))
            (folder / SERVING).write_text(serving.dumps())
            Bundle.create(folder / BUNDLE, bundle.manifest, ((artifact, bundle.read(artifact)) for artifact in bundle.manifest.artifacts))
    use_version(repository, name, version)
    return version


def use_version(repository: Path, name: str, version: int) -> None:
    """Serve a version that is in the repository, with the settings that it was added with.

    Raises:
        ConfigError: The voice or the version is not in the repository.
    """
    for model in models_of(name):
        if version not in (existing := versions(repository / model.name)):
            state = f"has versions {', '.join(map(str, existing))}" if existing else "is not a model in this repository"
            raise ConfigError(f"version {version} cannot be served: {repository / model.name} {state}.")
    for model in models_of(name):
        folder = repository / model.name
        mel = warm_up_mel(Bundle.open(folder / str(version) / BUNDLE))
        config = model_config(model, mel.shape, ServingConfig.loads((folder / str(version) / SERVING).read_text()), version)
        if not model.streams:
            _write(folder / WARM_UP_FOLDER / WARM_UP_FILE, mel.tobytes())
        _write(folder / CONFIG, str(text_format.MessageToString(config)).encode())


def versions(model: Path) -> list[int]:
    """Return the versions in a model's folder, oldest first."""
    return sorted(int(folder.name) for folder in model.glob("[0-9]*") if folder.name.isdecimal() and (folder / BUNDLE).is_dir())


def model_config(model: Model, warm_up_shape: tuple[int, ...], serving: ServingConfig, version: int) -> pb.ModelConfig:
    """Build Triton's configuration of a model.

    Args:
        model: Model to configure.
        warm_up_shape: Shape (M, T) of the warm-up mel.
        serving: Settings of the version.
        version: Version to serve.
    """
    config = pb.ModelConfig(name=model.name, backend="python")
    config.input.add(name="mel", data_type=pb.TYPE_FP32, dims=[warm_up_shape[0], -1])
    config.output.add(name="audio", data_type=pb.TYPE_INT16 if serving.sample_format == "int16" else pb.TYPE_FP32, dims=[-1])
    config.version_policy.specific.versions.append(version)
    _configure_instances(config, serving, priority=1 if model.streams else 2)
    if model.streams:
        _configure_sequences(config, serving)
    else:
        _configure_queue(config, serving)
        _configure_warm_up(config, warm_up_shape)
    return config


def _configure_instances(config: pb.ModelConfig, serving: ServingConfig, priority: int) -> None:
    group = config.instance_group.add(count=serving.instances)
    if serving.gpus:
        group.kind = pb.ModelInstanceGroup.KIND_GPU
        group.gpus.extend(serving.gpus)
    group.rate_limiter.priority = priority  # streams go first if the server runs with --rate-limit=execution_count


def _configure_queue(config: pb.ModelConfig, serving: ServingConfig) -> None:
    """Set the limit and timeout of the queue; Triton does not join requests into batches, melrt joins their windows."""
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = pb.ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = math.ceil(serving.queue_timeout * MICROSECONDS)
    policy.allow_timeout_override = True
    policy.max_queue_size = serving.max_queue


def _configure_sequences(config: pb.ModelConfig, serving: ServingConfig) -> None:
    config.model_transaction_policy.decoupled = True
    config.sequence_batching.max_sequence_idle_microseconds = math.ceil(serving.timeout * MICROSECONDS)
    config.sequence_batching.oldest.max_candidate_sequences = MAX_SEQUENCES


def _configure_warm_up(config: pb.ModelConfig, shape: Sequence[int]) -> None:
    sample = config.model_warmup.add(name=WARM_UP_FILE, batch_size=1, count=1)  # Triton skips a sample whose batch size is 0
    sample.inputs["mel"].CopyFrom(pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=shape, input_data_file=WARM_UP_FILE))


def _model_code(model: Model) -> str:
    return (resources.files("melrt.serving.triton") / "models" / ("stream.py" if model.streams else "whole.py")).read_text()


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as temporary:
        temporary.write_bytes(content)
