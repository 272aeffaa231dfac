"""OpenVINO: what it refuses, its compiled shapes, threads, and forks. tests/runtime/test_exact.py compares its audio."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.runtime.reference import FP32_MAX_ABS, speech_mel, whole_audio

from melrt.backends.openvino import MOST_SHAPES, OpenVino, OpenVinoModel
from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import Bundle
from melrt.errors import BackendError, MissingExtraError

installed = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('openvino')", reason="needs the extra `openvino`")


@pytest.fixture(scope="module")
def bundle(tiny_bundle_path: Path) -> Bundle:
    return Bundle.open(tiny_bundle_path)


def model(bundle: Bundle, graph: str) -> bytes:
    return bundle.read(bundle.find("onnx", graph=graph, precision="fp32")[0])


@installed
def test_damaged_model_and_wrong_mel_are_backend_errors(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"OpenVINO .* rejected the model"):
        OpenVinoModel(model(bundle, "edge")[:1000])
    edge = OpenVinoModel(model(bundle, "edge"))
    mel = speech_mel(bundle, 20)
    with pytest.raises(BackendError, match=r"failed on a mel of shape \(1, 40, 20\)"):
        edge.run(mel[None, :40])
    assert np.abs(edge.run(mel[None])[0] - whole_audio(bundle, mel)).max() < FP32_MAX_ABS, "a failed run leaves the model usable"


@installed
@pytest.mark.skipif("sys.platform != 'linux'", reason="alternate signal stacks")
def test_threads_that_load_models_keep_their_signal_stack(bundle: Bundle) -> None:
    """OpenVINO's own stack would be freed with the first model, and the next signal would kill the process."""
    before = signal_stack()
    first, second = (OpenVinoModel(model(bundle, "edge")) for _ in range(2))
    assert signal_stack() == before
    del first, second
    assert signal_stack() == before


class SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int, int]:
    stack = SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.address, stack.flags, stack.size


@installed
def test_layers_compute_in_float32_by_default(bundle: Bundle) -> None:
    types = OpenVinoModel(model(bundle, "edge")).executed_types()
    assert len(types) == 42
    assert set(types.values()) == {"f32"}


@installed
def test_compiled_shapes_are_bounded_and_every_shape_runs(bundle: Bundle) -> None:
    backend = OpenVino({graph: model(bundle, graph) for graph in ("edge", "interior")}, "fp32", threads=1)  # type: ignore[misc]
    reference = OpenVinoModel(model(bundle, "interior"))
    for frames in range(16, 16 + 2 * (MOST_SHAPES + 2), 2):
        mel = speech_mel(bundle, frames)[None]
        assert np.abs(backend.run("interior", mel) - reference.run(mel)).max() < FP32_MAX_ABS
    assert len(backend._models["interior"]._static) == MOST_SHAPES
    backend.close()
    assert not backend._models


@installed
def test_memory_of_many_lengths_is_bounded(tiny_bundle_path: Path) -> None:
    """In a process of its own. Without a limit, OpenVINO keeps 8 MiB for each of these lengths."""
    code = f"""
import numpy as np
from pathlib import Path
from melrt import Bundle
from melrt.backends.openvino import OpenVinoModel
bundle = Bundle.open({str(tiny_bundle_path)!r})
model = OpenVinoModel(bundle.read(bundle.find("onnx", graph="edge", precision="fp32")[0]))
noise = np.random.default_rng(0)
resident = []
for frames in range(140, 20, -1):
    model.run(noise.normal(-2, 1, (1, 80, frames)).astype(np.float32))
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]) // 256)
print(resident[39], resident[-1])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    after_40, after_120 = map(int, found.split())
    assert after_120 - after_40 < 64, found


@installed
def test_runs_of_many_threads_do_not_share_memory(bundle: Bundle) -> None:
    edge = OpenVinoModel(model(bundle, "edge"), workers=2)
    mels = [speech_mel(bundle, 30, seed)[None] for seed in range(6)]
    expected = [edge.run(mel) for mel in mels]
    wrong: list[int] = []

    def work(index: int) -> None:
        audio = [edge.run(mels[index]) for _ in range(20)]
        wrong.extend(index for one in audio if np.abs(one - expected[index]).max() > FP32_MAX_ABS)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@installed
def test_forked_child_gets_an_error_and_the_parent_goes_on(tiny_bundle_path: Path) -> None:
    code = f"""
import os, numpy, warnings
warnings.simplefilter("ignore")
from melrt import Vocoder
vocoder = Vocoder.load({str(tiny_bundle_path)!r}, backend="openvino", precision="fp32")
mel = numpy.zeros((80, 200), numpy.float32)
expected = vocoder(mel)
if (child := os.fork()) == 0:
    try:
        vocoder(mel)
    except Exception as error:
        vocoder.close()
        os._exit(7 if "did not survive the fork" in str(error) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert numpy.array_equal(vocoder(mel), expected)
vocoder.submit(numpy.zeros((80, 20000), numpy.float32))  # the interpreter exits while it runs
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@installed
def test_loading_starts_no_telemetry(tiny_bundle_path: Path) -> None:
    code = f"""
import sys, threading
from melrt import Vocoder
Vocoder.load({str(tiny_bundle_path)!r}, backend="openvino", precision="fp32")
assert "openvino_telemetry" not in sys.modules
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_missing_openvino_names_its_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r'needs openvino, .*pip install "melrt\[openvino\]"'):
        open_backend(bundle, BackendChoice(backend="openvino", precision="fp32"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"backend": "openvino", "device": "cuda", "precision": "fp32"}, "fp32 does not run in openvino on cuda: OpenVINO runs on a CPU"),
        ({"backend": "openvino", "precision": "int8"}, "has no int8 artifact"),
        ({"precision": "bf16"}, "has no bf16 artifact; it has fp16 onnx, fp32 onnx"),
    ],
)
def test_impossible_choices_say_what_is_possible(bundle: Bundle, choice: dict[str, str], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        open_backend(bundle, BackendChoice(**choice))
