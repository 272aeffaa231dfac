"""The names that projects give to the same convolutions: one Sequential, its residual blocks flat in it or nested by stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.generator.config import GeneratorConfig


@dataclass(frozen=True, slots=True)
class Naming:
    """How one project numbers and names the convolutions of its Sequential."""

    project: str
    """For error messages."""
    prefix: str
    """Attribute that holds the Sequential."""
    nested: bool = False
    """One module per stage, with `blocks` and `shortcuts`; else one module per residual block."""
    block: str = "block"
    """Flat only: a residual block's main path."""
    shortcut: str = "shortcut"
    """Flat only: its shortcut."""
    causal: bool = False
    """Padding within the convolutions' own modules (`conv`, `deconv`) instead of modules of its own."""

    def names(self, config: GeneratorConfig) -> dict[str, str]:
        """Melrt's name of each convolution to this project's."""
        conv, deconv = (".conv", ".deconv") if self.causal else ("", "")
        pad = 0 if self.causal else 1
        result = {"first": f"{self.prefix}.{pad}{conv}"}
        index = pad + 2  # after the first convolution and the stage's activation
        for i in range(len(config.upsample_scales)):
            result[f"stages.{i}.upsample"] = f"{self.prefix}.{index}{deconv}"
            for j in range(config.stacks):
                dilated, pointwise, shortcut = self._block(index + 1, j)
                result[f"stages.{i}.blocks.{j}.dilated"] = dilated
                result[f"stages.{i}.blocks.{j}.pointwise"] = pointwise
                result[f"stages.{i}.blocks.{j}.shortcut"] = shortcut
            index += 2 + (1 if self.nested else config.stacks)
        result["last"] = f"{self.prefix}.{index + pad}{conv}"
        return result

    def infer(self, state: Mapping[str, np.ndarray], file: Path) -> GeneratorConfig:
        """The generator's shape from its folded weights: plain convolutions are first, upsamplings and last; the rest are blocks.

        Raises:
            CheckpointError: Not such a generator.
        """
        plain: dict[int, np.ndarray] = {}
        dilated: list[np.ndarray] = []
        inner = r"blocks\.\d{1,2}\.2" if self.nested else rf"{self.block}\.2"
        for name, value in state.items():
            match = re.fullmatch(rf"{self.prefix}\.(\d{{1,4}})\.({inner}\.)?weight", name)
            if match and value.ndim == 3:
                if match[2]:
                    dilated.append(value)
                else:
                    plain[int(match[1])] = value
        if len(plain) < 3 or not dilated:
            expected = ", ".join(list(self.names(GeneratorConfig()).values())[:3])
            some = ", ".join(list(state)[:4])
            raise CheckpointError(f"{file} is not a generator of {self.project}: expected tensors {expected}, ...; it has {some}, ...")
        first, *upsamples, last = (plain[i] for i in sorted(plain))
        if len(dilated) % len(upsamples):
            raise CheckpointError(f"{file} has {len(dilated)} residual blocks in {len(upsamples)} stages; expected as many in each.")
        return GeneratorConfig(
            in_channels=first.shape[1],
            out_channels=last.shape[0],
            channels=first.shape[0],
            kernel_size=first.shape[2],
            upsample_scales=tuple(w.shape[2] // 2 for w in upsamples),
            stacks=len(dilated) // len(upsamples),
            stack_kernel_size=dilated[0].shape[2],
            bias=any(name.endswith(".bias") for name in state),
        )

    def _block(self, index: int, j: int) -> tuple[str, str, str]:
        if self.nested:
            stage = f"{self.prefix}.{index}"
            return f"{stage}.blocks.{j}.2", f"{stage}.blocks.{j}.4", f"{stage}.shortcuts.{j}"
        block = f"{self.prefix}.{index + j}"
        dilated, pointwise = ("1.conv", "3") if self.causal else ("2", "4")
        return f"{block}.{self.block}.{dilated}", f"{block}.{self.block}.{pointwise}", f"{block}.{self.shortcut}"
