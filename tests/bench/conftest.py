"""Every test of a benchmark leaves the process the cores that it had: bench.packing pins it to one."""

import os

import pytest


@pytest.fixture(autouse=True)
def own_cores():
    """Give back what a benchmark that pins the process to one core has taken."""
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)
