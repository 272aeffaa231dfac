"""Exact rewrites of the deploy graph: every variant computes the same samples."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from melrt.backends.onnxruntime import OnnxModel
from melrt.bundle import Bundle
from melrt.errors import ConfigError
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig
from melrt_export.graph.rewrites import CHOICES, Variant, merge_shortcuts, rewrite_graph
from melrt_export.parity import Difference, exact_samples, probe_mel
from melrt_export.tensorrt.build import EngineOptions, build_engine

# Norm of the difference relative to the signal's. Single precision has 6e-8 for one rounding, and sums have many.
SAME_FUNCTION = 5e-7
# The same in double precision, which has 1e-16.
SAME_FUNCTION_DOUBLE = 1e-14
VARIANTS = [Variant(*choice) for choice in itertools.product(*CHOICES.values())]  # type: ignore[arg-type]
SMALL = {"in_channels": 8, "channels": 32, "upsample_scales": (4, 3), "stacks": 2}
CONFIGS = {
    "published": GeneratorConfig(**SMALL),
    "odd rate cropped late, no bias": GeneratorConfig(**SMALL, crop="late", bias=False),
    "causal": GeneratorConfig(**SMALL, causal=True, padding_mode="zeros"),
    "multi-band": GeneratorConfig(**SMALL, out_channels=4, pqmf_taps=62),
    "replicated": GeneratorConfig(**SMALL, padding_mode="replicate"),
    "HiFi-GAN": GeneratorConfig(**SMALL, padding_mode="zeros", mrf=MrfConfig(kernel_sizes=(3, 5), dilations=((1, 2), (2,)))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_computes_the_same_samples(name: str, make_voice, tmp_path: Path) -> None:
    config = CONFIGS[name]
    bundle = Bundle.open(make_voice(config, tmp_path, ("fp32", "fp16"))[0])
    manifest = bundle.manifest
    mel = np.stack([probe_mel(manifest.spec, 50, seed) for seed in range(2)])
    for entry in bundle.find("onnx"):
        graph = "edge" if entry.graph == "edge" else "interior"
        model = bundle.read(entry)
        reference = OnnxModel(model).run(mel)
        for variant in VARIANTS:
            form = rewrite_graph(model, variant, config)
            audio = OnnxModel(form).run(mel)
            assert audio.shape == reference.shape
            kept = (exact_samples(graph, one, manifest.receptive_field, manifest.spec.hop) for one in (reference, audio))
            difference = Difference.between(*kept)
            assert difference.passes(entry.precision), (entry.file, variant, difference)
            assert_form(form, variant, config)
        assert rewrite_graph(model, Variant(), config) == model


def test_merged_blocks_compute_the_same_function(make_voice, tmp_path: Path) -> None:
    """In double precision the difference is that of rounding alone, so that the functions are equal.

    In single precision the order of the sums differs, in all the blocks or in one of them.
    """
    bundle = Bundle.open(make_voice(CONFIGS["published"], tmp_path, ("fp32",))[0])
    mel = probe_mel(bundle.manifest.spec, 50)[None]
    for graph in ("edge", "interior"):
        model = onnx.load_from_string(bundle.read(bundle.find("onnx", graph=graph)[0]))
        reference = OnnxModel(model.SerializeToString()).run(mel)
        for blocks, count in ((None, 4), (["stages.1.blocks.0"], 1)):
            merged = merge_shortcuts(model, blocks)
            assert [node.op_type for node in merged.graph.node].count("Concat") == count
            error = OnnxModel(merged.SerializeToString()).run(mel) - reference
            assert np.linalg.norm(error) / np.linalg.norm(reference) < SAME_FUNCTION
        double = in_double_precision(model)
        exact, merged_exact = (
            ReferenceEvaluator(one).run(None, {"mel": mel.astype(np.float64)})[0] for one in (double, merge_shortcuts(double))
        )
        assert exact.dtype == np.float64
        assert np.linalg.norm(merged_exact - exact) / np.linalg.norm(exact) < SAME_FUNCTION_DOUBLE


def in_double_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 graph with the same values in float64. ONNX's reference runs it; ONNX Runtime has no such convolution."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    del double.graph.value_info[:]
    for value in (*double.graph.input, *double.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for tensor in double.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    return double


def assert_form(model: bytes, variant: Variant, config: GeneratorConfig) -> None:
    nodes = [node for node in onnx.load_from_string(model).graph.node if not node.name.startswith("pqmf")]
    kinds = [node.op_type for node in nodes]
    transposed = variant.upsampling == "transposed"
    assert kinds.count("ConvTranspose") == (2 if transposed else 0)
    assert kinds.count("Transpose") == (0 if transposed else 2)
    merged = variant.shortcut == "merged" and not config.mrf
    assert kinds.count("Concat") == (2 * config.stacks if merged else 0)
    if variant.upsampling != "polyphase":
        assert not any(node.name == "last.crop" for node in nodes)
    kernels = [list(a.ints) for node in nodes for a in node.attribute if a.name == "kernel_shape"]
    assert all(kernel[1 if variant.time_axis == "height" else 0] == 1 for kernel in kernels)


@pytest.mark.parametrize("variant", [Variant(upsampling="cropped"), Variant("transposed", "merged", "height")], ids=str)
@pytest.mark.parametrize("graph", ["edge", "interior"])
def test_tensorrt_builds_the_variants(tiny_bundle: Bundle, variant: Variant, graph: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed here")
    entry = build_engine(tiny_bundle, EngineOptions(precision="fp16", graph=graph, variant=variant))  # type: ignore[arg-type]
    assert Variant.from_dict(entry.target["variant"]) == variant


@pytest.mark.parametrize("wrong", [{"shortcut": "none"}, {"layout": "NHWC"}, "cropped"])
def test_unknown_variant_raises_an_error(wrong: object) -> None:
    with pytest.raises(ConfigError, match="graph"):
        Variant.from_dict(wrong)
