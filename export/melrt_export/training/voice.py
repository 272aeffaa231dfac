"""A voice in training: created from a seed or a checkpoint, and saved as a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from melrt.errors import TrainingError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.network import FilterBank, Generator, Upsample
from melrt_export.generator.pqmf import FilterDesign
from melrt_export.training.config import TrainingConfig
from melrt_export.training.losses import SUBBAND_RESOLUTIONS
from melrt_export.training.weight_norm import add_weight_norm, folded_weights

SUBBANDS = 4
"""Sub-bands of a new multi-band voice. The cutoff of `FilterDesign`'s prototype is designed for this number."""


@dataclass(frozen=True, slots=True)
class TrainableVoice:
    """A generator in training, with everything else that its checkpoint needs."""

    config: GeneratorConfig
    """Shape of the generator."""
    spec: MelSpec
    """Mel convention of the generator's input."""
    generator: Generator
    """Network that is trained, with weight norm, and with fake quantization if it is trained in INT8."""
    edges: Edges = field(default_factory=Edges)
    """Padding at the ends of an utterance in the project of the checkpoint that the training started from."""

    def checkpoint(self, name: str, generator: Generator) -> Checkpoint:
        """Return the weights of this generator, or of an average of it, as a checkpoint, without ranges that were learned in INT8."""
        weights = folded_weights(generator)
        plain = {tensor: weights[tensor] for tensor, _ in self.config.tensors()}
        return Checkpoint(name, "melrt", Path(), "", self.config, plain, self.spec, self.edges)

    def identity(self) -> dict[str, Any]:
        """Return everything but the weights as plain JSON values."""
        return {"generator": self.config.to_dict(), "mel": self.spec.to_dict(), "edges": asdict(self.edges)}


def create_voice(config: TrainingConfig) -> TrainableVoice:
    """Create the voice that a training begins with, from the checkpoint to fine-tune or with random weights from the config's seed.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrainingError: Generator shape, mel convention and segment do not fit together.
    """
    if config.start_from:
        checkpoint = load_checkpoint(config.start_from)
        generator = Generator.from_weights(checkpoint.config, {n: torch.from_numpy(w) for n, w in checkpoint.weights.items()})
        if checkpoint.lacks_statistics:
            raise TrainingError(
                f"{config.start_from} takes normalized mels, but the statistics of the normalization are missing; "
                "put its stats.h5 or stats.npy beside it."
            )
        shape, spec, edges = checkpoint.config, checkpoint.spec, checkpoint.edges
        if shape.mrf and config.losses.uses_discriminator:
            raise TrainingError(
                f"{config.start_from} is a HiFi-GAN, which was trained against other discriminators than melrt has. Set adversarial = 0 "
                "and feature_matching = 0 under [losses], and stft or mel, to fine-tune it with spectral losses."
            )
    else:
        shape, spec, edges = config.generator, config.mel, Edges()
        generator = _random_generator(shape, config)
    _check(shape, spec, config)
    return TrainableVoice(shape, spec, add_weight_norm(generator.train()), edges=edges)


def _random_generator(shape: GeneratorConfig, config: TrainingConfig) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = Generator(shape)
    if config.smooth_upsampling:
        for layer in generator.modules():
            if isinstance(layer, Upsample):
                _interpolate(layer)
    if isinstance(generator.pqmf, FilterBank):
        design = FilterDesign()
        if (shape.out_channels, shape.pqmf_taps) != (SUBBANDS, design.taps):
            raise TrainingError(
                f"[generator] out_channels is {shape.out_channels} and pqmf_taps is {shape.pqmf_taps}; the filter bank is designed for "
                f"{SUBBANDS} sub-bands and {design.taps} taps. Set these, or name a checkpoint with other filters as start_from."
            )
        generator.pqmf.load_state_dict({"weight": torch.from_numpy(design.filters(SUBBANDS))})
    return generator


@torch.no_grad()
def _interpolate(layer: Upsample) -> None:
    """Give each pair of channels one random weight for all output phases, spread over the taps as linear interpolation does.

    Independent weights for each phase make a pattern that repeats with the stride (Odena et al., "Deconvolution and checkerboard
    artifacts", Distill 2016; the remedy for sub-pixel convolutions is ICNR, Aitken et al. 2017). The output's variance does not change.
    """
    taps, scale = layer.kernel_size[0], layer.stride[0]
    triangle = 1 - (torch.arange(taps) - (taps - 1) / 2).abs() / scale
    norm = triangle.square().sum() / scale  # an output sample sums two taps; independent weights of variance 1 would give it variance 2
    weight = layer.weight[..., :1] * (2 / norm).sqrt()
    layer.weight.copy_(weight * triangle)


def _check(shape: GeneratorConfig, spec: MelSpec, config: TrainingConfig) -> None:
    if spec.normalization is not None:
        raise TrainingError("[mel] has a normalization, but a voice takes plain log-mels. Remove the normalization.")
    if shape.in_channels != spec.n_mels:
        raise TrainingError(f"[generator] in_channels is {shape.in_channels} and [mel] n_mels is {spec.n_mels}; they must be equal.")
    if shape.hop != spec.hop or shape.out_channels != shape.subbands:
        raise TrainingError(
            f"the generator has {shape.out_channels} output channels and a hop of {shape.hop} (the product of upsample_scales); "
            f"it must have 1 channel, or sub-bands with pqmf_taps, and the mel's hop, {spec.hop}."
        )
    segment = config.data.segment
    # reflection padding needs more samples than it adds: in the mel, the STFT loss and the coarsest discriminator's first layer (7)
    stft = max(config.losses.stft_sizes) // 2 + 1 if config.losses.stft else 0
    if config.losses.subband_stft:
        if shape.subbands == 1:
            raise TrainingError("[losses] subband_stft is set, but the voice has no sub-bands. Set it to 0, or train a multi-band voice.")
        stft = max(stft, shape.subbands * (max(SUBBAND_RESOLUTIONS) // 2 + 1))
    smallest = max(shape.smallest_input * spec.hop, spec.n_fft + 1, stft, 16 << (config.discriminator.scales - 1))
    if segment % spec.hop or segment < smallest:
        best = -(-max(segment, smallest) // spec.hop) * spec.hop
        raise TrainingError(
            f"[data] segment is {segment}; it must be a multiple of the hop {spec.hop} and at least {smallest}. Set it to {best}."
        )
