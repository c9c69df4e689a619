"""The command line: `dpofast train`, `eval`, `score`, `demo` and `info`, one module a command."""

from dpofast.cli.main import main as main

__all__ = ["main"]
