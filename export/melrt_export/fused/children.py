"""Work in child processes: a crash, a hang, or a GPU context that a kernel ruined ends a child, and not the command."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from melrt.errors import EngineBuildError

# A child imports Triton's compiler or opens a GPU.
START_SECONDS = 120.0


class ChildError(Exception):
    """A call failed in a child, or ended it."""


class Child:
    """An object in a process of its own. It is made again for the call after one that ended the process."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        """Describe the object; the process starts with the first call.

        Args:
            make: Makes the object. Its method `usable()` says after a failed call whether the object can go on.
            arguments: Arguments of `make`.
        """
        self._made = make, arguments
        self._process: Any = None
        self._connection: Any = None

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Call a method of the object.

        Raises:
            ChildError: The method raised an exception, took longer than this many seconds, or ended the process.
            EngineBuildError: The object cannot be made.
        """
        if self._process is None:
            self._start()
        self._connection.send((method, arguments))
        done, value, usable = self._receive(seconds)
        if not usable:
            self.close()
        if not done:
            raise ChildError(value)
        return value

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()
            self._connection.close()

    def _start(self) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._process = start_process(_enter, (other, *self._made))
        other.close()
        try:
            done, value, _ = self._receive(START_SECONDS)
        except ChildError as error:
            done, value = False, str(error)
        if not done:
            self.close()
            raise EngineBuildError(f"a process for tuning could not start: {value}")

    def _receive(self, seconds: float) -> tuple[bool, Any, bool]:
        reason = f"it took more than {seconds:g} s"
        try:
            if self._connection.poll(seconds):
                reply: tuple[bool, Any, bool] = self._connection.recv()
                return reply
        except (EOFError, OSError):
            self._process.join()
            reason = f"it ended its process with exit code {self._process.exitcode}"
        self.close()
        raise ChildError(reason)


class Children:
    """Several children with the same kind of object, which share jobs."""

    def __init__(self, count: int, make: Callable[..., Any], *arguments: Any) -> None:
        self._all = [Child(make, *arguments) for _ in range(count)]

    def map(self, method: str, jobs: Sequence[tuple[Any, ...]], seconds: float, on_done: Callable[[], None]) -> list[Any]:
        """Call a method with each job's arguments, and return the results in order; a `ChildError` is the result of a call that failed."""
        free: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._all:
            free.put(child)

        def run(job: tuple[Any, ...]) -> Any:
            child = free.get()
            try:
                return child.call(method, *job, seconds=seconds)
            except ChildError as error:
                return error
            finally:
                free.put(child)

        threads = ThreadPoolExecutor(len(self._all))
        results = []
        try:
            for result in threads.map(run, jobs):
                results.append(result)
                on_done()
            return results
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for child in self._all:
                child.close()


def start_process(target: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Start a process that inherits no threads, locks or GPU context of this one."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def _enter(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command that is interrupted ends its children
    for stream in (1, 2):  # the compiler prints there why it refuses a candidate, with all of its code
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    serve(connection, make, arguments)


def serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make the object and call its methods until the other end closes."""
    try:
        made = make(*arguments)
    except Exception as error:
        return connection.send((False, f"{type(error).__name__}: {error}", False))
    connection.send((True, None, True))
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, values = connection.recv()
            try:
                reply = True, getattr(made, method)(*values), True
            except Exception as error:  # of the compiler or the driver, which have no common base
                reply = False, f"{type(error).__name__}: {error}", made.usable()
            connection.send(reply)
            if not reply[2]:
                return None
