"""The package as it is imported, installed, and found beside other packages."""

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dpofast

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str) -> str:
    """Standard output of a fresh Python in the repository root, whose errors fail the test with their text."""
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", dpofast.__all__)
def test_every_public_name_is_there(name):
    assert not isinstance(getattr(dpofast, name), ModuleType)
    assert name in dir(dpofast)


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "dpofast" / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert seen == dpofast._MODULES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dpofast' has no attribute 'nothing'"):
        _ = dpofast.nothing


def test_import_is_light():
    loaded = run_python("-c", "import sys, dpofast; print(*sys.modules)").split()
    assert not {"torch", "triton", "transformers", "datasets", "numpy"} & set(loaded)


@pytest.mark.slow(10)
@pytest.mark.parametrize(
    "code",
    [
        "import dpofast; dpofast.logprobs; from dpofast.head.token_logprobs import logprobs",
        "from dpofast.head.token_logprobs import logprobs; import dpofast",
        "from dpofast import linear_logprobs; import dpofast",
        "import dpofast.head.token_logprobs",
    ],
)
def test_logprobs_is_the_function_in_every_order_of_imports(code):
    check = "import sys; assert dpofast.logprobs is sys.modules['dpofast.head.token_logprobs'].logprobs"
    run_python("-W", "error::ImportWarning", "-c", f"{code}; {check}")


@pytest.mark.slow(6)
def test_transformers_is_unharmed_in_the_repository_root():
    """`kernels` is also a package on PyPI that transformers looks for; the folder kernels/ must not be taken for it."""
    run_python(
        "-c",
        "import torch\n"
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "from transformers.utils import is_kernels_available\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,\n"
        "                     num_attention_heads=2, num_key_value_heads=2)\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "assert model(torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 3, 32)\n"
        "from importlib.metadata import packages_distributions\n"
        "assert 'kernels' in packages_distributions() or not is_kernels_available()\n",
    )


def test_setup_installs_every_module_and_nothing_beside_dpofast(tmp_path):
    run_python("setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["dpofast"]
    suffixes = (".py", ".pyi", ".typed", ".txt", ".jsonl")
    wanted = {path.relative_to(ROOT) for path in (ROOT / "dpofast").rglob("*") if path.suffix in suffixes}
    wanted |= {Path("dpofast", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == wanted


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
