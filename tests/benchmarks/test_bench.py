"""The inference benchmark: timing, contenders, report, comparison and memory."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from melrt import Bundle, Vocoder
from melrt.files.audio import read_audio
from melrt.mel.features import mel_from_audio
from melrt.planning.windows import ReceptiveField
from melrt.timing import Timing, interleave, median_interval, noise_note, warm_up
from melrt_benchmarks.inference import contenders, memory, torch_gpu
from melrt_benchmarks.inference.bench import BenchPlan, run_bench
from melrt_benchmarks.inference.host import policies
from melrt_benchmarks.inference.memory import peak_memory
from melrt_benchmarks.inference.roofline import WINDOW
from melrt_benchmarks.measure.gpu_meter import loop_times
from melrt_benchmarks.report.html import write_html
from melrt_benchmarks.report.results import Latency, Report
from melrt_export.assets import RECORDING
from melrt_export.checkpoints import load_checkpoint
from melrt_export.generator.config import GeneratorConfig
from melrt_export.parity import FP32_MAX_ABS, Difference, probe_mel


def test_contenders_run_once_per_round_in_shuffled_order() -> None:
    order: list[str] = []
    result = interleave({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=4)
    counted = order[-12:]  # the runs before these are warm-up
    rounds = ["".join(counted[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(timing.seconds) == 4 for timing in result.values())


def test_timings_are_order_statistics() -> None:
    timing = Timing(np.arange(1.0, 11.0))
    assert (timing.median, timing.percentile(90), timing.percentile(100)) == (5.5, 10.0, 10.0)
    assert timing.ratio_to(Timing(2 * timing.seconds)) == (0.5, 0.5, 0.5)
    assert noise_note({"quiet": Timing(np.array([1.0, 1.01, 1.02, 1.01]))}) == ""
    assert "spans 82 % of its median. Only the ratios are reliable" in noise_note({"busy": timing})
    assert "Not even the ratios are reliable; repeat the benchmark" in noise_note({"busier": Timing(np.array([1.0, 1.0, 9.0, 9.0]))})
    slow = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3)["slow"]
    assert slow.median >= 0.02


def test_median_interval_has_the_stated_coverage() -> None:
    """The exponential distribution is skewed and has the median ln 2; a fitted normal distribution would be far off."""
    draws = np.random.default_rng(0).exponential(size=(2000, 15))
    coverage = np.mean([low <= np.log(2) <= high for _, low, high in map(median_interval, draws)])
    assert 0.93 <= coverage <= 0.99


def test_warm_up_ends_when_runs_become_no_faster() -> None:
    times = iter([0.05, 0.02, 0.005, 0.005, *[0.005] * 20])
    calls: list[float] = []

    def run() -> None:
        calls.append(next(times))
        time.sleep(calls[-1])

    warm_up(run)
    assert 4 <= len(calls) < 13


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_path: Path, tiny_checkpoint: Path) -> Report:
    """Report of a run with every contender except torch.compile, which takes minutes."""
    pytest.importorskip("onnxscript", reason="the plain export needs onnxscript")
    plan = BenchPlan(
        tiny_bundle_path, tiny_checkpoint, precisions=("fp32", "fp16"), seconds=(0.5,), batches=(1, 2), concurrency=(2,), rounds=3,
        threads=2, speech=(RECORDING,), command="melrt bench",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "_compiled", lambda _: (_ for _ in ()).throw(contenders.UnavailableError("left out: it takes minutes")))
        return run_bench(plan)


def test_report_has_every_figure(report: Report, tmp_path: Path) -> None:
    names = ["PyTorch eager, weight norm", "PyTorch eager", "ONNX Runtime, plain export", "melrt's graph, whole"]
    names += ["melrt, onnxruntime fp32", "melrt, onnxruntime fp16"]
    found = [row.contender for row in report.latencies if row.batch == 1 and not row.contender.startswith("OpenVINO")]
    assert found == names
    assert {row.batch for row in report.latencies} == {1, 2}
    assert {one.contender for one in report.skipped} >= {"torch.compile"}
    for row in report.latencies:
        assert row.correct
        assert row.real_time_factor == pytest.approx(1 / row.times_real_time, rel=0.05)
        assert row.p50_ms <= row.p90_ms <= row.p95_ms <= row.p99_ms <= row.worst_ms == max(row.milliseconds)
        assert row.speedup[1] <= row.speedup[0] <= row.speedup[2]
        assert row.first_ms > 0
        assert len(row.milliseconds) == report.rounds
    assert report.latencies[0].speedup == (1.0, 1.0, 1.0)
    assert [row.requests for row in report.throughputs] == [16] * len(report.throughputs)
    assert {row.contender for row in report.start_ups} == {"melrt, onnxruntime fp32", "melrt, onnxruntime fp16"}
    assert all(row.import_ms > 0 < row.load_ms and row.peak_mib > 20 for row in report.start_ups)
    report.save(tmp_path / "x.json")
    loaded = Report.load(tmp_path / "x.json")
    assert (loaded.latencies, loaded.qualities) == (report.latencies, report.qualities)


def test_quality_is_the_error_against_the_recording(report: Report, tiny_bundle_path: Path) -> None:
    spec = Bundle.open(tiny_bundle_path).manifest.spec
    with Vocoder.load(tiny_bundle_path, precision="fp32", device="cpu") as vocoder:
        mel = mel_from_audio(read_audio(RECORDING, spec.sample_rate), spec)
        expected = np.abs(mel - mel_from_audio(vocoder(mel), spec)).mean()
    found = {row.contender: row for row in report.qualities}
    assert found.keys() == {row.contender for row in report.latencies}
    for name, row in found.items():
        assert row.above_reference == pytest.approx(row.log_mel_error / expected - 1, abs=1e-3), name
        if "fp16" not in name and "default" not in name:
            assert row.log_mel_error == pytest.approx(expected, rel=1e-4), name
    assert 1e-3 < abs(found["melrt, onnxruntime fp16"].above_reference) < 0.3, "rounding shows in pauses of random weights"


def test_profile_has_every_convolution_and_its_limit(report: Report, tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    model = onnx.load_from_string(bundle.read(bundle.find("onnx", graph="interior", precision="fp32")[0]))
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    profiled = {layer.name: layer for layer in report.layers if layer.mflop}
    assert set(profiled) == convolutions
    assert sum(layer.share for layer in report.layers) == pytest.approx(1, abs=0.01)
    config = GeneratorConfig.from_dict(bundle.manifest.architecture)
    # The interior graph also computes samples beyond the kept ones, where padding is needed. The generator's count does not include them.
    assert sum(layer.mflop for layer in profiled.values()) * 1e6 == pytest.approx(config.flop_per_frame * WINDOW, rel=0.05)
    assert all(layer.limit_microseconds > 0 for layer in profiled.values())
    assert report.ceilings["gflops"] > 1 < report.ceilings["gbytes"]


def test_page_opens_offline_and_marks_wrong_outputs(report: Report, tmp_path: Path) -> None:
    wrong = replace(report.latencies[1], correct=False, contender="<b>planted</b>")
    streams = (
        {
            "streams": 2,
            "shared_queue": True,
            "underruns": 0,
            "pushes": 10,
            "latency_ms": [1, 2],
            "first_audio_ms": [1, 2],
            "sustained": True,
        },
    )
    peaks = ({"seconds": 30.0, "kind": "windows", "peak_mib": 251.0},)
    write_html(
        replace(report, latencies=(wrong, *report.latencies), noise="The machine was busy.", streams=streams, memory=peaks),
        tmp_path / "x.html",
    )
    page = (tmp_path / "x.html").read_text()
    assert page.count('class="wrong">WRONG<') == 1
    assert "&lt;b&gt;planted" in page
    assert "The machine was busy." in page
    assert page.count('src="data:image/png;base64,') == 6
    assert report.log_mel_of("melrt, onnxruntime fp16") in page
    assert "torch.compile</td><td>left out: it takes minutes" in page
    assert "Scroll the table sideways" in page
    assert not re.search(r"""(?:src|href)=["']?(?:http|//)""", page)


def test_command_line_without_a_checkpoint(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    """Only melrt is timed. A comparison of a report with itself finds no change."""
    arguments = "bench", tiny_bundle_path, "--seconds", "0.5", "--rounds", "3", "--measure", "time"
    for name in ("a", "b"):
        code, out, err = melrt(*arguments, "--json", tmp_path / f"{name}.json", "--html", tmp_path / f"{name}.html")
        assert (code, "give it with --checkpoint" in out, "melrt, onnxruntime fp32" in out) == (0, True, True)
        assert f"Wrote {tmp_path / name}.html." in out
        assert "step 1 of 2: loading the contenders" in err
    code, out, _ = melrt("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert (code, out.count("same"), out.count("baseline")) == (0, 1, 1)


def test_plain_export_without_onnxscript(melrt, tiny_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's older exporter makes a graph of the same network."""
    monkeypatch.setattr("melrt_benchmarks.inference.plain_export.find_spec", lambda _: None)
    arguments = "bench", tiny_bundle_path, "--checkpoint", tiny_checkpoint, "--only", "runtime, plain,melrt,", "--seconds", "0.5"
    code, out, _ = melrt(*arguments, "--rounds", "3", "--measure", "time")
    assert (code, "ONNX Runtime, plain export" in out, "plain export: failed" in out) == (0, True, False)


def test_unusable_arguments_are_refused(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 2}')
    (tmp_path / "x.json").write_text("[]")
    cases = [
        (("bench",), "give a VOICE.melrt"),
        (("bench", tiny_bundle_path, "--measure", "time,speed"), "each one of time, profile, start-up, memory, streams"),
        (("bench", tiny_bundle_path, "--measure", ","), "a list of 1 to"),
        (("bench", tiny_bundle_path, "--measure", "memory", "--only", "melrt", "--rounds", "3"), "--only, --rounds: only the measurement"),
        (("bench", tiny_bundle_path, "--html", "x.html", "--compare", "old", "new"), "measures nothing; leave out --html, VOICE.melrt"),
        (("bench", tiny_bundle_path, "--seconds", "one"), "--seconds is 'one'"),
        (("bench", tiny_bundle_path, "--seconds", "0"), "above 0 and at most 7200"),
        (("bench", tiny_bundle_path, "--batch", "0"), "a whole number from 1 to 1024"),
        (("bench", tiny_bundle_path, "--rounds", "2"), "rounds is 2; it must be a whole number from 3"),
        (("bench", tiny_bundle_path, "--only", "nobody,none"), "None has a name that contains nobody or none"),
        (("bench", tiny_bundle_path, "--precisions", "int3"), "one of fp32, tf32, fp16, bf16, int8"),
        (("bench", "--compare", tmp_path / "none.json", tmp_path / "x.json"), "is missing or larger than 64 MiB"),
        (("bench", "--compare", tmp_path / "old.json", tmp_path / "x.json"), "has schema 2; this melrt reads schema 1"),
        (("bench", "--compare", tmp_path / "x.json", tmp_path / "x.json"), "does not hold a report"),
    ]
    for arguments, message in cases:
        code, _, err = melrt(*arguments)
        assert (code, message in err) == (2, True), (arguments, err)


def test_wrong_outputs_are_marked_and_failures_do_not_end_the_run(melrt, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that is wrong and one that fails, at once or later, do not keep the others from being measured."""
    calls = iter([True, False, False])

    def fails_later(mel: np.ndarray) -> np.ndarray:
        if next(calls):
            return np.zeros((len(mel), mel.shape[2] * 256), np.float32)
        raise RuntimeError("CUDA error: out of memory\nand more")

    def planted(*_: object):
        yield contenders.Contender("silent", "fp32", lambda mel: np.zeros((len(mel), mel.shape[2] * 256), np.float32))
        yield contenders.Contender("fails", "fp32", lambda mel: mel.no_such_thing)
        yield contenders.Contender("fails later", "fp32", fails_later)
        yield contenders.Contender("wrong shape", "fp32", lambda mel: np.zeros((len(mel), 7), np.float32))

    monkeypatch.setattr("melrt_benchmarks.inference.rounds.load_contenders", planted)
    arguments = "bench", tiny_bundle_path, "--seconds", "0.5", "--rounds", "3", "--measure", "time"
    code, out, _ = melrt(*arguments)
    assert (code, out.count("WRONG")) == (1, 2)
    assert "fails: failed on mels of shape (1, 80, 43): AttributeError: " in out
    assert "fails later: failed on mels of shape (1, 80, 43): RuntimeError: CUDA error: out of memory\n" in out
    ours = [contenders.Contender("melrt, planted", "fp32", lambda mel: mel.no_such_thing)]
    monkeypatch.setattr("melrt_benchmarks.inference.rounds.load_contenders", lambda *_: iter(ours))
    code, _, err = melrt(*arguments)
    assert (code, "every contender failed. melrt, planted: failed on mels" in err) == (2, True)


def test_interrupted_run_keeps_what_it_measured(melrt, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ctrl-C in the second length leaves a report of the first."""
    made = contenders._melrt(contenders.BenchVoice(Bundle.open(tiny_bundle_path), None, 1), "onnxruntime", "fp32", "melrt, planted")

    def run(mel: np.ndarray) -> np.ndarray:
        if mel.shape[2] > 50:
            raise KeyboardInterrupt
        return made.run(mel)

    monkeypatch.setattr("melrt_benchmarks.inference.rounds.load_contenders", lambda *_: iter([replace(made, run=run)]))
    arguments = "bench", tiny_bundle_path, "--seconds", "0.5,1", "--rounds", "3", "--json", tmp_path / "x.json"
    code, _, err = melrt(*arguments)
    assert (code, "interrupted" in err) == (0, True)
    assert [round(row.seconds, 1) for row in Report.load(tmp_path / "x.json").latencies] == [0.5]


@pytest.mark.parametrize(
    ("machine", "factor", "verdict", "code"),
    [
        (1.1, 1.1, "slower", 1),
        (0.9, 0.9, "faster", 0),
        (1.0, 1.0, "same", 0),
        (1.0, 1.1, "slower", 1),
        (0.8, 1.0, "uncertain", 0),
        (2.0, 1.1, "uncertain", 0),
    ],
)
def test_comparison_finds_ten_percent_in_noise(melrt, tmp_path: Path, machine: float, factor: float, verdict: str, code: int) -> None:
    """The machine of the second run may be slower or faster, and every run has 3 % of noise. On one twice as slow, nothing is certain."""
    noise = np.random.default_rng(1)

    def row(name: str, median: float) -> Latency:
        times = median * noise.lognormal(0, 0.03, 15)
        figures = {name: 0.0 for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "worst_ms", "real_time_factor", "times_real_time")}
        return Latency(name, 1.0, 1, tuple(times), **figures, speedup=(1.0, 1.0, 1.0), device_ms=None, joules=None, max_abs=0.0,
                       snr_db=99.0, correct=True)  # fmt: skip

    for name, slow, ours in (("old", 1.0, 1.0), ("new", machine, factor)):
        rows = row("PyTorch eager", 100 * slow), row("melrt", 40 * slow * ours)
        Report("voice", "", {}, 15, rows).save(tmp_path / f"{name}.json")
    result, out, _ = melrt("bench", "--compare", tmp_path / "old.json", tmp_path / "new.json")
    line = next(line for line in out.splitlines() if line.strip().startswith("melrt"))
    assert (result, verdict in line) == (code, True)


def test_loop_counts_time_and_energy_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes 1 ms or more, and 2 J."""
    calls: list[float] = []

    def call() -> None:
        calls.append(2.0)
        time.sleep(0.001)

    monkeypatch.setattr("melrt_benchmarks.measure.gpu_meter.LOOP_SECONDS", 0.01)
    loop = loop_times({"one": call}, 3, lambda: sum(calls))["one"]
    assert loop.joules == pytest.approx(2)
    assert len(loop.timing.seconds) == 3
    assert 0.001 <= loop.timing.median < 0.01


def test_gpu_readings_reach_the_report(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a fake clock and energy counter. Only contenders on the GPU are read, and one that fails there keeps its other times."""
    used = iter(range(1000))

    class Clock:
        def seconds(self, call) -> float:
            call()
            return 0.00125

    def fails() -> None:
        raise RuntimeError("planted")

    def planted(voice: contenders.BenchVoice, *_: object):
        made = contenders._melrt(voice, "onnxruntime", "fp32", "host")
        yield made
        yield replace(made, name="device", on_gpu=True, on_device=lambda mel: partial(made.run, mel))
        yield replace(made, name="fails", on_gpu=True, on_device=lambda mel: fails)

    monkeypatch.setattr("melrt_benchmarks.inference.rounds.load_contenders", planted)
    monkeypatch.setattr("melrt_benchmarks.inference.rounds.EventClock", Clock)
    monkeypatch.setattr("melrt_benchmarks.inference.rounds.open_energy_counter", lambda: lambda: float(next(used)))
    monkeypatch.setattr("melrt_benchmarks.measure.gpu_meter.LOOP_SECONDS", 1e-9)
    report = run_bench(BenchPlan(tiny_bundle_path, seconds=(0.5,), rounds=3, measure=("time",)))
    found = [(row.contender, row.device_ms, row.device_p90_ms, row.joules, row.loop_ms is not None) for row in report.latencies]
    assert found == [("host", None, None, None, False), ("device", 1.25, 1.25, 1.0, True), ("fails", None, None, 1.0, True)]
    assert [(one.contender, one.failed) for one in report.skipped] == [("fails, arrays on the GPU", True)]
    write_html(report, tmp_path / "x.html")
    row = report.latencies[1]
    assert f">1.250</td><td>1.250</td><td>{row.seconds * 1000 / 1.25:,.0f}<" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize("form", torch_gpu.FORMS[:5], ids=lambda form: form.name)
def test_pytorch_on_a_gpu_is_set_to_its_precision(
    form: torch_gpu.TorchForm, tiny_bundle_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms that need no GPU of their own run on the CPU here: what they compute, and the settings that they compute it with."""
    torch = pytest.importorskip("torch")
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(torch_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(cudnn, "allow_tf32", form.precision != "tf32")
    monkeypatch.setattr(cudnn, "benchmark", not form.benchmark)
    bundle = Bundle.open(tiny_bundle_path)
    contender = torch_gpu.load_torch(contenders.BenchVoice(bundle, load_checkpoint(tiny_checkpoint), 1), form)
    mel = np.stack([probe_mel(bundle.manifest.spec, 43, seed) for seed in range(2)])
    audio = contender.run(mel)
    assert (cudnn.allow_tf32, cudnn.benchmark) == (form.precision == "tf32", form.benchmark)
    difference = Difference.between(bundle_audio(bundle, mel), audio)
    assert difference.passes(form.precision)
    assert (difference.max_abs > FP32_MAX_ABS) == (form.precision in ("fp16", "bf16"))
    contender.on_device(mel)()


def bundle_audio(bundle: Bundle, mel: np.ndarray) -> np.ndarray:
    with Vocoder.load(bundle, device="cpu", precision="fp32") as vocoder:
        return vocoder(mel)


def test_each_measurement_by_itself(melrt, tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--measure` does not name is neither measured nor in the report."""
    monkeypatch.setattr(memory, "LENGTHS", {"windows": (1.0,), "whole": ()})
    fields = {"profile": "layers", "start-up": "start_ups", "memory": "memory"}
    for measure, field in fields.items():
        files = "--json", tmp_path / "x.json", "--html", tmp_path / "x.html"
        assert melrt("bench", tiny_bundle_path, "--measure", measure, *files)[0] == 0
        report = Report.load(tmp_path / "x.json")
        filled = [name for name in ("latencies", "streams", *fields.values()) if getattr(report, name)]
        assert filled == [field]
        assert report.artifacts


def test_memory_in_windows_does_not_grow_with_length(tiny_bundle_path: Path) -> None:
    """Two minutes in windows take less than 1.2 times the memory of ten seconds; in one run they take much more."""
    windowed = [peak_memory(tiny_bundle_path, seconds, whole=False) for seconds in (10, 120)]
    assert windowed[1] < 1.2 * windowed[0]
    assert peak_memory(tiny_bundle_path, 120, whole=True) > 1.3 * windowed[1]


def test_host_cost_has_the_windows_of_the_voice() -> None:
    """A voice may see more frames than the shortest window of another voice has."""
    field = ReceptiveField(left=40, right=40, smallest_input=4, end_reach=41)
    chosen = policies(SimpleNamespace(manifest=SimpleNamespace(receptive_field=field)))
    assert chosen["engine"].short
    for policy in chosen.values():
        policy.check(field)


def test_host_cost_is_measured_without_the_network(melrt, tiny_bundle_path: Path) -> None:
    code, out, _ = melrt("bench-host", tiny_bundle_path)
    assert code == 0
    rows = [line for line in out.splitlines() if "µs" in line or "ms" in line or "x real time" in line]
    assert len(rows) == 9
    for row in rows:
        numbers = [float(number.replace(",", "")) for number in re.findall(r"([\d.,]+)(?=,| µs| ms| x)", row.split("  ", 1)[1])]
        assert len(numbers) >= 2, "both policies"
        assert min(numbers) > 0
