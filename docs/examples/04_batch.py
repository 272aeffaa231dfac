"""Synthesize utterances of mixed lengths in order; their windows share runs without padding."""

import numpy as np

from melrt import Limits, MelError, Options, Vocoder

mel = np.load("demo/mel.npy")
utterances = [mel[:, :40], mel, mel[:, 100:300]]

with Vocoder.load("demo/lj.melrt", options=Options(limits=Limits(max_frames=10_000))) as vocoder:
    for index, audio in enumerate(vocoder.batch(utterances)):
        print(f"utterance {index}: {len(audio) / vocoder.sample_rate:.2f} s")
    # A concurrent.futures.Future: wait for it, `await asyncio.wrap_future(future)`, or cancel it. In asyncio see also call_async.
    future = vocoder.submit(mel)
    print(f"submitted: {len(future.result())} samples")
    try:
        vocoder(mel[:40])
    except MelError as error:
        print(f"refused: {error}")
    print(f"{vocoder.stats().windows} windows in {vocoder.stats().runs} runs")
