"""Request load on a voice: counts, failures, and a server that does not answer."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from melrt.bundle import Bundle
from melrt.errors import BackendError, MelrtError
from melrt.scheduling.limits import Limits
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.serving.load import LONGEST, SHORTEST, mixed_lengths, run_closed_loop, run_open_loop

RATE, SECONDS = 500.0, 0.4


def test_every_request_is_completed_or_refused(tiny_bundle: Bundle) -> None:
    mels = mixed_lengths(tiny_bundle.probe()[0][0])
    lengths = {mel.shape[1] for mel in mels}
    assert SHORTEST <= min(lengths) < max(lengths) <= LONGEST
    with Vocoder.load(tiny_bundle, device="cpu", options=Options(limits=Limits(max_windows=4, wait=False))) as vocoder:
        alone = run_closed_loop(vocoder.submit, mels, 1, SECONDS)
        flood = run_open_loop(vocoder.submit, mels, RATE, SECONDS)
    assert alone.completed
    assert not alone.refused
    assert 0 < alone.p50 <= alone.p99
    assert flood.refused
    assert flood.completed + flood.refused == int(RATE * SECONDS)


def test_failures_are_not_counted_as_refusals(tiny_bundle: Bundle) -> None:
    def fail(mel: np.ndarray) -> Future[np.ndarray]:
        future: Future[np.ndarray] = Future()
        future.set_exception(BackendError("the engine is gone"))
        return future

    with pytest.raises(MelrtError, match="2 requests failed, the first with: the engine is gone"):
        run_open_loop(fail, mixed_lengths(tiny_bundle.probe()[0][0]), 10.0, 0.2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--triton", "127.0.0.1:1"), "no Triton server answers at 127.0.0.1:1"),
        (("--http", "http://127.0.0.1:1"), "no HTTP service answers at http://127.0.0.1:1"),
        ((), "give the address of a server with --triton or --http"),
    ],
)
def test_missing_server_is_reported(arguments: tuple[str, ...], complaint: str, tiny_bundle: Bundle, melrt) -> None:
    code, _, err = melrt("bench-serving", tiny_bundle.path, *arguments)
    assert (code, complaint in err) == (2, True), err
