"""Trust in engines. An engine is executable code, and its hash is in the manifest beside it, so the manifest proves nothing about it.

`melrt build` signs the entry of an engine with a key that only this user can read. An engine is opened only if this key, or one that
`MELRT_TRUSTED_KEYS` names, signed its entry, or if this user vouched for it with `melrt trust`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
from dataclasses import replace
from pathlib import Path

from melrt.bundle.folder import Bundle
from melrt.bundle.manifest import Artifact
from melrt.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_BYTES = 32
_MAC_BYTES = 32


def key_file() -> Path:
    """Return the path of this user's key: `$MELRT_KEY`, or `melrt/engine.key` in `$XDG_CONFIG_HOME` or `~/.config`.

    Raises:
        ConfigError: This user has no home folder.
    """
    if chosen := os.environ.get("MELRT_KEY"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "melrt" / "engine.key"
    except RuntimeError as error:
        raise ConfigError("this user has no home folder for the key that signs engines; name a file with MELRT_KEY.") from error


def sign(entry: Artifact) -> Artifact:
    """Return an engine's entry, signed with this user's key; unsigned, with a warning, if the key cannot be used."""
    try:
        return replace(entry, signature=_mac(_own_key(), _facts(entry)).hex())
    except ConfigError as error:
        logger.warning("%s was not signed, so it will not be opened without `melrt trust`: %s", entry.file, error)
        return entry


def is_trusted(entry: Artifact) -> bool:
    """Return True if a trusted key signed an engine's entry, or if this user vouched for it.

    Raises:
        ConfigError: Nothing vouches for it, and a key could not be used.
    """
    problems = []
    for file in _key_files():
        try:
            if hmac.compare_digest(entry.signature.encode(), _mac(_read_key(file), _facts(entry)).hex().encode()):
                return True
        except ConfigError as error:
            problems.append(str(error))
    if _digest(entry) in _vouched():
        return True
    if problems:
        raise ConfigError(" ".join(problems))
    return False


def trust_engines(bundle: Bundle) -> list[Artifact]:
    """Vouch for every engine of a bundle, after checking the files' hashes. The bundle does not change; the user's own list does.

    Raises:
        BundleError: A file is missing or altered.
        ConfigError: The list cannot be written.
    """
    engines = [entry for entry in bundle.find("engine") if bundle.read(entry)]
    known = _vouched() if engines else []
    new = [digest for entry in engines if (digest := _digest(entry)) not in known]
    if not new:
        return engines
    file = _vouched_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as stream:
            stream.writelines(f"{digest}\n" for digest in new)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror or error}); name another place with MELRT_KEY.") from error
    return engines


def seal(name: str, data: bytes) -> bytes | None:
    """Return data for a cache, sealed with this user's key so that nobody else can place it there; None without a key."""
    with contextlib.suppress(ConfigError):
        return _sealed(_own_key(), name, data)
    return None


def unseal(name: str, sealed: bytes) -> bytes | None:
    """Return the data that `seal` was given under this name; None if this user did not seal it."""
    data = sealed[_MAC_BYTES:]
    with contextlib.suppress(ConfigError):
        return data if hmac.compare_digest(sealed, _sealed(_read_key(key_file()), name, data)) else None
    return None


def _sealed(key: bytes, name: str, data: bytes) -> bytes:
    return _mac(key, name.encode() + b"\0" + data) + data


def _facts(entry: Artifact) -> bytes:
    facts = [entry.kind, entry.size, entry.sha256, entry.graph, entry.precision, dict(entry.target)]
    return json.dumps(facts, sort_keys=True).encode()


def _digest(entry: Artifact) -> str:
    return hashlib.sha256(_facts(entry)).hexdigest()


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha256).digest()


def _vouched() -> list[str]:
    """Return the digests of the engines that this user vouched for; none if the list is missing or cannot be trusted."""
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        return _read_private(_vouched_file(), 1 << 20).decode().split()
    return []


def _vouched_file() -> Path:
    return key_file().with_name("trusted-engines")


def _key_files() -> list[Path]:
    """Return the files of the keys that exist, and those that `MELRT_TRUSTED_KEYS` names."""
    named = [Path(path) for path in os.environ.get("MELRT_TRUSTED_KEYS", "").split(os.pathsep) if path]
    with contextlib.suppress(ConfigError, OSError):
        if os.path.lexists(key_file()):
            named.insert(0, key_file())
    return named


def _own_key() -> bytes:
    file = key_file()
    try:
        if not file.exists():
            _make_key(file)
    except OSError as error:
        raise ConfigError(f"the key {file} cannot be written ({error.strerror or error}); name another file with MELRT_KEY.") from error
    return _read_key(file)


def _make_key(file: Path) -> None:
    """Make a key; if another process makes one at the same time, the first one stays."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read_key(file: Path) -> bytes:
    key = _read_private(file, KEY_BYTES)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"the key {file} has {len(key)} bytes; a key has {KEY_BYTES}. Remove it; `melrt build` makes a new one.")
    return key


def _read_private(file: Path, most: int) -> bytes:
    """Read a file that only this user, or root for this user's group, can have written, and that no other user can read."""
    try:
        with file.open("rb") as stream:
            status, data = os.fstat(stream.fileno()), stream.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not hasattr(os, "geteuid"):
        raise ConfigError(f"{file} proves nothing, because this system does not say which user wrote it. Engines need Linux.")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{file} belongs to another user, so it proves nothing.")
    from_root = status.st_uid == 0 and os.geteuid() != 0  # such as a secret that is mounted for this user's group
    if status.st_mode & (0o037 if from_root else 0o077):
        raise ConfigError(f"{file} can be read or written by other users, so it proves nothing: chmod 600 {file}")
    return data
