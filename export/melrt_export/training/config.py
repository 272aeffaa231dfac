"""What a training is to do: a TOML file, read into frozen values."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from melrt.errors import BundleError, CheckpointError, TrainingError
from melrt.mel.spec import MelSpec
from melrt_export.generator.config import GeneratorConfig

MAX_CONFIG_BYTES = 1 << 20
Int8Form = Literal["cpu", "tensorrt"]


@dataclass(frozen=True, slots=True)
class DiscriminatorConfig:
    """The shape of the multi-scale discriminator; the defaults are the published one."""

    scales: int = 3
    """Discriminators: at full, half, quarter, ... rate."""
    channels: int = 16
    """Channels after the first convolution."""
    layers: int = 4
    """Strided convolutions in each discriminator."""
    downsampling: int = 4
    """Stride of each, and the factor by which it widens; its kernel is ten times that and one."""

    def __post_init__(self) -> None:
        _require(self, "scales", 1, 8)
        _require(self, "channels", 4, 256)
        _require(self, "layers", 1, 8)
        _require(self, "downsampling", 2, 16)
        if self.channels % 4:
            raise TrainingError(f"channels is {self.channels}; it is a multiple of 4, since groups of 4 channels are convolved together.")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which audio, and how segments are cut from it."""

    train: str
    """A folder (its .wav and .flac files, sub-folders too), or a text file with one path a line."""
    validation: str = ""
    """As `train`, for validation; empty: the last `held_out` files of `train` in alphabetical order are kept from training."""
    held_out: int = 8
    """Files kept from training where `validation` is empty."""
    segment: int = 8192
    """Samples of a training segment, a multiple of the hop."""
    batch: int = 16
    """Segments in a step, over all processes together."""
    workers: int = 2
    """Processes that read audio, for each training process; 0: none."""
    peak: float = 0.95
    """Every file is scaled to this peak."""
    gain: tuple[float, float] = (0.3, 1.0)
    """Each segment is scaled by a random factor between these."""
    wrong_rate: Literal["resample", "skip", "refuse"] = "resample"
    """What becomes of a file of another sample rate."""
    stereo: Literal["mix", "skip", "refuse"] = "mix"
    """What becomes of a file of several channels."""
    too_short: Literal["skip", "refuse"] = "skip"
    """What becomes of a file shorter than a segment."""
    unusable: Literal["skip", "refuse"] = "refuse"
    """What becomes of a file that cannot be decoded, or is silent throughout."""

    def __post_init__(self) -> None:
        _require(self, "held_out", 1, 1 << 20)
        _require(self, "segment", 256, 1 << 20)
        _require(self, "batch", 1, 1 << 16)
        _require(self, "workers", 0, 256)
        _require(self, "peak", 1e-3, 1.0)
        if not 0 < self.gain[0] <= self.gain[1] <= 1:
            raise TrainingError(f"gain is {list(self.gain)}; it is a smallest and a largest factor, above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The generator's objective: a weighted sum. The defaults are MelGAN's."""

    adversarial: float = 1.0
    """Weight of the hinge loss."""
    feature_matching: float = 10.0
    """Weight of the distance between the discriminators' features of recording and synthesis."""
    feature_scale: Literal["neurips", "paper"] = "neurips"
    """`paper`: the sum over layers and scales (equation 4); `neurips`: that times 4 / (layers + 1) / scales, as melgan-neurips has it."""
    stft: float = 0.0
    """Weight of the multi-resolution STFT loss; with it and `mel` a training starts fast."""
    mel: float = 0.0
    """Weight of the mean absolute difference of log-mels."""
    discriminator_from: int = 0
    """First step that trains the discriminators."""
    adversarial_from: int = 0
    """First step whose generator loss has the adversarial and the feature-matching term."""

    def __post_init__(self) -> None:
        for name in ("adversarial", "feature_matching", "stft", "mel"):
            _require(self, name, 0.0, 1e6)
        _require(self, "discriminator_from", 0, 1 << 40)
        _require(self, "adversarial_from", 0, 1 << 40)
        if self.uses_discriminator and self.adversarial_from < self.discriminator_from:
            raise TrainingError(
                f"adversarial_from is {self.adversarial_from}, before discriminator_from {self.discriminator_from}: "
                "the generator would follow discriminators that learn nothing yet. Make it the same or later."
            )
        if not (self.uses_discriminator or self.stft or self.mel):
            raise TrainingError("every weight is 0, so there is nothing to learn from; set adversarial, feature_matching, stft or mel.")
        if self.adversarial_from and not (self.stft or self.mel):
            raise TrainingError(
                f"adversarial_from is {self.adversarial_from}, and without stft and mel there is nothing to learn before; set one of them."
            )

    @property
    def uses_discriminator(self) -> bool:
        """Whether there is a term that needs one."""
        return bool(self.adversarial or self.feature_matching)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Fine-tuning in INT8, so that the weights learn to live with its rounding."""

    voice: str = ""
    """A calibrated bundle, whose INT8 plan says which layers are rounded and how; empty: none are."""
    form: Int8Form = "cpu"
    """`cpu`: as ONNX Runtime's INT8 on a CPU rounds; `tensorrt`: as TensorRT's."""
    distillation: float = 1.0
    """Weight of the distance to what the generator said before, in float."""

    def __post_init__(self) -> None:
        _require(self, "distillation", 0.0, 1e6)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Adam, for both networks; the defaults are MelGAN's."""

    learning_rate: float = 1e-4
    """Of the generator."""
    discriminator_learning_rate: float = 1e-4
    """Of the discriminators."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of the running means of gradient and squared gradient."""
    decay_from: int = 0
    """Step after which the rates fall, where `half_life` is set."""
    half_life: int = 0
    """Steps in which the rates halve; 0: they stay."""

    def __post_init__(self) -> None:
        _require(self, "learning_rate", 1e-9, 1.0)
        _require(self, "discriminator_learning_rate", 1e-9, 1.0)
        _require(self, "decay_from", 0, 1 << 40)
        _require(self, "half_life", 0, 1 << 40)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas is {list(self.betas)}; both lie in [0, 1).")

    def factor(self, step: int) -> float:
        """What the rates are multiplied by at this step; a function of the step alone, so that a resumed run needs no more state."""
        return 0.5 ** (max(0, step - self.decay_from) / self.half_life) if self.half_life else 1.0


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What it runs on."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the networks' arithmetic (autocast); weights, losses and optimizer stay in float32."""
    compile: bool = False
    """Compile the networks with `torch.compile`: slow first steps, faster others."""


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """How long, and what happens how often."""

    steps: int = 400_000
    """Steps in all."""
    log_every: int = 100
    """Steps between losses in the log; they are the means over these steps."""
    validate_every: int = 5000
    """Steps between validations; the best weights are kept."""
    save_every: int = 1000
    """Steps between checkpoints of the whole training."""

    def __post_init__(self) -> None:
        for each in fields(self):
            _require(self, each.name, 1, 1 << 40)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One training run."""

    run: str
    """Folder for the run's checkpoints and log."""
    data: DataConfig
    name: str = "voice"
    """The voice's name."""
    start_from: str = ""
    """A checkpoint to fine-tune, of any layout that `melrt export` reads; shape and mel convention are then the checkpoint's."""
    seed: int = 0
    """Of the first weights and of the choice of segments."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    mel: MelSpec = field(default_factory=MelSpec)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require(self, "seed", 0, 1 << 62)
        if self.quantization.voice and not self.start_from:
            raise TrainingError("[quantization] mends what rounding does to a trained voice; name its checkpoint as start_from.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def read_config(path: Path) -> TrainingConfig:
    """Read a training's TOML file; paths in it are relative to its folder.

    Raises:
        TrainingError: Not TOML, an unknown key, or a value out of its range; file, key, value and limit are named.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise TrainingError(f"{path} has {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}.")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrainingError(f"{path} is not TOML: {error}") from error
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}. Give a training's TOML file.") from error
    if "start_from" in values and (both := {"generator", "mel"} & set(values)):
        section = sorted(both)[0]
        raise TrainingError(f"{path}: [{section}] beside start_from: shape and mel convention are the checkpoint's; remove [{section}].")
    config: TrainingConfig = _read(TrainingConfig, values, str(path))
    here = path.parent

    def located(text: str) -> str:
        return str(here / text) if text else ""

    data = replace(config.data, train=located(config.data.train), validation=located(config.data.validation))
    quantization = replace(config.quantization, voice=located(config.quantization.voice))
    return replace(config, run=located(config.run), start_from=located(config.start_from), data=data, quantization=quantization)


def _read(kind: type[Any], values: Any, where: str) -> Any:
    """A dataclass from a TOML table: every key known, every value of its field's type."""
    if not isinstance(values, Mapping):
        raise TrainingError(f"{where} is {values!r}; it is a table of settings.")
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(hints)):
        raise TrainingError(f"{where}: {', '.join(unknown)} is not known here; known are {', '.join(hints)}.")
    try:
        if kind is MelSpec:
            return MelSpec.from_dict(MelSpec().to_dict() | dict(values))
        if kind is GeneratorConfig:
            return GeneratorConfig.from_dict(values)
        missing = [each.name for each in fields(kind) if each.name not in values and _is_required(each)]
        if missing:
            raise TrainingError(f"{', '.join(missing)} is missing.")
        return kind(**{name: _value(hints[name], value, name, where) for name, value in values.items()})
    except (TrainingError, CheckpointError, BundleError) as error:
        text = str(error)
        raise TrainingError(text if text.startswith(where) else f"{where}: {text}") from error


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _value(kind: Any, value: Any, name: str, where: str) -> Any:
    if is_dataclass(kind):
        return _read(typing.cast(type[Any], kind), value, f"{where}: [{name}]")
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TrainingError(f"{name} is {value!r}; it is one of {', '.join(get_args(kind))}.")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) != 2 or not all(type(each) in (int, float) for each in value):
            raise TrainingError(f"{name} is {value!r}; it is two numbers, as in [0.5, 0.9].")
        return tuple(float(each) for each in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise TrainingError(f"{name} is {value!r}; it is {words[kind]}.")
    return value


def _require(owner: object, name: str, low: float, high: float) -> None:
    value = getattr(owner, name)
    if not low <= value <= high:
        raise TrainingError(f"{name} is {value}; it lies from {low:g} to {high:g}.")
