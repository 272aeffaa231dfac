"""Search for the fastest variant of the graph and the fastest window, on a fake GPU."""

from __future__ import annotations

import json
import re

import numpy as np
import onnx
import pytest
from tests.runtime import fake_tensorrt
from tests.runtime.fake_tensorrt import engine_bytes, install
from typer.testing import CliRunner

from melrt import timing
from melrt.bundle import Artifact, Bundle
from melrt.errors import EngineBuildError
from melrt.vocoder import Vocoder
from melrt_export import cli
from melrt_export.graph.rewrites import Variant
from melrt_export.parity import FP32_MAX_ABS, probe_mel
from melrt_export.tensorrt import build, engines, variant_search
from melrt_export.tensorrt.options import EngineOptions

# Time of an INT8 run divided by that of an FP16 run.
INT8_SECONDS = 0.5


class Clock:
    """Clock that advances only during the fake GPU's runs, so that other load on this machine cannot change a comparison."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake GPU with a known time for each variant, and a builder that fails for some of them."""
    install(monkeypatch)
    clock = Clock()
    for module in (variant_search, timing, fake_tensorrt):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(variant_search, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(variant_search, "ROUNDS", 3)
    monkeypatch.setattr(variant_search, "SECONDS_PER_TIMING", 0)
    for module in (build, engines, variant_search):
        monkeypatch.setattr(module, "find_gpu", lambda: object())
    monkeypatch.setattr(build, "build_plan", fake_plan)


def fake_plan(trt: object, model: bytes, profiles: list[list[list[int]]], options: EngineOptions, on_progress: object) -> bytes:
    variant, frames = options.variant, profiles[0][1][2]
    if variant.time_axis == "height":
        raise EngineBuildError("no kernel for this")
    if variant.shortcut == "merged":
        model = louder(model)
    seconds = {"polyphase": 0.04, "cropped": 0.02, "transposed": 0.08}[variant.upsampling]
    seconds *= {128: 0.1, 512: 5}.get(frames, 1) * {"int8": INT8_SECONDS}.get(options.precision, 1)
    return engine_bytes(model, tuple(profiles[0][0]), tuple(profiles[-1][2]), profiles=profiles, seconds=seconds)


def louder(model: bytes) -> bytes:
    graph = onnx.load_from_string(model)
    last = next(tensor for tensor in graph.graph.initializer if tensor.name == "last.weight")
    last.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(last), last.name))
    return graph.SerializeToString()


def test_fastest_accurate_engine_is_added(gpu_host: None, tiny_bundle: Bundle) -> None:
    result = CliRunner().invoke(cli_app(), [str(tiny_bundle.path), "--precision", "fp32", "--try-variants", "--batch", "1,2,2"])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tiny_bundle.path)
    interior, edge = (bundle.find("engine", graph=graph)[0] for graph in ("interior", "edge"))
    assert interior.target["variant"] == Variant(upsampling="cropped").to_dict()
    assert interior.target["profile"][1] == [2, 80, 128]
    assert edge.target["profile"][2][2] == 128, "the edge engine must take the window that was found"
    verdicts = [(trial["upsampling"], trial["frames"], re.sub(r":.*", "", trial["verdict"])) for trial in interior.target["trials"]]
    assert verdicts == [
        ("polyphase", 256, "fastest"), ("cropped", 256, "fastest"), ("transposed", 256, "slower"), ("cropped", 256, "refused"),
        ("cropped", 256, "refused"), ("cropped", 128, "fastest"), ("cropped", 512, "slower"),
    ]  # fmt: skip
    reasons = [trial["verdict"] for trial in interior.target["trials"] if trial["verdict"].startswith("refused")]
    assert "The engine was not added to the bundle" in reasons[0]
    assert reasons[1] == "refused: no kernel for this"
    assert edge.target["variant"] == Variant().to_dict()
    assert len(edge.target["trials"]) == 4, "the edge graph is already cropped after each stage"
    assert json.loads((bundle.path / "manifest.json").read_text())
    mel = probe_mel(bundle.manifest.spec, 200)
    with Vocoder.load(bundle, backend="tensorrt") as vocoder, Vocoder.load(bundle, device="cpu") as cpu:
        assert vocoder.policy.frames == 128
        assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS


@pytest.fixture
def int8_voice(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle whose FP16 and INT8 graphs are its FP32 graphs: the fake GPU knows their times by their names."""
    for graph in ("interior", "edge"):
        data = tiny_bundle.read(tiny_bundle.find("onnx", graph=graph, precision="fp32")[0])
        for precision in ("fp16", "int8-fp16"):
            name = f"{graph}.{precision}.onnx"
            tiny_bundle.add(Artifact.of(name, data, "onnx", graph=graph, precision=precision, quality={"snr_db": 40.0}), data)
    monkeypatch.setattr(build, "audit_plan", lambda *_: "plan")  # a fake plan has no INT8 convolutions to find
    return tiny_bundle


@pytest.mark.parametrize("seconds", [0.5, 0.97])
def test_int8_that_is_not_faster_than_fp16_is_refused(
    gpu_host: None, int8_voice: Bundle, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(f"{__name__}.INT8_SECONDS", seconds)
    arguments = [str(int8_voice.path), "--precision", "int8", "--batch", "1,2,2"]
    result = CliRunner().invoke(cli_app(), arguments)
    found = Bundle.open(int8_voice.path).find("engine", precision="int8")
    if seconds == 0.5:
        assert result.exit_code == 0, result.output
        assert {entry.graph: entry.target["against_fp16"] for entry in found} == {"interior": 2.0, "edge": "not compared"}
        assert "It is 2.00 times as fast as FP16 on this GPU." in result.output
        return
    assert isinstance(result.exception, EngineBuildError)
    assert "INT8 is 1.03 times as fast as FP16 on this GPU." in str(result.exception)
    assert not found
    result = CliRunner().invoke(cli_app(), [*arguments, "--force"])
    assert result.exit_code == 0, result.output
    found = Bundle.open(int8_voice.path).find("engine", precision="int8")
    assert [entry.target["against_fp16"] for entry in found] == ["not compared"] * 2


def test_int8_is_not_compared_without_a_gpu(gpu_host: None, int8_voice: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (build, engines):
        monkeypatch.setattr(module, "find_gpu", lambda: None)
    result = CliRunner().invoke(cli_app(), [str(int8_voice.path), "--precision", "int8"])
    assert result.exit_code == 0, result.output
    assert result.output.count("It was not compared with FP16.") == 2


def cli_app():
    import typer

    app = typer.Typer()
    app.command()(cli.build)
    return app


def test_search_needs_a_gpu(tiny_bundle: Bundle) -> None:
    from melrt.system import find_gpu

    if find_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineBuildError, match="this machine has none"):
        variant_search.find_fastest_engine(tiny_bundle, EngineOptions())
