"""Which tokens of a conversation are trained: pieces of text written out by hand, for real chat templates.

A piece is a run of tokens that count. Special tokens are one id each, all other characters are ids of their own.
"""

import json
from itertools import groupby

import pytest
from datasets import Dataset

from dpofast.data.load import DataError, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import make_tokenizer
from tests.support.chat_templates import CHATML, LLAMA3, PHI3, REASONING, SPECIAL_TOKENS, ZEPHYR, marked, plain


def tokenizer_of(template):
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content, **more):
    return turn("user", content, **more)


def assistant(content, **more):
    return turn("assistant", content, **more)


def row_of(*response, **more):
    return {"prompt": [user("Hi")], "chosen": list(response), "rejected": [assistant("Bad")], **more}


def encode(row, template, **options):
    (example,) = tokenize_preferences(Dataset.from_list([row]), tokenizer_of(template), **options)[0].to_list()
    return example


def pieces_of(ids, weights, template):
    assert len(weights) == len(ids) and set(weights) <= {0, 1}
    runs = groupby(zip(ids, weights, strict=True), key=lambda token: token[1])
    return [tokenizer_of(template).decode([token for token, _ in run]) for weight, run in runs if weight]


def trained(row, template, **options):
    """The pieces of the chosen response that are trained, or None where all of it is."""
    example = encode(row, template, **options)
    if example.get("chosen_weights") is None:
        return None
    return pieces_of(example["chosen_ids"], example["chosen_weights"], template)


THREE = (assistant("One"), user("Two?"), assistant(" Three "), user("Four?"), assistant("Five"))
# The newline behind a turn's end belongs to the turn, as behind a response's end; a marker that leaves it out holds.
EXPECTED = [
    (plain(CHATML), ["One<|im_end|>\n", " Three <|im_end|>\n", "Five<|im_end|>\n"]),
    (marked(CHATML), ["One<|im_end|>", " Three <|im_end|>", "Five<|im_end|>"]),
    (plain(LLAMA3), ["One<|eot_id|>", "Three<|eot_id|>", "Five<|eot_id|>"]),
    (marked(LLAMA3), ["One<|eot_id|>", "Three<|eot_id|>", "Five<|eot_id|>"]),
    (plain(ZEPHYR), ["One</s>\n", " Three </s>\n", "Five</s>\n"]),
    (marked(ZEPHYR), ["One</s>", " Three </s>", "Five</s>"]),
    (PHI3, ["One<|end|>\n", " Three <|end|>\n", "Five<|end|>\n</s>"]),
]
TEMPLATES = [template for template, _ in EXPECTED]


@pytest.mark.parametrize(("template", "expected"), EXPECTED)
def test_only_the_assistants_turns_are_trained(template, expected):
    assert trained(row_of(*THREE), template) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_assistant_only_loss_all_turns_are(template):
    assert trained(row_of(*THREE), template, assistant_only_loss=False) is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_response_of_one_turn_is_trained_whole(template):
    example = encode(row_of(assistant("One")), template)
    assert "chosen_weights" not in example and "rejected_weights" not in example
    assert encode(row_of(assistant("One", train=True)), template) == example


def test_the_other_response_keeps_null():
    assert encode(row_of(*THREE), plain(CHATML))["rejected_weights"] is None


@pytest.mark.parametrize(("template", "expected"), EXPECTED)
def test_flags_choose_among_the_assistants_turns(template, expected):
    turns = [{**each, "train": index != 2} if index in (0, 2) else each for index, each in enumerate(THREE)]
    assert trained(row_of(*turns), template) == [expected[0], expected[2]]


def test_flags_are_stronger_than_roles():
    turns = [assistant("One"), user("Two?", train=True), assistant("Three", train=False)]
    whole = "One<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    assert trained(row_of(*turns), plain(CHATML)) == [whole]
    # Markers say nothing of a user's turn: it counts from the end of the turn in front of it.
    assert trained(row_of(*turns), marked(CHATML)) == ["One<|im_end|>", "<|im_start|>user\nTwo?<|im_end|>\n"]
    assert trained(row_of(*turns), plain(CHATML), assistant_only_loss=False) == [whole]


def test_several_turns_of_the_assistant_alone_are_trained_whole():
    turns = [assistant("One"), assistant("Two")]
    assert trained(row_of(*turns), plain(CHATML)) is None
    turns[0]["train"] = False
    assert trained(row_of(*turns), plain(CHATML)) == ["Two<|im_end|>\n"]


def test_tool_calls_count_and_their_results_do_not():
    call = {"type": "function", "function": {"name": "look", "arguments": {"id": 7}}}
    turns = [assistant("", tool_calls=[call]), turn("tool", "a"), turn("tool", "b"), assistant("Done")]
    called = '<tool_call>look({"id": 7})</tool_call><|im_end|>'
    assert trained(row_of(*turns), plain(CHATML)) == [called + "\n", "Done<|im_end|>\n"]
    assert trained(row_of(*turns), marked(CHATML)) == [called, "Done<|im_end|>"]


def test_reasoning_that_earlier_turns_lose():
    """What stands behind the last question keeps its reasoning, so that no rendering is the beginning of the next."""
    turns = [assistant("One", reasoning_content="hm"), user("Two?"), assistant("Three", reasoning_content="so")]
    assert trained(row_of(*turns), REASONING) == ["One<|im_end|>\n", "<think>so</think>Three<|im_end|>\n"]
    call = {"type": "function", "function": {"name": "look"}}
    turns[0] = assistant("", reasoning_content="hm", tool_calls=[call])
    assert trained(row_of(*turns), REASONING) == [
        "<call>look</call><|im_end|>\n",
        "<think>so</think>Three<|im_end|>\n",
    ]


def test_content_of_parts():
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    template = REASONING.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    turns = [assistant(parts("O", "ne"), reasoning_content="hm"), user(parts("Two?")), assistant(parts("Three"))]
    row = {"prompt": [user(parts("Hi"))], "chosen": turns, "rejected": [assistant(parts("Bad"))]}
    assert trained(row, template) == ["One<|im_end|>\n", "<think></think>Three<|im_end|>\n"]


def test_flags_of_whole_conversations_without_a_prompt_column():
    start = [user("Hi", train=False), assistant("Hello", train=True), user("Name a prime.")]
    row = {
        "chosen": [*start, assistant("Nine", train=False), user("Sure?"), assistant("Seven")],
        "rejected": [*start, assistant("Nine.")],
    }
    assert trained(row, plain(CHATML)) == ["Seven<|im_end|>\n"]


def test_a_list_of_conversations_has_weights_for_every_response():
    row = {
        "prompt": [user("Hi")],
        "responses": [[assistant("Bad")], [assistant("One"), user("Two?"), assistant("Three")]],
        "ranks": [2, 1],
    }
    example = encode(row, plain(CHATML))
    best, worst = (
        pieces_of(ids, weights, plain(CHATML))
        for ids, weights in zip(example["responses_ids"], example["responses_weights"], strict=True)
    )
    assert (best, worst) == (["One<|im_end|>\n", "Three<|im_end|>\n"], ["Bad<|im_end|>\n"])


def test_flags_from_json_lines(tmp_path):
    file = tmp_path / "data.jsonl"
    turns = [assistant("One", train=False), user("Two?"), assistant("Three", train=None)]
    file.write_text(json.dumps(row_of(*turns)) + "\n")
    example = tokenize_preferences(load_preferences(file), tokenizer_of(plain(CHATML)))[0][0]
    assert pieces_of(example["chosen_ids"], example["chosen_weights"], plain(CHATML)) == ["Three<|im_end|>\n"]


def test_weights_are_cut_along():
    row = row_of(*THREE)
    whole = encode(row, plain(CHATML))
    length = len(whole["prompt_ids"]) + 8  # One<|im_end|>\n are 5 tokens
    cut = encode(row, plain(CHATML), max_length=length)
    assert cut["chosen_ids"] == whole["chosen_ids"][:8]
    assert cut["chosen_weights"] == [1.0] * 5 + [0.0] * 3


def test_given_weights_take_the_place_of_roles():
    length = len(encode(row_of(*THREE), plain(CHATML))["chosen_ids"])
    row = row_of(*THREE, chosen_weights=[0.5] * length, rejected_weights=None)
    assert encode(row, plain(CHATML))["chosen_weights"] == [0.5] * length


# A template whose last answer ends in another way than the others, as that of gpt-oss.
ENDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{{ '<return>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSED = [
    (row_of(assistant("One", train=False)), CHATML, "no turn of a response is trained: the chosen response: .*use a "),
    (row_of(turn("narrator", "a"), turn("tool", "b")), CHATML, "no turn of a response is trained: .*assistant_only_l"),
    (row_of(assistant("One", train="no")), CHATML, "a turn's `train` is neither true nor false: turn 0 holds str 'no'"),
    (row_of(assistant("One", train=1)), CHATML, "a turn's `train` is neither true nor false: turn 0 holds int 1"),
    (
        {**row_of(assistant("One")), "prompt": [user("Hi", train=0)]},
        CHATML,
        "a turn's `train` is neither true nor false: turn 0 holds int 0",
    ),
    (row_of(*THREE), ENDS, "the tokens of a turn are not found: the chosen response, turn 0: .*generation .*chosen_we"),
    (
        row_of(assistant("One", train=True), chosen_weights=[1.0] * 5),
        CHATML,
        "the chosen response has `train` flags and token weights: leave one of them out",
    ),
    (
        row_of(*THREE),
        "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
        "no token of a response is trained: the chosen response: the turns that count are empty, or unmarked",
    ),
    (
        {**row_of(*THREE), "prompt": [user("Hi"), assistant("Hello"), user("Name a prime.")]},
        "{% for m in messages %}[{{ m.role[0] }}]{% if loop.index0 == 1 %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "no token of a response is trained: the chosen response: the turns that count are empty, or unmarked",
    ),
]


@pytest.mark.parametrize(("row", "template", "reason"), REFUSED)
def test_refused(row, template, reason):
    with pytest.raises(DataError, match=rf"(?s)^<dataset>, row 0 \(counted from 0\): {reason}"):
        encode(row, plain(template))
    with pytest.raises(DataError, match="no row can be used"):
        encode(row, plain(template), on_bad_row="skip")


def test_what_a_template_ends_in_another_way_can_be_trained_whole():
    assert trained(row_of(*THREE), ENDS, assistant_only_loss=False) is None


def test_cut_to_nothing_that_counts():
    turns = [assistant("One", train=False), user("Two?"), assistant("Three")]
    length = len(encode(row_of(*turns), plain(CHATML))["prompt_ids"]) + 8
    with pytest.raises(DataError, match=f"the chosen response has no token that counts within max_length={length}"):
        encode(row_of(*turns), plain(CHATML), max_length=length)


def test_a_tokenizer_without_offsets_is_never_skipped(monkeypatch):
    tokenizer = tokenizer_of(plain(CHATML))
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="the tokens of a turn are not known: the tokenizer has no offsets; say which"):
        tokenize_preferences(Dataset.from_list([row_of(*THREE)]), tokenizer, on_bad_row="skip")
