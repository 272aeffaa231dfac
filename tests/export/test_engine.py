"""Engines build for real with TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from melrt.bundle import Bundle
from melrt.errors import BundleError, EngineBuildError, MissingExtraError
from melrt.system import find_gpu
from melrt_export.generator.config import GeneratorConfig
from melrt_export.tensorrt import build as engine
from melrt_export.tensorrt.audit import audit_layers
from melrt_export.tensorrt.build import EngineOptions, build_engine

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("graph", ["edge", "interior"])
def test_an_engine_joins_the_bundle(tiny_bundle: Bundle, precision: str, graph: str) -> None:
    seen = []
    entry = build_engine(tiny_bundle, EngineOptions(precision=precision, graph=graph), lambda *progress: seen.append(progress))
    bundle = Bundle.open(tiny_bundle.path)
    assert bundle.find("engine", precision=precision) == [entry]
    assert len(bundle.read(entry)) == entry.size > 10_000
    source = bundle.find("onnx", graph=graph, precision="fp16" if precision == "fp16" else "fp32")[0]
    assert entry.target["source"] == source.sha256
    frames = (4, 32, 256) if graph == "edge" else (256, 256, 256)
    assert entry.target["profile"] == [[batch, 80, length] for batch, length in zip((1, 4, 16), frames, strict=True)]
    assert (entry.target["flavor"], entry.target["compute_capability"]) == ("tensorrt_rtx", "portable")
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)
    assert len(bundle.find("onnx")) == 4, "what was there stays"


def test_a_multi_band_engine_keeps_its_filter_bank_in_float32(make_voice, tmp_path: Path) -> None:
    config = GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 2), stacks=2, out_channels=4, pqmf_taps=62)
    path, _ = make_voice(config, tmp_path, ("fp32", "fp16"))
    assert build_engine(Bundle.open(path), EngineOptions(precision="fp16")).size > 10_000


def test_a_graph_that_is_not_what_it_says_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.SOURCES, "fp16", "fp32")
    before = sorted(tiny_bundle.path.iterdir())
    with pytest.raises(EngineBuildError, match="FLOAT, not fp16"):
        build_engine(tiny_bundle, EngineOptions(precision="fp16"))
    assert sorted(tiny_bundle.path.iterdir()) == before


def test_a_graph_that_the_parser_refuses(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "read", lambda *_: b"no onnx")
    with pytest.raises(EngineBuildError, match="parse"):
        build_engine(tiny_bundle, EngineOptions())


def test_ctrl_c_stops_the_builder_and_leaves_the_bundle(tiny_bundle: Bundle) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tiny_bundle.path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_bundle, EngineOptions(), interrupt)
    assert sorted(tiny_bundle.path.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4'; it is one of fp32, tf32, fp16"),
        ({"flavor": "tvm"}, "flavor is 'tvm'"),
        ({"graph": "middle"}, "graph is 'middle'"),
        ({"batch": (4, 1, 2)}, "rising order"),
        ({"frames": (1, 8, 16)}, "at least 4"),
        ({"optimization_level": 9}, "between 0 and 5"),
        ({"workspace": -1}, "workspace is -1; it lies between 0"),
        ({"compatible": "all"}, "compatible is 'all'"),
        ({"compatible": "hardware"}, "a portable one runs on every GPU"),
        ({"compatible": "version"}, "wheels lack the library"),
        ({"refittable": True}, "only for a GPU that is at hand: add --this-gpu"),
    ],
)
def test_impossible_wishes(tiny_bundle: Bundle, wrong: dict, message: str) -> None:
    with pytest.raises(EngineBuildError, match=message):
        build_engine(tiny_bundle, EngineOptions(**wrong))


def test_a_bundle_without_the_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from melrt_export.export import ExportOptions, export_voice

    bundle = export_voice(tiny_checkpoint, tmp_path / "x.melrt", ExportOptions(precisions=("fp32",)))
    with pytest.raises(BundleError, match="no interior graph in fp16"):
        build_engine(bundle, EngineOptions(precision="fp16"))


def test_an_engine_for_this_gpu_needs_one(tiny_bundle: Bundle) -> None:
    if find_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineBuildError, match="none works here.*portable"):
        build_engine(tiny_bundle, EngineOptions(portable=False, flavor="tensorrt_rtx"))


def test_the_same_engine_is_built_once(tiny_bundle: Bundle, cache: Path) -> None:
    def build(**options: object) -> tuple[str, int]:
        steps: list[object] = []
        entry = build_engine(tiny_bundle, EngineOptions(**options), lambda *progress: steps.append(progress))
        return entry.sha256, len(steps)

    first, steps = build()
    assert steps
    assert build() == (first, 0)
    assert build(cached=False)[1]
    assert build(optimization_level=1)[1], "other settings, another engine"
    files = sorted((cache / "engines").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert build()[1], "a damaged one is built anew"


def test_a_cache_that_cannot_be_written_is_no_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MELRT_CACHE", str(tmp_path / "file"))
    assert build_engine(tiny_bundle, EngineOptions()).size > 10_000


def test_a_missing_flavor_names_its_extra(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r'pip install "melrt\[tensorrt\]"'):
        build_engine(tiny_bundle, EngineOptions(flavor="tensorrt"))


def inspected(datatype: str) -> str:
    """What the inspector prints of a convolution (TensorRT 10 developer guide, engine inspector)."""
    layer = {"Name": "first", "LayerType": "CaskConvolution", "Outputs": [{"Name": "y", "Format/Datatype": datatype}]}
    return json.dumps(
        {"Layers": [layer, {"Name": "pad", "LayerType": "Reformat", "Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]}
    )


def test_an_engine_that_fell_back_is_an_error() -> None:
    assert audit_layers(inspected("Channel major FP16 format where channel % 8 == 0"), "fp16") == "engine"
    assert audit_layers(inspected("Half"), "fp16") == "engine"
    with pytest.raises(EngineBuildError, match="first gives Row major linear FP32, not fp16"):
        audit_layers(inspected("Row major linear FP32"), "fp16")
    assert audit_layers('{"Layers": ["first"]}', "fp16") == "network", "an inspector that names no types"
