"""A few hundred of the attacks of `make fuzz`."""

from __future__ import annotations

import pytest
from tests.fuzz.attacks import attack


@pytest.mark.parametrize(
    ("kind", "count"),
    [("bundles", 80), ("checkpoints", 60), ("archives", 20), ("records", 200), ("hdf5", 8), ("mels", 150), ("arrays", 100)],
)
def test_hostile_input_gives_melrts_errors(kind: str, count: int) -> None:
    if kind in ("checkpoints", "archives", "records", "hdf5"):
        pytest.importorskip("torch", reason="what reads them needs the extra `export`")
    results, failures = attack(kind, count)
    assert not failures, failures[:5]
    assert results["accepted"] >= 2, "most cases are so damaged that they test nothing"
    assert sum(results.values()) - results["accepted"] >= count // 4, "most cases are not damaged"
