"""Mel conventions and normalizations refuse values that cannot be, alone and in a manifest."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from melrt.bundle import Bundle, Manifest
from melrt.errors import BundleError, ConfigError, MelError
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec

SPEC = MelSpec()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"win_length": 2048}, "win_length is 2048; it must be at most n_fft, 1024"),
        ({"f_min": 9000.0, "f_max": 8000.0}, "bands from 9000 to 8000 Hz"),
        ({"f_max": 12000.0}, "half the sample rate, 11025 Hz"),
        ({"hop": 0}, "hop is 0; it must be a whole number from 1"),
        ({"hop": 256.0}, "hop is 256.0; it must be a whole number"),
        ({"log": "log3"}, "log is 'log3'; it must be one of log10, ln, log2, dB, linear"),
        ({"epsilon": 1.0}, "epsilon is 1.0; it must be a finite number at least 0 and below 1"),
        ({"norm": "area"}, "norm is 'area'; it must be one of slaney, or None"),
        ({"normalization": {"mean": [1.0]}}, "it must be a Normalization, or None"),
    ],
)
def test_impossible_conventions_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"mel convention: .*{message}"):
        replace(SPEC, **change)


def test_whole_numbers_become_floats() -> None:
    spec = MelSpec.from_dict(SPEC.to_dict() | {"f_max": 8000, "floor": 1})
    assert spec == MelSpec(f_max=8000.0, floor=1.0)
    assert json.dumps(spec.to_dict()) == json.dumps(MelSpec(f_max=8000.0, floor=1.0).to_dict())


def test_every_field_is_needed() -> None:
    values = SPEC.to_dict()
    values.pop("gain")
    with pytest.raises(ConfigError, match=r"missing fields \['gain'\], unknown fields \['pitch'\]"):
        MelSpec.from_dict(values | {"pitch": 1})


def test_silence_is_the_logarithm_of_the_floor() -> None:
    assert SPEC.silence == -5.0
    assert MelSpec(log="dB", gain=2.0, floor=1e-3).silence == pytest.approx(-120)


def test_arrays_that_are_not_mels_are_refused() -> None:
    class Tensor:
        def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    cases = {
        "requires grad.*mel.detach": Tensor(), "cannot be read as an array": [[1.0], [1.0, 2.0]], "dtype <U1": np.full((80, 9), "x"),
        "shape (80,).*melrt mel": np.zeros(80), "40 bands.*melrt mel": np.zeros((40, 9)), "looks transposed": np.zeros((9, 80)),
        "one at a time": np.zeros((2, 80, 9)), "masked values.*mel.filled": np.ma.masked_less(np.eye(80, 9), 0.5),
        "holds inf at (3, 4)": np.where(np.arange(80)[:, None] * 9 + np.arange(9) == 31, 1e39, 0.0),
    }  # fmt: skip
    for message, mel in cases.items():
        with pytest.raises(MelError, match=message.replace("(", r"\(").replace(")", r"\)")):
            SPEC.check_frames(mel)  # type: ignore[arg-type]


def test_normalization_needs_numbers_for_each_band() -> None:
    with pytest.raises(ConfigError, match="2 means and 1 scales"):
        Normalization((1.0, 2.0), (1.0,))
    with pytest.raises(ConfigError, match="mean is .*nan"):
        Normalization((float("nan"),), (1.0,))
    assert Normalization([1, 2], [3, 4]) == Normalization((1.0, 2.0), (3.0, 4.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(levels={"mean": 1, "deviation": 0}), "deviation is 0"),
        (lambda m: m.update(levels={"mean": "x", "deviation": 1}), "mean is 'x'"),
        (lambda m: m.update(normalization={"mean": [1.0], "scale": [-1.0]}), "scale is .*above 0"),
        (lambda m: m.update(normalization={"mean": [1.0]}), "object with mean, scale"),
        (lambda m: m.update(normalization={"mean": [1.0], "scale": [1.0], "clip": [2, 1]}), "lower limit first"),
        (lambda m: m.update(parameters=-1), "parameters is -1"),
        (lambda m: m["spec"].update(gain=0.0), "gain is 0.0"),
        (lambda m: m["spec"].update(preemphasis=1.5), "preemphasis is 1.5"),
        (lambda m: m["spec"].update(normalization={"mean": [1.0], "scale": [1.0]}), "normalization has 1 bands; n_mels is 80"),
        (lambda m: m["spec"].update(floor=10**400), "floor"),
        (lambda m: m["spec"].pop("padding"), "missing fields"),
    ],
)
def test_impossible_values_in_a_manifest_are_refused(tiny_bundle: Bundle, change, message: str) -> None:
    values = json.loads((tiny_bundle.path / "manifest.json").read_text())
    change(values)
    with pytest.raises(BundleError, match=f"manifest.json is damaged: .*{message}"):
        Manifest.loads(json.dumps(values).encode())
