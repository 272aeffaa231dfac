"""Names of the generator's convolutions in projects that build it as one PyTorch Sequential.

The projects differ in whether the residual blocks are modules of the Sequential itself or are nested by stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.generator.config import GeneratorConfig


@dataclass(frozen=True, slots=True)
class LayerNaming:
    """One project's numbering and names of the convolutions in its Sequential."""

    project: str
    """Name of the project, for error messages."""
    prefix: str
    """Attribute that holds the Sequential."""
    nested: bool = False
    """True for one module per stage with `blocks` and `shortcuts`; False for one module per residual block."""
    block: str = "block"
    """Attribute of a residual block's main path, if not nested."""
    shortcut: str = "shortcut"
    """Attribute of a residual block's shortcut, if not nested."""
    causal: bool = False
    """True if the padding is inside the convolutions' modules (`conv`, `deconv`); False if it is a module of its own."""

    def names(self, config: GeneratorConfig) -> dict[str, str]:
        """Return this project's name of each convolution, by melrt's name."""
        conv, deconv = (".conv", ".deconv") if self.causal else ("", "")
        pad = 0 if self.causal else 1
        result = {"first": f"{self.prefix}.{pad}{conv}"}
        index = pad + 2  # after the first convolution and the stage's activation
        for i in range(len(config.upsample_scales)):
            result[f"stages.{i}.upsample"] = f"{self.prefix}.{index}{deconv}"
            for j in range(config.stacks):
                dilated, pointwise, shortcut = self._block_names(index + 1, j)
                result[f"stages.{i}.blocks.{j}.dilated"] = dilated
                result[f"stages.{i}.blocks.{j}.pointwise"] = pointwise
                result[f"stages.{i}.blocks.{j}.shortcut"] = shortcut
            index += 2 + (1 if self.nested else config.stacks)
        result["last"] = f"{self.prefix}.{index + pad}{conv}"
        return result

    def infer_config(self, state: Mapping[str, np.ndarray], file: Path) -> GeneratorConfig:
        """Infer the generator's shape from its folded weights.

        Direct children of the Sequential are the first convolution, the upsamplings and the last convolution, in this order. All
        others belong to residual blocks.

        Raises:
            CheckpointError: The tensors are not those of such a generator.
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
            raise CheckpointError(
                f"{file} has {len(dilated)} residual blocks in {len(upsamples)} stages; expected the same number in each stage."
            )
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

    def _block_names(self, index: int, j: int) -> tuple[str, str, str]:
        """Return the names of a residual block's dilated, pointwise and shortcut convolutions."""
        if self.nested:
            stage = f"{self.prefix}.{index}"
            return f"{stage}.blocks.{j}.2", f"{stage}.blocks.{j}.4", f"{stage}.shortcuts.{j}"
        block = f"{self.prefix}.{index + j}"
        dilated, pointwise = ("1.conv", "3") if self.causal else ("2", "4")
        return f"{block}.{self.block}.{dilated}", f"{block}.{self.block}.{pointwise}", f"{block}.{self.shortcut}"
