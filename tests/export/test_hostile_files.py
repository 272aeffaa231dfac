"""Hostile files of every kind that a checkpoint consists of.

They try to execute code, read or write other files, or fill the memory. The error names the file, and no code is executed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
import types
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from melrt.errors import CheckpointError
from melrt_export.checkpoints import archives, hdf5, load_checkpoint
from melrt_export.checkpoints.reading import parse_yaml, read_json, read_npy_dict
from melrt_export.checkpoints.torch_files import read_pickle


class Hostile:
    """Object whose pickle creates the file `target` when it is loaded without protection."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def trap(tmp_path: Path):
    """An object that creates a file when it is unpickled; the test fails if the file exists at its end."""
    target = tmp_path / "it-ran"
    yield Hostile(target)
    assert not target.exists()


@pytest.mark.parametrize("wrap", [
    lambda h: {"model": {"generator": {"melgan.1.weight": h}}},
    lambda h: {"model": {"layers.1.weight": torch.zeros(1)}, "config": h},
    lambda h: {"model_g": {"generator.1.weight": torch.zeros(1)}, "hp_str": h},
])  # fmt: skip
def test_hostile_pickles_in_the_projects_layouts(tmp_path: Path, trap: Hostile, wrap) -> None:
    for name in ("checkpoint-1steps.pkl", "best_model.pth", "lj_aca5990_6400.pt"):
        torch.save(wrap(trap), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"system.*melrt executed nothing"):
            load_checkpoint(tmp_path / name)


def test_hostile_pickled_statistics(tmp_path: Path, trap: Hostile) -> None:
    np.save(tmp_path / "bad.npy", np.array({"mel_mean": trap}, dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"bad.npy holds more than tensors and arrays.*system"):
        read_npy_dict(tmp_path / "bad.npy")
    for name, data in (("short.npy", b"\x93NUMPY\x01"), ("plain.npy", None)):
        if data is None:
            np.save(tmp_path / name, np.zeros(3))
        else:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            read_npy_dict(tmp_path / name)


def test_attribute_dictionaries_load_as_plain_dictionaries(tmp_path: Path, trap: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old Coqui checkpoints pickle their own dictionary class. No other class of that package is built."""

    class AttrDict(dict):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.__dict__ = self

    module = types.ModuleType("mozilla_voice_tts.utils.io")
    AttrDict.__module__, AttrDict.__qualname__, module.AttrDict = module.__name__, "AttrDict", AttrDict
    for name in ("mozilla_voice_tts", "mozilla_voice_tts.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"config": AttrDict(audio=AttrDict(hop_length=256))}, tmp_path / "x.pth")
    torch.save({"config": AttrDict(audio=trap)}, tmp_path / "bad.pth")
    assert read_pickle(tmp_path / "x.pth")["config"]["audio"]["hop_length"] == 256
    with pytest.raises(CheckpointError, match="melrt executed nothing"):
        read_pickle(tmp_path / "bad.pth")


def test_hostile_yaml_and_json(tmp_path: Path, trap: Hostile) -> None:
    text = f"a: !!python/object/apply:os.system ['touch {trap.target}']\n---\nb: 1\n"
    assert parse_yaml(text, tmp_path)[0]["a"] == [f"touch {trap.target}"]
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 60_000)
    with pytest.raises(CheckpointError, match=r"deep.json is not JSON"):
        read_json(deep)
    deep.write_text('{"a": "http://x", // a "comment"\n "b\\"//": [1] //\n}')
    assert read_json(deep) == {"a": "http://x", 'b"//': [1]}


def test_hdf5_reads_only_inside_the_file(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.arange(3.0)
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    makers = {
        "external.h5": lambda f: f.__setitem__("kernel:0", h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")),
        "soft.h5": lambda f: f.__setitem__("kernel:0", h5py.SoftLink("/other")),
        "storage.h5": lambda f: f.create_dataset("k", (3,), "f8", external=[(str(tmp_path / "secret.bin"), 0, 24)]),
        "virtual.h5": lambda f: f.create_virtual_dataset("k", _virtual(tmp_path / "secret.h5")),
        "huge.h5": lambda f: f.create_dataset("k", (1 << 40,), "f4", chunks=(1024,), compression="gzip"),
        "text.h5": lambda f: f.create_dataset("k", data=b"abc"),
        "deep.h5": lambda f: f.create_dataset("/".join("a" * 40), data=1.0),
    }
    for name, make in makers.items():
        with h5py.File(tmp_path / name, "w") as file:
            make(file)
        with pytest.raises(CheckpointError, match=rf"{name}.*(link|other files|dtype|deeper)"):
            hdf5.read_hdf5(tmp_path / name)
    with h5py.File(tmp_path / "loop.h5", "w") as file:
        file["a/b"] = file["/"]
    with pytest.raises(CheckpointError, match="deeper"):
        hdf5.read_hdf5(tmp_path / "loop.h5")
    (tmp_path / "no.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    with pytest.raises(CheckpointError, match="cannot be read as HDF5"):
        hdf5.read_hdf5(tmp_path / "no.h5")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory and processor time")
@pytest.mark.parametrize(("fault", "message"), [
    ("while True: pass", ": libhdf5 crashed, or needed more than 0 s or"), ("os.kill(os.getpid(), 11)", ": libhdf5 crashed"),
    ("return {'x': np.ones(1 << 28)}", "; it is .*Unable to allocate"), ("return {'x': 1}", ": libhdf5 crashed"),
])  # fmt: skip
def test_hdf5_library_that_hangs_grows_or_crashes_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    """libhdf5 itself does so for one in 300 damaged files, other ones in each version."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.arange(3.0)
    assert hdf5.read_hdf5(tmp_path / "x.h5")["x"].tolist() == [0, 1, 2]
    program = f"import os\nimport numpy as np\ndef _read(path):\n    {fault}\n"
    program = f"from melrt_export.checkpoints import hdf5_reader\n{program}hdf5_reader._read = _read\nhdf5_reader.main()\n"
    (tmp_path / "reader.py").write_text(program)
    monkeypatch.setattr(hdf5, "PROGRAM", str(tmp_path / "reader.py"))
    monkeypatch.setattr(hdf5, "SECONDS", 0.3)
    monkeypatch.setattr(hdf5, "LONGEST_SECONDS", 120)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=f"x.h5 cannot be read as HDF5{message}"):
        hdf5.read_hdf5(tmp_path / "x.h5")
    assert time.monotonic() - started < 100


def _virtual(source: Path) -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(source), "x", (3,))
    return layout


def test_archives_unpack_only_into_the_temporary_folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        for name, kind in (("../../escaped", tarfile.REGTYPE), ("/etc/link", tarfile.SYMTYPE), ("dev", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"abc"))
    with archives.unpack_archive(tmp_path / "bad.tar.gz") as folder:
        assert [file.name for file in folder.iterdir()] == ["escaped"]
        assert not (folder.parent.parent / "escaped").exists()
    assert not folder.exists()

    good = tmp_path / "tiny.zip"
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tiny_checkpoint / "best_netG.pt", "a/b/../best_netG.pt")
        archive.writestr("a/args.yml", "ngf: 4\n")
    assert load_checkpoint(good).config == load_checkpoint(tiny_checkpoint).config
    monkeypatch.setattr(archives, "MAX_WEIGHTS_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"tiny.zip unpacks to more than"):
        load_checkpoint(good)
    (tmp_path / "no.tar").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match=r"no.tar cannot be read as an archive"):
        load_checkpoint(tmp_path / "no.tar")


def wavegan(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model": {"generator": {"melgan.1.weight": torch.zeros(1)}}}, folder / "checkpoint-9steps.pkl")
    params = {"in_channels": 80, **config.pop("params", {})}
    (folder / "config.yml").write_text(yaml.dump({"generator_type": "MelGANGenerator", "generator_params": params, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"generator_type": "StyleMelGANGenerator"}, "names a StyleMelGANGenerator"),
        ({"generator_params": [1]}, "no generator_params"),
        ({"params": {"channels": 10**9}}, "channels is 1000000000"),
        ({"params": {"bias": "yes"}}, "bias is 'yes'"),
        ({"params": {"pad": "CircularPad1d"}}, "the padding is CircularPad1d"),
        ({"params": {"pad": ["a"]}}, "the padding is \\['a'\\]"),
        ({"params": {"nonlinear_activation": "ELU"}}, "activation is ELU"),
        ({"params": {"upsample_scales": 8}}, "upsample_scales is 8"),
        ({"params": {"out_channels": 4}, "pqmf_params": {"taps": 10**9}}, "taps is 1000000000"),
        ({"pqmf_params": {"cutoff_ratio": [1]}}, "cutoff_ratio"),
        ({}, "missing melgan.1.bias"),
    ],
)
def test_wrong_configs_of_parallel_wavegan(tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(wavegan(tmp_path, **config))


def test_files_of_two_projects_or_of_none(tmp_path: Path, tiny_checkpoint: Path) -> None:
    folder = wavegan(tmp_path / "two")
    shutil.copy(tiny_checkpoint / "best_netG.pt", folder)
    with pytest.raises(CheckpointError, match=r"more than one.*melgan-neurips.*ParallelWaveGAN.*Give the path"):
        load_checkpoint(folder)
    torch.save({"model": {"resnet.1.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"a checkpoint of a project that melrt supports.*seungwonpark.*Coqui TTS.*TensorFlowTTS"):
        load_checkpoint(tmp_path / "other.pt")
    (tmp_path / "hifi").mkdir()
    torch.save({"model": {"model_g.conv_pre.weight": torch.zeros(1)}}, tmp_path / "hifi" / "best_model.pth")
    (tmp_path / "hifi" / "config.json").write_text(json.dumps({"generator_model": "hifigan_generator"}))
    with pytest.raises(CheckpointError, match=r"hifigan_generator.*supported generators of Coqui TTS are melgan_generator"):
        load_checkpoint(tmp_path / "hifi")


def test_keras_weights_of_another_network(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.dump({"generator_params": {"filters": 32, "upsample_scales": [4, 2]}}))
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["conv1d/kernel:0"] = np.zeros((7, 80, 32), "f4")
    with pytest.raises(CheckpointError, match="has 1 convolutions"):
        load_checkpoint(tmp_path)
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["lstm/recurrent:0"] = np.zeros((7, 80), "f4")
    with pytest.raises(CheckpointError, match="not a weight of a MelGAN generator"):
        load_checkpoint(tmp_path)


def test_raw_pickles_are_not_checkpoints(tmp_path: Path, trap: Hostile) -> None:
    (tmp_path / "checkpoint-1steps.pkl").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match="checkpoint-1steps.pkl"):
        load_checkpoint(tmp_path)


def test_small_files_that_expand_in_memory(tmp_path: Path) -> None:
    """YAML aliases, a recursive list, an expanded tensor and a compressed archive fill neither the memory nor the message."""
    bomb = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
        f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(CheckpointError, match="more than the 100000 settings"):
        parse_yaml(bomb + "generator_type: *i\n", tmp_path)
    with pytest.raises(CheckpointError, match="deeper than the 50 levels"):
        parse_yaml("a: &a [*a]\n", tmp_path)
    with pytest.raises(CheckpointError, match="characters; at most"):
        parse_yaml("# " + "x" * (2 << 20), tmp_path)
    file = tmp_path / "netG.pt"
    torch.save({"model.1.weight": torch.zeros(1).expand(1 << 20, 1 << 20, 7)}, file)
    with pytest.raises(CheckpointError, match=r"netG.pt holds tensors of \d+ bytes"):
        load_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.infolist()[0].file_size = 1 << 40
    with pytest.raises(CheckpointError, match=r"netG.pt unpacks to"):
        load_checkpoint(file)


class _Forged:
    """Array whose pickle gives these bytes as its values, under a dtype with a forged state."""

    def __init__(self, code: str, flags: int) -> None:
        self.code, self.flags = code, flags

    def __reduce__(self):
        state = (1, (1,), _Kind(self.code, self.flags), False, b"\x41" * 8)
        return _reconstruct, (np.ndarray, (0,), b"b"), state


class _Kind:
    def __init__(self, code: str, flags: int) -> None:
        self.code, self.flags = code, flags

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, "|", None, None, None, -1, -1, self.flags)


_reconstruct = np.zeros(1).__reduce__()[0]


@pytest.mark.parametrize(("code", "flags"), [("O8", 0), ("V8", 63), ("S8", 63)])
def test_pickled_statistics_dereference_no_pointers(tmp_path: Path, code: str, flags: int) -> None:
    """With numpy's own dtype the bytes of the file become object pointers: a segmentation fault, or the content of a chosen address."""
    file = tmp_path / "scale_stats.npy"
    np.save(file, np.array({"mel_mean": _Forged(code, flags)}, dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"scale_stats.npy (holds values of type|cannot be read)"):
        read_npy_dict(file)


def test_pickled_statistics_are_numbers(tmp_path: Path) -> None:
    given = {"mel_mean": np.arange(6.0).reshape(2, 3).T, "mel_std": np.arange(3, dtype=">f4"), "n": np.float32(2.5), "none": None}
    np.save(tmp_path / "x.npy", np.array(given, dtype=object), allow_pickle=True)
    found = read_npy_dict(tmp_path / "x.npy")
    assert found["none"] is None
    assert all(np.array_equal(found[name], given[name]) for name in ("mel_mean", "mel_std", "n"))


def test_small_settings_do_not_take_long(tmp_path: Path) -> None:
    """Each of these texts took 15 seconds or more."""
    started = time.process_time()
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25))
    with pytest.raises(CheckpointError, match="merge"):
        parse_yaml(merges, tmp_path)
    with pytest.raises(CheckpointError, match=r"a value of \d+ characters"):
        parse_yaml("a: 1" + ":1" * 30_000, tmp_path)
    (tmp_path / "x.json").write_text('{"a": 1' + '"' + '\\"' * 30_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(tmp_path / "x.json")
    assert time.process_time() - started < 2


def test_small_hdf5_files_do_not_grow(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "links.h5", "w") as file:
        for level in range(11):
            group = file.create_group(f"g{level}")
            for name in range(10):
                if level:
                    group[f"n{name}"] = file[f"g{level - 1}"]
    with h5py.File(tmp_path / "fill.h5", "w") as file:
        file.create_dataset("k", (100_000_000,), "f4", fillvalue=1.0)
    with h5py.File(tmp_path / "pieces.h5", "w") as file:
        file.create_dataset("k", (4_000_000,), "f4", chunks=(10,), fillvalue=1.0)
    started = time.process_time()
    for name, message in (("links", "more than the 10000"), ("fill", "400000000 bytes"), ("pieces", "pieces of 40 bytes")):
        with pytest.raises(CheckpointError, match=message):
            hdf5.read_hdf5(tmp_path / f"{name}.h5")
    assert time.process_time() - started < 5


def test_odd_names_and_weights_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / ".zip").write_bytes(b"PK")
    good = tiny_checkpoint / "best_netG.pt"
    state = torch.load(good, weights_only=True)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    torch.save(state | {"model.1.bias": torch.zeros(64, device="meta")}, tmp_path / "meta.pt")
    torch.save(state | {"x": torch.zeros(1).expand(1 << 24)}, tmp_path / "expanded.pt")
    for name, message in ((".zip", "archive"), ("deflated.pt", "not compressed"), ("meta.pt", "meta.pt"), ("expanded.pt", "tensors of")):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)
    with tarfile.open(tmp_path / "folders.tar", "w") as tar:
        for i in range(1001):
            entry = tarfile.TarInfo(f"d{i}")
            entry.type = tarfile.DIRTYPE
            tar.addfile(entry)
    with pytest.raises(CheckpointError, match="more than 1000 entries"):
        load_checkpoint(tmp_path / "folders.tar")


def test_receptive_field_is_bounded_before_anything_is_built(tmp_path: Path) -> None:
    """Dilations of 3 ** j and 31 ** j: export of such a voice would take up to 10 GB."""
    from tests.torch_voices import random_voice

    from melrt_export.generator.config import GeneratorConfig

    for stacks, size, message in ((8, 3, r"sees \d+ frames around each frame; at most 1000"), (4, 31, "receptive field: left is 346325")):
        config = GeneratorConfig(8, channels=8, upsample_scales=(2, 2), stacks=stacks, stack_kernel_size=size, padding_mode="zeros")
        with pytest.raises(CheckpointError, match=message):
            random_voice(config, tmp_path)
