"""The `melrt` command: every command is an entry point of the group `melrt.commands`, so that any package can add some.

One of two words is a command of a group: `serve triton`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from melrt.errors import MelrtError, MissingExtraError, ParityError

OUT_OF_TOLERANCE = 1
WRONG_INPUT = 2
UNEXPECTED = 3
INTERRUPTED = 130


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 out of tolerance, 2 wrong input, 3 a fault of melrt's own, 130 interrupted."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError:
        print('the melrt command needs typer and rich: pip install "melrt[cli]"', file=sys.stderr)
        sys.exit(WRONG_INPUT)
    _log_warnings()
    app = typer.Typer(
        help="From a MelGAN checkpoint to production speech: export, build, verify, run.",
        no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    )  # fmt: skip
    groups = {"": app}
    for point in entry_points(group="melrt.commands"):
        group, _, name = point.name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(no_args_is_help=True)
            app.add_typer(groups[group], name=group)
        groups[group].command(name)(_guarded(point))
    app()


def _guarded(point: EntryPoint) -> Callable[..., Any]:
    """The command, with every expected failure turned into one clear line and an exit code."""
    command: Callable[..., Any] = point.load()

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ParityError as error:
            _fail(str(error), OUT_OF_TOLERANCE)
        except MelrtError as error:
            _fail(str(error), WRONG_INPUT)
        except ModuleNotFoundError as error:
            extra = point.extras[0] if point.extras else "cli"
            _fail(str(MissingExtraError(f"melrt {point.name}", error.name or "a package", extra)), WRONG_INPUT)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            _fail(f"{name}{error.strerror or error}", WRONG_INPUT)
        except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
            _fail(f"melrt {point.name} met what it does not know ({type(error).__name__}: {error}); please report it.", UNEXPECTED)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was left half-written.", INTERRUPTED)

    return guarded


def _fail(message: str, code: int) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(message, markup=False)
    sys.exit(code)


def _log_warnings() -> None:
    import logging

    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
