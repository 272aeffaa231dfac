"""The order of queues, compared with one that looks at all of them each time."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from melrt.scheduling.order import MAX_PUSHED, FairOrder


def plain_first(queues: dict[int, tuple[float, float, float]], full: set[int]) -> set[int]:
    """Return the queues of which one must come first, by the definition of `FairOrder`."""
    share = sum(seconds for _, seconds, _ in queues.values()) / sum(weight for *_, weight in queues.values())
    free = {key: one for key, one in queues.items() if key not in full}
    if within := {key: one for key, one in free.items() if one[1] / one[2] <= share * (1 + 1e-9)}:
        earliest = min(deadline for deadline, *_ in within.values())
        return {key for key, one in within.items() if one[0] == earliest}
    least = min((seconds / weight for _, seconds, weight in free.values()), default=0.0)
    return {key for key, (_, seconds, weight) in free.items() if seconds / weight == least}


@pytest.mark.parametrize("seed", range(4))
def test_order_is_that_of_its_definition(seed: int) -> None:
    noise = np.random.default_rng(seed)
    order: FairOrder[int] = FairOrder()
    queues: dict[int, tuple[float, float, float]] = {}
    for _ in range(2000):
        key = int(noise.integers(30))
        if noise.random() < 0.2:
            order.discard(key)
            queues.pop(key, None)
        else:
            _, seconds, weight = queues.get(key, (0.0, float(noise.integers(5)), float(noise.choice([1.0, 2.0, 0.5]))))
            queues[key] = float(noise.integers(100)), seconds + float(noise.random()), weight
            order.put(key, *queues[key])
        full = {int(one) for one in noise.integers(30, size=noise.integers(6))}
        if queues:
            first = order.first(full)
            assert first in (plain_first(queues, full) or {None})
        assert len(order) == len(queues)
    for key in list(queues):
        order.discard(key)
    assert order.first(set()) is None


def test_a_choice_among_thousands_of_queues_looks_at_few() -> None:
    """2,000 queues run in turn; the heaps are touched a few times for each run, not once for each queue."""
    order: FairOrder[int] = FairOrder()
    touched = 0

    class Counting(FairOrder[int]):
        def _is_stale(self, item) -> bool:
            nonlocal touched
            touched += 1
            return super()._is_stale(item)

    order = Counting()
    used = dict.fromkeys(range(2000), 0.0)
    for key in used:
        order.put(key, 0.0, 0.0, 1.0)
    for number in range(10_000):
        key = order.first(set())
        used[key] += 0.01
        order.put(key, float(number), used[key], 1.0)
    assert max(used.values()) - min(used.values()) < 0.011, "each had its turn"
    assert touched < 20 * 10_000


def test_what_is_out_of_date_is_dropped() -> None:
    class Key:
        pass

    order: FairOrder[Key] = FairOrder()
    keys = [Key() for _ in range(3)]
    for number in range(1000):  # later entries come before the earlier ones, which therefore never reach the top
        for key in keys:
            order.put(key, -float(number), 1.0, 1.0)
        order.first(set())
    assert order._pushed <= 2 * len(keys) + MAX_PUSHED + len(keys)
    gone = [weakref.ref(key) for key in keys[:2]]
    for key in keys[:2]:
        order.discard(key)
    del key, keys[:2]
    assert order.first(set()) is keys[0]
    assert [one() for one in gone] == [None, None], "a queue that is closed is not kept alive"
    lone: FairOrder[Key] = FairOrder()
    lone.put(keys[0], 0.0, 0.0, 1.0)
    lone.discard(keys[0])
    gone = [weakref.ref(keys.pop())]
    order.discard(gone[0]())  # type: ignore[arg-type]
    order.first(set())
    assert gone[0]() is None
