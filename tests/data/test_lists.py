"""Lists of responses: order, ranks and pairs worked out by hand, every refusal, and sources of all kinds.

The tokenizer is bytes: id = 3 + byte; a text's end is </s>, 1.
"""

import csv
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from dpofast.data.formats import used_columns
from dpofast.data.lists import ranking, with_best_and_worst
from dpofast.data.load import DataError, Skipped, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import EOS, ids, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}|{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
TOKENIZER = make_tokenizer(chat_template=TEMPLATE)


def tokenize(*rows, tokenizer=TOKENIZER, **options):
    encoded, report = tokenize_preferences(Dataset.from_list(list(rows)), tokenizer, **options)
    return encoded.to_list(), report


def end(text):
    return [*ids(text), EOS]


TEXT = {"prompt": "Q", "responses": ["x", "yy", "zzz", "w"], "scores": [1.0, 3.0, 1.0, 2.5]}
# Best first: yy (3), w (2.5), then x and z (1), which are tied and stand as in the row.
LISTED = {
    "prompt_ids": ids("Q"),
    "responses_ids": [end("yy"), end("w"), end("x"), end("zzz")],
    "ranks": [0, 1, 2, 2],
    "order": [1, 3, 0, 2],
    "scores": [3.0, 2.5, 1.0, 1.0],
    "row": 0,
}


def test_text_with_scores():
    (example,), report = tokenize(TEXT)
    assert example == LISTED
    assert report.summary() == "<dataset>: 1 of 1 lists kept" and report.examples == 1


def test_ranks_are_made_dense():
    row = {"prompt": "Q", "responses": ["x", "y", "z"], "ranks": [7, 2, 7]}
    (example,), _ = tokenize(row)
    assert example == {
        "prompt_ids": ids("Q"),
        "responses_ids": [end("y"), end("x"), end("z")],
        "ranks": [0, 1, 1],
        "order": [1, 0, 2],
        "row": 0,
    }


def test_scores_order_what_ranks_tie():
    assert ranking(3, [2, 1, 2], [0.0, 5.0, 1.0]) == ([1, 2, 0], [0, 1, 1], [5.0, 1.0, 0.0])
    # Ranks may break a tie of scores.
    assert ranking(2, [2, 1], [0.5, 0.5]) == ([1, 0], [0, 1], [0.5, 0.5])


def test_scores_that_are_one_float32_are_tied():
    scores = [1.0, 1.0 + 2.0**-30, 0.0]
    assert ranking(3, None, scores) == ([0, 1, 2], [0, 0, 1], [1.0, 1.0, 0.0])


def test_features():
    row = TEXT | {"ref_responses_logps": [-1.0] * 4, "weight": 2, "responses_weights": None}
    row |= {"responses_weights": [[1, 0], None, [0.5] * 4, None]}
    encoded, _ = tokenize_preferences(Dataset.from_list([row]), TOKENIZER)
    assert {name: str(kind) for name, kind in encoded.features.items()} == {
        "prompt_ids": "List(Value('int32'))",
        "responses_ids": "List(List(Value('int32')))",
        "ranks": "List(Value('int32'))",
        "order": "List(Value('int32'))",
        "scores": "List(Value('float32'))",
        "ref_responses_logps": "List(Value('float32'))",
        "responses_weights": "List(List(Value('float32')))",
        "weight": "Value('float32')",
        "row": "Value('int64')",
    }


def test_columns_of_responses_follow_the_order():
    row = TEXT | {
        "ref_responses_logps": [-1.0, -2.0, -3.0, -4.0],
        "responses_weights": [[1, 0], None, [0.5, 0.5, 1, 1], None],
    }
    (example,), _ = tokenize(row)
    assert example["ref_responses_logps"] == [-2.0, -4.0, -1.0, -3.0]
    assert example["responses_weights"] == [[1, 1, 1], [1, 1], [1, 0], [0.5, 0.5, 1, 1]]


def answers(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


ASKED = {"role": "user", "content": "q"}
CHAT = {"prompt": [ASKED], "responses": answers("no", "yes"), "ranks": [2, 1]}


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        CHAT | {"responses": [[ASKED, *turns] for turns in CHAT["responses"]]},
        {"responses": [[ASKED, *turns] for turns in CHAT["responses"]], "ranks": [2, 1]},
        {"prompt": "q", "responses": [[ASKED, *turns] for turns in CHAT["responses"]], "ranks": [2, 1]},
    ],
    ids=["explicit", "repeated", "implicit", "text beside"],
)
def test_conversations(row):
    (example,), _ = tokenize(row)
    assert example == {
        "prompt_ids": ids("[u]q|[a]"),
        "responses_ids": [ids("yes|"), ids("no|")],
        "ranks": [0, 1],
        "order": [1, 0],
        "row": 0,
    }


def test_tools_and_variables_reach_the_template():
    template = "{% if tools %}T{{ tools[0].name }}{% endif %}{{ mood }}" + TEMPLATE
    row = CHAT | {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "!"}}
    (example,), _ = tokenize(row, tokenizer=make_tokenizer(chat_template=template))
    assert example["prompt_ids"] == ids("Tf![u]q|[a]")


def test_without_a_prompt_it_is_what_all_responses_begin_with():
    (example,), _ = tokenize({"responses": ["Hi there", "Hi you", "Hi they"], "ranks": [1, 2, 3]})
    assert example["prompt_ids"] == ids("Hi")
    assert example["responses_ids"] == [end(" there"), end(" you"), end(" they")]


TOKENS = {"prompt_ids": [5, 6], "responses_ids": [[7, 8], [9], [7]], "scores": [0.5, 2, 1]}


def test_token_ids():
    (example,), _ = tokenize(TOKENS, tokenizer=None)
    assert (example["responses_ids"], example["ranks"], example["order"]) == ([[9], [7], [7, 8]], [0, 1, 2], [1, 2, 0])


def test_a_tokenized_list_is_tokenized_to_itself():
    row = TEXT | {"weight": 0.5, "responses_weights": [[1, 0], None, [0.5] * 4, None]}
    (first,), _ = tokenize(row)
    (again,), _ = tokenize(first, tokenizer=None)
    assert again == first | {"order": [0, 1, 2, 3]}


def test_length_cuts_every_response():
    row = {"prompt": "Q", "responses": ["pqrst", "uvwxy", "u"], "ranks": [1, 2, 3]}
    row |= {"responses_weights": [[1, 1, 0.5, 0, 0, 0], None, None]}
    (example,), report = tokenize(row, max_length=4, tokenizer=make_tokenizer())
    assert example["responses_ids"] == [ids("pqr"), ids("uvw"), end("u")] and report.truncated == 2
    assert example["responses_weights"] == [[1, 1, 0.5], [1, 1, 1], [1, 1]]
    (example,), report = tokenize(row | {"prompt": "QRSTUV"}, max_length=9, truncation_mode="keep_end")
    assert example["prompt_ids"] == ids("TUV") and report.cut_prompts == 1


def test_equal_responses_of_one_rank_may_stand():
    (example,), _ = tokenize({"prompt": "Q", "responses": ["x", "y", "x"], "ranks": [2, 1, 2]})
    assert example["responses_ids"] == [end("y"), end("x"), end("x")]


NAN = float("nan")
BAD_ROWS = [
    (TEXT | {"responses": ["x"], "scores": [1.0]}, "a list holds fewer than two responses: got 1"),
    (TEXT | {"responses": [], "scores": []}, "a list holds fewer than two responses: got 0"),
    (TEXT | {"scores": [1.0, 3.0, NAN, 2.0]}, "column 'scores' is not finite: expected a float32, got float nan"),
    (TEXT | {"scores": [1.0, 3.0, 1e39, 2.0]}, "column 'scores' is not finite"),
    (TEXT | {"scores": [1.0, 3.0, None, 2.0]}, "column 'scores' is not a number: got NoneType None"),
    (TEXT | {"scores": [1.0, 3.0]}, "column 'scores' is not of the responses' length: got 2 values for 4 responses"),
    (TEXT | {"ranks": [1, 2]}, "column 'ranks' is not of the responses' length: got 2 values for 4 responses"),
    (TEXT | {"scores": 1.0}, "column 'scores' is not a list: expected a value for each response, got float 1.0"),
    (TEXT | {"scores": [1.0] * 4}, "all responses of a list are tied: all 4 have one rank or score"),
    (
        TEXT | {"ranks": [4, 3, 2, 1]},
        r"ranks contradict scores: response 2 \(counted from 0\) has rank 2 and score 1, response 1 rank 3 and score 3;"
        " smaller ranks and larger scores are better",
    ),
    (
        TEXT | {"responses": ["x", "yy", "zzz", "yy"]},
        r"equal responses have different ranks or scores: responses 1 and 3 \(counted from 0\)",
    ),
    (
        {"prompt": "Q" * 6, "responses": ["pqr", "pqs", "x"], "ranks": [1, 2, 3]},
        r"equal responses have different ranks or scores within max_length=8: responses 0 and 1",
    ),
    (TEXT | {"responses": ["x", "", "zzz", "yy"]}, r"a response is empty: response 1 \(counted from 0\)"),
    (TEXT | {"responses": ["x", None, "z", "y"]}, "column 'responses' is not a list of texts or conversations"),
    (TEXT | {"responses": "x"}, "column 'responses' is not a list: expected a value for each response, got str 'x'"),
    (TEXT | {"responses": [1, 2, 3, 4]}, "column 'responses' is not a list of texts or conversations: .*got int 1"),
    (TEXT | {"responses": None}, "column 'responses' is missing"),
    (CHAT | {"prompt": "Q", "responses": ["x", "y"], "tools": [1], "system": "S"}, "column 'system' holds text that"),
    (CHAT | {"responses": ["x", "y"]}, "text and conversations are mixed: responses holds texts"),
    (
        CHAT | {"responses": [[ASKED, *answers("a")[0]], [{"role": "user", "content": "r"}, *answers("b")[0]]]},
        r"a response begins with a turn of role 'user': response 0 \(counted from 0\): 'q' would be trained on",
    ),
    (TEXT | {"responses_weights": [None] * 3}, "column 'responses_weights' is not of the responses' length: got 3 val"),
    (
        TEXT | {"responses_weights": [[1.0], None, None, None]},
        r"a response has another number of tokens than of weights: response 0 \(counted from 0\): 1 weights for 2 tok",
    ),
    (TEXT | {"ref_responses_logps": [-1.0] * 3}, "column 'ref_responses_logps' is not of the responses' length"),
    (TEXT | {"ref_responses_logps": [-1.0, -1.0, 2.0, -1.0]}, "column 'ref_responses_logps' is above 0"),
    (TOKENS | {"responses_ids": [[7], [8], [300]]}, "a token id is outside the vocabulary of 260: got 300"),
    (TOKENS | {"responses_ids": [[7], [8], [-1]]}, "column 'responses_ids' holds a token id outside"),
    (TOKENS | {"responses_ids": [[7], [8], []]}, r"a response is empty: response 2 \(counted from 0\)"),
    ({"responses": ["Q", "R"], "ranks": [1, 2]}, "the prompt is empty: the 2 texts share no beginning"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row(row, reason):
    options = {"max_length": 8, "vocab_size": 260}
    with pytest.raises(DataError, match=rf"^some data, row 0 \(counted from 0\): {reason}"):
        tokenize(row, source="some data", **options)
    with pytest.raises(DataError, match=r"(?s)no row can be used.*0 of 1 lists kept\n  skipped 1: "):
        tokenize(row, on_bad_row="skip", **options)


BAD_COLUMNS = [
    ({"prompt": "Q", "responses": ["x", "y"]}, "a list has neither ranks nor scores: .*or a list: responses"),
    (
        TEXT | {"chosen": "x", "rejected": "y"},
        "the columns are those of a pair and of a list: 'chosen' and 'rejected' beside 'responses'",
    ),
    (
        TEXT | {"chosen_weights": [1.0]},
        "column 'chosen_weights' belongs to pairs: use ref_responses_logps, responses_w",
    ),
    (TEXT | {"ref_chosen_logps": -1.0}, "column 'ref_chosen_logps' belongs to pairs"),
    ({"chosen": "x", "rejected": "y", "responses_weights": None}, "column 'responses_weights' belongs to lists"),
    ({"responses_ids": [[1], [2]], "ranks": [1, 2]}, "column 'prompt_ids' is missing"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_COLUMNS)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_bad_columns_are_never_skipped(row, reason, on_bad_row):
    with pytest.raises(DataError, match=f"^<dataset>: {reason}"):
        tokenize(row, on_bad_row=on_bad_row)


def test_a_column_responses_beside_a_pair_is_not_read():
    (example,), _ = tokenize({"prompt": "Q", "chosen": "x", "rejected": "y", "responses": ["x", "y"]})
    assert (example["chosen_ids"], example["rejected_ids"]) == (end("x"), end("y"))


def test_skipped_lists_are_counted_by_reason():
    rows = [TEXT, TEXT | {"scores": [1.0] * 4}, TEXT | {"scores": [1.0, NAN, 2.0, 3.0]}, TEXT | {"scores": [2.0] * 4}]
    examples, report = tokenize(*rows, on_bad_row="skip")
    assert [example["row"] for example in examples] == [0]
    assert report.skipped == {
        "all responses of a list are tied": Skipped(2, (1, 3)),
        "column 'scores' is not finite": Skipped(1, (2,)),
    }


# ---- files ----------------------------------------------------------------------------------------------------------

ROWS = [TEXT, {"prompt": "R", "responses": ["x", "y"], "scores": [2, 1]}]
FROM_FILES = [LISTED, LISTED | {"prompt_ids": ids("R"), "responses_ids": [end("x"), end("y")], "ranks": [0, 1]}]
FROM_FILES[1] |= {"order": [0, 1], "scores": [2.0, 1.0]}


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows(
            [value if isinstance(value, str) else json.dumps(value) for value in row.values()] for row in rows
        )


WRITERS = {
    ".jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".csv": write_csv,
    ".parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(str(path)),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_files(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"data{suffix}", ROWS)
    encoded, _ = tokenize_preferences(load_preferences(tmp_path / f"data{suffix}"), TOKENIZER)
    first = 0 if suffix in (".json", ".parquet") else 1
    numbers = [2, 3] if suffix == ".csv" else [first, first + 1]
    assert encoded.to_list() == [row | {"row": number} for row, number in zip(FROM_FILES, numbers, strict=True)]


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_of_conversations_and_weights(tmp_path, suffix):
    row = CHAT | {"responses_weights": [None, [1.0, 0.5, 0.0, 1.0]], "weight": 2.0}
    WRITERS[suffix](tmp_path / f"data{suffix}", [row, row])
    encoded, _ = tokenize_preferences(load_preferences(tmp_path / f"data{suffix}"), TOKENIZER)
    example = encoded[1]
    assert example["responses_ids"] == [ids("yes|"), ids("no|")] and example["weight"] == 2.0
    assert example["responses_weights"] == [[1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 1.0]]


def test_a_bad_line_is_named(tmp_path):
    rows = [TEXT, TEXT | {"scores": [1.0, "high", 2.0, 3.0]}, {"prompt": "Q", "responses": ["x", "y"], "ranks": [1, 2]}]
    WRITERS[".jsonl"](tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_preferences(tmp_path / "data.jsonl")
    assert "2 of 3 rows cannot be used" in str(caught.value)
    assert "line 2: column 'scores' is not a number: got str 'high'" in str(caught.value)
    assert "line 3: column 'scores' differs from the first row's: expected numbers, got no such" in str(caught.value)
    WRITERS[".jsonl"](tmp_path / "data.jsonl", [TEXT, TEXT | {"ranks": None, "scores": [1.0] * 4}])
    with pytest.raises(DataError, match=r"data.jsonl, line 2: all responses of a list are tied"):
        tokenize_preferences(load_preferences(tmp_path / "data.jsonl"), TOKENIZER)


def test_best_and_worst():
    example = {"responses_ids": [[1], [2], [3]], "ranks": [0, 1, 2], "row": 4}
    shown = with_best_and_worst(example)
    assert shown == example | {"chosen_ids": [1], "rejected_ids": [3]}
    assert shown["chosen_ids"] is example["responses_ids"][0] and "chosen_ids" not in example
    pair = {"chosen_ids": [1], "rejected_ids": [2]}
    assert with_best_and_worst(pair) is pair


def test_the_rows_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    (pictured,) = (row for row in rows if "images" in row)
    assert used_columns(pictured)[-1] == "images"
    rows.remove(pictured)  # whose file is not there
    assert sum("responses" in row for row in rows) == 2 and len(rows) == 7
    kept = [tokenize(row)[0][0] for row in rows]
    assert kept[3]["ranks"] == [0, 1, 1] and kept[4]["weight"] == 0.5
    assert set(kept[6]["chosen_weights"]) == {0.0, 1.0}
