"""The planner: every frame is kept once, with its full context or at a true end, for any network, length and policy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melrt.errors import ConfigError
from melrt.planning.windows import Policy, ReceptiveField, Span, Window, look_back, plan, ready


@st.composite
def networks(draw: st.DrawFn) -> tuple[ReceptiveField, Policy]:
    left, right = draw(st.integers(0, 14)), draw(st.integers(0, 14))
    field = ReceptiveField(left, right, draw(st.integers(1, 9)), draw(st.integers(max(left, right) + 1, left + right + 1)))
    least = max(left + right + 1, field.edge)
    multiple = draw(st.sampled_from((1, 1, 4, 8)))
    frames = -(-draw(st.integers(least, least + 80)) // multiple) * multiple
    static = multiple == 1 and draw(st.booleans())
    return field, Policy(frames, static=static, batch=draw(st.integers(1, 8)), workers=draw(st.integers(1, 5)), multiple=multiple)


def check(window: Window, span: Span, field: ReceptiveField, policy: Policy) -> None:
    """Check that the kept frames of a window are exact."""
    assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= span.received
    whole = window.start == 0 and window.stop == span.received and span.ended
    left = window.keep_start - window.start >= field.left
    right = window.stop - window.keep_stop >= field.right
    if window.graph == "interior":
        assert left
        assert right
        assert window.frames == policy.frames if policy.static else window.frames <= policy.frames
        assert window.frames % policy.multiple == 0 or window.start == 0
    else:
        assert left or window.start == 0
        assert right or (span.ended and window.stop == span.received)
        # long enough for reflection at an end, unless the utterance itself is shorter
        assert window.frames >= field.edge or whole


@settings(max_examples=400)
@given(networks(), st.integers(1, 700))
def test_whole_utterance_is_covered_once(network: tuple[ReceptiveField, Policy], total: int) -> None:
    field, policy = network
    span = Span(0, total, total, ended=True)
    windows = list(plan(span, field, policy))
    for window in windows:
        check(window, span, field, policy)
    assert [w.keep_start for w in windows] == [0, *(w.keep_stop for w in windows[:-1])]
    assert windows[-1].keep_stop == total
    if policy.static:
        edges = [w for w in windows if w.graph == "edge"]
        assert len(edges) <= 2
        assert total < policy.frames or all(w.frames == max(field.left + field.right, field.edge) for w in edges)


@settings(max_examples=400)
@given(networks(), st.lists(st.integers(0, 120), min_size=1, max_size=12), st.integers(0, 40))
def test_stream_in_any_pieces_is_covered_once(network: tuple[ReceptiveField, Policy], pieces: list[int], least: int) -> None:
    """Frames arrive in any pieces. Windows run whenever at least `least` frames can be computed."""
    field, policy = network
    received = done = held = 0
    kept: list[Window] = []
    for piece in pieces:
        held = max(held, done - look_back(field, policy))  # the first frame that the stream must still hold
        received += piece
        until = ready(received, False, field)
        if until - done >= least:
            span = Span(done, until, received, ended=False)
            windows = list(plan(span, field, policy))
            for window in windows:
                check(window, span, field, policy)
                assert window.start >= held
            kept += windows
            done = max(done, until)
    span = Span(done, received, received, ended=True)
    last = list(plan(span, field, policy))
    for window in last:
        check(window, span, field, policy)
        assert window.start >= held
    kept += last
    assert [w.keep_start for w in kept] == [0, *(w.keep_stop for w in kept[:-1])][: len(kept)]
    assert (kept[-1].keep_stop if kept else 0) == received


def test_windows_of_the_published_generator() -> None:
    """The context is 6 + 6 frames, so that a static window of 64 keeps 52. Each end is a window of 12 that keeps 6."""
    field = ReceptiveField(6, 6, 4, 7)
    policy = Policy(frames=64, static=True, batch=8, workers=1)
    assert list(plan(Span(0, 120, 120, True), field, policy)) == [
        Window("edge", 0, 12, 0, 6), Window("interior", 0, 64, 6, 58), Window("interior", 52, 116, 58, 110),
        Window("interior", 56, 120, 110, 114), Window("edge", 108, 120, 114, 120),
    ]  # fmt: skip
    assert list(plan(Span(0, 63, 63, True), field, policy)) == [Window("edge", 0, 63, 0, 63)]
    free = Policy(frames=64, static=False, batch=1, workers=2)
    assert list(plan(Span(0, 60, 60, True), field, free)) == [Window("edge", 0, 60, 0, 60)]
    assert list(plan(Span(0, 100, 100, True), field, free)) == [Window("edge", 0, 56, 0, 50), Window("edge", 44, 100, 50, 100)]
    widened = Policy(frames=64, static=False, batch=1, workers=1, multiple=16)
    assert [window.frames for window in plan(Span(0, 130, 130, True), field, widened)] == [64, 64, 64]


def test_windows_that_keep_no_frame_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"windows of 12 frames leave nothing.*at least 13"):
        Policy(12, static=True, batch=1, workers=1).check(ReceptiveField(6, 6, 4, 7))
    with pytest.raises(ConfigError, match="frames is 100; it must be a multiple of 8"):
        Policy(100, static=False, batch=1, workers=1, multiple=8)
    with pytest.raises(ConfigError, match="workers is 0"):
        Policy(64, static=True, batch=1, workers=0)
