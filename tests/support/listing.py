"""A pytest plugin for --collect-only: writes what was collected, as JSON, to the file that $LISTING names, if it does.

With PRETEND_CUDA=1 torch says that it sees a GPU, so that `-m gpu` collects; a package in $ABSENT cannot be imported.
"""

import json
import os
import sys
from pathlib import Path


class Hiding:
    """A finder of sys.meta_path that does not find the packages in $ABSENT."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ.get("ABSENT", "").split():
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Hiding, sys.meta_path)


def pytest_load_initial_conftests():
    if os.environ.get("PRETEND_CUDA"):
        import torch

        torch.cuda.is_available = lambda: True


def pytest_collection_finish(session):
    if "LISTING" not in os.environ:
        return
    rows = []
    for item in session.items:
        mark = item.get_closest_marker("gpu")
        rows.append(
            {
                "id": item.nodeid,
                "module": item.nodeid.partition("::")[0],
                "test": item.originalname,
                "device": item.callspec.params.get("device") if hasattr(item, "callspec") else None,
                "gpu": mark is not None,
                "twin": mark and mark.kwargs.get("twin"),
            }
        )
    Path(os.environ["LISTING"]).write_text(json.dumps({"items": rows, "modules": sorted(sys.modules)}))
