"""Exact rewrites of the deploy graph, and the choice between them by measurement."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.runtime import fake_gpu
from tests.runtime.fake_gpu import engine_bytes, install
from typer.testing import CliRunner

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import EngineBuildError
from melrt.vocoder import Vocoder
from melrt_export import cli
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig
from melrt_export.graph.rewrites import CHOICES, Variant, rewritten
from melrt_export.parity import FP32_MAX_ABS, Difference, inside, probe_mel
from melrt_export.tensorrt import build as engine
from melrt_export.tensorrt import variant_search as tune
from melrt_export.tensorrt.build import EngineOptions, build_engine

VARIANTS = [Variant(*choice) for choice in itertools.product(*CHOICES.values())]  # type: ignore[arg-type]
SMALL = {"in_channels": 8, "channels": 32, "upsample_scales": (4, 3), "stacks": 2}
CONFIGS = {
    "published": GeneratorConfig(**SMALL),
    "odd rate cropped late, no bias": GeneratorConfig(**SMALL, crop="late", bias=False),
    "causal": GeneratorConfig(**SMALL, causal=True, padding_mode="zeros"),
    "multi-band": GeneratorConfig(**SMALL, out_channels=4, pqmf_taps=62),
    "replicated": GeneratorConfig(**SMALL, padding_mode="replicate"),
    "fusion": GeneratorConfig(**SMALL, padding_mode="zeros", fusion=MrfConfig(kernel_sizes=(3, 5), dilations=((1, 2), (2,)))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_rewrite_says_the_same(name: str, make_voice, tmp_path: Path) -> None:
    config = CONFIGS[name]
    bundle = Bundle.open(make_voice(config, tmp_path, ("fp32", "fp16"))[0])
    manifest = bundle.manifest
    mel = np.stack([probe_mel(manifest.spec, 50, seed) for seed in range(2)])
    for entry in bundle.find("onnx"):
        graph = "edge" if entry.graph == "edge" else "interior"
        model = bundle.read(entry)
        reference = OnnxModel(model).run(mel)
        for variant in VARIANTS:
            form = rewritten(model, variant, config)
            audio = OnnxModel(form).run(mel)
            assert audio.shape == reference.shape
            kept = (inside(graph, one, manifest.receptive_field, manifest.spec.hop) for one in (reference, audio))
            difference = Difference.between(*kept)
            assert difference.passes(entry.precision), (entry.file, variant, difference)
            assert_form(form, variant, config)
        assert rewritten(model, Variant(), config) == model


def assert_form(model: bytes, variant: Variant, config: GeneratorConfig) -> None:
    nodes = [node for node in onnx.load_from_string(model).graph.node if not node.name.startswith("pqmf")]
    kinds = [node.op_type for node in nodes]
    transposed = variant.upsampling == "transposed"
    assert kinds.count("ConvTranspose") == (2 if transposed else 0)
    assert kinds.count("Transpose") == (0 if transposed else 2)
    merged = variant.shortcut == "merged" and not config.fusion
    assert kinds.count("Concat") == (2 * config.stacks if merged else 0)
    if variant.upsampling != "polyphase":
        assert not any(node.name == "last.crop" for node in nodes)
    kernels = [list(a.ints) for node in nodes for a in node.attribute if a.name == "kernel_shape"]
    assert all(kernel[1 if variant.time_axis == "height" else 0] == 1 for kernel in kernels)


@pytest.mark.parametrize("variant", [Variant(upsampling="cropped"), Variant("transposed", "merged", "height")], ids=str)
@pytest.mark.parametrize("graph", ["edge", "interior"])
def test_tensorrt_builds_the_rewrites(tiny_bundle: Bundle, variant: Variant, graph: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    entry = build_engine(tiny_bundle, EngineOptions(precision="fp16", graph=graph, variant=variant))  # type: ignore[arg-type]
    assert Variant.from_dict(entry.target["variant"]) == variant


class Clock:
    """Time that passes in the GPU's runs alone: what else this machine does cannot reverse a duel."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is slow at some things, and a builder with faults."""
    install(monkeypatch)
    clock = Clock()
    for module in (tune, fake_gpu):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(tune, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(tune, "ROUNDS", 3)
    monkeypatch.setattr(tune, "SECONDS_PER_TIMING", 0)
    for module in (engine, tune):
        monkeypatch.setattr(module, "find_gpu", lambda: object())
    monkeypatch.setattr(engine, "build_plan", slow_plan)


def slow_plan(trt: object, model: bytes, profile: list[list[int]], options: EngineOptions, on_progress: object) -> bytes:
    variant, frames = options.variant, profile[1][2]
    if variant.time_axis == "height":
        raise EngineBuildError("no kernel for this")
    if variant.shortcut == "merged":
        model = louder(model)
    seconds = {"polyphase": 0.04, "cropped": 0.02, "transposed": 0.08}[variant.upsampling]
    seconds *= {128: 0.1, 512: 5}.get(frames, 1)
    return engine_bytes(model, tuple(profile[0]), tuple(profile[2]), seconds=seconds)


def louder(model: bytes) -> bytes:
    graph = onnx.load_from_string(model)
    last = next(tensor for tensor in graph.graph.initializer if tensor.name == "last.weight")
    last.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(last), last.name))
    return graph.SerializeToString()


def test_the_fastest_right_engine_is_kept(gpu_host: None, tiny_bundle: Bundle) -> None:
    result = CliRunner().invoke(cli_app(), [str(tiny_bundle.path), "--precision", "fp32", "--tune", "--batch", "1,2,2"])
    assert result.exit_code == 0, result.output
    bundle = Bundle.open(tiny_bundle.path)
    interior, edge = (bundle.find("engine", graph=graph)[0] for graph in ("interior", "edge"))
    assert interior.target["variant"] == Variant(upsampling="cropped").to_dict()
    assert interior.target["profile"][1] == [2, 80, 128]
    assert edge.target["profile"][2][2] == 128, "the ends are windows' ends"
    verdicts = [(trial["upsampling"], trial["frames"], re.sub(r":.*", "", trial["verdict"])) for trial in interior.target["tuned"]]
    assert verdicts == [
        ("polyphase", 256, "fastest"), ("cropped", 256, "fastest"), ("transposed", 256, "slower"), ("cropped", 256, "refused"),
        ("cropped", 256, "refused"), ("cropped", 128, "fastest"), ("cropped", 512, "slower"),
    ]  # fmt: skip
    reasons = [trial["verdict"] for trial in interior.target["tuned"] if trial["verdict"].startswith("refused")]
    assert "No engine was kept" in reasons[0]
    assert reasons[1] == "refused: no kernel for this"
    assert edge.target["variant"] == Variant().to_dict()
    assert len(edge.target["tuned"]) == 4, "cropped is the edge graph's own form"
    assert json.loads((bundle.path / "manifest.json").read_text())
    mel = probe_mel(bundle.manifest.spec, 200)
    with Vocoder.load(bundle, backend="tensorrt") as vocoder, Vocoder.load(bundle, device="cpu") as cpu:
        assert vocoder.policy.frames == 128
        assert np.abs(vocoder(mel) - cpu(mel)).max() < FP32_MAX_ABS


def cli_app():
    import typer

    app = typer.Typer()
    app.command()(cli.build)
    return app


def test_without_a_gpu_there_is_nothing_to_time(tiny_bundle: Bundle) -> None:
    from melrt.system import find_gpu

    if find_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineBuildError, match="there is none here"):
        tune.tune_engine(tiny_bundle, EngineOptions())


@pytest.mark.parametrize("wrong", [{"shortcut": "none"}, {"layout": "NHWC"}, "cropped"])
def test_a_manifest_with_another_graph(wrong: object) -> None:
    with pytest.raises(EngineBuildError, match="graph"):
        Variant.from_dict(wrong)
