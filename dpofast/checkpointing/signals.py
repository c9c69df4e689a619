"""Record SIGTERM (preemption), SIGINT (Ctrl-C) and SIGHUP (a closed terminal), to stop training after a complete step.

One event may send several signals. torchrun's agent passes on what its ranks got themselves already, and a closed
terminal sends SIGHUP more than once, or SIGTERM after it. Such repetitions do not count as the wish to stop at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_RECORDED = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, _HANGUP)))
# Set by torchrun, accelerate and DeepSpeed, srun, Open MPI, and MPICH.
_LAUNCHERS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on a signal after a complete step; the message names its checkpoint."""


class Interruption:
    """Context manager that records the first signal; a second SIGINT or SIGTERM has its usual effect.

    It has none under a launcher, whose SIGKILL ends a rank that takes too long, and after SIGHUP. Outside the main
    thread, where Python allows no handlers, nothing is recorded. An ignored signal (nohup) stays ignored.

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
        self._launched = any(name in os.environ for name in _LAUNCHERS)
        if threading.current_thread() is threading.main_thread():
            for number in _RECORDED:
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
        if child or self._stops_at_once(number):
            self.__exit__()
            signal.raise_signal(number)
            return
        first = self.signal is None
        if first or self.signal == _HANGUP:
            self.signal = signal.Signals(number)
        if first:
            again = "" if self._launched or number == _HANGUP else "; again to stop at once"
            text = f"\ndpofast: {signal.Signals(number).name}: the step ends with a checkpoint, then the run{again}\n"
            # print() may not be entered again while it runs. Standard error may be what hung up.
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    def _stops_at_once(self, number: int) -> bool:
        return self.signal not in (None, _HANGUP) and number != _HANGUP and not self._launched


def outlive_signals(worker: int = 0) -> None:
    """A DataLoader's worker_init_fn: signals to the whole process group do not end the worker, one of its parent does.

    The parent's step still needs the worker. A worker that its parent terminates, or that lost its parent, ends as
    usual: the first by the thread that is started here, the second by torch's own watch.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _RECORDED)  # of all threads: those that come later inherit it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo(_RECORDED).si_pid != parent:
        pass
    os._exit(0)
