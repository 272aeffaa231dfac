"""Trainer and `melrt train`: learning, several processes, what a run keeps, and error messages."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tests.export.training.runs import ENVIRONMENT, WATCHDOG, command, header, write_config

from melrt.errors import TrainingError
from melrt.planning.edges import Edges
from melrt_export.checkpoints import load_checkpoint, native
from melrt_export.generator.config import GeneratorConfig
from melrt_export.generator.pqmf import FilterDesign
from melrt_export.training.distributed import ProcessGroup
from melrt_export.training.state import FILE, History
from melrt_export.training.trainer import Trainer
from melrt_export.training.voice import create_voice

# One second of speech must be learned to this share of the initial error.
OVERFIT_STEPS = 300
OVERFIT_SHARE = 0.4
# Two processes sum a gradient in another order than one process. The float32 rounding is relative to the largest gradient of a tensor.
GRADIENT_TOLERANCE = 1e-4


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
        assert (code, "finds no GPU" in err) == (2, True)
