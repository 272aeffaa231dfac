"""Workers: the threads of one device. They run the windows of every queue on it, in an order that is fair to the queues."""

from __future__ import annotations

import os
import threading
import time
from typing import Protocol

from melrt.errors import BackendError
from melrt.scheduling.order import FairOrder
from melrt.scheduling.request import Job

# Seconds of lane time, per weight, that a queue without windows saves up. A request of a few windows to a voice that is mostly quiet then
# runs before those of flooded voices. A queue that has more windows than that is flooded itself, and loses what it has saved up.
CREDIT = 0.25


class Member(Protocol):
    """A queue, as its workers see it."""

    @property
    def usage(self) -> Usage:
        """Lane time that its windows have used."""
        ...

    @property
    def lanes(self) -> int:
        """Largest number of its runs at the same time."""
        ...

    @property
    def windows_waiting(self) -> int:
        """Number of windows that wait."""
        ...

    def next_deadline(self) -> float:
        """Return the deadline of its most urgent window. At least one waits."""
        ...

    def take(self) -> list[Job]:
        """Remove the windows of the next run. The caller holds the lock."""
        ...

    def run(self, jobs: list[Job]) -> None:
        """Run windows and deliver their audio. It raises nothing."""
        ...

    def ran(self, seconds: float) -> None:
        """Count the lane time of a run that has left its lane."""
        ...


class Usage:
    """Lane time that a queue has used, and the weight of the queue."""

    def __init__(self) -> None:
        self.weight = 1.0
        """Share of the lanes, relative to the weights of the other queues that have windows."""
        self.seconds = 0.0
        """Lane time that counts: that of its runs, and what it did not use while it had no window."""
        self.floor = 0.0
        """Least lane time of the queue if it has saved nothing up."""
        self.window_seconds = 0.0
        """Mean lane time of a window."""
        self.last_run = time.monotonic()
        """Time at which the last run ended."""

    def add(self, seconds: float, window_seconds: float = 0.0) -> None:
        """Count a run that has just ended, and note the mean time of a window."""
        self.seconds += seconds
        self.window_seconds = window_seconds
        self.last_run = time.monotonic()


class Workers:
    """Threads, lanes and lock of one device. The threads start with the first request and belong to the process that made them."""

    def __init__(self) -> None:
        # `with self.lock` is one step for an interrupt, `with self.changed` would not be
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        """Notified when there is work for a thread, and for `close`."""
        self.room = threading.Condition(self.lock)
        """Notified when a queue has room again."""
        self.runners: dict[int, Member] = {}
        """Queue whose windows a thread runs, by the thread's identifier. Each entry is a lane in use."""
        self.threads: list[threading.Thread] = []
        self._members: dict[Member, None] = {}
        self._busy: FairOrder[Member] = FairOrder()  # those with windows
        self._progress = 0.0  # lane time per weight of the queue that ran last
        self._lanes = 0
        self._ended = False
        self._pid = os.getpid()

    @property
    def foreign(self) -> bool:
        """True in a forked child: the threads, and perhaps a held lock, belong to the parent process."""
        return self._pid != os.getpid()

    @property
    def inside(self) -> bool:
        """True in a thread that runs windows now, so in a callback of a queue; waiting there for others could wait for itself."""
        return threading.get_ident() in self.runners or threading.current_thread() in self.threads

    @property
    def busy(self) -> bool:
        """True if a window waits in any queue."""
        return bool(self._busy)

    def only(self, member: Member) -> bool:
        """Return whether no window waits in another queue. The caller holds the lock."""
        return len(self._busy) == (member in self._busy)

    def check_process(self) -> None:
        """Raise BackendError in a forked child."""
        if self.foreign:
            raise BackendError(f"this vocoder was loaded in process {self._pid}; its threads did not survive the fork. Load one here.")

    def add(self, member: Member) -> None:
        """Begin to run the windows of a queue."""
        with self.lock:
            self._members[member] = None
            self._lanes = max(self._lanes, member.lanes)

    def remove(self, member: Member) -> None:
        """Forget a queue in which no window waits any more."""
        with self.lock:
            self._members.pop(member, None)
            self._busy.discard(member)
            self._lanes = max((member.lanes for member in self._members), default=self._lanes)
            self.changed.notify_all()

    def update(self, member: Member) -> None:
        """Take note of the windows that wait in a queue. The caller holds the lock."""
        if member.windows_waiting:
            usage = member.usage
            if member not in self._busy:
                self._catch_up(member)
            flooded = member.windows_waiting * usage.window_seconds > CREDIT
            if flooded:
                usage.seconds = max(usage.seconds, usage.floor)
            self._busy.put(member, member.next_deadline(), usage.seconds, usage.weight, flooded=flooded)
        else:
            self._busy.discard(member)

    def end(self) -> None:
        """End the threads once no queue is left."""
        with self.lock:
            self._ended = True
            self.changed.notify_all()

    def start_threads(self) -> None:
        """Start the threads that are missing. The caller holds the lock."""
        while len(self.threads) < self._lanes:
            thread = threading.Thread(target=self._work, name=f"melrt-{len(self.threads)}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def runs(self, member: Member) -> int:
        """Return how many runs of a queue are in progress. The caller holds the lock."""
        return sum(one is member for one in self.runners.values())

    def free_lane(self, member: Member) -> bool:
        """Return whether a queue may start a run. The caller holds the lock."""
        return len(self.runners) < self._lanes and self.runs(member) < member.lanes

    def take_lane(self, member: Member) -> bool:
        """Take a lane for a window that does not wait; return False if a window waits in any queue, or no lane is free.

        The caller holds the lock.
        """
        if self._busy or not self.free_lane(member):
            return False
        self._catch_up(member)
        self._occupy(member)
        return True

    def take(self, member: Member) -> list[Job]:
        """Take a lane, and the windows of one run. The caller holds the lock."""
        self._occupy(member)
        jobs = member.take()
        self.update(member)
        self.room.notify_all()
        return jobs

    def leave_lane(self, seconds: float = 0.0) -> None:
        """Free the lane of this thread, if it has one, after this much time."""
        with self.lock:
            member = self.runners.pop(threading.get_ident(), None)
            if self._busy or self._ended:
                self.changed.notify_all()
        if member is not None:
            member.ran(seconds)
            if self._busy:
                with self.lock:
                    if member in self._busy:  # with its new lane time
                        self.update(member)

    def _catch_up(self, member: Member) -> None:
        """Count the time in which a queue had no window, but for the credit: it is not saved up for a flood."""
        usage = member.usage
        usage.floor = self._progress * usage.weight
        usage.seconds = max(usage.seconds, usage.floor - CREDIT * usage.weight)

    def _occupy(self, member: Member) -> None:
        self.runners[threading.get_ident()] = member
        self._progress = max(self._progress, member.usage.seconds / member.usage.weight)

    def _work(self) -> None:
        while self._work_once():
            pass  # between two runs a worker refers to no request, whose frames and audio it would keep alive

    def _work_once(self) -> bool:
        with self.lock:
            while (member := self._next()) is None:
                if self._ended and not self._members:
                    return False
                self.changed.wait()
            jobs = self.take(member)
        start = time.monotonic()
        try:
            member.run(jobs)
        finally:
            jobs.clear()
            self.leave_lane(time.monotonic() - start)
        return True

    def _next(self) -> Member | None:
        """Return the queue whose window runs next, or None if there is no window or no lane for it.

        Queues within their share of the lane time come first, so queues that are flooded do not delay the others. A queue that had no
        window begins where the last run was, less the credit, as in start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).
        """
        if len(self.runners) >= self._lanes:
            return None
        return self._busy.first({member for member in self.runners.values() if not self.free_lane(member)})
