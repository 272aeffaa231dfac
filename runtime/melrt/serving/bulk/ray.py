"""Bulk synthesis on a Ray cluster: each actor holds the voices on one GPU or on some CPU cores, and Ray Data hands it blocks.

Blocks name their files by path, so every node must see the same folders. If an actor dies, Ray replaces it and hands its block out again;
the new actor skips the files of the block that are already written.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from typing import Any

from melrt.errors import MissingExtraError
from melrt.serving.bulk.blocks import Block
from melrt.serving.bulk.run import OutputSettings, UtteranceResult, synthesize_blocks
from melrt.serving.bulk.voices import LoadedVoices, VoiceSettings


class SynthesisActor:
    """An actor: loaded voices that synthesize blocks."""

    def __init__(self, settings: VoiceSettings, output: OutputSettings) -> None:
        self._voices = LoadedVoices(replace(settings, threads=(settings.threads or 1) if settings.device == "cpu" else None))
        self._output = output

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[Any]]:
        """Synthesize one block, given as one row, and return a row for each utterance."""
        (block,) = (pickle.loads(row) for row in rows["block"])  # pickled by the driver of this run
        results = [asdict(result) for result in synthesize_blocks(self._voices, [block], self._output)]
        return {field.name: [result[field.name] for result in results] for field in fields(UtteranceResult)}


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


def synthesize_on_ray(
    blocks: list[Block], settings: VoiceSettings, output: OutputSettings, address: str, actors: int
) -> Iterator[UtteranceResult]:
    """Synthesize blocks like `synthesize_blocks`, on a Ray cluster; results come in any order.

    Args:
        blocks: Blocks to synthesize.
        settings: Voices. Device `cpu`, or else one GPU for each actor; `auto` means a GPU if the cluster has any.
        output: Place, kind and format of the audio.
        address: Address of the cluster; `local` starts one on this machine.
        actors: Largest number of actors; as many as the cluster has room for are started.

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
            num_gpus=1 if on_gpu else 0, num_cpus=1 if on_gpu else settings.threads or 1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        )  # fmt: skip
        for row in results.iter_rows():
            yield UtteranceResult(**row)
    finally:
        ray.shutdown()
