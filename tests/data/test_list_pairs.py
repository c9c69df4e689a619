"""list_pairs: the pairs that lists are turned into, worked out by hand, with their columns, counts and cached files."""

import itertools
import json

import numpy as np
import pytest
from datasets import Dataset

import dpofast.data.lists as lists
from dpofast.data.lists import check_list_options, pairs_of
from dpofast.data.load import DataError, Skipped, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import EOS, ids, make_tokenizer

TOKENIZER = make_tokenizer()


def tokenize(*rows, **options):
    encoded, report = tokenize_preferences(Dataset.from_list(list(rows)), TOKENIZER, **options)
    return encoded.to_list(), report


def end(text):
    return [*ids(text), EOS]


def loaded(tmp_path, rows):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(file, cache_dir=str(tmp_path / "cache"))


# Best first: yy (3), w (2.5), then x and z (1), which are tied.
TEXT = {"prompt": "Q", "responses": ["x", "yy", "zzz", "w"], "scores": [1.0, 3.0, 1.0, 2.5]}
RANKS, SCORES = [0, 1, 2, 2], [3.0, 2.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("which", "gap", "expected"),
    [
        ("all", None, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]),
        ("all", 1.5, [(0, 2), (0, 3), (1, 2), (1, 3)]),
        ("all", 2.0, [(0, 2), (0, 3)]),
        ("best_worst", None, [(0, 3)]),
        ("best_worst", 2.0, [(0, 3)]),
        ("best_worst", 2.5, []),
        ("adjacent", None, [(0, 1), (1, 2)]),
        ("adjacent", 1.0, [(1, 2)]),
        ("adjacent", 0.0, [(0, 1), (1, 2)]),
    ],
)
def test_pairs_of(which, gap, expected):
    assert pairs_of(RANKS, SCORES, which, gap) == expected


def test_a_difference_that_equals_the_gap_counts():
    """float32 makes 0.9 - 0.4 less than 0.5, and 0.7 - 0.4 less than 0.3 or more."""
    row = {"prompt": "Q", "responses": ["a", "b", "c"], "scores": [0.9, 0.4, 0.1]}
    pairs, _ = tokenize(row, list_pairs="all", min_score_gap=0.5)
    assert [(pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs] == [
        (end("a"), end("b")),
        (end("a"), end("c")),
    ]
    for tenths in itertools.product(range(-30, 31), range(1, 31)):
        other, gap = (number / 10 for number in tenths)
        score = sum(tenths) / 10
        rounded = [float(np.float32(each)) for each in (score, other)]
        assert pairs_of([0, 1], rounded, "all", gap) == [(0, 1)]
        assert pairs_of([0, 1], rounded, "all", gap + 1e-5) == []


def test_pairs_keep_the_columns_of_rows_and_responses():
    other = {
        "prompt": "R",
        "responses": ["a", "bb"],
        "scores": [0.0, 9.0],
        "ref_responses_logps": [-5.0, -6.0],
        "weight": 0.5,
        "margin": 1.0,
        "beta": 0.3,
        "label_smoothing": 0.0,
        "responses_weights": None,
    }
    row = TEXT | {"ref_responses_logps": [-1.0, -2.0, -3.0, -4.0], "weight": 2.0, "margin": -1.0, "beta": 0.2}
    row |= {"label_smoothing": 0.1, "responses_weights": [[1, 0], None, None, [0, 1]]}
    encoded, report = tokenize_preferences(Dataset.from_list([row, other]), TOKENIZER, list_pairs="adjacent")
    values = [np.float32(each).item() for each in (0.2, 0.1, 0.3)]
    same = {"prompt_ids": ids("Q"), "weight": 2.0, "margin": -1.0, "beta": values[0], "label_smoothing": values[1]}
    assert encoded.to_list() == [
        same
        | {"chosen_ids": end("yy"), "rejected_ids": end("w"), "ref_chosen_logps": -2.0, "ref_rejected_logps": -4.0}
        | {"chosen_weights": [1, 1, 1], "rejected_weights": [0, 1], "row": 0},
        same
        | {"chosen_ids": end("w"), "rejected_ids": end("x"), "ref_chosen_logps": -4.0, "ref_rejected_logps": -1.0}
        | {"chosen_weights": [0, 1], "rejected_weights": [1, 0], "row": 0},
        {"prompt_ids": ids("R"), "weight": 0.5, "margin": 1.0, "beta": values[2], "label_smoothing": 0.0}
        | {"chosen_ids": end("bb"), "rejected_ids": end("a"), "ref_chosen_logps": -6.0, "ref_rejected_logps": -5.0}
        | {"chosen_weights": None, "rejected_weights": None, "row": 1},
    ]
    assert (report.kept, report.pairs_of_lists, report.examples) == (2, 3, 3)
    assert report.summary() == "<dataset>: 2 of 2 lists kept, as 3 pairs"
    assert {name: str(kind) for name, kind in encoded.features.items()} == {
        **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), "List(Value('int32'))"),
        **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), "Value('float32')"),
        **dict.fromkeys(("weight", "margin", "beta", "label_smoothing"), "Value('float32')"),
        **dict.fromkeys(("chosen_weights", "rejected_weights"), "List(Value('float32'))"),
        "row": "Value('int64')",
    }


def test_pairs_of_rows_behind_skipped_ones_keep_their_numbers():
    rows = [TEXT | {"scores": [1.0] * 4}, TEXT, TEXT | {"scores": [1.0, 1.1, 1.2, 1.3]}]
    examples, report = tokenize(*rows, on_bad_row="skip", list_pairs="best_worst", min_score_gap=1.5)
    assert [example["row"] for example in examples] == [1]
    assert report.skipped == {
        "all responses of a list are tied": Skipped(1, (0,)),
        "no two responses of different ranks are min_score_gap=1.5 apart": Skipped(1, (2,)),
    }
    assert (report.kept, report.examples) == (1, 1)


def test_no_pair_at_all():
    with pytest.raises(DataError, match=r"(?s)no row can be used.*skipped 2: no two responses .*=9 apart \(row 0, 1\)"):
        tokenize(TEXT, TEXT, list_pairs="all", min_score_gap=9)


def test_pairs_train_as_the_same_pairs_do():
    """Equal to the pairs written out, but for the order of the columns."""
    examples, _ = tokenize(TEXT, list_pairs="all")
    pairs = [("yy", "w"), ("yy", "x"), ("yy", "zzz"), ("w", "x"), ("w", "zzz")]
    written, _ = tokenize(*({"prompt": "Q", "chosen": better, "rejected": worse} for better, worse in pairs))
    assert examples == [row | {"row": 0} for row in written]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"list_pairs": "best"},
            r"list_pairs: expected one of \('all', 'best_worst', 'adjacent'\), or None.*got 'best'",
        ),
        ({"min_score_gap": 1.0}, "min_score_gap: 1.0 is the least gap of the pairs that list_pairs makes"),
        (
            {"list_pairs": "all", "min_score_gap": -1.0},
            "min_score_gap: expected a finite number of 0 or more, got -1.0",
        ),
        (
            {"list_pairs": "all", "min_score_gap": float("nan")},
            "min_score_gap: expected a finite number of 0 or more, got nan",
        ),
        (
            {"list_pairs": "all", "min_score_gap": True},
            "min_score_gap: expected a finite number of 0 or more, got True",
        ),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(TEXT, **options)
    with pytest.raises(ValueError, match=message):
        check_list_options(options.get("list_pairs"), options.get("min_score_gap"))


def test_pairs_of_pairs_and_gaps_without_scores_are_refused():
    with pytest.raises(
        DataError, match="list_pairs='all' turns lists into pairs, and the rows are pairs: leave it out"
    ):
        tokenize({"prompt": "Q", "chosen": "x", "rejected": "y"}, list_pairs="all")
    with pytest.raises(DataError, match="min_score_gap=1 needs column 'scores', and the lists have ranks alone"):
        tokenize({"prompt": "Q", "responses": ["x", "y"], "ranks": [1, 2]}, list_pairs="all", min_score_gap=1)


def test_each_option_has_a_cached_result_of_its_own(tmp_path, monkeypatch):
    data = loaded(tmp_path, [TEXT, {"prompt": "R", "responses": ["x", "y"], "scores": [2, 1]}])
    sizes = [
        len(tokenize_preferences(data, TOKENIZER, list_pairs=which)[0]) for which in (None, "all", "best_worst", "all")
    ]
    assert sizes == [2, 6, 2, 6]
    paths = {
        which: tokenize_preferences(data, TOKENIZER, list_pairs=which)[0].cache_files[0]["filename"]
        for which in ("all", "best_worst")
    }
    assert len(set(paths.values())) == 2

    def never(*_):
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(lists._Pairs, "__call__", never)
    again, report = tokenize_preferences(data, TOKENIZER, list_pairs="all")
    assert again.cache_files[0]["filename"] == paths["all"] and report.pairs_of_lists == 6


def test_lists_are_turned_into_pairs_in_batches(tmp_path, monkeypatch):
    """Memory does not grow with the rows: a batch of lists at a time, and the pairs lie in a file."""
    seen = []
    whole = lists._Pairs.__call__
    monkeypatch.setattr(lists._Pairs, "__call__", lambda self, table: seen.append(len(table)) or whole(self, table))
    pairs, _ = tokenize_preferences(loaded(tmp_path, [TEXT] * 700), TOKENIZER, list_pairs="all")
    assert len(pairs) == 5 * 700 and sum(seen) >= 700 and max(seen) <= 256
    assert len(pairs.cache_files) == 1 and pairs._indices is None
    assert pairs["row"][:6] == [1] * 5 + [2]
