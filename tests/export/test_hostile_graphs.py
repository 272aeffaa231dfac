"""ONNX graphs with a correct hash that would hang, fill the memory, or read other files if an inference engine ran them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from melrt import Vocoder
from melrt.bundle import Artifact, Bundle, graph_check
from melrt.errors import BundleError


def _before_audio(*nodes: onnx.NodeProto, **constants: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    """Return a change that puts nodes, which turn `audio.in` into `audio`, after the graph's own."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "audio.in"
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())

    return change


def _subgraph() -> onnx.GraphProto:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    return helper.make_graph([helper.make_node("Identity", ["audio.in"], ["y"])], "body", [], [value])


def _node(kind: str, *inputs: str, output: str = "audio", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [output], **attributes)


def _weights_outside(model: onnx.ModelProto) -> None:
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.append(onnx.StringStringEntryProto(key="location", value="secret.bin"))


def _constant_of_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "size"))
    model.graph.node.insert(0, _node("ConstantOfShape", "size", output="zeros"))


def _function(model: onnx.ModelProto) -> None:
    opset = helper.make_opsetid("", 19)
    model.functions.append(helper.make_function("x", "F", ["a"], ["b"], [_node("Identity", "a", output="b")], [opset]))


def _doubled(model: onnx.ModelProto) -> None:
    """Join a weight with itself 40 times: the engine would compute 2^40 values when it loads the model."""
    name = model.graph.initializer[0].name
    for i in range(40):
        model.graph.node.insert(i, _node("Concat", name, name, output=f"d{i}", axis=0))
        name = f"d{i}"


def _spread(model: onnx.ModelProto) -> None:
    """Add a row to a column: the result has the product of their sizes."""
    shape = numpy_helper.from_array(np.array([-1, 1]), "column")
    model.graph.initializer.append(shape)
    model.graph.node.extend([_node("Reshape", "audio", "column", output="c"), _node("Add", "audio", "c", output="square")])


def _wide(model: onnx.ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    next(a for a in conv.attribute if a.name == "pads").ints[3] = 1 << 40


ATTACKS = [
    (_before_audio(_node("If", "yes", then_branch=_subgraph(), else_branch=_subgraph()), yes=np.array(True)), "attribute has a field 6"),
    (_before_audio(_node("Loop", "n", "", "audio.in"), n=np.array(1 << 62)), "node of type 'Loop'; melrt writes Add"),
    (_before_audio(_node("Scan", "audio.in", num_scan_inputs=1)), "node of type 'Scan'"),
    (_before_audio(_node("Pad", "audio.in", "p"), p=np.array([0, 0, 0, 1 << 40])), "more than 524288 values"),
    (_before_audio(_node("Pad", "audio.in", "p"), p=np.array([0, 0, 0, 1])), r"into shape \(1, 32769\); this voice has 256 samples"),
    (_before_audio(_node("Tanh", "absent")), "a Tanh has inputs .*absent"),
    (_before_audio(_node("Tanh", "audio.in", domain="com.stranger")), "a node has a field 7"),
    (_constant_of_shape, "node of type 'ConstantOfShape'"),
    (_weights_outside, "a constant has a field 1[34]"),
    (_function, "the model has a field 25"),
    (lambda model: model.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "not ONNX's own"),
    (lambda model: model.graph.initializer[0].dims.append(1 << 40), "do not fit"),
    (lambda model: model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 80, "t"])), "inputs .'x'."),
    (_doubled, "more than 524288 values"),
    (_spread, "does not fit its inputs"),
    (_wide, "more than 524288 values"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ATTACKS)
def test_graph_that_the_exporter_does_not_write_is_refused(tiny_bundle: Bundle, change, message: str) -> None:
    """Each file agrees with the manifest, so that only the check of the graph can refuse it."""
    (entry,) = tiny_bundle.find("onnx", graph="edge", precision="fp32")
    model = onnx.load_from_string(tiny_bundle.read(entry))
    change(model)
    data = model.SerializeToString()
    tiny_bundle.add(Artifact.of(entry.file, data, "onnx", graph="edge", precision="fp32"), data)
    with pytest.raises(BundleError, match=rf"edge.fp32.*onnx: .*{message}.*Export the voice again"):
        Vocoder.load(tiny_bundle.path, precision="fp32")


def test_truncated_and_altered_graphs_give_bundle_errors_or_run(tiny_bundle_path: Path, tmp_path: Path, noise: np.random.Generator) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle_path, tmp_path / "x.melrt"))
    (entry,) = bundle.find("onnx", graph="interior", precision="fp32")
    good = bundle.read(entry)
    refused = 0
    for _ in range(60):
        bad = bytearray(good[: noise.integers(len(good))] if noise.random() < 0.3 else good)
        for at in noise.integers(len(bad), size=20):
            bad[at] = noise.integers(256)
        added = bundle.add(Artifact.of(entry.file, bytes(bad), "onnx"), bytes(bad))
        try:
            bundle.read(added)
        except BundleError:
            refused += 1
    assert refused >= 15


def test_values_of_activations_are_counted_and_constants_are_not_taken_off(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = tiny_bundle.find("onnx", graph="edge", precision="fp32")
    model = onnx.load_from_string(tiny_bundle.read(entry))
    channels = next(tensor.dims[1] for tensor in model.graph.initializer if tensor.name == model.graph.node[-3].input[1])
    monkeypatch.setattr(graph_check, "MAX_VALUES", 3 * channels * 256 - 1)  # a block holds its input, its branch and its shortcut
    with pytest.raises(BundleError, match="values at once"):
        tiny_bundle.read(entry)
