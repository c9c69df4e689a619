"""Record SIGTERM (preemption) and SIGINT (Ctrl-C) so that a training loop can stop after a complete step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on a signal after a complete step; the message names its checkpoint."""


class Interruption:
    """Context manager that records the first signal; the second one has its usual effect.

    Outside the main thread, where Python allows no handlers, nothing is recorded. An ignored signal stays ignored.

    Attributes:
        signal: the recorded signal, or None.
    """

    def __init__(self) -> None:
        """Record nothing yet."""
        self.signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        """Install the handlers."""
        self.signal, self._process = None, os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        while self._former:
            signal.signal(*self._former.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        child = os.getpid() != self._process
        if child and number == signal.SIGINT:  # Ctrl-C reaches a data loader's workers, which the step still needs
            return
        if child or self.signal is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number)
        # print() may not be entered again while it runs
        text = f"\ndpofast: {self.signal.name}: the step ends with a checkpoint, then the run; again to stop at once\n"
        os.write(2, text.encode())
