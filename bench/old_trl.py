"""The tests of patch_trl() under another version of trl, in an environment of its own.

    python -m bench.old_trl 0.29.0 0.24.0

For each version a virtual environment is created once under build/. It uses this environment's packages through a path
file, as .ci/run does, and installs over them that version of trl, and below 0.29 also libraries of the same age. Then
tests/integrations/test_trl_run.py runs in it: whole training runs with and without the patch.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = "tests/integrations/test_trl_run.py"
# trl below 0.29 does not load beside transformers 5, and that brings older neighbours with it.
BEFORE_0_29 = (
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface-hub==0.36.2",
    "datasets==4.4.2",
    "accelerate==1.12.0",
    "peft==0.18.1",
)
# What huggingface-hub 0.36 and datasets 4 need and the newer ones do not.
HTTP = ("httpx==0.28.1", "httpcore==1.0.9")


def make_environment(version: str) -> Path:
    """The interpreter of the environment for a version of trl, made where it is missing."""
    folder = ROOT / "build" / f"trl-{version}"
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        major, minor = (int(part) for part in version.split(".")[:2])
        wanted = [f"trl=={version}", *((*BEFORE_0_29, *HTTP) if (major, minor) < (0, 29) else ())]
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        subprocess.run([*install, *wanted], check=True)
        done.touch()
    return python


def main() -> int:
    """Command line entry; the first failing version's code, or 0."""
    parser = argparse.ArgumentParser(description="Tests of patch_trl() under other versions of trl.")
    parser.add_argument("versions", nargs="+", help="such as 0.29.0 (0.29 to 1.14) and 0.24.0 (0.19 to 0.28)")
    for version in parser.parse_args().versions:
        python = make_environment(version)
        print(f"trl {version}: {TESTS}", flush=True)
        run = subprocess.run([python, "-m", "pytest", "-q", TESTS], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if run.returncode:
            return run.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
