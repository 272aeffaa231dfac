"""An object for child processes; its module imports nothing that takes time."""

from __future__ import annotations

import os
import time


class Fragile:
    """An object whose calls end its process, hang, or fail."""

    def __init__(self, works: bool = True) -> None:
        if not works:
            raise ValueError("no device")

    def usable(self) -> bool:
        return True

    def double(self, value: int) -> int:
        return 2 * value

    def crash(self) -> None:
        os._exit(9)

    def hang(self) -> None:
        time.sleep(60)

    def fail(self) -> None:
        raise OSError("no space")
