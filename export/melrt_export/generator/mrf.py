"""Multi-receptive-field fusion: the residual part of a HiFi-GAN stage (Kong et al., NeurIPS 2020, section 2.2), as one frozen value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from melrt.errors import CheckpointError

# As the generator's own limits: a config must not be able to ask for a network that fills the memory.
MAX_BRANCHES = 8
MAX_BLOCKS = 8
MAX_KERNEL = 255
MAX_DILATION = 1024


@dataclass(frozen=True, slots=True)
class MrfConfig:
    """The mean over branches, each a chain of residual blocks of one kernel; the defaults are V1's and V2's."""

    kernel_sizes: tuple[int, ...] = (3, 7, 11)
    """Kernel of each branch, odd."""
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    """Of each branch, the dilation of each of its blocks."""
    paired: bool = True
    """Whether a second convolution, of dilation 1, follows the dilated one (`ResBlock1`), or not (`ResBlock2`)."""

    def __post_init__(self) -> None:
        kernels, branches = _whole_numbers(self.kernel_sizes, MAX_BRANCHES, MAX_KERNEL), self.dilations
        if kernels is None or any(kernel % 2 == 0 for kernel in kernels):
            raise CheckpointError(
                f"fusion kernel_sizes is {self.kernel_sizes!r:.80}; it is 1 to {MAX_BRANCHES} odd numbers up to {MAX_KERNEL}."
            )
        blocks = [_whole_numbers(branch, MAX_BLOCKS, MAX_DILATION) for branch in branches] if isinstance(branches, list | tuple) else []
        if len(blocks) != len(kernels) or None in blocks:
            raise CheckpointError(
                f"fusion dilations is {branches!r:.80}; it is, for each of {len(kernels)} kernels, 1 to {MAX_BLOCKS} whole numbers "
                f"up to {MAX_DILATION}."
            )
        if type(self.paired) is not bool:
            raise CheckpointError(f"fusion paired is {self.paired!r:.80}; it is true or false.")
        object.__setattr__(self, "kernel_sizes", kernels)
        object.__setattr__(self, "dilations", tuple(blocks))

    @property
    def widest(self) -> list[tuple[int, int]]:
        """Kernel and dilation of the convolutions on the branch that sees farthest; all others see less, to both sides."""
        after = [1] if self.paired else []
        branches = [
            [(kernel, dilation) for block in blocks for dilation in (block, *after)]
            for kernel, blocks in zip(self.kernel_sizes, self.dilations, strict=True)
        ]
        return max(branches, key=lambda branch: sum((kernel - 1) * dilation for kernel, dilation in branch))

    def convolutions(self, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and weight shape of each convolution at this many channels."""
        for i, (kernel, blocks) in enumerate(zip(self.kernel_sizes, self.dilations, strict=True)):
            for j in range(len(blocks)):
                for part in ("dilated", "plain") if self.paired else ("dilated",):
                    yield f"{i}.{j}.{part}", (channels, channels, kernel)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"kernel_sizes": list(self.kernel_sizes), "dilations": [list(branch) for branch in self.dilations]}

    @classmethod
    def from_dict(cls, values: Any) -> MrfConfig:
        """Read `to_dict`'s form.

        Raises:
            CheckpointError: Not a mapping, an unknown field, or a value out of its range.
        """
        if not isinstance(values, dict) or (unknown := set(values) - {"kernel_sizes", "dilations", "paired"}):
            given = f"has unknown fields {sorted(map(str, unknown))}" if isinstance(values, dict) else f"is {values!r:.80}"
            raise CheckpointError(f"fusion {given}; it has kernel_sizes, dilations and paired.")
        return cls(**values)


def _whole_numbers(values: Any, most: int, limit: int) -> tuple[int, ...] | None:
    """These, or None if they are not 1 to `most` whole numbers from 1 to `limit`."""
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= most:
        return None
    return tuple(values) if all(type(value) is int and 1 <= value <= limit for value in values) else None
