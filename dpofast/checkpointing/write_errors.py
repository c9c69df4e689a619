"""Errors of the libraries that write a checkpoint's files, as the OSError that each of them stands for."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

# torch.save: "PytorchStreamWriter failed writing file", or "[enforce fail at inline_container.cc:672] . unexpected pos"
# where closing the archive hides the first error.
_TORCH_WRITER = ("PytorchStreamWriter", "inline_container")


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Inside, what safetensors', torch's and tokenizers' writers raise is an OSError; other errors pass."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"safetensors: {error}") from error
    except RuntimeError as error:
        if not any(name in str(error) for name in _TORCH_WRITER):
            raise
        raise OSError(f"torch.save: {_cause(error)}") from error
    except Exception as error:
        if type(error) is not Exception or "(os error " not in str(error):  # tokenizers has no class of its own
            raise
        raise OSError(f"tokenizers: {error}") from error


def _cause(error: BaseException) -> str:
    """The first error: the ones after it come from closing the file."""
    while isinstance(error.__context__, (OSError, RuntimeError)):
        error = error.__context__
    return str(error).splitlines()[0]


def room(folder: Path) -> str:
    """Returns how much is free on a folder's disk, in parentheses, or nothing where that cannot be asked."""
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free)"
    return ""
