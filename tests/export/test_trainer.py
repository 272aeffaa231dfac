"""Trainer and `melrt train`: learning, exact resumption after stops and kills, several processes, and error messages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from melrt.bundle import Bundle
from melrt.errors import TrainingError
from melrt.files.audio import read_audio
from melrt.planning.edges import Edges
from melrt_export.assets import RECORDING
from melrt_export.checkpoints import load_checkpoint, native
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.pqmf import FilterDesign
from melrt_export.training.config import TrainingConfig, read_config
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.state import FILE, History
from melrt_export.training.trainer import Trainer
from melrt_export.training.voice import create_voice

CONFIG = """
run = "run"
[generator]
channels = 32
stacks = 1
[data]
train = "wavs"
held_out = 1
batch = 2
segment = 4096
workers = 0
[losses]
stft = 1.0
mel = 5.0
[discriminator]
channels = 4
layers = 2
[schedule]
steps = {steps}
log_every = 5
validate_every = 10
save_every = 10
"""
# One second of speech must be learned to this share of the initial error.
OVERFIT_STEPS = 300
OVERFIT_SHARE = 0.4
RESUME_TOLERANCE = 1e-6
# Two processes sum a gradient in another order than one process. The float32 rounding is relative to the largest gradient of a tensor.
GRADIENT_TOLERANCE = 1e-4
KILLS = 10
WATCHDOG = 120
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread_in_children(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread in the processes of a test, too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a config and three seconds of speech in three files."""
    audio = read_audio(RECORDING, 22050)
    (tmp_path / "wavs").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "wavs" / f"{i}.wav", audio[22050 * (i + 1) : 22050 * (i + 2)], 22050)
    write_config(tmp_path, steps=20)
    return tmp_path


def write_config(folder: Path, steps: int, *changes: tuple[str, str], name: str = "x.toml") -> TrainingConfig:
    text = CONFIG.format(steps=steps)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)
    return read_config(folder / name)


def header(run: Path) -> dict:
    with safe_open(run / FILE, "np") as file:
        return json.loads(file.metadata()["melrt"])


def test_generator_overfits_one_second(folder: Path) -> None:
    """Training and validation use the same second, and only the spectral losses, with which a training makes fast progress."""
    (folder / "one.txt").write_text("wavs/1.wav\n")
    one = ('train = "wavs"', 'train = "one.txt"\nvalidation = "one.txt"')
    config = write_config(
        folder,
        OVERFIT_STEPS,
        one,
        ("[losses]", "[losses]\nadversarial = 0\nfeature_matching = 0"),
        ("[schedule]", "[optimizer]\nlearning_rate = 2e-3\n[schedule]"),
        ("validate_every = 10", "validate_every = 300"),
        ("channels = 32", "channels = 64"),
    )
    result = Trainer(config).run()
    (_, before), (_, after) = result.history.errors
    assert before > 1, "an untrained generator is far from speech"
    assert after < OVERFIT_SHARE * before
    assert load_checkpoint(result.best).config == config.generator


def test_multi_band_voice_trains_from_random_weights(folder: Path) -> None:
    bands = ("stacks = 1", "stacks = 1\nupsample_scales = [8, 4, 2]\nout_channels = 4\npqmf_taps = 62")
    result = Trainer(write_config(folder, 20, bands)).run()
    (_, before), *_, (_, after) = result.history.errors
    assert after < before
    trained = load_checkpoint(result.best)
    assert (trained.config.subbands, trained.config.hop) == (4, 256)
    assert np.array_equal(trained.weights["pqmf.weight"], FilterDesign().filters(4)), "the filters are not trained"


def test_resumed_run_equals_an_uninterrupted_one(folder: Path) -> None:
    """With an average of the weights, and discriminators that begin after the stop: `best` begins again, at the same step in both."""
    late = ("stft = 1.0", "stft = 1.0\ndiscriminator_from = 15\nadversarial_from = 25")
    average = ("[schedule]", "[optimizer]\naverage = 0.9\n[schedule]")
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


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "melrt", "train", *map(str, arguments)]


def test_two_processes_compute_the_gradients_of_one(folder: Path) -> None:
    """Adam's first moment after one step is half the gradient, so the saved states of two whole trainings show their gradients."""
    alone = write_config(folder, 1, ("batch = 2", "batch = 4"), ('run = "run"', 'run = "alone"'))
    Trainer(alone).run()
    write_config(folder, 1, ("batch = 2", "batch = 4"), ('run = "run"', 'run = "both"\n[machine]\ndevice = "cpu"'), name="both.toml")
    text = (folder / "both.toml").read_text()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        command(folder / "both.toml", launcher=launcher), env=ENVIRONMENT, capture_output=True, text=True, timeout=WATCHDOG, check=False
    )
    assert done.returncode == 0, done.stderr + text
    one, two = (load_file(folder / name / FILE) for name in ("alone", "both"))
    moments = [name for name in one if name.endswith(".exp_avg")]
    assert {name.partition(".")[0] for name in moments} == {"generator_optimizer", "discriminator_optimizer"}
    for name in moments:
        largest = np.abs(one[name]).max()
        assert np.abs(one[name] - two[name]).max() <= GRADIENT_TOLERANCE * largest + 1e-7, name
    assert sum(np.abs(one[name]).max() > 0 for name in moments) > 0.9 * len(moments)


RESUME = """
import torch
from pathlib import Path
from melrt_export.training.config import read_config
from melrt_export.training.trainer import Trainer
torch.set_num_threads(1)
Trainer(read_config(Path({path!r})), resume=True).run()
"""


def test_run_killed_while_writing_can_be_resumed(folder: Path) -> None:
    """Every step saves the state, so a process spends most of its time on writing. It is killed at a random moment."""
    config = write_config(folder, 100_000, ("save_every = 10", "save_every = 1"), ("validate_every = 10", "validate_every = 3"))
    run = Path(config.run)
    Trainer(config).run(until=1)
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
    resumed = Trainer(config, resume=True)
    assert resumed.history.step == step
    resumed.run(until=step + 1)
    assert {path.name for path in run.iterdir()} == {FILE, "best", "last"}, "leftovers are removed"


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


def test_what_a_training_keeps_is_exported(folder: Path, melrt) -> None:
    """The average of two steps is the mean of `step-1` and `step-2`, because it begins as a plain mean."""
    average = ("[schedule]", "[optimizer]\naverage = 0.999\n[schedule]\nkeep_every = 1\nkeep = 2")
    trainer = Trainer(write_config(folder, 2, average))
    result = trainer.run()
    run = result.best.parent
    one, two, mean = (layer_magnitude(run / name) for name in ("step-1", "step-2", "step-2-average"))
    assert np.allclose(mean, (one + two) / 2, rtol=0, atol=1e-7)
    assert np.abs(one - two).max() > 1e-5
    assert np.array_equal(two, layer_magnitude(run / "last"))
    code, out, err = melrt("export", run, "--from", "2-average", "-o", folder / "a.melrt")
    assert (code, "Exported the voice" in out) == (0, True), err
    state = load_checkpoint(run)
    assert all(np.array_equal(state.weights[name], weight) for name, weight in load_checkpoint(run / "last").weights.items())
    Trainer(write_config(folder, 3, average), resume=True).run()
    assert {path.name for path in run.glob("step-*")} == {f"step-{n}{kind}" for n in (2, 3) for kind in ("", "-average")}
    code, _, err = melrt("export", run, "--from", "1", "-o", folder / "b.melrt")
    assert (code, "has no checkpoint step-1; it has best, last, last-average, step-2" in err) == (2, True), err


def layer_magnitude(checkpoint: Path) -> np.ndarray:
    """Return the norms of the first layer's filters, which weight norm trains as one parameter."""
    return np.sqrt((load_checkpoint(checkpoint).weights["first.weight"].astype(np.float64) ** 2).sum(axis=(1, 2)))


def test_best_begins_again_with_the_discriminators() -> None:
    history = History(20, [(0, 2.0, 40.0), (10, 0.2, 4.0), (20, 0.3, 6.0)], begin=20)
    assert history.best == (10, 0.2)
    history.validations.append((30, 0.5, 9.0))
    assert history.best == (30, 0.5), "the first validation with the discriminators' terms competes with no earlier one"
    history.validations.append((40, 0.6, 8.0))
    assert history.best == (40, 0.6), "the error is compared, not the log-mel"
    assert replace(history, begin=0).best == (10, 0.2)


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


def test_fine_tuning_never_ends_worse_than_it_began(folder: Path) -> None:
    trained = Trainer(write_config(folder, 20)).run()
    start = ('run = "run"\n[generator]\nchannels = 32\nstacks = 1', 'run = "fine"\nstart_from = "run/best"')
    rate = ("[schedule]", "[optimizer]\nlearning_rate = 0.5\n[schedule]")  # destroys the voice
    tuned = Trainer(write_config(folder, 10, start, rate)).run()
    first, last = tuned.history.errors[0], tuned.history.errors[-1]
    assert first[1] == pytest.approx(trained.history.best[1], rel=1e-4)
    assert last[1] > first[1]
    before, after = load_checkpoint(trained.best), load_checkpoint(tuned.best)
    assert all(np.allclose(before.weights[name], weight, atol=1e-6) for name, weight in after.weights.items())


def test_fine_tuning_keeps_edges_and_needs_statistics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Trainer(write_config(folder, 1)).voice.checkpoint("original", create_voice(write_config(folder, 1)).generator)
    native.save(folder / "original", replace(checkpoint, edges=Edges(2, 2)))
    start = ('run = "run"\n[generator]\nchannels = 32\nstacks = 1', 'run = "fine"\nstart_from = "original"')
    assert load_checkpoint(Trainer(write_config(folder, 1, start)).run().best).edges == Edges(2, 2)
    lacking = replace(checkpoint, lacks_statistics=True)
    monkeypatch.setattr("melrt_export.training.voice.load_checkpoint", lambda _: lacking)
    with pytest.raises(TrainingError, match="put its stats.h5 or stats.npy beside it"):
        create_voice(write_config(folder, 1, start))


def test_hifigan_is_not_trained_against_melgan_s_discriminators(folder: Path) -> None:
    shape = GeneratorConfig.from_dict(
        {"channels": 32, "padding_mode": "zeros", "mrf": {"kernel_sizes": [3], "dilations": [[1]], "paired": False}}
    )
    config = replace(write_config(folder, 1), generator=shape)
    native.save(folder / "hifigan", create_voice(config).checkpoint("x", create_voice(config).generator))
    start = ('run = "run"\n[generator]\nchannels = 32\nstacks = 1', 'run = "fine"\nstart_from = "hifigan"')
    with pytest.raises(TrainingError, match="is a HiFi-GAN, which was trained against other discriminators"):
        Trainer(write_config(folder, 1, start))
    spectral = ("[losses]", "[losses]\nadversarial = 0\nfeature_matching = 0")
    assert Trainer(write_config(folder, 1, start, spectral)).run().finished


def test_extra_loss_sees_every_batch(folder: Path) -> None:
    seen = []

    def distance(batch) -> torch.Tensor:
        seen.append(tuple(batch.mel.shape))
        return (batch.output - batch.recording).square().mean()

    Trainer(write_config(folder, 3), extra={"distance": distance}).run()
    assert seen == [(2, 80, 16)] * 3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_reduces_the_error(folder: Path, precision: str) -> None:
    config = write_config(folder, 20, ("[schedule]", f'[machine]\nprecision = "{precision}"\n[schedule]'))
    errors = Trainer(config).run().history.errors
    assert errors[-1][1] < errors[0][1]
    assert Trainer(config, resume=True).history.step == 20


def test_loss_that_is_not_finite_is_not_saved(folder: Path) -> None:
    config = write_config(folder, 20)
    trainer = Trainer(config, extra={"broken": lambda s: s.output.mean() * (float("nan") if trainer.history.step > 12 else 1.0)})
    with pytest.raises(TrainingError, match=r"after 15 steps the \w+ loss is nan.*Lower the learning rates"):
        trainer.run()
    assert header(folder / "run")["step"] == 10


def test_too_little_gpu_memory_is_reported(folder: Path) -> None:
    def greedy(_synthesis) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(TrainingError, match="does not hold a step of 2 segments of 4096 samples; set a smaller batch"):
        Trainer(write_config(folder, 20), extra={"greedy": greedy}).run()


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


def test_settings_that_do_not_fit_together_are_reported(folder: Path, melrt) -> None:
    normalization = f"[mel.normalization]\nmean = {[0.0] * 80}\nscale = {[1.0] * 80}\n[schedule]"
    cases = {
        ("stacks = 1", "stacks = 1\nupsample_scales = [8, 8]"): "must have 1 channel, or sub-bands with pqmf_taps, and the mel's hop, 256",
        ("segment = 4096", "segment = 5000"): r"segment is 5000; it must be a multiple of the hop 256 and at least \d+. Set it to 5120",
        ("stacks = 1", "stacks = 1\nin_channels = 40"): "in_channels is 40",
        ("[schedule]", normalization): "Remove the normalization",
        ("stacks = 1", "stacks = 1\npqmf_taps = 40\nout_channels = 4"): "designed for 4 sub-bands and 62 taps",
    }
    for change, message in cases.items():
        with pytest.raises(TrainingError, match=message):
            Trainer(write_config(folder, 20, change))
    with pytest.raises(TrainingError, match="batch is 2, divided among 3 processes; it must be a multiple of 3"):
        Trainer(write_config(folder, 20), processes=ProcessGroup(torch.device("cpu"), 0, 3))
    (folder / "there.melrt").mkdir()
    code, _, err = melrt("train", folder / "x.toml", "--export", folder / "there.melrt")
    assert (code, "Choose another --export path" in err) == (2, True)
    code, _, err = melrt("train", folder / "x.toml", "--resume")
    assert (code, "nothing to resume" in err) == (2, True)
    if not torch.cuda.is_available():
        write_config(folder, 20, ("[schedule]", '[machine]\ndevice = "cuda"\n[schedule]'))
        code, _, err = melrt("train", folder / "x.toml")
        assert (code, "finds 0 GPUs" in err) == (2, True)
