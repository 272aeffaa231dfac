"""The `melrt` command itself: finding sub-commands, exit codes, renamed words."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

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


def test_calling_one_command_imports_no_other(melrt, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    original = importlib.import_module
    monkeypatch.setattr("melrt.cli.main.importlib.import_module", lambda name: (loaded.append(name), original(name))[1])
    assert melrt("doctor")[0] == 0
    assert loaded == ["melrt.cli.commands"]


@pytest.mark.parametrize(("command", "word"), RENAMED)
def test_renamed_words_name_the_new_one(melrt, command: str, word: str) -> None:
    arguments = (command, word) if command else (word, "x")
    code, _, err = melrt(*arguments)
    assert code == 2
    assert err.strip() == f"error: {word} is now {RENAMED[command, word]}."


def test_unknown_command_is_a_usage_error(melrt) -> None:
    code, _, err = melrt("sing")
    assert code == 2
    assert "sing" in err
