"""Printing that never ends a run, and what is escaped in it."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from dpofast.common.output import flush_or_give_up, lasting_output
from dpofast.common.printable import printable, printable_messages


def test_a_full_disk_under_standard_output_is_one_warning(monkeypatch):
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.warns(UserWarning, match="standard output cannot be written to .No space left") as said:
            with lasting_output():
                assert sys.stdout.encoding == full.encoding and not sys.stdout.isatty()
                for _ in range(3):
                    print("a line")
                sys.stdout.flush()
            assert sys.stdout is full
        assert len(said) == 1
        # Otherwise Python's own flush at its end fails.
        assert flush_or_give_up(full).errno == 28 and flush_or_give_up(full) is None


def test_text_that_can_be_written_arrives(capsys):
    with lasting_output():
        print("one")
        sys.stdout.writelines(["two\n"])
        print("three", file=sys.stderr)
    assert capsys.readouterr() == ("one\ntwo\n", "three\n")


@pytest.mark.parametrize(
    ("command", "redirection", "status"),
    [
        ("--help", ">&-", 0),
        ("--help", "2>&-", 0),
        ("nonsense", ">/dev/full 2>/dev/full", 2),
        ("info", ">/dev/full", 2),  # what it prints is its result
    ],
)
@pytest.mark.slow(5)
def test_standard_streams_that_are_gone(command, redirection, status):
    line = f'"{sys.executable}" -m dpofast {command} {redirection}'
    ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr
    if command == "info":
        assert ran.stderr.startswith("dpofast: error: ") and "No space left on device" in ran.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä, 字, 😀, no\xa0break\n\tnext", "plain, ä, 字, 😀, no\xa0break\n\tnext"),
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("over\rwritten \x08\x7f\x9b", r"over\rwritten \x08\x7f\x9b"),
        ("\u202egnp.exe \u2066x\u2069 \u200b", r"\u202egnp.exe \u2066x\u2069 \u200b"),
        ("half \ud83d \u2028 line", r"half \ud83d \u2028 line"),
        ("a\\x1b stays", "a\\x1b stays"),
    ],
)
def test_what_steers_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown == printable(shown)


def test_warnings_and_logs_of_libraries_are_escaped_too(capsys):
    with printable_messages():
        # pytest records warnings, so the line is made as Python makes it
        shown = warnings.formatwarning("\x1b[2J", UserWarning, "file.py", 1, "line")
        record = logging.getLogRecordFactory()("x", logging.INFO, "f", 1, "\x1b[1m%s\x1b[0m", ("\x1b[2J",), None)
    assert "\x1b" not in shown + record.getMessage() and record.getMessage() == r"\x1b[2J"
    assert "\x1b" in warnings.formatwarning("\x1b[2J", UserWarning, "file.py", 1, "line")
