"""Checks of the runtime with arrays in GPU memory: type, place and values of the result, order with the caller's stream, and cost."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from melrt import Vocoder
from melrt.files.audio import to_int16
from melrt.timing import timed
from melrt_benchmarks.sitting.rows import NotHereError
from melrt_benchmarks.sitting.stub.bundles import Bundles
from melrt_benchmarks.sitting.stub.checks import LENGTHS, Figures, in_threads, loaded, random_mel, reference, same

# Clock cycles of a wait on the device, about 0.1 s: long beside a call, so that a result that did not wait for the mel is wrong.
WAIT_CYCLES = 150_000_000
# Utterances of an array; the most are more than one launch of a kernel takes.
COUNTS = (1, 3, 70)
# Threads that each have a stream.
STREAMS = 12
# Calls of a measurement.
ROUNDS = 200


class _Library(NamedTuple):
    """Functions of an array library that the checks need."""

    module: Any
    to_gpu: Callable[[np.ndarray], Any]
    to_host: Callable[[Any], np.ndarray]


def torch_library() -> _Library:
    """Return PyTorch, or raise NotHereError."""
    torch = _imported("torch")
    if not torch.cuda.is_available():
        raise NotHereError("this PyTorch has no CUDA")
    return _Library(torch, lambda array: torch.from_numpy(array).cuda(), lambda array: array.cpu().numpy())


def _cupy_library() -> _Library:
    cupy = _imported("cupy")
    return _Library(cupy, cupy.asarray, cupy.asnumpy)


def _pycuda_library() -> _Library:
    _imported("pycuda")
    _imported("pycuda.autoprimaryctx")
    gpuarray = _imported("pycuda.gpuarray")
    return _Library(gpuarray, gpuarray.to_gpu, lambda array: array.get())


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHereError(f"{name} is not installed here") from error


def arrays_of_torch(bundles: Bundles, figures: Figures) -> str:
    """Check PyTorch's tensors: device, strides, type and values."""
    library = torch_library()
    with loaded(bundles) as vocoder:
        array = library.to_gpu(random_mel(vocoder, 86))
        assert vocoder(array).device == array.device
        transposed = library.to_gpu(np.ascontiguousarray(random_mel(vocoder, 700).T)).T
        assert not transposed.is_contiguous()
        same(library.to_host(vocoder(transposed)), reference(vocoder, random_mel(vocoder, 700)), "a transposed mel")
    return _arrays(bundles, library)


def arrays_of_cupy(bundles: Bundles, figures: Figures) -> str:
    """Check CuPy's arrays."""
    return _arrays(bundles, _cupy_library())


def arrays_of_pycuda(bundles: Bundles, figures: Figures) -> str:
    """Check PyCUDA's arrays."""
    return _arrays(bundles, _pycuda_library())


def _arrays(bundles: Bundles, library: _Library) -> str:
    """Check utterances and arrays of several, in both sample formats."""
    for sample_format in ("float32", "int16"):
        with loaded(bundles, sample_format=sample_format) as vocoder:
            for frames in LENGTHS * 4:
                _check_array(vocoder, library, np.stack([random_mel(vocoder, frames)]), single=True)
            for count in COUNTS:
                _check_array(vocoder, library, np.stack([random_mel(vocoder, 700, seed) for seed in range(count)]), single=False)
    return f"{len(LENGTHS)} lengths and arrays of {COUNTS} utterances, float32 and int16, all bits equal"


def _check_array(vocoder: Vocoder, library: _Library, mels: np.ndarray, *, single: bool) -> None:
    array = library.to_gpu(mels[0] if single else mels)
    audio = vocoder(array)
    assert type(audio) is type(array), f"a mel of {type(array)} gave {type(audio)}"
    expected = np.stack([reference(vocoder, mel) for mel in mels])
    wanted = to_int16(expected) if vocoder.options.sample_format == "int16" else expected
    found = library.to_host(audio)
    assert found.dtype == wanted.dtype, found.dtype
    same(found, wanted[0] if single else wanted, f"array of shape {array.shape}")


def order_with_a_stream_of_torch(bundles: Bundles, figures: Figures) -> str:
    """The mel appears late on the caller's stream and is overwritten right after the call; the result is right, and nothing waits."""
    library = torch_library()
    torch, side, returned = library.module, library.module.cuda.Stream(), list[float]()
    with loaded(bundles) as vocoder:
        for frames in (86, 2000):
            mel = random_mel(vocoder, frames)
            source = library.to_gpu(mel)
            late = torch.zeros_like(source)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                for _ in range(6):
                    vocoder(source)  # everything is captured, and memory for the audio is reserved
                side.synchronize()
                torch.cuda._sleep(WAIT_CYCLES)
                late.copy_(source)
                start = time.perf_counter()
                audio: Any = vocoder(late)
                returned.append(1e3 * (time.perf_counter() - start))
                busy = not side.query()
                late.zero_()
                kept = audio.clone()
            side.synchronize()
            same(library.to_host(kept), reference(vocoder, mel), f"{frames} frames")
            assert busy, f"the call waited for the device: it took {returned[-1]:.1f} ms"
    return f"calls returned after {returned[0]:.2f} and {returned[1]:.2f} ms, while the stream was still busy"


def order_with_a_stream_of_cupy(bundles: Bundles, figures: Figures) -> str:
    """Do the same with a stream of CuPy that does not wait for the default one."""
    library = _cupy_library()
    cupy, side = library.module, library.module.cuda.Stream(non_blocking=True)
    slow = cupy.zeros((4096, 4096), cupy.float32)
    with loaded(bundles) as vocoder:
        mel = random_mel(vocoder, 700)
        source = library.to_gpu(mel)
        for _ in range(6):
            vocoder(source)
            late = cupy.zeros_like(source)
            cupy.cuda.Device().synchronize()
            with side:
                for _ in range(20):
                    slow += 1
                late[...] = source
                audio: Any = vocoder(late)
                late.fill(0)
                kept = audio.copy()
            side.synchronize()
            same(library.to_host(kept), reference(vocoder, mel), "700 frames")
    return "6 calls on a stream that does not wait for the default one, all bits equal"


def more_shapes_than_a_slot_keeps_on_the_device(bundles: Bundles, figures: Figures) -> str:
    """Discard prepared shapes, and their graphs, while the work that uses them is queued."""
    library = torch_library()
    with loaded(bundles) as vocoder:
        mels = [random_mel(vocoder, frames, seed) for frames in range(4, 204, 2) for seed in range(3)]
        arrays = [library.to_gpu(mel) for mel in mels]
        audio = [vocoder(array) for array in arrays]
        for mel, one in zip(mels, audio, strict=True):
            same(library.to_host(one), reference(vocoder, mel), f"{mel.shape[1]} frames")
    return f"{len(mels)} calls, none of them waited for, all bits equal"


def threads_with_streams_of_torch(bundles: Bundles, figures: Figures) -> str:
    """Compare calls of threads that each work on a stream of their own."""
    library = torch_library()
    torch = library.module
    with loaded(bundles) as vocoder:

        def work(index: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for seed in range(10):
                    mel = random_mel(vocoder, LENGTHS[(index + seed) % len(LENGTHS)], seed)
                    same(library.to_host(vocoder(library.to_gpu(mel))), reference(vocoder, mel), f"thread {index}, call {seed}")

        in_threads(work, STREAMS)
    return f"{STREAMS} threads, 10 calls each, all bits equal"


def closing_while_work_is_queued(bundles: Bundles, figures: Figures) -> str:
    """Close a voice whose work waits on the device; its audio is complete all the same."""
    library = torch_library()
    torch, side = library.module, library.module.cuda.Stream()
    with loaded(bundles) as vocoder:
        mel = random_mel(vocoder, 700)
        source, expected = library.to_gpu(mel), reference(vocoder, mel)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(WAIT_CYCLES)
            audio = vocoder(source)
        vocoder.close()
    side.synchronize()
    same(library.to_host(audio), expected, "audio of a closed voice")
    return "the audio was complete"


def cost_of_arrays(bundles: Bundles, figures: Figures) -> str:
    """Measure calls with arrays on the GPU: one at a time, and back to back."""
    library = torch_library()
    synchronize, found = library.module.cuda.synchronize, {}
    with loaded(bundles) as vocoder:
        rate = vocoder.sample_rate / vocoder.spec.hop
        for name, batch, seconds in (("1 s", 1, 1.0), ("10 s", 1, 10.0), ("16 of 10 s", 16, 10.0)):
            mels = np.stack([random_mel(vocoder, round(rate * seconds), seed) for seed in range(batch)])
            array = library.to_gpu(mels[0] if batch == 1 else mels)
            for _ in range(ROUNDS // 10):
                vocoder(array)
            waited = [timed(lambda array=array: (vocoder(array), synchronize())) for _ in range(ROUNDS)]  # type: ignore[misc]
            back_to_back = timed(lambda array=array: ([vocoder(array) for _ in range(ROUNDS)], synchronize())) / ROUNDS  # type: ignore[misc]
            found[name] = {
                "p50_ms": 1e3 * float(np.median(waited)), "p90_ms": 1e3 * float(np.percentile(waited, 90)),
                "back_to_back_ms": 1e3 * back_to_back, "times_real_time": batch * seconds / back_to_back,
            }  # fmt: skip
    figures["device_arrays"] = found
    return "; ".join(f"{name}: p50 {row['p50_ms']:.3f} ms, back to back {row['back_to_back_ms']:.3f} ms" for name, row in found.items())


CHECKS = (
    arrays_of_torch, order_with_a_stream_of_torch, threads_with_streams_of_torch, more_shapes_than_a_slot_keeps_on_the_device,
    arrays_of_cupy, order_with_a_stream_of_cupy, arrays_of_pycuda, closing_while_work_is_queued, cost_of_arrays,
)  # fmt: skip
