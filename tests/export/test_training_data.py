"""Configuration files, recordings that cannot be used, and segments that do not depend on how they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from melrt.errors import ConfigError, TrainingError
from melrt_export.training.config import RENAMED, DataConfig, TrainingConfig, read_config
from melrt_export.training.recordings import Corpus, find_corpus, list_files
from melrt_export.training.segments import BatchSampler, SegmentDataset, load_batches

RATE = 8000
SEGMENT = 2048


def tone(hertz: float, samples: int = 9000, level: float = 0.4) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of five usable files. Each is a tone whose frequency identifies it."""
    (tmp_path / "wavs" / "more").mkdir(parents=True)
    for i in range(5):
        where = tmp_path / "wavs" / ("more" if i % 2 else ".") / f"u{i}.{'flac' if i == 2 else 'wav'}"
        soundfile.write(where, tone(100 * (i + 1), level=0.1 * (i + 1)), RATE)
    return tmp_path / "wavs"


def data(folder: Path, **values) -> DataConfig:
    return DataConfig(str(folder), **{"segment": SEGMENT, "batch": 4, "workers": 0, "held_out": 2} | values)


def read(corpus: Corpus, config: DataConfig, sampler: BatchSampler, seed: int = 0) -> list[torch.Tensor]:
    return list(load_batches(SegmentDataset(corpus.train, config, RATE, seed), sampler, pinned=False))


def test_segments_depend_on_seed_and_number_alone(folder: Path) -> None:
    config = data(folder)
    corpus = find_corpus(config, RATE)
    whole = read(corpus, config, BatchSampler(4, 0, 1, 0, 6))
    assert [batch.shape for batch in whole] == [(4, SEGMENT)] * 6
    assert torch.equal(torch.stack(whole), torch.stack(read(corpus, config, BatchSampler(4, 0, 1, 0, 6))))
    assert not torch.equal(whole[0], read(corpus, config, BatchSampler(4, 0, 1, 0, 1), seed=1)[0])
    assert torch.equal(torch.stack(whole[4:]), torch.stack(read(corpus, config, BatchSampler(4, 0, 1, 4, 6)))), "resumed after four steps"
    halves = [read(corpus, data(folder, workers=1), BatchSampler(4, rank, 2, 0, 6)) for rank in range(2)]
    assert torch.equal(torch.stack(whole), torch.cat([torch.stack(half) for half in halves], 1)), "two processes, with workers"
    assert len({segment.numpy().tobytes() for batch in whole for segment in batch}) == 24


def test_each_epoch_uses_every_recording_once_at_its_gain(folder: Path) -> None:
    config = data(folder, gain=(0.5, 1.0), peak=0.8)
    corpus = find_corpus(config, RATE)
    assert len(corpus.train) == 3
    assert len(corpus.validation) == 2
    segments = SegmentDataset(corpus.train, config, RATE, 0)
    for epoch in range(4):
        parts = [segments[3 * epoch + i].numpy() for i in range(3)]
        tones = [round(np.argmax(np.abs(np.fft.rfft(x))) * RATE / SEGMENT, -2) for x in parts]
        assert len(set(tones)) == 3
        assert all(0.8 * 0.5 - 1e-3 <= np.abs(x).max() <= 0.8 + 1e-3 for x in parts)
    unscaled = SegmentDataset(corpus.train, data(folder, gain=(1.0, 1.0), peak=0.0), RATE, 0)
    assert sorted(round(float(np.abs(unscaled[i].numpy()).max()), 2) for i in range(3)) == [0.1, 0.2, 0.4], "the levels of the files"


def test_lists_of_files_and_separate_validation(folder: Path) -> None:
    (folder.parent / "list.txt").write_text("wavs/u0.wav\n\nwavs/u2.flac\n")
    (folder.parent / "val.txt").write_text("wavs/u4.wav|Some text.|0\n")
    corpus = find_corpus(data(folder.parent / "list.txt", validation=str(folder.parent / "val.txt")), RATE)
    assert [r.path.name for r in corpus.train] == ["u0.wav", "u2.flac"]
    assert [r.path.name for r in corpus.validation] == ["u4.wav"]
    (folder.parent / "metadata.csv").write_text("u0|Text of Mr. X.|Text of Mister X.\nu4|More|More\n")
    assert list_files(folder.parent / "metadata.csv") == [folder / "u0.wav", folder / "u4.wav"]


def test_recordings_are_resampled_and_mixed(folder: Path) -> None:
    high = np.sin(2 * np.pi * 300 * np.arange(40000) / 16000).astype(np.float32)
    soundfile.write(folder / "a-high.wav", np.stack([high, high], 1) * 0.3, 16000)
    config = data(folder, held_out=5, gain=(1.0, 1.0))
    corpus = find_corpus(config, RATE)
    (recording,) = corpus.train
    assert (recording.path.name, recording.rate, recording.samples) == ("a-high.wav", 16000, 20000)
    segment = SegmentDataset(corpus.train, config, RATE, 0)[0].numpy()
    spectrum = np.abs(np.fft.rfft(segment * np.hanning(SEGMENT)))
    assert abs(np.argmax(spectrum) * RATE / SEGMENT - 300) < 5
    assert np.abs(segment).max() == pytest.approx(0.95, abs=0.01)


@pytest.fixture
def bad_files(folder: Path) -> dict[str, str]:
    """Write files that cannot be used as they are, and return the setting that decides the treatment of each."""
    soundfile.write(folder / "bad-rate.wav", tone(200), 16000)
    soundfile.write(folder / "bad-stereo.wav", np.stack([tone(200)] * 2, 1), RATE)
    soundfile.write(folder / "bad-short.wav", tone(200, SEGMENT - 1), RATE)
    soundfile.write(folder / "bad-silent.wav", np.zeros(9000, np.float32), RATE)
    soundfile.write(folder / "bad-nan.wav", np.full(9000, np.nan, np.float32), RATE, subtype="FLOAT")
    (folder / "bad-corrupt.wav").write_bytes(b"RIFF\x00\x00no sound")
    return {
        "bad-rate": "wrong_rate", "bad-stereo": "stereo", "bad-short": "too_short",
        "bad-silent": "unusable", "bad-nan": "unusable", "bad-corrupt": "unusable",
    }  # fmt: skip


def test_unusable_files_are_skipped_or_refused_by_name(folder: Path, bad_files: dict[str, str]) -> None:
    skipping = dict.fromkeys(bad_files.values(), "skip")
    corpus = find_corpus(data(folder, **skipping), RATE)
    assert len(corpus.train) + len(corpus.validation) == 5
    for name in bad_files:
        assert any(name in text for text in corpus.skipped), name
    for name, setting in bad_files.items():
        with pytest.raises(TrainingError, match=rf'{name}.*{setting} = "skip"'):
            find_corpus(data(folder, **{**skipping, setting: "refuse"}), RATE)


def test_missing_recordings_are_reported(folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    (folder.parent / "gone.txt").write_text("wavs/gone.wav\n")
    cases = {"nowhere": "neither a folder", "empty": "no .wav", "gone.txt": r"held_out"}
    for name, message in cases.items():
        with pytest.raises(TrainingError, match=message):
            find_corpus(data(folder.parent / name), RATE)
    with pytest.raises(TrainingError, match=r"gone\.wav.*Fix or remove"):
        find_corpus(data(folder.parent / "gone.txt", validation=str(folder)), RATE)
    with pytest.raises(TrainingError, match=r"no usable file for training.*u0\.wav has 9000 samples"):
        find_corpus(data(folder, segment=16384), RATE)


def test_file_deleted_during_training_is_reported(folder: Path) -> None:
    config = data(folder, workers=1)
    corpus = find_corpus(config, RATE)
    (folder / "u0.wav").unlink()
    with pytest.raises(TrainingError, match=r"^\S*u0\.wav cannot be read.*Restore the file and resume"):
        read(corpus, config, BatchSampler(4, 0, 1, 0, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('run = "r', "is not a TOML file"),
        ('run = "r"', "data is missing"),
        ('run = "r"\ncolor = 1\n[data]\ntrain = "x"', "color is not a setting here; the settings are run, data"),
        ('run = "r"\n[data]\ntrain = "x"\nsegmnt = 1', r"\[data\]: segmnt is not a setting here"),
        ('run = "r"\n[data]\nsegment = 8192', r"\[data\]: train is missing"),
        ('run = "r"\n[data]\ntrain = "x"\nsegment = "8192"', "segment is '8192'; it must be a whole number"),
        ('run = "r"\n[data]\ntrain = "x"\nsegment = 12', "segment is 12; it must be a whole number from 256"),
        ('run = "r"\n[data]\ntrain = "x"\nstereo = "left"', "stereo is 'left'; it must be one of mix, skip, refuse"),
        ('run = "r"\n[data]\ntrain = "x"\ngain = [0.5]', r"gain is \(0.5,\); it must be a list of 2 values"),
        ('run = "r"\n[data]\ntrain = "x"\ngain = [0, 2]', r"gain is \(0.0, 2.0\); .* each a finite number above 0 and at most 1"),
        ('run = "r"\n[data]\ntrain = "x"\ngain = [1, 0.5]', "the smaller factor must come first"),
        ('run = "r"\ndata = 3', "3; it must be a table"),
        ('run = "r"\n[data]\ntrain = "x"\n[generator]\nchannels = 0', r"\[generator\]: generator: channels is 0"),
        ('run = "r"\n[data]\ntrain = "x"\n[mel]\nhop = true', r"\[mel\]: mel convention: hop is True"),
        ('run = "r"\nstart_from = "x"\n[data]\ntrain = "x"\n[mel]\nhop = 256', r"Remove \[mel\]"),
        ('run = "r"\n[data]\ntrain = "x"\n[losses]\nadversarial = 0\nfeature_matching = 0', "nothing can be trained"),
        ('run = "r"\n[data]\ntrain = "x"\n[losses]\nstft = nan', "stft is nan"),
        ('run = "r"\n[data]\ntrain = "x"\n[losses]\nstft = 1\ndiscriminator_from = 5', "before discriminator_from"),
        ('run = "r"\n[data]\ntrain = "x"\n[losses]\nadversarial_from = 5', "earlier steps have no loss"),
        ('run = "r"\n[data]\ntrain = "x"\n[optimizer]\nlearning_rate = 0', "learning_rate is 0"),
        ('run = "r"\n[data]\ntrain = "x"\n[optimizer]\nbetas = [0.5, 1]', "each a finite number at least 0 and below 1"),
        ('run = "r"\n[data]\ntrain = "x"\n[discriminator]\nchannels = 6', "multiple of 4"),
        ('run = "r"\n[data]\ntrain = "x"\n[discriminator]\nmax_channels = 510', "max_channels is 510; it must be a multiple of 4"),
        ('run = "r"\n[data]\ntrain = "x"\n[optimizer]\nmilestones = [5, 2]', "in ascending order"),
        ('run = "r"\n[data]\ntrain = "x"\n[optimizer]\ngradient_limit = -1', "gradient_limit is -1"),
        ('run = "r"\n[data]\ntrain = "x"\n[schedule]\nlog_every = 0', "log_every is 0"),
        (f'run = "r"\n[data]\ntrain = "x"\n[{next(iter(RENAMED))}]\nvoice = "v"', "is now quantization"),
    ],
)
def test_wrong_config_is_reported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(tmp_path / "x.toml")
    assert str(caught.value).startswith(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("recipe", sorted((Path(__file__).parents[2] / "docs/recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe: Path) -> None:
    config = read_config(recipe)
    if recipe.stem == "melgan-neurips":
        published = TrainingConfig("", DataConfig(""))
        sections = ("generator", "mel", "discriminator", "losses", "optimizer")
        assert [getattr(config, name) == getattr(published, name) for name in sections] == [True] * 5, (
            "the defaults are the published values"
        )


def test_paths_in_a_config_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('run = "runs/x"\n[data]\ntrain = "wavs"\n[generator]\nupsample_scales = [8, 8, 4]\n')
    config = read_config(tmp_path / "x.toml")
    assert (config.run, config.data.train, config.start_from) == (str(tmp_path / "runs/x"), str(tmp_path / "wavs"), "")
    assert config.generator.upsample_scales == (8, 8, 4)
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        read_config(tmp_path / "nowhere.toml")
