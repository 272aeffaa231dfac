"""One family of errors: what was wrong and its value, what is allowed, what to do."""

from __future__ import annotations


class MelrtError(Exception):
    """Every error that melrt raises on purpose; its text is meant for people."""


class MelError(MelrtError, ValueError):
    """A mel that this voice cannot take."""


class ConfigError(MelrtError, ValueError):
    """A setting outside what is allowed."""


class BundleError(MelrtError, ValueError):
    """A bundle that is missing, damaged, or newer than this melrt."""


class BackendError(MelrtError, RuntimeError):
    """An inference engine that this machine lacks, or that refused its work."""


class CheckpointError(MelrtError, ValueError):
    """A checkpoint that cannot be read, or does not hold the network it should."""


class ParityError(MelrtError, ArithmeticError):
    """An artifact whose output differs from PyTorch's by more than its limit."""


class EngineBuildError(MelrtError, RuntimeError):
    """A TensorRT engine that could not be built as asked."""


class CalibrationError(MelrtError, ValueError):
    """Speech, settings or a plan from which no INT8 can be made."""


class TrainingError(MelrtError, ValueError):
    """A training that was asked for wrongly, or cannot go on."""


class AudioError(MelrtError, ValueError):
    """An audio file that cannot be read or written, or audio of the wrong rate."""


class MissingExtraError(MelrtError, ImportError):
    """A package of an extra that is not installed."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "melrt[{extra}]"')


class QueueFullError(MelrtError, RuntimeError):
    """The queue has no room for a request; try again later."""


class OverdueError(MelrtError, TimeoutError):
    """A request that was not done in the time that the limits give it; its windows are freed."""


class ClosedError(MelrtError, RuntimeError):
    """The vocoder or stream was closed."""
