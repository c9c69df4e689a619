"""Which tests `make gpu` runs, that each gets a GPU and has a twin that runs here, and what these tests need."""

import functools
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from bench.gpu import needs, run_tests

pytestmark = pytest.mark.slow(60)


@functools.cache
def listing(mark, folder, absent=""):
    """What pytest -m collects, as tests/support/listing.py writes it; with `-m gpu` torch says that it sees a GPU."""
    file = folder / "listing.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LISTING": str(file), "ABSENT": absent, "PRETEND_CUDA": "1" if mark == "gpu" else ""}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins import what is to be absent
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.support.listing", "-m", mark]
    child = subprocess.run(command, cwd=needs.ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("listing")


@pytest.fixture(scope="module")
def everything(folder):
    return listing("gpu or not gpu", folder)["items"]


def test_every_test_of_the_gpu_gets_a_gpu_and_no_other_test_does(everything):
    marked = [item for item in everything if item["gpu"]]
    assert len(marked) > 500
    assert {item["device"] for item in marked} == {"cuda"}
    assert {item["device"] for item in everything if not item["gpu"]} == {None, "cpu"}


def test_every_test_of_the_gpu_has_a_twin_that_runs_here(everything):
    here = {item["id"] for item in everything if not item["gpu"]}
    tests_here = {(item["module"], item["test"]) for item in everything if not item["gpu"]}
    for item in everything:
        if item["gpu"] and (item["module"], item["twin"]) not in tests_here:
            assert item["twin"] is None, f"{item['id']}: its twin {item['twin']} is no test that runs here"
            assert re.sub(r"(\[|-)cuda(-|\])", r"\1cpu\2", item["id"], count=1) in here, f"{item['id']} has no twin"


def test_with_m_gpu_only_modules_that_hold_such_tests_are_collected(everything, folder):
    collected = listing("gpu", folder)
    expected = [item["id"] for item in everything if item["gpu"]]
    assert sorted(item["id"] for item in collected["items"]) == sorted(expected)
    holding = {item["module"] for item in everything if item["gpu"]}
    assert {str(path.relative_to(needs.ROOT)) for path in needs.gpu_test_modules()} == holding
    imported = {name.replace(".", "/") + ".py" for name in collected["modules"] if name.startswith("tests.")}
    assert {name for name in imported if "/test_" in name} == holding


def required(names):
    """The distributions that provide these packages, and all that they require without extras."""
    waiting = {dist for name in names for dist in importlib.metadata.packages_distributions()[name]}
    found = set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting |= {re.match(r"[\w.-]+", line)[0] for line in lines if "extra ==" not in line}
    return found


def test_what_the_check_names_is_all_that_collecting_and_the_parts_import(tmp_path):
    """With every other installed package hidden, the tests are collected and every module of bench.gpu is imported."""
    files = [*needs.gpu_test_modules(), *(needs.ROOT / "bench" / "gpu").glob("*.py")]
    named = {name for file in files for name in needs.packages_of(file)} | set(needs.ALWAYS)
    assert {"torch", "triton", "transformers", "pyarrow", "hypothesis", "pytest"} <= named
    kept = required(named)
    absent = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", dist).lower() for dist in distributions} & kept
    }
    assert "trl" in absent and "torch" not in absent
    hidden = " ".join(sorted(absent - {"dpofast", "_pytest", "py"}))
    assert listing("gpu", tmp_path, hidden)["items"]
    parts = "import tests.support.listing, importlib\nfor name in %r: importlib.import_module('bench.gpu.' + name)"
    modules = [path.stem for path in (needs.ROOT / "bench" / "gpu").glob("*.py") if not path.stem.startswith("__")]
    environment = {**os.environ, "ABSENT": hidden, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", parts % modules], cwd=needs.ROOT, env=environment, check=True)


def test_the_check_names_each_missing_package_and_who_needs_it(monkeypatch):
    assert needs.missing() == {}
    here = needs.installed
    monkeypatch.setattr(needs, "installed", lambda name: name not in ("pyarrow", "setuptools", "yaml") and here(name))
    absent = needs.missing()
    assert absent["setuptools"] == ["the extension"]
    assert {"bench/gpu/step.py", "tests/model/test_attach.py"} <= set(absent["pyarrow"])
    said = run_tests.check()
    assert any("lacks pyarrow, which is needed by tests/" in line and "pip install pyarrow" in line for line in said)
    assert "sees no CUDA device" in said[-1]


SOURCE = """
import pytest
{imports}

@pytest.fixture
def model(device):
    return device

{test}
"""


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        ("def test_it(device): pass", True),
        ("def test_it(model): pass", True),
        ("@pytest.mark.gpu(twin='x')\ndef test_it(device): pass", True),
        ("class TestIt:\n    def test_it(self, model): pass", True),
        ("pytestmark = [pytest.mark.slow, pytest.mark.gpu]\ndef test_it(device): pass", True),
        ("def helper(device): pass\ndef test_it(monkeypatch): helper('cpu')", False),
        ("def test_it(a): # mark.gpu (device)\n    def probe(device): pass", False),
    ],
)
def test_a_module_holds_tests_of_the_gpu_where_one_gets_the_device(tmp_path, test, holds):
    file = tmp_path / "test_some.py"
    file.write_text(SOURCE.format(imports="", test=test))
    assert needs.gpu_test_modules(tmp_path) == [file] * holds


def test_optional_imports_are_not_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    imports = "from typing import TYPE_CHECKING\nimport a.b\nif TYPE_CHECKING:\n    import c\n"
    imports += "try:\n    import d\nexcept ImportError:\n    d = None\ndef later():\n    import e\n"
    file = tmp_path / "test_some.py"
    file.write_text(SOURCE.format(imports=imports, test="def test_it(device):\n    import f"))
    assert needs.packages_of(file) == {"pytest", "a", "f"}


@pytest.fixture
def ten_tests(tmp_path):
    """Writes ten tests of the same body into a folder with this one's conftest; returns pytest's arguments."""
    shutil.copy(needs.ROOT / "tests" / "conftest.py", tmp_path)

    def write(body):
        lines = "import pytest, time\n@pytest.mark.parametrize('i', range(10))\ndef test_some(i):\n    "
        (tmp_path / "test_some.py").write_text(lines + body + "\n")
        return ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]

    return write


def test_shards_take_turns_and_run_every_test_once(ten_tests):
    ((name, whole),) = run_tests.run(ten_tests("pass"), 1, 600)
    assert (name, whole["ended"], whole["counts"]) == ("shard 1/1", "ok", {"passed": 10})
    first, second = (figures for _, figures in run_tests.run(ten_tests("assert i not in (4, 9)"), 2, 600))
    # Hands of four: 0 to 3 and 8, 9 for the first shard, 4 to 7 for the second.
    assert first["counts"] == {"passed": 5, "failed": 1} and second["counts"] == {"passed": 3, "failed": 1}
    assert [name.rpartition("/")[2] for name in first["failed"]] == ["test_some.py::test_some[9]"]
    assert first["ended"] == "FAILED with code 1"
    shown = run_tests.table({"left out": {"tests/a.py": ["peft"]}, "shard 1/2": first})
    assert "tests/a.py left out: no peft" in shown and "shard 1/2: 5 passed, 1 failed; FAILED" in shown
    assert f"  FAILED {first['failed'][0]}" in shown


def test_a_shard_without_a_test_is_well_and_a_wrong_one_is_refused(ten_tests, capfd):
    ended = [figures["ended"] for _, figures in run_tests.run([*ten_tests("pass"), "-k", "1"], 2, 600)]
    assert ended == ["ok", "ok"]
    ((_, figures),) = run_tests.run([*ten_tests("pass"), "--shard", "3/2"], 1, 600)
    assert "FAILED" in figures["ended"]
    assert "--shard: expected I/K with 1 <= I <= K, got '3/2'" in capfd.readouterr().out


@pytest.mark.parametrize("said", ["", "Timeout (0:00:16)!"])
def test_a_shard_that_hangs_is_killed_and_leaves_its_results(ten_tests, capfd, said):
    """Also where the faulthandler wrote a stack, or another thread a line, behind the name of the test that hangs."""
    body = f"if i == 2: import os; os.write(2, b'{said}\\n'); time.sleep(600)"
    ((_, figures),) = run_tests.run([*ten_tests(body), "-s"], 1, 20)
    assert figures["ended"] == "KILLED after 20 s" and figures["counts"] == {"passed": 2}
    assert [name.rpartition("/")[2] for name in figures["unfinished"]] == ["test_some.py::test_some[2]"]
    assert said in capfd.readouterr().out


def test_the_part_fails_where_a_test_fails_a_module_is_left_out_or_nothing_ran(monkeypatch):
    from bench.gpu.setting import Setting

    setting = Setting.make(dry=True)
    pieces = dict(run_tests.part(setting, lambda: 300))
    assert all(figures["ended"] == "ok" and figures["counts"]["passed"] for figures in pieces.values())
    failed = {"ended": "FAILED with code 1", "counts": {"passed": 1}, "failed": [], "unfinished": [], "slowest": []}
    monkeypatch.setattr(run_tests, "run", lambda *_: iter([("shard 1/1", failed)]))
    with pytest.raises(RuntimeError, match="shard 1/1: FAILED with code 1"):
        list(run_tests.part(setting, lambda: 300))
    monkeypatch.setattr(run_tests, "run", lambda *_: iter([("shard 1/1", {**failed, "ended": "ok", "counts": {}})]))
    with pytest.raises(RuntimeError, match="no test ran"):
        list(run_tests.part(setting, lambda: 300))


def test_a_module_whose_packages_are_missing_is_left_out_by_name(monkeypatch):
    asked = []

    def run(arguments, count, limit_s):
        asked.extend(arguments)
        return iter([])

    class OnGpu:
        device = type("device", (), {"type": "cuda"})

    here = needs.installed
    monkeypatch.setattr(needs, "installed", lambda name: name != "transformers" and here(name))
    monkeypatch.setattr(run_tests, "run", run)
    monkeypatch.setattr(run_tests, "shards", lambda: 1)
    pieces = {}
    with pytest.raises(RuntimeError, match="left out for want of packages: tests/model/test_attach.py, tests/"):
        for name, figures in run_tests.part(OnGpu, lambda: 300):
            pieces[name] = figures
    assert "transformers" in pieces["left out"]["tests/model/test_attention.py"]
    assert asked[:2] == ["-m", "gpu"] and "tests/kernels/test_exp_rows.py" in asked
    assert "tests/model/test_attention.py" not in asked


def test_tests_of_the_gpu_need_one(ten_tests, capfd, monkeypatch):
    def code():
        ((_, figures),) = run_tests.run(["-m", "gpu", *ten_tests("pass")], 1, 600)
        return figures["ended"]

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert code() == "FAILED with code 4" and "unset it" in capfd.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    assert code() == "FAILED with code 4" and "-m gpu needs a CUDA device" in capfd.readouterr().out


def test_a_test_of_the_gpu_takes_its_device(tmp_path):
    shutil.copy(needs.ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]
    child = subprocess.run(command, cwd=needs.ROOT, capture_output=True, text=True)
    assert child.returncode and "test_it is marked gpu: it takes its device by that argument" in child.stdout
