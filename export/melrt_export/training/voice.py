"""The voice under training: its generator, and how that becomes a checkpoint again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from melrt.errors import TrainingError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt_export.checkpoints import Checkpoint, load_checkpoint
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.network import FilterBank, Generator
from melrt_export.generator.pqmf import FilterDesign
from melrt_export.training.config import TrainingConfig
from melrt_export.training.weight_norm import add_weight_norm, folded_weights

SUBBANDS = 4
"""Of a multi-band voice that is drawn; the cutoff of `FilterDesign`'s prototype is made for as many."""


@dataclass(frozen=True, slots=True)
class TrainableVoice:
    """A generator under training, with what a checkpoint of it needs."""

    config: GeneratorConfig
    """The generator's shape."""
    spec: MelSpec
    """The mel convention of its input."""
    generator: Generator
    """What is trained, with weight norm, and perhaps rounded as INT8."""
    edges: Edges = field(default_factory=Edges)
    """What the project of the checkpoint that it started from does at the ends of an utterance."""

    def checkpoint(self, name: str) -> Checkpoint:
        """The voice as it is now."""
        return Checkpoint(name, "melrt", Path(), "", self.config, folded_weights(self.generator), self.spec, self.edges)


def first_voice(config: TrainingConfig) -> TrainableVoice:
    """The voice that a training begins with: drawn from the config's seed, or that of the checkpoint it starts from.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        TrainingError: Shape, mel convention and segment do not go together.
    """
    if config.start_from:
        checkpoint = load_checkpoint(config.start_from)
        generator = Generator.from_weights(checkpoint.config, {n: torch.from_numpy(w) for n, w in checkpoint.weights.items()})
        if checkpoint.lacks_statistics:
            raise TrainingError(
                f"{config.start_from} takes mels that were normalized, and lacks the statistics to make such; "
                "put its stats.h5 or stats.npy beside it."
            )
        shape, spec, edges = checkpoint.config, checkpoint.spec, checkpoint.edges
    else:
        shape, spec, edges = config.generator, config.mel, Edges()
        generator = _drawn(shape, config.seed)
    _check(shape, spec, config)
    return TrainableVoice(shape, spec, add_weight_norm(generator.train()), edges=edges)


def _drawn(shape: GeneratorConfig, seed: int) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(shape)
    if isinstance(generator.pqmf, FilterBank):
        design = FilterDesign()
        if (shape.out_channels, shape.pqmf_taps) != (SUBBANDS, design.taps):
            raise TrainingError(
                f"[generator] out_channels is {shape.out_channels} and pqmf_taps {shape.pqmf_taps}; the filter bank is designed for "
                f"{SUBBANDS} sub-bands and {design.taps} taps. Take those, or a checkpoint that holds other filters as start_from."
            )
        generator.pqmf.load_state_dict({"weight": torch.from_numpy(design.filters(SUBBANDS))})
    return generator


def _check(shape: GeneratorConfig, spec: MelSpec, config: TrainingConfig) -> None:
    if spec.normalization is not None:
        raise TrainingError("[mel] has a normalization; a voice takes plain log-mels, and learns what to make of their level. Remove it.")
    if shape.in_channels != spec.n_mels:
        raise TrainingError(f"[generator] in_channels is {shape.in_channels}, [mel] n_mels {spec.n_mels}; make them the same.")
    if shape.hop != spec.hop or shape.out_channels != shape.subbands:
        raise TrainingError(
            f"the generator gives {shape.out_channels} channels with a hop of {shape.hop} (the product of upsample_scales); "
            f"it must give 1 channel with the mel's hop, {spec.hop}."
        )
    segment = config.data.segment
    # what reflects needs more than it reflects: mel, STFT loss (1024), the coarsest discriminator's first layer (7)
    smallest = max(
        shape.smallest_input * spec.hop, spec.n_fft + 1, 1025 if config.losses.stft else 0, 16 << (config.discriminator.scales - 1)
    )
    if segment % spec.hop or segment < smallest:
        best = -(-max(segment, smallest) // spec.hop) * spec.hop
        raise TrainingError(f"[data] segment is {segment}; it is a multiple of the hop {spec.hop} and at least {smallest}. Take {best}.")
