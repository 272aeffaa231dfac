"""Engines against a fake GPU: the accuracy check of new engines, and refitting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.runtime.fake_gpu import Gpu
from tests.runtime.fake_tensorrt import BATCH, TARGET, WINDOW, add_engines, engine_bytes, install

from melrt import Vocoder
from melrt.bundle import Artifact, Bundle
from melrt.errors import BundleError, EngineBuildError
from melrt_export.checkpoints import load_checkpoint, native
from melrt_export.export import export_voice
from melrt_export.generator.config import GeneratorConfig
from melrt_export.parity import FP32_MAX_ABS, probe_mel
from melrt_export.tensorrt.accuracy_check import check_accuracy
from melrt_export.tensorrt.refit import refit_engines


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return install(monkeypatch)


def load(voice: Bundle) -> Vocoder:
    return Vocoder.load(voice, backend="tensorrt", precision="fp32")


def test_inaccurate_engine_is_not_added(gpu: Gpu, tiny_bundle: Bundle) -> None:
    """The builder evaluates every engine on speech before it adds it to the bundle."""

    def check(graph: str, smallest: int, gain: float = 1.0) -> dict[str, float]:
        model = onnx.load_from_string(tiny_bundle.read(tiny_bundle.find("onnx", graph=graph, precision="fp32")[0]))
        last = next(tensor for tensor in model.graph.initializer if tensor.name == "last.weight")
        last.CopyFrom(onnx.numpy_helper.from_array(np.float32(gain) * onnx.numpy_helper.to_array(last), last.name))
        plan = engine_bytes(model.SerializeToString(), (1, 80, smallest), (BATCH, 80, WINDOW))
        entry = Artifact.of("x.engine", plan, "engine", graph=graph, precision="fp16", target=TARGET)
        return check_accuracy(tiny_bundle, entry, plan, graph)

    assert check("edge", 4)["max_abs"] < FP32_MAX_ABS
    assert check("interior", WINDOW)["max_abs"] < FP32_MAX_ABS
    with pytest.raises(EngineBuildError, match=r"x.engine on Fake GPU .* SNR .* limit is SNR >= 45 dB. The engine was not added"):
        check("edge", 4, gain=1.1)
    assert not gpu.memory


def test_refitted_engines_have_the_new_weights(
    gpu: Gpu, tiny_bundle: Bundle, tiny_checkpoint: Path, make_voice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of the voice before fine-tuning gives the audio of the voice after it."""
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = {name: 1.02 * value for name, value in checkpoint.weights.items()}
    native.save(tmp_path / "tuned", replace(checkpoint, weights=weights))
    tuned = export_voice(tmp_path / "tuned", tmp_path / "tuned.melrt")
    with pytest.raises(EngineBuildError, match="no refittable engine.* melrt build .*--refittable"):
        list(refit_engines(tuned, tiny_bundle))
    donor = add_engines(tiny_bundle, refittable=True)
    entries = list(refit_engines(tuned, donor))
    assert {entry.graph for entry in entries} == {"edge", "interior"}
    mel = probe_mel(tuned.manifest.spec, 150)
    with load(Bundle.open(tuned.path)) as vocoder, Vocoder.load(tuned, device="cpu") as cpu, load(donor) as old:
        assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS
        assert np.abs(vocoder(mel) - old(mel)).max() > 0.001
    other, _ = make_voice(GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 4)), tmp_path)
    with pytest.raises(BundleError, match="differ in .*channels.*same network"):
        list(refit_engines(Bundle.open(other), donor))
    monkeypatch.setenv("MELRT_KEY", str(tmp_path / "another.key"))
    with pytest.raises(BundleError, match="was not built by this user, and could run any code.*melrt trust"):
        list(refit_engines(tuned, donor))
