"""Coqui TTS: its three generators, both layouts of the weights, and its kinds of mel normalization."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.export.checkpoints.reference import Shape, check_export, nested, network, prefixed, statistics
from torch.nn import functional as F

from melrt.planning.edges import Edges

RANGE = {"signal_norm": True, "min_level_db": -100, "ref_level_db": 20, "max_norm": 4.0, "clip_norm": True, "symmetric_norm": True}
# Shape, additional audio settings, and the layout of the weights.
CASES = {
    "melgan, new": (Shape(), RANGE, "new"),
    "fullband, legacy": (Shape(scales=(4, 2, 2), stacks=3), {**RANGE, "symmetric_norm": False, "max_norm": 1.0}, "legacy"),
    "multi-band, statistics": (Shape(outputs=4), {"signal_norm": True, "stats_path": "/data/elsewhere/scale_stats.npy"}, "new"),
    "not normalized, natural": (Shape(), {"signal_norm": False, "log_func": "np.log", "spec_gain": 1.0, "preemphasis": 0.98}, "legacy"),
    "clipped within the range of speech": (Shape(), {**RANGE, "min_level_db": -60, "ref_level_db": -20}, "new"),
}


def write_checkpoint(folder: Path, shape: Shape, audio: dict, layout: str, state: dict) -> None:
    """Write a config with a comment and a web address, weights in either layout, and the statistics as a pickled dict."""
    folder.mkdir()
    kind = "multiband_melgan_generator" if shape.outputs > 1 else "fullband_melgan_generator" if shape.stacks > 2 else "melgan_generator"
    params = {"upsample_factors": list(shape.scales), "num_res_blocks": shape.stacks}
    config = json.dumps({"generator_model": kind, "generator_model_params": params, "audio": audio, "url": "http://x//y"}, indent=1)
    (folder / "config.json").write_text(config.replace('"audio"', '// the "audio"\n "audio"', 1))
    model = {**{f"model_g.{k}": v for k, v in state.items()}, "model_d.x": torch.zeros(2)} if layout == "new" else state
    torch.save({"model": model, "step": 1} | ({"model_disc": {}} if layout == "legacy" else {}), folder / "best_model.pth.tar")
    if audio["stats_path"]:
        mean, scale = (20 * values for values in statistics(shape.mels))
        stats = {"mel_mean": mean, "mel_std": scale, "linear_mean": mean, "linear_std": scale, "audio_config": audio}
        np.save(folder / "scale_stats.npy", np.array(stats, dtype=object), allow_pickle=True)


def normalize(mel: np.ndarray, audio: dict) -> np.ndarray:
    """Normalize as Coqui's `AudioProcessor.normalize` does."""
    if not audio["signal_norm"]:
        return mel
    if audio["stats_path"]:
        mean, scale = (20 * values[:, None] for values in statistics(len(mel[0])))
        return (mel - mean) / scale
    unit = (mel - audio["ref_level_db"] - audio["min_level_db"]) / -audio["min_level_db"]
    top = audio["max_norm"]
    return np.clip(2 * top * unit - top, -top, top) if audio["symmetric_norm"] else np.clip(top * unit, 0, top)


@pytest.mark.parametrize("case", CASES)
def test_coqui(tmp_path: Path, case: str) -> None:
    shape, settings, layout = CASES[case]
    net = network(nested, shape)
    hop = shape.hop
    audio = {"sample_rate": 500 * hop, "fft_size": 4 * hop, "win_length": 4 * hop, "hop_length": hop, "num_mels": shape.mels,
             "mel_fmin": 0.0, "mel_fmax": None, "spec_gain": 20, "log_func": "np.log10", "preemphasis": 0.0, "stats_path": None,
             **settings}  # fmt: skip
    state = prefixed(net, "layers")
    bank = torch.randn(1, 4, 63) / 8
    if shape.outputs > 1:
        state |= {"pqmf_layer.G": bank, "pqmf_layer.H": bank.transpose(0, 1), "pqmf_layer.updown_filter": torch.zeros(4, 4, 4)}
    write_checkpoint(tmp_path / "voice", shape, audio, layout, state)

    def reference(mel: np.ndarray) -> torch.Tensor:
        out = net(torch.from_numpy(normalize(mel.astype(np.float64), audio).astype(np.float32)))
        if shape.outputs == 1:
            return out
        spread = torch.zeros(1, 4, 4 * out.shape[2])
        spread[..., ::4] = 4 * out
        return F.conv1d(spread, bank, padding=31)

    manifest = check_export(tmp_path / "voice", reference, tmp_path, use_edges=True).manifest
    assert (manifest.edges, manifest.spec.floor) == (Edges(2, 2), 1e-8)
    assert (manifest.spec.log, manifest.spec.preemphasis) == (("ln", 0.98) if "natural" in case else ("dB", 0.0))
    if "clipped" in case:
        assert manifest.normalization.clip == (-80.0, -20.0)
