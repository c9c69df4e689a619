"""What is missing on a machine is said with what to install, and only where it is needed."""

import importlib
import sys

import pytest
import torch

from dpofast.common import backend, memory


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton "), ("win32", "triton-windows ")])
def test_a_gpu_without_triton_says_what_to_install(platform, package, monkeypatch):
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(ValueError, match=f"backend: expected triton .* pip install {package}"):
        backend.choose_backend("auto", torch.device("cuda", 0), torch.bfloat16)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        backend.choose_backend("triton", torch.device("cuda", 0))
    assert backend.choose_backend("auto", torch.device("cpu")) == "torch"
    assert backend.choose_backend("torch", torch.device("cuda", 0)) == "torch"


def test_the_trainer_asks_for_triton_before_anything_is_done(monkeypatch):
    from dpofast.training.checks.device import check_kernels

    check_kernels(torch.device("cuda", 0))
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    check_kernels(torch.device("cpu"))
    with pytest.raises(ValueError, match="backend: expected triton"):
        check_kernels(torch.device("cuda", 0))


def test_memory_is_read_without_the_module_that_windows_has_not(monkeypatch):
    psutil = pytest.importorskip("psutil")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resource", None)
        importlib.reload(memory)
        assert memory.resource is None and memory.peak_resident() > 0

        class Windows:
            def memory_info(self):
                return type("Info", (), {"peak_wset": 7 << 20})

        patch.setattr(memory.Path, "read_text", lambda self: (_ for _ in ()).throw(FileNotFoundError()))
        patch.setattr(psutil, "Process", Windows)
        assert memory.peak_resident() == 7 << 20
    importlib.reload(memory)
    assert memory.resource is not None
