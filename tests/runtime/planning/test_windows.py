"""The planner: every frame is kept once, with its full context or at a true end, for any network, length and policy."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melrt.errors import ConfigError
from melrt.planning.windows import Policy, ReceptiveField, Span, Window, longest_piece, look_back, piece, plan, ready, short_windows


@st.composite
def networks(draw: st.DrawFn) -> tuple[ReceptiveField, Policy]:
    left, right = draw(st.integers(0, 14)), draw(st.integers(0, 14))
    field = ReceptiveField(left, right, draw(st.integers(1, 9)), draw(st.integers(max(left, right) + 1, left + right + 1)))
    least = max(left + right + 1, field.edge)
    multiple = draw(st.sampled_from((1, 1, 4, 8)))
    frames = -(-draw(st.integers(least, least + 80)) // multiple) * multiple
    static = multiple == 1 and draw(st.booleans())
    short = sorted(draw(st.sets(st.integers(least, frames - 1), max_size=4))) if static and frames > least else []
    batch, workers = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    policy = Policy(frames, static=static, batch=batch, workers=workers, multiple=multiple, short=tuple(short))
    policy.check(field)
    return field, policy


def check(window: Window, span: Span, field: ReceptiveField, policy: Policy) -> None:
    """Check that the kept frames of a window are exact."""
    assert 0 <= window.start <= window.keep_start < window.keep_stop <= window.stop <= span.received
    whole = window.start == 0 and window.stop == span.received and span.ended
    left = window.keep_start - window.start >= field.left
    right = window.stop - window.keep_stop >= field.right
    if window.graph == "interior":
        assert left
        assert right
        assert window.frames in policy.lengths if policy.static else window.frames <= policy.frames
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
        assert len({w.frames for w in windows if w.graph == "interior"}) <= 1, "the windows of one utterance share a run"


@settings(max_examples=400)
@given(networks(), st.lists(st.integers(0, 120), min_size=1, max_size=12), st.integers(0, 40))
def test_stream_in_any_pieces_is_covered_once(network: tuple[ReceptiveField, Policy], pieces: list[int], least: int) -> None:
    """Frames arrive in any pieces. Windows run whenever at least `least` frames can be computed."""
    field, policy = network
    received = done = held = 0
    kept: list[Window] = []
    for frames in pieces:
        held = max(held, done - look_back(field, policy))  # the first frame that the stream must still hold
        received += frames
        until = ready(received, False, field)
        until = done + piece(max(until - done, 0), least, field, policy)
        if until > done:
            span = Span(done, until, received, ended=False)
            windows = list(plan(span, field, policy))
            for window in windows:
                check(window, span, field, policy)
                assert window.start >= held
            kept += windows
            done = until
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


def test_pieces_of_a_stream_take_the_shortest_window_that_keeps_them() -> None:
    field = ReceptiveField(6, 6, 4, 7)
    assert short_windows(field, 256) == (32, 48, 80, 144), "they keep 16, 32, 64 and 128 frames or a few more"
    policy = Policy(256, static=True, batch=16, workers=3, short=short_windows(field, 256))
    assert Policy(**json.loads(json.dumps(asdict(policy)))) == policy, "a record of tuned windows has lists"

    def lengths(start: int, stop: int, received: int, *, ended: bool = False) -> list[tuple[str, int]]:
        return [(window.graph, window.frames) for window in plan(Span(start, stop, received, ended), field, policy)]

    assert lengths(0, 10, 16) == [("edge", 16)], "the first piece is one window"
    assert lengths(10, 26, 32) == [("interior", 32)]
    for kept, frames in {1: 32, 20: 32, 21: 48, 36: 48, 37: 80, 132: 144, 133: 256, 244: 256}.items():
        assert lengths(494 - kept, 494, 500) == [("interior", frames)]
    assert lengths(21, 58, 64) == [("interior", 32)] * 2, "a window of 80 frames is longer than what was received"
    assert lengths(250, 495, 501) == [("interior", 144)] * 2, "as many windows as two full ones"
    assert lengths(200, 494, 500) == [("interior", 256)] * 2, "three windows of 144 frames would be one more"
    assert lengths(480, 500, 500, ended=True) == [("interior", 32), ("edge", 12)]
    assert lengths(10, 20, 20, ended=True) == [("edge", 20)], "there are fewer frames than in any window"
    assert lengths(0, 86, 86, ended=True) == [("edge", 86)]
    assert lengths(10, 96, 106, ended=True) == [("edge", 102)], "frames that were added at the ends are no reason for two windows"


def test_a_piece_fills_static_windows_unless_the_rest_is_long_enough_for_a_piece() -> None:
    field = ReceptiveField(6, 6, 4, 7)
    static, even = Policy(256, static=True, batch=16, workers=3), Policy(128, static=False, batch=1, workers=2)
    assert [piece(available, 244, field, static) for available in (243, 244, 260, 488, 500)] == [0, 244, 244, 488, 488]
    assert [piece(available, 8, field, static) for available in (7, 8, 244, 251, 252)] == [0, 8, 244, 244, 252]
    assert [piece(available, 128, field, even) for available in (127, 128, 140)] == [0, 128, 140]
    assert piece(300, 1000, field, static) == 0
    assert (longest_piece(field, static), longest_piece(field, even)) == (244, 128)


def test_windows_that_keep_no_frame_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"windows of 12 frames leave nothing.*at least 13"):
        Policy(12, static=True, batch=1, workers=1).check(ReceptiveField(6, 6, 4, 7))
    with pytest.raises(ConfigError, match=r"windows of 12 frames leave nothing.*at least 13"):
        Policy(64, static=True, batch=1, workers=1, short=(12, 32)).check(ReceptiveField(6, 6, 4, 7))
    for wrong in ({"short": (32, 64)}, {"short": (48, 32)}, {"short": (32,), "static": False}):
        with pytest.raises(ConfigError, match="static windows have lengths below 64, in rising order"):
            Policy(**{"frames": 64, "static": True, "batch": 1, "workers": 1} | wrong)
    with pytest.raises(ConfigError, match="frames is 100; it must be a multiple of 8"):
        Policy(100, static=False, batch=1, workers=1, multiple=8)
    with pytest.raises(ConfigError, match="workers is 0"):
        Policy(64, static=True, batch=1, workers=0)
