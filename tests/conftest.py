"""Configuration of all tests: fixed seeds and threads, no network, and the devices that they run on.

    pytest           on the CPU only, kernels in Triton's interpreter, whether or not there is a GPU
    pytest -m gpu    only the tests of the GPU, kernels compiled for it
    pytest -m "not slow and not gpu and not deepspeed and not bitsandbytes and not ranks"    the quick ones (make check)
    pytest -m deepspeed    those that need the package, which is not among the test requirements (make test-deepspeed)
    pytest -m bitsandbytes those that need that one (make test-bitsandbytes)
    pytest -m ranks    every mode of several processes in every case (make test-ranks); the others have a few of them

Triton decides once per process whether it compiles or interprets, so one process cannot run both.
"""

import collections
import gc
import os
import random
import re
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from _pytest.mark.expression import Expression

from bench.gpu.needs import gpu_test_modules

# Read when huggingface_hub is imported, which happens in test modules, after this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Compiled code of an earlier run, perhaps one that was killed while it wrote, is no part of this one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="dpofast-inductor-"))

# Two in all: make test runs two processes (pytest-xdist). OMP_NUM_THREADS overrides it: on a busy machine the two
# threads of one process spend most of their time waiting for each other.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) == 1 else 1)
# Time is no property of what is tested: on a busy machine drawing examples may take long, too.
hypothesis.settings.register_profile(
    "dpofast", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("dpofast")


# How many neighbours stay together in a shard: they often share compiled kernels, and those of a shard run one by one.
HAND = 4


def _wants_gpu(config):
    """Whether -m takes tests marked gpu, and no others."""
    expression = Expression.compile(config.option.markexpr or "not gpu")
    return expression.evaluate(lambda name, **_: name == "gpu") and not expression.evaluate(lambda name, **_: False)


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/K", help="run every K-th of the selected tests only, from the I-th on")


def pytest_configure(config):
    """Choose interpreter or GPU before a test module imports triton.

    Without `-m`, the tests of the GPU are deselected, not skipped; with `-m gpu` a machine without one is an error.
    """
    if _wants_gpu(config):
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise pytest.UsageError("-m gpu compiles the kernels, and TRITON_INTERPRET=1 interprets them: unset it")
        if not torch.cuda.is_available():
            raise pytest.UsageError("-m gpu needs a CUDA device, and torch sees none")
        # cuBLAS repeats its results to the bit only with a workspace of its own a stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return
    config.option.markexpr = config.option.markexpr or "not gpu and not deepspeed and not bitsandbytes and not ranks"
    os.environ["TRITON_INTERPRET"] = "1"
    # What picks a device by itself, as transformers' Trainer does, finds the CPU; nobody has asked for a GPU so far.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_ignore_collect(collection_path, config):
    """With `-m gpu`, leave files alone that have no such test: what they import may be missing on a GPU machine."""
    if not _wants_gpu(config) or collection_path.name.startswith("__"):
        return None
    found = gpu_test_modules(Path(__file__).parent)
    return None if any(collection_path in (path, *path.parents) for path in found) else True


def pytest_generate_tests(metafunc):
    """Give `device` to the tests that take it: the CPU, and in a second test marked gpu the GPU.

    A test that is itself marked gpu gets the GPU only. It names what stands in for it where there is none:
    `@pytest.mark.gpu(twin="test_of_the_same_file")`.
    """
    marked = metafunc.definition.get_closest_marker("gpu") is not None
    if "device" in metafunc.fixturenames:
        values = ["cuda"] if marked else ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", values, indirect=True)
    elif marked:
        raise pytest.UsageError(f"{metafunc.definition.nodeid} is marked gpu: it takes its device by that argument")


@pytest.hookimpl(trylast=True)  # after -m has deselected, and before the first test
def pytest_collection_modifyitems(config, items):
    """Put the files that take longest first, so that no process of `make test` ends long after the other.

    With --shard, keep the tests of one shard instead, a few neighbours in turn for each shard, so that no shard gets
    all tests of a file whose kernels take long to compile.
    """
    if config.option.shard is None:
        seconds = collections.Counter()
        for item in items:
            for mark in item.iter_markers("slow"):
                seconds[item.path] = max(seconds[item.path], *mark.args)
        items.sort(key=lambda item: -seconds[item.path])
        return
    found = re.fullmatch(r"(\d+)/(\d+)", config.option.shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise pytest.UsageError(f"--shard: expected I/K with 1 <= I <= K, got {config.option.shard!r}")
    shard, shards = int(found[1]), int(found[2])
    items[:] = [item for at, item in enumerate(items) if at // HAND % shards == shard - 1]


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: each training collects twice, 0.2 s for a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Extension modules report objects that are left at the end as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeds():
    """Each test draws the same random numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """As the experiments of bench/paper run: small matrices gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(request):
    """The device of the kernels: the CPU with Triton's interpreter, or the GPU (pytest_generate_tests)."""
    return torch.device(request.param)


@pytest.fixture
def nan_empty():
    """Fill torch.empty and similar with NaN (integers: their maximum), to reveal elements that are never written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
