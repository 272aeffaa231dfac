"""Reading untrusted files: pickles hold tensors and nothing else, YAML tags are names and nothing more, sizes are bounded."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from melrt.errors import CheckpointError

# The largest published generator has 13 M weights, 53 MB; with optimizer states and discriminators under 1 GB.
MAX_WEIGHTS_BYTES = 4 << 30
MAX_CONFIG_BYTES = 1 << 20
MAX_STATISTICS_BYTES = 16 << 20
MAX_SETTINGS = 100_000
MAX_SETTINGS_DEPTH = 50
# Dictionaries with attributes, in which old Coqui TTS checkpoints keep their config; they are read as plain dictionaries.
_ATTRIBUTE_DICTIONARIES = tuple(
    f"{module}.AttrDict"
    for module in ("TTS.utils.io", "TTS.utils.generic_utils", "mozilla_voice_tts.utils.io", "mozilla_voice_tts.utils.generic_utils")
)
# HiFi-GAN's files have no suffix.
PICKLES = ("", ".pt", ".pth", ".pkl", ".tar", ".ckpt")


@dataclass(frozen=True)
class Opened:
    """A file whose project is being told; what is in it is read once, when first looked at."""

    file: Path

    @cached_property
    def content(self) -> Any:
        """Of a pickle: its plain containers and tensors; of anything else an empty dict."""
        return read_pickle(self.file) if self.file.suffix in PICKLES else {}

    def has(self, prefix: str, *keys: str) -> bool:
        """Whether there is a dict below these keys, with a name that begins so."""
        inner = self.content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        return isinstance(inner, dict) and any(isinstance(name, str) and name.startswith(prefix) for name in inner)


def read_pickle(path: Path) -> Any:
    """The tensors and plain containers of a `torch.save` file, on the CPU.

    Raises:
        CheckpointError: Truncated, too large, no such file, or it holds anything that would have to run.
    """
    import torch

    check_size(path, MAX_WEIGHTS_BYTES)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (unpacked := sum(member.file_size for member in archive.infolist())) > MAX_WEIGHTS_BYTES:
                raise CheckpointError(f"{path} unpacks to {unpacked} bytes; at most {MAX_WEIGHTS_BYTES} are read.")
    try:
        with torch.serialization.safe_globals([(OrderedDict, name) for name in _ATTRIBUTE_DICTIONARIES]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_pickle_reason(path, str(error))) from error
    except Exception as error:  # a damaged file fails anywhere in the reader
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint; it is truncated or something else ({reason}).") from error


def _pickle_reason(path: Path, text: str) -> str:
    wants = re.search(r"(?:GLOBAL|unrecognized function) (\S+)", text)
    if wants:
        return (
            f"{path} holds more than tensors ({wants[1]}), and reading that would run its code; nothing of it was run. "
            "Where it was trained, save the weights alone: torch.save(generator.state_dict(), 'netG.pt')"
        )
    return f"{path} cannot be read as a PyTorch checkpoint; it is truncated or something else."


def arrays(path: Path, state: Any) -> dict[str, np.ndarray]:
    """Named tensors as float32 or float64 arrays.

    Raises:
        CheckpointError: Not a mapping of names to dense real tensors.
    """
    import torch

    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds {_kind(state)}; expected a state dict, tensors by name.")

    def is_real(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout == torch.strided

    odd = [f"{name!r} ({_kind(value)})" for name, value in state.items() if not (isinstance(name, str) and is_real(value))]
    if odd:
        raise CheckpointError(f"{path} is not a bare state dict of real tensors; it also holds {', '.join(odd[:6])}.")
    # a tensor may be a few bytes shown many times over
    if (size := sum(value.numel() for value in state.values()) * 4) > MAX_WEIGHTS_BYTES:
        raise CheckpointError(f"{path} holds tensors of {size} bytes; at most {MAX_WEIGHTS_BYTES} are read.")
    return {name: value.to(torch.float64 if value.dtype == torch.float64 else torch.float32).numpy() for name, value in state.items()}


def _kind(value: object) -> str:
    return f"a {type(value).__name__}" if value or not isinstance(value, dict) else "an empty dict"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; tags of Python objects give their plain content and execute nothing.

    melgan-neurips dumps an `argparse.Namespace` with a `pathlib.PosixPath` in it: a mapping, and the list of the path's parts.

    Raises:
        CheckpointError: Not YAML, not a mapping, too large or too deep.
    """
    documents = list(parse_yaml(_read_text(path), path))
    values = documents[0] if len(documents) == 1 else documents
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {_kind(values)}; expected a mapping of settings.")
    return values


def parse_yaml(text: str, path: Path) -> list[Any]:
    """The YAML documents of a text; tags as in `read_yaml`.

    Raises:
        CheckpointError: Not YAML, or too deep.
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Every tag is read as what its node is: mapping, list or text."""

    def plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return loader.construct_scalar(node)

    PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", plain)
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has a config of {len(text)} characters; at most {MAX_CONFIG_BYTES} are read.")
    try:
        documents = list(yaml.load_all(text, PlainLoader))  # a SafeLoader with more harmless tags
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(
            f"{path} is not the YAML of a training config: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    check_settings(documents, path)
    return documents


def check_settings(values: Any, path: Path) -> None:
    """Raise CheckpointError if written out these would be endless, or deep: a short text can name a list of lists of lists many times."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in sizes:
            if depth > MAX_SETTINGS_DEPTH:
                raise CheckpointError(f"{path} nests its settings deeper than {MAX_SETTINGS_DEPTH}.")
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(one, depth + 1) for one in inner)
        return sizes[id(value)]

    if size(values, 0) > MAX_SETTINGS:
        raise CheckpointError(f"{path} holds more than {MAX_SETTINGS} settings, most of them by repeating others.")


# A string, which may hold two slashes and is kept, or a comment.
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*')


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `//` comments are skipped, as Coqui TTS writes them.

    Raises:
        CheckpointError: Not JSON, not an object, too large or too deep.
    """
    text = _read_text(path)
    try:
        values = json.loads(_COMMENT.sub(lambda found: found[1] or "", text))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {_kind(values)}; expected an object of settings.")
    return values


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Named tensors of a safetensors file.

    Raises:
        CheckpointError: Truncated, too large, or not safetensors.
    """
    from safetensors.numpy import load_file

    check_size(path, MAX_WEIGHTS_BYTES)
    try:
        return dict(load_file(path))
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as safetensors; it is truncated or something else ({error}).") from error


def read_npy(path: Path) -> np.ndarray:
    """An array of numbers from a .npy file.

    Raises:
        CheckpointError: Not such a file, or it holds objects.
    """
    check_size(path, MAX_STATISTICS_BYTES)
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as a numpy file of numbers: {error}") from error


def read_npy_dict(path: Path) -> dict[str, Any]:
    """The dict in a .npy file that numpy pickled (Coqui TTS's `scale_stats.npy`); nothing but arrays and plain values is built.

    Raises:
        CheckpointError: Not such a file, or it holds anything that would have to run.
    """
    check_size(path, MAX_STATISTICS_BYTES)
    try:
        stream = io.BytesIO(path.read_bytes())
        version = np.lib.format.read_magic(stream)
        shape, _, dtype = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)
        values = _ArraysOnly(stream).load().item() if dtype.hasobject and shape == () else None
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise CheckpointError(f"{path} cannot be read as pickled statistics: {str(error)[:200]}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no dict of statistics.")
    return values


_ARRAY_MAKERS = (
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy.ndarray", "numpy.dtype", "_codecs.encode",
)  # fmt: skip


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays, dtypes and numbers; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if full in _ATTRIBUTE_DICTIONARIES or full == "collections.OrderedDict":
            return OrderedDict
        if full not in _ARRAY_MAKERS:
            raise CheckpointError(f"holds more than arrays ({full}), and reading that would run its code; nothing of it was run.")
        return super().find_class(module, name)


def check_size(path: Path, limit: int) -> None:
    """Raise CheckpointError if the file is missing, or larger than this many bytes."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is no file.")
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; at most {limit} are read.")


def _read_text(path: Path) -> str:
    check_size(path, MAX_CONFIG_BYTES)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8: {error}") from error
