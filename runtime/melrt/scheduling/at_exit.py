"""Closing of queues before the interpreter exits: a worker that is killed inside an engine's run aborts the process."""

from __future__ import annotations

import atexit
import logging
import weakref
from typing import Protocol

from melrt.errors import BackendError

logger = logging.getLogger(__name__)


class _Queue(Protocol):
    def close(self, *, drain: bool) -> None: ...


queues: weakref.WeakSet[_Queue] = weakref.WeakSet()
"""Queues that are closed at the exit."""


@atexit.register
def _close_all() -> None:
    """End every worker's run."""
    for queue in list(queues):
        try:
            queue.close(drain=False)
        except BackendError as error:
            logger.warning("%s", error)
