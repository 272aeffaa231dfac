"""Safe reading of untrusted files.

Pickles give only tensors and plain containers, YAML tags construct nothing, and every size is bounded.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError
from melrt_export.checkpoints.limits import (
    MAX_CONFIG_BYTES,
    MAX_SAFETENSORS_HEADER_BYTES,
    MAX_SETTINGS,
    MAX_SETTINGS_DEPTH,
    MAX_STATISTICS_BYTES,
    MAX_VALUE_LENGTH,
    MAX_WEIGHTS_BYTES,
    check_file_size,
)
from melrt_export.checkpoints.pickles import load_pickle
from melrt_export.checkpoints.torch_files import describe, read_pickle

# Checkpoints of HiFi-GAN have no suffix.
PICKLE_SUFFIXES = ("", ".pt", ".pth", ".pkl", ".tar", ".ckpt")


@dataclass(frozen=True)
class CheckpointFile:
    """File that may be a checkpoint; its content is read once, on first use."""

    path: Path

    @cached_property
    def content(self) -> Any:
        """Tensors and plain containers of a pickle; an empty dictionary for any other file."""
        return read_pickle(self.path) if self.path.suffix in PICKLE_SUFFIXES else {}

    def has_name(self, prefix: str, *keys: str) -> bool:
        """Return whether the content has a dictionary under these keys, one inside the other, with a name that begins with the prefix."""
        inner = self.content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        return isinstance(inner, dict) and any(isinstance(name, str) and name.startswith(prefix) for name in inner)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Tags of Python objects give their plain content and execute nothing.

    melgan-neurips dumps an `argparse.Namespace` that contains a `pathlib.PosixPath`: they give a mapping and a list of the path's parts.

    Raises:
        CheckpointError: The file is not YAML, not a mapping, too large or nested too deep.
    """
    documents = list(parse_yaml(_read_text(path), path))
    values = documents[0] if len(documents) == 1 else documents
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {describe(values)}; expected a mapping of settings.")
    return values


def parse_yaml(text: str, path: Path) -> list[Any]:
    """Return the YAML documents of a text, with tags treated as in `read_yaml`.

    Raises:
        CheckpointError: The text is not YAML, too large or nested too deep. The message names `path`.
    """
    import yaml

    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has a config of {len(text)} characters; at most {MAX_CONFIG_BYTES} are read.")
    try:
        documents = list(yaml.load_all(text, _plain_loader(path)))  # safe: a SafeLoader that gives plain content for more tags
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(
            f"{path} is not the YAML of a training config: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    check_settings_size(documents, path)
    return documents


def _plain_loader(path: Path) -> Any:
    """Return a class that loads YAML and takes every tag of Python objects for its plain content."""
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Loader that reads every tagged node as a plain mapping, list or text."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Leave merge keys (<<) alone, which refuses them: nested ones double with each level. No training config has them."""

        def construct_scalar(self, node: yaml.Node) -> Any:
            if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_VALUE_LENGTH:  # base 60 takes the square of the length
                raise CheckpointError(f"{path} has a value of {len(node.value)} characters; at most {MAX_VALUE_LENGTH} are read.")
            return super().construct_scalar(node)

    def plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", plain)
    return PlainLoader


def check_settings_size(values: Any, path: Path) -> None:
    """Check the number and depth of settings, with every repeated node counted each time.

    A short YAML text can repeat a list of lists of lists so often that writing it out would fill the memory.

    Raises:
        CheckpointError: There are too many settings, or they are nested too deep.
    """
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in sizes:
            if depth > MAX_SETTINGS_DEPTH:
                raise CheckpointError(f"{path} nests its settings deeper than the {MAX_SETTINGS_DEPTH} levels that are read.")
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(one, depth + 1) for one in inner)
        return sizes[id(value)]

    if size(values, 0) > MAX_SETTINGS:
        raise CheckpointError(f"{path} holds more than the {MAX_SETTINGS} settings that are read, most of them repetitions.")


# A string, which is kept because it may contain two slashes, or a comment.
# A string without an end is taken whole, or every quotation mark in it would be searched again.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*"?)|//[^\n]*')


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Comments after `//` are removed, because Coqui TTS writes them.

    Raises:
        CheckpointError: The file is not JSON, not an object, too large or nested too deep.
    """
    text = _read_text(path)
    try:
        values = json.loads(_COMMENT.sub(lambda found: found[1] or "", text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {describe(values)}; expected an object of settings.")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CheckpointError: The file is truncated, too large, or not a safetensors file.
    """
    from safetensors.numpy import load_file

    with _safetensors_errors(path):
        return dict(load_file(path))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors, by name.

    Raises:
        CheckpointError: The file is truncated, too large, or not a safetensors file.
    """
    from safetensors import safe_open

    with _safetensors_errors(path), safe_open(path, "np") as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    """Check a safetensors file, and raise every error of its reader as a CheckpointError.

    Its header is bounded, because each tensor of no bytes takes a hundred bytes of memory.
    """
    check_file_size(path, MAX_WEIGHTS_BYTES)
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > MAX_SAFETENSORS_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not safetensors, or has a header of {header} bytes; at most {MAX_SAFETENSORS_HEADER_BYTES} are read."
        )
    try:
        yield
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as safetensors; it is truncated or not safetensors ({error}).") from error


def read_npy(path: Path) -> np.ndarray:
    """Return the array of numbers in a .npy file.

    Raises:
        CheckpointError: The file is not a .npy file, or it holds Python objects.
    """
    check_file_size(path, MAX_STATISTICS_BYTES)
    try:
        with path.open("rb") as stream:
            values = np.lib.format.read_array(stream, allow_pickle=False)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"it has dtype {values.dtype}")
        return np.asarray(values)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as a numpy file of numbers: {error}") from error


def read_npy_dict(path: Path) -> dict[str, Any]:
    """Return the dictionary that numpy pickled in a .npy file (Coqui TTS's `scale_stats.npy`); only arrays and plain values are built.

    Raises:
        CheckpointError: The file is not such a file, or reading it would execute code.
    """
    check_file_size(path, MAX_STATISTICS_BYTES)
    try:
        stream = io.BytesIO(path.read_bytes())
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
        stored = load_pickle(stream, _STORED).value if dtype.hasobject and shape == () else None
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as pickled statistics: {str(error)[:200]}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds {describe(stored)}; expected a dictionary of statistics.")
    return {name: value.value if isinstance(value, _StoredArray) else value for name, value in stored.items() if isinstance(name, str)}


class _StoredType:
    """numpy dtype in a pickle: only a plain numeric code is taken, and of the pickled state only the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([fiu][1248]|b1|O8?)", code):
            raise CheckpointError(f"holds values of type {code!r:.40}; expected real numbers.")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>|=")


class _StoredArray:
    """numpy array in a pickle. Its values are copied from the pickled bytes, so they are never taken for pointers."""

    def __init__(self, *_: object) -> None:
        self.value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(data, list):  # an array of objects; numpy writes its elements as pickled values
            self.value = data[0] if len(data) == 1 else data
        else:
            self.value = np.frombuffer(data, kind.code).reshape(shape, order="F" if fortran else "C")


def _stored_number(kind: _StoredType, data: bytes) -> Any:
    return np.frombuffer(data, kind.code)[0]


def _latin_bytes(text: str, encoding: str) -> bytes:
    """Return the bytes that Python 3 writes as text into pickles of protocol 2."""
    if encoding != "latin1":
        raise CheckpointError(f"holds text in {encoding!r:.40}; expected latin1.")
    return text.encode(encoding)


# Replacements for numpy's own functions, which trust the pickle: a forged dtype makes numpy dereference pointers from the file.
_STORED: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": _StoredArray, "numpy.ndarray": _StoredArray, "numpy.dtype": _StoredType,
    "numpy.core.multiarray.scalar": _stored_number, "_codecs.encode": _latin_bytes,
}  # fmt: skip


def _read_text(path: Path) -> str:
    check_file_size(path, MAX_CONFIG_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}") from error
