"""Plant one fault at a time in a copy of the packages, and run the tests that should fail: `make mutants`. Not part of `make test`.

Usage: python tests/mutants.py [PART OF A FILE NAME]
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Seconds for the tests of one fault; the slowest take 40 s on two idle cores. A fault can make a test wait without end.
TIME_LIMIT = 600
PACKAGES = ("runtime", "export", "calibration", "benchmarks")
CAL, TRAIN, PLAN, QUEUE = (
    "calibration/melrt_calibration/", "export/melrt_export/training/", "runtime/melrt/planning/", "runtime/melrt/scheduling/",
)  # fmt: skip
DECIDE, RANGES, QDQ = "tests/calibration/test_decisions.py", "tests/calibration/test_ranges.py", "tests/calibration/test_qdq.py"
CALIBRATE, METRICS, OBJECTIVE = "tests/calibration/test_calibrate.py", "tests/calibration/test_metrics.py", "tests/export/training"
FUSED, KERNELS, TUNING = "export/melrt_export/fused/", "tests/export/test_fused.py", "tests/export/test_tuning.py"
TRAINED, IN_INT8 = "tests/calibration/test_training.py", "tests/calibration/test_quantized_training.py"
WINDOWS, WAITING = "tests/runtime/planning/test_windows.py", "tests/runtime/scheduling"
RUNTIME, VOICES = "runtime/melrt/", "tests/runtime/test_voices.py"

HTTP, FUZZ, SERVICE = "runtime/melrt/serving/http/", "tests/fuzz/test_service.py", "tests/runtime/serving/test_http_connections.py"

READERS, HOSTILE, BOMBS = "export/melrt_export/checkpoints/", "tests/export/test_hostile_files.py", "tests/fuzz/test_bombs.py"
BUNDLES, GRAPHS, TRUST = "tests/runtime/bundle/test_bundle.py", "tests/export/test_hostile_graphs.py", "tests/runtime/bundle/test_trust.py"
ATOMIC, BROKEN_OFF, SPEC = "tests/runtime/files/test_atomic.py", WAITING + "/test_interruptions.py", "tests/runtime/mel/test_spec.py"
ATTACKS, NO_LIMIT = "tests/fuzz/test_fuzz.py", "1 << 80"

# File, text, its faulty replacement, tests that must fail.
MUTANTS = (
    (CAL + "bias_correction.py", "means[layer.name] - scale", "-means[layer.name] + scale", DECIDE),
    (CAL + "bias_correction.py", "replace(network, repairs=Repairs(dict(shifts)))", "replace(network, repairs=Repairs())", DECIDE),
    (CAL + "evaluation.py", "error <= share * self.log_mel and", "True or", DECIDE),
    (CAL + "evaluation.py", "if not budget.allows(int8, fp32):", "if False:", DECIDE),
    (CAL + "evaluation.py", "float(np.nan_to_num(self.silence_db - reference.silence_db))", "0.0", DECIDE),
    (CAL + "evaluation.py", "silence <= share * self.silence_db", "silence <= self.silence_db", DECIDE),
    (CAL + "repairs.py", "correction.chosen.log_mel_error < uncorrected", "correction.chosen.log_mel_error > uncorrected", DECIDE),
    (CAL + "repairs.py", "best = min(errors", "best = max(errors", DECIDE),
    (CAL + "data.py", "np.float32(peak / loudest)", "np.float32(1)", CALIBRATE),
    (CAL + "evaluation.py", "speedup < MIN_SPEEDUP", "speedup < 1", DECIDE),
    (CAL + "evaluation.py", "(0.025, 0.975)", "(0.25, 0.75)", DECIDE),
    (CAL + "search.py", "/ (row.float_seconds - row.int8_seconds)", "* -1", DECIDE),
    (CAL + "search.py", "min(_within(budget, sets)", "max(_within(budget, sets)", DECIDE),
    (CAL + "sensitivity.py", "quality, best = min(", "quality, best = max(", DECIDE),
    (CAL + "ranges.py", "share = min(SHARES, key=lambda share: _divergence", "share = max([1.0], key=lambda share: _divergence", RANGES),
    (CAL + "ranges.py", "p[-1] += histogram", "p[-1] += 0 * histogram", RANGES),
    (CAL + "metrics.py", "float(np.median(levels))", "float(10 * np.log10((10 ** (levels / 10)).mean()))", METRICS),
    (CAL + "data.py", "[p for p in pieces if id(p) not in held_out]", "list(pieces)", CALIBRATE),
    (CAL + "data.py", "piece.recording if len(whole) > 1 else piece.name", "piece.name", CALIBRATE),
    (CAL + "qdq.py", "if self._equal(known.scale, scale) and self._equal(known.zero, zero):", "if False:", QDQ),
    (CAL + "network.py", "grids.get(layer.name, layer.output)", "layer.output", QDQ),
    (CAL + "equalization.py", "factors = factors * levels[name] /", "factors = factors if levels else levels[name] /", RANGES),
    (TRAIN + "losses.py", "[-score.mean()", "[score.mean()", OBJECTIVE),
    (TRAIN + "step.py", "(losses.feature_matching, feature", "(-losses.feature_matching, feature", OBJECTIVE),
    (TRAIN + "step.py", 'if precision == "float32":', "if True:", OBJECTIVE),
    (TRAIN + "step.py", "rate * rates.rate_factor(done)", "rate", OBJECTIVE),
    (TRAIN + "step.py", "if rates.milestones else step", "if False else step", OBJECTIVE),
    (TRAIN + "step.py", "self.subband_stft_loss(split, batch.bands)", "self.subband_stft_loss(split, split)", OBJECTIVE),
    (TRAIN + "losses.py", "return torch.stack(terms).mean()", "return torch.stack(terms).sum()", OBJECTIVE),
    ("export/melrt_export/generator/network.py", "weight.flip(1)[:, None]", "weight[:, None]", OBJECTIVE),
    (TRAIN + "config.py", "1 - done / (self.zero_at", "1 + 0 * done / (self.zero_at", OBJECTIVE),
    (TRAIN + "activation_ranges.py", "by_zero = -scale *", "by_zero = scale *", TRAINED),
    (TRAIN + "activation_ranges.py", "gradient * rounded - through * x", "through * x - gradient * rounded", TRAINED),
    (TRAIN + "activation_ranges.py", "values.high * high", "values.high", TRAINED),
    (CAL + "training.py", "if increase <= most:", "if increase > most:", TRAINED),
    (CAL + "training.py", "if differing := [", "if False and [", TRAINED),
    (CAL + "training.py", ', best="log_mel"', "", TRAINED),
    (CAL + "training.py", ", zero_at=options.steps", "", TRAINED),
    (CAL + "training.py", "_config(options, CONTROL)", "_config(options, PLAN)", TRAINED),
    (CAL + "training.py", "mel=5.0", "mel=0.0, stft=1.0", TRAINED),
    (CAL + "training.py", "for end in reversed(ends)", "for end in ends", TRAINED),
    (CAL + "training.py", "[p for p in recordings if str(p) not in held_out]", "list(recordings)", TRAINED),
    (CAL + "training.py", "if expected and checkpoint.sha256 != expected:", "if False:", TRAINED),
    (CAL + "requantize.py", "deploy_graph(control.config, control.weights", "deploy_graph(control.config, checkpoint.weights", TRAINED),
    (CAL + "requantize.py", "deploy_graph(checkpoint.config, checkpoint.weights, F", "graphs.models.get((graph, form)) or (F", IN_INT8),
    (CAL + "statistics.py", "values.size // COUNTED | 1", "(values.size // COUNTED & -2) or 1", RANGES),
    (CAL + "statistics.py", "values.ravel()[:: values", "values.ravel()[: COUNTED : values", RANGES),
    (TRAIN + "activation_ranges.py", "(x / factors, scale", "(x, scale", IN_INT8),
    (TRAIN + "activation_ranges.py", "((gradient - through) * factors).sum()", "(gradient - through).sum()", TRAINED),
    (PLAN + "windows.py", "keep_stop + field.right", "keep_stop + field.right - 1", WINDOWS),
    (PLAN + "windows.py", "max(keep_start - field.left, 0)", "keep_start", WINDOWS),
    (PLAN + "windows.py", "received - field.right, 0)", "received, 0)", WINDOWS),
    (QUEUE + "waiting.py", "return min(self._heaps.values()", "return max(self._heaps.values()", WAITING),
    (QUEUE + "order.py", "entry.used * self._weight <= self._seconds * (1 + ROUNDING)", "True", WAITING),
    (QUEUE + "order.py", "_Entry(seconds / weight,", "_Entry(seconds,", WAITING),
    (QUEUE + "order.py", "not entry.flooded and ", "", WAITING),
    (QUEUE + "workers.py", "and self.runs(member) < member.lanes", "", WAITING),
    (QUEUE + "order.py", "_Item(entry.deadline if", "_Item(-entry.deadline if", WAITING),
    (QUEUE + "workers.py", "usage.floor = self._progress * usage.weight", "usage.floor = self._progress", WAITING),
    (QUEUE + "waiting.py", "len(jobs) < batch", "len(jobs) <= batch", WAITING),
    (FUSED + "kernels.py", "2 * (T - 1) - s", "2 * T - 1 - s", KERNELS),
    (FUSED + "kernels.py", "N - CROP * (N // S)", "N - (CROP - 1) * (N // S)", KERNELS),
    (FUSED + "kernels.py", "(v - tl.load(mean + c,", "(v - 0 * tl.load(mean + c,", KERNELS),
    (FUSED + "kernels.py", "t + tap - LEFT, c, T", "t + tap - LEFT - TAPS // 3, c, T", KERNELS),
    (FUSED + "kernels.py", "i * BK // CP - LEFT", "i * BK // CP - LEFT + 1", KERNELS),
    (FUSED + "kernels.py", "(i * BK % CP + k % CP)", "(k % CP)", KERNELS),
    (FUSED + "kernels.py", "center = activations(x, t, every", "center = activations(x, t + 1, every", KERNELS),
    (FUSED + "kernels.py", "biases[None, :]", "bias[None, :]", KERNELS),
    (FUSED + "lower.py", "bias[place] = self._bias", "bias[place] = 0 * self._bias", KERNELS),
    (FUSED + "lower.py", "slice(step * bands, (step + 1) * bands)", "slice(step * bands, step * bands + 1)", KERNELS),
    (FUSED + "lower.py", "int(crop > 0)", "0", KERNELS),
    (FUSED + "lower.py", "bias.reshape(-1, phases).T.reshape(-1)", "bias", KERNELS),
    (FUSED + "roofline.py", "steps * weights / group", "steps * weights", "tests/export/test_roofline.py"),
    (FUSED + "roofline.py", "reread + taps * each", "reread + each", "tests/export/test_roofline.py"),
    (FUSED + "roofline.py", "layer.read + HALF * layer.added", "HALF * layer.read + HALF * layer.added", "tests/export/test_roofline.py"),
    (FUSED + "tuning.py", "np.argmin(costs)", "np.argmax(costs)", TUNING),
    (FUSED + "tuning.py", "equal += [code] if same else []", "equal += [code]", TUNING),
    (FUSED + "tuning.py", "if costs[best] < (1 - MIN_GAIN) * costs[0] else 0", "", TUNING),
    (FUSED + "tuning.py", "if _loses_nothing(one.times[0], times) else math.inf", "", TUNING),
    (FUSED + "tuning.py", "return kept if faster else dict(self._target.default)", "return kept", TUNING),
    (FUSED + "tuning.py", "faster = _pays(us)", "faster = not _pays(us)", TUNING),
    (FUSED + "tuning.py", "and code.stack <= target", "and code.stack <= 9 + target", TUNING),
    (FUSED + "tuning.py", "if not same:", "if False:", TUNING),
    (FUSED + "tuning.py", "if gpu.compute_capability not in gpus:", "if False:", TUNING),
    (FUSED + "children.py", "        self.close()\n        raise ChildError(reason)", "        raise ChildError(reason)", TUNING),
    (FUSED + "trial_bench.py", "launch.grid(compiled, batch, frames)", "launch.grid(compiled, 1, frames)", TUNING),
    (FUSED + "accuracy_check.py", "difference.reaches(LEAST_SNR_DB),", "True,", KERNELS),
    ("runtime/melrt/backends/fused/engine.py", "*values, *_HIDDEN", "*values", KERNELS),
    ("runtime/melrt/backends/fused/engine.py", "if kernel.shared > _SHARED_BYTES:", "if False:", KERNELS),
    ("runtime/melrt/backends/fused/program.py", "self.extra) // kernel.rows", "self.extra) // (kernel.rows + 8)", KERNELS),
    (RUNTIME + "voices.py", "if vocoder is None or self._has_changed(entry, now):", "if vocoder is None:", VOICES),
    (RUNTIME + "voices.py", "if entry.on_disk not in ((), version):", "if False:", VOICES),
    (RUNTIME + "voices.py", "self._options, workers)", "self._options, None)", VOICES),
    (RUNTIME + "residency.py", "(other == name, entry.busy, entry.used, other)", "(other == name, entry.busy, -entry.used, other)", VOICES),
    (RUNTIME + "residency.py", "(held if busy else self.total) > room", "False", VOICES),
    (RUNTIME + "residency.py", "not busy if own else", "False if own else", VOICES),
    (HTTP + "connection.py", "if not self.handshake_initiated:", "if False:", FUZZ),
    (HTTP + "connection.py", "self.handshake_complete |= self.close_sent", "self.handshake_complete |= False", FUZZ),
    (HTTP + "connection.py", "contextlib.suppress(OSError):  # the client has gone", "contextlib.suppress():", SERVICE),
    (HTTP + "connection.py", "self.close_timeout = self.limits.idle_seconds", "pass", SERVICE),
    (HTTP + "bodies.py", "return spec.check(mel)", "return mel", "tests/runtime/serving/test_http.py"),
    (HTTP + "service.py", "self._stop(self.in_progress > 0)", "self._stop(False)", SERVICE),
    (HTTP + "metrics.py", '.endswith("http.response.start")', ' == "http.response.start"', "tests/runtime/serving/test_http.py"),
    (QUEUE + "order.py", "self._weight -= entry.weight", "pass", WAITING),
    (QUEUE + "workers.py", "usage.floor - CREDIT * usage.weight", "usage.floor", WAITING),
    (QUEUE + "workers.py", "usage.seconds = max(usage.seconds, usage.floor)", "pass", WAITING),
    # Pickled statistics and weights that are taken for pointers, or run code.
    (
        READERS + "reading.py", '_reconstruct": _StoredArray, "numpy.ndarray": _StoredArray, "numpy.dtype": _StoredType,',
        '_reconstruct": np.zeros(1).__reduce__()[0], "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,', HOSTILE,
    ),
    (
        READERS + "pickles.py", "if full not in self._known:",
        "if full not in self._known:\n            return super().find_class(module, name)\n        if False:", HOSTILE,
    ),
    # Engines that this user did not build.
    (RUNTIME + "bundle/trust.py", '" ".join(problems))\n    return False', '" ".join(problems))\n    return True', TRUST),
    (RUNTIME + "bundle/trust.py", "dict(entry.target)]", "{}]", TRUST),
    (RUNTIME + "backends/select.py", "trusted = choice.trust or", "trusted = True or", TRUST),
    ("export/melrt_export/tensorrt/refit.py", "if not is_trusted(entry):", "if False:", "tests/export/test_fake_engines.py"),
    # Links in a bundle.
    (RUNTIME + "bundle/folder.py", "self.path / entry.file, follow=False", "self.path / entry.file, follow=True", BUNDLES),
    (RUNTIME + "bundle/folder.py", "self.path / MANIFEST, follow=False", "self.path / MANIFEST, follow=True", BUNDLES),
    # Small files that hang, fill the memory or crash.
    (READERS + "hdf5_reader.py", "if next(nodes) > MAX_NODES:", "if False:", HOSTILE),
    (READERS + "hdf5_reader.py", "or data.nbytes > most:", "or False:", HOSTILE),
    (READERS + "hdf5_reader.py", "if chunk > most or (", "if False and (", HOSTILE),
    (READERS + "hdf5_reader.py", "signal.setitimer(signal.ITIMER_PROF, seconds)", "pass", HOSTILE),
    (READERS + "hdf5_reader.py", "resource.setrlimit(resource.RLIMIT_AS", "(lambda *_: None)(resource.RLIMIT_AS", HOSTILE),
    (READERS + "reading.py", "def flatten_mapping(", "def flatten_nothing(", HOSTILE),
    (READERS + "reading.py", "len(node.value) > MAX_VALUE_LENGTH", "False", HOSTILE),
    (READERS + "reading.py", '"\\\\])*"?)|', '"\\\\])*")|', HOSTILE),
    (READERS + "reading.py", "if header > MAX_SAFETENSORS_HEADER_BYTES:", "if False:", BOMBS),
    (READERS + "load.py", "if context > MAX_CONTEXT:", "if False:", HOSTILE),
    (READERS + "torch_files.py", "math.prod(shape) * item) > self._size:", f"math.prod(shape) * item) > {NO_LIMIT}:", BOMBS),
    (READERS + "torch_files.py", "if unpacked > size or any(", "if any(", HOSTILE),
    (READERS + "pickles.py", "if count > MAX_PICKLE_OPERATIONS or", "if", BOMBS),
    (READERS + "pickles.py", "or tuples > MAX_PICKLE_TUPLES", "", BOMBS),
    (READERS + "archives.py", "if self._done > self._most:", "if False:", BOMBS),
    (READERS + "archives.py", "if count >= MAX_MEMBERS:\n                raise CheckpointError(f\"holds more than {MAX_MEMBERS} entries",
     "if False:\n                raise CheckpointError(f\"holds more than {MAX_MEMBERS} entries", HOSTILE),
    (RUNTIME + "files/audio.py", "if count * bytes_each > most:", "if False:", "tests/runtime/files/test_audio.py"),
    (RUNTIME + "files/audio.py", "if not LEAST_RATE <= file.samplerate <= MOST_RATE:", "if False:", "tests/runtime/files/test_audio.py"),
    # Children that were forked.
    (QUEUE + "synthesizer.py", "self.queue.check_process()", "pass", WAITING),
    # Connections and uploads.
    (HTTP + "service.py", "self.in_progress >= self.config.max_requests:", "False:", "tests/runtime/serving/test_http.py"),
    (HTTP + "connection.py", "self._request_timer = self.loop.call_later(self.limits.idle_seconds, self.transport.abort)", "pass", SERVICE),
    (HTTP + "service.py", '{"Connection": "close"} |', "{} |", SERVICE),
    (HTTP + "app.py", "app.add_exception_handler(ClientDisconnect, explain)", "pass", SERVICE),
    # Graphs with a correct hash.
    (RUNTIME + "bundle/folder.py", 'if entry.kind == "onnx":', "if False:", GRAPHS),
    (RUNTIME + "bundle/graph_check.py", "_TENSOR = {1, 2, 8, 9}", "_TENSOR = {1, 2, 8, 9, 13, 14}", GRAPHS),
    (RUNTIME + "bundle/graph_check.py", "sum(live.values()) > MAX_VALUES * _FRAMES or", "", GRAPHS),
    # Processes that are killed, and full disks.
    (RUNTIME + "files/atomic.py", "if _exchange(new, path):", "if False:", ATOMIC),
    (RUNTIME + "files/atomic.py", "lambda: _sweep(path, path.stem, path.suffix)", "lambda: None", ATOMIC),
    (RUNTIME + "files/atomic.py", "or (not named and type(error) is OSError)", "", ATOMIC),
    # Errors that are not melrt's.
    (RUNTIME + "bundle/folder.py", "except Exception as error:", "except OSError as error:", ATTACKS),
    (RUNTIME + "files/mels.py", "except Exception as error:", "except OSError as error:", ATTACKS),
    (RUNTIME + "bundle/manifest.py", "or math.isfinite(value)", "or True", BUNDLES),
    (RUNTIME + "bundle/manifest.py", "return depth < MAX_DEPTH and all(_is_plain(one, depth + 1) for one in v", "return all(v", BUNDLES),
    (RUNTIME + "mel/spec.py", "(TypeError, ValueError, RuntimeError)", "TypeError", SPEC),
    (RUNTIME + "mel/spec.py", "if np.ma.is_masked(mel):", "if False:", SPEC),
    # Exceptions that end a thread, and calls that wait for themselves.
    (QUEUE + "queue.py", "except BaseException as error:  # such as", "except Exception as error:  # such as", BROKEN_OFF),
    (QUEUE + "delivery.py", "    except BaseException:", "    except Exception:", BROKEN_OFF),
    (QUEUE + "delivery.py", "lambda: workers.inside", "lambda: False", BROKEN_OFF),
    (QUEUE + "synthesizer.py", "self.queue.limits.check_frames(received + shape[-1])", "pass", WAITING),
    # Control characters of a manifest on the terminal.
    (RUNTIME + "bundle/manifest.py", "return value.isprintable() if", "return True if", BUNDLES),
)  # fmt: skip


def main() -> int:
    """Print one line for each fault, and return 1 if one was not found. Tests that reach the time limit have not found their fault."""
    chosen = [mutant for mutant in MUTANTS if all(part in mutant[0] for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        killed = [_is_killed(copy, *mutant) for mutant in chosen]
    print(f"{sum(killed)} of {len(killed)} faults were found.")
    return 0 if all(killed) else 1


def _is_killed(copy: Path, file: str, old: str, new: str, tests: str) -> bool:
    text = (copy / file).read_text(encoding="utf-8")
    if old not in text:
        sys.exit(f"{file} no longer holds {old!r}; change the table in {Path(__file__).name}.")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(copy / package) for package in PACKAGES), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", tests]
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    try:
        code = _run(command, environment)
    finally:
        (copy / file).write_text(text, encoding="utf-8")
    found = code is not None and (code == 1 or code < 0)  # a signal: the fault has crashed the tests
    print("found   " if found else "SURVIVED" if code is not None else f"NO RESULT within {TIME_LIMIT} s", file, "|", new, flush=True)
    return found


def _run(command: list[str], environment: dict[str, str]) -> int | None:
    """Run a command in a process group of its own and return its exit code; None if it was ended with its children at the time limit."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **quiet) as process:
        try:
            return process.wait(TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None


if __name__ == "__main__":
    sys.exit(main())
