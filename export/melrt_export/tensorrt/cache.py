"""Engines that were built earlier, in the user's cache. The same graph, settings, TensorRT, GPU and driver give the same engine."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melrt.bundle.trust import seal, unseal
from melrt.files.atomic import atomic_write, user_cache

logger = logging.getLogger(__name__)

# An engine of this family has 5 to 50 MB. The oldest are removed when the cache holds more than this number.
MAX_ENGINES = 64


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """File in the user's cache that holds one engine, or will hold it."""

    file: Path

    @classmethod
    def locate(cls, onnx: bytes, *facts: Any) -> CachedEngine:
        """Return the cache file for this graph and everything else that determines the engine."""
        key = hashlib.sha256(onnx)
        key.update(json.dumps(facts, sort_keys=True).encode())
        return cls(user_cache() / "engines" / f"{key.hexdigest()[:32]}.engine")

    def load(self) -> bytes | None:
        """Return the engine; None if the cache does not have it or its file is damaged."""
        try:
            sealed = self.file.read_bytes()
            self.file.touch()
        except OSError:
            return None
        plan = unseal(self.file.name, sealed)
        if plan is None:
            logger.warning("%s is damaged, or this user did not write it; the engine is built again.", self.file)
        return plan

    def save(self, plan: bytes) -> None:
        """Store the engine. A cache that cannot be written is logged, and is not an error."""
        sealed = seal(self.file.name, plan)
        if sealed is None:
            return
        try:
            with atomic_write(self.file) as temporary:
                temporary.write_bytes(sealed)
            by_age = sorted(self.file.parent.glob("*.engine"), key=lambda file: file.stat().st_mtime)
            for old in by_age[:-MAX_ENGINES]:
                old.unlink(missing_ok=True)
        except OSError as error:
            logger.info("the engine was not stored in %s: %s", self.file, error)
