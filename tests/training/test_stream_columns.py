"""Streamed rows whose chunks have different columns, as token weights made of turns, or no row that can be used."""

import pytest
from datasets import Dataset, IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.data.load import DataError
from dpofast.training.config import DPOConfig
from dpofast.training.data import stream
from dpofast.training.data.stream import StepStream
from dpofast.training.data.tokens import PreferenceData
from dpofast.training.processing import Processing


class Chunks:
    """Stands for PreferenceData: the second chunk has token weights."""

    images = None

    def tokenized(self, dataset, name, *, first_row):
        self.reports[name] = None
        rows = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8], "row": row["at"]} for row in dataset]
        if first_row:
            rows = [row | {"chosen_weights": [1.0, 0.0], "rejected_weights": None} for row in rows]
        return Dataset.from_list(rows)


def test_a_step_over_both_has_all_columns(monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 3)
    monkeypatch.setattr(stream, "_added", lambda former, report, first_row: report)
    rows = IterableDataset.from_generator(lambda: iter([{"at": at} for at in (0, 1, 2, 0, 1, 2)]))
    steps = list(StepStream(rows, Chunks(), 2, Ranks.alone(), drop_last=False))
    assert [[example["row"] for example in step] for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert [[example.get("chosen_weights") is None for example in step] for step in steps] == [
        [True, True],
        [True, False],
        [False, False],
    ]
    assert {*steps[1][0]} == {*steps[1][1]} == {*steps[2][0]}


def list_rows(*scores):
    return [{"prompt_ids": [5], "responses_ids": [[6, at + 7], [8]], "scores": own} for at, own in enumerate(scores)]


def pair_rows(*is_good):
    good, bad = {"chosen_ids": [6, 7], "rejected_ids": [8]}, {"chosen_ids": [6], "rejected_ids": [6]}
    return [{"prompt_ids": [5], **(good if own else bad)} for own in is_good]


NOTHING = Processing(None, None, None, None)  # token ids need none
NEAR, FAR = [1.0, 0.9], [1.0, 0.0]
CASES = {
    "no pair": ({"list_pairs": "all", "min_score_gap": 0.5}, list_rows, NEAR, FAR, "min_score_gap=0.5 apart"),
    "bad rows": ({"on_bad_row": "skip"}, pair_rows, False, True, "chosen"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_part_without_a_usable_row_counts_as_skipped(tmp_path, monkeypatch, case):
    monkeypatch.setattr(stream, "_ROWS", 2)
    options, rows_of, skipped, kept, reason = CASES[case]

    def steps(*values):
        rows = IterableDataset.from_generator(lambda: iter(rows_of(*values)))
        data = PreferenceData(DPOConfig(output_dir=str(tmp_path), use_cpu=True, **options), NOTHING, 97)
        return list(StepStream(rows, data, 2, Ranks.alone(), drop_last=False))

    found = steps(skipped, skipped, kept, skipped, skipped, skipped, kept, kept)
    assert [[example["row"] for example in step] for step in found] == [[2, 6], [7]]
    report = found[-1].report
    assert (report.rows, report.kept) == (8, 3)
    ((why, (total, numbers)),) = report.skipped.items()
    assert reason in why and total == 5 and numbers == (0, 1, 3, 4, 5)
    with pytest.raises(DataError, match=r"no row can be used\n.*0 of 4 .* kept\n  skipped 4: .* \(row 0, 1, 2, 3\)"):
        steps(skipped, skipped, skipped, skipped)
