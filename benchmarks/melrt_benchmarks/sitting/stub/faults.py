"""Checks of the runtime's care: contexts, many shapes, memory, samples that are not finite, refused captures, and a full GPU."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from melrt import Vocoder
from melrt.backends.tensorrt.gpu_arrays import current_device
from melrt.errors import BackendError
from melrt_benchmarks.sitting.rows import NotHereError
from melrt_benchmarks.sitting.stub.arrays import torch_library
from melrt_benchmarks.sitting.stub.bundles import Bundles
from melrt_benchmarks.sitting.stub.checks import LENGTHS, Figures, in_threads, loaded, random_mel, reference, same
from melrt_benchmarks.sitting.stub.engine import TOO_LARGE

MIB = 1 << 20
# The driver's own bookkeeping may grow a little.
MOST_GROWTH_MIB = 8


def the_callers_context_is_restored(bundles: Bundles, figures: Figures) -> str:
    """Call from a thread without a context, and from one with a context of its own."""
    with loaded(bundles) as vocoder:
        mel = random_mel(vocoder, 700)
        in_threads(lambda _: _call_keeps(vocoder, mel, 0))  # a new thread has no current context
        in_threads(lambda _: _call_keeps_own(vocoder, mel))
    return "a thread without a context has none afterwards; a context of the caller's own is current again"


def _call_keeps(vocoder: Vocoder, mel: np.ndarray, context: int) -> None:
    assert _context() == context, f"before the call {_context():#x}"
    same(vocoder(mel), reference(vocoder, mel), "in a thread")
    assert _context() == context, f"after the call {_context():#x} instead of {context:#x}"


def _call_keeps_own(vocoder: Vocoder, mel: np.ndarray) -> None:
    from cuda.bindings import driver

    error, own = driver.cuCtxCreate(None, 0, 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise NotHereError(f"this driver makes no second context: {error}")
    try:
        _call_keeps(vocoder, mel, int(own))
    finally:
        driver.cuCtxDestroy(own)


def _context() -> int:
    from cuda.bindings import driver

    return int(driver.cuCtxGetCurrent()[1])


def more_shapes_than_a_slot_keeps(bundles: Bundles, figures: Figures) -> str:
    """Compare so many lengths that prepared shapes are discarded and made again."""
    lengths = [frames for frames in range(4, 204, 2) for _ in range(3)]  # captured, then discarded
    with loaded(bundles) as vocoder:
        for index, frames in enumerate(lengths):
            mel = random_mel(vocoder, frames, index)
            same(vocoder(mel), reference(vocoder, mel), f"{frames} frames")
    return f"{len(set(lengths))} lengths, each {lengths.count(4)} times, all bits equal"


def memory_is_released(bundles: Bundles, figures: Figures) -> str:
    """Compare memory in use and free memory after loading and closing several times."""
    rows = []
    for _ in range(5):
        with loaded(bundles) as vocoder:
            mel = random_mel(vocoder, 2000)
            vocoder(mel)
            during = memory()
        rows.append((during, memory(), memory(trim=True)))
    (first, closed, trimmed), last = rows[0], rows[-1]
    figures["memory_mib"] = {"loaded": first, "closed": closed, "trimmed": trimmed, "after_5_rounds": last[2]}
    assert last[2]["used"] == trimmed["used"], f"memory in use after 5 rounds is {last[2]['used']} MiB, after one {trimmed['used']} MiB"
    growth = trimmed["free"] - last[2]["free"]
    assert growth <= MOST_GROWTH_MIB, f"{growth:.1f} MiB are lost in 4 rounds"
    held = trimmed["free"] - closed["free"]
    return (
        f"a voice uses {first['used'] - closed['used']:.1f} MiB; {growth:.1f} MiB lost in 4 rounds; the driver's pool keeps {held:.1f} MiB"
    )


def memory(*, trim: bool = False) -> dict[str, float]:
    """Return the device's free memory, and what the driver's pool has in use and reserved, in MiB."""
    from cuda.bindings import driver
    from cuda.core import Device

    with current_device(Device(0)):
        pool = driver.cuDeviceGetMemPool(0)[1]
        if trim:
            driver.cuCtxSynchronize()
            driver.cuMemPoolTrimTo(pool, 0)
        kinds = driver.CUmemPool_attribute
        attributes = {"used": kinds.CU_MEMPOOL_ATTR_USED_MEM_CURRENT, "reserved": kinds.CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT}
        found = {name: int(driver.cuMemPoolGetAttribute(pool, kind)[1]) / MIB for name, kind in attributes.items()}
        _, free, total = driver.cuMemGetInfo()
        return {"free": free / MIB, "total": total / MIB, **found}


def samples_that_are_not_finite_on_the_host(bundles: Bundles, figures: Figures) -> str:
    """Refuse them, and leave the requests beside them right."""
    for sample_format in ("float32", "int16"):
        with loaded(bundles, sample_format=sample_format) as vocoder:
            good = vocoder(random_mel(vocoder, 700))
            for frames in LENGTHS:
                mels = [random_mel(vocoder, frames, seed) for seed in range(3)]
                expected = [vocoder(mels[0]), vocoder(mels[2])]
                mels[1][0, frames // 2] = TOO_LARGE
                futures = [vocoder.submit(mel) for mel in mels]
                error = futures[1].exception()
                assert isinstance(error, BackendError), f"{frames} frames with a sample that is not finite: {error!r}"
                assert "not finite" in str(error), str(error)
                same(futures[0].result(), expected[0], "a request beside it")
                same(futures[2].result(), expected[1], "a request beside it")
            same(vocoder(random_mel(vocoder, 700)), good, "the next call")
    return "refused; the requests beside them are right"


def samples_that_are_not_finite_on_the_device(bundles: Bundles, figures: Figures) -> str:
    """Log them, and leave the next call right."""
    library, messages = torch_library(), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("melrt").addHandler(handler)
    try:
        with loaded(bundles) as vocoder:
            mel = random_mel(vocoder, 700)
            good = library.to_gpu(mel)
            for _ in range(5):
                vocoder(good)
            library.module.cuda.synchronize()
            vocoder(good)
            assert not any("not finite" in message for message in messages), "reported without a reason"
            mel[0, 300] = TOO_LARGE
            assert not np.isfinite(library.to_host(vocoder(library.to_gpu(mel)))).all()
            mel = random_mel(vocoder, 700)
            same(library.to_host(vocoder(good)), reference(vocoder, mel), "the next call")
    finally:
        logging.getLogger("melrt").removeHandler(handler)
    assert any("not finite" in message for message in messages), "the device's report was not logged"
    return "logged by a later run or by close; the next call is right"


def a_refused_capture(bundles: Bundles, figures: Figures) -> str:
    """Continue without graphs where the driver refuses a capture."""
    bundles.make("uncapturable", uncapturable=True)
    with loaded(bundles, "uncapturable") as vocoder:
        for _ in range(4):
            for frames in LENGTHS:
                mel = random_mel(vocoder, frames)
                same(vocoder(mel), reference(vocoder, mel), f"{frames} frames without a graph")
        failed = _failed(vocoder)
        assert failed, "no capture failed: the fault was not shown"
    with loaded(bundles) as vocoder:
        for _ in range(4):
            mel = random_mel(vocoder, 700)
            same(vocoder(mel), reference(vocoder, mel), "another voice afterwards")
        assert not _failed(vocoder), "captures of the next voice failed, too"
    return f"{failed} captures were refused by the driver; audio without graphs is right, and so is the next voice"


def _failed(vocoder: Vocoder) -> int:
    backend: Any = vocoder.backend
    return int(backend.failed_captures)


def a_full_gpu(bundles: Bundles, figures: Figures) -> str:
    """Release everything if memory runs out while a voice is opened, and let `auto` take another backend."""
    before = memory(trim=True)
    path = bundles.make("huge", scratch=int(0.6 * before["free"]) * MIB)  # one slot fits, the second does not
    try:
        Vocoder.load(path, device="cuda", backend="tensorrt", precision="fp32").close()
    except BackendError as error:
        said = str(error)
    else:
        raise AssertionError("three slots of 60 % of the free memory each were allocated")
    after = memory(trim=True)
    assert after["used"] <= before["used"], f"{after['used'] - before['used']:.0f} MiB are still in use"
    with Vocoder.load(path) as vocoder:
        assert vocoder.backend.name != "tensorrt", vocoder.backend.name
        mel = random_mel(vocoder, 300)
        assert len(vocoder(mel)) == 300 * vocoder.spec.hop
        fallback = repr(vocoder)
    with loaded(bundles) as vocoder:
        mel = random_mel(vocoder, 700)
        same(vocoder(mel), reference(vocoder, mel), "another voice afterwards")
    return f"the engine says: {said[-200:]}; `auto` takes {fallback}; all memory is free again, and the next voice works"


CHECKS = (
    the_callers_context_is_restored, more_shapes_than_a_slot_keeps, memory_is_released, samples_that_are_not_finite_on_the_host,
    samples_that_are_not_finite_on_the_device, a_refused_capture, a_full_gpu,
)  # fmt: skip
