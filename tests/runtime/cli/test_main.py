"""The `melrt` command itself: finding sub-commands, exit codes, renamed words."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from melrt import __version__
from melrt.cli.main import COMMANDS, RENAMED, Command
from melrt.errors import MelError, ParityError


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Add a sub-command `fake` whose function the test gives."""

    def add(function) -> None:
        module = types.ModuleType("melrt_fake")
        module.fake = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "melrt_fake", module)
        monkeypatch.setitem(COMMANDS, "fake", Command("melrt_fake:fake", "cli"))

    return add


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MelError("mel has 40 bands"), 2, "mel has 40 bands"),
        (ParityError("too far"), 1, "too far"),
        (FileNotFoundError(2, "No such file", "x.npy"), 2, "x.npy: No such file"),
        (OSError("5 requested and 0 written"), 2, "error: 5 requested and 0 written"),
        (ModuleNotFoundError("no", name="rich"), 2, 'needs rich, which is not installed: pip install "melrt[cli]"'),
        (ModuleNotFoundError("no", name="pyarrow.parquet"), 2, 'pip install "melrt[parquet]"'),
        (ModuleNotFoundError("no", name="onnx"), 2, 'pip install "melrt[export]"'),
        (ModuleNotFoundError("no", name="melrt_nowhere"), 2, 'pip install "melrt[cli]"'),
        (AttributeError("x"), 3, "internal error in melrt fake (AttributeError: x)"),
        (AssertionError("y"), 3, "internal error in melrt fake (AssertionError: y)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_code_of_each_kind_of_error(melrt, fake, error: BaseException, code: int, text: str) -> None:
    def raises() -> None:
        raise error

    fake(raises)
    got, _, err = melrt("fake")
    assert got == code
    assert text in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(melrt, fake) -> None:
    def raises() -> None:
        raise AttributeError("x")

    fake(raises)
    for arguments in (("--debug", "fake"), ("fake", "--debug")):
        code, _, err = melrt(*arguments)
        assert code == 3
        assert "Traceback" in err
        assert "raise AttributeError" in err


def test_broken_command_does_not_stop_the_others(melrt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "broken", Command("melrt_that_does_not_exist:broken", "train"))
    code, out, _ = melrt("--help")
    assert code == 0
    assert "Not available here" in out
    assert melrt("doctor")[0] == 0
    code, _, err = melrt("broken", "argument", "--option")
    assert code == 2
    assert 'pip install "melrt[train]"' in err


def test_a_missing_package_is_named_where_melrt_is_not_installed(melrt, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("melrt.cli.main.metadata.requires", not_installed)
    monkeypatch.setitem(COMMANDS, "broken", Command("melrt_that_does_not_exist:broken", "train"))
    code, _, err = melrt("broken")
    assert (code, 'pip install "melrt[train]"' in err) == (2, True)


def test_calling_one_command_imports_no_other(melrt, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = importlib.import_module
    monkeypatch.setattr("melrt.cli.main.importlib.import_module", lambda name: (loaded.append(name), original(name))[1])
    assert melrt("doctor")[0] == 0
    assert loaded == ["melrt.cli.commands"]


@pytest.mark.parametrize(("command", "word"), RENAMED)
def test_renamed_words_name_the_new_one(melrt, command: str, word: str) -> None:
    new = RENAMED[command, word]
    arguments, meant = ((command, "a b", word), f"{command} 'a b' {new}") if command else ((word, "x"), f"{new} x")
    code, _, err = melrt(*arguments)
    assert code == 2
    assert err.strip() == f"error: {word} is now {new}. Type `melrt {meant}` instead."


def test_renamed_option_keeps_its_value(melrt) -> None:
    _, _, err = melrt("build", "voice", "--flavour=fast", "--anew")
    assert err.strip() == (
        "error: --flavour is now --flavor, --anew is now --rebuild. Type `melrt build voice --flavor=fast --rebuild` instead."
    )


def test_version_is_printed(melrt) -> None:
    assert melrt("--version") == (0, f"melrt {__version__}\n", "")


def test_short_help_is_the_long_one(melrt) -> None:
    for command in ((), ("mel",), ("serve",), ("bulk",)):
        short, long = melrt(*command, "-h"), melrt(*command, "--help")
        assert short == long
        assert short[0] == 0
        assert "-h" in short[1]


def test_errors_of_files_name_what_was_typed(melrt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command may resolve a path. The message shows it relative to the argument that the user typed."""
    monkeypatch.chdir(tmp_path)

    def locked(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "speech" / "a.wav"))

    monkeypatch.setattr("melrt.cli.commands.Bundle.open", locked)
    for option in (("-o", "speech"), ("--out=speech",)):
        code, _, err = melrt("synth", "voice.melrt", "x.wav", *option)
        assert (code, err) == (2, "error: speech/a.wav: Permission denied\n")


def test_unknown_command_is_a_usage_error(melrt) -> None:
    code, _, err = melrt("sing")
    assert code == 2
    assert "sing" in err
