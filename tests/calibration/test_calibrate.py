"""Calibration from speech to INT8 in the bundle: success, refusal, interruption, and speech that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile

from melrt import Vocoder
from melrt.bundle import Artifact, Bundle
from melrt.errors import CalibrationError, EngineBuildError, MelrtError
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.timing import Timing
from melrt_calibration import timing
from melrt_calibration.calibrate import CalibrationOptions, calibrate
from melrt_calibration.data import Sampling, load_data, read_pieces
from melrt_calibration.equalization import layer_of
from melrt_calibration.evaluation import Budget
from melrt_calibration.progress import Progress
from melrt_calibration.report import figures_json, report_html
from melrt_export.assets import RECORDING
from melrt_export.generator.config import GeneratorConfig
from melrt_export.int8_plan import Int8Plan
from melrt_export.parity import Difference, probe_mel, verify
from melrt_export.tensorrt.build import EngineOptions, build_engine
from melrt_export.tensorrt.plan_text import PlanText

# The quality of random weights is arbitrary: any result is within this budget.
ANY = CalibrationOptions(Budget(10.0, 100.0), Sampling(windows=16))
# INT8 in all layers of a random network leaves about 30 dB; a wrong scale or zero point leaves less than 10.
LEAST_SNR_DB = 15.0


@pytest.fixture(scope="module")
def voice(make_voice, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GeneratorConfig(in_channels=8, channels=16, upsample_scales=(4, 2), stacks=2)
    return make_voice(config, tmp_path_factory.mktemp("voice"), ("fp32", "fp16"))[0]


@pytest.fixture
def bundle(voice: Path, tmp_path: Path) -> Bundle:
    import shutil

    return Bundle.open(shutil.copytree(voice, tmp_path / "x.melrt"))


@pytest.fixture
def speech(bundle: Bundle, tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    folder.mkdir()
    for seed in range(6):
        # Quieter than the probe, since audio in [-1, 1] cannot be so loud with an n_fft of 32.
        np.save(folder / f"{seed}.npy", probe_mel(bundle.manifest.spec, 1000, seed) - np.float32(2))
    return folder


@pytest.fixture
def int8_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """INT8 is never faster on networks this small, so each INT8 layer reduces the measured time by a tenth here."""

    def int8_layers(model: onnx.ModelProto) -> set[str]:
        return {n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1].endswith(".weight.values")}

    def time_graphs(models: Mapping[str, onnx.ModelProto], window: object, rounds: int = 0) -> dict[str, Timing]:
        return {name: Timing(np.array([0.9 ** len(int8_layers(model))])) for name, model in models.items()}

    def kernel_seconds(model: onnx.ModelProto, window: object) -> dict[str, float]:
        int8 = int8_layers(model)
        return {layer_of(n.name): 0.5 if n.name in int8 else 1.0 for n in model.graph.node if n.op_type == "Conv"}

    monkeypatch.setattr(timing, "time_graphs", time_graphs)
    monkeypatch.setattr(timing, "kernel_seconds", kernel_seconds)


def contents(bundle: Bundle) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in bundle.path.iterdir()}


@pytest.mark.usefixtures("int8_pays")
def test_int8_is_added_to_the_bundle(bundle: Bundle, speech: Path, tmp_path: Path) -> None:
    steps: list[Progress] = []
    result = calibrate(bundle, [speech], ANY, on_progress=steps.append)
    bundle = Bundle.open(bundle.path)
    assert result.written
    assert [step.step for step in steps if not step.done] == list(range(1, steps[0].steps + 1))
    assert all(step.done <= step.total for step in steps)
    assert result.verdict.startswith("INT8 pays")
    plan = Int8Plan.loads(bundle.read(bundle.find("plan")[0]))
    assert plan == result.plan
    assert plan.names == result.chosen.names
    for row in result.layers:
        assert row.errors[row.method] == round(row.alone.log_mel_error, 6) == min(row.errors.values()), "the best ranges are kept"
    assert all(row.passed for row in verify(bundle))

    mel = np.load(speech / "3.npy")
    fp32, int8 = (Vocoder.load(bundle, precision=p, device="cpu")(mel) for p in ("fp32", "int8"))
    snr = Difference.between(fp32[None], int8[None]).snr_db
    assert LEAST_SNR_DB < snr < 60, "INT8 differs from FP32, but not by much"

    html = report_html(result, ANY, "a <voice>")
    assert "a &lt;voice&gt;" in html
    assert "http" not in html, "the report opens offline"
    figures = json.loads(figures_json(result, ANY))
    assert figures["chosen"]["names"] == list(plan.names)
    for row in figures["layers"]:
        assert np.mean(row["alone"]["bands"]) == pytest.approx(row["alone"]["log_mel_error"])
        assert 0 <= row["alone"]["quiet"] <= row["alone"]["log_mel_error"]


def test_evaluation_on_calibration_speech_is_refused(bundle: Bundle, speech: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npy"
    for name in ("0", "5"):  # at least one of them is observed, not held out
        np.save(other, np.load(speech / f"{name}.npy"))
        with pytest.raises(CalibrationError, match="both for calibration and for the final evaluation"):
            calibrate(bundle, [speech], ANY, [other])


@pytest.mark.usefixtures("int8_pays")
def test_the_tensorrt_form_builds_an_engine(bundle: Bundle, speech: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    calibrate(bundle, [speech], ANY)
    bundle = Bundle.open(bundle.path)
    model = onnx.load_from_string(bundle.read(bundle.find("onnx", graph="interior", precision="int8-fp16")[0]))
    zeros = [t for t in model.graph.initializer if t.name.endswith(".zero")]
    assert zeros
    assert not any(onnx.numpy_helper.to_array(t).any() for t in zeros), "TensorRT accepts only zero points of 0"
    assert not any(t.data_type == onnx.TensorProto.INT32 for t in model.graph.initializer), "biases stay floating point"
    plan = Int8Plan.loads(bundle.read(bundle.find("plan")[0]))
    for graph in ("edge", "interior"):
        entry = build_engine(bundle, EngineOptions(precision="int8", graph=graph))
        assert entry.target["audited"] == "plan"
        text = PlanText.read(Bundle.open(bundle.path).read(entry))
        assert {name for name, kind in text.weight_types.items() if kind == "int8"} == set(plan.names)
        assert not text.weight_dequantizations


@pytest.mark.usefixtures("int8_pays")
def test_scales_of_shape_1_give_no_int8_and_are_refused(bundle: Bundle, speech: Path) -> None:
    """TensorRT takes such a scale for one per channel. The engine then computes in FP16 and dequantizes its weights in every run."""
    pytest.importorskip("tensorrt_rtx")
    calibrate(bundle, [speech], ANY)
    bundle = Bundle.open(bundle.path)
    (entry,) = bundle.find("onnx", graph="interior", precision="int8-fp16")
    model = onnx.load_from_string(bundle.read(entry))
    for tensor in model.graph.initializer:
        if not tensor.dims:
            tensor.dims.append(1)
    data = model.SerializeToString()
    bundle.add(Artifact.of(entry.name, data, "onnx", graph="interior", precision="int8-fp16"), data)
    with pytest.raises(EngineBuildError, match=r"computes (half|unknown) instead of int8.*melrt calibrate"):
        build_engine(Bundle.open(bundle.path), EngineOptions(precision="int8", graph="interior"))


def test_int8_that_is_not_faster_is_not_written(bundle: Bundle, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_graphs", lambda models, window, rounds=0: dict.fromkeys(models, Timing(np.ones(1))))
    before = contents(bundle)
    result = calibrate(bundle, [speech], ANY)
    assert not result.written
    assert "No set of INT8 layers is faster" in result.verdict
    assert contents(bundle) == before
    assert calibrate(bundle, [speech], replace(ANY, force=True)).written, "--force writes it anyway"


@pytest.mark.usefixtures("int8_pays")
def test_an_interrupted_run_leaves_the_bundle_unchanged(bundle: Bundle, speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle)
    write, written = Path.write_bytes, []

    def third_fails(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", third_fails)
    with pytest.raises(KeyboardInterrupt):
        calibrate(bundle, [speech], ANY)
    assert len(written) == 3
    assert contents(bundle) == before


def test_the_same_seed_gives_the_same_data(bundle: Bundle, speech: Path) -> None:
    one, same, other = (load_data([speech], bundle.manifest, Sampling(windows=16, seed=seed)) for seed in (1, 1, 2))
    assert [p.name for p in one.held_out] == [p.name for p in same.held_out]
    assert all(np.array_equal(a, b) for a, b in zip(one.windows, same.windows, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.windows, other.windows, strict=True))
    assert one.kinds["silent"] > 0, "pauses are observed"
    assert {p.recording for p in one.held_out} != {p.recording for p in other.held_out}, "the seed chooses the held-out recordings"
    assert not any(occurs(window, piece.mel) for window in one.windows for piece in one.held_out), "nothing held out is observed"


def test_recordings_are_scaled_to_the_peak(bundle: Bundle, tmp_path: Path) -> None:
    spec, path = bundle.manifest.spec, tmp_path / "speech.wav"
    audio = read_audio(RECORDING, spec.sample_rate)[: 3 * spec.sample_rate]
    soundfile.write(path, audio, spec.sample_rate, subtype="FLOAT")
    (piece,) = read_pieces([path], bundle.manifest, 0.5)
    wanted = mel_from_audio(audio * np.float32(0.5 / np.abs(audio).max()), spec)
    assert np.allclose(piece.mel, wanted, atol=1e-5)
    assert not np.allclose(piece.mel, mel_from_audio(audio, spec), atol=0.01)


def occurs(window: np.ndarray, mel: np.ndarray) -> bool:
    frames = range(mel.shape[1] - window.shape[1] + 1)
    return any(np.array_equal(mel[:, at : at + window.shape[1]], window) for at in frames)


def test_a_recording_is_held_out_whole(bundle: Bundle, tmp_path: Path) -> None:
    """Three recordings of 40 s give twelve pieces; a fifth of the pieces would be parts of two recordings."""
    spec = bundle.manifest.spec
    for seed in range(3):
        np.save(tmp_path / f"{seed}.npy", probe_mel(spec, 40 * spec.sample_rate // spec.hop, seed)[:, :-1] - np.float32(2))
    data = load_data([tmp_path], bundle.manifest, Sampling(windows=16))
    (recording,) = {piece.recording for piece in data.held_out}
    assert len(data.held_out) == 4
    assert not any(occurs(window, np.load(recording)) for window in data.windows)


def _speech_of(folder: Path, count: int = 1, rate: int = 22050, gain: float = 1.0, reverse: bool = False) -> list[Path]:
    audio = read_audio(RECORDING, 22050) * gain
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.wav")
        soundfile.write(paths[-1], audio[::-1] if reverse or i % 2 else audio, rate)
    return paths


BAD = {
    "missing": (lambda f: [f / "none.wav"], "does not exist"),
    "no data": (lambda f: [], "no calibration data"),
    "empty folder": (lambda f: [(f / "x").mkdir() or f / "x"], "holds no audio or mel"),
    "unknown kind": (lambda f: [(f / "a.mp7").write_text("x") and f / "a.mp7"], r"Mels are read from \.npy"),
    "not audio": (lambda f: [(f / "a.wav").write_bytes(b"RIFF no") and f / "a.wav"], "cannot be read as audio"),
    "too little": (_speech_of, r"at least 10 s in 2 are needed"),
    "the same twice": (lambda f: [_speech_of(f)[0], RECORDING], r"at least 10 s in 2 are needed"),
    "low rate": (lambda f: _speech_of(f, 2, rate=16000), "has 16000 Hz; this voice has 22050 Hz"),
    "all silence": (lambda f: _speech_of(f, 2, gain=0.0), "Every file is silent"),
    "other bands": (lambda f: [np.save(f / "m.npy", np.zeros((40, 900), np.float32)) or f / "m.npy"], "has 40 bands; this voice takes 80"),
    "not finite": (lambda f: [np.save(f / "m.npy", np.full((80, 900), np.nan, np.float32)) or f / "m.npy"], "must be finite"),
    "natural logarithms": (lambda f: [np.save(f / "m.npy", _mel() / np.log10(np.e)) or f / "m.npy"], "looks like ln magnitudes"),
}


def _mel() -> np.ndarray:
    from melrt import MelSpec

    spec = MelSpec()
    return mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)


@pytest.mark.parametrize("kind", BAD)
def test_unusable_speech_is_refused(tiny_bundle: Bundle, tmp_path: Path, kind: str) -> None:
    make, text = BAD[kind]
    before = contents(tiny_bundle)
    with pytest.raises(MelrtError, match=text):
        calibrate(tiny_bundle, make(tmp_path), CalibrationOptions())
    assert contents(tiny_bundle) == before


@pytest.mark.parametrize(("arguments", "text"), [
    (("--budget", "-1"), "0.02 is 2 %"), (("--windows", "2"), "whole number from 8 to 10000"), (("--peak", "3"), "full scale"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(melrt, tiny_bundle: Bundle, arguments: tuple[str, ...], text: str) -> None:
    code, _, err = melrt("calibrate", tiny_bundle.path, RECORDING, *arguments)
    assert code == 2
    assert text in err


@pytest.mark.usefixtures("int8_pays")
def test_int8_of_an_older_melrt_is_refused_with_the_command_that_makes_it_again(bundle: Bundle, speech: Path, melrt) -> None:
    calibrate(bundle, [speech], ANY)
    (plan,) = Bundle.open(bundle.path).find("plan")
    data = bundle.read(plan).replace(b'"schema": 2', b'"schema": 1')
    bundle.add(Artifact.of(plan.name, data, "plan", precision="int8"), data)
    for command in ("verify", "build --precision int8 --portable"):
        name, *options = command.split()
        code, _, err = melrt(name, bundle.path, *options)
        assert code == 2, err
        assert "made by another version of melrt" in err
        assert f"melrt calibrate {bundle.path} SPEECH" in err


def test_a_file_that_is_not_a_plan_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not an INT8 plan"):
        Int8Plan.loads('{"schema": 2, "layers": 3}')
