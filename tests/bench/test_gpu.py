"""bench.gpu without a GPU: every part at toy sizes in the interpreter, and what happens to a part that fails."""

import os
import time

import pytest
import torch

from bench import tables, timing
from bench.gpu import __main__ as gpu
from bench.gpu import head as gpu_head
from bench.gpu import kernels as gpu_kernels
from bench.gpu import machine
from bench.gpu.__main__ import Part, main, run_here
from bench.gpu.lines import END, Run, finite, last_run, one_line
from bench.gpu.paths import no_sync
from bench.gpu.setting import Setting, measure
from bench.head.problem import MODES, Problem, per_token, plain_logps
from bench.head.truth import LOGPS_TOLERANCE, Truth, gate
from bench.record import read_lines

pytestmark = pytest.mark.slow(60)


@pytest.fixture
def run(tmp_path):
    return Run(name="now", command="python -m bench.gpu", gpu={"name": "none"}, files=(str(tmp_path / "lines.jsonl"),))


def pieces_of(run, part):
    return last_run(read_lines(gpu.Path(run.files[0]))).get(part, {})


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name != "tests"])
def test_every_part_runs_dry_and_has_a_table(name, run):
    assert run_here(name, run, dry=True, limit_s=300) is None
    pieces = pieces_of(run, name)
    run.write(name, END, {"seconds": 1.0, "error": None, "clocks": {}})
    shown = gpu.text({name: pieces_of(run, name)})
    assert shown.splitlines()[-1].split() == [name, "1", "s", "ok"]
    assert len(shown.splitlines()) > 4
    if name == "head":
        assert list(pieces) == [f"D {d}, {mode}" for d in (32, 16) for mode in MODES]
        assert {"tl.dot kernel", "scratch"} <= pieces["D 16, forward"]["result"]["contenders"].keys()
        assert "goal" not in shown  # those of an H100
    if name == "rows":
        times = pieces["V 96"]["times"]
        assert times["exp_rows, E"]["bytes"] == 6 * 4 * 96 and times["token_logprobs, E"]["bytes"] == 10 * 4 * 96
        assert "tiles of exp_rows, E" in pieces
    if name == "syncs":
        assert set(pieces.values()) == {None}


def test_the_limits_of_all_parts_and_the_build_add_up():
    assert sum(part.limit_s for part in gpu.PARTS.values()) + gpu.BUILD_S <= gpu.LIMIT_S
    assert list(gpu.PARTS)[:4] == ["head", "step", "rows", "attention"]


def broken(setting, left):
    yield "first", 1
    raise ValueError("the second half\nand more")


def slow(setting, left):
    yield "left", left()
    try:
        time.sleep(10)
    except Exception:  # as a part goes on after a peer that raises
        yield "went on", True


def part(function):
    return Part(__name__, function, "table", 60)


@pytest.fixture
def parts_of_this_file(monkeypatch):
    monkeypatch.setattr(gpu, "function_of", lambda part, name: globals()[name])
    monkeypatch.setattr(gpu, "PARTS", {"broken": part("broken"), "slow": part("slow")})


def table(pieces):
    return f"measured {pieces['second']}"


def test_a_part_that_fails_keeps_what_it_measured_and_says_why(parts_of_this_file, run):
    assert run_here("broken", run, dry=True, limit_s=60) == "ValueError: the second half"
    assert pieces_of(run, "broken") == {"first": 1}
    run.write("broken", END, {"seconds": 1.0, "error": "ValueError: the second half", "clocks": {}})
    assert "FAILED: ValueError: the second half" in gpu.text({"broken": pieces_of(run, "broken")})


def test_a_part_ends_when_its_time_is_over(parts_of_this_file, run):
    begin = time.monotonic()
    assert run_here("slow", run, dry=True, limit_s=0.2) == "OutOfTime: took more than 0 s"
    pieces = pieces_of(run, "slow")
    assert time.monotonic() - begin < 5 and 0 < pieces["left"] <= 0.2 and pieces.keys() == {"left"}


def test_a_part_that_is_killed_leaves_what_it_had_measured(run, monkeypatch):
    """The process of a real part, killed by itself after its first piece as the kernel would."""
    killed = "import os, signal, sys; from bench.gpu import __main__ as gpu, lines\n"
    killed += "write = lines.Run.write\n"
    killed += "def once(*args):\n    write(*args)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    killed += "lines.Run.write = once\nsys.exit(gpu.main())"
    real = gpu.subprocess.Popen

    def started(command, **options):
        return real([command[0], "-c", killed, *command[3:]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", started)
    ended = gpu.run_child("syncs", run, dry=True, limit_s=120)
    assert ended["error"] == "its process ended with code -9"
    assert pieces_of(run, "syncs") == {"logprobs": None, END: ended}


def test_a_process_that_dies_or_hangs_fails_its_part_alone(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    assert gpu.run_child("rows", run, dry=True, limit_s=30)["error"] == "its process ended with code 1"
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(sleeper))
    assert gpu.run_child("rows", run, dry=True, limit_s=0.1)["error"] == "killed after 0 s"


def test_a_file_that_cannot_be_written_is_said_and_the_others_get_their_lines(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    both = Run(name="now", command="", gpu={}, files=(str(tmp_path / "file" / "gpu.jsonl"), *run.files))
    both.write("head", "first", {"seconds": float("nan")})
    assert pieces_of(run, "head") == {"first": {"seconds": "nan"}}
    assert f"not recorded in {both.files[0]}" in capsys.readouterr().err


def test_the_last_run_is_read_and_a_line_that_was_cut_is_left_out(run):
    run.write("head", "of before", 1)
    Run(name="later", command="", gpu={}, files=run.files).write("head", "of now", 2)
    with open(run.files[0], "a") as stream:
        stream.write('{"name": "gpu", "fig')
    assert pieces_of(run, "head") == {"of now": 2}


@pytest.fixture
def results_of_a_gpu(monkeypatch):
    """main as on a GPU, without its parts: their errors by name, each after one piece."""
    errors = {"syncs": None}

    def child(name, run, dry, limit_s):
        run.write(name, "a path", None)
        ended = {"seconds": 1.0, "error": errors[name], "clocks": {"absent": "no nvidia-smi"}}
        run.write(name, END, ended)
        return ended

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "described", lambda: {"name": "a GPU", "driver": "1.2"})
    monkeypatch.setattr(gpu, "build", lambda: None)
    monkeypatch.setattr(gpu, "run_child", child)
    return errors


def test_the_record_is_kept_and_copied_and_the_table_comes_last(results_of_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    arguments = ["--parts", "syncs", "--results", str(tmp_path / "gpu.jsonl")]
    assert main(arguments) == 0
    lines = read_lines(tmp_path / "gpu.jsonl")
    assert [line["figures"]["piece"] for line in lines] == ["a path", END]
    assert all(line["figures"]["gpu"]["driver"] == "1.2" and line["versions"]["torch"] for line in lines)
    assert read_lines(tmp_path / "out" / "gpu.jsonl") == lines
    shown = (tmp_path / "out" / "gpu.txt").read_text()
    assert shown in capsys.readouterr().out
    assert "clocks not known: no nvidia-smi" in shown and shown.splitlines()[-1].split() == ["syncs", "1", "s", "ok"]
    assert tables.main(["gpu", "--results", str(tmp_path)]) == 0
    assert "a GPU, driver 1.2" in capsys.readouterr().out

    results_of_a_gpu["syncs"] = "RuntimeError: waits"
    assert main(arguments) == 1
    assert "FAILED: syncs: RuntimeError: waits" in capsys.readouterr().out
    assert len(read_lines(tmp_path / "out" / "gpu.jsonl")) == 4


def test_what_cannot_be_built_or_is_missing_is_said_and_the_rest_runs(results_of_a_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "build", lambda: "ended with code 1")
    monkeypatch.setattr(gpu.run_tests, "check", lambda: ["python lacks peft"])
    assert main(["--parts", "syncs", "--results", str(tmp_path / "gpu.jsonl")]) == 1
    shown = capsys.readouterr()
    assert "error: python lacks peft" in shown.err and "error: the extension: ended with code 1" in shown.err
    assert "FAILED: python lacks peft" in shown.out and len(read_lines(tmp_path / "gpu.jsonl")) == 2


def test_a_part_gets_the_time_that_others_left_over_but_not_that_of_later_ones(results_of_a_gpu, tmp_path, monkeypatch):
    limits = {}

    def child(name, run, dry, limit_s):
        limits[name] = limit_s
        run.write(name, END, ended := {"seconds": 0.0, "error": "not run", "clocks": {}})
        return ended

    monkeypatch.setattr(gpu, "run_child", child)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)  # whatever this machine takes
    main(["--results", str(tmp_path / "gpu.jsonl"), "--limit", "420"])
    assert limits["head"] == gpu.PARTS["head"].limit_s
    assert limits["linear"] == 420  # nothing ran before


def test_a_part_without_time_fails(results_of_a_gpu, tmp_path, capsys):
    assert main(["--parts", "syncs", "--limit", "5", "--results", str(tmp_path / "gpu.jsonl")]) == 1
    assert "FAILED: syncs: no time left" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(capsys):
    assert main([]) == 2
    assert "torch sees no CUDA device; python -m bench.gpu --dry" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        Setting.make(dry=False)


def test_what_changes_the_figures_is_unset_for_the_parts(monkeypatch, tmp_path):
    for name in gpu.UNSET:
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert not set(gpu.UNSET) & gpu.environment(dry=False).keys()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "TRITON_CACHE_DIR" in gpu.environment(dry=False)
    assert gpu.environment(dry=True)["TRITON_INTERPRET"] == "1"


SAID = """1980, 3201, 650.10, 61, 99
1965, 3201, 655.00, 62, 100
345, 3201, 90.0, 40, 0
1950, 3201, 660.0, 63, 98
19"""


def test_clocks_are_those_of_a_busy_gpu(tmp_path, monkeypatch):
    figures = machine.clocks(SAID)
    assert figures["samples"] == 3 and figures["sm_mhz"]["median"] == 1965 and figures["celsius"]["median"] == 62
    assert "sm_mhz 1965 (1956 to 1974)" in machine.clocks_line(figures)
    assert machine.clocks("[Not Supported]")["absent"].endswith("the last: [Not Supported]")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{SAID}\nEND\nexec sleep 60\n")
    smi.chmod(0o755)
    with machine.watched("GPU-1") as absent:
        pass
    assert "nvidia-smi" in machine.clocks_line(absent)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with machine.watched("GPU-1") as sampled:
        time.sleep(1)
    assert sampled == figures
    assert machine.clocks_line({}) == "clocks not sampled"


def test_a_device_that_cannot_be_asked_is_no_reason_to_stop():
    assert machine.described()["name"].startswith("not known")


def test_what_no_record_takes_is_spelled_out():
    assert finite({"a": [1.0, float("inf")], "b": ("x", float("nan"), None)}) == {
        "a": [1.0, "inf"],
        "b": ["x", "nan", None],
    }


def test_each_function_is_timed_right_after_the_baseline():
    calls = []
    setting = Setting.make(dry=True)
    times = measure({name: lambda name=name: calls.append(name) for name in "ab"}, setting, "a", calls=2)
    assert calls == list("abab") + list("aaaabb") * setting.rounds
    assert times["b"]["p20"] <= times["b"]["median"] <= times["b"]["p80"]
    assert times["a"]["ratio"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    pairs = timing.Paired([4.0, 9.0, 6.0], [2.0, 3.0, 1.0])
    assert pairs.ratio()["median"] == 3.0  # of 2, 3 and 6; the ratio of the medians is 3, that of the least 4


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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronize"))
    device = torch.device("cuda")
    assert timing.timed(lambda: said.append("call"), device, calls=3) == pytest.approx(4e-3)
    assert said == [2_000_000, "record", "call", "call", "call", "record", "synchronize"]
    said.clear()
    # It spins for longer than the launches take.
    assert timing.launch_seconds(lambda: time.sleep(2e-3), device, calls=2) >= 6e-3
    assert timing.launch_seconds(lambda: time.sleep(20e-3), device) == 20e-3
    assert timing.launch_seconds(lambda: None, device) == 1e-3 and said == ["synchronize"] * 6


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


def test_a_tile_that_is_wrong_or_comes_too_late_is_not_timed():
    setting = Setting.make(dry=True)
    zeros = torch.zeros(2)
    assert gpu_kernels._right(lambda: zeros, zeros) == ""
    assert gpu_kernels._right(lambda: zeros + 1, zeros) == "log-probs are off by 1.0e+00 nats"
    assert gpu_kernels._tried({"ours": int, "tile": int}, setting, lambda: 1.0, 1) == "no time left"
    assert gpu_kernels._tried({"ours": int, "tile": lambda: 1 / 0}, setting, lambda: 99.0, 1).startswith("ZeroDivision")


def test_wrong_rows_are_refused():
    setting = Setting.make(dry=True)
    logits, targets = gpu_kernels._rows(setting, setting.v)
    sums = gpu_kernels.token_logprobs.token_logprobs(logits, targets)._replace(logps=torch.zeros(len(targets)))
    with pytest.raises(ValueError, match="E of V: log-probs are off by"):
        gpu_kernels._check_rows("E of V", logits, targets, sums, torch.zeros_like(logits))


def test_a_head_that_is_wrong_is_marked_and_fails_the_part(monkeypatch):
    def off(problem):
        return per_token(problem, lambda h, w: plain_logps(h, w, problem.targets) + 1)

    monkeypatch.setitem(gpu_head.FORWARD_ONLY, "scratch", off)
    monkeypatch.setitem(gpu_head.OURS, "dpofast", off)
    setting, pieces = Setting.make(dry=True), {}
    with pytest.raises(RuntimeError, match=r"D 32, trained: dpofast: .*D 32, forward: scratch: logps off by 1.0e"):
        for name, figures in gpu_head.run(setting, lambda: 1e9):
            pieces[name] = figures
    assert len(pieces) == 2 * len(MODES)
    assert "WRONG: logps off by 1.0e" in gpu_head.table(pieces)
    with pytest.raises(RuntimeError, match="D 32, trained: no time left"):
        list(gpu_head.run(setting, lambda: 0))


def test_the_gate_allows_twice_the_devices_own_error():
    problem = Problem.make(12, 8, 50, 3, torch.float32, torch.device("cpu"))
    truth = Truth.of(problem)
    assert truth.own is None and truth.limit(12) == LOGPS_TOLERANCE
    truth = Truth(truth.logps, truth.grads, own=truth.logps + 1e-2)
    assert truth.limit(12) == pytest.approx(LOGPS_TOLERANCE + 2e-2, rel=1e-3)
    assert truth.limit(6) == pytest.approx(LOGPS_TOLERANCE + 4e-2, rel=1e-3)
    assert gate({"logps": 1.5e-2}, torch.bfloat16, truth.limit(12)) == ""
    assert gate({"logps": 1.5e-2}, torch.bfloat16) == "logps off by 1.5e-02"


def test_a_benchmark_without_a_record_is_said(tmp_path, capsys):
    assert tables.main(["--results", str(tmp_path)]) == 0
    assert tables.main(["head", "--results", str(tmp_path)]) == 1
    assert "head has no record" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tables.main(["heads"])
    assert "expected names of kernel_report, head, step, gpu, got heads" in capsys.readouterr().err
