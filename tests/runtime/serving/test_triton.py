"""`melrt serve triton` writes a repository with which a real Triton server gives the audio of `Vocoder`."""

from __future__ import annotations

import io
import queue
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tritonclient.grpc as grpc
import tritonclient.http as http
from google.protobuf import text_format
from tests.runtime.serving.triton_server import Server, is_installed, serve
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import InferenceServerException

from melrt import Output
from melrt.bundle import Bundle
from melrt.planning.edges import Edges
from melrt.serving.triton.repository import add_voice, use_version
from melrt.serving.triton.voice import ServingConfig, open_voice, warm_up_mel
from melrt.vocoder import Vocoder

# The server computes the same audio with another NumPy and perhaps other windows.
ROUNDING = 1e-5
MAX_FRAMES = 40_000  # seconds of work for the small demo voice, so that a client can disconnect in the middle
STREAMS = 4
QUEUE = 16
TIMEOUT = 20.0
ROOT = Path(__file__).parents[3]


def config_of(model: Path) -> pb.ModelConfig:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def test_repository_is_complete_and_keeps_versions(tiny_bundle: Bundle, tmp_path: Path, melrt) -> None:
    repository = tmp_path / "models"
    first = melrt("serve", "triton", tiny_bundle.path, "-o", repository, "--max-queue", 7, "--queue-timeout", 0.5, "--gpus", "0,2")
    assert first[0] == 0
    assert "version 1 of tiny and tiny_stream" in first[1]
    assert melrt("serve", "triton", tiny_bundle.path, "-o", repository, "--format", "int16", "--precision", "fp16")[0] == 0
    for name in ("tiny", "tiny_stream"):
        model = repository / name
        config = config_of(model)
        assert (config.name, config.backend, config.max_batch_size) == (name, "python", 0)
        assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("mel", pb.TYPE_FP32, [80, -1])]
        assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [("audio", pb.TYPE_INT16, [-1])]
        assert config.version_policy.specific.versions == [2]
        for version in ("1", "2"):
            assert {file.name for file in (model / version).iterdir()} == {"model.py", "serving.json", "voice.melrt"}
            copy = Bundle.open(model / version / "voice.melrt")
            assert [copy.read(one) for one in copy.manifest.artifacts] == [tiny_bundle.read(one) for one in tiny_bundle.manifest.artifacts]
            compile((model / version / "model.py").read_text(), "model.py", "exec")
    assert melrt("serve", "version", repository, "tiny", 1)[0] == 0
    config = config_of(repository / "tiny")
    assert config.version_policy.specific.versions == [1]
    assert config.output[0].data_type == pb.TYPE_FP32  # the version keeps the settings that it was added with
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 500_000)
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, [0, 2])
    stream = config_of(repository / "tiny_stream")
    assert stream.model_transaction_policy.decoupled
    assert stream.WhichOneof("scheduling_choice") == "sequence_batching"


def test_outputs_of_a_repository(tiny_bundle: Bundle, tmp_path: Path, melrt) -> None:
    """Clients find rate and encoding in the model's configuration."""
    arguments = "--format", "opus", "--rate", 24000, "--stream-format", "mulaw"
    assert melrt("serve", "triton", tiny_bundle.path, "-o", tmp_path, *arguments)[0] == 0
    for name, encoding in (("tiny", "opus"), ("tiny_stream", "mulaw")):
        config = config_of(tmp_path / name)
        assert config.output[0].data_type == pb.TYPE_UINT8
        assert {key: value.string_value for key, value in config.parameters.items()} == {"encoding": encoding, "sample_rate": "24000"}


def test_a_model_adds_the_frames_of_the_project(tiny_bundle: Bundle, tmp_path: Path) -> None:
    manifest = replace(tiny_bundle.manifest, edges=Edges(0, 10, -5.0))
    (tiny_bundle.path / "manifest.json").write_bytes(manifest.dumps())
    bundle = Bundle.open(tiny_bundle.path)
    arguments = {"model_repository": str(tmp_path / "tiny"), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
    for version, config, expected in ((1, ServingConfig(), manifest.edges), (2, ServingConfig(edges="model"), Edges())):
        assert add_voice(tmp_path, "tiny", bundle, config) == version
        vocoder, _, _ = open_voice({**arguments, "model_version": str(version)}, streams=False)
        with vocoder:
            assert vocoder.edges == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--name", "a/b"), "the voice's name is 'a/b'"),
        (("--name", "lj_stream"), "not end in _stream"),
        (("--max-queue", 0), "max_queue is 0"),
        (("--gpus", "0,x"), "--gpus is '0,x'"),
        (("--format", "mp3"), "encoding is 'mp3'"),
        (("--precision", "fp7"), "precision is 'fp7'"),
        (("--format", "opus"), "Opus does not support 22050 Hz"),
        (("--format", "opus", "--rate", 24000), "cannot be streamed: libsndfile completes an Opus page once a second"),
        (("--format", "flac"), "--stream-format gives the model for streams another encoding"),
    ],
)
def test_wrong_settings_are_refused(tiny_bundle: Bundle, tmp_path: Path, melrt, arguments, complaint: str) -> None:
    code, _, err = melrt("serve", "triton", tiny_bundle.path, "-o", tmp_path / "models", *arguments)
    assert code == 2
    assert complaint in err
    assert not (tmp_path / "models").exists()
    code, _, err = melrt("serve", "version", tmp_path / "models", "tiny", 3)
    assert code == 2
    assert "is not a model in this repository" in err


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, demo_bundle: Bundle) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    serving = ServingConfig(max_frames=MAX_FRAMES, max_streams=STREAMS, max_queue=QUEUE, queue_timeout=TIMEOUT, timeout=TIMEOUT)
    add_voice(folder, "lj", demo_bundle, serving)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Server]:
    if not is_installed():
        pytest.skip("no Triton server in .triton; `make triton` installs one where its wheel is available")
    with serve(repository, repository.parent) as running:
        yield running


@pytest.fixture
def telephone(tmp_path: Path, demo_bundle: Bundle) -> Iterator[Server]:
    if not is_installed("soundfile", "soxr"):
        pytest.skip("no Triton server in .triton whose Python has soundfile and soxr; `make triton` installs one")
    add_voice(tmp_path / "models", "lj", demo_bundle, ServingConfig(sample_rate=16000, encoding="flac", stream_encoding="mulaw"))
    with serve(tmp_path / "models", tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def vocoder(demo_bundle: Bundle) -> Iterator[Vocoder]:
    with Vocoder.load(demo_bundle, device="cpu") as loaded:
        yield loaded


@pytest.fixture
def client(server: Server) -> Iterator[grpc.InferenceServerClient]:
    with grpc.InferenceServerClient(server.grpc) as connected:
        yield connected


@pytest.fixture(scope="module")
def speech(demo_bundle: Bundle) -> np.ndarray:
    """A mel like speech, as long as any test needs: (80, MAX_FRAMES + 1)."""
    probe = warm_up_mel(demo_bundle)
    return np.tile(probe, (1, MAX_FRAMES // probe.shape[1] + 1))[:, : MAX_FRAMES + 1]


def tensor(kind, mel: np.ndarray, name: str = "FP32"):
    return kind.InferInput("mel", list(mel.shape), name).set_data_from_numpy(np.ascontiguousarray(mel))


def metric(server: Server, name: str, model: str = "lj") -> float:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as page:
        rows = [row for row in page.read().decode().splitlines() if row.startswith(f"{name}{{") and f'model="{model}"' in row]
    return sum(float(row.rpartition(" ")[2]) for row in rows)


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + TIMEOUT
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


class StreamClient:
    """A gRPC stream and its responses."""

    def __init__(self, server: Server) -> None:
        self.client = grpc.InferenceServerClient(server.grpc)
        self.responses: queue.Queue = queue.Queue()
        self.client.start_stream(lambda result, error: self.responses.put((result, error)))

    def send(self, mel: np.ndarray, sequence: str, *, start: bool = True, end: bool = True) -> None:
        self.client.async_stream_infer(
            "lj_stream", [tensor(grpc, mel)], sequence_id=sequence, sequence_start=start, sequence_end=end, enable_empty_final_response=True
        )

    def pieces(self) -> list[np.ndarray]:
        """Return the audio of one request, up to its final response."""
        pieces = []
        while True:
            result, error = self.responses.get(timeout=TIMEOUT)
            if error:
                raise error
            if (audio := result.as_numpy("audio")) is not None:
                pieces.append(audio)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return pieces

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


def test_http_and_grpc_give_the_audio_of_vocoder(server: Server, vocoder: Vocoder, speech: np.ndarray) -> None:
    """Send mels of mixed lengths at once; each gets its own audio."""
    lengths = [1200, 1200, 1200, 4, 20, 77, 150, 31, 8, 300, 64, 9]

    def infer(index: int) -> np.ndarray:
        mel, kind = speech[:, index : index + lengths[index]], (http, grpc)[index % 2]
        with kind.InferenceServerClient(server.http if kind is http else server.grpc) as client:
            return client.infer("lj", [tensor(kind, mel)]).as_numpy("audio")

    with ThreadPoolExecutor(len(lengths)) as callers:
        answers = list(callers.map(infer, range(len(lengths))))
    for index, (length, audio) in enumerate(zip(lengths, answers, strict=True)):
        expected = vocoder(speech[:, index : index + length])
        assert audio.dtype == expected.dtype
        assert audio.shape == expected.shape
        assert np.abs(audio - expected).max() < ROUNDING
    assert eventually(lambda: metric(server, "melrt_requests") == len(lengths) + 1)  # including the model's own warm-up
    assert metric(server, "nv_inference_request_success") == len(lengths)
    assert metric(server, "melrt_windows") > len(lengths) + 1


def test_documented_client_gets_audio(server: Server, vocoder: Vocoder, speech: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "demo").mkdir()
    np.save(tmp_path / "demo" / "mel.npy", speech[:, :40])
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "docs" / "examples" / "06_triton_client.py").read_text()
    names: dict[str, np.ndarray] = {}
    exec(code.replace("localhost:8000", server.http), names)
    assert np.abs(names["audio"] - vocoder(speech[:, :40])).max() < ROUNDING
    assert soundfile.info("demo/triton.wav").frames == 40 * 256


def test_stream_pieces_join_to_the_same_audio(server: Server, vocoder: Vocoder, speech: np.ndarray) -> None:
    mel = speech[:, :150]
    expected = vocoder(mel)
    with StreamClient(server) as whole:
        whole.send(mel, uuid.uuid4().hex)
        pieces = whole.pieces()
    assert len(pieces) >= 3
    assert len(pieces[0]) < len(expected) / 5
    assert np.abs(np.concatenate(pieces) - expected).max() < ROUNDING
    with StreamClient(server) as one, StreamClient(server) as other:  # two sequences, interleaved
        audio: dict[StreamClient, list[np.ndarray]] = {one: [], other: []}
        for start in range(0, 150, 30):
            for streamer in audio:
                streamer.send(mel[:, start : start + 30], str(id(streamer)), start=start == 0, end=start == 120)
                audio[streamer] += streamer.pieces()
        for pieces in audio.values():
            assert np.abs(np.concatenate(pieces) - expected).max() < ROUNDING


def test_encoded_audio_at_other_rates(telephone: Server, vocoder: Vocoder, speech: np.ndarray) -> None:
    """The whole model returns FLAC files at 16 kHz, the model for streams G.711 at the same rate; both equal `Vocoder`'s."""
    mel = 6 + speech[:, :150]  # so loud that resampling exceeds full scale
    with grpc.InferenceServerClient(telephone.grpc) as client:
        encoded = client.infer("lj", [tensor(grpc, mel)]).as_numpy("audio")
    samples, rate = soundfile.read(io.BytesIO(encoded.tobytes()), dtype="int16")
    expected = vocoder(mel, Output(16000, "int16"))
    assert (encoded.dtype, rate, samples.shape) == (np.uint8, 16000, expected.shape)
    assert np.abs(samples.astype(np.int32) - expected).max() <= 1, "all but rounding"
    with StreamClient(telephone) as streamer:
        streamer.send(mel, "call")
        pieces = streamer.pieces()
    audio, expected = np.concatenate(pieces), vocoder(mel, Output(16000, "mulaw"))
    assert len(pieces) >= 3
    assert (audio.dtype, audio.shape) == (np.uint8, expected.shape)
    assert np.mean(audio == expected) > 0.98, "all but rounding"
    for model in ("lj", "lj_stream"):
        assert eventually(lambda model=model: metric(telephone, "melrt_clipped", model) > 100)


def test_cancelled_and_abandoned_work_is_dropped(server: Server, client: grpc.InferenceServerClient, speech: np.ndarray) -> None:
    mel = tensor(grpc, speech[:, :MAX_FRAMES])
    cancelled = metric(server, "melrt_cancelled")
    begun = metric(server, "melrt_requests")
    call = client.async_infer("lj", [mel], lambda result, error: None)
    assert eventually(lambda: metric(server, "melrt_requests") > begun)
    call.cancel()
    assert eventually(lambda: metric(server, "melrt_cancelled") == cancelled + 1)
    with StreamClient(server) as streamer:
        streamer.send(speech[:, :MAX_FRAMES], "gone")
        streamer.responses.get(timeout=TIMEOUT)
        assert eventually(lambda: metric(server, "melrt_open_streams", "lj_stream") == 1)
    assert eventually(lambda: metric(server, "melrt_open_streams", "lj_stream") == 0)
    assert metric(server, "melrt_windows", "lj_stream") < MAX_FRAMES / 32  # most was never computed
    assert metric(server, "melrt_queue_windows") == 0


@pytest.mark.parametrize(
    ("mel", "name", "complaint"),
    [
        (np.zeros((40, 9), np.float32), "FP32", "shape"),
        (np.full((80, 9), np.nan, np.float32), "FP32", "not finite|nan"),
        (np.zeros((80, 0), np.float32), "FP32", "frame"),
        (np.zeros((80, MAX_FRAMES + 1), np.float32), "FP32", f"at most {MAX_FRAMES}"),
        (np.zeros((80, 9), np.float64), "FP64", "data-type|data type"),
        (np.zeros((2, 80, 9), np.float32), "FP32", "shape"),
    ],
    ids=["bands", "NaN", "empty", "too long", "type", "axes"],
)
def test_malformed_mel_is_an_invalid_argument(server: Server, client: grpc.InferenceServerClient, mel, name: str, complaint: str) -> None:
    with pytest.raises(InferenceServerException, match=f"(?i){complaint}") as refused:
        client.infer("lj", [tensor(grpc, mel, name)])
    assert "INVALID_ARGUMENT" in str(refused.value.status())


def test_malformed_piece_ends_only_its_own_stream(server: Server, speech: np.ndarray) -> None:
    wrong = np.full((80, 9), np.nan, np.float32)
    with StreamClient(server) as streamer:
        streamer.send(speech[:, :9], "good", end=False)
        streamer.pieces()
        streamer.send(wrong, "bad", end=False)
        with pytest.raises(InferenceServerException, match="must be finite"):
            streamer.pieces()
        streamer.send(speech[:, :9], "bad", start=False)
        with pytest.raises(InferenceServerException, match="the sequence is not open"):
            streamer.pieces()
        streamer.send(speech[:, : MAX_FRAMES + 1], "long")
        with pytest.raises(InferenceServerException, match=f"at most {MAX_FRAMES}"):
            streamer.pieces()
        streamer.send(speech[:, :9], "good", start=False)
        assert np.concatenate(streamer.pieces()).shape == (18 * 256,)


def test_each_limit_has_its_error(server: Server, client: grpc.InferenceServerClient, vocoder: Vocoder, speech: np.ndarray) -> None:
    """Beyond the queue's limit some requests are refused and the others get their audio; one stream too many is refused."""
    mel = tensor(grpc, speech[:, :600])
    answers: queue.Queue = queue.Queue()
    for _ in range(4 * QUEUE):
        client.async_infer("lj", [mel], lambda result, error: answers.put((result, error)))
    results = [answers.get(timeout=TIMEOUT) for _ in range(4 * QUEUE)]
    errors = [error for _, error in results if error]
    audios = [result.as_numpy("audio") for result, error in results if not error]
    assert errors
    assert all("UNAVAILABLE" in str(error.status()) and "maximum queue size" in error.message() for error in errors)
    assert len(audios) >= QUEUE
    expected = vocoder(speech[:, :600])
    assert all(np.abs(audio - expected).max() < ROUNDING for audio in audios)
    with StreamClient(server) as streamer:
        for number in range(STREAMS):
            streamer.send(speech[:, :9], f"open {number}", end=False)
            streamer.pieces()
        streamer.send(speech[:, :9], "one too many", end=False)
        with pytest.raises(InferenceServerException, match=f"{STREAMS} streams are open"):
            streamer.pieces()
        for number in range(STREAMS):
            streamer.send(speech[:, :0], f"open {number}", start=False)
            assert np.concatenate(streamer.pieces()).shape == (9 * 256,)
        streamer.send(speech[:, :9], f"open {STREAMS}")  # there is room again
        assert streamer.pieces()


def test_bench_serving_compares_server_and_vocoder(server: Server, demo_bundle: Bundle, melrt) -> None:
    short = "--clients", 2, "--seconds", 0.5, "--rounds", 1, "--overload", 4, "--overload-seconds", 0.5
    code, out, err = melrt("bench-serving", demo_bundle.path, "--triton", server.grpc, *short)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["Vocoder", "Triton", "Vocoder", "Vocoder", "Triton", "Triton"]


def test_versions_change_under_load_without_failures(
    server: Server, client: grpc.InferenceServerClient, repository: Path, demo_bundle: Bundle, vocoder: Vocoder, speech: np.ndarray
) -> None:
    expected = vocoder(speech[:, :60])
    stop = threading.Event()
    served: list[tuple[str, float]] = []

    def load() -> None:
        with grpc.InferenceServerClient(server.grpc) as own:
            while not stop.is_set():
                result = own.infer("lj", [tensor(grpc, speech[:, :60])])
                audio = result.as_numpy("audio").astype(np.float64)
                version = result.get_response().model_version
                wanted = 32767 * np.clip(expected, -1, 1) if version == "2" else expected  # 16 bits clip what is louder
                served.append((version, float(np.abs(audio - wanted).max() / (32767 if version == "2" else 1))))

    with ThreadPoolExecutor(2) as callers:
        loads = [callers.submit(load) for _ in range(2)]
        try:
            assert eventually(lambda: len(served) > 4)
            assert add_voice(repository, "lj", demo_bundle, ServingConfig(encoding="int16")) == 2
            client.load_model("lj")
            assert eventually(lambda: served[-1][0] == "2")
            use_version(repository, "lj", 1)
            client.load_model("lj")
            assert eventually(lambda: served[-1][0] == "1")
        finally:
            stop.set()
        for one in loads:
            one.result(TIMEOUT)  # no request failed
    assert max(difference for _, difference in served) < 1e-4  # a step of 16-bit samples is 3e-5
