"""Runs that are stopped or killed: they resume exactly, and a state that cannot be resumed is reported."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save
from tests.export.training.runs import ENVIRONMENT, WATCHDOG, command, header, write_config

from melrt.bundle import Bundle
from melrt.errors import TrainingError
from melrt_export.checkpoints import load_checkpoint
from melrt_export.training.state import FILE
from melrt_export.training.trainer import Trainer

RESUME_TOLERANCE = 1e-6
KILLS = 10


def test_resumed_run_equals_an_uninterrupted_one(folder: Path) -> None:
    """With an average of the weights, and discriminators that begin after the stop: `best` begins again, at the same step in both."""
    late = ("stft = 1.0", "stft = 1.0\ndiscriminator_from = 15\nadversarial_from = 25")
    average = ("[schedule]", "[optimizer]\naverage = 0.9\namsgrad = true\n[schedule]")
    config = write_config(folder, 40, ("workers = 0", "workers = 1"), late, average)
    curves: dict[str, list[tuple[int, float]]] = {}

    class Curve:
        def __init__(self, name: str) -> None:
            self.values = curves.setdefault(name, [])

        def on_step(self, step: int) -> None: ...

        def on_validation(self, validation, best: bool) -> None: ...

        def on_losses(self, step: int, values) -> None:
            self.values.extend((step, values.get(name, 0.0)) for name in ("generator", "discriminator", "feature_matching"))

    def trained(name: str, resume: bool, until: int | None) -> Trainer:
        trainer = Trainer(replace(config, run=str(folder / name)), resume=resume)
        trainer.callbacks = [Curve(name)]
        assert trainer.run(until).finished == (until is None)
        return trainer

    whole = trained("whole", False, None)
    trained("parts", False, 20)
    parts = trained("parts", True, None)
    assert [step for step, _ in curves["whole"]] == [step for step, _ in curves["parts"]]
    assert len(curves["whole"]) == 3 * 8
    assert np.allclose([v for _, v in curves["whole"]], [v for _, v in curves["parts"]], rtol=0, atol=RESUME_TOLERANCE)
    assert np.allclose(whole.history.validations, parts.history.validations, rtol=0, atol=RESUME_TOLERANCE)
    one, other = (load_file(folder / name / FILE) for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(np.abs(one[name] - other[name]).max() <= RESUME_TOLERANCE for name in one)
    for kept in ("best", "best-generator-only", "last", "last-average"):
        first, second = (load_checkpoint(folder / name / kept).weights for name in ("whole", "parts"))
        assert all(np.abs(first[name] - second[name]).max() <= RESUME_TOLERANCE for name in first), kept


RESUME = """
import torch
from pathlib import Path
from melrt_export.training.config import read_config
from melrt_export.training.trainer import Trainer
torch.set_num_threads(1)
Trainer(read_config(Path({path!r})), resume=True).run()
"""


def test_run_killed_while_writing_can_be_resumed(folder: Path) -> None:
    """Every step saves the state, so a process spends most of its time on writing. It is killed at a random moment.

    All that remains has the same bits as after a run without a kill: weights, average, moments, validations and `best`.
    """
    schedule = ("save_every = 10", "save_every = 1"), ("validate_every = 10", "validate_every = 3")
    optimizer = ("[schedule]", "[optimizer]\naverage = 0.9\namsgrad = true\nmilestones = [2, 5]\n[schedule]")
    config = write_config(folder, 100_000, *schedule, optimizer)
    run = Path(config.run)
    Trainer(config).run(until=1)
    step = _kill_resumed_runs(folder, run)
    resumed = Trainer(config, resume=True)
    assert resumed.history.step == step
    resumed.run(until=step + 1)
    kept = {"best", "last", "last-average"}
    assert {path.name for path in run.iterdir()} == {FILE, *kept}, "leftovers are removed"
    whole = replace(config, run=str(folder / "whole"), schedule=replace(config.schedule, save_every=100_000))
    Trainer(whole).run(until=step + 1)
    assert header(run) == header(folder / "whole")
    assert header(run)["validations"][-1][0] >= 3
    for file in (FILE, *(f"{name}/model.safetensors" for name in kept)):
        one, other = (load_file(path / file) for path in (folder / "whole", run))
        assert one.keys() == other.keys()
        assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == [], file


def _kill_resumed_runs(folder: Path, run: Path) -> int:
    """Resume a run in other processes, kill each of them while it writes, and return the step of the state that remains."""
    noise = np.random.default_rng()
    context = get_context("forkserver")  # it imports torch once, and forks processes before any thread starts
    context.set_forkserver_preload(["melrt_export.training.trainer", "torch._dynamo"])
    step = 1
    for _ in range(KILLS):
        process = context.Process(target=exec, args=(RESUME.format(path=str(folder / "x.toml")),))
        process.start()
        deadline = time.monotonic() + WATCHDOG
        while header(run)["step"] == step:
            assert process.is_alive(), "the resumed run failed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(noise.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        step = header(run)["step"]
        load_checkpoint(run / "best")
        load_checkpoint(run / "last")
        load_checkpoint(run / "last-average")
    return step


def test_ctrl_c_saves_and_resume_finishes_and_exports(folder: Path, melrt) -> None:
    """The command is interrupted, resumed and exported with its figures; then its log is read back."""
    write_config(folder, 100_000)
    process = subprocess.Popen(command(folder / "x.toml"), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WATCHDOG
    while not (folder / "run" / FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 130, err
    stopped = header(folder / "run")["step"]
    assert f"stopped after {stopped} of 100000 steps and saved its state" in out
    assert f"Continue with: melrt train {folder / 'x.toml'} --resume" in out
    assert "step 0 of 100000: validation error" in out
    assert "Reading every recording once" in err
    assert "step 5 of 100000: discriminator" in err, "progress without a terminal"
    steps = stopped + 5
    write_config(folder, steps)
    code, out, err = melrt("train", folder / "x.toml", "--resume", "--export", folder / "x.melrt")
    assert code == 0, err
    assert header(folder / "run")["step"] == steps
    provenance = Bundle.open(folder / "x.melrt").manifest.provenance
    best, error, _ = min(header(folder / "run")["validations"], key=lambda entry: entry[2])
    assert (provenance["training_steps"], provenance["validation_log_mel_error"]) == (str(best), f"{error:.4f}")
    assert (provenance["training_recordings"], provenance["validation_recordings"]) == ("2", "1")
    events = read_events(folder / "run")
    assert {"training/generator", "training/discriminator", "training/steps_per_second", "validation/weights/log_mel"} <= set(events)
    assert events["validation/weights/log_mel"] > 0
    assert len(events["2/synthesis"]) > 2 * 22016, "a second of 16-bit audio"
    assert events["2/recording_above_synthesis"].startswith(b"\x89PNG")


def read_events(run: Path) -> dict[str, object]:
    """Return the last value of each tag in the event files. Their records are length, checksum, data, checksum (TFRecord)."""
    from tensorboardX.proto.event_pb2 import Event

    values: dict[str, object] = {}
    for file in sorted(run.glob("events*")):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            for value in Event.FromString(data[12 : 12 + size]).summary.value:
                kind = value.WhichOneof("value")
                content = getattr(value, kind)
                values[value.tag] = content if kind == "simple_value" else getattr(content, f"encoded_{kind}_string")
            data = data[16 + size :]
    return values


def test_state_that_cannot_be_resumed_is_reported(folder: Path) -> None:
    config = write_config(folder, 20)
    with pytest.raises(TrainingError, match="nothing to resume"):
        Trainer(config, resume=True)
    Trainer(config).run(until=2)
    with pytest.raises(TrainingError, match="already holds a training"):
        Trainer(config)
    cases = (("channels = 32", "channels = 64"), "another generator"), (("channels = 4", "channels = 8"), "expected shape"), (
        ("layers = 2", "layers = 1"), "expected shape|tensors that this network lacks|is missing",
    )  # fmt: skip
    for change, message in cases:
        with pytest.raises(TrainingError, match=message):
            Trainer(write_config(folder, 20, change, name="other.toml"), resume=True)
    file = folder / "run" / FILE
    good = file.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"\xff" * 100, good.replace(b'\\"step\\": 2', b'\\"stop\\": 2')):
        assert bad != good
        file.write_bytes(bad)
        with pytest.raises(TrainingError, match="Start a new run"):
            Trainer(config, resume=True)


def test_hostile_state_is_refused_before_the_next_step(folder: Path) -> None:
    """Each of these states was accepted, or raised something else, or failed in a later step."""
    config = write_config(folder, 20)
    Trainer(config).run(until=2)
    file = folder / "run" / FILE
    tensors, good = load_file(file), header(folder / "run")
    step, moment = (next(name for name in tensors if name.endswith(end)) for end in (".step", ".exp_avg"))
    cases = (
        ({"validations": ["abc"]}, {}, "malformed"), ({"validations": [[1, 10**400, 0.1]]}, {}, "malformed"),
        ({"validations": [[1, float("nan"), 0.1]]}, {}, "malformed"), ({"step": 10**400}, {}, "malformed"),
        ({"scaler": {"scale": "x"}}, {}, "malformed"), ({"scaler": [1]}, {}, "damaged"), ({"validations": 5}, {}, "damaged"),
        ({}, {moment: tensors[moment].astype(np.int64)}, "type torch.int64; expected .* type torch.float32"),
        ({}, {step: np.array(-1, np.float32)}, "a negative number of steps"),
        ({}, {f"{moment}_sq": -1 - tensors[f"{moment}_sq"]}, "second moment"),
    )  # fmt: skip
    for facts, values, message in cases:
        file.write_bytes(save({**tensors, **values}, {"melrt": json.dumps(good | facts)}))
        with pytest.raises(TrainingError, match=message):
            Trainer(config, resume=True)
    file.write_bytes(save(tensors, {"melrt": json.dumps(good)}))
    assert Trainer(config, resume=True).history.step == 2
    float16 = replace(config, machine=replace(config.machine, precision="float16"))
    file.write_bytes(save(tensors, {"melrt": json.dumps(good | {"scaler": {"scale": 1.0}})}))
    with pytest.raises(TrainingError, match="state of the loss scale"):
        Trainer(float16, resume=True)
