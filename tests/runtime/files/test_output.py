"""Output: pieces equal the whole for every rate and encoding, a telephone stream, quality of resampling and of G.711, clipping."""

from __future__ import annotations

import asyncio
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.runtime.reference import speech_mel

from melrt import Bundle, ConfigError, MissingExtraError, Options, Output, Vocoder, read_audio
from melrt.files.audio import ENCODINGS, resample, write_audio
from melrt.files.output import Encoder
from melrt_export.assets import RECORDING

RATES = (8000, 16000, 22050, 24000, 44100, 48000)
SAMPLES = [encoding for encoding in ENCODINGS if encoding not in ("flac", "opus")]


@pytest.fixture(scope="module")
def vocoder(tiny_bundle_path: Path) -> Vocoder:
    return Vocoder.load(tiny_bundle_path)


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return read_audio(RECORDING, 22050)


def encoded(audio: np.ndarray, output: Output) -> np.ndarray:
    return Encoder(output, 22050, lambda _: None)(audio)


def expand(codes: np.ndarray, law: str) -> np.ndarray:
    """Decode G.711 by the formulas of the recommendation, to full scale 1; the samples are written without libsndfile."""
    codes = (~codes if law == "mulaw" else codes ^ 0x55).astype(np.int32) & 0xFF
    exponent, mantissa = (codes >> 4) & 7, codes & 15
    if law == "mulaw":
        size, negative = (((mantissa << 3) + 0x84) << exponent) - 0x84, codes >= 128
    else:
        size = np.where(exponent, ((mantissa << 4) + 0x108) << np.maximum(exponent - 1, 0), (mantissa << 4) + 8)
        negative = codes < 128
    return np.where(negative, -size, size) / 32768


def snr(reference: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((reference - other) ** 2).sum()))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("encoding", SAMPLES)
def test_pieces_equal_the_whole(vocoder: Vocoder, rate: int, encoding: str) -> None:
    mel, output = speech_mel(vocoder.bundle, 90), Output(rate, encoding)  # type: ignore[arg-type]
    whole = vocoder(mel, output)
    assert len(whole) == round(90 * 256 * rate / 22050)
    assert len(np.unique(whole)) > 100
    for size in (1, 7, 64):
        pieces = [mel[:, start : start + size] for start in range(0, 90, size)]
        streamed = np.concatenate(list(vocoder.stream(pieces, output=output)))
        assert streamed.dtype == whole.dtype
        assert np.array_equal(streamed, whole)


def test_any_cut_of_the_samples_gives_the_same(speech: np.ndarray, noise: np.random.Generator) -> None:
    for rate in RATES:
        encoder, output = Encoder(Output(rate), 22050, lambda _: None), []
        cuts = np.sort(noise.integers(0, len(speech), 60))
        for piece in np.split(speech, cuts):
            output.append(encoder(piece, last=False))
        output.append(encoder(speech[:0]))
        assert np.array_equal(np.concatenate(output), encoded(speech, Output(rate)))


def test_every_call_takes_an_output(vocoder: Vocoder) -> None:
    mels = [speech_mel(vocoder.bundle, 30, seed) for seed in range(2)]
    output = Output(8000, "alaw")
    expected = [encoded(vocoder(mel), output) for mel in mels]

    async def both() -> list[np.ndarray]:
        called = await vocoder.call_async(mels[0], output)
        return [called, np.concatenate([piece async for piece in vocoder.stream_async([mels[1]], output=output)])]

    for results in (vocoder.batch(mels, output), vocoder(np.stack(mels), output), [vocoder.submit(mel, output).result() for mel in mels],
                    asyncio.run(both())):  # fmt: skip
        for audio, wanted in zip(results, expected, strict=True):
            assert np.array_equal(audio, wanted)
    assert vocoder(mels[0], Output()).dtype == np.float32
    assert np.array_equal(vocoder(mels[0], Output()), vocoder(mels[0]))


def test_a_voice_of_16_bits_is_encoded_from_them(vocoder: Vocoder) -> None:
    mel = speech_mel(vocoder.bundle, 30)
    with Vocoder.load(vocoder.bundle, options=Options(sample_format="int16")) as short:
        samples = short(mel)
        assert samples.dtype == np.int16
        assert np.abs(short(mel, Output()) - samples / 32767).max() < 1e-7
        assert np.array_equal(short(mel, Output(8000, "mulaw")), encoded(samples, Output(8000, "mulaw")))
        assert snr(vocoder(mel, Output(8000)), short(mel, Output(8000))) > 60


def test_telephone_stream(vocoder: Vocoder) -> None:
    """8 kHz mu-law: the samples are those of the voice, later by at most the stated latency."""
    mel, output = speech_mel(vocoder.bundle, 120), Output(8000, "mulaw")
    sent, plain, delays = [], 0, []
    with vocoder.open_stream(output=output) as line, vocoder.open_stream() as reference:
        for start in range(0, 120, 4):
            sent.append(line.push(mel[:, start : start + 4]))
            plain += len(reference.push(mel[:, start : start + 4]))
            delays.append(plain / 22050 - sum(map(len, sent)) / 8000)
        sent.append(line.flush())
    latency = output.latency(22050)
    assert 0.07 < latency < 0.09
    assert 0.03 < max(delays) <= latency
    received, expected = expand(np.concatenate(sent), "mulaw"), np.clip(resample(vocoder(mel), 22050, 8000), -1, 1)
    assert snr(expected, received) > 30


@pytest.mark.parametrize("law", ["mulaw", "alaw"])
def test_g711_keeps_speech(speech: np.ndarray, law: str) -> None:
    output = Output(8000, law)  # type: ignore[arg-type]
    codes, exact = encoded(speech, output), encoded(speech, Output(8000))
    assert 36 < snr(exact, expand(codes, law)) < 42


def test_resampling_keeps_the_band_and_removes_the_rest() -> None:
    time = np.arange(22050) / 22050
    middle = slice(2000, 6000)
    for frequency in (100, 1000, 3400, 3600, 4400, 5500, 8000, 10_500):
        tone = (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)
        level = 20 * np.log10(encoded(tone, Output(8000))[middle].std() / tone.std() + 1e-9)
        assert abs(level) < 0.02 if frequency < 3700 else level < -130, (frequency, level)


@pytest.mark.parametrize(("encoding", "rate", "quality"), [("flac", None, 60), ("opus", 24000, 8), ("mulaw", 8000, 30)])
def test_files_hold_the_audio(tmp_path: Path, speech: np.ndarray, encoding: str, rate: int | None, quality: float) -> None:
    output = Output(rate, encoding)  # type: ignore[arg-type]
    resampled = encoded(speech, Output(rate))
    path = tmp_path / f"x{output.file_kind.suffix}"
    assert write_audio(path, np.array_split(resampled, 9), rate or 22050, output.encoding) == 0
    written, written_rate = soundfile.read(path)
    assert written_rate == (rate or 22050)
    assert snr(resampled, written) > quality
    if output.makes_file:
        whole, _ = soundfile.read(io.BytesIO(encoded(speech, output).tobytes()))
        assert np.array_equal(whole, written)


def test_clipping_is_counted(tiny_bundle: Bundle, speech: np.ndarray, tmp_path: Path) -> None:
    with Vocoder.load(tiny_bundle) as vocoder:  # the network ends in tanh; resampling its loud noise overshoots
        mel = speech_mel(tiny_bundle, 200)
        over = int((np.abs(vocoder(mel, Output(48000))) > 1).sum())
        assert over > 0
        assert vocoder.stats().clipped == 0
        assert np.abs(vocoder(mel, Output(48000, "int16"))).max() == 32767
        for _ in vocoder.stream([mel], output=Output(48000, "mulaw")):
            pass
        assert vocoder.stats().clipped == 2 * over
    loud = 3 * speech
    assert write_audio(tmp_path / "x.wav", np.array_split(loud, 3), 22050, "int16") == (np.abs(loud) > 1).sum() > 0


def test_an_encoder_that_fails_ends_its_request(vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vocoder.submit(speech_mel(vocoder.bundle, 30), Output(8000, "mulaw")).result(timeout=20)


def test_outputs_that_are_not_possible_are_refused(vocoder: Vocoder, monkeypatch: pytest.MonkeyPatch) -> None:
    mel = speech_mel(vocoder.bundle, 30)
    with pytest.raises(ConfigError, match="encoding is 'mp3'; it must be one of float32, int16, mulaw, alaw, flac, opus"):
        Output(8000, "mp3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sample_rate is 0; it must be a whole number from 4000"):
        Output(0)
    with pytest.raises(ConfigError, match="Opus does not support 22050 Hz; it supports 8000,"):
        vocoder(mel, Output(encoding="opus"))
    with pytest.raises(ConfigError, match="'opus' makes a whole file and cannot be streamed.*Use one of float32"):
        vocoder.open_stream(output=Output(24000, "opus"))
    with pytest.raises(ConfigError, match=r"Use batch\(\)"):
        vocoder(np.stack([mel, mel]), Output(encoding="flac"))
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingExtraError, match=r'audio needs soxr, .*"melrt\[output\]"'):
        vocoder(mel, Output(8000))
