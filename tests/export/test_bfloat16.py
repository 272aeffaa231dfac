"""bfloat16 graphs: their types, their emulation, and, on a processor that multiplies bfloat16, OpenVINO's audio of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from melrt import Bundle, Options, Policy, StreamPace, Vocoder
from melrt.backends.cpu_choice import LOG_MEL
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.planning.windows import Span, plan
from melrt.system import arithmetic
from melrt_export.assets import DEMO_VOICE, RECORDING
from melrt_export.export import ExportOptions, export_voice
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig
from melrt_export.graph.bfloat16 import _rounded, emulate_bfloat16
from melrt_export.parity import BF16_MIN_SNR_DB, Difference, probe_mel, runnable, verify

SMALL = {"in_channels": 8, "channels": 32, "upsample_scales": (4, 4)}
FAMILY = {
    "reflection": GeneratorConfig(**SMALL),
    "causal": GeneratorConfig(**SMALL, causal=True),
    "multi-band": GeneratorConfig(in_channels=8, channels=32, upsample_scales=(4, 2), stacks=2, out_channels=4, pqmf_taps=62),
    "HiFi-GAN": GeneratorConfig(**SMALL, padding_mode="zeros", mrf=MrfConfig(kernel_sizes=(3, 5), dilations=((1, 3), (1, 2)))),
}
# The engine fuses layers and rounds less often, or rounds in another order; both cost at most this much.
SLACK_DB = 3.0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_voice(DEMO_VOICE, tmp_path_factory.mktemp("demo") / "lj.melrt", ExportOptions(precisions=("fp32", "bf16")))


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_layers_that_need_it_stay_in_float32(config: GeneratorConfig, make_voice, tmp_path: Path) -> None:
    path, _ = make_voice(config, tmp_path, ("fp32", "bf16"))
    model = onnx.load(path / "interior.bf16.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    convolutions = {node.name: types.get(node.output[0], TensorProto.FLOAT) for node in model.graph.node if node.op_type == "Conv"}
    exact = {name for name, kind in convolutions.items() if kind == TensorProto.FLOAT}
    last = {name for name in convolutions if name.startswith("stages.1.blocks.") and not name.endswith("dilated")}
    assert exact == last | {"first", "last"} | ({"pqmf"} & set(convolutions))
    assert len(exact) < len(convolutions) / 2 + 2
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}


def test_weights_and_layers_round_as_pytorch_rounds(demo: Bundle) -> None:
    """Rounding a constant, and the emulated rounding of a layer, are PyTorch's."""
    values = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
    stored = np.frombuffer(_rounded(onnx.numpy_helper.from_array(values), "x").raw_data, np.uint16)
    assert np.array_equal(stored, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy().reshape(-1))
    model = emulate_bfloat16(onnx.load(demo.path / "edge.bf16.onnx"))
    name = "stages.0.blocks.0.dilated.out"
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    (layer,) = session.run([name], {"mel": probe_mel(demo.manifest.spec)[None]})
    assert layer.std() > 0.01
    assert not (layer.view(np.uint32) & 0xFFFF).any(), "the lower half of the bits is rounded away"


def test_manifest_states_the_figures_and_verify_agrees(demo: Bundle) -> None:
    for entry in demo.find("onnx", precision="bf16"):
        assert entry.quality["snr_db"] >= BF16_MIN_SNR_DB
        assert -0.005 < entry.quality[LOG_MEL] < 0.01
    edge, interior = (entry.quality[LOG_MEL] for entry in demo.find("onnx", precision="bf16"))
    assert abs(edge - interior) < 0.001, "the ends, where the interior graph is wrong, do not count"
    assert [(row.file, row.passed) for row in verify(demo)] == [
        (f"{graph}.{precision}.onnx", True) for precision in ("fp32", "bf16") for graph in ("edge", "interior")
    ]


needs_bfloat16 = pytest.mark.skipif(not arithmetic("bfloat16"), reason="needs a processor that multiplies bfloat16")


@needs_bfloat16
def test_openvino_computes_each_layer_in_the_type_of_the_graph(demo: Bundle) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    from melrt.backends.openvino import OpenVinoModel

    data = demo.read(demo.find("onnx", graph="edge", precision="bf16")[0])
    model = OpenVinoModel(data)
    types = model.executed_types()
    exact = {name for name, kind in types.items() if kind == "f32"}
    parts = {f"stages.2.blocks.{block}.{part}" for block in range(4) for part in ("pointwise", "shortcut")}
    assert exact == {"first", "last", "pqmf"} | parts
    assert set(types.values()) == {"f32", "bf16"}
    # not a recording: in a few frames of it the phase depends on the last bits of the mel, and those frames decide the SNR
    mel = probe_mel(demo.manifest.spec, 600)[None]
    exact_audio = runnable(demo.read(demo.find("onnx", graph="edge", precision="fp32")[0]), "fp32").run(mel)
    emulated, real = (Difference.between(exact_audio, one.run(mel)).snr_db for one in (runnable(data, "bf16"), model))
    assert real > emulated - SLACK_DB


@needs_bfloat16
def test_bfloat16_windows_and_streams_equal_one_run_to_its_rounding(demo: Bundle) -> None:
    """Cutting changes no more than rounding does, and no more at the seams than elsewhere."""
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    from melrt.backends.openvino import OpenVinoModel

    mel = mel_from_audio(read_audio(RECORDING, 22050), demo.manifest.spec)
    whole = OpenVinoModel(demo.read(demo.find("onnx", graph="edge", precision="bf16")[0])).run(mel[None])[0]
    with Vocoder.load(demo, device="cpu", precision="fp32") as exact:
        rounding = float(((whole - exact(mel)) ** 2).mean())
    options = Options(policy=Policy(64, static=False, batch=1, workers=2, multiple=8), pace=StreamPace(first=8, growth=1))
    with Vocoder.load(demo, device="cpu", precision="bf16", options=options) as vocoder:
        assert vocoder.backend.name == "openvino"
        streamed = np.concatenate(list(vocoder.stream(mel[:, at : at + 16] for at in range(0, mel.shape[1], 16))))
        for audio in (vocoder(mel), next(vocoder.batch([mel])), streamed):
            assert ((audio - whole) ** 2).mean() < 2 * rounding  # two roundings, neither of which knows the other
        frames = mel.shape[1]
        energy = ((vocoder(mel) - whole).reshape(frames, -1) ** 2).mean(axis=1)
        seams = [window.keep_stop for window in plan(Span(0, frames, frames, True), vocoder.field, vocoder.policy)][:-1]
        assert energy[[frame for seam in seams for frame in (seam - 1, seam)]].mean() < 2 * energy.mean()
