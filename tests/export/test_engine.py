"""Building engines with TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from melrt.bundle import Bundle
from melrt.errors import BundleError, ConfigError, EngineBuildError, MissingExtraError
from melrt.system import find_gpu
from melrt_export.generator.config import GeneratorConfig
from melrt_export.tensorrt.audit import audit_layers, audit_plan
from melrt_export.tensorrt.build import build_engine, build_unsaved_engine
from melrt_export.tensorrt.options import SOURCES, EngineOptions
from melrt_export.tensorrt.plan_text import PlanText

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("graph", ["edge", "interior"])
def test_engine_is_added_to_the_bundle(tiny_bundle: Bundle, precision: str, graph: str) -> None:
    seen = []
    entry = build_engine(tiny_bundle, EngineOptions(precision=precision, graph=graph), lambda *progress: seen.append(progress))
    bundle = Bundle.open(tiny_bundle.path)
    assert bundle.find("engine", precision=precision) == [entry]
    assert len(bundle.read(entry)) == entry.size > 10_000
    source = bundle.find("onnx", graph=graph, precision="fp16" if precision == "fp16" else "fp32")[0]
    assert entry.target["source"] == source.sha256
    frames = (4, 32, 256) if graph == "edge" else (256, 256, 256)
    assert entry.target["profile"] == [[batch, 80, length] for batch, length in zip((1, 4, 16), frames, strict=True)]
    plan = bundle.read(entry)
    shapes = [*((batch, 256) for batch in (1, 2, 4, 8, 16)), *((batch, frames) for frames in (32, 48, 80, 144) for batch in (1, 4, 16))]
    static = [[[batch, 80, length]] * 3 for batch, length in shapes] if graph == "interior" else []
    assert entry.target["profiles"] == (static or [entry.target["profile"]])
    assert plan.count(b"corrltn={") % max(1, len(static)) == 0, "the plan holds a program for each shape"
    assert (b"memset" not in plan) == bool(static), "a static program prepares nothing at run time"
    assert (entry.target["flavor"], entry.target["compute_capability"]) == ("tensorrt_rtx", "portable")
    assert seen
    assert all(0 <= done <= total for _, done, total in seen)
    assert len(bundle.find("onnx")) == 4, "the graphs must remain"


def test_multi_band_voice_builds_with_float32_filter_bank(make_voice, tmp_path: Path) -> None:
    config = GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 2), stacks=2, out_channels=4, pqmf_taps=62)
    path, _ = make_voice(config, tmp_path, ("fp32", "fp16"))
    assert build_engine(Bundle.open(path), EngineOptions(precision="fp16")).size > 10_000


def test_graph_of_the_wrong_precision_is_an_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "fp16", "fp32")
    before = sorted(tiny_bundle.path.iterdir())
    with pytest.raises(EngineBuildError, match="FLOAT, not fp16"):
        build_engine(tiny_bundle, EngineOptions(precision="fp16"))
    assert sorted(tiny_bundle.path.iterdir()) == before


def test_graph_that_cannot_be_parsed_is_an_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "read", lambda *_: b"not onnx")
    with pytest.raises(EngineBuildError, match="parse"):
        build_engine(tiny_bundle, EngineOptions())


def test_ctrl_c_stops_the_build_and_keeps_the_bundle(tiny_bundle: Bundle) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = sorted(tiny_bundle.path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_bundle, EngineOptions(), interrupt)
    assert sorted(tiny_bundle.path.iterdir()) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4'; it must be one of fp32, tf32, fp16"),
        ({"flavor": "tvm"}, "flavor is 'tvm'"),
        ({"graph": "middle"}, "graph is 'middle'"),
        ({"batch": (4, 1, 2)}, "rising order"),
        ({"frames": (1, 8, 16)}, "at least 4"),
        ({"frames": (8, 16)}, "three whole numbers"),
        ({"optimization_level": 9}, "from 0 to 5"),
        ({"workspace": -1}, "workspace is -1; it must be a whole number from 0"),
        ({"compatible": "all"}, "compatible is 'all'"),
        ({"compatible": "hardware"}, "A portable engine runs on every GPU"),
        ({"compatible": "version"}, "wheels lack the library"),
        ({"refittable": True}, "only for the GPU of the build machine. Add --this-gpu"),
    ],
)
def test_options_that_cannot_be_built(tiny_bundle: Bundle, wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(tiny_bundle, EngineOptions(**wrong))


def test_bundle_without_the_graph_is_an_error(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from melrt_export.export import ExportOptions, export_voice

    bundle = export_voice(tiny_checkpoint, tmp_path / "x.melrt", ExportOptions(precisions=("fp32",)))
    with pytest.raises(BundleError, match="no interior graph in fp16"):
        build_engine(bundle, EngineOptions(precision="fp16"))


def test_engine_for_this_gpu_needs_a_gpu(tiny_bundle: Bundle) -> None:
    if find_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineBuildError, match="no GPU works here.*portable"):
        build_engine(tiny_bundle, EngineOptions(portable=False, flavor="tensorrt_rtx"))


def test_second_build_takes_the_engine_from_the_cache(tiny_bundle: Bundle, cache: Path) -> None:
    def build(**options: object) -> tuple[str, int]:
        steps: list[object] = []
        built = build_unsaved_engine(tiny_bundle, EngineOptions(**options), lambda *progress: steps.append(progress))
        assert built.cached == (not steps)
        return built.entry.sha256, len(steps)

    first, steps = build()
    assert steps
    assert build() == (first, 0)
    assert build(cached=False)[1]
    assert build(optimization_level=1)[1], "other settings need another engine"
    files = sorted((cache / "engines").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert build()[1], "a damaged engine must be built again"


def test_unwritable_cache_is_not_an_error(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MELRT_CACHE", str(tmp_path / "file"))
    assert build_engine(tiny_bundle, EngineOptions()).size > 10_000


def test_missing_flavor_names_its_extra(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r'pip install "melrt\[tensorrt\]"'):
        build_engine(tiny_bundle, EngineOptions(flavor="tensorrt"))


def inspected(datatype: str, **layer: object) -> str:
    """Return the inspector's JSON for one convolution (TensorRT 10 developer guide, engine inspector)."""
    convolution = {
        "Name": "first", "LayerType": "CaskConvolution", "Inputs": [{"Name": "x", "Format/Datatype": datatype}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}], **layer,
    }  # fmt: skip
    return json.dumps({"Layers": [convolution, {"Name": "pad", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "FP32"}]}]})


def test_audit_finds_a_convolution_in_another_precision() -> None:
    assert audit_layers(inspected("Channel major FP16 format where channel % 8 == 0"), "fp16") == "engine"
    assert audit_layers(inspected("Row major linear FP32", Weights={"Type": "Half", "Count": 4}), "fp16") == "engine"
    assert audit_layers(inspected("Row major Int8 format", Weights={"Type": "Int8", "Count": 4}), "int8") == "engine"
    with pytest.raises(EngineBuildError, match="first computes Row major linear FP32, not fp16"):
        audit_layers(inspected("Row major linear FP32"), "fp16")
    with pytest.raises(EngineBuildError, match="first computes Float, not int8"):
        audit_layers(inspected("Row major Int8 format", Weights={"Type": "Float", "Count": 4}), "int8")
    assert audit_layers('{"Layers": ["first"]}', "fp16") == "network", "an inspector that states no types"


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "float"), ("fp16", "half")])
def test_plan_states_the_type_of_every_convolution(tiny_bundle: Bundle, precision: str, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    entry = build_engine(tiny_bundle, EngineOptions(precision=precision, flavor="tensorrt_rtx", graph="interior"))
    assert entry.target["audited"] == "plan"
    bundle = Bundle.open(tiny_bundle.path)
    model = bundle.read(bundle.find("onnx", graph="interior", precision=precision)[0])
    plan = bundle.read(entry)
    names = {node.name for node in onnx.load_from_string(model).graph.node if node.op_type == "Conv"}
    types = PlanText.read(plan).weight_types
    assert set(types.values()) == {kind}
    assert set(types) <= names
    assert len(types) > 0.9 * len(names), "the builder may replace a convolution over one channel by another kernel"
    other = {"fp32": "fp16", "fp16": "fp32"}[precision]
    with pytest.raises(EngineBuildError, match=f"computes {kind} instead of"):
        audit_plan(plan, model, other)
    assert audit_plan(b"a plan without text", model, precision) == "network"
