"""What every test gets: fixed seeds and threads, no network, Triton's interpreter where there is no GPU."""

import os
import random
import tempfile

import hypothesis
import numpy as np
import pytest
import torch

# Both are read when triton and huggingface_hub are imported, which happens in test modules, after this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Compiled code of an earlier run, perhaps one that was killed while it wrote, is no part of this one.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="dpofast-inductor-"))

torch.set_num_threads(2)
hypothesis.settings.register_profile("dpofast", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dpofast")


def pytest_configure(config):
    """Without a GPU its tests are deselected, not skipped; `-m gpu` names them and fails there."""
    if not torch.cuda.is_available() and not config.option.markexpr:
        config.option.markexpr = "not gpu"


@pytest.fixture(autouse=True)
def seeds():
    """Each test draws the same random numbers whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device():
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def nan_empty():
    """Fills torch.empty and its kin with NaN (integers with their maximum), so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
