"""Streamed rows whose chunks have different columns: token weights are made only of turns that do not all count."""

from datasets import Dataset, IterableDataset

from dpofast.common.ranks import Ranks
from dpofast.training.data import stream
from dpofast.training.data.stream import StepStream


class Chunks:
    """Stands for PreferenceData: the second chunk has token weights."""

    def tokenized(self, dataset, name, *, first_row):
        self.reports[name] = None
        rows = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8], "row": row["at"]} for row in dataset]
        if first_row:
            rows = [row | {"chosen_weights": [1.0, 0.0], "rejected_weights": None} for row in rows]
        return Dataset.from_list(rows)


def test_a_step_over_both_has_all_columns(monkeypatch):
    monkeypatch.setattr(stream, "_ROWS", 3)
    monkeypatch.setattr(stream, "_added", lambda former, report: report)
    rows = IterableDataset.from_generator(lambda: iter([{"at": at} for at in (0, 1, 2, 0, 1, 2)]))
    steps = list(StepStream(rows, Chunks(), 2, Ranks.alone(), drop_last=False))
    assert [[example["row"] for example in step] for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert [[example.get("chosen_weights") is None for example in step] for step in steps] == [
        [True, True],
        [True, False],
        [False, False],
    ]
    assert {*steps[1][0]} == {*steps[1][1]} == {*steps[2][0]}
