"""Rules for configuration fields, and the test for finite arrays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from melrt.checks import all_finite, check_fields, flag, number, one_of, optional, text, whole
from melrt.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([0.0, -1.0], True), ([3e38, 3e38], True), ([np.nan, 1], False), ([np.inf, 1], False), ([np.inf, -np.inf], False),
        ([3e38, 3e38, -np.inf], False), ([], True),
    ],
)  # fmt: skip
def test_all_finite(values: list[float], finite: bool) -> None:
    assert all_finite(np.array(values, np.float32)) is finite


@pytest.mark.parametrize(
    ("rule", "good", "bad", "allowed"),
    [
        (whole(1, 3), [1, 3], [0, 4, True, 2.0, "2"], "a whole number from 1 to 3"),
        (number(0, 1, above=True), [0.5, 1], [0, 1.1, float("nan"), float("inf"), False], "a finite number above 0 and at most 1"),
        (number(), [-1e9], [10**400, "1"], "a finite number"),
        (flag(), [True, False], [0, None], "true or false"),
        (text(), ["", "x"], [b"x", None], "text"),
        (one_of("a", 1), ["a", 1], ["b", 1.0, True], "one of a, 1"),
        (optional(whole(1, 3)), [None, 2], [0], "a whole number from 1 to 3, or None"),
    ],
)
def test_rules_accept_and_refuse(rule, good: list[object], bad: list[object], allowed: str) -> None:
    for value in good:
        check_fields(SimpleNamespace(x=value), {"x": rule})
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            check_fields(SimpleNamespace(x=value), {"x": rule}, "thing")
        assert str(caught.value) == f"thing: x is {value!r:.80}; it must be {allowed}."
    with pytest.raises(CheckpointError, match="^x is "):
        check_fields(SimpleNamespace(x=bad[0]), {"x": rule}, error=CheckpointError)
