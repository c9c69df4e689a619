"""Progress bar, plots and report.html of a training run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpofast.report.page import ReportCallback as ReportCallback

__all__ = ["ReportCallback"]


def __getattr__(name: str) -> Any:
    """Import ReportCallback when it is first used: the page brings transformers and matplotlib."""
    if name != "ReportCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpofast.report.page import ReportCallback

    return ReportCallback
