"""The shape of multi-receptive-field fusion (MRF), the residual part of a HiFi-GAN stage (Kong et al., NeurIPS 2020, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from melrt.checks import check_fields, flag, list_of, odd, whole
from melrt.errors import CheckpointError

# These limits keep a hostile or damaged config from describing a network that fills the memory.
MAX_BRANCHES = 8
MAX_BLOCKS = 8
MAX_KERNEL = 255
MAX_DILATION = 1024
_RULES = {
    "kernel_sizes": list_of(odd(1, MAX_KERNEL), 1, MAX_BRANCHES),
    "dilations": list_of(list_of(whole(1, MAX_DILATION), 1, MAX_BLOCKS), 1, MAX_BRANCHES),
    "paired": flag(),
}


@dataclass(frozen=True, slots=True)
class MrfConfig:
    """Shape of the residual part: the mean over branches, each a chain of residual blocks of one kernel size.

    The defaults are those of HiFi-GAN V1 and V2.
    """

    kernel_sizes: tuple[int, ...] = (3, 7, 11)
    """Kernel size of each branch, odd."""
    dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    """Dilation of each block, for each branch."""
    paired: bool = True
    """True if a second convolution of dilation 1 follows the dilated one (`ResBlock1`), false if not (`ResBlock2`)."""

    def __post_init__(self) -> None:
        check_fields(self, _RULES, "mrf", CheckpointError)
        if len(self.dilations) != len(self.kernel_sizes):
            raise CheckpointError(
                f"mrf: dilations is {self.dilations!r:.80}; it must have one list for each of {len(self.kernel_sizes)} kernel sizes."
            )
        object.__setattr__(self, "kernel_sizes", tuple(self.kernel_sizes))
        object.__setattr__(self, "dilations", tuple(map(tuple, self.dilations)))

    @property
    def widest_branch(self) -> list[tuple[int, int]]:
        """Kernel size and dilation of each convolution on the branch with the largest receptive field, which contains all others."""
        after = [1] if self.paired else []
        branches = [
            [(kernel, dilation) for block in blocks for dilation in (block, *after)]
            for kernel, blocks in zip(self.kernel_sizes, self.dilations, strict=True)
        ]
        return max(branches, key=lambda branch: sum((kernel - 1) * dilation for kernel, dilation in branch))

    def convolutions(self, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and weight shape of each convolution for this number of channels."""
        for i, (kernel, blocks) in enumerate(zip(self.kernel_sizes, self.dilations, strict=True)):
            for j in range(len(blocks)):
                for part in ("dilated", "plain") if self.paired else ("dilated",):
                    yield f"{i}.{j}.{part}", (channels, channels, kernel)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"kernel_sizes": list(self.kernel_sizes), "dilations": [list(branch) for branch in self.dilations]}

    @classmethod
    def from_dict(cls, values: Any) -> MrfConfig:
        """Create a config from the values that `to_dict` returns.

        Raises:
            CheckpointError: The value is not an object, a field is unknown, or a value is out of its range.
        """
        if not isinstance(values, dict) or (unknown := set(values) - set(_RULES)):
            given = f"has unknown fields {sorted(map(str, unknown))}" if isinstance(values, dict) else f"is {values!r:.80}"
            raise CheckpointError(f"mrf {given}; it must be an object with the fields {', '.join(_RULES)}.")
        return cls(**values)
