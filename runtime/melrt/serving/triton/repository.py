"""A model repository for NVIDIA Triton Inference Server. Each voice has one model for whole mels and one for streams.

```
REPOSITORY/lj/config.pbtxt            whole mels: HTTP or gRPC
REPOSITORY/lj/1/                      a version: model.py, serving.json, voice.melrt
REPOSITORY/lj_stream/...              streams: decoupled, gRPC
```

The server's Python needs melrt and one inference engine, nothing else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from melrt.bundle import Bundle
from melrt.errors import ConfigError
from melrt.files.atomic import atomic_folder, atomic_write
from melrt.files.output import Output
from melrt.mel.spec import MelSpec
from melrt.serving.triton.voice import BUNDLE, SERVING, ServingConfig, warm_up_mel

CONFIG = "config.pbtxt"
STREAM_SUFFIX = "_stream"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# Larger than any `max_streams`: Triton would silently hold a sequence beyond its own limit, where melrt refuses it with an error.
MAX_SEQUENCES = 1 << 16
_TYPES = {"float32": pb.TYPE_FP32, "int16": pb.TYPE_INT16}
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
        ConfigError: The name is not allowed, or the voice cannot have this output.
    """
    if not _NAME.fullmatch(name) or name.endswith(STREAM_SUFFIX):
        raise ConfigError(
            f"the voice's name is {name!r}; it must have only letters, digits, `_`, `.` and `-`, begin with a letter or digit, "
            f"and not end in {STREAM_SUFFIX}. Give another with --name."
        )
    serving.check_output(bundle.manifest.spec.sample_rate)
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
        bundle = Bundle.open(folder / str(version) / BUNDLE)
        serving = ServingConfig.loads((folder / str(version) / SERVING).read_bytes())
        config = model_config(model, bundle.manifest.spec, serving, version)
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(text_format.MessageToString(config))


def versions(model: Path) -> list[int]:
    """Return the versions in a model's folder, oldest first."""
    return sorted(int(folder.name) for folder in model.glob("[0-9]*") if folder.name.isdecimal() and (folder / BUNDLE).is_dir())


def model_config(model: Model, spec: MelSpec, serving: ServingConfig, version: int) -> pb.ModelConfig:
    """Build Triton's configuration of a model.

    Args:
        model: Model to configure.
        spec: Mel convention of the voice.
        serving: Settings of the version.
        version: Version to serve.
    """
    config = pb.ModelConfig(name=model.name, backend="python")
    config.input.add(name="mel", data_type=pb.TYPE_FP32, dims=[spec.n_mels, -1])
    _describe_audio(config, serving.output(streams=model.streams), spec.sample_rate)
    config.version_policy.specific.versions.append(version)
    _configure_instances(config, serving, priority=1 if model.streams else 2)
    if model.streams:
        _configure_sequences(config, serving)
    else:
        _configure_queue(config, serving)
    return config


def _describe_audio(config: pb.ModelConfig, output: Output, sample_rate: int) -> None:
    """Set the type of the audio, and tell clients its encoding and sample rate in Hz as parameters."""
    config.output.add(name="audio", data_type=_TYPES.get(output.encoding, pb.TYPE_UINT8), dims=[-1])
    config.parameters["encoding"].string_value = output.encoding
    config.parameters["sample_rate"].string_value = str(output.sample_rate or sample_rate)


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


def _model_code(model: Model) -> str:
    return (resources.files("melrt.serving.triton") / "models" / ("stream.py" if model.streams else "whole.py")).read_text()
