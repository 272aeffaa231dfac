"""Many voices in one process: loaded at their first request, within a memory limit, on the same worker threads."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Self

from melrt.backends.select import BackendChoice, open_backend
from melrt.bundle import MANIFEST, Bundle
from melrt.errors import BackendError, BundleError, ClosedError, MelrtError, QueueFullError
from melrt.residency import Entry, Memory, Residency, VoiceStats, memory_of
from melrt.scheduling.workers import Workers
from melrt.vocoder import Options, Vocoder

logger = logging.getLogger(__name__)

SUFFIX = ".melrt"
# Longest time in seconds for which the loader waits for the memory of voices that are in use. Other voices wait behind it.
LONGEST_WAIT = 30.0


class Voices:
    """The voices of a folder, by name. Safe to use from several threads.

    `voices["lj"]` is a `Vocoder`. Look it up for each request or stream, and do not keep it: a voice that is in use stays in memory.
    """

    def __init__(  # noqa: PLR0913  # each is one choice, by keyword
        self,
        source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        threads: int | None = None,
        options: Options | None = None,
        residency: Residency | None = None,
        trust: bool = False,
    ) -> None:
        """Find the voices. None is loaded yet.

        Args:
            source: A folder with bundles (`NAME.melrt`), in which bundles may appear later, or the paths of bundles.
            device: Device of all voices, as in `Vocoder.load`; so are `precision`, `backend` and `trust`.
            precision: Precision, chosen for each voice if it is `auto`.
            backend: Backend, chosen for each voice if it is `auto`.
            threads: CPU threads in all, which the voices share; one per usable core if None.
            options: Windows, limits, ends of utterances, streams and output of every voice.
            residency: Memory limit, pinned voices and weights.
            trust: Open TensorRT engines that nobody vouches for.

        Raises:
            ConfigError: An argument is not one of the allowed values.
            BundleError: The folder or a bundle does not exist, or two bundles have one name.
        """
        self._options = options or Options()
        self._choice = BackendChoice(device, precision, backend, threads, self._options.sample_format, trust)
        self._residency = residency or Residency()
        self._folder = Path(source) if isinstance(source, str | os.PathLike) else None
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._workers: dict[str, Workers] = {}
        wait = LONGEST_WAIT if self._patience is None else min(self._patience, LONGEST_WAIT)
        self._memory = Memory(self._residency, wait, self._entries, self._lock)
        self._closed = False
        self._pid = os.getpid()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="melrt-loader")
        weakref.finalize(self, _end, self._workers)
        for path in self._bundles() if isinstance(source, str | os.PathLike) else map(Path, source):
            self._add(path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the voices, sorted. A folder is read again."""
        self._check_process()
        with self._lock:
            self._look_for_new()
            return tuple(sorted(name for name, entry in self._entries.items() if entry.on_disk))

    @property
    def memory(self) -> int:
        """Estimated bytes that loaded voices take, those included that were unloaded but are still in use."""
        return self._memory.total

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Vocoder:
        """Return a voice, and load it first if it is not in memory.

        Raises:
            BundleError: There is no such voice, or its bundle is damaged.
            BackendError: It cannot run here.
            QueueFullError: It is being loaded and the limits say not to wait (longer), or there is no memory for it.
            ClosedError: The voices were closed.
        """
        loading = self.load(name)
        try:
            return loading.result(self._patience)
        except TimeoutError:
            return self._result(name, loading)

    async def load_async(self, name: str) -> Vocoder:
        """Return a voice like `voices[name]`, without blocking the event loop."""
        loading = self.load(name)
        waiting = asyncio.wrap_future(loading)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # asyncio logs an error that nobody looks at
        await asyncio.wait({waiting}, timeout=self._patience)
        return self._result(name, loading)

    def load(self, name: str) -> Future[Vocoder]:
        """Begin to load a voice ahead of its use, and return a future.

        Raises:
            BundleError: There is no such voice.
            ClosedError: The voices were closed.
        """
        self._check_process()
        with self._lock:
            if self._closed:
                raise ClosedError("the voices are closed; open them again.")
            entry, now = self._entry(name), time.monotonic()
            entry.used = now
            vocoder = None if entry.vocoder is None or entry.vocoder.queue.closed else entry.vocoder
            if vocoder is None or self._has_changed(entry, now):
                entry.loading = entry.loading or self._loader.submit(self._load, name, entry)
            if vocoder is None and entry.loading is not None:
                return entry.loading
        loaded: Future[Vocoder] = Future()
        loaded.set_result(vocoder)  # type: ignore[arg-type]
        return loaded

    def bundle(self, name: str) -> Bundle:
        """Open the bundle of a voice, whose manifest says how its mels are made, without loading the voice.

        Raises:
            BundleError: There is no such voice, or its manifest is damaged.
        """
        self._check_process()
        with self._lock:
            path = self._entry(name).path
        return Bundle.open(path)

    def unload(self, name: str) -> None:
        """Drop a voice from memory once nothing uses it. Its next request loads it again; a voice that is not loaded is left alone."""
        self._check_process()
        with self._lock:
            entry = self._entries.get(name)
        if entry is not None:
            self._memory.drop(entry)

    def stats(self) -> dict[str, VoiceStats]:
        """Return the state of every voice."""
        self._check_process()
        with self._lock:
            entries = list(self._entries.items())
        return {name: entry.stats() for name, entry in entries}

    def close(self, *, drain: bool = True) -> None:
        """Close all voices: after their queues are empty, or (not `drain`) with ClosedError for the requests that wait.

        Raises:
            BackendError: A backend did not return from a run, as in `Vocoder.close`. The other voices are closed.
        """
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = self._memory.closed = True
        self._loader.shutdown(cancel_futures=True)
        with self._lock:
            loaded = [entry.vocoder for entry in self._entries.values() if entry.vocoder is not None]
        errors = []
        for vocoder in loaded:
            try:
                vocoder.close(drain=drain)
            except BackendError as error:
                errors.append(error)
        _end(self._workers)
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _patience(self) -> float | None:
        """Longest wait for a voice in seconds; None for no limit."""
        return self._options.limits.wait_timeout if self._options.limits.wait else 0.0

    def _result(self, name: str, loading: Future[Vocoder]) -> Vocoder:
        """Return a voice that was loaded in time, or raise QueueFullError with the reason for which it was not."""
        no_room = self._memory.no_room
        if not loading.done():
            raise QueueFullError(no_room or f"the voice {name} is being loaded; try again later, or raise Limits.wait_timeout.")
        return loading.result()

    def _check_process(self) -> None:
        """Raise BackendError in a forked child. This comes before any lock, which a thread of the parent may have held."""
        if self._pid != os.getpid():
            raise BackendError(f"these voices were opened in process {self._pid}; their threads did not survive the fork. Open them here.")

    def _has_changed(self, entry: Entry, now: float) -> bool:
        """Look from time to time whether a bundle on disk is another than the one that was loaded."""
        if now - entry.checked <= self._residency.check_seconds:
            return False
        entry.checked = now
        return entry.on_disk not in ((), entry.version)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries and self._has_bundle(name):
            self._look_for_new()
        entry = self._entries.get(name)
        if entry is None or (self._folder is not None and entry.gone):
            known = islice((one for one in sorted(self._entries) if not self._entries[one].gone), 20)
            raise BundleError(f"there is no voice {name!r}; there are: {', '.join(known) or 'none'}.")
        return entry

    def _has_bundle(self, name: str) -> bool:
        """Return whether the folder has a bundle of this name. To list a large folder for each unknown name would delay other requests."""
        if self._folder is None or not name.isprintable() or {"/", "\\"} & {*name}:
            return False
        return Entry(self._folder / f"{name}{SUFFIX}").on_disk != ()

    def _look_for_new(self) -> None:
        """Add the bundles that have appeared. A voice without a bundle is forgotten once it is not loaded."""
        if self._folder is not None:
            for name in [name for name, entry in self._entries.items() if entry.gone]:
                del self._entries[name]
        known = {entry.path for entry in self._entries.values()}
        for path in self._bundles():
            if path not in known:
                self._add(path)

    def _bundles(self) -> list[Path]:
        if self._folder is None:
            return []
        if not self._folder.is_dir():
            raise BundleError(f"{self._folder} is not a folder. Name a folder that contains bundles (NAME{SUFFIX}), or a list of bundles.")
        return [path.parent for path in sorted(self._folder.glob(f"*{SUFFIX}/{MANIFEST}"))]

    def _add(self, path: Path) -> None:
        name = path.name.removesuffix(SUFFIX)
        if name in self._entries:
            raise BundleError(f"{path} and {self._entries[name].path} have the same name {name!r}; rename one of them.")
        if self._folder is None:
            Bundle.open(path)
        self._entries[name] = Entry(path)

    def _load(self, name: str, entry: Entry) -> Vocoder:
        """Load a voice in the loader's thread. Until then, requests for a voice that has changed use the old one."""
        version, start = entry.on_disk, time.monotonic()
        try:
            vocoder, memory = self._open(name, entry.path)
        except Exception as error:
            if entry.on_disk not in ((), version):  # replaced meanwhile
                return self._load(name, entry)
            with self._lock:
                entry.loading, old = None, entry.vocoder
                if not isinstance(error, QueueFullError):
                    entry.version = version  # an attempt with the same files would fail again
            if old is None or not isinstance(error, MelrtError):
                raise
            # as text: a log record that is kept would keep the traceback, and with it the old voice
            logger.warning("the voice %s has changed and could not be loaded again; the old one is used: %s", name, str(error))
            return old
        with self._lock:
            old, entry.vocoder, entry.loading, entry.version, entry.memory = entry.vocoder, vocoder, None, version, memory
            entry.checked, entry.loads, entry.load_seconds = time.monotonic(), entry.loads + 1, time.monotonic() - start
        return vocoder

    def _open(self, name: str, path: Path) -> tuple[Vocoder, int]:
        bundle = Bundle.open(path)
        self._memory.make_room(name, memory_of(bundle, "fp32", "onnxruntime"))
        backend = open_backend(bundle, self._choice)
        memory = memory_of(bundle, backend.precision, backend.name)
        workers = self._workers.setdefault(backend.device, Workers())
        vocoder = Vocoder(bundle, backend, self._options, workers)
        vocoder.queue.usage.weight = self._residency.weights.get(name, 1.0)
        self._memory.add(name, vocoder.queue, memory)
        return vocoder, memory


def _end(workers: dict[str, Workers]) -> None:
    for device in workers.values():
        device.end()
