"""The benchmark times what it says, in turn, and shows a wrong contender as wrong."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from melrt import Bundle, Vocoder
from melrt.timing import Timing, interleave, median_interval, noise_note, warm_up
from melrt_benchmarks.inference import contenders
from melrt_benchmarks.inference.bench import Plan, run_bench
from melrt_benchmarks.inference.memory import peak_memory
from melrt_benchmarks.inference.roofline import WINDOW
from melrt_benchmarks.measure.gpu_meter import Reading
from melrt_benchmarks.report.html import write_html
from melrt_benchmarks.report.results import Latency, Report
from melrt_export.generator.config import GeneratorConfig


def test_every_contender_runs_once_per_round_in_changing_order() -> None:
    order: list[str] = []
    result = interleave({name: (lambda name=name: order.append(name)) for name in "abc"}, rounds=4)
    counted = order[-12:]  # what comes before is warm-up
    rounds = ["".join(counted[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(timing.seconds) == 4 for timing in result.values())


def test_figures_are_order_statistics() -> None:
    timing = Timing(np.arange(1.0, 11.0))
    assert (timing.median, timing.percentile(90), timing.percentile(100)) == (5.5, 10.0, 10.0)
    assert timing.ratio_to(Timing(2 * timing.seconds)) == (0.5, 0.5, 0.5)
    assert noise_note({"quiet": Timing(np.array([1.0, 1.01, 1.02, 1.01]))}) == ""
    assert "spans 82 % of its median" in noise_note({"busy": timing})
    slow = interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, rounds=3)["slow"]
    assert slow.median >= 0.02


def test_the_median_s_interval_holds_it_as_often_as_it_says() -> None:
    """Of a skewed distribution, whose true median is ln 2; a fitted normal one would be far off."""
    draws = np.random.default_rng(0).exponential(size=(2000, 15))
    held = np.mean([low <= np.log(2) <= high for _, low, high in map(median_interval, draws)])
    assert 0.93 <= held <= 0.99


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
    """A run of everything but what compiles for minutes."""
    pytest.importorskip("onnxscript", reason="the plain export needs onnxscript")
    plan = Plan(
        tiny_bundle_path, tiny_checkpoint, precisions=("fp32", "fp16"), seconds=(0.5,), batches=(1, 2), concurrency=(2,), rounds=3,
        threads=2, command="melrt bench",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "_compiled", lambda _: (_ for _ in ()).throw(contenders.UnavailableError("left out: it takes long")))
        return run_bench(plan)


def test_the_report_has_every_figure(report: Report, tmp_path: Path) -> None:
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
        assert len(row.milliseconds) == report.rounds
    assert report.latencies[0].speedup == (1.0, 1.0, 1.0)
    assert [row.requests for row in report.throughputs] == [16] * len(report.throughputs)
    assert {row.contender for row in report.start_ups} == {"melrt, onnxruntime fp32", "melrt, onnxruntime fp16"}
    assert all(row.import_ms > 0 < row.load_ms and row.peak_mib > 20 for row in report.start_ups)
    report.save(tmp_path / "x.json")
    assert Report.load(tmp_path / "x.json").latencies == report.latencies


def test_the_profile_knows_every_convolution_and_its_limit(report: Report, tiny_bundle_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle_path)
    model = onnx.load_from_string(bundle.read(bundle.find("onnx", graph="interior", precision="fp32")[0]))
    convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
    profiled = {layer.name: layer for layer in report.layers if layer.mflop}
    assert set(profiled) == convolutions
    assert sum(layer.share for layer in report.layers) == pytest.approx(1, abs=0.01)
    config = GeneratorConfig.from_dict(bundle.manifest.architecture)
    # the interior graph computes what padding reaches into beyond the kept samples, so that it is not less than the generator's own count
    assert sum(layer.mflop for layer in profiled.values()) * 1e6 == pytest.approx(config.flop_per_frame * WINDOW, rel=0.05)
    assert all(layer.limit_microseconds > 0 for layer in profiled.values())
    assert report.ceilings["gflops"] > 1 < report.ceilings["gbytes"]


def test_the_page_opens_offline_and_shows_what_is_wrong(report: Report, tmp_path: Path) -> None:
    wrong = replace(report.latencies[1], correct=False, contender="<b>planted</b>")
    streams = (
        {"streams": 2, "in_flight": True, "underruns": 0, "pushes": 10, "latency_ms": [1, 2], "first_audio_ms": [1, 2], "held": True},
    )
    memory = ({"seconds": 30.0, "kind": "windows", "peak_mib": 251.0},)
    write_html(
        replace(report, latencies=(wrong, *report.latencies), noise="It was loud.", streams=streams, memory=memory), tmp_path / "x.html"
    )
    page = (tmp_path / "x.html").read_text()
    assert page.count('class="wrong">WRONG<') == 1
    assert "&lt;b&gt;planted" in page
    assert "It was loud." in page
    assert page.count('src="data:image/png;base64,') == 5
    assert not re.search(r"""(?:src|href)=["']?(?:http|//)""", page)


def test_the_command_line(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    """Without a checkpoint only melrt is timed; a second run compares with the first."""
    arguments = "bench", tiny_bundle_path, "--seconds", "0.5", "--rounds", "3", "--no-start-up", "--no-profile"
    for name in ("a", "b"):
        code, out, _ = melrt(
            *arguments, "--json", tmp_path / f"{name}.json", "--html", tmp_path / f"{name}.html", "--pictures", tmp_path / name
        )
        assert (code, "needs the weights: --checkpoint" in out, "melrt, onnxruntime fp32" in out) == (0, True, True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["latency-of-each-run.png", "times-real-time.png"]
    code, out, _ = melrt("bench", "--compare", tmp_path / "a.json", tmp_path / "a.json")
    assert (code, out.count("same"), out.count("yardstick")) == (0, 1, 1)


def test_wrong_turns(melrt, tiny_bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 1}')
    (tmp_path / "x.json").write_text("[]")
    turns = [
        (("bench",), "give a VOICE.melrt"),
        (("bench", tiny_bundle_path, "--seconds", "one"), "--seconds is 'one'"),
        (("bench", tiny_bundle_path, "--seconds", "0"), "above 0 and up to 7200"),
        (("bench", tiny_bundle_path, "--batch", "0"), "from 1 to 1024"),
        (("bench", tiny_bundle_path, "--rounds", "2"), "at least 3"),
        (("bench", tiny_bundle_path, "--only", "nobody,none"), "None has a name with nobody, none"),
        (("bench", tiny_bundle_path, "--precisions", "int3"), "known are fp32, tf32, fp16, int8"),
        (("bench", "--compare", tmp_path / "none.json", tmp_path / "x.json"), "is no file"),
        (("bench", "--compare", tmp_path / "old.json", tmp_path / "x.json"), "has schema 1; this melrt reads 2"),
        (("bench", "--compare", tmp_path / "x.json", tmp_path / "x.json"), "is no report"),
    ]
    for arguments, message in turns:
        code, _, err = melrt(*arguments)
        assert (code, message in err) == (2, True), (arguments, err)


def test_a_wrong_contender_is_shown_as_wrong(melrt, tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*_: object):
        yield contenders.Contender("silent", "fp32", lambda mel: np.zeros((len(mel), mel.shape[2] * 256), np.float32))
        yield contenders.Contender("fails", "fp32", lambda mel: mel.no_such_thing)
        yield contenders.Contender("as long as it likes", "fp32", lambda mel: np.zeros((len(mel), 7), np.float32))

    monkeypatch.setattr("melrt_benchmarks.inference.bench.contenders", planted)
    code, out, _ = melrt("bench", tiny_bundle_path, "--seconds", "0.5", "--rounds", "3", "--no-start-up", "--no-profile")
    assert (code, out.count("WRONG")) == (1, 2)
    assert "not run: fails: failed on mels of shape (1, 80, 43)" in out


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
def test_ten_percent_are_found_through_noise(melrt, tmp_path: Path, machine: float, factor: float, verdict: str, code: int) -> None:
    """The second run's machine is slower as a whole, and every run strays by 3 %; twice as slow, and nothing is certain."""
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


def test_the_gpu_s_own_figures_come_through(tiny_bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a meter in place of a GPU: only what runs on one is read."""

    class Meter:
        def read(self, call) -> Reading:
            call()
            return Reading(1.25, 0.5)

    def planted(bench: contenders.Bench, *_: object):
        for name, on_gpu in (("host", False), ("device", True)):
            made = contenders._melrt(bench, "onnxruntime", "fp32")
            yield replace(made, name=name, on_gpu=on_gpu)

    monkeypatch.setattr("melrt_benchmarks.inference.bench.contenders", planted)
    monkeypatch.setattr("melrt_benchmarks.inference.bench.open_meter", Meter)
    rows = run_bench(Plan(tiny_bundle_path, seconds=(0.5,), rounds=3, profiled=False, started=False)).latencies
    assert [(row.contender, row.device_ms, row.joules) for row in rows] == [("host", None, None), ("device", 1.25, 0.5)]


def test_streams_rise_until_too_many(melrt, tiny_bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a listener who has next to nothing in hand, even one stream is too many; with plenty, few are held."""
    from melrt_benchmarks.inference.streams import Load, measure

    with Vocoder.load(tiny_bundle_path) as vocoder:
        vocoder(np.zeros((80, 200)))
        for in_flight in (True, False):
            patient = measure(vocoder, 2, Load(buffer=30.0, seconds=1.0), in_flight=in_flight)
            assert patient.held
            assert patient.pushes == 2 * 5
            assert 0 < patient.latency_ms[0] <= patient.latency_ms[1]
            assert not measure(vocoder, 1, Load(buffer=1e-6, seconds=1.0), in_flight=in_flight).held


def test_memory_of_a_long_synthesis_stays(tiny_bundle_path: Path) -> None:
    """Two minutes in windows take hardly more than ten seconds; whole, they take several times the growth."""
    windowed = [peak_memory(tiny_bundle_path, seconds, whole=False) for seconds in (10, 120)]
    assert windowed[1] < 1.2 * windowed[0]
    assert peak_memory(tiny_bundle_path, 120, whole=True) > 1.3 * windowed[1]
