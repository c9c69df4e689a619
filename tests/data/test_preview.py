"""The preview shows the token ids that training reads, as text."""

import pytest
from datasets import Dataset

import dpofast
from dpofast import preview_preferences
from tests.support.byte_tokenizer import make_tokenizer

TEMPLATE = "<s>{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}</s>{% endfor %}"


def test_prompt_and_responses_apart_with_special_tokens():
    rows = [{"prompt": "Q: two\nlines\t\x1b[2J", "chosen": " yes\n", "rejected": "</s>"}]
    shown = preview_preferences(Dataset.from_list(rows), make_tokenizer("<s> $A"))
    assert shown == (
        "row 0 (counted from 0), tokens: prompt 18, chosen 6, rejected 1\n"
        "  prompt    <s>Q: two\\n\n"
        "            lines\\t\\x1b[2J\n"
        "  chosen     yes\\n\n"
        "            </s>\n"
        "  rejected  </s>\n"
        "\n"
        "<dataset>: 1 of 1 pairs kept"
    )


def test_conversations_as_the_template_writes_them():
    rows = [
        {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], "rejected": other}
        for text, other in (
            ("yes\n", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]),
            ("one", [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "two"}]),
        )
    ]
    shown = preview_preferences(Dataset.from_list(rows), make_tokenizer(chat_template=TEMPLATE), 1)
    assert "  prompt    <s>[u]hi</s>\n  chosen    [a]yes\\n\n            </s>\n  rejected  [a]no</s>\n" in shown
    assert "one" not in shown


def test_what_is_cut_and_skipped_is_seen():
    rows = Dataset.from_list(
        [{"prompt": "abcdef", "chosen": "x", "rejected": "yz"}, {"prompt": "Q", "chosen": "", "rejected": "n"}]
    )
    options = {"max_length": 6, "truncation_mode": "keep_end", "on_bad_row": "skip"}
    shown = preview_preferences(rows, make_tokenizer(), 5, **options)
    assert "  prompt    def\n  chosen    x</s>\n  rejected  yz</s>" in shown
    assert "1 of 2 pairs kept, prompts cut to max_length, their beginning gone: 1" in shown
    assert "skipped 1: the chosen response is empty (row 1)" in shown


def test_token_ids_without_a_tokenizer():
    rows = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}])
    assert "  prompt    5 6\n  chosen    7\n  rejected  8 9\n" in preview_preferences(rows, None)


def test_options():
    rows = Dataset.from_list([{"prompt": "Q", "chosen": "y", "rejected": "n"}])
    with pytest.raises(ValueError, match="rows: expected 1 or more to show, got 0"):
        preview_preferences(rows, make_tokenizer(), 0)
    with pytest.raises(TypeError, match="dataset: expected a datasets.Dataset, got list"):
        preview_preferences(list(rows), make_tokenizer())
    assert "preview_preferences" in dpofast.__all__


def test_lists_columns_and_weights_are_shown():
    rows = [{"prompt": "Q:", "responses": ["a", "bb"], "scores": [1, 2.5], "weight": 1, "beta": 0.2}]
    rows[0] |= {"ref_responses_logps": [-1.0, -2.0], "responses_weights": [[1, 0], None]}
    shown = preview_preferences(Dataset.from_list(rows), make_tokenizer())
    assert shown == (
        "row 0 (counted from 0), tokens: prompt 2, [1] 3, [0] 2\n"
        "  weight 1, beta 0.2\n"
        "  prompt    Q:\n"
        "  [1]       (rank 0, score 2.5, reference -2) bb</s>\n"
        "  [0]       (rank 1, score 1, reference -1) a[weight 0: </s>]\n"
        "\n"
        "<dataset>: 1 of 1 lists kept"
    )
    pairs = preview_preferences(Dataset.from_list(rows), make_tokenizer(), list_pairs="all", min_score_gap=1)
    assert "  chosen    (reference -2) bb</s>\n  rejected  (reference -1) a[weight 0: </s>]\n" in pairs
    assert pairs.endswith("1 of 1 lists kept, as 1 pairs")


def test_what_is_not_trained_is_marked():
    turns = [
        {"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "b\n"), ("assistant", "c"))
    ]
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": turns, "rejected": turns[:1]}
    shown = preview_preferences(Dataset.from_list([row]), make_tokenizer(chat_template=TEMPLATE))
    assert "  chosen    [a]a</s>[weight 0: [u]b\\n\n            </s>][a]c</s>\n  rejected  [a]a</s>\n" in shown
    whole = preview_preferences(
        Dataset.from_list([row]), make_tokenizer(chat_template=TEMPLATE), assistant_only_loss=False
    )
    assert "weight" not in whole
    ids = {"prompt_ids": [5], "chosen_ids": [7, 8, 9], "rejected_ids": [8], "chosen_weights": [0.5, 0.5, 1]}
    assert "  chosen    [weight 0.5: 7 8] 9\n" in preview_preferences(Dataset.from_list([ids]), None)
