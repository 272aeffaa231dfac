"""Pickles that cannot execute code, crash, or grow: every operation is counted first, and only named functions are called.

`torch.load(weights_only=True)` executes no code either, but a file of 300 bytes makes it allocate a gigabyte (`bytearray(1 << 30)`) or
overflow the C stack (nested tuples as a key), and `pickle.Unpickler` makes its memo as long as a file says.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

from melrt.errors import CheckpointError
from melrt_export.checkpoints.limits import MAX_PICKLE_OPERATIONS, MAX_PICKLE_TUPLES

# Dictionary classes in which old Coqui TTS checkpoints keep their config. They are read as plain dictionaries.
_DICTIONARIES = (
    "collections.OrderedDict", "TTS.utils.io.AttrDict", "TTS.utils.generic_utils.AttrDict",
    "mozilla_voice_tts.utils.io.AttrDict", "mozilla_voice_tts.utils.generic_utils.AttrDict",
)  # fmt: skip


def load_pickle(stream: IO[bytes], known: Mapping[str, Any], storage: Callable[[Any], Any] | None = None) -> Any:
    """Read one pickle, up to its end.

    Args:
        stream: A file or bytes that can be read twice.
        known: What the pickle may call, by its full name. Use bound methods and built-in types: a pickle can set attributes of others.
        storage: Returns the object of a persistent identifier, such as the numbers of a tensor.

    Raises:
        CheckpointError: The pickle has too many operations, or calls something that is not known. The message begins with a verb.
    """
    start = stream.tell()
    _check_operations(stream)
    stream.seek(start)
    return _Unpickler(stream, known, storage).load()


def _check_operations(stream: IO[bytes]) -> None:
    """Check the number of operations, the places of the memo, and the numbers: long ones can have equal hashes, and fill no dictionary."""
    tuples = 0
    for count, (operation, value, _) in enumerate(pickletools.genops(stream), 1):
        tuples += operation.name.startswith("TUPLE")
        if count > MAX_PICKLE_OPERATIONS or tuples > MAX_PICKLE_TUPLES:
            raise CheckpointError(f"holds more than {MAX_PICKLE_OPERATIONS} pickled operations or {MAX_PICKLE_TUPLES} tuples.")
        if operation.name.endswith("PUT") and int(value or 0) > MAX_PICKLE_OPERATIONS:
            raise CheckpointError(f"remembers object number {value}; expected at most {MAX_PICKLE_OPERATIONS} objects.")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise CheckpointError(f"holds a number of {value.bit_length()} bits; expected at most 64.")


class _Unpickler(pickle.Unpickler):
    """Unpickler that calls what it is given, and refuses every other name."""

    def __init__(self, stream: IO[bytes], known: Mapping[str, Any], storage: Callable[[Any], Any] | None) -> None:
        super().__init__(stream, encoding="utf-8")
        self._known, self._storage = known, storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if full in _DICTIONARIES:
            return OrderedDict
        if full not in self._known:
            raise CheckpointError(
                f"holds more than tensors and arrays ({full[:200]}). Reading this could execute its code, so melrt executed nothing. "
                "Save it without them where the model was trained, for example with torch.save(generator.state_dict(), 'netG.pt')."
            )
        return self._known[full]

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise CheckpointError("refers to objects outside the pickle.")
        return self._storage(pid)
