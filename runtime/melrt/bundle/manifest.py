"""The manifest of a bundle: the voice's facts, and one entry for every other file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from melrt.checks import Rule, check_fields, number, whole
from melrt.errors import BundleError
from melrt.mel.level_check import Levels
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges, Ends
from melrt.planning.windows import ReceptiveField

SCHEMA = 1
MANIFEST = "manifest.json"
# Published voices have artifacts below 50 MB; anything far beyond that is refused before it is read.
MAX_ARTIFACT_BYTES = 2 << 30
_REPLACEMENT = re.compile(r"\+[0-9a-f]{8}(?=\.[^.]*$)")
_SIGNATURE = re.compile(r"(?:[0-9a-f]{64})?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")
_SIGNED = Rule(lambda value: isinstance(value, str) and bool(_SIGNATURE.fullmatch(value)), "64 hexadecimal digits, or empty")
MAX_DEPTH = 20


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether a JSON value can be printed and written again: text without control characters, finite numbers, few levels."""
    if isinstance(value, Mapping):
        return depth < MAX_DEPTH and all(_is_plain(one, depth + 1) for one in (*value, *value.values()))
    if isinstance(value, list | tuple):
        return depth < MAX_DEPTH and all(_is_plain(one, depth + 1) for one in value)
    return value.isprintable() if isinstance(value, str) else not isinstance(value, float) or math.isfinite(value)


_PRINTABLE = Rule(lambda value: isinstance(value, str) and _is_plain(value), "text without control characters")
_OBJECT = Rule(lambda value: isinstance(value, dict), "an object")
_PLAIN = Rule(
    lambda value: isinstance(value, dict) and _is_plain(value),
    f"an object of finite numbers and of text without control characters, at most {MAX_DEPTH} levels deep",
)
_PLAIN_NAME = Rule(
    lambda value: isinstance(value, str) and bool(_FILE_NAME.fullmatch(value)) and value != MANIFEST, "a plain file name within the bundle"
)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a bundle."""

    file: str
    """File name within the bundle."""
    kind: str
    """`onnx`, `engine`, `reference` (the probe mel and PyTorch's output for it), `plan` (INT8), or `policy` (tuned windows)."""
    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the whole file, hexadecimal."""
    graph: str = ""
    """Graph that it computes: `edge` is the network as trained, `interior` has zero padding (`melrt.planning.windows`)."""
    precision: str = ""
    """`fp32`, `tf32`, `fp16`, `bf16` or `int8`."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """Platform that it runs on; for an engine its flavor, version, compute capability and profile."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """Differences from PyTorch, measured when it was made."""
    signature: str = ""
    """Signature of an engine's entry (`melrt.bundle.trust`); empty if nobody vouches for it."""

    def __post_init__(self) -> None:
        rules = {"file": _PLAIN_NAME, "size": whole(0, MAX_ARTIFACT_BYTES), "target": _PLAIN, "quality": _OBJECT, "signature": _SIGNED}
        texts = dict.fromkeys(("kind", "sha256", "graph", "precision"), _PRINTABLE)
        check_fields(self, {**rules, **texts}, "artifact", BundleError)
        finite = number(-1e300, 1e300)
        if odd := [f"{ascii(k)[1:-1]} {v!r}" for k, v in self.quality.items() if not (finite.accepts(v) and _is_plain(k))]:
            raise BundleError(f"artifact {self.file}: quality {odd[0]:.80}; it must be a finite number under a plain name.")

    @property
    def name(self) -> str:
        """File name without the suffix that tells a replacement from the file that it replaced."""
        return _REPLACEMENT.sub("", self.file)

    @classmethod
    def of(cls, file: str, data: bytes, kind: str, **facts: Any) -> Artifact:
        """Describe these bytes."""
        return cls(file, kind, len(data), hashlib.sha256(data).hexdigest(), **facts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The facts about a voice that its bundle states."""

    name: str
    """Name of the voice."""
    spec: MelSpec
    """Mel convention of the input."""
    architecture: Mapping[str, Any]
    """Shape of the generator: `GeneratorConfig.to_dict()` of the exporter."""
    receptive_field: ReceptiveField
    """Mel frames that a frame's samples depend on."""
    edges: Edges
    """Treatment of an utterance's ends in the voice's own project."""
    provenance: Mapping[str, str]
    """Origin of the weights: source, sha256, format, tool, command."""
    normalization: Normalization | None = None
    """Mel normalization used in training. It is part of the graphs; the runtime uses it to recognize a mel that was normalized already."""
    levels: Levels | None = None
    """Level of a mel of speech; a mel far from it causes a warning."""
    parameters: int = 0
    """Number of trained parameters; 0 if unknown."""
    flop_per_second: float = 0.0
    """Floating-point operations per second of audio, a multiply-add counted as two; 0 if unknown."""
    artifacts: tuple[Artifact, ...] = ()
    """Every file of the bundle except the manifest."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("parameters", "flop_per_second"), number(0, 1e18))
        check_fields(self, {"name": _PRINTABLE, "architecture": _PLAIN, "provenance": _PLAIN, **counts}, error=BundleError)
        names = [entry.file for entry in self.artifacts]
        if len(set(names)) != len(names):
            raise BundleError(f"a file is listed twice: {sorted(names)}.")

    def choose_edges(self, ends: Edges | Ends) -> Edges:
        """Return the frames to add at an utterance's ends: the project's for `voice`, none for `model`, or those given."""
        return ends if isinstance(ends, Edges) else self.edges if ends == "voice" else Edges()

    def dumps(self) -> bytes:
        """Return the file's content. Equal manifests give equal bytes."""
        values = {"schema": SCHEMA} | asdict(self) | {"spec": self.spec.to_dict()}
        values["normalization"] = self.normalization.to_dict() if self.normalization else None
        return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        """Read the content that `dumps` returns.

        Raises:
            BundleError: Not a manifest, a newer schema, or a value outside what is allowed.
        """
        try:
            values = json.loads(data)
            schema = values.pop("schema")
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            raise BundleError(f"{MANIFEST} is not a melrt manifest ({error or type(error).__name__}).") from error
        if type(schema) is not int or schema < 1:
            raise BundleError(f"{MANIFEST} has schema {schema!r}; this melrt reads schema {SCHEMA}.")
        if schema > SCHEMA:
            raise BundleError(
                f"the bundle has schema {schema}, written by a newer melrt; this one reads up to {SCHEMA}: pip install --upgrade melrt"
            )
        try:
            return cls(**_fields(values))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(f"{MANIFEST} is damaged: {error}") from error


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Turn a manifest's JSON values into the fields of `Manifest`."""
    normalization, levels = values.get("normalization"), values.get("levels")
    return values | {
        "spec": MelSpec.from_dict(values["spec"]),
        "receptive_field": ReceptiveField(**values["receptive_field"]),
        "edges": Edges(**values["edges"]),
        "normalization": None if normalization is None else Normalization.from_dict(normalization),
        "levels": None if levels is None else Levels(**levels),
        "artifacts": tuple(Artifact(**entry) for entry in values["artifacts"]),
    }
