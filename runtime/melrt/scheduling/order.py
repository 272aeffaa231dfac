"""The order in which queues get lanes: fair by weight, then by deadline. A choice costs O(log n) for n queues with windows."""

from __future__ import annotations

import heapq
from collections.abc import Container
from typing import Generic, NamedTuple, TypeVar

# Rounding errors of a sum, relative to it, are smaller than this.
ROUNDING = 1e-9
# The heaps are built again after this many additions, and two for each queue: until then they hold items that are out of date.
MAX_PUSHED = 64

K = TypeVar("K")


class _Entry(NamedTuple):
    """Lane time of a queue per weight, the deadline of its most urgent window, and its parts of the sums over all queues."""

    used: float
    deadline: float
    flooded: bool
    seconds: float
    weight: float


class _Item(NamedTuple, Generic[K]):
    """A queue in a heap, ordered by its deadline or lane time, then by the number of the item."""

    order: float
    number: int
    key: K
    entry: _Entry


class FairOrder(Generic[K]):
    """Queues with windows, by their lane time and deadlines.

    A queue is within its share if it is not flooded, and its lane time per weight is at most the mean of all queues here. Queues within
    their shares come first, the earliest deadline before the others; then the queue with the least lane time. The windows of a flooded
    queue have waited for so long that their deadlines would come before those of all others. Two heaps hold the queues within and above
    their shares. A queue is moved when it comes to the top of the wrong heap, because the mean changes with every run.

    Not safe for use by several threads, but `put` and `discard` may interrupt another method of the same thread: they leave the heaps as
    they are.
    """

    def __init__(self) -> None:
        self._entries: dict[K, _Entry] = {}
        self._within: list[_Item[K]] = []  # by deadline
        self._above: list[_Item[K]] = []  # by lane time
        self._changed: dict[K, None] = {}  # those that are not in a heap yet
        self._pushed = 0
        self._seconds = self._weight = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def put(self, key: K, deadline: float, seconds: float, weight: float, *, flooded: bool = False) -> None:
        """Add a queue, or change its deadline, lane time, weight and whether it is flooded."""
        self.discard(key)
        self._entries[key] = _Entry(seconds / weight, deadline, flooded, seconds, weight)
        self._seconds += seconds
        self._weight += weight
        self._changed[key] = None

    def discard(self, key: K) -> None:
        """Remove a queue, if it is here."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._seconds -= entry.seconds
            self._weight -= entry.weight
            self._changed.pop(key, None)

    def first(self, full: Container[K]) -> K | None:
        """Return the queue that comes first among those that are not in `full`; None if there is none."""
        alone = len(self._entries) < 2
        if self._pushed > (0 if alone else 2 * len(self._entries) + MAX_PUSHED):
            self._rebuild()
        if alone:
            return next((key for key in self._entries if key not in full), None)
        while self._changed:
            key, _ = self._changed.popitem()
            if key in self._entries:
                self._push(key, self._entries[key])
        while self._above and (self._is_stale(self._above[0]) or self._is_within(self._above[0].entry)):
            self._move(self._above)
        found = self._top(self._within, full)
        return self._top(self._above, full) if found is None else found

    def _top(self, heap: list[_Item[K]], full: Container[K]) -> K | None:
        """Return the first queue of a heap that is not in `full`, and move those at its top that belong into the other heap."""
        aside, found = [], None
        while heap and found is None:
            if self._is_stale(heap[0]) or self._is_within(heap[0].entry) is not (heap is self._within):
                self._move(heap)
            elif heap[0].key in full:
                aside.append(heapq.heappop(heap))
            else:
                found = heap[0].key
        for item in aside:
            heapq.heappush(heap, item)
        return found

    def _move(self, heap: list[_Item[K]]) -> None:
        """Remove the top of a heap, and put its queue into the heap where it belongs now."""
        item = heapq.heappop(heap)
        if not self._is_stale(item):
            self._push(item.key, item.entry)

    def _push(self, key: K, entry: _Entry) -> None:
        within = self._is_within(entry)
        self._pushed += 1
        heapq.heappush(self._within if within else self._above, _Item(entry.deadline if within else entry.used, self._pushed, key, entry))

    def _is_within(self, entry: _Entry) -> bool:
        return not entry.flooded and entry.used * self._weight <= self._seconds * (1 + ROUNDING)

    def _is_stale(self, item: _Item[K]) -> bool:
        return self._entries.get(item.key) is not item.entry

    def _rebuild(self) -> None:
        """Drop items that are out of date, and errors of the sums: of rounding, and of a call that interrupted another."""
        self._seconds = sum(entry.seconds for entry in self._entries.values())
        self._weight = sum(entry.weight for entry in self._entries.values())
        self._within.clear()
        self._above.clear()
        self._pushed = 0
        self._changed = dict.fromkeys(self._entries)
