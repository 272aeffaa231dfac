"""Bundles: written whole or not at all, and verified before use."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from melrt.bundle import MANIFEST, Artifact, Bundle, Manifest
from melrt.errors import BundleError
from melrt.mel.spec import MelSpec
from melrt.planning.edges import Edges
from melrt.planning.windows import ReceptiveField

SPEC = MelSpec()


def manifest() -> Manifest:
    return Manifest("x", SPEC, {"channels": 4}, ReceptiveField(6, 6, 4, 7), Edges(), {"source": "x.pt"})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.create(tmp_path / "x.melrt", manifest(), [(Artifact.of("a.onnx", b"abc", "plan", precision="fp32"), b"abc")])


def test_written_bundle_reads_back(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path)
    assert again == bundle
    assert again.read(again.manifest.artifacts[0]) == b"abc"
    assert (again.path / MANIFEST).stat().st_mode & 0o777 == 0o666 & ~_umask()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"ab"), "has 2 bytes; the manifest says 3"),
        (lambda file: file.write_bytes(b"abd"), "was altered"),
    ],
)
def test_damaged_file_is_named(bundle: Bundle, damage, message: str) -> None:
    damage(bundle.path / "a.onnx")
    with pytest.raises(BundleError, match=f"a.onnx {message}"):
        bundle.read(bundle.manifest.artifacts[0])


def edit(bundle: Bundle, change) -> Path:
    values = json.loads((bundle.path / MANIFEST).read_text())
    change(values)
    (bundle.path / MANIFEST).write_text(json.dumps(values))
    return bundle.path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "newer melrt.*pip install --upgrade melrt"),
        (lambda m: m.update(schema="1"), "schema '1'"),
        (lambda m: m.pop("spec"), "damaged"),
        (lambda m: m.update(color="red"), "damaged.*color"),
        (lambda m: m["artifacts"][0].update(file="../../etc/passwd"), "plain file name within the bundle"),
        (lambda m: m["artifacts"][0].update(file=MANIFEST), "plain file name within the bundle"),
        (lambda m: m["artifacts"][0].update(size=1 << 50), "from 0 to 2147483648"),
        (lambda m: m["artifacts"].append(m["artifacts"][0]), "twice"),
        (lambda m: m["spec"].update(hop="256"), "hop is '256'; it must be a whole number"),
        (lambda m: m["spec"].update(f_max=99999), "f_max|within"),
        (lambda m: m["spec"].update(log="log3"), "log is 'log3'"),
        (lambda m: m["receptive_field"].update(smallest_input=-1), "smallest_input is -1"),
        (lambda m: m.update(receptive_field=[6]), "damaged"),
        (lambda m: m.update(receptive_field={"left": 6, "right": 10**400, "smallest_input": 4, "end_reach": 12}), "right is 1000"),
        (lambda m: m["receptive_field"].update(end_reach=None), "end_reach is None"),
        (lambda m: m["spec"].update(f_max=10**400), "damaged"),
        (lambda m: m["artifacts"][0].update(quality={"snr_db": float("nan")}), "quality snr_db nan"),
        (lambda m: m["artifacts"][0].update(quality={"snr_db": "[red]"}), "finite number"),
        (lambda m: m.update(name="\x1b[31mred"), "name is .*without control characters"),
        (lambda m: m["provenance"].update(source="\x1b]0;x\x07"), "provenance is .*without control characters"),
        (lambda m: m["provenance"].update(source="\ud800"), "provenance is .*without control characters"),
        (lambda m: m.update(architecture={"x": float("-inf")}), "architecture is .*finite"),
        (lambda m: m.update(architecture={"x": json.loads("[" * 200 + "]" * 200)}), "architecture is .*levels deep"),
        (lambda m: m["artifacts"][0].update(quality={"\x1b[2J": 1.0}), "under a plain name"),
        (lambda m: m.update(name=7), "name is 7; it must be text"),
        (lambda m: m.update(architecture=[]), "architecture is"),
        (lambda m: m["artifacts"][0].update(quality=None), "quality is None; it must be an object"),
        (lambda m: m["artifacts"][0].update(graph=1), "graph is 1; it must be text"),
        (lambda m: m["artifacts"][0].update(file=1), "file is 1; it must be a plain file name"),
        (lambda m: m["edges"].update(left=-1), "left is -1"),
        (lambda m: m["edges"].update(value="-5"), "value is '-5'"),
    ],
)
def test_wrong_manifest_values_are_refused(bundle: Bundle, change, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(edit(bundle, change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "x" * (2 << 20)])
def test_file_that_is_not_a_manifest_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=str(bundle.path)):
        Bundle.open(bundle.path)


def test_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist.*melrt export"):
        Bundle.open(tmp_path / "nowhere.melrt")
    with pytest.raises(BundleError, match=r"has no manifest.json"):
        Bundle.open(tmp_path)


def test_existing_folder_is_not_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="--force"):
        Bundle.create(bundle.path, manifest(), [])
    (tmp_path / "home").mkdir()
    with pytest.raises(BundleError, match="not a bundle: give another name"):
        Bundle.create(tmp_path / "home", manifest(), [], overwrite=True)


def test_replaced_bundle_leaves_no_old_files(bundle: Bundle) -> None:
    Bundle.create(bundle.path, manifest(), [(Artifact.of("b.onnx", b"b", "plan"), b"b")], overwrite=True)
    assert sorted(file.name for file in bundle.path.iterdir()) == ["b.onnx", MANIFEST]
    assert [path.name for path in bundle.path.parent.iterdir()] == ["x.melrt"]


def test_failed_addition_leaves_the_bundle_unchanged(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = Bundle.open(bundle.path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        bundle.add(Artifact.of("b.engine", b"b", "engine"), b"b")
    assert Bundle.open(bundle.path) == before
    assert sorted(file.name for file in bundle.path.iterdir()) == ["a.onnx", MANIFEST]


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_failed_replacement_leaves_the_old_file(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    """Any of the four syncs (file, its folder, manifest, its folder) may fail. The bundle is then the old one or the new one."""
    sync, calls = os.fsync, []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        bundle.add(Artifact.of("a.onnx", b"new", "plan"), b"new")
    found = Bundle.open(bundle.path)
    (entry,) = found.manifest.artifacts
    assert found.read(entry) == (b"new" if fails_at == 4 else b"abc")
    if fails_at < 4:
        assert sorted(file.name for file in bundle.path.iterdir()) == ["a.onnx", MANIFEST]


def test_file_can_be_replaced_repeatedly(bundle: Bundle) -> None:
    for content in (b"new", b"newer", b"newer", b"newest"):
        entry = bundle.add(Artifact.of("a.onnx", content, "plan"), content)
        found = Bundle.open(bundle.path)
        assert found.manifest.artifacts == (entry,)
        assert found.read(entry) == content
        assert sorted(file.name for file in bundle.path.iterdir()) == sorted([entry.file, MANIFEST])
        assert entry.name == "a.onnx"


def test_engine_of_another_bundle_is_not_added(bundle: Bundle) -> None:
    (source,) = bundle.manifest.artifacts
    Bundle.create(bundle.path, manifest(), [(Artifact.of("a.onnx", b"other", "plan"), b"other")], overwrite=True)
    with pytest.raises(BundleError, match="exported again while b.engine was made"):
        bundle.add(Artifact.of("b.engine", b"b", "engine"), b"b", made_from=source)
    assert not (bundle.path / "b.engine").exists()


def _add(path: str, name: str) -> None:
    Bundle.open(path).add(Artifact.of(name, name.encode(), "engine"), name.encode())


def test_concurrent_additions_lose_no_file(bundle: Bundle) -> None:
    names = [f"{i}.engine" for i in range(8)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(str(bundle.path), name)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(a.file for a in Bundle.open(bundle.path).find("engine")) == names


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_links_in_a_bundle_write_nothing_outside_it(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle from a stranger may hold links in place of the files that a command is going to write."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (bundle.path / "policy.json").symlink_to(victim)
    bundle.add(Artifact.of("policy.json", b"new", "policy"), b"new")
    assert victim.read_bytes() == b"precious"
    again = Bundle.open(bundle.path)
    assert again.read(again.find("policy")[0]) == b"new"
    other = tmp_path / "other.json"
    (bundle.path / MANIFEST).rename(other)
    (bundle.path / MANIFEST).symlink_to(other)
    before = other.read_bytes()
    bundle.add(Artifact.of("b", b"b", "policy"), b"b")
    assert other.read_bytes() == before
    assert not (bundle.path / MANIFEST).is_symlink()


def test_links_are_read_if_their_content_is_the_manifests(bundle: Bundle, tmp_path: Path) -> None:
    """Caches of model hubs hold links to files that are named by their hashes."""
    store = tmp_path / "blobs"
    store.mkdir()
    for file in list(bundle.path.iterdir()):
        file.rename(store / file.name)
        file.symlink_to(store / file.name)
    linked = Bundle.open(bundle.path)
    (entry,) = linked.manifest.artifacts
    assert linked.read(entry) == b"abc"
    (store / "a.onnx").write_bytes(b"abd")
    with pytest.raises(BundleError, match="a.onnx was altered"):
        linked.read(entry)
    (bundle.path / MANIFEST).unlink()
    (bundle.path / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(BundleError, match=f"has no {MANIFEST}"):
        Bundle.open(bundle.path)
