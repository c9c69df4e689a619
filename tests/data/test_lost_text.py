"""Rows whose text would be left out, displaced or written twice: mended where the right text is certain, else refused.

Expected texts are written out by hand; the tokenizer is bytes, so that decoding gives them back.
"""

import json
import warnings

import pyarrow as pa
import pytest
from datasets import Dataset

from dpofast.data.load import DataError, load_preferences, tokenize_preferences
from tests.support.byte_tokenizer import EOS, ids, make_tokenizer

# Content concatenated, as most templates do; tool calls and tools as JSON, where there are any.
CHAT = (
    "{% if tools %}T{{ tools | tojson }}|{% endif %}"
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# Writes content only.
PLAIN = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# Writes lists of parts only.
PARTS = (
    "{% for m in messages %}[{{ m.role[0] }}]{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
# As Mistral 7B v0.3: the system prompt stands in the last turn, where that is the user's.
LAST_TURN = (
    "{% for m in messages %}{% if m.role == 'user' %}[u]{% if loop.last and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}|{% elif m.role == 'assistant' %}{{ m.content }}|"
    "{% endif %}{% endfor %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TURNS = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"id": 17}}}
TOOLS = [{"name": "look", "parameters": {"id": {"type": "integer"}}}]


def texts(dataset, tokenizer):
    """Prompt, chosen and rejected of the first row, as text."""
    encoded, _ = tokenize_preferences(dataset, tokenizer)
    return tuple(tokenizer.decode(encoded[0][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def row_texts(row, template=CHAT, **options):
    return texts(Dataset.from_list([row]), make_tokenizer(chat_template=template, **options))


def refused(row, template=CHAT, **options):
    with pytest.raises(DataError) as caught:
        row_texts(row, template, **options)
    with pytest.raises(DataError, match="no row can be used"):
        tokenize_preferences(
            Dataset.from_list([row]), make_tokenizer(chat_template=template, **options), on_bad_row="skip"
        )
    return str(caught.value)


# ---- views of a dataset ---------------------------------------------------------------------------------------------


ROWS = Dataset.from_list([{"prompt": f"p{i}", "chosen": " y", "rejected": " n", "score": i} for i in range(5)])


def test_a_transform_is_trained_on():
    shown = ROWS.with_transform(lambda batch: {**batch, "prompt": [f"Q: {text} A:" for text in batch["prompt"]]})
    encoded, _ = tokenize_preferences(shown, make_tokenizer())
    assert [make_tokenizer().decode(row) for row in encoded["prompt_ids"]] == [row["prompt"] for row in shown]
    picked, _ = tokenize_preferences(shown.select([3, 1]), make_tokenizer())
    assert picked["prompt_ids"] == [ids("Q: p3 A:"), ids("Q: p1 A:")]


def test_a_transform_may_make_the_columns():
    raw = Dataset.from_list([{"q": "Q", "good": "y", "bad": "n"}])
    raw.set_transform(lambda batch: {"prompt": batch["q"], "chosen": batch["good"], "rejected": batch["bad"]})
    assert texts(raw, make_tokenizer()) == ("Q", "y</s>", "n</s>")


def test_a_transform_that_fails_is_named():
    with pytest.raises(DataError, match="the dataset's transform failed: KeyError: 'missing'"):
        tokenize_preferences(ROWS.with_transform(lambda batch: batch["missing"]), make_tokenizer())
    with pytest.raises(DataError, match="transform: expected 1 rows in every column"):
        tokenize_preferences(ROWS.with_transform(lambda batch: {"prompt": []}), make_tokenizer())


def test_a_formatter_that_is_not_datasets_own_is_refused():
    shown = ROWS.with_format(None)
    shown._format_type = "mine"  # as Dataset.set_format leaves it for a formatter that a library registered
    with pytest.raises(DataError, match="format 'mine' is not one of datasets' own"):
        tokenize_preferences(shown, make_tokenizer())


def test_a_transform_sees_no_columns_of_ours(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(TEXT) + "\n" + json.dumps(TEXT | {"chosen": ""}) + "\n")
    dataset = load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    seen = []

    def transform(batch):
        seen.append(sorted(batch))
        return {name: [value.upper() for value in values] for name, values in batch.items()}

    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: the chosen response is empty"):
        tokenize_preferences(dataset.with_transform(transform), make_tokenizer())
    assert seen[0] == ["chosen", "prompt", "rejected"]
    assert texts(dataset.select([0]).with_transform(transform), make_tokenizer())[0] == "WHO ARE YOU?"


def test_hidden_columns_are_not_read():
    rows = Dataset.from_list([{"prompt": "Hi", "chosen": "Hi y", "rejected": "Hi n"}])
    assert texts(rows.with_format("numpy", columns=["chosen", "rejected"]), make_tokenizer()) == (
        "Hi",
        " y</s>",
        " n</s>",
    )
    with pytest.raises(DataError, match="column 'rejected' is missing"):
        tokenize_preferences(rows.with_format(columns=["prompt", "chosen"]), make_tokenizer())
    everything = ROWS.with_format("numpy", columns=["prompt"], output_all_columns=True)
    assert texts(everything, make_tokenizer())[0] == "p0"


# ---- Arrow's nulls --------------------------------------------------------------------------------------------------


MIXED = [
    TURNS | {"tools": TOOLS, "chosen": [assistant("a", tool_calls=[CALL])]},
    TURNS
    | {
        "tools": [{"name": "find", "parameters": {"q": {"enum": ["x"]}}}],
        "chosen": [
            assistant("b", tool_calls=[{"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}])
        ],
    },
]


@pytest.mark.parametrize("kind", ["dataset", "parquet"])
def test_keys_that_arrow_adds_are_not_written(tmp_path, kind):
    """Parquet and Dataset give the text that JSON lines give, where every row has its own keys."""
    tokenizer = make_tokenizer(chat_template=CHAT)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MIXED))
    dataset = Dataset.from_list(MIXED)
    assert dataset[0]["tools"][0]["parameters"]["q"] is None, "Arrow adds the other row's keys"
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "rows.parquet")
        dataset = load_preferences(tmp_path / "rows.parquet", cache_dir=str(tmp_path / "cache"))
    found, _ = tokenize_preferences(dataset, tokenizer)
    lines = load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    expected, _ = tokenize_preferences(lines, tokenizer)
    assert "null" not in tokenizer.decode(found[0]["prompt_ids"] + found[0]["chosen_ids"])
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name] == expected[name]


def test_nulls_that_stand_in_json_lines_are_written(tmp_path):
    tools = [{"name": "look", "default": None}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(TURNS | {"tools": tools}) + "\n")
    dataset = load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    assert '"default": null' in texts(dataset, make_tokenizer(chat_template=CHAT))[0]


# ---- templates ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_written_differently_in_front_of_a_response_is_refused():
    row = TURNS | {"prompt": [{"role": "system", "content": "Be brief."}, user("Who?")]}
    message = refused(row, LAST_TURN)
    assert "leaves out the text of a turn of role 'system'" in message and "[u]Who?|yes|" in message
    assert row_texts(TURNS, LAST_TURN) == ("[u]hi|", "yes|", "no|")
    dated = "{% if add_generation_prompt %}12:01{% else %}12:02{% endif %} " + CHAT
    message = refused(TURNS, dated)
    assert "writes the prompt differently in front of a response: alone '12:01" in message and "'12:02 " in message


def test_a_generation_prompt_that_opens_reasoning_is_counted_and_said():
    template = CHAT.replace("[a]{% endif %}", "[a]<think>{% endif %}")
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.warns(UserWarning, match="1 prompts end in tokens .*'<think>'"):
        encoded, report = tokenize_preferences(Dataset.from_list([TURNS]), tokenizer)
    assert tokenizer.decode(encoded[0]["prompt_ids"]) == "[u]hi|[a]"
    assert report.shortened_prompts == 1 and "'<think>'" in report.summary()


def test_reasoning_that_a_template_takes_out_of_earlier_turns_is_no_loss():
    template = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    row = TURNS | {"prompt": [user("hi"), assistant("<think>hm</think>yo"), user("and?")]}
    assert row_texts(row, template)[0] == "[u]hi|[a]yo|[u]and?|[a]"


def test_tool_calls_are_written_or_refused():
    row = TURNS | {"chosen": [assistant("", tool_calls=[CALL])]}
    assert row_texts(row)[1] == json.dumps([CALL]) + "|"
    message = refused(row, PLAIN)
    assert "leaves out the tool calls of a turn of role 'assistant'" in message and "'[u]hi|[a]|'" in message
    old = {"function_call": {"name": "look", "arguments": "{}"}}
    assert "leaves out the function call" in refused(TURNS | {"chosen": [assistant("", **old)]})
    inside = TURNS | {"prompt": [user("hi"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "ok"}]}
    assert "leaves out the tool calls" in refused(inside, PLAIN)
    assert "leaves out `tools`" in refused(TURNS | {"tools": TOOLS}, PLAIN)
    assert "leaves out the reasoning_content" in refused(TURNS | {"chosen": [assistant("y", reasoning_content="so")]})


def test_a_role_that_the_template_does_not_write_is_refused():
    template = "{% for m in messages if m.role != 'system' %}" + CHAT.split("{% for m in messages %}")[1]
    row = TURNS | {"prompt": [{"role": "system", "content": "Be brief."}, user("hi")]}
    assert "leaves out the text of a turn of role 'system'" in refused(row, template)


@pytest.mark.parametrize("template", [CHAT, PLAIN])
def test_null_content_is_no_text(tmp_path, template):
    """OpenAI's form of a turn that only calls a tool."""
    call = {"tool_calls": [CALL]} if template is CHAT else {}
    row = TURNS | {"prompt": [user("hi"), assistant(None, **call), user("so")]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    for data in (
        Dataset.from_list([row]),
        load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache")),
    ):
        written = json.dumps([CALL]) if call else ""
        assert texts(data, make_tokenizer(chat_template=template))[0] == f"[u]hi|[a]{written}|[u]so|[a]"


@pytest.mark.parametrize("template", [CHAT, PLAIN, PARTS])
@pytest.mark.parametrize("form", ["text", "parts"])
def test_content_is_written_in_the_form_that_the_template_takes(template, form):
    def content(text):
        return text if form == "text" else [{"type": "text", "text": text}]

    row = {
        "prompt": [user(content("it's"))],
        "chosen": [assistant(content("yes"))],
        "rejected": [assistant(content("no"))],
    }
    assert row_texts(row, template) == ("[u]it's|[a]", "yes|", "no|")


@pytest.mark.parametrize(
    "part, problem",
    [
        ({"type": "image", "url": "x"}, "an image part holds the image itself: its key 'url'"),
        ({"type": "image"}, "another number of images than of image parts: 0 images for 1 parts"),
        ({"type": "audio", "audio": "x"}, "content holds a part that is neither text nor an image"),
    ],
)
def test_parts_that_are_no_text_are_refused(part, problem):
    row = TURNS | {"prompt": [user([part, {"type": "text", "text": "what?"}])]}
    assert problem in refused(row)


@pytest.mark.parametrize("content", [5, ["a", "b"], {"text": "a"}])
def test_content_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TURNS | {"chosen": [assistant(content)]}) + "\n")
    dataset = load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="line 1: content is neither text nor a list of parts"):
        tokenize_preferences(dataset, make_tokenizer(chat_template=CHAT))


def test_parts_without_a_type_are_text():
    assert row_texts(TURNS | {"chosen": [assistant([{"text": "yo"}])]})[1] == "yo|"


@pytest.mark.parametrize("error", ["1 / 0", "'x'.missing.more", "[1] | dictsort", "range(10**6) | list"])
def test_what_a_template_raises_is_the_rows_fault(error):
    template = "{% if messages[0].content == 'bad' %}{{ " + error + " }}{% endif %}" + CHAT
    rows = Dataset.from_list([TURNS, TURNS | {"prompt": [user("bad")]}])
    with pytest.raises(DataError, match="row 1 .*the chat template refused the conversation"):
        tokenize_preferences(rows, make_tokenizer(chat_template=template))
    _, report = tokenize_preferences(rows, make_tokenizer(chat_template=template), on_bad_row="skip")
    assert report.kept == 1


# ---- rows that mean something else than they are taken for ----------------------------------------------------------


TEXT = {"prompt": "Who are you?", "chosen": " Jack", "rejected": " nobody"}


@pytest.mark.parametrize("column", ["system", "question", "instruction", "input", "history", "System"])
def test_a_column_that_is_named_like_a_prompt_must_be_in_it(column):
    row = TEXT | {column: ["Be a pirate."] if column == "history" else "Be a pirate."}
    assert f"column '{column}' holds text that is not in the prompt" in refused(row)
    assert row_texts(TEXT | {column: "Who are you?"})[0] == "Who are you?"
    assert row_texts(TEXT | {column: None})[0] == "Who are you?"
    assert f"column '{column}'" in refused(TURNS | {column: "Be a pirate."})
    without = {name: value for name, value in row.items() if name != "prompt"}
    assert f"column '{column}'" in refused(without | {"chosen": "I am", "rejected": "I do"}, bos_token=None)


def test_a_conversation_in_another_column_is_a_prompt_where_there_is_none():
    row = {"messages": [user("Who are you?")], "chosen": "I am", "rejected": "I do"}
    assert "column 'messages' holds text that is not in the prompt" in refused(row)
    assert row_texts(TEXT | {"messages": [user("Who?"), assistant("more")]})[0] == "Who are you?"
    whole = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
    assert row_texts(whole | {"messages": whole["chosen"]}) == ("[u]hi|[a]", "yes|", "no|")


def test_such_a_column_of_json_lines_is_read_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(TEXT) + "\n" + json.dumps(TEXT | {"system": "Arr."}) + "\n")
    dataset = load_preferences(tmp_path / "rows.jsonl", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: column 'system' holds text"):
        tokenize_preferences(dataset, make_tokenizer())


def test_a_text_prompt_beside_conversations_must_repeat_their_beginning():
    conversations = {"chosen": [user("hello"), assistant("arr")], "rejected": [user("hello"), assistant("hi")]}
    assert row_texts(conversations | {"prompt": "hello"}) == ("[u]hello|[a]", "arr|", "hi|")
    assert row_texts(conversations | {"prompt": "Human: hello\n"})[0] == "[u]hello|[a]"
    assert "text that the conversations do not begin with" in refused(conversations | {"prompt": "Be a pirate."})


def test_a_prompt_that_the_responses_repeat_is_not_trained_twice():
    row = {"prompt": "Q: hello A:", "chosen": "Q: hello A: arr", "rejected": "Q: hello A: hi"}
    with pytest.raises(DataError, match="both responses repeat the prompt in 1 of 1 rows.*'Q: hello A: arr'"):
        row_texts(row)
    chance = [{"prompt": "Hi", "chosen": f"Hi {i}", "rejected": "Hi!"} for i in range(2)]
    rows = Dataset.from_list([*chance, TEXT, TEXT])
    assert texts(rows, make_tokenizer()) == ("Hi", "Hi 0</s>", "Hi!</s>"), "of few rows it is chance"
    turns = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
    assert row_texts(TURNS | turns) == ("[u]hi|[a]", "yes|", "no|")
    system = {"role": "system", "content": "S"}
    assert row_texts(TURNS | turns | {"prompt": [system, user("hi")]})[0] == "[s]S|[u]hi|[a]"
    assert row_texts(TURNS | turns | {"prompt": [system]})[0] == "[s]S|[u]hi|[a]", "the question is no response"
    other = {"rejected": [user("ho"), assistant("no")]}
    assert "begins with a turn of role 'user'" in refused(TURNS | turns | other | {"prompt": [system]})


def test_text_that_spells_a_conversation_is_refused():
    turns = [user("hi"), assistant("yes")]
    for spelled in (json.dumps(turns), str(turns)):
        assert "column 'chosen' is text that spells a conversation" in refused(TEXT | {"chosen": spelled})


def test_two_texts_without_a_common_beginning_need_a_prompt():
    message = refused({"chosen": "I am", "rejected": "We do"}, bos_token=None)
    assert "the prompt is empty: the two texts share no beginning: give the prompt in a column `prompt`" in message


# ---- BOS and EOS ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", ["<s> $A", "<s> $A </s>", None])
def test_special_tokens_stand_once(processor):
    tokenizer = make_tokenizer(processor)
    start = [0] if processor else []
    for chosen in ("y", "y</s>", "y</s>\n"):
        row = {"prompt": "Q", "chosen": chosen, "rejected": "n"}
        encoded, report = tokenize_preferences(Dataset.from_list([row]), tokenizer)
        assert (encoded[0]["prompt_ids"], encoded[0]["chosen_ids"]) == ([*start, *ids("Q")], [*ids("y"), EOS])
        assert report.shortened_prompts == 0
    encoded, _ = tokenize_preferences(Dataset.from_list([row | {"prompt": "<s>Q"}]), tokenizer)
    assert encoded[0]["prompt_ids"] == [0, *ids("Q")], "a prompt that was rendered with its BOS"


def test_a_response_does_not_begin_with_bos():
    message = refused({"prompt": "Q", "chosen": "<s>y", "rejected": "n"})
    assert "a response begins with BOS: '<s>y'" in message


def test_content_that_ends_with_eos_ends_once():
    template = CHAT.replace("|{% endfor %}", "</s>{% endfor %}")
    tokenizer = make_tokenizer(chat_template=template)
    encoded, _ = tokenize_preferences(Dataset.from_list([TURNS | {"chosen": [assistant("yes</s>")]}]), tokenizer)
    assert encoded[0]["chosen_ids"] == [*ids("yes"), EOS]


def test_nothing_is_said_about_rows_that_are_as_they_seem():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row_texts(TEXT) == ("Who are you?", " Jack</s>", " nobody</s>")
        assert row_texts(TURNS) == ("[u]hi|[a]", "yes|", "no|")


def test_tools_given_as_arrow_tables_are_clean():
    table = pa.Table.from_pylist([TURNS | {"tools": TOOLS}])
    prompt, *_ = texts(Dataset(table), make_tokenizer(chat_template=CHAT))
    assert prompt == f"T{json.dumps(TOOLS)}|[u]hi|[a]"
