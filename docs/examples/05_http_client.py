"""A client of `melrt serve http demo/lj.melrt`: a whole mel over HTTP, and the same mel streamed over WebSocket."""

import json
import sys
import urllib.request
import wave
from pathlib import Path

import numpy as np
from websockets.sync.client import connect

address = sys.argv[1] if len(sys.argv) > 1 else "localhost:8080"
mel = np.load("demo/mel.npy")

with urllib.request.urlopen(f"http://{address}/v1/speech?voice=lj", data=Path("demo/mel.npy").read_bytes()) as answer:
    Path("demo/http.wav").write_bytes(answer.read())

with connect(f"ws://{address}/v1/stream?voice=lj") as stream, wave.open("demo/http_stream.wav", "wb") as wav:
    facts = json.loads(stream.recv())
    wav.setparams((1, 2, facts["sample_rate"], 0, "NONE", ""))
    for start in range(0, mel.shape[1], 16):  # as an acoustic model would produce them
        stream.send(mel[:, start : start + 16].T.astype("<f4").tobytes())
    stream.send("end")
    while isinstance(message := stream.recv(), bytes):  # audio; then JSON, which ends the stream or says what was wrong
        wav.writeframes(message)
print("Wrote demo/http.wav and demo/http_stream.wav.", message)
