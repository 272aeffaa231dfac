"""The family of errors. Each message gives what was wrong, its value, what is allowed, and what to do."""

from __future__ import annotations


class MelrtError(Exception):
    """Base of every error that melrt raises on purpose."""


class MelError(MelrtError, ValueError):
    """The mel does not fit this voice."""


class ConfigError(MelrtError, ValueError):
    """A setting is outside what is allowed."""


class BundleError(MelrtError, ValueError):
    """The bundle is missing, damaged, or newer than this melrt."""


class BackendError(MelrtError, RuntimeError):
    """The inference engine cannot run on this machine, or it failed."""


class CheckpointError(MelrtError, ValueError):
    """The checkpoint cannot be read, or does not hold the expected network."""


class ParityError(MelrtError, ArithmeticError):
    """The output of an artifact differs from PyTorch's by more than the limit."""


class EngineBuildError(MelrtError, RuntimeError):
    """The TensorRT engine could not be built as requested."""


class CalibrationError(MelrtError, ValueError):
    """Speech, settings or a plan do not allow INT8 calibration."""


class TrainingError(MelrtError, ValueError):
    """The training configuration is wrong, or training cannot continue."""


class AudioError(MelrtError, ValueError):
    """The audio file cannot be read or written, or the audio has the wrong shape."""


class MissingExtraError(MelrtError, ImportError):
    """A package is not installed; the message names the extra that brings it."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "melrt[{extra}]"')


class QueueFullError(MelrtError, RuntimeError):
    """The queue has no room for the request; try again later."""


class OverdueError(MelrtError, TimeoutError):
    """The request was not done within `Limits.timeout`; its windows are freed."""


class ClosedError(MelrtError, RuntimeError):
    """The vocoder or stream was closed."""
