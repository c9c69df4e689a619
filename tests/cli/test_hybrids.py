"""dpofast train, eval and score on a hybrid model: packed, and the numbers of padded rows."""

import json

import pytest

from dpofast.cli.main import main
from tests.support.families import family_model
from tests.support.tiny import TEXT_ROWS, save_tiny

pytestmark = pytest.mark.slow(20)


def test_a_hybrid_is_trained_evaluated_and_scored_as_over_padded_rows(tmp_path, capsys):
    base, data = save_tiny(tmp_path / "base", family_model("qwen3.5")), tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TEXT_ROWS))
    results = {}
    for padded in ("false", "true"):
        out, scored = str(tmp_path / f"out-{padded}"), tmp_path / f"scored-{padded}.jsonl"
        shared = ["--data", str(data), "--padded", padded]
        against = ["--model", out, "--ref_model", str(base), *shared]
        training = ["--use_cpu", "--report_to", "none", "--max_steps", "3", "--learning_rate", "1e-2", "--optim", "sgd"]
        assert main(["train", "--model", str(base), "--output_dir", out, "--no_html_report", *shared, *training]) == 0
        assert main(["score", "--output", str(scored), *against]) == 0
        capsys.readouterr()
        assert main(["eval", "--output", "json", *against]) == 0
        results[padded] = json.loads(capsys.readouterr().out), [json.loads(line) for line in scored.open()]
    (evaluated, rows), (expected, expected_rows) = results["false"], results["true"]
    values, expected_values = ({n: m["value"] for n, m in e["metrics"].items()} for e in (evaluated, expected))
    assert values == pytest.approx(expected_values, abs=1e-4)
    assert len(rows) == len(TEXT_ROWS)
    for row, other in zip(rows, expected_rows, strict=True):
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        assert numbers and numbers == pytest.approx({name: other[name] for name in numbers}, abs=1e-4)
