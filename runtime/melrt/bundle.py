"""The voice bundle: a folder that is complete in itself, verified before anything in it is used.

`manifest.json` lists every other file with its size and SHA-256. A file is read whole, compared with its entry, and only
then handed on, so that what an engine gets is what was verified.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from melrt.errors import BundleError
from melrt.files.atomic import atomic_folder, atomic_write
from melrt.mel.level_check import Levels
from melrt.mel.normalization import Normalization
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import ReceptiveField

SCHEMA = 1
MANIFEST = "manifest.json"
# Real manifests are under 20 KB and real artifacts under 50 MB; what is far beyond is refused before it is read.
MAX_MANIFEST_BYTES = 1 << 20
MAX_ARTIFACT_BYTES = 2 << 30
_REPLACEMENT = re.compile(r"\+[0-9a-f]{8}(?=\.[^.]*$)")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,120}")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a bundle."""

    file: str
    """Name within the bundle."""
    kind: str
    """`onnx`, `engine`, or `reference` (PyTorch's output for a probe mel)."""
    size: int
    """Bytes."""
    sha256: str
    """Of the whole file, hexadecimal."""
    graph: str = ""
    """Which graph it computes: `edge` is the network as trained, `interior` has zero padding; see `melrt.planning.windows`."""
    precision: str = ""
    """`fp32`, `tf32`, `fp16` or `int8`."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """What it can run on; of an engine: flavor, version, compute capability, profile."""
    quality: Mapping[str, float] = field(default_factory=dict)
    """What was measured against PyTorch when it was made."""

    def __post_init__(self) -> None:
        if not isinstance(self.file, str) or not _FILE_NAME.fullmatch(self.file) or self.file == MANIFEST:
            raise BundleError(f"it names a file {self.file!r}; only plain names within the bundle are allowed.")
        if type(self.size) is not int or not 0 <= self.size <= MAX_ARTIFACT_BYTES:
            raise BundleError(f"it gives {self.file} a size of {self.size!r}; at most {MAX_ARTIFACT_BYTES} bytes.")
        _check_kind(self, str, "kind", "sha256", "graph", "precision")
        _check_kind(self, dict, "target", "quality")
        if odd := [f"{k} {v!r}" for k, v in self.quality.items() if type(v) not in (int, float) or not -1e300 < v < 1e300]:
            raise BundleError(f"it gives {self.file} a quality of {odd[0]:.80}; that is a finite number.")

    @property
    def name(self) -> str:
        """The file's name without the part that tells a replacement from what it replaced."""
        return _REPLACEMENT.sub("", self.file)

    @classmethod
    def of(cls, file: str, data: bytes, kind: str, **facts: Any) -> Artifact:
        """Describe these bytes."""
        return cls(file, kind, len(data), hashlib.sha256(data).hexdigest(), **facts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle says of itself."""

    name: str
    """The voice's name."""
    spec: MelSpec
    """The mel convention of the input."""
    architecture: Mapping[str, Any]
    """The generator's shape, `GeneratorConfig.to_dict()` of the exporter."""
    receptive_field: ReceptiveField
    """Mel frames that a frame's samples depend on."""
    edges: Edges
    """How the voice's own project treats the ends of an utterance."""
    provenance: Mapping[str, str]
    """Where the weights come from: source, sha256, format, tool, command."""
    normalization: Normalization | None = None
    """What the training took off its mels; it is part of the graphs, and tells a mel that was normalized by mistake."""
    levels: Levels | None = None
    """What a mel of speech amounts to; one far from it gets a warning."""
    parameters: int = 0
    """Trained numbers; 0: not known."""
    flop_per_second: float = 0.0
    """Floating-point operations per second of audio, a multiply-add counted as two; 0: not known."""
    artifacts: tuple[Artifact, ...] = ()
    """Every file beside the manifest."""

    def __post_init__(self) -> None:
        _check_kind(self, str, "name")
        _check_kind(self, dict, "architecture", "provenance")
        for name in ("parameters", "flop_per_second"):
            if type(value := getattr(self, name)) not in (int, float) or not 0 <= value < 1e18:
                raise BundleError(f"{name} is {value!r}; it is a number, 0 if it is not known.")
        names = [entry.file for entry in self.artifacts]
        if len(set(names)) != len(names):
            raise BundleError(f"it lists a file twice: {sorted(names)}.")

    def dumps(self) -> bytes:
        """The file's content; the same manifest gives the same bytes."""
        values = {"schema": SCHEMA} | asdict(self) | {"spec": self.spec.to_dict()}
        values["normalization"] = self.normalization.to_dict() if self.normalization else None
        return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def loads(cls, data: bytes) -> Manifest:
        """Read `dumps`'s form.

        Raises:
            BundleError: Not a manifest, of a newer schema, or with a value that cannot be.
        """
        try:
            values = json.loads(data)
            schema = values.pop("schema")
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            raise BundleError(f"{MANIFEST} is not a melrt manifest ({error or type(error).__name__}).") from error
        if type(schema) is not int or schema < 1:
            raise BundleError(f"{MANIFEST} has schema {schema!r}; this melrt reads schema 1 to {SCHEMA}.")
        if schema > SCHEMA:
            raise BundleError(
                f"the bundle has schema {schema}, written by a newer melrt; this one reads up to {SCHEMA}: pip install --upgrade melrt"
            )
        try:
            spec = MelSpec.from_dict(values.pop("spec"))
            artifacts = tuple(Artifact(**entry) for entry in values.pop("artifacts"))
            field = ReceptiveField(**values.pop("receptive_field"))
            edges = Edges(**values.pop("edges"))
            given = values.pop("normalization", None)
            values["normalization"] = None if given is None else Normalization.from_dict(given)
            levels = values.pop("levels", None)
            values["levels"] = None if levels is None else Levels(**levels)
            return cls(spec=spec, artifacts=artifacts, receptive_field=field, edges=edges, **values)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"{MANIFEST} is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk. Reading it never executes anything."""

    path: Path
    """The folder."""
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle's manifest; its files are verified as they are read.

        Raises:
            BundleError: No bundle there, a damaged manifest, or a newer schema.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            what = f"has no {MANIFEST}, so it is no bundle" if path.exists() else "does not exist"
            raise BundleError(f"{path} {what}. `melrt export CHECKPOINT -o VOICE.melrt` makes a bundle.")
        try:
            return cls(path, Manifest.loads(_read_bounded(file, MAX_MANIFEST_BYTES)))
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], manifest: Manifest, files: Iterable[tuple[Artifact, bytes]], *, overwrite: bool = False
    ) -> Bundle:
        """Write a bundle; it appears whole or not at all.

        Raises:
            BundleError: `path` exists and `overwrite` is false, or is something else than a bundle.
        """
        path = Path(path)
        cls.check_place(path, overwrite=overwrite)
        contents = list(files)
        manifest = replace(manifest, artifacts=tuple(entry for entry, _ in contents))
        with atomic_folder(path) as folder:
            for entry, data in contents:
                (folder / entry.file).write_bytes(data)
            (folder / MANIFEST).write_bytes(manifest.dumps())
        return cls(path, manifest)

    @staticmethod
    def check_place(path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Raise BundleError if `path` exists, unless it is a bundle that may be replaced."""
        path = Path(path)
        is_bundle = (path / MANIFEST).is_file()
        if os.path.lexists(path) and not (overwrite and is_bundle):
            remedy = "Give another name, or --force to replace it." if is_bundle else "It is no bundle: give another name."
            raise BundleError(f"{path} exists. {remedy}")

    def add(self, entry: Artifact, data: bytes, *, made_from: Artifact | None = None) -> Artifact:
        """As `add_all`, for one file."""
        return self.add_all([(entry, data)], made_from=() if made_from is None else (made_from,))[0]

    def add_all(self, files: Sequence[tuple[Artifact, bytes]], *, made_from: Sequence[Artifact] = ()) -> list[Artifact]:
        """Add files, or replace those of their names: until the manifest changes, in one step for all, the old ones stand.

        Args:
            files: What each file is, and its content.
            made_from: The files of this bundle that they were made from; these must still be the same.

        Returns:
            The entries as they now stand in the manifest; a replacement's file name differs from what it replaced.

        Raises:
            BundleError: Meanwhile the bundle was replaced by one of other content.
        """
        with _locked(self.path):
            current = Bundle.open(self.path).manifest  # another process may have added to it since
            if any(source not in current.artifacts for source in made_from):
                raise BundleError(f"{self.path} was exported anew while {files[0][0].file} was made from it; make it again.")
            names = {entry.name for entry, _ in files}
            old = [a for a in current.artifacts if a.name in names]
            taken = {a.file for a in old}
            contents = [(_beside(entry, taken), data) for entry, data in files]
            added = [entry for entry, _ in contents]
            self._write(replace(current, artifacts=(*(a for a in current.artifacts if a not in old), *added)), contents)
            for gone in taken - {entry.file for entry in added}:
                (self.path / gone).unlink(missing_ok=True)
        return added

    def _write(self, manifest: Manifest, files: Sequence[tuple[Artifact, bytes]]) -> None:
        """New files, and then the manifest that lists them."""
        try:
            for entry, data in files:
                with atomic_write(self.path / entry.file) as temporary:
                    temporary.write_bytes(data)
            with atomic_write(self.path / MANIFEST) as temporary:
                temporary.write_bytes(manifest.dumps())
        except BaseException:
            listed = Bundle.open(self.path).manifest.artifacts  # they are, if only the folder's sync failed
            for entry, _ in files:
                if entry not in listed:
                    (self.path / entry.file).unlink(missing_ok=True)
            raise

    def read(self, entry: Artifact) -> bytes:
        """A file's bytes, after its size and hash were compared with the manifest.

        Raises:
            BundleError: The file is missing, truncated or altered.
        """
        file = self.path / entry.file
        if not file.is_file():
            raise BundleError(f"{file} is missing, but the manifest lists it. Copy the whole bundle again, or export it anew.")
        size = file.stat().st_size
        if size != entry.size:
            raise BundleError(f"{file} has {size} bytes; the manifest says {entry.size}. Copy the bundle again, or export it anew.")
        data = _read_bounded(file, entry.size)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{file} was altered: its SHA-256 is not the manifest's. Copy the bundle again, or export it anew.")
        return data

    def find(self, kind: str, *, graph: str = "", precision: str = "") -> list[Artifact]:
        """The files of this kind, in the manifest's order; an empty argument matches all."""
        return [a for a in self.manifest.artifacts
                if a.kind == kind and graph in ("", a.graph) and precision in ("", a.precision)]  # fmt: skip


def _beside(entry: Artifact, taken: set[str]) -> Artifact:
    """The entry under a file name that is not taken."""
    if entry.file not in taken:
        return entry
    stem, _, suffix = entry.name.rpartition(".")
    return replace(entry, file=f"{stem}+{entry.sha256[:8]}.{suffix}")


def _check_kind(owner: object, kind: type, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, kind):
            raise BundleError(f"{name} is {value!r}; it is {'text' if kind is str else 'an object'}.")


def _read_bounded(file: Path, limit: int) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise BundleError(f"{file} is larger than {limit} bytes.")
    return data


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that add to it."""
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                yield
                return
        finally:
            os.close(handle)
        # another folder took its place while we waited for the lock of the old one
