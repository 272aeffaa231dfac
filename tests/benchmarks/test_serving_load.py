"""Load on a voice: what is counted adds up, and what is no voice is told."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from melrt.bundle import Bundle
from melrt.errors import BackendError, MelrtError
from melrt.scheduling.limits import Limits
from melrt.serving.triton.voice import probe_mel
from melrt.vocoder import Options, Vocoder
from melrt_benchmarks.serving.load import LONGEST, SHORTEST, closed, mixed, offered

RATE, SECONDS = 500.0, 0.4


def test_what_is_offered_is_spoken_or_refused(tiny_bundle: Bundle) -> None:
    mels = mixed(probe_mel(tiny_bundle))
    lengths = {mel.shape[1] for mel in mels}
    assert SHORTEST <= min(lengths) < max(lengths) <= LONGEST
    with Vocoder.load(tiny_bundle, device="cpu", options=Options(limits=Limits(max_windows=4, wait=False))) as vocoder:
        alone = closed(vocoder.submit, mels, 1, SECONDS)
        flood = offered(vocoder.submit, mels, RATE, SECONDS)
    assert alone.spoken
    assert not alone.refused
    assert 0 < alone.p50 <= alone.p99
    assert flood.refused
    assert flood.spoken + flood.refused == int(RATE * SECONDS)


def test_a_failure_is_no_refusal(tiny_bundle: Bundle) -> None:
    def fail(mel: np.ndarray) -> Future[np.ndarray]:
        future: Future[np.ndarray] = Future()
        future.set_exception(BackendError("the engine is gone"))
        return future

    with pytest.raises(MelrtError, match="2 requests failed, the first with: the engine is gone"):
        offered(fail, mixed(probe_mel(tiny_bundle)), 10.0, 0.2)


def test_without_a_server_it_says_so(tiny_bundle: Bundle, melrt) -> None:
    code, _, err = melrt("bench-serving", tiny_bundle.path, "--triton", "127.0.0.1:1")
    assert code == 2
    assert "no Triton server answers at 127.0.0.1:1" in err
