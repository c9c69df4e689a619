"""The command line: dpofast train | eval | score | tune | demo | info.

An error in the user's input (a file, a row, a model, an option) gives one message on stderr and exit code 2, before
anything is written.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from dpofast._version import __version__
from dpofast.common.names import did_you_mean
from dpofast.common.output import flush_or_give_up, is_told, lasting_output, open_standard_streams
from dpofast.common.printable import printable, printable_messages

_USAGE = """usage: dpofast <command> [options]

commands:
  train   train a model on preference pairs                       dpofast train --help
  eval    accuracy and margins of a checkpoint's implicit reward  dpofast eval --help
  score   add log-probs and implicit rewards to a file            dpofast score --help
  tune    time the LM head on this GPU, for backend="auto"        dpofast tune --help
  demo    a small model, from scratch to DPO, minutes             dpofast demo --help
  info    what is installed and which path is used

dpofast --version prints the version.
"""

# The module of a command is imported only when it runs: torch alone takes seconds.
_COMMANDS = {
    "train": "dpofast.cli.train",
    "eval": "dpofast.cli.evaluate",
    "score": "dpofast.cli.score",
    "tune": "dpofast.cli.tune",
    "demo": "dpofast.demo.run",
    "info": "dpofast.cli.info",
}
# What these print is news of a run, which goes on where it is lost; of the others it is the result.
_LONG = ("train", "score", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, or 2 after a message about the user's input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    open_standard_streams()
    with printable_messages(), lasting_output(stdout=command in _LONG), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _run(command, rest)
        lost = flush_or_give_up(sys.stdout)
        if lost is not None and command not in _LONG:
            code = _refuse(f"standard output cannot be written to: {lost.strerror or lost}")
        flush_or_give_up(sys.stderr)
    return code


def _run(command: str, arguments: Sequence[str]) -> int:
    if command in ("", "-h", "--help"):
        print(_USAGE)
        return 0 if command else 2
    if command in ("-V", "--version", "version"):
        print(f"dpofast {__version__}")
        return 0
    if command not in _COMMANDS:
        print(_USAGE, file=sys.stderr)
        meant = did_you_mean(command, _COMMANDS)
        return _refuse(f"expected a command among {', '.join(_COMMANDS)}, got {command!r}{meant}")
    try:
        return importlib.import_module(_COMMANDS[command]).main(arguments)
    except KeyboardInterrupt:
        print("dpofast: stopped; what was written so far can be resumed", file=sys.stderr)
        return 130
    # ImportError: an option whose package is not installed (an optimizer, DeepSpeed, a quantizer).
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if os.environ.get("DPOFAST_TRACEBACK"):
            raise
        if is_told(error):
            return 2
        return _refuse(" ".join(str(error).split()) if isinstance(error, ImportError) else str(error))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Print a warning as one line; where in the code it was raised is of no use to who runs a command."""
    print(printable(f"dpofast: warning: {' '.join(str(message).split())}"), file=sys.stderr)


def _refuse(message: str) -> int:
    print(f"dpofast: error: {printable(message)}", file=sys.stderr)
    return 2
