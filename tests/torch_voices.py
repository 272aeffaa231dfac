"""A tiny random voice in melgan-neurips's layout, for the tests that export. The conftest.py of their folders imports these fixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from melrt.mel.spec import MelSpec
from melrt_export.checkpoints import Checkpoint, native
from melrt_export.export import ExportOptions, export_voice
from melrt_export.generator.config import GeneratorConfig

__all__ = ["make_voice", "one_thread", "published", "published_class", "tiny_bundle_path", "tiny_checkpoint"]
NGF = 4


class PublishedBlock(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.ReflectionPad1d(dilation),
            nn.Conv1d(channels, channels, 3, dilation=dilation),
            nn.LeakyReLU(0.2),
            nn.Conv1d(channels, channels, 1),
        )
        self.shortcut = nn.Conv1d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.block(x)


class PublishedGenerator(nn.Module):
    """The published generator, built from PyTorch's layers in melgan-neurips's order. It shares no code with melrt's generator."""

    def __init__(self, ngf: int = NGF, weight_norm=nn.utils.parametrizations.weight_norm) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad1d(3), nn.Conv1d(80, 16 * ngf, 7)]
        width = 16 * ngf
        for scale in (8, 8, 2, 2):
            layers += [nn.LeakyReLU(0.2), nn.ConvTranspose1d(width, width // 2, 2 * scale, scale, scale // 2)]
            width //= 2
            layers += [PublishedBlock(width, 3**j) for j in range(3)]
        layers += [nn.LeakyReLU(0.2), nn.ReflectionPad1d(3), nn.Conv1d(width, 1, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                weight_norm(layer)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        return self.model(mel)


@pytest.fixture(scope="session")
def make_voice() -> Callable[..., tuple[Path, Checkpoint]]:
    """Return a function that exports a random generator of any shape and returns the bundle's path and the checkpoint."""
    return random_voice


def random_voice(config: GeneratorConfig, folder: Path, precisions: tuple[str, ...] = ("fp32",)) -> tuple[Path, Checkpoint]:
    noise = np.random.default_rng(0)
    weights = {}
    for name, shape in config.tensors():
        fan = 2 * shape[0] if "upsample" in name else int(np.prod(shape[1:]))
        weights[name] = ((0.1 if name.endswith("bias") else 1 / np.sqrt(fan)) * noise.standard_normal(shape)).astype(np.float32)
    rate = 500 * config.hop
    spec = MelSpec(sample_rate=rate, n_fft=4 * config.hop, hop=config.hop, win_length=4 * config.hop, n_mels=8, f_max=rate / 2)
    checkpoint = Checkpoint("x", "melrt", folder, "", config, weights, spec)
    native.save(folder / "checkpoint", checkpoint)
    return export_voice(folder / "checkpoint", folder / "x.melrt", ExportOptions(precisions=precisions)).path, checkpoint


@pytest.fixture
def published_class() -> type[PublishedGenerator]:
    return PublishedGenerator


@pytest.fixture(scope="session")
def published() -> PublishedGenerator:
    torch.manual_seed(0)
    return PublishedGenerator().eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(published: PublishedGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as melgan-neurips's training leaves it: weights with weight norm, and a dumped Namespace."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    folder.mkdir()
    torch.save(published.state_dict(), folder / "best_netG.pt")
    args = "!!python/object:argparse.Namespace\nn_mel_channels: 80\nngf: 4\nn_residual_layers: 3\n"
    args += "save_path: !!python/object/apply:pathlib.PosixPath\n- logs\n- tiny\n"
    (folder / "args.yml").write_text(args)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle_path(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `tiny_checkpoint`, in place of the committed one."""
    path = tmp_path_factory.mktemp("bundles") / "tiny.melrt"
    export_voice(tiny_checkpoint, path)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: networks this small are ten times slower on two threads if another process uses one of the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
