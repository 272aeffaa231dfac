"""The choice of an artifact reports what it skipped, once."""

from __future__ import annotations

import logging

import pytest

from melrt.backends import select
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import BackendError, MissingExtraError


def offer(monkeypatch: pytest.MonkeyPatch, *results: object) -> None:
    """Make these the results of opening the candidates a, b, c, ..."""

    def result(value: object) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    candidates = [select._Candidate(name, lambda value=value: result(value)) for name, value in zip("abcd", results, strict=False)]
    monkeypatch.setattr(select, "_engines", lambda *_: candidates)
    monkeypatch.setattr(select, "_models", lambda *_: ())


def test_skipped_artifacts_are_logged_in_one_line(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer(monkeypatch, BackendError("no GPU."), BackendError("too old."), BackendError("no GPU."), "backend")
    with caplog.at_level(logging.WARNING):
        assert open_backend(tiny_bundle, BackendChoice()) == "backend"
    assert caplog.messages == ["d is used. Skipped: a, c: no GPU; b: too old."]


def test_nothing_is_logged_when_nothing_opens(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer(monkeypatch, BackendError("no GPU."), MissingExtraError("x", "y", "z"), BackendError("no GPU."))
    with caplog.at_level(logging.WARNING), pytest.raises(BackendError) as failed:
        open_backend(tiny_bundle, BackendChoice())
    first, *reasons = str(failed.value).splitlines()
    assert first == f"nothing in {tiny_bundle.path} runs here:"
    assert reasons == ["a, c: no GPU.", 'b: x needs y, which is not installed: pip install "melrt[z]"']
    assert caplog.messages == []


def test_the_only_reason_is_raised_as_it_is(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, error := MissingExtraError("x", "y", "z"))
    with pytest.raises(MissingExtraError) as failed:
        open_backend(tiny_bundle, BackendChoice())
    assert failed.value is error
