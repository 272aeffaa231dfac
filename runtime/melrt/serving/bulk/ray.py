"""Bulk synthesis on a Ray cluster: each actor holds the voice on one GPU or on some CPU cores, and Ray Data hands it blocks.

Blocks name their files by path, so every node must see the same folders. If an actor dies, Ray replaces it and hands its block out again;
the new actor skips the files of the block that are already written.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from melrt.bundle import Bundle
from melrt.errors import MissingExtraError
from melrt.serving.bulk.inputs import Block
from melrt.serving.bulk.run import OutputSettings, UtteranceResult, synthesize_blocks
from melrt.vocoder import Options, Vocoder


@dataclass(frozen=True, slots=True)
class ActorSettings:
    """The voice that each actor loads, and the resources that it takes."""

    voice: Path
    """Path of the bundle, the same on every node."""
    device: str = "auto"
    """`cpu`, or else one GPU for each actor; `auto` means a GPU if the cluster has any."""
    precision: str = "auto"
    """Precision, see `Vocoder.load`."""
    backend: str = "auto"
    """Backend, see `Vocoder.load`."""
    threads: int = 1
    """CPU cores of an actor that runs on the CPU."""
    count: int = 1
    """Largest number of actors; as many as the cluster has room for are started."""


class SynthesisActor:
    """An actor: a loaded voice that synthesizes blocks."""

    def __init__(self, settings: ActorSettings, output: OutputSettings) -> None:
        threads = settings.threads if settings.device == "cpu" else None
        bundle = Bundle.open(settings.voice)
        options = Options(edges=bundle.manifest.choose_edges(output.edges))
        self._vocoder = Vocoder.load(
            bundle, device=settings.device, precision=settings.precision, backend=settings.backend, threads=threads, options=options
        )
        self._output = output.open(self._vocoder.sample_rate)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Synthesize one block, given as one row, and return a row for each utterance."""
        (block,) = (pickle.loads(row) for row in rows["block"])  # pickled by the driver of this run
        results = [asdict(result) for result in synthesize_blocks(self._vocoder, [block], self._output)]
        return {column: [result[column] for result in results] for column in ("name", "frames", "error")}


def import_ray() -> Any:
    """Return the module `ray`, with `ray.data` imported.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("melrt bulk --ray", error.name or "ray", "ray") from error
    return ray


def synthesize_on_ray(blocks: list[Block], settings: ActorSettings, output: OutputSettings, address: str) -> Iterator[UtteranceResult]:
    """Synthesize blocks like `synthesize_blocks`, on a Ray cluster; results come in any order.

    Args:
        blocks: Blocks to synthesize.
        settings: Voice and resources of the actors.
        output: Place, kind and format of the audio.
        address: Address of the cluster; `local` starts one on this machine.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    ray = import_ray()
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    try:
        if settings.device == "auto" and not ray.cluster_resources().get("GPU"):
            settings = replace(settings, device="cpu")
        on_gpu = settings.device != "cpu"
        rows = ray.data.from_items([{"block": pickle.dumps(block)} for block in blocks], override_num_blocks=len(blocks))
        results = rows.map_batches(
            SynthesisActor, fn_constructor_args=(settings, output), batch_size=1,
            num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else settings.threads,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=settings.count),
        )  # fmt: skip
        for row in results.iter_rows():
            yield UtteranceResult(row["name"], row["frames"], row["error"])
    finally:
        ray.shutdown()
