"""Conversation: turns -> text by the tokenizer's chat template, refused where the template loses or displaces text.

Templates are programs, and many of them leave out what they do not know: tool calls, a system prompt, parts of content.
What they leave out is checked by what they write: a turn whose text is not in the rendering is rendered once more with
other text, and was left out if that changes nothing. A turn's content may be given as null, text or a list of text
parts; a template that cannot write the form that is given gets another form of the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpofast.data.formats import BadRow, excerpt
from dpofast.data.images.turns import is_image

Turn = Mapping[str, Any]
Turns = list[Any]

# What a response's last turn may say beside its content.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tool_calls", "function_call")
_SAYING = ("content", *_CALLS, *_REASONING)


class Rendered(NamedTuple):
    """A prompt and its responses as the template writes them.

    Attributes:
        alone: text of the prompt, ready for a response.
        whole: text of the prompt with each response.
        ids: token ids of `alone` and of every text of `whole`.
        prompt, responses: the turns in the form that the template was given.
    """

    alone: str
    whole: tuple[str, ...]
    ids: list[list[int]]
    prompt: Turns
    responses: list[Turns]


def says_something(response: Turns) -> bool:
    """Whether any turn has content, tool calls or reasoning."""
    return any(
        "".join(_texts(turn)) if key == "content" else turn[key] for turn in response for key in turn if key in _SAYING
    )


class Template:
    """A tokenizer's chat template with one row's tools and variables.

    Args:
        tokenizer: whose template it is.
        tools: the row's tools, or None.
        variables: the row's chat_template_kwargs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Any, variables: Mapping[str, Any]) -> None:
        """Render nothing yet."""
        self._tokenizer = tokenizer
        self._tools = tools
        self._variables = variables

    @property
    def source(self) -> str:
        """The template itself."""
        return str(self._tokenizer.get_chat_template(tools=self._tools))

    @property
    def eos_token(self) -> str | None:
        """The tokenizer's."""
        return self._tokenizer.eos_token

    def render(self, prompt: Turns, responses: Sequence[Turns], names: Sequence[str]) -> Rendered:
        """Render the prompt, and the prompt with each response; `names` are the responses' in messages.

        Raises:
            BadRow: the template refuses the row, leaves text of it out, or writes the prompt differently in front of a
                response.
        """
        for turn in (turn for part in (prompt, *responses) for turn in part):
            _texts(turn)  # refuses what is no text
        reason: BadRow | None = None
        is_null = any(turn.get("content") is None for part in (prompt, *responses) for turn in part)
        tried: list[Any] = []
        for form in (_as_given, _as_text, _as_parts):
            turns = [[form(turn) for turn in part] for part in (prompt, *responses)]
            if turns in tried:
                continue
            tried.append(turns)
            try:
                return self._rendered(turns[0], turns[1:], names)
            except BadRow as problem:
                if problem.fatal:
                    raise
                # What the data's own form meets; of null content, which many templates cannot write, what text meets.
                if reason is None or (is_null and form is _as_text):
                    reason = problem
        assert reason is not None
        raise reason

    def _rendered(self, prompt: Turns, responses: list[Turns], names: Sequence[str]) -> Rendered:
        alone = self._text(prompt, generation=True)
        whole = tuple(self._text(prompt + response) for response in responses)
        self._check_written(prompt, alone, len(prompt), lambda turns: self.text_or_none(turns, generation=True))
        for response, text in zip(responses, whole, strict=True):
            self._check_written(prompt + response, text, len(prompt), self.text_or_none)
        if self._tools and alone == self.text_or_none(prompt, generation=True, tools=None):
            raise BadRow(
                "the chat template leaves out `tools`",
                f"the prompt is {excerpt(alone, 0, 200)} with and without them: use a template that writes them, or "
                "remove the column",
            )
        self._check_prompt(prompt, alone, whole, names)
        ids = [self._ids(prompt, alone, generation=True)]
        ids += [self._ids(prompt + each, text) for each, text in zip(responses, whole, strict=True)]
        return Rendered(alone, whole, ids, prompt, responses)

    # ---- the tokenizer ----------------------------------------------------------------------------------------------

    def _apply(self, turns: Turns, *, generation: bool, tools: Any, tokenize: bool) -> Any:
        options = {"tools": tools, **self._variables, "tokenize": tokenize, "return_dict": True}
        if generation:  # given by the variables it would be given twice, which is a TypeError
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        return self._tokenizer.apply_chat_template(turns, **options)

    def _text(self, turns: Turns, *, generation: bool = False, tools: Any = ...) -> str:
        tools = self._tools if tools is ... else tools
        try:
            return self._apply(turns, generation=generation, tools=tools, tokenize=False)
        # What a template raises itself, and what its expressions and filters raise on values that it did not expect.
        except Exception as error:
            if not getattr(self._tokenizer, "chat_template", None):
                detail = "conversations are written by it; set it"
                raise BadRow("the tokenizer has no chat_template", detail, fatal=True) from None
            detail = str(error) or type(error).__name__
            raise BadRow("the chat template refused the conversation", detail) from None

    def text_or_none(self, turns: Turns, *, generation: bool = False, tools: Any = ...) -> str | None:
        """The text of turns, with the generation prompt behind them or not; None where the template refuses them."""
        try:
            return self._text(turns, generation=generation, tools=tools)
        except BadRow:
            return None

    def _ids(self, turns: Turns, text: str, *, generation: bool = False) -> list[int]:
        if self._writes_text:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self._apply(turns, generation=generation, tools=self._tools, tokenize=True)["input_ids"]
        eos = self._tokenizer.eos_token
        # Content that ends with EOS, after which the template writes another.
        last = _texts(turns[-1])[-1:] if not generation else []
        if eos and last and last[0].rstrip().endswith(eos) and ids[-2:] == [self._tokenizer.eos_token_id] * 2:
            ids = ids[:-1]
        return ids

    @property
    def _writes_text(self) -> bool:
        """Whether the template writes text that is tokenized, as it does in all of transformers' own tokenizers."""
        return type(self._tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    def offsets(self, text: str, count: int) -> list[tuple[int, int]] | None:
        """Return the characters from start to stop of the first `count` tokens; None where the tokenizer has none."""
        if not (self._writes_text and self._tokenizer.is_fast):
            return None
        return self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][:count]

    def assistant_mask(self, turns: Turns, count: int) -> list[int]:
        """Return the mask of the first `count` tokens that a template's generation markers give."""
        options = {"tools": self._tools, **self._variables, "return_assistant_tokens_mask": True}
        return self._tokenizer.apply_chat_template(turns, return_dict=True, **options)["assistant_masks"][:count]

    # ---- what was written -------------------------------------------------------------------------------------------

    def _check_written(self, turns: Turns, text: str, prompt: int, again: Callable[[Turns], str | None]) -> None:
        """Raise BadRow where the text lacks a turn's content, tool calls or, of the last turn, reasoning."""
        for index, turn in enumerate(turns):

            def unchanged(other: Turn, index: int = index) -> bool:
                return again([*turns[:index], other, *turns[index + 1 :]]) == text

            content, texts = turn.get("content"), _texts(turn)
            if content is None and "None" in text:
                other = again([*turns[:index], {**turn, "content": ""}, *turns[index + 1 :]])
                if other is not None and other.count("None") < text.count("None"):
                    raise BadRow("the chat template writes None for content that is null", excerpt(text, 0, 200))
            if isinstance(content, list) and any(spelled in text for spelled in _spellings(content)):
                raise BadRow("the chat template writes a list of parts as Python spells it", excerpt(text, 0, 200))
            is_context = index < prompt and turn["role"] == "assistant" and turn.get("tool_calls")
            if not is_context and any(t.strip() not in text for t in texts) and unchanged(_altered(turn)):
                raise _left_out(turn, index, "text", "".join(texts), text)
            for key in _CALLS:
                if turn.get(key) and unchanged({name: value for name, value in turn.items() if name != key}):
                    raise _left_out(turn, index, key.replace("_", " "), str(turn[key]), text)
        last = turns[-1]
        for key in _REASONING if len(turns) > prompt else ():
            if isinstance(last.get(key), str) and last[key].strip() not in text:
                raise _left_out(last, len(turns) - 1, key, last[key], text)

    def _check_prompt(self, prompt: Turns, alone: str, whole: Sequence[str], names: Sequence[str]) -> None:
        """Raise BadRow where the prompt's turns are written differently in front of a response.

        The generation prompt behind them may differ (an opened <think>): what is left out of it is counted and shown.
        """
        for name, text in zip(names, whole, strict=True):
            if text.startswith(alone):
                continue
            shared = len(commonprefix([alone, text]))
            turns = self.text_or_none(prompt)
            whole_turns = len(alone) if turns is None else len(commonprefix([alone, turns]))
            pieces = [piece.strip() for turn in prompt for piece in _texts(turn)]
            if shared < whole_turns or any(piece in alone and piece not in alone[:shared] for piece in pieces):
                start = max(0, shared - 40)
                raise BadRow(
                    "the chat template writes the prompt differently in front of a response",
                    f"alone {excerpt(alone, start, 160)}, in front of {name} "
                    f"{excerpt(text, start, 160)}; the prompt's text would be trained as the response's: use a "
                    "template that writes both alike, or give prompt, chosen and rejected as text",
                )


def _left_out(turn: Turn, index: int, what: str, value: str, text: str) -> BadRow:
    return BadRow(
        f"the chat template leaves out the {what} of a turn of role {str(turn['role'])[:30]!r}",
        f"turn {index} holds {excerpt(value, 0, 100)}, and all of it is written as {excerpt(text, 0, 300)}: use a "
        "template that writes it, or put it into the content of a turn that is written",
    )


def _texts(turn: Turn) -> list[str]:
    """The texts of a turn's content that are not blank. Raises BadRow for what is no text."""
    content = turn.get("content")
    if content is None:
        found = []
    elif isinstance(content, str):
        found = [content]
    elif isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        parts = [part for part in content if not is_image(part)]
        other = next((part for part in parts if not isinstance(part.get("text"), str)), None)
        if other is not None:
            raise BadRow(
                "content holds a part that is neither text nor an image",
                f'expected {{"type": "text", "text": ...}} or {{"type": "image"}}, got type {other.get("type")!r}',
            )
        found = [part["text"] for part in parts]
    else:
        raise BadRow(
            "content is neither text nor a list of parts",
            f'expected a string, null or a list of {{"type": "text", "text": ...}}, got {excerpt(str(content), 0, 60)}',
        )
    return [text for text in found if text.strip()]


def _spellings(content: list[Any]) -> list[str]:
    """How Python and JSON begin to spell a list of parts, where a template does not walk through it."""
    part = next(iter(content), None)
    if not isinstance(part, Mapping) or not part:
        return []
    names = list(part)
    return [f"[{{'{names[0]}': ", f'[{{"{names[0]}": ']


def _as_given(turn: Turn) -> Turn:
    return {**turn, "content": turn.get("content")}


def _as_text(turn: Turn) -> Turn:
    content = turn.get("content")
    if content is None or (isinstance(content, list) and all(isinstance(part, Mapping) for part in content)):
        if any(map(is_image, content or [])):  # which text cannot hold
            return turn
        return {**turn, "content": "".join(_all_texts(content or []))}
    return turn


def _as_parts(turn: Turn) -> Turn:
    content = turn.get("content")
    if content is None or isinstance(content, str):
        return {**turn, "content": [{"type": "text", "text": content}] if content else []}
    return turn


def _all_texts(content: list[Any]) -> list[str]:
    return [str(part.get("text", "")) for part in content]


def _altered(turn: Turn) -> Turn:
    content = turn["content"]
    if isinstance(content, str):
        return {**turn, "content": content + " #"}
    return {**turn, "content": [part if is_image(part) else {**part, "text": part["text"] + " #"} for part in content]}
