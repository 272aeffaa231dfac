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

from melrt.checks import check_fields, flag, list_of, whole
from melrt.errors import ConfigError

GraphKind = Literal["edge", "interior"]

# Dividing an utterance among workers shortens its latency, and each share recomputes its context: less than a fifth from this length on.
LEAST_SHARE = 32
# The widest published network sees 30 frames on either side.
MAX_CONTEXT = 10_000
# Limit of a policy's frames, batch and workers, far above any useful value.
MOST = 65_536
# The shortest static window keeps this many frames, as many as a stream is often given at once (186 ms at 22,050 Hz and a hop of 256).
LEAST_KEPT = 16
# A short window of more than this share of the full one saves too little for a shape of its own.
MOST_SHORT = 0.6


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
    short: tuple[int, ...] = ()
    """Further lengths of static windows, each below `frames`, in rising order. A part that fits one of them takes the shortest."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("frames", "batch", "workers", "multiple"), whole(1, MOST))
        check_fields(self, {**counts, "static": flag(), "short": list_of(whole(1, MOST), 0, 16)}, "window policy")
        object.__setattr__(self, "short", tuple(self.short))  # JSON has lists
        if self.frames % self.multiple:
            raise ConfigError(f"window policy: frames is {self.frames}; it must be a multiple of {self.multiple}.")
        if self.short and (not self.static or list(self.lengths) != sorted(set(self.lengths))):
            raise ConfigError(f"window policy: short is {self.short}; static windows have lengths below {self.frames}, in rising order.")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the windows in rising order; of windows that are cut evenly, the largest."""
        return *self.short, self.frames

    def check(self, field: ReceptiveField) -> None:
        """Raise ConfigError if a window of this length would leave nothing of this network's output after its context is discarded."""
        least = max(field.context + 1, field.edge)
        if self.lengths[0] < least:
            raise ConfigError(
                f"windows of {self.lengths[0]} frames leave nothing beside this voice's context of {field.left} + {field.right}; "
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


def short_windows(field: ReceptiveField, frames: int) -> tuple[int, ...]:
    """Return lengths for `Policy.short` beside windows of this many frames.

    They keep 16, 32, 64, ... frames, as a stream's pieces double, and are rounded up to a multiple of 16.
    """
    kept = (LEAST_KEPT << power for power in range(frames.bit_length()))
    lengths = (-(-(max(field.context, field.edge) + more) // LEAST_KEPT) * LEAST_KEPT for more in kept)
    return tuple(length for length in lengths if length <= MOST_SHORT * frames)


def longest_piece(field: ReceptiveField, policy: Policy) -> int:
    """Return how many frames of a stream to collect at most before they are computed: a static window, once it is full, gains nothing."""
    return policy.frames - field.context if policy.static else policy.frames


def piece(available: int, least: float, field: ReceptiveField, policy: Policy) -> int:
    """Return how many of a stream's frames to compute now.

    Args:
        available: Frames that can be computed.
        least: Fewest frames of a piece. A rest below that waits if static windows are full without it.
        field: The network's receptive field.
        policy: Shape of the windows.
    """
    if available < least:
        return 0
    rest = available % longest_piece(field, policy)
    return available - rest if policy.static and rest < min(least, available) else available


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
    """Cut static windows, unless one edge window from the utterance's start has fewer frames than they and than a full window."""
    stop = min(max(span.stop + field.right, field.edge), span.received)
    # before the first interior window, it has: they would need an edge window of their own, and context twice
    if stop < policy.frames and (span.start < field.left or stop < sum(window.frames for window in _cut(span, field, policy))):
        yield Window("edge", 0, stop, span.start, span.stop)
    else:
        yield from _cut(span, field, policy)


def _cut(span: Span, field: ReceptiveField, policy: Policy) -> Iterator[Window]:
    """Cut interior windows of one length, so that they share a run, and short edge windows.

    The length is the shortest that needs no more windows than the longest does.
    """
    last_interior = min(span.stop, span.received - field.right)
    at = span.start
    if at < field.left:
        stop = min(field.left, span.stop)
        yield _around(at, stop, span, field)
        at = stop
    if at < last_interior:
        lengths = [length for length in policy.lengths if length <= span.received]
        if not lengths:  # a stream that has received fewer frames than a window
            yield Window("edge", 0, span.received, at, span.stop)
            return
        rest = last_interior - at
        count = -(-rest // (lengths[-1] - field.context))
        length = next(length for length in lengths if count * (length - field.context) >= rest)
    while at < last_interior:
        start = min(at - field.left, span.received - length)
        stop = min(start + length - field.right, last_interior)
        yield Window("interior", start, start + length, at, stop)
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
