"""Checks: rules for the fields of configuration objects, with one message for all, and a fast test for finite arrays."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from melrt.errors import ConfigError, MelrtError


class Rule(NamedTuple):
    """Condition on the value of a field."""

    accepts: Callable[[Any], bool]
    allowed: str
    """Completes the sentence that begins with "it must be"."""


def whole(low: int, high: int) -> Rule:
    """Accept whole numbers from `low` to `high`."""
    return Rule(lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}")


def odd(low: int, high: int) -> Rule:
    """Accept odd whole numbers from `low` to `high`."""
    return Rule(lambda value: whole(low, high).accepts(value) and value % 2 == 1, f"an odd number from {low} to {high}")


def even(low: int, high: int) -> Rule:
    """Accept even whole numbers from `low` to `high`."""
    return Rule(lambda value: whole(low, high).accepts(value) and value % 2 == 0, f"an even number from {low} to {high}")


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Accept finite numbers from `low` to `high`; `above` and `below` exclude the bound itself."""

    def accepts(value: Any) -> bool:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        return bool((low < value if above else low <= value) and (value < high if below else value <= high))

    bounds = [f"{'above' if above else 'at least'} {low:g}"] if low > -math.inf else []
    bounds += [f"{'below' if below else 'at most'} {high:g}"] if high < math.inf else []
    return Rule(accepts, " ".join(["a finite number", " and ".join(bounds)]).strip())


def flag() -> Rule:
    """Accept true and false."""
    return Rule(lambda value: type(value) is bool, "true or false")


def text() -> Rule:
    """Accept strings."""
    return Rule(lambda value: isinstance(value, str), "text")


def one_of(*values: object) -> Rule:
    """Accept exactly these values."""
    return Rule(lambda value: any(type(value) is type(v) and value == v for v in values), f"one of {', '.join(map(str, values))}")


def optional(rule: Rule) -> Rule:
    """Accept None, or what another rule accepts."""
    return Rule(lambda value: value is None or rule.accepts(value), f"{rule.allowed}, or None")


def list_of(rule: Rule, low: int, high: int) -> Rule:
    """Accept lists and tuples of `low` to `high` values that another rule accepts."""

    def accepts(values: Any) -> bool:
        return isinstance(values, list | tuple) and low <= len(values) <= high and all(map(rule.accepts, values))

    count = f"{low}" if low == high else f"{low} to {high}"
    return Rule(accepts, f"a list of {count} values, each {rule.allowed}")


def all_finite(values: NDArray[np.float32]) -> bool:
    """Return True if every value is finite. numpy vectorizes both steps: half the time of a sum, which adds in a fixed order."""
    return bool(np.isfinite(values).all())


def check_fields(owner: object, rules: Mapping[str, Rule], subject: str = "", error: type[MelrtError] = ConfigError) -> None:
    """Check the fields of a configuration object.

    Args:
        owner: The object.
        rules: Rule of each field, by name.
        subject: Beginning of the message; names what the object configures.
        error: Class of the error raised for the first field that breaks its rule, with name, value and allowed values.
    """
    for name, rule in rules.items():
        value = getattr(owner, name)
        if not rule.accepts(value):
            where = f"{subject}: " if subject else ""
            raise error(f"{where}{name} is {value!r:.80}; it must be {rule.allowed}.")
