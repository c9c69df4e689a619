"""Tokenizing: ids worked out by hand for every format, every documented error, and a report that counts right.

The tokenizer is bytes: id = 3 + byte, after <s> 0, </s> 1 and <unk> 2, and one merge, "ab" 259.
"""

import json

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpofast.data.formats import split_prompt
from dpofast.data.load import DataError, Skipped, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import AB, EOS, ids, make_tokenizer

TEMPLATE = (
    "{% if tools %}T{{ tools[0].name }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if quick %}!{% endif %}{% endif %}"
)


PLAIN = make_tokenizer(chat_template=TEMPLATE)


def tokenize(*rows, tokenizer=PLAIN, **options):
    encoded, report = tokenize_preferences(Dataset.from_list(list(rows)), tokenizer, **options)
    return encoded.to_list(), report


def encode(row, **options):
    (example,), _ = tokenize(row, **options)
    assert example.pop("row") == 0
    return tuple(example.values())


def turns(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def answer(content):
    return turns(content, first="assistant")


def test_text():
    row = {"prompt": "Q:", "chosen": " yes", "rejected": "é😀"}
    assert encode(row) == (ids("Q:"), [*ids(" yes"), EOS], [*ids("é😀"), EOS])


def test_eos_that_stands_there_is_not_doubled():
    row = {"prompt": "Q", "chosen": "y</s>", "rejected": "</s>"}
    assert encode(row) == (ids("Q"), [*ids("y"), EOS], [EOS])


def test_bos_is_part_of_the_prompt():
    tokenizer = make_tokenizer("<s> $A")
    row = {"prompt": "Q", "chosen": "y", "rejected": "n"}
    assert encode(row, tokenizer=tokenizer) == ([0, *ids("Q")], [*ids("y"), EOS], [*ids("n"), EOS])
    assert encode(row | {"prompt": ""}, tokenizer=tokenizer) == ([0], [*ids("y"), EOS], [*ids("n"), EOS])


def test_a_tokenizers_own_eos_leaves_the_prompt():
    (example,), report = tokenize(
        {"prompt": "Q", "chosen": "y", "rejected": "n"}, tokenizer=make_tokenizer("<s> $A </s>")
    )
    assert (example["prompt_ids"], example["chosen_ids"]) == ([0, *ids("Q")], [*ids("y"), EOS])
    assert report.shortened_prompts == 0


def test_tokens_that_merge_across_the_boundary_go_to_both_responses():
    (example,), report = tokenize({"prompt": "xa", "chosen": "b", "rejected": "c"})
    assert example == {
        "prompt_ids": ids("x"),
        "chosen_ids": [AB, EOS],
        "rejected_ids": [*ids("ac"), EOS],
        "row": 0,
    }
    assert report.shortened_prompts == 1
    assert "prompts whose last tokens differ in front of a response: 1" in report.summary()


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Hi there", "Hi you", ("Hi", " there", " you")),
        ("Hi  there", "Hi  you", ("Hi ", " there", " you")),
        ("Hithere", "Hiyou", ("Hi", "there", "you")),
        ("abc", "abcd", ("ab", "c", "cd")),
        ("abc", "abc", ("ab", "c", "c")),
        ("a", "a", ("", "a", "a")),
        (" b", " c", ("", " b", " c")),
        ("x ", "y ", ("", "x ", "y ")),
        ("", "y", ("", "", "y")),
        (turns("q", "y"), turns("q", "n"), (turns("q"), answer("y"), answer("n"))),
        (turns("q", "y", "r"), turns("q", "y"), (turns("q"), turns("y", "r", first="assistant"), answer("y"))),
        (turns("p"), turns("q"), ([], turns("p"), turns("q"))),
    ],
)
def test_split_prompt(chosen, rejected, expected):
    assert split_prompt(chosen, rejected) == expected


@given(st.text("ab ", max_size=8), st.text("ab ", max_size=5), st.text("ab ", max_size=5))
def test_split_prompt_loses_nothing(prompt, chosen, rejected):
    chosen, rejected = prompt + chosen, prompt + rejected
    start, left, right = split_prompt(chosen, rejected)
    assert (start + left, start + right) == (chosen, rejected)
    assert (left and right) or not (chosen and rejected)
    if start and left[0] == right[0]:
        # Only the space before the difference, or the last character of the shorter one, may be held back.
        assert left[0] == " " and left[1:2] != right[1:2] or min(len(left), len(right)) == 1


def test_implicit_prompt():
    row = {"chosen": "Hi there", "rejected": "Hi you"}
    assert encode(row) == (ids("Hi"), [*ids(" there"), EOS], [*ids(" you"), EOS])


PAIRS = st.fixed_dictionaries(
    {name: st.text("abé ", min_size=1, max_size=6) for name in ("prompt", "chosen", "rejected")}
)


@settings(max_examples=20)
@given(st.lists(PAIRS, min_size=1, max_size=30))
def test_prompt_is_the_common_prefix(pairs):
    rows = [
        {**pair, "chosen": "b" + pair["chosen"], "rejected": "c" + pair["rejected"], "prompt": "x" + pair["prompt"]}
        for pair in pairs
    ]
    examples, report = tokenize(*rows)
    assert report.kept == len(rows)
    for row, example in zip(rows, examples, strict=True):
        alone = PLAIN(row["prompt"])["input_ids"]
        whole = [PLAIN(row["prompt"] + row[name] + "</s>")["input_ids"] for name in ("chosen", "rejected")]
        start = example["prompt_ids"]
        assert [start + example["chosen_ids"], start + example["rejected_ids"]] == whole
        assert alone[: len(start)] == start
        following = {tuple(tokens[len(start) : len(start) + 1]) for tokens in (alone, *whole)}
        assert len(start) == len(alone) or len(following) > 1


CHAT = {"prompt": turns("q"), "chosen": answer("yes"), "rejected": answer("no")}
CHAT_IDS = (ids("[u]q|[a]"), ids("yes|"), ids("no|"))


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"chosen": turns("q", "yes"), "rejected": turns("q", "no")},
        {"prompt": "q", "chosen": turns("q", "yes"), "rejected": turns("q", "no")},
    ],
    ids=["explicit", "implicit", "text beside"],
)
def test_conversation(row):
    assert encode(row) == CHAT_IDS


def test_conversation_of_several_turns():
    row = {"prompt": turns("q", "y", "r"), "chosen": turns("s", "t", "u", first="assistant"), "rejected": answer("v")}
    texts = ids("[u]q|[a]y|[u]r|[a]"), ids("s|[u]t|[a]u|"), ids("v|")
    assert encode(row, assistant_only_loss=False) == texts
    assert encode(row) == (*texts, [1.0] * 2 + [0.0] * 8 + [1.0] * 2, None)


@pytest.mark.parametrize("spell", [json.dumps, lambda tools: tools], ids=["text", "list"])
def test_tools(spell):
    prompt, chosen, rejected = CHAT_IDS
    assert encode(CHAT | {"tools": spell([{"name": "f"}])}) == (ids("Tf") + prompt, chosen, rejected)


def test_template_variables():
    # The template writes "!" after the prompt alone only, so it is not part of the shared prompt.
    (example,), report = tokenize(CHAT | {"chat_template_kwargs": {"quick": True}})
    assert tuple(example.values())[:3] == CHAT_IDS
    assert report.shortened_prompts == 1


TOKENS = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}


def test_token_ids_pass_through():
    assert encode(TOKENS, tokenizer=None) == ([5, 6], [7, 8], [9])
    assert encode(TOKENS | {"chosen": "a", "rejected": "b", "more": 1}) == ([5, 6], [7, 8], [9])


def test_reference_logps_are_kept():
    rows = [TOKENS | {"ref_chosen_logps": -0.1, "ref_rejected_logps": -2.5}]
    encoded, _ = tokenize_preferences(Dataset.from_list(rows), None)
    assert encoded.features["ref_chosen_logps"].dtype == "float32"
    assert encoded["ref_chosen_logps"] == [float(np.float32(-0.1))]
    assert encoded["ref_rejected_logps"] == [-2.5]


def test_output_types():
    encoded, _ = tokenize_preferences(Dataset.from_list([TOKENS]).with_format("torch"), None)
    assert {name: str(kind) for name, kind in encoded.features.items()} == {
        "prompt_ids": "List(Value('int32'))",
        "chosen_ids": "List(Value('int32'))",
        "rejected_ids": "List(Value('int32'))",
        "row": "Value('int64')",
    }


TEXT = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
BAD_ROWS = [
    (TEXT | {"chosen": None}, "column 'chosen' is missing: the row lacks it, or holds null"),
    (TEXT | {"prompt": None}, "column 'prompt' is missing"),
    (TEXT | {"chosen": ""}, "the chosen response is empty"),
    (TEXT | {"rejected": ""}, "the rejected response is empty"),
    (TEXT | {"prompt": ""}, "the prompt is empty: .*begin with a BOS"),
    (TEXT | {"chosen": "no"}, "chosen and rejected are equal"),
    (TEXT | {"prompt": "Q" * 9}, "the prompt fills max_length=8: its 9 tokens leave none .*raise max_length"),
    (TEXT | {"prompt": "Q" * 8}, "the prompt fills max_length=8: its 8"),
    (TEXT | {"chosen": "12345678", "rejected": "1234567890"}, "chosen and rejected are equal within max_length=8"),
    (CHAT | {"rejected": []}, "the rejected response is empty"),
    (CHAT | {"chosen": answer("")}, "the chosen response is empty"),
    (CHAT | {"prompt": []}, "the prompt is empty"),
    (
        CHAT | {"prompt": [{"role": "refused", "content": ""}]},
        "the chat template refused the conversation: no such role",
    ),
    (CHAT | {"chosen": [{"content": "x"}]}, "column 'chosen' is neither text nor a conversation: .*got list"),
    (CHAT | {"tools": "[{"}, "column 'tools' is not valid JSON"),
    (CHAT | {"tools": '{"name": "f"}'}, "column 'tools' is not a list: got dict"),
    (CHAT | {"chat_template_kwargs": [1]}, "column 'chat_template_kwargs' is not a dict: got list"),
    (CHAT | {"chat_template_kwargs": {"tokenize": False, "conversation": []}}, "the chat template refused"),
    ({"chosen": turns("p", "y"), "rejected": turns("q", "n")}, "the prompt is empty: the two conversations share no"),
    (TOKENS | {"chosen_ids": []}, "the chosen response is empty"),
    (TOKENS | {"prompt_ids": []}, "the prompt is empty"),
    (TOKENS | {"rejected_ids": [7, 8]}, "chosen and rejected are equal"),
    (
        TOKENS | {"rejected_ids": [7, -1]},
        r"column 'rejected_ids' holds a token id outside \[0, 2\*\*31\): from -1 to 7",
    ),
    (TOKENS | {"rejected_ids": [2**31]}, r"column 'rejected_ids' holds a token id outside"),
    (TOKENS | {"rejected_ids": [300]}, "a token id is outside the vocabulary of 260: got 300"),
    (TOKENS | {"rejected_ids": [1.5]}, "column 'rejected_ids' is not a list of token ids: expected integers"),
    (TOKENS | {"rejected_ids": [1, None]}, "column 'rejected_ids' is not a list of token ids"),
    (TOKENS | {"rejected_ids": [[1]]}, "column 'rejected_ids' is not a list of token ids"),
    (TOKENS | {"rejected_ids": [[1], [1, 2]]}, "column 'rejected_ids' is not a list of token ids"),
    (TOKENS | {"rejected_ids": "12"}, "column 'rejected_ids' is not a list of token ids: .*got str '12'"),
    (
        TOKENS | {"ref_chosen_logps": float("nan"), "ref_rejected_logps": -1.0},
        "column 'ref_chosen_logps' is not finite",
    ),
    (TOKENS | {"ref_chosen_logps": -1.0, "ref_rejected_logps": 1e39}, "column 'ref_rejected_logps' is not finite"),
    (TOKENS | {"ref_chosen_logps": -1.0, "ref_rejected_logps": 2.0}, "column 'ref_rejected_logps' is above 0"),
    (TOKENS | {"ref_chosen_logps": "-1", "ref_rejected_logps": -1.0}, "column 'ref_chosen_logps' is not a number"),
    (TOKENS | {"ref_chosen_logps": None, "ref_rejected_logps": -1.0}, "column 'ref_chosen_logps' is missing"),
    (CHAT | {"chosen": "yes", "rejected": "no"}, "text and conversations are mixed: chosen holds text"),
    (CHAT | {"prompt": "q", "chosen": "yes"}, "text and conversations are mixed"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row(row, reason):
    options = {"max_length": 8, "vocab_size": 260}
    with pytest.raises(DataError, match=rf"^some data, row 0 \(counted from 0\): {reason}") as caught:
        tokenize(row, source="some data", **options)
    assert caught.value.__suppress_context__, "datasets' own traceback must not be shown"
    with pytest.raises(DataError, match=r"(?s)no row can be used.*0 of 1 pairs kept\n  skipped 1: "):
        tokenize(row, on_bad_row="skip", **options)


MISSING_COLUMNS = [
    ({"text": "a"}, "column 'chosen' is missing: expected chosen and rejected .*found text"),
    ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing: .*found chosen, prompt"),
    ({"prompt_ids": [1], "chosen_ids": [2]}, "column 'rejected_ids' is missing"),
    (TOKENS | {"ref_chosen_logps": -1.0}, "column 'ref_rejected_logps' is missing"),
    (TEXT | {"videos": [1]}, "videos are not supported"),
    (TEXT | {"images": [1]}, "column 'images' holds no images: expected .*int64 is no image"),
]


@pytest.mark.parametrize(("row", "reason"), MISSING_COLUMNS)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_missing_column_is_never_skipped(row, reason, on_bad_row):
    with pytest.raises(DataError, match=f"^<dataset>: {reason}"):
        tokenize(row, on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("row", "tokenizer", "reason"),
    [
        (TEXT, make_tokenizer(eos_token=None), "the tokenizer has no eos_token: text responses end with it"),
        (CHAT, make_tokenizer(), "the tokenizer has no chat_template: conversations are written by it"),
        (TEXT, None, "text cannot be used without a tokenizer"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_unfit_tokenizer_is_never_skipped(row, tokenizer, reason, on_bad_row):
    with pytest.raises(DataError, match=rf"row 0 \(counted from 0\): {reason}"):
        tokenize(row, tokenizer=tokenizer, on_bad_row=on_bad_row)


def test_conversations_need_no_eos():
    assert encode(CHAT, tokenizer=make_tokenizer(chat_template=TEMPLATE, eos_token=None)) == CHAT_IDS


def test_skipped_rows_are_counted_and_named():
    rows = [TEXT, *[TEXT | {"chosen": ""}] * 12, TEXT | {"rejected": "yes"}, TEXT]
    examples, report = tokenize(*rows, on_bad_row="skip", source="some data")
    assert [example["row"] for example in examples] == [0, 14]
    assert examples[0]["chosen_ids"] == examples[1]["chosen_ids"] == [*ids("yes"), EOS]
    assert (report.rows, report.kept, report.truncated, report.shortened_prompts) == (15, 2, 0, 0)
    assert report.skipped == {
        "the chosen response is empty": Skipped(12, tuple(range(1, 11))),
        "chosen and rejected are equal": Skipped(1, (13,)),
    }
    assert report.summary() == (
        "some data: 2 of 15 pairs kept\n"
        "  skipped 12: the chosen response is empty (row 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)\n"
        "  skipped 1: chosen and rejected are equal (row 13)"
    )


def test_rows_without_the_skipped_ones_lie_plainly_in_a_file(tmp_path):
    Dataset.from_list([TEXT, TEXT | {"chosen": ""}, TEXT]).save_to_disk(tmp_path / "data")
    source = Dataset.load_from_disk(tmp_path / "data")
    good, report = tokenize_preferences(source, PLAIN, on_bad_row="skip")
    assert good["row"] == [0, 2] and report.kept == 2
    assert good._indices is None and len(good.cache_files) == 1
    whole, _ = tokenize_preferences(source.select([0, 2]), PLAIN)
    assert good.features == whole.features and good.format == whole.format
    assert tokenize_preferences(source, PLAIN, on_bad_row="skip")[0].cache_files == good.cache_files


def test_truncation_cuts_tails_and_counts_them():
    rows = [TEXT, TEXT | {"chosen": "yesyes"}, {"prompt": "QQ", "chosen": "123", "rejected": "456"}]
    examples, report = tokenize(*rows, max_length=5)
    assert [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples] == [
        (ids("Q"), [*ids("yes"), EOS], [*ids("no"), EOS]),
        (ids("Q"), ids("yesy"), [*ids("no"), EOS]),
        (ids("QQ"), ids("123"), ids("456")),
    ]
    assert report.truncated == 3
    assert report.summary() == "<dataset>: 3 of 3 pairs kept, responses cut to max_length, their end and EOS gone: 3"
    assert tokenize(*rows, max_length=None)[1].truncated == 0


def test_jsonl_lines_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["", json.dumps(TEXT), "{", json.dumps(TEXT | {"chosen": ""})]))
    dataset = load_preferences(path, on_bad_row="skip", cache_dir=str(tmp_path))
    encoded, report = tokenize_preferences(dataset, PLAIN, on_bad_row="skip")
    assert encoded["row"] == [2]
    assert (report.source, report.unit, report.rows) == (str(path), "line", 3)
    assert report.skipped == {"not valid JSON": Skipped(1, (3,)), "the chosen response is empty": Skipped(1, (4,))}
    both = (
        r"2 of 3 rows cannot be used .*:\n  line 3: not valid JSON: the line ends .*\n  line 4: the chosen response is"
    )
    with pytest.raises(DataError, match=rf"pairs\.jsonl: {both}"):
        tokenize_preferences(dataset, PLAIN)
    # From the cache the report must be as complete, and a tokenizer that changed must not find the old ids.
    assert tokenize_preferences(dataset, PLAIN, on_bad_row="skip")[1] == report
    other, _ = tokenize_preferences(dataset, make_tokenizer("<s> $A"), on_bad_row="skip")
    assert other["prompt_ids"] == [[0, *ids("Q")]]


def test_several_processes():
    rows = [TEXT] * 5 + [TEXT | {"chosen": ""}]
    with pytest.raises(
        DataError, match=r"^<dataset>, row 5 \(counted from 0\): the chosen response is empty$"
    ) as caught:
        tokenize(*rows, num_proc=2)
    assert caught.value.__suppress_context__
    assert tokenize(*rows, num_proc=2, on_bad_row="skip") == tokenize(*rows, on_bad_row="skip")


def test_rows_as_an_arrow_table():
    rows = [{"prompt_ids": [i], "chosen_ids": [i] * (i + 1), "rejected_ids": [9]} for i in range(6)]
    rows = [row | {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.0} for row in rows]
    encoded, _ = tokenize_preferences(Dataset.from_list(rows), None)
    for picked in ([4, 1, 1], [3], [2, 3, 4], []):
        table = encoded.with_format("arrow")[picked]
        assert table["chosen_ids"].to_pylist() == [[i] * (i + 1) for i in picked]
        assert table["row"].to_pylist() == picked
        assert table.schema.field("prompt_ids").type.value_type == pa.int32()
        assert table["ref_chosen_logps"].to_pylist() == [-1.5] * len(picked)


def test_options():
    with pytest.raises(ValueError, match="max_length: expected None or at least 2 .*, got 1"):
        tokenize(TEXT, max_length=1)
    with pytest.raises(ValueError, match="truncation_mode: expected 'keep_start' or 'keep_end', got 'middle'"):
        tokenize(TEXT, truncation_mode="middle")
    with pytest.raises(ValueError, match="on_bad_row: expected 'raise' or 'skip', got 'fix'"):
        tokenize(TEXT, on_bad_row="fix")
    with pytest.raises(ValueError, match="vocab_size: expected None or a positive number, got 0"):
        tokenize(TEXT, vocab_size=0)
    with pytest.raises(
        TypeError, match="tokenizer: expected a transformers tokenizer or None, got object; of a processor, pass"
    ):
        tokenize(TEXT, tokenizer=object())
    dataset = Dataset.from_list([TEXT])
    for wrong in (dataset.to_iterable_dataset(), DatasetDict(train=dataset), [TEXT]):
        with pytest.raises(
            TypeError, match=f"dataset: expected a datasets.Dataset, got {type(wrong).__name__}; choose"
        ):
            tokenize_preferences(wrong, PLAIN)
    with pytest.raises(DataError, match="^<dataset>: there are no rows$"):
        tokenize_preferences(dataset.select([]), PLAIN)


def test_keep_end_cuts_the_prompt_that_both_responses_share():
    rows = [
        {"prompt": "0123456789", "chosen": "yes", "rejected": "n"},
        {"prompt": "01", "chosen": "yes", "rejected": "n"},
    ]
    examples, report = tokenize(*rows, max_length=7, truncation_mode="keep_end")
    assert [(e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]) for e in examples] == [
        (ids("789"), [*ids("yes"), EOS], [*ids("n"), EOS]),
        (ids("01"), [*ids("yes"), EOS], [*ids("n"), EOS]),
    ]
    assert (report.truncated, report.cut_prompts) == (0, 1)
    assert "prompts cut to max_length, their beginning gone: 1" in report.summary()
    with pytest.raises(DataError, match="a response fills max_length=4: its 4 tokens leave none for the prompt"):
        tokenize(rows[1], max_length=4, truncation_mode="keep_end")
