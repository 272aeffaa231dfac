"""Configuration of a training run: a TOML file, read into frozen dataclasses."""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from melrt.checks import Rule, check_fields, flag, list_of, number, one_of, text, whole
from melrt.errors import ConfigError, MelrtError
from melrt.mel.spec import MelSpec
from melrt_export.generator.config import GeneratorConfig

MAX_CONFIG_BYTES = 1 << 20
MAX_STEPS = 1 << 40

AdversarialForm = Literal["hinge", "least_squares"]
FeatureScale = Literal["neurips", "paper", "mean"]
Int8Form = Literal["cpu", "tensorrt"]
# Settings that were renamed.
RENAMED = {
    "quantisation": "quantization",
    "normalisation": "normalization",
}


@dataclass(frozen=True, slots=True)
class DiscriminatorConfig:
    """Shape of the multi-scale discriminator. The defaults are the published shape."""

    scales: int = 3
    """Number of discriminators. The first sees the waveform at the full rate, each next one at half the rate before it."""
    channels: int = 16
    """Channels after the first convolution, a multiple of 4."""
    layers: int = 4
    """Strided convolutions in each discriminator."""
    downsampling: int = 4
    """Stride s of each strided convolution, which also has s times the channels; its kernel size is 10·s + 1."""
    max_channels: int = 1024
    """Limit of the channels, a multiple of 4."""
    deviation: float = 0.0
    """Standard deviation of the initial weights, which are normally distributed; 0 for PyTorch's default."""

    def __post_init__(self) -> None:
        widths = {"channels": whole(4, 256), "max_channels": whole(4, 4096)}
        _check(self, **widths, scales=whole(1, 8), layers=whole(1, 8), downsampling=whole(2, 16), deviation=number(0, 1))
        for name in widths:
            if (width := getattr(self, name)) % 4:
                raise ConfigError(f"{name} is {width}; it must be a multiple of 4, because convolutions have groups of 4 channels.")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Recordings, and the segments that are cut from them."""

    train: str
    """Folder that is searched for .wav and .flac files, with its sub-folders; or a list of files: a .txt file with a line `path` or
    `path|text` for each, or LJ Speech's metadata.csv."""
    validation: str = ""
    """Recordings for validation, named like `train`; empty to keep the last `held_out` files of `train` in alphabetical order."""
    held_out: int = 8
    """Number of files that are kept from training if `validation` is empty."""
    segment: int = 8192
    """Length of a training segment in samples, a multiple of the hop."""
    batch: int = 16
    """Segments in one step, over all processes together."""
    workers: int = 2
    """Worker processes that read audio for each training process; 0 to read in the training process."""
    peak: float = 0.95
    """Peak to which every file is scaled; 0 to leave the files as they are."""
    gain: tuple[float, float] = (0.3, 1.0)
    """Limits of the random factor by which each segment is scaled."""
    wrong_rate: Literal["resample", "skip", "refuse"] = "resample"
    """Treatment of a file with another sample rate."""
    stereo: Literal["mix", "skip", "refuse"] = "mix"
    """Treatment of a file with several channels."""
    too_short: Literal["skip", "refuse"] = "skip"
    """Treatment of a file that is shorter than a segment."""
    unusable: Literal["skip", "refuse"] = "refuse"
    """Treatment of a file that cannot be decoded or is silent throughout."""

    def __post_init__(self) -> None:
        _check(
            self, held_out=whole(1, 1 << 20), segment=whole(256, 1 << 20), batch=whole(1, 1 << 16), workers=whole(0, 256),
            peak=number(0, 1), gain=list_of(number(0, 1, above=True), 2, 2),
        )  # fmt: skip
        if self.gain[0] > self.gain[1]:
            raise ConfigError(f"gain is {list(self.gain)}; the smaller factor must come first.")


# Terms of the objective that need no discriminators.
SPECTRAL_TERMS = ("stft", "subband_stft", "mel", "energy", "level", "comb")


@dataclass(frozen=True, slots=True)
class LossConfig:
    """Weights of the terms in the generator's objective. The defaults are MelGAN's."""

    adversarial: float = 1.0
    """Weight of the adversarial loss."""
    adversarial_form: AdversarialForm = "hinge"
    """`hinge`: MelGAN's loss, summed over scales; `least_squares`: ParallelWaveGAN's, averaged over scales."""
    feature_matching: float = 10.0
    """Weight of the distance between the discriminators' features of recording and synthesis."""
    feature_scale: FeatureScale = "neurips"
    """`paper`: the sum over layers and scales (equation 4); `neurips`: that sum times 4 / (layers + 1) / scales, as in melgan-neurips;
    `mean`: the mean over layers and scales, as in ParallelWaveGAN."""
    stft: float = 0.0
    """Weight of the multi-resolution STFT loss. With it and `mel`, the first steps make fast progress."""
    stft_sizes: tuple[int, ...] = (1024, 2048, 512)
    """FFT sizes of the STFT loss in samples, from 512, 1024, 2048 and 4096; the defaults are ParallelWaveGAN's."""
    subband_stft: float = 0.0
    """Weight of the STFT loss between the sub-bands of a multi-band voice, with ParallelWaveGAN's resolutions."""
    mel: float = 0.0
    """Weight of the mean absolute difference of log-mels."""
    energy: float = 0.0
    """Weight of the difference of log energies in cells of 8 bins and 8 frames, which the random phase of noise hardly changes."""
    level: float = 0.0
    """Weight of the difference of log power in stretches of 4096 samples."""
    comb: float = 0.0
    """Weight of the difference of how far multiples of the frame rate rise above the spectrum beside them."""
    discriminator_from: int = 0
    """First step that trains the discriminators."""
    adversarial_from: int = 0
    """First step in which the generator's loss has the adversarial and the feature-matching term."""

    def __post_init__(self) -> None:
        steps = dict.fromkeys(("discriminator_from", "adversarial_from"), whole(0, MAX_STEPS))
        weights = dict.fromkeys(("adversarial", "feature_matching", *SPECTRAL_TERMS), number(0, 1e6))
        _check(self, **weights, **steps, stft_sizes=list_of(one_of(512, 1024, 2048, 4096), 1, 4))
        if self.uses_discriminator and self.adversarial_from < self.discriminator_from:
            raise ConfigError(
                f"adversarial_from is {self.adversarial_from}, before discriminator_from {self.discriminator_from}: "
                "the generator would follow discriminators that are not trained yet. Set it to the same step or a later one."
            )
        spectral = any(getattr(self, name) for name in SPECTRAL_TERMS)
        if not (self.uses_discriminator or spectral):
            names = ", ".join(("adversarial", "feature_matching", *SPECTRAL_TERMS))
            raise ConfigError(f"all loss weights are 0, so nothing can be trained; set one of {names}.")
        if self.adversarial_from and not spectral:
            raise ConfigError(
                f"adversarial_from is {self.adversarial_from}, but earlier steps have no loss; set one of {', '.join(SPECTRAL_TERMS)}."
            )

    @property
    def uses_discriminator(self) -> bool:
        """True if a term needs the discriminators."""
        return bool(self.adversarial or self.feature_matching)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Fine-tuning in INT8, which adapts the weights to the rounding."""

    voice: str = ""
    """Calibrated bundle, whose INT8 plan lists the layers and their ranges, or a file with such a plan; empty to train in float."""
    form: Int8Form = "cpu"
    """`cpu`: round as ONNX Runtime's INT8 does on a CPU; `tensorrt`: round as TensorRT does."""
    learn_ranges: bool = False
    """True to train the ranges of the activations too; the plan with the trained ranges is saved with the weights."""
    distillation: float = 1.0
    """Weight of the distance to the output of the float generator that the training begins with."""

    def __post_init__(self) -> None:
        _check(self, distillation=number(0, 1e6))


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Optimizer of both networks. The defaults are MelGAN's."""

    learning_rate: float = 1e-4
    """Learning rate of the generator."""
    discriminator_learning_rate: float = 1e-4
    """Learning rate of the discriminators."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Decay of the running means of the gradient and the squared gradient."""
    algorithm: Literal["adam", "radam"] = "adam"
    """`radam` corrects Adam's first steps, in which the mean of the squared gradient is uncertain (Liu et al., ICLR 2020)."""
    epsilon: float = 1e-8
    """Constant that is added to the root of the squared gradient's mean before the division by it."""
    amsgrad: bool = False
    """True to divide by the largest such mean so far (AMSGrad, Reddi et al., ICLR 2018)."""
    gradient_limit: float = 0.0
    """Limit of the norm of the generator's gradient, which is scaled down to it; 0 for no limit."""
    discriminator_gradient_limit: float = 0.0
    """The same limit for the discriminators."""
    decay_from: int = 0
    """Step after which the learning rates fall, if `half_life` or `zero_at` is set."""
    half_life: int = 0
    """Steps in which the learning rates halve; 0 for rates that do not halve."""
    zero_at: int = 0
    """Step at which the learning rates reach zero, falling linearly from `decay_from` on; 0 for rates that do not fall so."""
    milestones: tuple[int, ...] = ()
    """Steps of a network from which its learning rate is half as large as before, in ascending order; instead of `half_life` and
    `zero_at`. The discriminators' steps count from `discriminator_from`."""
    average: float = 0.0
    """Share that a running average of the generator's weights keeps in each step, such as 0.999; 0 for no average. It is validated and
    kept beside the weights."""

    def __post_init__(self) -> None:
        rates = dict.fromkeys(("learning_rate", "discriminator_learning_rate"), number(1e-9, 1))
        steps = dict.fromkeys(("decay_from", "half_life", "zero_at"), whole(0, MAX_STEPS))
        limits = dict.fromkeys(("gradient_limit", "discriminator_gradient_limit"), number(0, 1e6))
        _check(
            self, **rates, **steps, **limits, betas=list_of(number(0, 1, below=True), 2, 2), average=number(0, 1, below=True),
            epsilon=number(1e-12, 1e-2), milestones=list_of(whole(1, MAX_STEPS), 0, 100),
        )  # fmt: skip
        if self.zero_at and (self.half_life or self.zero_at <= self.decay_from):
            raise ConfigError(
                f"zero_at is {self.zero_at}, half_life {self.half_life} and decay_from {self.decay_from}; "
                "set only one of zero_at and half_life, and zero_at to a step after decay_from."
            )
        if self.amsgrad and self.algorithm == "radam":
            raise ConfigError("amsgrad is set, but RAdam does not have it. Remove amsgrad, or set algorithm to adam.")
        if self.milestones and (self.zero_at or self.half_life or list(self.milestones) != sorted(set(self.milestones))):
            raise ConfigError(
                f"milestones is {list(self.milestones)}, half_life {self.half_life} and zero_at {self.zero_at}; "
                "list each step once in ascending order, and leave half_life and zero_at at 0."
            )

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rates at a step. It depends on the step alone, so a resumed run needs no other state."""
        if self.milestones:
            return float(0.5 ** sum(step >= milestone for milestone in self.milestones))
        done = max(0, step - self.decay_from)
        if self.zero_at:
            return max(0.0, 1 - done / (self.zero_at - self.decay_from))
        return 0.5 ** (done / self.half_life) if self.half_life else 1.0


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """Hardware and arithmetic."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the networks; `auto` takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks (autocast). Weights, losses, optimizer and the generator's last convolution and filter bank stay in
    float32."""
    compile: bool = False
    """True to compile the networks with `torch.compile`: the first steps are slow, the others faster."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Length of the training, and intervals of logging, validation and saving."""

    steps: int = 400_000
    """Total number of steps."""
    log_every: int = 100
    """Steps between two entries in the log, which hold the mean losses over these steps."""
    validate_every: int = 5000
    """Steps between two validations. The best weights are kept in `best`."""
    best: Literal["error", "log_mel"] = "error"
    """Figure that chooses the best weights: `error` (log-mel, comb and level; `SpeechQuality.error`) or the log-mel error alone."""
    save_every: int = 1000
    """Steps between two saved states."""
    keep_every: int = 0
    """Steps between two checkpoints `step-N`; 0 to keep none."""
    keep: int = 5
    """Number of checkpoints `step-N` that are kept, the newest ones."""

    def __post_init__(self) -> None:
        rules = dict.fromkeys((each.name for each in fields(self) if each.name != "best"), whole(1, MAX_STEPS))
        _check(self, **rules | {"keep_every": whole(0, MAX_STEPS)})


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """One training run."""

    run: str
    """Folder for the run's checkpoints and log."""
    data: DataConfig
    name: str = "voice"
    """Name of the voice."""
    start_from: str = ""
    """Checkpoint to fine-tune, in any layout that `melrt export` reads; its shape and mel convention apply. Empty to train a new voice."""
    seed: int = 0
    """Seed of the initial weights and of the choice of segments."""
    smooth_upsampling: bool = False
    """True to begin with upsamplings that interpolate linearly. All output phases are alike, so the first output has no tone at multiples
    of the frame rate."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    mel: MelSpec = field(default_factory=MelSpec)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _check(self, seed=whole(0, 1 << 62))
        if self.smooth_upsampling and self.start_from:
            raise ConfigError("smooth_upsampling sets random weights, but start_from names trained ones. Remove one of the two.")
        if self.quantization.voice and not self.start_from:
            raise ConfigError("[quantization] fine-tunes a trained voice in INT8; name its checkpoint as start_from.")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)


def read_config(path: Path) -> TrainingConfig:
    """Read the TOML file of a training. Paths in it are relative to its folder.

    Raises:
        ConfigError: The file is not TOML, has an unknown key, or has a value outside its limits.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a config may have at most {MAX_CONFIG_BYTES}.")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}. Give the TOML file of a training.") from error
    if "start_from" in values and (both := {"generator", "mel"} & set(values)):
        section = sorted(both)[0]
        raise ConfigError(
            f"{path} has both start_from and [{section}]; shape and mel convention come from the checkpoint. Remove [{section}]."
        )
    config: TrainingConfig = _read(TrainingConfig, values, str(path))

    def resolve(name: str) -> str:
        return str(path.parent / name) if name else ""

    data = replace(config.data, train=resolve(config.data.train), validation=resolve(config.data.validation))
    quantization = replace(config.quantization, voice=resolve(config.quantization.voice))
    return replace(config, run=resolve(config.run), start_from=resolve(config.start_from), data=data, quantization=quantization)


def _read(kind: type[Any], values: Any, where: str) -> Any:
    """Build a dataclass from a TOML table; `where` begins every error message."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r:.80}; it must be a table of settings.")
    hints = typing.get_type_hints(kind)
    if old := sorted(set(values) & set(RENAMED)):
        raise ConfigError(f"{where}: {old[0]} is now {RENAMED[old[0]]}.")
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"{where}: {', '.join(unknown)} is not a setting here; the settings are {', '.join(hints)}.")
    try:
        if kind is MelSpec:
            return MelSpec.from_dict(MelSpec().to_dict() | dict(values))
        if kind is GeneratorConfig:
            return GeneratorConfig.from_dict(values)
        if missing := [each.name for each in fields(kind) if each.name not in values and _is_required(each)]:
            raise ConfigError(f"{', '.join(missing)} is missing.")
        return kind(**{name: _convert(hints[name], value, f"{where}: [{name}]") for name, value in values.items()})
    except MelrtError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from error


def _is_required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to the type of its field. The dataclass then checks it."""
    if is_dataclass(kind):
        return _read(typing.cast(type[Any], kind), value, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(get_args(kind)[0], each, where) for each in value)
    # a float holds whole numbers below 2**53 exactly; no setting allows larger ones
    return float(value) if kind is float and type(value) is int and abs(value) < 1 << 53 else value


def _check(config: object, **rules: Rule) -> None:
    """Check a configuration: texts, flags and choices by their type, numbers by the given rules."""
    by_type = {str: text(), bool: flag()}
    for name, kind in typing.get_type_hints(type(config)).items():
        if get_origin(kind) is Literal:
            rules[name] = one_of(*get_args(kind))
        elif kind in by_type:
            rules[name] = by_type[kind]
    check_fields(config, rules)
