"""Signals that end a process: the first one asks, a second one leaves at once. Imports no torch.

SIGTERM and SIGUSR1 come from schedulers that want the machine back, SIGINT from a keyboard. A command that is asked
clears away what is half-written and leaves; training ends its step and saves first (deferred). Schedulers signal every
process of a job, and launchers pass on what they get, so the same wish arrives several times: what comes within two
seconds of the first signal is no second one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 2.0  # within which signals are one wish
STATUS = 143  # of a process that was asked to stop, as a shell tells of one that SIGTERM ended
STATUS_KEYBOARD = 130


class Stopped(SystemExit):
    """Leaves the process with status 143, or 130 after SIGINT; its text says what was done before."""

    def __init__(self, told: str, status: int = STATUS) -> None:
        super().__init__(status)
        self.told = told

    def __str__(self) -> str:
        return self.told


class StopSignals:
    """What this process was asked by signals. There is one, stop_signals: handlers belong to the process."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._since = 0.0
        self._deferred: Callable[[], bool] | None = None
        self._leaves = False  # whether Stopped was raised
        self._owner = 0  # process whose handlers these are; 0: none are set

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def stopped(self, told: str) -> Stopped:
        """What to raise: told is what was done before leaving."""
        name = self._received.name if self._received else "another process of the run"
        return Stopped(f"stopped by {name}{told}", STATUS_KEYBOARD if self._received is signal.SIGINT else STATUS)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """The first signal raises Stopped where the process is, a second one leaves without clearing anything away.

        Other code may turn Stopped into another exception (C extensions that are being imported do): from here it is
        Stopped again. Does nothing outside the main thread, or where signals are handled already.
        """
        if self._owner == os.getpid() or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._owner, self._received, self._leaves = os.getpid(), None, False
        try:
            yield
        except BaseException as error:
            if self._leaves and not isinstance(error, Stopped):
                raise self.stopped("") from error
            raise
        finally:
            self._owner = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, is_in_vain: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """The first signal is only noted in asked, for who looks there to stop at a good place.

        is_in_vain: asked when it comes; True leaves at once, because no such place will be reached.
        """
        with self.handled():
            self._deferred = is_in_vain
            try:
                yield
            finally:
                self._deferred = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker ends as if nobody handled signals
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number)
        if self._received is not None:
            if time.monotonic() - self._since > REPEAT_SECONDS:
                _leave(f"left at once: {name.name} came again", name)
            return
        self._received, self._since = name, time.monotonic()
        if self._deferred is None:
            self._leaves = True
            raise self.stopped("")
        if self._deferred():
            _leave(f"left at once after {name.name}: another process of the run failed", name)


stop_signals = StopSignals()


def leave_to_parent() -> None:
    """For a forked worker: whoever signals every process of a job means the parent, which ends its workers itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(told: str, name: signal.Signals) -> None:
    os.write(2, f"{told}\n".encode())
    os._exit(STATUS_KEYBOARD if name is signal.SIGINT else STATUS)
