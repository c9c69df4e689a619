"""Columns of rows and of tokens: what is stored, what each refusal says, and names that were ignored before."""

import json

import numpy as np
import pytest
from datasets import Dataset

from dpofast.data.load import DataError, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import EOS, ids, make_tokenizer

TOKENIZER = make_tokenizer()
TEXT = {"prompt": "Q", "chosen": "yes", "rejected": "no"}  # responses of 4 and 3 tokens
TOKENS = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}


def tokenize(*rows, tokenizer=TOKENIZER, **options):
    return tokenize_preferences(Dataset.from_list(list(rows)), tokenizer, **options)[0]


NUMBERS = {"weight": 0, "margin": -2.5, "beta": 0.25, "label_smoothing": 0.5}


@pytest.mark.parametrize("row", [TEXT, TOKENS], ids=["text", "token ids"])
def test_numbers_of_a_row(row):
    encoded = tokenize(row | NUMBERS)
    assert {name: encoded.features[name].dtype for name in NUMBERS} == dict.fromkeys(NUMBERS, "float32")
    assert {name: encoded[0][name] for name in NUMBERS} == NUMBERS


@pytest.mark.parametrize("name", NUMBERS)
def test_each_number_alone(name):
    assert tokenize(TEXT | {name: 0.25}).column_names[-2:] == [name, "row"]


def test_weights_of_tokens():
    (example,) = tokenize(TEXT | {"chosen_weights": [0, 1, 0.5, 2], "rejected_weights": [True, False, True]})
    assert example["chosen_ids"] == [*ids("yes"), EOS]
    assert (example["chosen_weights"], example["rejected_weights"]) == ([0, 1, 0.5, 2], [1, 0, 1])


def test_weights_may_be_null_in_a_row_and_missing_for_a_response():
    encoded = tokenize(TEXT | {"chosen_weights": None}, TEXT | {"chosen_weights": [1.0, 0.0, 0.0, 0.0]})
    assert encoded["chosen_weights"][:] == [None, [1.0, 0.0, 0.0, 0.0]]
    assert encoded["rejected_weights"][:] == [None, None]


def test_weights_that_are_null_everywhere_leave_no_column():
    assert tokenize(TEXT | {"chosen_weights": None, "rejected_weights": None}).to_list() == tokenize(TEXT).to_list()


def test_weights_are_cut_along():
    (example,) = tokenize(TEXT | {"chosen_weights": [1.0, 0.5, 1.0, 1.0]}, max_length=3)
    assert (example["chosen_ids"], example["chosen_weights"]) == (ids("ye"), [1.0, 0.5])


NAN = float("nan")
BAD_ROWS = [
    (
        {"weight": -0.5},
        "column 'weight' is out of range: expected a number of 0 or more, got -0.5; it is the factor of",
    ),
    (
        {"weight": NAN},
        "column 'weight' is not finite: expected a float32, got float nan; it is the factor of the row's",
    ),
    ({"weight": 1e39}, "column 'weight' is not finite"),
    (
        {"weight": None},
        "column 'weight' is missing: the row lacks it, or holds null; it is the factor of the row's loss",
    ),
    (
        {"weight": "heavy"},
        "column 'weight' is not a number: got str 'heavy'; .*rename the column if it means something",
    ),
    ({"weight": True}, "column 'weight' is not a number: got bool True"),
    (
        {"margin": "wide"},
        "column 'margin' is not a number: .*the offset in nats that is subtracted from the row's marg",
    ),
    ({"margin": float("inf")}, "column 'margin' is not finite"),
    ({"beta": 0}, "column 'beta' is out of range: expected a number above 0, got 0; it is the row's beta, in place of"),
    ({"beta": 1e-60}, "column 'beta' is out of range: expected a number above 0"),
    ({"beta": "low"}, "column 'beta' is not a number: got str 'low'; it is the row's beta"),
    ({"label_smoothing": 1}, r"column 'label_smoothing' is out of range: expected a number in \[0, 1\), got 1; it is"),
    ({"label_smoothing": 1 - 1e-12}, "column 'label_smoothing' is out of range"),
    ({"label_smoothing": -0.1}, "column 'label_smoothing' is out of range"),
    (
        {"chosen_weights": [1.0, 1.0]},
        "the chosen response has another number of tokens than of weights: 2 weights for 4 tokens, with the end",
    ),
    (
        {"rejected_weights": [1.0] * 4},
        "the rejected response has another number of tokens than of weights: 4 weights f",
    ),
    (
        {"chosen_weights": [0, 0, 0, 0]},
        "column 'chosen_weights' gives every token weight 0: at least one token must co",
    ),
    ({"chosen_weights": [1e-60] * 4}, "column 'chosen_weights' gives every token weight 0"),
    ({"chosen_weights": []}, "column 'chosen_weights' holds no weight: expected one for each token"),
    ({"chosen_weights": [1, -1, 1, 1]}, "column 'chosen_weights' holds a weight out of range: .*>= 0, got -1.0"),
    ({"chosen_weights": [1, NAN, 1, 1]}, "column 'chosen_weights' holds a weight out of range: .*>= 0, got nan"),
    ({"chosen_weights": [1, 1e39, 1, 1]}, "column 'chosen_weights' holds a weight out of range"),
    ({"chosen_weights": [1.0, None, 1, 1]}, "column 'chosen_weights' is not a list of numbers: expected one for each"),
    ({"chosen_weights": ["a", "b"]}, "column 'chosen_weights' is not a list of numbers"),
    ({"chosen_weights": [[1.0], [1.0, 2.0]]}, "column 'chosen_weights' is not a list of numbers"),
    ({"chosen_weights": 1.0}, "column 'chosen_weights' is not a list of numbers: expected one for each token, got flo"),
    ({"chosen_weights": "1"}, "column 'chosen_weights' is not a list of numbers"),
]


@pytest.mark.parametrize(("columns", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row(columns, reason):
    with pytest.raises(DataError, match=rf"^<dataset>, row 0 \(counted from 0\): {reason}"):
        tokenize(TEXT | columns)
    with pytest.raises(DataError, match="no row can be used"):
        tokenize(TEXT | columns, on_bad_row="skip")


def test_cut_to_tokens_that_do_not_count():
    row = TEXT | {"chosen_weights": [0, 0, 1, 1]}
    with pytest.raises(DataError, match="the chosen response has no token that counts within max_length=3"):
        tokenize(row, max_length=3)


def test_rows_of_one_file_have_the_same_columns(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (TEXT | {"weight": 1}, TEXT, TEXT | {"weight": "much"})))
    with pytest.raises(DataError) as caught:
        load_preferences(file)
    assert "line 2: column 'weight' differs from the first row's: expected number, got no such col" in str(caught.value)
    assert "line 3: column 'weight' is not a number: got str 'much'; it is the factor of the row's" in str(caught.value)


def test_weights_of_tokens_may_begin_in_a_later_line(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [TEXT, TEXT | {"chosen_weights": [True, False, True, True]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded, _ = tokenize_preferences(load_preferences(file), TOKENIZER)
    assert encoded["chosen_weights"][:] == [None, [1.0, 0.0, 1.0, 1.0]]


def test_csv(tmp_path):
    file = tmp_path / "data.csv"
    head = "prompt,chosen,rejected,weight,chosen_weights,ranks\n"
    file.write_text(head + 'Q,yes,no,0.5,"[1, 0, 1, 1]",a word\nQ,yes,no,2,,\n')
    encoded, _ = tokenize_preferences(load_preferences(file), TOKENIZER)
    assert encoded["weight"][:] == [0.5, 2.0] and encoded["chosen_weights"][:] == [[1.0, 0.0, 1.0, 1.0], None]
    file.write_text(head + "Q,yes,no,heavy,,\n")
    with pytest.raises(DataError, match="line 2: column 'weight' is not a number: got str 'heavy'; it is the factor"):
        load_preferences(file)
    file.write_text(head + "Q,yes,no,1,most,\n")
    with pytest.raises(DataError, match="line 2: column 'chosen_weights' is not valid JSON"):
        load_preferences(file)


def test_tokenized_columns_are_tokenized_to_themselves():
    row = TEXT | NUMBERS | {"chosen_weights": [0, 1, 0.5, 2], "rejected_weights": None}
    (first,) = tokenize(row)
    assert tokenize(first, tokenizer=None).to_list() == [first]


def test_a_transform_may_give_arrays():
    def shown(batch):
        return {
            **{name: batch[name] for name in TEXT},
            "chosen_weights": [np.array([1.0, 0, 1, 1]) for _ in batch["prompt"]],
        }

    dataset = Dataset.from_list([TEXT]).with_transform(shown)
    encoded, _ = tokenize_preferences(dataset, TOKENIZER)
    assert encoded[0]["chosen_weights"] == [1.0, 0.0, 1.0, 1.0]
