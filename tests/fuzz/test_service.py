"""A few of the requests of `make fuzz`."""

from __future__ import annotations

import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="reads the service's open files and memory from /proc")
def test_hostile_requests_are_answered_and_leave_nothing() -> None:
    pytest.importorskip("httpx", reason="the tests of the service need the extra `dev`")
    from tests.fuzz.service import attack

    results, failures = attack(70)
    assert not failures, failures[:5]
    assert {"200", "101", "closed 1000", "400", "404", "422", "no answer"} <= set(results), results
