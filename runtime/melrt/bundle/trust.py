"""Trust in engines. An engine is executable code, and its hash is in the manifest beside it, so the manifest proves nothing about it.

`melrt build` signs the entry of an engine with a key that only this user can read. An engine is opened only if this key, or one that
`MELRT_TRUSTED_KEYS` names, signed its entry. A person who changes a bundle cannot sign it again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from melrt.bundle.folder import Bundle
from melrt.bundle.manifest import Artifact
from melrt.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_BYTES = 32


def key_file() -> Path:
    """Return the path of this user's key: `$MELRT_KEY`, or `melrt/engine.key` in `$XDG_CONFIG_HOME` or `~/.config`."""
    chosen = os.environ.get("MELRT_KEY")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "melrt" / "engine.key"


def sign(entry: Artifact) -> Artifact:
    """Return an engine's entry, signed with this user's key, which is made if there is none.

    If the key cannot be written, the entry stays unsigned, and a warning says so.

    Raises:
        ConfigError: The key is damaged, or other users can read it.
    """
    try:
        return replace(entry, signature=_mac(_own_key(), entry))
    except OSError as error:
        logger.warning("%s was not signed, because the key %s cannot be written: %s", entry.file, key_file(), error.strerror or error)
        return entry


def is_trusted(entry: Artifact) -> bool:
    """Return True if this user's key or one in `MELRT_TRUSTED_KEYS` signed an engine's entry.

    Raises:
        ConfigError: A key is missing or damaged, or other users can read it.
    """
    return any(hmac.compare_digest(entry.signature, _mac(key, entry)) for key in _trusted_keys())


def trust_engines(bundle: Bundle) -> list[Artifact]:
    """Sign every engine of a bundle with this user's key, after checking the files' hashes; for engines built by someone you trust.

    Raises:
        BundleError: A file is missing or altered.
        ConfigError: The key cannot be used.
    """
    engines = bundle.find("engine")
    for entry in engines:
        bundle.read(entry)
    return bundle.replace_entries([(entry, sign(entry)) for entry in engines])


def _mac(key: bytes, entry: Artifact) -> str:
    facts = [entry.kind, entry.size, entry.sha256, entry.graph, entry.precision, dict(entry.target)]
    return hmac.new(key, json.dumps(facts, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _own_key() -> bytes:
    file = key_file()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, file)  # fails if another process made the key meanwhile, which then is the key
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return _read_key(file)


def _trusted_keys() -> Iterator[bytes]:
    if key_file().exists():
        yield _read_key(key_file())
    for path in filter(None, os.environ.get("MELRT_TRUSTED_KEYS", "").split(os.pathsep)):
        yield _read_key(Path(path))


def _read_key(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            mode, key = os.fstat(stream.fileno()).st_mode, stream.read(KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the key {file} cannot be read: {error.strerror or error}") from error
    if mode & 0o077:
        raise ConfigError(f"the key {file} can be read by other users, so it proves nothing: chmod 600 {file}")
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the key {file} has {len(key)} bytes; a key has {KEY_BYTES}. Remove it; `melrt build` makes a new one.")
    return key
