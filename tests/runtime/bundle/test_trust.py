"""Trust in engines: only engines that this user built, or vouches for, are opened."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tests.runtime.fake_tensorrt import add_engines, install

from melrt import Vocoder
from melrt.bundle import Artifact, Bundle
from melrt.bundle.trust import is_trusted, key_file, seal, sign, trust_engines, unseal
from melrt.errors import BackendError, BundleError, ConfigError

ENTRY = Artifact.of("x.engine", b"plan", "engine", graph="edge", precision="fp16", target={"version": "1.7", "profile": [[1, 80, 4]]})


@pytest.fixture
def voice(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    install(monkeypatch)
    monkeypatch.setattr("melrt.backends.select.find_gpu", lambda: "a GPU")
    return add_engines(tiny_bundle)


def test_any_change_of_the_entry_breaks_the_signature() -> None:
    signed = sign(ENTRY)
    assert is_trusted(signed)
    assert is_trusted(replace(signed, file="renamed.engine", quality={"snr_db": 60.0}))
    other = hashlib.sha256(b"other").hexdigest()
    for changed in (
        ENTRY, replace(signed, sha256=other), replace(signed, size=5), replace(signed, graph="interior"), replace(signed, precision="int8"),
        replace(signed, target={**signed.target, "version": "1.8"}), replace(signed, kind="onnx"), replace(signed, signature="0" * 64),
    ):  # fmt: skip
        assert not is_trusted(changed)


def test_engine_that_was_tampered_with_and_hashed_again_is_not_opened(voice: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    (entry,) = voice.find("engine", graph="interior")
    code = voice.read(entry) + b"other code"
    (voice.path / entry.file).write_bytes(code)
    manifest = json.loads((voice.path / "manifest.json").read_text())
    for each in manifest["artifacts"]:
        if each["file"] == entry.file:
            each |= {"size": len(code), "sha256": hashlib.sha256(code).hexdigest()}
    (voice.path / "manifest.json").write_text(json.dumps(manifest))
    with Vocoder.load(voice.path, precision="fp32") as vocoder:
        assert vocoder.backend.name == "onnxruntime"
    assert caplog.text.count("was not built by this user") == 1
    assert f"melrt trust {voice.path}" in caplog.text
    with pytest.raises(BackendError, match="could run any code.*melrt trust"):
        Vocoder.load(voice.path, backend="tensorrt", precision="fp32")


def test_another_users_engines_need_trust(melrt, voice: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = key_file()
    assert "not built by this user" not in melrt("info", voice.path)[1]
    monkeypatch.setenv("MELRT_KEY", str(tmp_path / "another.key"))
    assert melrt("info", voice.path)[1].count("not built by this user: its figures are unproven") == 2
    with pytest.raises(BackendError, match="melrt trust"):
        Vocoder.load(voice.path, backend="tensorrt", precision="fp32")
    Vocoder.load(voice.path, backend="tensorrt", precision="fp32", trust=True).close()
    monkeypatch.setenv("MELRT_TRUSTED_KEYS", str(builder))
    Vocoder.load(voice.path, backend="tensorrt", precision="fp32").close()
    monkeypatch.setenv("MELRT_TRUSTED_KEYS", os.pathsep.join(["nowhere.key", str(builder)]))
    Vocoder.load(voice.path, backend="tensorrt", precision="fp32").close()  # one key that cannot be used does not hide the others
    monkeypatch.delenv("MELRT_TRUSTED_KEYS")
    before = (voice.path / "manifest.json").read_bytes()
    code, out, _ = melrt("trust", voice.path)
    assert code == 0
    assert out.count("is trusted by this user now") == 2
    listed = key_file().with_name("trusted-engines").read_text()
    assert melrt("trust", voice.path)[0] == 0
    assert key_file().with_name("trusted-engines").read_text() == listed, "each engine is listed once"
    Vocoder.load(voice.path, backend="tensorrt", precision="fp32").close()
    assert (voice.path / "manifest.json").read_bytes() == before, "the builder is not locked out"
    monkeypatch.setenv("MELRT_KEY", "/proc/x/engine.key")
    code, _, err = melrt("trust", voice.path)
    assert code == 2
    assert "/proc/x/trusted-engines cannot be written" in err


def test_voice_without_engines_needs_no_list(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MELRT_KEY", "/proc/x/engine.key")
    assert trust_engines(tiny_bundle) == []


def test_trust_checks_the_hashes_first(voice: Bundle) -> None:
    (entry,) = voice.find("engine", graph="edge")
    (voice.path / entry.file).write_bytes(b"x" * entry.size)
    with pytest.raises(BundleError, match="was altered"):
        trust_engines(voice)
    assert Bundle.open(voice.path).find("engine", graph="edge") == [entry]


def test_key_is_private_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sign(ENTRY)
    key = key_file().read_bytes()
    assert len(key) == 32
    assert key_file().stat().st_mode & 0o777 == 0o600
    sign(ENTRY)
    assert key_file().read_bytes() == key
    assert [path.name for path in key_file().parent.glob(".engine.key*")] == []
    key_file().chmod(0o644)
    with pytest.raises(ConfigError, match="can be read or written by other users.*chmod 600"):
        is_trusted(ENTRY)
    key_file().chmod(0o600)
    key_file().write_bytes(b"short")
    with pytest.raises(ConfigError, match="has 5 bytes; a key has 32"):
        is_trusted(ENTRY)
    monkeypatch.setenv("MELRT_TRUSTED_KEYS", os.pathsep.join(["nowhere.key"]))
    key_file().unlink()
    with pytest.raises(ConfigError, match="nowhere.key cannot be read"):
        is_trusted(ENTRY)


def test_key_that_cannot_be_used_leaves_the_onnx_graphs(voice: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    key_file().chmod(0o644)
    with Vocoder.load(voice.path, precision="fp32") as vocoder:
        assert vocoder.backend.name == "onnxruntime"
    assert "can be read or written by other users" in caplog.text


def test_engine_of_another_graph_or_hop_is_refused(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    for facts, message in (({"source": "0" * 64}, "built from another ONNX graph"), ({"hop": 300}, "gives audio of shape")):
        with pytest.raises(BackendError, match=message):
            Vocoder.load(add_engines(tiny_bundle, **facts), backend="tensorrt", precision="fp32")


def test_seal_refuses_other_data_and_other_names() -> None:
    sealed = seal("a.engine", b"plan")
    assert sealed is not None
    assert unseal("a.engine", sealed) == b"plan"
    assert unseal("b.engine", sealed) is None
    assert unseal("a.engine", sealed[:-1] + b"x") is None
    assert unseal("a.engine", hashlib.sha256(b"plan").digest() + b"plan") is None
    assert unseal("a.engine", b"") is None


def test_signatures_that_are_no_hexadecimal_digits_are_refused() -> None:
    for signature in ("é" * 64, "AB" * 32, "0" * 63, 5):
        with pytest.raises(BundleError, match="64 hexadecimal digits"):
            replace(ENTRY, signature=signature)


def test_unwritable_key_leaves_the_engine_unsigned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MELRT_KEY", "/proc/melrt/engine.key")
    assert sign(ENTRY).signature == ""
    assert "was not signed" in caplog.text
