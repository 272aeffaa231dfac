"""The deploy graph computes the same as the trained generator, for every shape of the family."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from melrt.backends.onnxruntime import OnnxModel
from melrt.errors import CheckpointError
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.mrf import MrfConfig
from melrt_export.generator.network import Generator
from melrt_export.generator.receptive_field import receptive_field
from melrt_export.graph.deploy import deploy_graph

# A different order of summation changes a sample by about 1e-6.
TOLERANCE = 2e-5
SMALL = {"in_channels": 8, "channels": 32}
HIFIGAN_V3 = MrfConfig((3, 5, 7), ((1, 2), (2, 6), (3, 12)), paired=False)
FAMILY = {
    "published": GeneratorConfig(in_channels=80, channels=64),
    "four stacks": GeneratorConfig(**SMALL, upsample_scales=(8, 4, 2), stacks=4),
    "odd scales, sub-bands": GeneratorConfig(**SMALL, upsample_scales=(5, 5, 3), stacks=2, out_channels=4),
    "multi-band": GeneratorConfig(**SMALL, upsample_scales=(8, 4, 2), stacks=4, out_channels=4, pqmf_taps=62),
    "multi-band, odd scales, three bands": GeneratorConfig(**SMALL, upsample_scales=(5, 3), stacks=2, out_channels=3, pqmf_taps=20),
    "wide kernels": GeneratorConfig(**SMALL, upsample_scales=(4, 2), kernel_size=9, stack_kernel_size=5, stacks=2),
    "channels that do not halve evenly": GeneratorConfig(in_channels=8, channels=30, upsample_scales=(4, 2), stacks=2),
    "TensorFlow's crop": GeneratorConfig(**SMALL, upsample_scales=(5, 4, 3), stacks=2, crop="early"),
    "clipped": GeneratorConfig(**SMALL, upsample_scales=(4, 2), stacks=1, input_clip=(-0.5, 1.0)),
    "clipped and normalized, zero padding": GeneratorConfig(
        **SMALL, upsample_scales=(4, 2), stacks=1, input_clip=(-0.5, 1.0), input_affine=True, padding_mode="zeros"
    ),
    "zero padding, no bias, no tanh": GeneratorConfig(**SMALL, padding_mode="zeros", bias=False, final_tanh=False, negative_slope=0.1),
    "replication": GeneratorConfig(**SMALL, upsample_scales=(4, 2), padding_mode="replicate"),
    "causal": GeneratorConfig(**SMALL, upsample_scales=(4, 3), causal=True),
    "causal, zero padding": GeneratorConfig(**SMALL, upsample_scales=(4, 2), causal=True, padding_mode="zeros"),
    "HiFi-GAN": GeneratorConfig(**SMALL, upsample_scales=(4, 2), mrf=MrfConfig(), padding_mode="zeros", last_slope=0.01),
    "HiFi-GAN V3": GeneratorConfig(
        **SMALL, upsample_scales=(8, 8, 4), mrf=HIFIGAN_V3, padding_mode="zeros", negative_slope=0.1, last_slope=0.01
    ),
}


def random_weights(config: GeneratorConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights that keep the signal's level from layer to layer, so that every layer affects the output."""
    noise = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.tensors():
        fan = 2 * shape[0] if "upsample" in name else int(np.prod(shape[1:]))
        spread = 0.1 if name.endswith("bias") else 1 / np.sqrt(fan)
        weights[name] = (spread * noise.standard_normal(shape)).astype(np.float32)
    return weights


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_graph_equals_pytorch_at_every_length(config: GeneratorConfig, noise: np.random.Generator) -> None:
    weights = random_weights(config)
    generator = Generator.from_weights(config, weights)
    session = OnnxModel(deploy_graph(config, weights).SerializeToString())
    for batch, frames in ((1, config.smallest_input), (2, config.smallest_input + 1), (3, 57)):
        mel = noise.standard_normal((batch, config.in_channels, frames)).astype(np.float32)
        with torch.inference_mode():
            expected = generator(torch.from_numpy(mel)).numpy()
        assert expected.shape == (batch, config.out_channels // config.subbands, frames * config.hop)
        assert np.abs(expected).max() > 0.05, "a silent output would hide any error"
        assert np.abs(session.run(mel).reshape(expected.shape) - expected).max() < TOLERANCE


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_interior_graph_is_exact_inside_its_context(config: GeneratorConfig, noise: np.random.Generator) -> None:
    weights = random_weights(config)
    model = deploy_graph(config, weights, graph="interior")
    assert not [node.name for node in model.graph.node if node.op_type == "Pad"]
    field = receptive_field(config)
    left, right = field.left, field.right
    mel = noise.standard_normal((2, config.in_channels, left + right + 5)).astype(np.float32)
    with torch.inference_mode():
        expected = Generator.from_weights(config, weights)(torch.from_numpy(mel)).numpy()
    got = OnnxModel(model.SerializeToString()).run(mel).reshape(expected.shape)
    inside = slice(left * config.hop, expected.shape[-1] - right * config.hop)
    assert np.abs(got - expected)[..., inside].max() < TOLERANCE


def test_generator_equals_the_published_one(published, tiny_checkpoint) -> None:
    from melrt_export.checkpoints import load_checkpoint

    checkpoint = load_checkpoint(tiny_checkpoint)
    mel = torch.randn(2, 80, 21)
    with torch.inference_mode():
        ours = Generator.from_weights(checkpoint.config, checkpoint.weights)(mel)
        assert torch.allclose(ours, published(mel), atol=1e-6)


def test_smallest_input_is_the_shortest_that_pytorch_accepts() -> None:
    for config in FAMILY.values():
        generator = Generator.from_weights(config, random_weights(config))
        smallest = config.smallest_input
        assert generator(torch.zeros(1, config.in_channels, smallest)).shape[-1] == smallest * config.hop
        if smallest > 1:
            with pytest.raises(RuntimeError, match="[Pp]adding"):
                generator(torch.zeros(1, config.in_channels, smallest - 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GeneratorConfig(), (6, 6)),
        (GeneratorConfig(upsample_scales=(8, 8, 4, 2)), (6, 6)),
        (GeneratorConfig(channels=1024, upsample_scales=(4, 4, 4, 2, 2), stacks=4), (18, 18)),
        (GeneratorConfig(upsample_scales=(8, 8, 4), stacks=4), (10, 10)),
        (GeneratorConfig(channels=384, upsample_scales=(8, 4, 2), stacks=4, out_channels=4, pqmf_taps=62), (11, 11)),
        (GeneratorConfig(channels=384, upsample_scales=(5, 5, 3), stacks=4, out_channels=4, pqmf_taps=62), (14, 15)),
        (GeneratorConfig(channels=384, upsample_scales=(8, 4, 4), stacks=4, out_channels=4, pqmf_taps=62), (11, 11)),
        (GeneratorConfig(channels=384, upsample_scales=(2, 4, 8), stacks=4, out_channels=4, pqmf_taps=62), (30, 30)),
        (GeneratorConfig(mrf=MrfConfig(), padding_mode="zeros"), (13, 13)),
        (GeneratorConfig(upsample_scales=(8, 8, 4), mrf=HIFIGAN_V3, padding_mode="zeros"), (11, 11)),
    ],
)
def test_receptive_field_of_published_shapes(config: GeneratorConfig, expected: tuple[int, int]) -> None:
    field = receptive_field(config)
    assert (field.left, field.right) == expected


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_changed_frame_changes_its_receptive_field_only(config: GeneratorConfig) -> None:
    generator = Generator.from_weights(config, random_weights(config)).double()
    field = receptive_field(config)
    left, right = field.left, field.right
    frames, middle = 2 * (left + right) + 9, left + right + 4
    mel = torch.randn(1, config.in_channels, frames, dtype=torch.float64)
    changed = mel.clone()
    changed[..., middle] += 1.0
    with torch.inference_mode():
        change = (generator(changed) - generator(mel)).abs().amax(dim=(0, 1)).reshape(frames, config.hop).amax(dim=1)
    affected = torch.nonzero(change).flatten()
    # the output of frame t depends on frames t - left to t + right, so a change of frame m changes frames m - right to m + left
    assert middle - right <= affected[0] <= middle - right + 1
    assert middle + left - 1 <= affected[-1] <= middle + left


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
def test_outermost_frame_depends_on_end_reach_frames(config: GeneratorConfig) -> None:
    """Frames beyond them have no effect, even if they are missing. The last of them has an effect at one end at least."""
    generator = Generator.from_weights(config, random_weights(config)).double()
    reach = receptive_field(config).end_reach
    short, frames = max(reach, config.smallest_input), 3 * reach + 9
    mel = torch.randn(1, config.in_channels, frames, dtype=torch.float64)
    effects = []
    with torch.inference_mode():
        whole = generator(mel)
        for ends in (slice(0, short), slice(frames - short, frames)):
            outermost = slice(0, config.hop) if ends.start == 0 else slice(-config.hop, None)
            assert (generator(mel[..., ends])[..., outermost] - whole[..., outermost]).abs().max() < 1e-12
            changed = mel.clone()
            changed[..., reach - 1 if ends.start == 0 else frames - reach] += 1.0
            effects.append((generator(changed) - whole)[..., outermost].abs().max().item() > 0)
    assert any(effects)


def test_fp16_graph_has_float32_input_and_output() -> None:
    config = GeneratorConfig(**SMALL)
    model = deploy_graph(config, random_weights(config), "fp16", metadata={"melrt.graph": "edge"})
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    convolutions = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2 + 4 * (1 + 3 * 3)
    assert {types[name] for name in convolutions} == {onnx.TensorProto.FLOAT16}
    ends = [*model.graph.input, *model.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}
    assert {p.key: p.value for p in model.metadata_props} == {"melrt.graph": "edge"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"channels": 15}, {"causal": "no"}, {"bias": 1}, {"final_tanh": None}, {"input_clip": (1, 0)},
        {"crop": "middle"}, {"kernel_size": 6}, {"upsample_scales": ()}, {"upsample_scales": (999, 999)}, {"channels": 1 << 40},
        {"stacks": 0}, {"padding_mode": "circular"}, {"pqmf_taps": 61}, {"negative_slope": 2.0}, {"channels": 512.0}, {"in_channels": True},
        {"mrf": MrfConfig()}, {"last_slope": "0.01"},
    ],
)  # fmt: skip
def test_impossible_shapes_raise_an_error(wrong: dict) -> None:
    with pytest.raises(CheckpointError, match=next(iter(wrong)).split("_")[0]):
        GeneratorConfig(**wrong)
