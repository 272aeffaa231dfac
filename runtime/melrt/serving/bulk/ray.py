"""Bulk synthesis on a Ray cluster: one actor holds the voice on each GPU (or on some cores), Ray Data gives it blocks.

Blocks travel as paths, so that every node needs to see the same folders. An actor that dies is replaced and its block is given out
again; what is there of it is not spoken twice.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from melrt.errors import MissingExtraError
from melrt.serving.bulk.inputs import Block
from melrt.serving.bulk.run import Outcome, Target, speak
from melrt.vocoder import Vocoder


@dataclass(frozen=True, slots=True)
class Actors:
    """What each actor loads and takes of its node."""

    voice: Path
    """The bundle, the same on every node."""
    device: str = "auto"
    """As for `Vocoder.load`; `auto` is a GPU if the cluster has any. On `cpu` an actor takes cores, else one GPU."""
    precision: str = "auto"
    """As for `Vocoder.load`."""
    backend: str = "auto"
    """As for `Vocoder.load`."""
    threads: int = 1
    """Cores of an actor on a CPU."""
    count: int = 1
    """Actors at most; as many as the cluster has room for are started."""


class SynthesisActor:
    """The actor: a loaded voice."""

    def __init__(self, actors: Actors, target: Target) -> None:
        threads = actors.threads if actors.device == "cpu" else None
        self._vocoder = Vocoder.load(
            actors.voice, device=actors.device, precision=actors.precision, backend=actors.backend, threads=threads
        )
        self._output = target.output(self._vocoder.sample_rate)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Speak a block; one row in, a row for each outcome out."""
        (block,) = (pickle.loads(row) for row in rows["block"])  # of the driver's own making
        outcomes = [asdict(outcome) for outcome in speak(self._vocoder, [block], self._output)]
        return {column: [outcome[column] for outcome in outcomes] for column in ("name", "frames", "error")}


def synthesize_on_ray(blocks: list[Block], actors: Actors, target: Target, address: str) -> Iterator[Outcome]:
    """As `bulk.speak`, on the cluster at `address` (`local` starts one here); outcomes come in any order.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("melrt bulk --ray", error.name or "ray", "ray") from error
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    try:
        if actors.device == "auto" and not ray.cluster_resources().get("GPU"):
            actors = replace(actors, device="cpu")
        on_gpu = actors.device != "cpu"
        rows = ray.data.from_items([{"block": pickle.dumps(block)} for block in blocks], override_num_blocks=len(blocks))
        spoken = rows.map_batches(
            SynthesisActor, fn_constructor_args=(actors, target), batch_size=1,
            num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else actors.threads,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors.count),
        )  # fmt: skip
        for row in spoken.iter_rows():
            yield Outcome(row["name"], row["frames"], row["error"])
    finally:
        ray.shutdown()
