"""Signals during training: handlers are installed, restored afterwards, and not installed where they must not be."""

import os
import signal
import threading

import pytest

from dpofast.checkpointing.signals import Interruption


def test_signals_are_taken_over_only_while_training_and_in_the_main_thread():
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal is signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former
    taken = []

    def elsewhere():
        with Interruption():
            taken.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert taken == [former[0]]


def test_an_ignored_signal_stays_ignored_and_a_second_one_is_what_it_was():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert interruption.signal is None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt), Interruption():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 0), ("SIGTERM", -signal.SIGTERM)])
def test_a_workers_signals_are_its_own(name, status):
    with Interruption() as interruption:
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(getattr(signal, name))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
        assert interruption.signal is None
