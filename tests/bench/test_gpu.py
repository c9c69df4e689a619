"""bench.gpu without a GPU: every part at toy sizes in the interpreter, and what happens to a part that fails."""

import json
import shutil
import time

import pytest
import torch

from bench import tables, timing
from bench.gpu import __main__ as gpu
from bench.gpu import head as gpu_head
from bench.gpu import kernels as gpu_kernels
from bench.gpu import run_tests
from bench.gpu.__main__ import Part, finite, main, run_here, text
from bench.gpu.paths import no_sync
from bench.gpu.setting import Setting, measure, one_line
from bench.head.problem import MODES, Problem, per_token, plain_logps
from bench.head.truth import LOGPS_TOLERANCE, Truth, gate

pytestmark = pytest.mark.slow(60)


@pytest.mark.parametrize("name", gpu.PARTS)
def test_every_part_runs_dry_and_has_a_table(name):
    result = json.loads(json.dumps(run_here(name, dry=True, limit_s=300)))
    assert result["error"] is None
    shown = text({name: result})
    assert shown.splitlines()[-1].split() == [name, f"{result['seconds']:.0f}", "s", "ok"]
    assert len(shown.splitlines()) > 4
    if name == "head":
        assert {"tl.dot kernel", "scratch"} <= result["figures"]["modes"]["forward"]["contenders"].keys()
        assert "goal" not in shown  # those of an H100
    if name == "syncs":
        assert set(result["figures"]["paths"].values()) == {None}


def broken(setting, figures, left):
    figures["first"] = 1
    raise ValueError("the second half\nand more")


def slow(setting, figures, left):
    figures["left"] = left()
    try:
        time.sleep(10)
    except Exception:  # as a part goes on after a peer that raises
        figures["went on"] = True


def part(function):
    return Part(__name__, function, "table", 60)


@pytest.fixture
def parts_of_this_file(monkeypatch):
    monkeypatch.setattr(gpu, "function_of", lambda part, name: globals()[name])
    monkeypatch.setattr(gpu, "PARTS", {"broken": part("broken"), "slow": part("slow")})


def table(figures):
    return f"measured {figures['second']}"


def test_a_part_that_fails_keeps_what_it_measured_and_says_why(parts_of_this_file):
    result = run_here("broken", dry=True, limit_s=60)
    assert result["figures"] == {"first": 1} and result["error"] == "ValueError: the second half"
    assert "FAILED: ValueError: the second half" in text({"broken": result})


def test_a_part_ends_when_its_time_is_over(parts_of_this_file):
    result = run_here("slow", dry=True, limit_s=0.2)
    assert result["error"] == "OutOfTime: took more than 0 s" and result["seconds"] < 5
    assert 0 < result["figures"]["left"] <= 0.2 and "went on" not in result["figures"]


def test_a_process_that_dies_fails_its_part_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    result = gpu.run_child("rows", dry=True, limit_s=30)
    assert result["error"] == "its process ended with code 1 and no result"
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(sleeper))
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    assert gpu.run_child("rows", dry=True, limit_s=0.1)["error"] == "killed after 0 s"


@pytest.fixture
def results_of_a_gpu(monkeypatch):
    """main as on a GPU, without its parts."""
    children = {"syncs": {"figures": {"paths": {"a": None}}, "error": None, "seconds": 1.0}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "gpu", lambda: {"name": "a GPU"})
    monkeypatch.setattr(gpu, "run_child", lambda name, dry, limit_s: children[name])
    return children


def test_the_record_is_kept_and_copied_and_the_table_comes_last(results_of_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    arguments = ["--parts", "syncs", "--results", str(tmp_path / "gpu.jsonl")]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "gpu.jsonl").read_text())
    assert record["figures"]["gpu"] == {"name": "a GPU"} and record["figures"]["parts"] == results_of_a_gpu
    assert json.loads((tmp_path / "out" / "gpu.jsonl").read_text()) == record
    shown = (tmp_path / "out" / "gpu.txt").read_text()
    assert capsys.readouterr().out.endswith(shown)
    assert tables.main(["gpu", "--results", str(tmp_path)]) == 0
    assert shown.strip() in capsys.readouterr().out

    results_of_a_gpu["syncs"] = {"figures": {}, "error": "RuntimeError: waits", "seconds": float("nan")}
    assert main(arguments) == 1
    assert "FAILED: RuntimeError: waits" in capsys.readouterr().out
    assert len((tmp_path / "out" / "gpu.jsonl").read_text().splitlines()) == 2


def test_a_part_without_time_fails(results_of_a_gpu, tmp_path, capsys):
    assert main(["--parts", "syncs", "--limit", "5", "--results", str(tmp_path / "gpu.jsonl")]) == 1
    assert "FAILED: no time left" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert main([]) == 2
    assert "torch sees no CUDA device; python -m bench.gpu --dry" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        Setting.make(dry=False)


def test_what_no_record_takes_is_spelled_out():
    assert finite({"a": [1.0, float("inf")], "b": ("x", float("nan"), None)}) == {
        "a": [1.0, "inf"],
        "b": ["x", "nan", None],
    }


def test_functions_take_turns():
    calls = []
    setting = Setting.make(dry=True)
    times = measure({name: lambda name=name: calls.append(name) for name in "ab"}, setting, calls=2)
    assert calls == list("abab") + list("aabb") * setting.rounds
    assert times["a"]["p20"] <= times["a"]["median"] <= times["a"]["p80"]


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("synchronize")

        def elapsed_time(self, stop):
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(cycles))
    assert timing.timed(lambda: said.append("call"), torch.device("cuda"), calls=3) == pytest.approx(4e-3)
    assert said == [2_000_000, "record", "call", "call", "call", "record", "synchronize"]


def test_waiting_is_an_error_only_inside(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(KeyError), no_sync(torch.device("cuda")):
        assert modes == [0, "error"]
        raise KeyError
    assert modes == [0, "error", 0]
    with no_sync(torch.device("cpu")):
        assert len(modes) == 3


def test_an_error_of_the_gpu_ends_a_sweep():
    assert gpu_kernels._refusal(RuntimeError("out of resource: shared memory")) == (
        "RuntimeError: out of resource: shared memory"
    )
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_kernels._refusal(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert one_line(KeyError()) == "KeyError"


def test_wrong_rows_are_refused():
    setting = Setting.make(dry=True)
    logits, targets = gpu_kernels._rows(setting, setting.v)
    with pytest.raises(ValueError, match="E of V: log-probs are off by"):
        gpu_kernels._check_rows("E of V", logits, targets, torch.zeros(len(targets)), torch.zeros_like(logits))


def test_a_kernel_of_ours_that_is_wrong_fails_the_head(monkeypatch):
    def off(problem):
        return per_token(problem, lambda h, w: plain_logps(h, w, problem.targets) + 1)

    monkeypatch.setitem(gpu_head.FORWARD_ONLY, "scratch", off)
    setting, figures = Setting.make(dry=True), {}
    with pytest.raises(RuntimeError, match="forward: scratch: logps off by 1.0e"):
        gpu_head.run(setting, figures, lambda: 1e9)
    assert figures["modes"].keys() == MODES.keys()
    with pytest.raises(RuntimeError, match="trained: no time left"):
        gpu_head.run(setting, figures, lambda: 0)


def test_the_gate_allows_twice_the_devices_own_error():
    problem = Problem.make(12, 8, 50, 3, torch.float32, torch.device("cpu"))
    truth = Truth.of(problem)
    assert truth.own is None and truth.limit(12) == LOGPS_TOLERANCE
    truth = Truth(truth.logps, truth.grads, own=truth.logps + 1e-2)
    assert truth.limit(12) == pytest.approx(LOGPS_TOLERANCE + 2e-2, rel=1e-3)
    assert truth.limit(6) == pytest.approx(LOGPS_TOLERANCE + 4e-2, rel=1e-3)
    assert gate({"logps": 1.5e-2}, torch.bfloat16, truth.limit(12)) == ""
    assert gate({"logps": 1.5e-2}, torch.bfloat16) == "logps off by 1.5e-02"


@pytest.fixture
def five_tests(tmp_path):
    """Writes five tests of the same body into a folder with this one's conftest; returns pytest's arguments."""
    shutil.copy(run_tests.ROOT / "tests" / "conftest.py", tmp_path)

    def write(body):
        lines = "import pytest, time\n@pytest.mark.parametrize('i', range(5))\ndef test_some(i):\n    "
        (tmp_path / "test_some.py").write_text(lines + body + "\n")
        return ["-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]

    return write


def test_shards_run_every_test_once(five_tests, capfd):
    assert run_tests.run(five_tests("pass"), 1, 600) == 0
    assert "shard 1/1: 5 passed" in capfd.readouterr().out
    assert run_tests.run(five_tests("assert i != 4"), 2, 600) == 1
    shown = capfd.readouterr().out
    assert "shard 1/2: 2 passed" in shown and "shard 2/2: 1 failed, 2 passed" in shown and "FAILED with code 1" in shown
    assert run_tests.run([*five_tests("pass"), "--shard", "3/2"], 1, 600) == 1
    assert "--shard: expected I/K with 1 <= I <= K, got '3/2'" in capfd.readouterr().out


def test_a_shard_that_hangs_is_killed(five_tests, capfd):
    assert run_tests.run(five_tests("time.sleep(60)"), 1, 3) == 1
    assert "KILLED after 3 s" in capfd.readouterr().out


def test_tests_of_the_gpu_need_one(five_tests, capfd, monkeypatch):
    assert run_tests.run(["-m", "gpu", *five_tests("pass")], 1, 600) == 1
    assert "unset it" in capfd.readouterr().out
    monkeypatch.delenv("TRITON_INTERPRET")
    assert run_tests.run(["-m", "gpu", *five_tests("pass")], 1, 600) == 1
    assert "-m gpu needs a CUDA device" in capfd.readouterr().out


def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(run_tests, "NEEDED", ("torch", "no_such_a", "no_such_b"))
    assert "lacks no_such_a, no_such_b: pip install no_such_a no_such_b" in run_tests.lacking()
    monkeypatch.setattr(run_tests, "NEEDED", ("torch",))
    assert "sees no CUDA device" in run_tests.lacking() and "\n" not in run_tests.lacking()


def test_a_benchmark_without_a_record_is_said(tmp_path, capsys):
    assert tables.main(["--results", str(tmp_path)]) == 0
    assert tables.main(["head", "--results", str(tmp_path)]) == 1
    assert "head has no record" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tables.main(["heads"])
    assert "expected names of kernel_report, head, step, gpu, got heads" in capsys.readouterr().err
