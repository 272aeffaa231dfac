"""`melrt bulk` gives the audio of `Vocoder`, also after a kill, and names the mels that fail."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from melrt import Bundle, Output, Vocoder, Voices
from melrt.errors import ConfigError
from melrt.files.audio import to_int16
from melrt.residency import memory_of
from melrt.serving.bulk.inputs import RowVoices, find_blocks
from melrt.serving.bulk.voices import LoadedVoices
from melrt.types import Audio
from melrt_export.parity import probe_mel

SUFFIXES = (".wav", ".flac", ".opus", ".parquet")
BAD = {"bands": "40 bands", "nan": "finite", "empty": "empty", "text": "cannot be read"}


def fill(folder: Path, bundle: Bundle, count: int) -> Path:
    (folder / "sub").mkdir(parents=True)
    for index in range(count):
        mel = probe_mel(bundle.manifest.spec, 30 + 17 * (index % 7))
        np.save(folder / ("sub" if index % 2 else "") / f"u{index:03}.npy", mel)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}")}


def finished(folder: Path) -> int:
    """Count the complete files."""
    return sum(path.suffix in SUFFIXES and not path.name.startswith(".") for path in folder.rglob("*"))


def command(voice: Path, mels: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "melrt", "bulk", str(voice), "--input", str(mels), "--output", str(output), "--device", "cpu", *more,
    ]  # fmt: skip


def test_folder_run_names_failures_and_keeps_finished_files(melrt, demo_bundle: Bundle, tmp_path: Path) -> None:
    mels, output = fill(tmp_path / "mels", demo_bundle, 5), tmp_path / "speech"
    np.save(mels / "bands.npy", np.zeros((40, 30), np.float32))
    np.save(mels / "nan.npy", np.full((80, 30), np.nan, np.float32))
    np.save(mels / "empty.npy", np.zeros((80, 0), np.float32))
    (mels / "text.npz").write_text("not numbers")
    code, out, err = melrt("bulk", demo_bundle.path, "--input", mels, "--output", output)
    assert code == 2
    assert "5 synthesized, 0 already there, 4 failed" in out
    assert "4 of 9 mels" in err
    listed = {one["name"]: one["error"] for one in json.loads((output / "failed.json").read_text())}
    assert listed.keys() == BAD.keys()
    assert all(BAD[name] in error for name, error in listed.items()), listed
    vocoder = Vocoder.load(demo_bundle, device="cpu")
    for index in range(5):
        name = f"{'sub/' if index % 2 else ''}u{index:03}"
        samples, _ = soundfile.read(output / f"{name}.wav", dtype="int16")
        assert np.abs(samples).max() > 500, "not silent"
        assert np.array_equal(samples, to_int16(vocoder(np.load(mels / f"{name}.npy")))), name
    vocoder.close()

    for name in ("bands.npy", "nan.npy", "empty.npy", "text.npz"):
        (mels / name).unlink()
    (output / "u002.wav").unlink()
    kept = (output / "u000.wav").stat().st_ino
    code, out, _ = melrt("bulk", demo_bundle.path, "--input", mels, "--output", output)
    assert code == 0
    assert "1 synthesized, 4 already there, 0 failed" in out
    assert (output / "u000.wav").stat().st_ino == kept
    assert not (output / "failed.json").exists()
    code, _, err = melrt("bulk", demo_bundle.path, "--input", mels, "--output", output, "--format", "float32")
    assert code == 2
    assert "was begun with format 'int16', now 'float32'" in err


def test_wrong_input_is_a_config_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((80, 30), np.float32))
    write_rows(tmp_path / "b.parquet", ["a"], [np.zeros((80, 30), np.float32)])
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "empty" / "b.parquet", [], [])
    for source, message in (("no", "does not exist"), ("a.npy", "holds no mel"), ("", "both mels and parquet"), ("empty", "has no row")):
        with pytest.raises(ConfigError, match=message):
            find_blocks(tmp_path / source, None, RowVoices(["lj"]))


def test_wrong_input_folders_are_refused(melrt, demo_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mels").mkdir()
    for mels, reason in ((tmp_path / "no", "does not exist"), (tmp_path / "mels", "holds no mel")):
        code, _, err = melrt("bulk", demo_bundle.path, "--input", mels, "--output", tmp_path / "out")
        assert code == 2
        assert reason in err
        assert not (tmp_path / "out").exists()
    np.save(tmp_path / "mels" / "a.npy", np.zeros((80, 30), np.float32))
    np.savez(tmp_path / "mels" / "a.npz", mel=np.zeros((80, 30), np.float32))
    code, _, err = melrt("bulk", demo_bundle.path, "--input", tmp_path / "mels", "--output", tmp_path / "out")
    assert code == 2
    assert "2 utterances named 'a'" in err


@pytest.fixture
def voices(demo_bundle: Bundle, tiny_bundle_path: Path, tmp_path: Path) -> Path:
    """A folder of two voices."""
    for name, path in (("ann", demo_bundle.path), ("ben", tiny_bundle_path)):
        shutil.copytree(path, tmp_path / "voices" / f"{name}.melrt")
    return tmp_path / "voices"


def write_list(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(("mel,voice,name", *rows)))
    return path


@pytest.mark.parametrize(("encoding", "rate", "limited"), [("opus", 24000, False), ("mulaw", 8000, True)])
def test_list_chooses_voices_and_files_hold_their_output(
    melrt, voices: Path, tmp_path: Path, monkeypatch, encoding, rate: int, limited: bool
) -> None:
    """Both voices synthesize one mel that is loud enough to clip; a row that names another voice is synthesized in the second run."""
    (tmp_path / "mels").mkdir()
    mels = {name: probe_mel(Bundle.open(voices / "ann.melrt").manifest.spec, frames) + 1.2 for name, frames in (("a", 40), ("b", 70))}
    for name, mel in {**mels, "bands": mels["a"][:40]}.items():
        np.save(tmp_path / "mels" / f"{name}.npy", mel)
    rows = ["mels/a.npy,ben,first", "mels/b.npy,ann,sub/second", "mels/a.npy,ann,first"]
    arguments = ["bulk", voices, "--input", tmp_path / "list.csv", "-o", tmp_path / "out", "--format", encoding]
    if limited:  # to the larger voice, so that it is unloaded for the other
        sizes = [memory_of(Bundle.open(path), "fp32", "onnxruntime") for path in voices.iterdir()]
        monkeypatch.setattr(LoadedVoices, "__getitem__", waits_for_others(monkeypatch))
        arguments += ["--backend", "onnxruntime", "--precision", "fp32", "--memory", 1 + (max(sizes) >> 20)]
    write_list(tmp_path / "list.csv", *rows, "mels/bands.npy,ben,x", f"{300 * 'm'}.npy,ann,y", "m\0.npy,ann,z")
    code, out, err = melrt(*arguments, "--rate", rate)
    assert code == 2
    assert "3 synthesized, 0 already there, 3 failed" in out
    assert "samples were clipped" in out
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    for one, reason in zip(failed, ("name too long", "does not exist", "mel has 40 bands; this voice takes 80"), strict=True):
        assert reason in one["error"]
    write_list(tmp_path / "list.csv", *rows[:2], "mels/a.npy,ben,sub/second")
    code, out, err = melrt(*arguments, "--rate", rate)
    assert code == 0, err
    assert "1 synthesized, 2 already there" in out
    expected = {"ben/first": "a", "ann/sub/second": "b", "ann/first": "a", "ben/sub/second": "a"}
    assert_files_hold_output(tmp_path / "out", voices, {name: mels[mel] for name, mel in expected.items()}, Output(rate, encoding))
    code, _, err = melrt(*arguments, "--rate", 48000)
    assert code == 2
    assert f"rate {rate}, now 48000" in err


def waits_for_others(monkeypatch: pytest.MonkeyPatch) -> Callable[[LoadedVoices, str], Vocoder]:
    """Return a check that a voice is looked up only when no utterance of another waits, whose memory it may need."""
    submitted: list[tuple[str, Future[Audio]]] = []
    load, submit = LoadedVoices.__getitem__, Vocoder.submit

    def record(vocoder: Vocoder, mel: np.ndarray, output: Output) -> Future[Audio]:
        submitted.append((vocoder.bundle.path.stem, submit(vocoder, mel, output)))
        return submitted[-1][1]

    def checked(voices: LoadedVoices, name: str) -> Vocoder:
        assert all(audio.done() for other, audio in submitted if other != name)
        return load(voices, name)

    monkeypatch.setattr(Vocoder, "submit", record)
    return checked


def assert_files_hold_output(folder: Path, voices: Path, mels: dict[str, np.ndarray], output: Output) -> None:
    kind = output.file_kind
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in SUFFIXES}
    assert found == {name + kind.suffix for name in mels}
    with Voices(voices, device="cpu") as loaded:
        for name, mel in mels.items():
            file = folder / f"{name}{kind.suffix}"
            audio, rate = soundfile.read(file)
            assert (rate, soundfile.info(file).subtype) == (output.sample_rate, kind.subtype)
            assert np.abs(audio).max() > 0.1, "not silent"
            assert np.array_equal(audio, decoded(loaded[name.split("/")[0]](mel, output), output)), name


def decoded(audio: np.ndarray, output: Output) -> np.ndarray:
    """Decode what a vocoder returned: the bytes of a file, or G.711."""
    raw = {"samplerate": output.sample_rate, "channels": 1, "format": "RAW", "subtype": output.file_kind.subtype}
    return np.asarray(soundfile.read(io.BytesIO(audio.tobytes()), **({} if output.makes_file else raw))[0])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["a.npy,ann", "a.npy,eve,b"], "line 3, has the voice 'eve'; it must be one of ann, ben"),
        (["a.npy"], "line 2, has the voice None; it must be one of ann, ben"),
        (["a.wav,ann,a"], "line 2, has the mel 'a.wav'; it must be a path that ends in .npy or .npz"),
        (["a.npy,ann,../a"], "line 2, has the name '../a'"),
        (["a.npy,ann,a", "b.npy,ann,a"], "2 utterances named 'ann/a'"),
        ([], "no row"),
        (['a.npy,"ann'], "cannot be read as a list"),
    ],
)
def test_wrong_rows_of_a_list_are_refused_before_any_work(melrt, voices: Path, tmp_path: Path, rows: list[str], reason: str) -> None:
    code, _, err = melrt("bulk", voices, "--input", write_list(tmp_path / "list.csv", *rows), "-o", tmp_path / "out")
    assert code == 2
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_voices_without_a_column_that_chooses_are_refused(melrt, voices: Path, demo_bundle: Bundle, tmp_path: Path) -> None:
    fill(tmp_path / "mels", demo_bundle, 1)
    (tmp_path / "list.csv").write_text("mel\na.npy\n")
    for source, reason in (("mels", "give a list with a column `voice`"), ("list.csv", "no column `voice` to choose among ann, ben")):
        code, _, err = melrt("bulk", voices, "--input", tmp_path / source, "-o", tmp_path / "out")
        assert code == 2
        assert reason in err


def test_parquet_holds_the_bytes_of_an_encoding_and_a_changed_voice_is_refused(melrt, voices: Path, tmp_path: Path) -> None:
    mel = probe_mel(Bundle.open(voices / "ann.melrt").manifest.spec, 50)
    column = pa.array([list(mel)] * 2, LISTS)
    pq.write_table(pa.table({"mel": column, "name": ["a", "a"], "voice": ["ann", "ben"]}), tmp_path / "rows.parquet")
    arguments = ("bulk", voices, "--input", tmp_path / "rows.parquet", "--to", "parquet", "--format", "flac", "-o", tmp_path / "speech")
    code, _, err = melrt(*arguments)
    assert code == 0, err
    (file,) = (tmp_path / "speech").glob("*.parquet")
    with Voices(voices, device="cpu") as loaded:
        for row in pq.read_table(file).to_pylist():
            assert row["name"] == f"{row['voice']}/a"
            assert row["audio"] == loaded[row["voice"]](mel, Output(None, "flac")).tobytes()
    shutil.rmtree(voices / "ben.melrt")
    shutil.copytree(voices / "ann.melrt", voices / "ben.melrt")
    code, _, err = melrt(*arguments)
    assert code == 2
    assert "another bundle of the voice ben" in err


LISTS = pa.list_(pa.list_(pa.float32()))


def write_rows(path: Path, names: list[str] | None, mels: list[np.ndarray | None], rows_in_group: int = 4) -> None:
    column = pa.array([None if mel is None else list(mel) for mel in mels], LISTS)
    columns = {"mel": column} if names is None else {"other": [0] * len(names), "name": names, "mel": column}
    pq.write_table(pa.table(columns), path, row_group_size=rows_in_group)


def test_parquet_in_and_out(melrt, demo_bundle: Bundle, tmp_path: Path) -> None:
    """Ten rows of lists and two tensors; two of the rows are wrong in the first run and fixed for the second."""
    speech = tmp_path / "speech"
    (tmp_path / "rows").mkdir()
    mels = {f"sub/p{index}": probe_mel(demo_bundle.manifest.spec, 30 + index) for index in range(10)}
    damaged = [None if name.endswith("3") else mel[:40] if name.endswith("7") else mel for name, mel in mels.items()]
    write_rows(tmp_path / "rows" / "lists.parquet", list(mels), damaged)
    unnamed = probe_mel(demo_bundle.manifest.spec, 55)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([unnamed]))
    pq.write_table(pa.table({"mel": tensors}), tmp_path / "rows" / "tensors.parquet")
    mels["tensors-00000000"] = unnamed
    differing = pa.array([{"data": unnamed[:, :44].ravel(), "shape": [80, 44]}])  # as Ray stores tensors of differing shapes
    pq.write_table(pa.table({"mel": differing}), tmp_path / "rows" / "ray.parquet")
    mels["ray-00000000"] = unnamed[:, :44]
    arguments = ("bulk", demo_bundle.path, "--input", tmp_path / "rows", "--format", "float32", "--to")
    code, out, _ = melrt(*arguments, "parquet", "--output", speech)
    assert code == 2
    assert "10 synthesized, 0 already there, 2 failed" in out
    listed = {one["name"]: one["error"] for one in json.loads((speech / "failed.json").read_text())}
    assert listed.keys() == {"sub/p3", "sub/p7"}
    assert "has no mel" in listed["sub/p3"]
    before = contents(speech)
    assert len(before) == 5, "a file for each row group"
    write_rows(tmp_path / "rows" / "lists.parquet", list(mels)[:10], list(mels.values())[:10])
    code, out, err = melrt(*arguments, "parquet", "--output", speech)
    assert code == 0, err
    assert "2 synthesized, 10 already there, 0 failed" in out
    assert before.items() <= contents(speech).items()
    code, _, err = melrt(*arguments, "files", "--output", tmp_path / "wavs")
    assert code == 0, err
    assert_synthesized(demo_bundle, mels, speech, tmp_path / "wavs")


def assert_synthesized(bundle: Bundle, mels: dict[str, np.ndarray], parquet: Path, wavs: Path) -> None:
    rows = [row for path in parquet.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["name"] for row in rows) == sorted(mels)
    with Vocoder.load(bundle, device="cpu") as vocoder:
        for row in rows:
            expected = vocoder(mels[row["name"]])
            assert np.abs(expected).max() > 0.01, "not silent"
            assert row["sample_rate"] == bundle.manifest.spec.sample_rate
            assert np.array_equal(np.float32(row["audio"]), expected), row["name"]
            assert np.array_equal(soundfile.read(wavs / f"{row['name']}.wav", dtype="float32")[0], expected)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["../a"], "the name '../a'"),
        (["/a"], "the name '/a'"),
        ([None], "the name None"),
        (["a", "./a"], "2 utterances named 'a'"),
        (["b/" + 121 * "ü"], "242 bytes; at most 240"),
        ([], "no row"),
    ],
)
def test_row_names_that_leave_the_output_folder_are_refused(
    melrt, demo_bundle: Bundle, tmp_path: Path, names: list[str], reason: str
) -> None:
    write_rows(tmp_path / "rows.parquet", names, [np.zeros((80, 30), np.float32)] * len(names))
    code, _, err = melrt("bulk", demo_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out")
    assert code == 2
    assert reason in err
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.parquet"]


def test_files_that_are_not_parquet_are_refused(melrt, demo_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not numbers")
    pq.write_table(pa.table({"speech": [1]}), tmp_path / "other.parquet")
    for name, reason in (("text", "cannot be read as parquet"), ("other", "columns speech")):
        code, _, err = melrt("bulk", demo_bundle.path, "--input", tmp_path / f"{name}.parquet", "--output", tmp_path / "out")
        assert code == 2
        assert reason in err


@pytest.mark.parametrize(("package", "option", "extra"), [("pyarrow", ("--to", "parquet"), "parquet"), ("ray", ("--ray", "local"), "ray")])
def test_missing_package_names_its_extra(melrt, demo_bundle: Bundle, tmp_path: Path, monkeypatch, package, option, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    mels, output = fill(tmp_path / "mels", demo_bundle, 1), tmp_path / "speech"
    code, _, err = melrt("bulk", demo_bundle.path, "--input", mels, "--output", output, *option)
    assert code == 2
    assert f'pip install "melrt[{extra}]"' in err
    assert not output.exists()


def test_killed_run_continues_where_it_stopped(demo_bundle: Bundle, tmp_path: Path) -> None:
    mels = fill(tmp_path / "mels", demo_bundle, 30)
    subprocess.run(command(demo_bundle.path, mels, tmp_path / "whole"), check=True, capture_output=True)
    output = tmp_path / "killed"
    running = subprocess.Popen(command(demo_bundle.path, mels, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_files(output, 5)
    running.send_signal(signal.SIGSTOP)  # it keeps its lock and writes nothing more
    second = subprocess.run(command(demo_bundle.path, mels, output), capture_output=True, text=True)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert second.returncode == 2
    assert "another melrt bulk is writing" in second.stderr
    there = finished(output)
    assert 5 <= there < 30
    (output / "sub" / ".u001-0123abcd.wav").write_bytes(b"half")
    again = subprocess.run(command(demo_bundle.path, mels, output), capture_output=True, text=True, check=True)
    assert f"{30 - there} synthesized, {there} already there" in again.stdout
    assert contents(output) == contents(tmp_path / "whole"), "bit for bit, none missing, none too many"


def wait_for_files(output: Path, count: int) -> None:
    until = time.monotonic() + 180
    while finished(output) < count:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("kind", ["files", "parquet"])
def test_ray_run_survives_killed_actor_and_driver(demo_bundle: Bundle, voices: Path, tmp_path: Path, kind: str) -> None:
    """One voice from parquet to parquet, and two voices from a list to FLAC files at another rate."""
    pytest.importorskip("ray", reason="the extra melrt[ray] is not installed here")
    count = int(os.environ.get("MELRT_BULK_ITEMS", "60"))
    files = sorted(fill(tmp_path / "mels", demo_bundle, count).rglob("*.npy"))
    if kind == "parquet":
        voice, mels, options = demo_bundle.path, tmp_path / "mels.parquet", ["--to", kind]
        write_rows(mels, [file.stem for file in files], [np.load(file) for file in files], 4)
    else:
        voice, options = voices, ["--format", "flac", "--rate", "16000", "--backend", "onnxruntime"]
        rows = [f"{file},{'ann' if index % 3 else 'ben'},{file.stem}" for index, file in enumerate(files)]
        mels = write_list(tmp_path / "list.csv", *rows)
    subprocess.run(command(voice, mels, tmp_path / "whole", *options), check=True, capture_output=True)
    whole = contents(tmp_path / "whole")
    ray, output = (*options, "--ray", "local", "--actors", "2"), tmp_path / "killed"
    running = subprocess.Popen(command(voice, mels, output, *ray), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_files(output, len(whole) // 6)
    os.kill(actor_processes(running.pid)[0], signal.SIGKILL)
    wait_for_files(output, len(whole) // 3)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert finished(output) < len(whole)
    again = subprocess.run(command(voice, mels, output, *ray), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert contents(output) == whole, "equal to an uninterrupted run without Ray: bit for bit, none missing, none too many"


def actor_processes(driver: int) -> list[int]:
    """Return the process ids of the actors that descend from a driver."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(status.parent.name), status.read_text().rpartition(")")[2].split()
            parents[pid], names[pid] = int(rest[1]), (status.parent / "cmdline").read_text()
        except OSError:
            continue

    def descends(pid: int) -> bool:
        while pid in parents and pid != driver:
            pid = parents[pid]
        return pid == driver

    return [pid for pid, name in names.items() if name.startswith("ray::") and "SynthesisActor" in name and descends(pid)]
