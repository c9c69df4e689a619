"""WriteLock: one process at a time, none that is dead, and no file left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpofast.common.locks import WriteLock

HOLDER = """
import os, sys, time
from pathlib import Path
from dpofast.common.locks import WriteLock
with WriteLock(Path(sys.argv[1]), Path(sys.argv[1], "lock")):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by the child: only now has it dropped the lock that it inherited
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    return WriteLock(tmp_path, tmp_path / "lock")


def test_a_second_process_is_refused_and_told_who_writes(tmp_path, lock):
    reader, writer = os.pipe()
    with lock:
        other = os.fork()
        if other == 0:
            try:
                with WriteLock(tmp_path, lock.path):
                    os.write(writer, b"taken")
            except ValueError as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(other, 0)
    refused = os.read(reader, 1000).decode()
    assert refused.startswith(f"{tmp_path}: process {os.getpid()} on ") and "is writing to it: wait until" in refused
    with WriteLock(tmp_path, lock.path):
        assert lock.path.exists()
    assert not lock.path.exists()


def test_it_is_reentrant_and_held_until_the_last_exit(tmp_path, lock):
    other = WriteLock(tmp_path, lock.path)
    with lock:
        with lock:
            pass
        with pytest.raises(ValueError, match="is writing to it"):
            other.__enter__()
    with other:
        pass


def test_a_process_that_was_killed_holds_none_though_its_child_lives(tmp_path, lock):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=f"process {holder.pid} on"):
            lock.__enter__()
        holder.kill()
        holder.wait()
        assert lock.path.exists()
        with lock:
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert not lock.path.exists()


def test_a_file_that_its_holder_removes_meanwhile_is_no_lock(tmp_path, lock, monkeypatch):
    flock, calls = __import__("fcntl").flock, []

    def removed_first(descriptor, how):
        if not calls:
            lock.path.unlink()
        calls.append(how)
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", removed_first)
    with lock:
        assert len(calls) == 2 and lock.path.exists()


def test_a_file_system_without_locks_is_said(lock, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: start no second run"), lock:
        pass


def test_many_at_once_are_never_two(tmp_path, lock):
    """Processes that take and release it as fast as they can each find what the one before them wrote."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            done = 0
            while done < 25:
                try:
                    with WriteLock(tmp_path, lock.path):
                        value = int(counter.read_text())
                        time.sleep(0.0002)
                        counter.write_text(str(value + 1))
                        done += 1
                except ValueError:
                    time.sleep(0.0005)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0, 0]
    assert counter.read_text() == "100"
