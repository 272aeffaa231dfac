"""Synthesize a WAV from a mel, and from a mel of another convention."""

from dataclasses import replace

import numpy as np

from melrt import Vocoder, convert_mel, write_wav

with Vocoder.load("demo/lj.melrt") as vocoder:
    print(vocoder)
    mel = np.load("demo/mel.npy")
    audio = vocoder(mel)  # (80, T) -> (T * 256,), float32 in [-1, 1]
    write_wav("demo/speech.wav", audio, vocoder.sample_rate)

    # An acoustic model that was trained with natural logarithms needs one conversion, which is exact.
    natural = replace(vocoder.spec, log="ln")
    other_mel = convert_mel(mel, source=vocoder.spec, target=natural)
    same = vocoder(convert_mel(other_mel, source=natural, target=vocoder.spec))
    print(f"largest difference after conversion: {np.abs(same - audio).max():.1e}")
