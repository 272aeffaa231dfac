"""Stream audio while an acoustic model still produces frames, from a thread and from asyncio."""

import asyncio

import numpy as np

from melrt import StreamPace, Vocoder

mel = np.load("demo/mel.npy")


def acoustic_model():
    """Produce 20 frames at a time, as an autoregressive model would."""
    for start in range(0, mel.shape[1], 20):
        yield mel[:, start : start + 20]


async def stream_in_asyncio(vocoder: Vocoder) -> int:
    """Consume a stream without blocking the event loop."""
    return sum([len(piece) async for piece in vocoder.stream_async(acoustic_model())])


with Vocoder.load("demo/lj.melrt") as vocoder:
    pieces = list(vocoder.stream(acoustic_model(), StreamPace(first=4)))
    print(f"{len(pieces)} pieces, the first of {len(pieces[0]) / vocoder.sample_rate:.3f} s")
    difference = np.abs(np.concatenate(pieces) - vocoder(mel)).max()
    print(f"largest difference from the whole utterance: {difference:.1e}")
    print(f"{asyncio.run(stream_in_asyncio(vocoder))} samples from asyncio")
