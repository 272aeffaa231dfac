"""The order of waiting windows, compared with a sorted list."""

from __future__ import annotations

import gc
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from melrt.planning.windows import Window
from melrt.scheduling.request import HostRequest, OutputFormat
from melrt.scheduling.waiting import WaitingWindows

MEL = np.zeros((1, 8), np.float32)


def request(deadline: float, lengths: list[int]) -> HostRequest:
    return HostRequest(MEL, 0, [Window("interior", 0, length, 0, length) for length in lengths], OutputFormat(1), deadline)


@given(
    requests=st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(1, 3), min_size=1, max_size=5)), max_size=12),
    removed=st.sets(st.integers(0, 11)),
    batch=st.integers(1, 4),
)
def test_takes_the_most_urgent_window_and_others_of_its_shape(requests, removed, batch) -> None:
    waiting, expected = WaitingWindows(), []
    made = [request(*each) for each in requests]
    for one in made:
        waiting.add(one)
    for index, one in enumerate(made):
        if index in removed:
            waiting.remove(one)
            waiting.remove(one)
        else:
            expected += [(one, window) for window in one.windows]
    expected.sort(key=lambda job: (job[0].deadline, job[0].arrival))
    while True:
        assert waiting.windows == len(expected)
        assert set(waiting.all()) == {one for one, _ in expected}
        jobs = waiting.take(batch)
        if not expected:
            assert jobs == []
            break
        wanted = [job for job in expected if job[1].frames == expected[0][1].frames][:batch]
        assert [(one, id(window)) for one, window in jobs] == [(one, id(window)) for one, window in wanted]
        expected = [job for job in expected if not any(job[1] is window for _, window in jobs)]


def test_removed_requests_are_not_kept_alive() -> None:
    waiting = WaitingWindows()
    alive = []
    for _ in range(500):
        one = request(1e9, [4, 4])
        alive.append(weakref.ref(one))
        waiting.add(one)
        waiting.remove(one)
    del one
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 33


def test_overdue_requests_are_the_oldest_that_wait() -> None:
    waiting = WaitingWindows()
    made = [request(9.0 - index, [4]) for index in range(4)]
    for one in made:
        waiting.add(one)
    waiting.remove(made[0])
    assert waiting.arrived_before(made[2].arrival) == [made[1]]
    assert waiting.take(1)[0][0] is made[3]
