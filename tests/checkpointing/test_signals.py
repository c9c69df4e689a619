"""Signals during training: handlers are installed, restored afterwards, and not installed where they must not be."""

import os
import signal
import threading
import time

import pytest

from dpofast.checkpointing.signals import Interruption, outlive_signals


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


def test_a_closed_terminal_is_one_event_however_many_signals_it_sends():
    with Interruption() as interruption:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert interruption.signal is signal.SIGTERM


@pytest.mark.parametrize("launcher", ["LOCAL_RANK", "SLURM_PROCID"])
def test_under_a_launcher_a_signal_that_its_agent_passes_on_is_no_second_one(monkeypatch, capfd, launcher):
    monkeypatch.setenv(launcher, "0")
    with Interruption() as interruption:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.signal is signal.SIGTERM
    assert capfd.readouterr().err == "\ndpofast: SIGTERM: the step ends with a checkpoint, then the run\n"


def test_standard_error_that_hung_up_does_not_break_the_handler(monkeypatch):
    def hung_up(*_):
        raise OSError(5, "Input/output error")

    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    with Interruption() as interruption:
        monkeypatch.setattr(os, "write", hung_up)
        signal.raise_signal(signal.SIGHUP)
        monkeypatch.undo()
        assert interruption.signal is signal.SIGHUP
    signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("sender", ["parent", "another"])
def test_a_data_loading_worker_ends_by_its_parent_alone(sender):
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        outlive_signals()
        os.write(started, b"x")
        time.sleep(0.5)
        os._exit(7)
    os.read(ready, 1)
    if sender == "parent":
        os.kill(pid, signal.SIGTERM)
    elif os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(pid, number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if sender == "parent" else 7)
