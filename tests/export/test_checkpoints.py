"""Loading checkpoints. A damaged or unsafe file, or one of another network, raises an error that names it, and executes no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from melrt.errors import CheckpointError
from melrt_export.checkpoints import load_checkpoint, native
from melrt_export.checkpoints.checkpoint import fold_weight_norm
from melrt_export.checkpoints.reading import read_yaml
from melrt_export.generator.reference import PyTorchReference
from melrt_export.parity import FP32_MAX_ABS


class Hostile:
    """Object whose pickle creates the file `target` when it is loaded without protection."""

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_both_weight_norm_formats_fold_to_the_same_weights(published_class) -> None:
    torch.manual_seed(1)
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = published_class(weight_norm=torch.nn.utils.weight_norm)
    new = published_class()
    state = {name: value.numpy() for name, value in old.state_dict().items()}
    renamed = {n.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): v
               for n, v in state.items()}  # fmt: skip
    new.load_state_dict({name: torch.from_numpy(value) for name, value in renamed.items()})
    folded = fold_weight_norm(state)
    for name, value in fold_weight_norm(renamed).items():
        assert np.array_equal(value, folded[name])
    for name, layer in new.named_modules():
        if hasattr(layer, "parametrizations"):
            assert np.allclose(layer.weight.detach().numpy(), folded[f"{name}.weight"], atol=1e-7)


def test_shape_is_inferred_from_weights_without_args_yml(folder: Path) -> None:
    expected = load_checkpoint(folder)
    (folder / "args.yml").unlink()
    (folder / "best_netG.pt").rename(folder / "linda.pt")
    found = load_checkpoint(folder / "linda.pt")
    assert found.config == expected.config
    assert found.config.channels == 64
    assert found.name == "linda"


def test_native_format_round_trip(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    native.save(tmp_path / "saved", checkpoint)
    again = load_checkpoint(tmp_path / "saved")
    assert (again.config, again.spec, again.name) == (checkpoint.config, checkpoint.spec, checkpoint.name)
    assert all(np.array_equal(again.weights[name], value) for name, value in checkpoint.weights.items())


def with_config(folder: Path, change) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_normalization_is_folded_exactly(folder: Path, tmp_path: Path, published) -> None:
    """The loaded network gives for plain mels what the trained network gives for normalized mels."""
    native.save(tmp_path / "native", load_checkpoint(folder))
    noise = np.random.default_rng(0)
    mean, scale = noise.standard_normal(80), noise.uniform(0.5, 2, 80)
    with_config(tmp_path / "native", lambda c: c.update(normalization={"mean": mean.tolist(), "scale": scale.tolist()}))
    mel = noise.standard_normal((1, 80, 20)).astype(np.float32)
    with torch.inference_mode():
        expected = published(torch.from_numpy(((mel - mean[:, None]) / scale[:, None]).astype(np.float32))).numpy()[:, 0]
    assert np.abs(expected).max() > 0.05
    found = load_checkpoint(tmp_path / "native")
    assert np.abs(PyTorchReference(found.config, found.weights).audio(mel) - expected).max() < FP32_MAX_ABS


def test_save_does_not_replace_other_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(CheckpointError, match="not a melrt checkpoint"):
        native.save(tmp_path / "precious", load_checkpoint(folder))


@pytest.mark.parametrize("form", ["zip", "legacy", "raw"])
def test_code_in_a_pickle_is_not_executed(tmp_path: Path, form: str) -> None:
    hostile = Hostile()
    hostile.target = tmp_path / "it-ran"
    file = tmp_path / "netG.pt"
    if form == "raw":
        file.write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save({"model.1.weight": hostile}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"system.*melrt executed nothing"):
        load_checkpoint(file)
    assert not hostile.target.exists()


def test_yaml_tags_execute_nothing(tmp_path: Path) -> None:
    file = tmp_path / "args.yml"
    file.write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/it-ran']\nb: !!python/name:os.system ''\n")
    assert read_yaml(file)["a"] == [f"touch {tmp_path}/it-ran"]
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("text", ["[1, 2", "- 1", "a: " + "[" * 3000, "? {a: 1}\n: 2", "\x00"])
def test_error_names_the_broken_yaml_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "args.yml").write_text(text)
    with pytest.raises(CheckpointError, match=r"args\.yml"):
        read_yaml(tmp_path / "args.yml")


def test_files_that_are_not_checkpoints(folder: Path, tmp_path: Path) -> None:
    good = (folder / "best_netG.pt").read_bytes()
    cases = {
        "empty.pt": (b"", "truncated"),
        "truncated.pt": (good[: len(good) // 2], "truncated"),
        "cut-tail.pt": (good[:-40], "truncated"),
        "text.pt": (b"hello, I am a checkpoint\n" * 40, "truncated or not a checkpoint"),
        "model.safetensors": (b"\xff" * 64, "config.json"),
        "weights.onnx": (b"", "not contain a checkpoint of a project that melrt supports"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_two_checkpoints_in_a_folder_are_an_error(folder: Path) -> None:
    native.save(folder / "native", load_checkpoint(folder))
    for file in (folder / "native").iterdir():
        shutil.copy(file, folder)
    with pytest.raises(CheckpointError, match="more than one checkpoint.*Give the path of the file"):
        load_checkpoint(folder)


def resave(folder: Path, change) -> Path:
    state = torch.load(folder / "best_netG.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "best_netG.pt")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.4.shortcut.bias"), "missing model.4.shortcut.bias"),
        (lambda s: s.update({"model.99.weight": torch.zeros(2)}), "unexpected model.99.weight"),
        (lambda s: s.update({"model.24.bias": torch.zeros(3)}), r"model.24.bias has shape \(3,\), expected \(1,\)"),
        (lambda s: s.update({"model.24.bias": torch.tensor([float("nan")])}), "not finite"),
        (lambda s: s.pop("model.24.parametrizations.weight.original1"), "without its direction"),
        (lambda s: s.pop("model.24.parametrizations.weight.original0"), "without its magnitude"),
        (lambda s: s["model.24.parametrizations.weight.original1"].zero_(), "length zero"),
        (lambda s: s.update({"model.24.parametrizations.weight.original1": torch.tensor(1.0)}), "is a single number"),
        (lambda s: s.update({"epoch": 3}), r"not a bare state dict.*'epoch' \(a int\)"),
        (lambda s: [s.pop(k) for k in list(s) if "block" in k], "is not a generator"),
    ],
)
def test_error_names_the_wrong_tensors(folder: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(resave(folder, change))


def test_args_yml_of_another_training_is_an_error(folder: Path) -> None:
    args = (folder / "args.yml").read_text()
    (folder / "args.yml").write_text(args.replace("ngf: 4", "ngf: 32"))
    with pytest.raises(CheckpointError, match=r"ngf is 32, but according to the weights it is 4"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "pip install --upgrade melrt"),
        (lambda c: c.pop("mel"), "lacks a section"),
        (lambda c: c["generator"].update(color="red"), "unknown fields"),
        (lambda c: c["generator"].update(channels=10**9), "channels is 1000000000"),
        (lambda c: c["mel"].update(n_mels=40), "takes 80 bands"),
        (lambda c: c.update(generator=[]), "generator|section"),
        (lambda c: c.update(normalization={"mean": [0.0] * 80}), "each of 80 bands"),
        (lambda c: c.update(normalization={"mean": [0.0] * 80, "scale": [0.0] * 80}), "above 0"),
        (lambda c: c["mel"].update(normalization={"mean": [0.0] * 80, "scale": [1.0] * 80}), "beside generator and mel"),
        (lambda c: c["mel"].update(f_max=10**400), "f_max"),
        (lambda c: c["mel"].update(hop=10**400), "hop"),
        (lambda c: c["generator"].update(negative_slope=10**400), "negative_slope"),
        (lambda c: c.update(normalization={"mean": [10**400] * 80, "scale": [1.0] * 80}), "each of 80 bands"),
        (lambda c: c.update(edges={"left": -1}), "left is -1"),
    ],
)
def test_wrong_native_configs(folder: Path, tmp_path: Path, change, message: str) -> None:
    native.save(tmp_path / "native", load_checkpoint(folder))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(with_config(tmp_path / "native", change))
