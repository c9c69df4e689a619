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
