"""Send a mel to a Triton server and receive its audio; docs/serving.md starts the server."""

import numpy as np
import tritonclient.http as triton

from melrt import write_wav

mel = np.load("demo/mel.npy")
given = triton.InferInput("mel", list(mel.shape), "FP32").set_data_from_numpy(mel)
audio = triton.InferenceServerClient("localhost:8000").infer("lj", [given]).as_numpy("audio")
write_wav("triton.wav", audio, 22050)
