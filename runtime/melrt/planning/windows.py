"""Exact windows: plan which frames run through which graph, and which part of the output is kept.

A sample depends on few mel frames. An utterance can therefore be cut into windows that overlap by the receptive field; their
valid middles, joined, equal the output for the whole utterance. The *edge* graph is the network as trained, including its padding.
A window on it begins or ends where the utterance does. Every other window runs on the *interior* graph, which pads with zeros
inside the convolutions; that padding affects only the window's context, which is discarded. Pure functions, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from melrt.checks import check_fields, flag, whole
from melrt.errors import ConfigError

GraphKind = Literal["edge", "interior"]

# Dividing an utterance among workers shortens its latency, and each share recomputes its context: less than a fifth from this length on.
LEAST_SHARE = 32
# The widest published network sees 30 frames on either side.
MAX_CONTEXT = 10_000
# Limit of a policy's frames, batch and workers, far above any useful value.
MOST = 65_536


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """The mel frames around a frame that its samples depend on."""

    left: int
    """Frames before it."""
    right: int
    """Frames after it: the look-ahead."""
    smallest_input: int
    """Fewest frames that the network takes."""
    end_reach: int
    """Frames at an utterance's beginning or end that its outermost frame depends on, reflections included."""

    def __post_init__(self) -> None:
        check_fields(self, dict.fromkeys(("left", "right", "smallest_input", "end_reach"), whole(0, MAX_CONTEXT)), "receptive field")

    @property
    def context(self) -> int:
        """Frames on both sides together."""
        return self.left + self.right

    @property
    def edge(self) -> int:
        """Fewest frames of a window at an end of the utterance."""
        return max(self.end_reach, self.smallest_input)


@dataclass(frozen=True, slots=True)
class Policy:
    """Shape of the windows that a backend runs. Each backend's default was measured (`docs/windows.md`)."""

    frames: int
    """Length of a window in frames, context included."""
    static: bool
    """Interior windows have exactly that length (an engine with one shape). Otherwise windows are cut evenly, at most that long."""
    batch: int
    """Largest number of windows of one shape in one run."""
    workers: int
    """Number of runs at the same time."""
    multiple: int = 1
    """Windows that are cut evenly are widened to a multiple of this length where the utterance allows it, so that few lengths occur."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("frames", "batch", "workers", "multiple"), whole(1, MOST))
        check_fields(self, {**counts, "static": flag()}, "window policy")
        if self.frames % self.multiple:
            raise ConfigError(f"window policy: frames is {self.frames}; it must be a multiple of {self.multiple}.")

    def check(self, field: ReceptiveField) -> None:
        """Raise ConfigError if a window of this length would leave nothing of this network's output after its context is discarded."""
        least = max(field.context + 1, field.edge)
        if self.frames < least:
            raise ConfigError(
                f"windows of {self.frames} frames leave nothing beside this voice's context of {field.left} + {field.right}; "
                f"take at least {least}."
            )


@dataclass(frozen=True, slots=True)
class Window:
    """Frames [start, stop) run through a graph; of its output, [keep_start, keep_stop) is kept. They count from the utterance's start."""

    graph: GraphKind
    start: int
    stop: int
    keep_start: int
    keep_stop: int

    @property
    def frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Span:
    """Part of an utterance to compute: frames [start, stop)."""

    start: int
    stop: int
    received: int
    """Frames received so far."""
    ended: bool
    """True if no more frames follow."""


def ready(received: int, ended: bool, field: ReceptiveField) -> int:
    """Return the number of frames, from the utterance's start, whose samples can be computed."""
    if ended:
        return received
    return max(received - field.right, 0) if received >= field.edge else 0


def look_back(field: ReceptiveField, policy: Policy) -> int:
    """Return how many frames before the next one to compute a later window may still begin with."""
    return max(field.left, field.edge, policy.frames if policy.static else 0) + policy.multiple - 1


def plan(span: Span, field: ReceptiveField, policy: Policy) -> Iterator[Window]:
    """Cut a span into windows, in order. Every frame of the span is kept exactly once.

    Args:
        span: Frames to compute; `span.stop` is at most `ready(span.received, span.ended, field)`.
        field: The network's receptive field.
        policy: Shape of the windows.
    """
    if span.start < span.stop:
        yield from (_static if policy.static else _even)(span, field, policy)


def _even(span: Span, field: ReceptiveField, policy: Policy) -> Iterator[Window]:
    """Cut windows of nearly equal length, enough for every worker. A single window needs no overlap: it is PyTorch's own forward."""
    frames = span.stop - span.start
    fits_one = span.ended and frames == span.received <= policy.frames
    count = 1 if fits_one else -(-frames // (policy.frames - field.left - field.right))
    count = max(count, min(policy.workers, frames // LEAST_SHARE))
    if count > 1:
        count = -(-count // policy.workers) * policy.workers
    for index in range(count):
        keep_start = span.start + frames * index // count
        keep_stop = span.start + frames * (index + 1) // count
        if keep_start < keep_stop:
            yield _widened(_around(keep_start, keep_stop, span, field), span, policy.multiple)


def _static(span: Span, field: ReceptiveField, policy: Policy) -> Iterator[Window]:
    """Cut interior windows of the policy's length and short edge windows. A shorter utterance runs on the edge graph alone."""
    if span.ended and span.received < policy.frames:
        yield Window("edge", 0, span.received, span.start, span.stop)
        return
    last_interior = min(span.stop, span.received - field.right)
    at = span.start
    if at < field.left:
        stop = min(field.left, span.stop)
        yield _around(at, stop, span, field)
        at = stop
    while at < last_interior:
        start = min(at - field.left, span.received - policy.frames)
        if start < 0:  # a stream that has received fewer frames than a window
            yield Window("edge", 0, span.received, at, span.stop)
            return
        stop = min(start + policy.frames - field.right, last_interior)
        yield Window("interior", start, start + policy.frames, at, stop)
        at = stop
    if at < span.stop:
        yield _around(at, span.stop, span, field)


def _around(keep_start: int, keep_stop: int, span: Span, field: ReceptiveField) -> Window:
    """Return the shortest window that computes these frames: with full context, or on the edge graph at an end of the utterance."""
    start, stop = max(keep_start - field.left, 0), keep_stop + field.right
    at_end = span.ended and stop >= span.received
    stop = min(stop, span.received)
    if start > 0 and not at_end:
        return Window("interior", start, stop, keep_start, keep_stop)
    if start == 0:
        stop = min(max(stop, field.edge), span.received)
    if at_end:
        start = max(min(start, stop - field.edge), 0)
    return Window("edge", start, stop, keep_start, keep_stop)


def _widened(window: Window, span: Span, multiple: int) -> Window:
    """Return the window with more context, so that its length is a multiple; shorter if the utterance has no more frames."""
    missing = -window.frames % multiple
    if window.start:
        return replace(window, start=max(window.start - missing, 0))
    return replace(window, stop=min(window.stop + missing, span.received))
