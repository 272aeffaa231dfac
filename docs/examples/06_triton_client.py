"""Send a mel to a Triton server and receive its audio."""

import numpy as np
import tritonclient.http as triton

from melrt import write_wav

SERVER = "localhost:8000"

mel = np.load("demo/mel.npy")
given = triton.InferInput("mel", list(mel.shape), "FP32").set_data_from_numpy(mel)
try:
    audio = triton.InferenceServerClient(SERVER).infer("lj", [given]).as_numpy("audio")
except OSError as error:
    raise SystemExit(f"No Triton server answers at {SERVER} ({error}). Start one as docs/serving.md describes.") from None
write_wav("demo/triton.wav", audio, 22050)
