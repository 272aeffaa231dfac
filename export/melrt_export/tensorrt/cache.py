"""Engines that were built before, in the user's cache folder: the same graph, settings, TensorRT, GPU and driver give the same engine."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melrt.files.atomic import atomic_write, user_cache

logger = logging.getLogger(__name__)

# Engines of this family have 5 to 50 MB; the oldest go when more are kept.
MOST_ENGINES = 64
_HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class EngineCache:
    """The place of one engine."""

    file: Path

    @classmethod
    def of(cls, onnx: bytes, *facts: Any) -> EngineCache:
        """Where the engine of this graph and these facts is kept."""
        key = hashlib.sha256(onnx)
        key.update(json.dumps(facts, sort_keys=True).encode())
        return cls(user_cache() / "engines" / f"{key.hexdigest()[:32]}.engine")

    def load(self) -> bytes | None:
        """The engine, if it is there and as it was written."""
        try:
            data = self.file.read_bytes()
            self.file.touch()
        except OSError:
            return None
        plan = data[_HASH_BYTES:]
        if hashlib.sha256(plan).digest() != data[:_HASH_BYTES]:
            logger.warning("%s is damaged; the engine is built anew.", self.file)
            return None
        return plan

    def save(self, plan: bytes) -> None:
        """Keep an engine; where that is not possible, go on without."""
        try:
            with atomic_write(self.file) as temporary:
                temporary.write_bytes(hashlib.sha256(plan).digest() + plan)
            kept = sorted(self.file.parent.glob("*.engine"), key=lambda file: file.stat().st_mtime)
            for old in kept[:-MOST_ENGINES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.info("the engine was not kept in %s: %s", self.file, error)
