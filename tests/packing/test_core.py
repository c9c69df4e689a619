"""The packer's core without Python: unit tests, and a short run of what `make fuzz` runs long, under sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow(50)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    """Compiles a target of the Makefile."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"

    def run(name: str) -> str:
        made = subprocess.run(
            ["make", f"CXX={compiler}", f"build/csrc/{name}"], cwd=ROOT, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        return str(ROOT / "build" / "csrc" / name)

    return run


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [("test", [], "all passed"), ("fuzz", ["3000"], "3000 cases, "), ("fuzz_threads", ["500"], "500 cases, ")],
)
def test_sanitized(build, name, arguments, says):
    result = subprocess.run([build(name), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert says in result.stdout
