"""The `melrt` command: finds the sub-command, imports only its module, and turns errors into one line and an exit code."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import shlex
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from melrt import __version__
from melrt.errors import MelrtError, MissingExtraError, ParityError

OUT_OF_TOLERANCE = 1
WRONG_INPUT = 2
INTERNAL_ERROR = 3
INTERRUPTED = 130


class Command(NamedTuple):
    """One sub-command; modules are named, not imported, so that the runtime does not depend on the packages above it."""

    function: str
    """Module and function."""
    extra: str
    """Extra that a missing package belongs to."""


COMMANDS = {
    "demo": Command("melrt_export.cli:demo", "export"),
    "train": Command("melrt_export.training.cli:train", "train"),
    "export": Command("melrt_export.cli:export", "export"),
    "verify": Command("melrt_export.cli:verify", "export"),
    "info": Command("melrt.cli.commands:info", "cli"),
    "mel": Command("melrt.cli.commands:mel", "cli"),
    "synth": Command("melrt.cli.commands:synth", "cli"),
    "calibrate": Command("melrt_calibration.cli:calibrate", "export"),
    "requantize": Command("melrt_calibration.cli:requantize", "export"),
    "build": Command("melrt_export.cli:build", "tensorrt"),
    "refit": Command("melrt_export.cli:refit", "tensorrt"),
    "trust": Command("melrt.cli.commands:trust", "cli"),
    "tune": Command("melrt.cli.commands:tune", "cli"),
    "bulk": Command("melrt.serving.bulk.cli:bulk", "cli"),
    "serve http": Command("melrt.serving.http.cli:http", "http"),
    "serve triton": Command("melrt.serving.triton.cli:triton", "triton"),
    "serve version": Command("melrt.serving.triton.cli:version", "triton"),
    "bench": Command("melrt_benchmarks.cli:bench", "benchmarks"),
    "bench-host": Command("melrt_benchmarks.cli:bench_host", "benchmarks"),
    "bench-serving": Command("melrt_benchmarks.serving.cli:bench_serving", "benchmarks"),
    "bench-voices": Command("melrt_benchmarks.serving.cli:bench_voices", "benchmarks"),
    "bench-training": Command("melrt_benchmarks.training.cli:bench_training", "benchmarks"),
    "doctor": Command("melrt.cli.commands:doctor", "cli"),
}
# Words of a command that were renamed: (command or "", old word) to the new one.
RENAMED = {
    ("", "requantise"): "requantize", ("build", "--flavour"): "--flavor",
    ("build", "--anew"): "--rebuild", ("calibrate", "--judge"): "--evaluate",
}  # fmt: skip


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 out of tolerance or INT8 that does not pay, 2 wrong input, 3 internal error, 130 interrupted.
    With `--debug` an error also shows its traceback.
    """
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        print('the melrt command needs typer and rich: pip install "melrt[cli]"', file=sys.stderr)
        sys.exit(WRONG_INPUT)
    _log_warnings()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if arguments == ["--version"]:
        print(f"melrt {__version__}")
        sys.exit()
    _refuse_renamed(arguments)
    app = typer.Typer(
        help="Export MelGAN checkpoints, build engines and synthesize speech. `melrt COMMAND --help` explains a command; "
        "`melrt --debug COMMAND` shows the traceback of an error; `melrt --version` prints the version.",
        context_settings={"help_option_names": ["-h", "--help"]},
        no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    )  # fmt: skip
    groups = {"": app}
    called = _called(arguments)
    for name in called or COMMANDS:
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True, help="Serve voices over HTTP, or through NVIDIA Triton Inference Server.")
            app.add_typer(groups[group], name=group)
        groups[group].command(last)(_guarded(name, called=bool(called), debug="--debug" in sys.argv[1:]))
    if len(app.registered_commands) == 1:
        app.callback()(lambda: None)  # or Typer would take the only command for the whole program
    app(arguments)


def _called(arguments: list[str]) -> list[str]:
    """Return the command that is called, so that no other command's module is imported; nothing for the list that `--help` shows."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    return [name for name in COMMANDS if words[: len(name.split())] == name.split()]


def _refuse_renamed(arguments: list[str]) -> None:
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    changes: dict[str, str] = {}
    typed = []
    for word in arguments:
        old, equals, value = word.partition("=")
        new = RENAMED.get((command, old)) or (RENAMED.get(("", word)) if word == command else None)
        changes |= {old: new} if new else {}
        typed.append(f"{new}{equals}{value}" if new else word)
    if changes:
        told = ", ".join(f"{old} is now {new}" for old, new in changes.items())
        _fail(f"{told}. Type `{shlex.join(['melrt', *typed])}` instead.", WRONG_INPUT)


def _guarded(name: str, *, called: bool, debug: bool) -> Callable[..., Any]:
    """Load a command, and turn every failure into one clear line and an exit code."""
    try:
        module, _, function = COMMANDS[name].function.partition(":")
        command: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except Exception as error:  # a command that cannot be imported must not stop the others from being listed
        if called:
            _explain(name, error, debug=debug)
        return _unavailable(error)

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            _explain(name, error, debug=debug)

    return guarded


def _unavailable(error: Exception) -> Callable[..., Any]:
    """Make an entry for the list of commands that gives the reason why this one cannot run here."""

    def unavailable() -> None:
        """Stand in for the command; the call itself is answered by `_guarded`."""

    reason = f"it needs {error.name}, which is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    unavailable.__doc__ = f"Not available here: {reason}."
    return unavailable


def _explain(name: str, error: BaseException, *, debug: bool) -> NoReturn:
    """Print an error as one line and exit with its code."""
    if type(error).__module__.partition(".")[0] in ("typer", "click"):
        raise error  # usage errors and exit codes of Typer, which has its own click from 0.26 on
    if debug:
        from rich.console import Console
        from rich.traceback import Traceback

        Console(stderr=True).print(Traceback.from_exception(type(error), error, error.__traceback__))
    if isinstance(error, KeyboardInterrupt):
        _fail("interrupted; no file was left incomplete.", INTERRUPTED)
    if isinstance(error, ParityError):
        _fail(str(error), OUT_OF_TOLERANCE)
    if isinstance(error, MelrtError):
        _fail(str(error), WRONG_INPUT)
    if isinstance(error, ModuleNotFoundError):
        package = error.name or "a package"
        _fail(str(MissingExtraError(f"melrt {name}", package, _extra_with(package, COMMANDS[name].extra))), WRONG_INPUT)
    if isinstance(error, OSError):
        where = f"{_as_typed(str(error.filename))}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", WRONG_INPUT)
    remedy = "please report it." if debug else f"please report it with the traceback that `melrt --debug {name} ...` shows."
    _fail(f"internal error in melrt {name} ({type(error).__name__}: {error}); {remedy}", INTERNAL_ERROR)


def _as_typed(filename: str) -> str:
    """Return a path beginning as the user typed it: the arguments are searched for the path itself or the nearest folder above it."""
    absolute = Path(filename).resolve()
    values = [argument.partition("=")[2] if argument.startswith("--") else argument for argument in sys.argv[1:]]
    typed = {Path(value).resolve(): Path(value) for value in values if value}
    for folder in (absolute, *absolute.parents):
        if folder in typed:
            return str(typed[folder] / absolute.relative_to(folder))
    return filename


def _extra_with(module: str, own: str) -> str:
    """Return the command's own extra if it brings this module, or else the smallest extra that does."""
    top = module.partition(".")[0]
    package = {"yaml": "pyyaml", "cuda": "cuda-core"}.get(top, top.replace("_", "-")).lower()
    extras: dict[str, set[str]] = {}
    for requirement in _requirements():
        if found := re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)", requirement):
            extras.setdefault(found[2], set()).add(found[1].lower())
    having = sorted((len(packages), extra) for extra, packages in extras.items() if package in packages)
    return own if package in extras.get(own, ()) or not having else having[0][1]


def _requirements() -> list[str]:
    """Return the requirements of the installed melrt; none if it runs from its source tree without being installed."""
    try:
        return metadata.requires("melrt") or []
    except metadata.PackageNotFoundError:
        return []


def _fail(message: str, code: int) -> NoReturn:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(_printable(message), markup=False)
    sys.exit(code)


def _printable(text: str) -> str:
    """Return a text with its control characters in Python's notation: names in a file may hold commands for the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text)


class _Formatter(logging.Formatter):
    """Formatter of printable messages."""

    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _log_warnings() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
