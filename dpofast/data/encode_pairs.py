"""PairEncoder: one preference row -> token ids of the shared prompt and of each response.

    text            tokens(prompt), tokens(prompt + response + EOS)
    conversations   tokens(template(prompt)), tokens(template(prompt + response)); the template writes the end
    token ids       as given

The ids equal those of trl 1.16, except where those double text: a BOS or EOS that stands in the text and is added too,
a prompt's turns that both responses repeat. The prompt is the token-level common prefix of the tokenized prompt and of
both tokenized prompt + response sequences, so that its forward pass can be shared by both responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpofast.data import formats
from dpofast.data.formats import ID_COLUMNS, BadRow, excerpt
from dpofast.data.render import Template, says_something

TRUNCATION_MODES = ("keep_start", "keep_end")
# Roles whose turns are never a response's: standing at its start, they are a part of the prompt.
_ASKING = ("user", "system", "human", "developer")


class EncodedPair(NamedTuple):
    """Token ids of a pair.

    Attributes:
        prompt, chosen, rejected: the ids.
        truncated: responses that were cut at their end, 0 to 2.
        cut_prompt: 1 where the prompt was cut at its start, else 0.
        dropped: the text at the prompt's end that a response displaces, or None.
        repeated: where both text responses begin with the prompt, what they and it say; else None.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    truncated: int
    cut_prompt: int
    dropped: str | None
    repeated: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Encodes rows that have the given columns.

    Attributes:
        tokenizer: or None, for token ids.
        columns: as formats.used_columns returns them.
        max_length, truncation_mode, vocab_size: as in tokenize_preferences.
    """

    tokenizer: PreTrainedTokenizerBase | None
    columns: tuple[str, ...]
    max_length: int | None
    truncation_mode: str
    vocab_size: int | None

    def encode(self, row: Mapping[str, Any]) -> EncodedPair:
        """Return the pair. Raises BadRow."""
        kinds = formats.row_kinds(row, self.columns)
        dropped = repeated = None
        if "prompt_ids" in kinds:
            prompt, chosen, rejected = (formats.token_ids(column, row[column]) for column in ID_COLUMNS)
        else:
            alone, *whole = self._tokenize(row, kinds)
            if kinds.get("prompt") == kinds["chosen"] == "text":
                repeated = _repetition(row["prompt"], row["chosen"], row["rejected"])
            start = min(_shared(alone, ids) for ids in whole)
            if start < len(alone):
                assert self.tokenizer is not None
                dropped = self.tokenizer.decode(alone[start:])
            prompt, (chosen, rejected) = alone[:start], (ids[start:] for ids in whole)
        if not prompt:
            raise BadRow("the prompt is empty", "a response's first token is predicted from it: begin with a BOS token")
        for name, ids in (("chosen", chosen), ("rejected", rejected)):
            if not ids:
                raise BadRow(f"the {name} response is empty")
        if chosen == rejected:
            raise BadRow("chosen and rejected are equal")
        largest = max(map(max, (prompt, chosen, rejected)))
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise BadRow(f"a token id is outside the vocabulary of {self.vocab_size}", f"got {largest}")
        return self._cut(prompt, chosen, rejected)._replace(dropped=dropped, repeated=repeated)

    def _cut(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> EncodedPair:
        """Cut to max_length: the ends of the responses, or with keep_end the start of the prompt that both share."""
        if self.max_length is None:
            return EncodedPair(prompt, chosen, rejected, 0, 0, None)
        if self.truncation_mode == "keep_end":
            longest = max(len(chosen), len(rejected))
            room = self.max_length - longest
            if room <= 0:
                raise BadRow(
                    f"a response fills max_length={self.max_length}",
                    f"its {longest} tokens leave none for the prompt; raise max_length or use keep_start",
                )
            return EncodedPair(prompt[-room:], chosen, rejected, 0, int(room < len(prompt)), None)
        room = self.max_length - len(prompt)
        if room <= 0:
            raise BadRow(
                f"the prompt fills max_length={self.max_length}",
                f"its {len(prompt)} tokens leave none for a response; raise max_length or shorten the prompt",
            )
        truncated = (len(chosen) > room) + (len(rejected) > room)
        chosen, rejected = chosen[:room], rejected[:room]
        if chosen == rejected:
            raise BadRow(f"chosen and rejected are equal within max_length={self.max_length}")
        return EncodedPair(prompt, chosen, rejected, truncated, 0, None)

    def _tokenize(self, row: Mapping[str, Any], kinds: Mapping[str, str]) -> list[list[int]]:
        """Token ids of the prompt alone, and with each response."""
        if self.tokenizer is None:
            raise BadRow("text cannot be used without a tokenizer", "tokenizer is None", fatal=True)
        is_text = kinds["chosen"] == "text"
        chosen, rejected = row["chosen"], row["rejected"]
        if kinds.get("prompt") == kinds["chosen"]:
            parts = _prompt_once(row["prompt"], chosen, rejected)
        else:
            parts = formats.split_prompt(chosen, rejected)
            if not parts[0]:
                self._check_context(row, "")
                what = "texts share no beginning" if is_text else "conversations share no first turn"
                if not is_text or not self.tokenizer("")["input_ids"]:
                    raise BadRow("the prompt is empty", f"the two {what}: give the prompt in a column `prompt`")
        prompt, *responses = parts
        for name, response in zip(("chosen", "rejected"), responses, strict=True):
            if not (response if is_text else says_something(response)):
                raise BadRow(f"the {name} response is empty")
        if is_text:
            self._check_context(row, prompt)
            return _text_ids(self.tokenizer, prompt, responses)
        if not prompt:
            raise BadRow("the prompt is empty", "a conversation needs a turn in front of the response")
        words = "\n".join(formats.strings([turn.get("content") for turn in prompt]))
        self._check_context(row, words)
        if kinds.get("prompt") == "text":
            _check_beside(row["prompt"], prompt)
        tools = formats.template_value("tools", row.get("tools"))
        template = Template(self.tokenizer, tools, row.get("chat_template_kwargs") or {})
        return template.render(prompt, responses).ids

    def _check_context(self, row: Mapping[str, Any], prompt: str) -> None:
        for column in filter(formats.is_context, self.columns):
            formats.check_context(column, row.get(column), prompt, [row["chosen"], row["rejected"]])


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Length of the common prefix."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next(i for i in range(len(ids)) if i >= len(others) or ids[i] != others[i])


def _text_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, each with one BOS and one EOS where the tokenizer adds, or the text holds, its own."""
    eos = tokenizer.eos_token
    if not eos:
        raise BadRow("the tokenizer has no eos_token", "text responses end with it; set it", fatal=True)
    texts, bos = [prompt], tokenizer.bos_token
    for response in responses:
        if prompt and bos and bos != eos and response.lstrip().startswith(bos):
            raise BadRow("a response begins with BOS", f"{excerpt(response, 0, 60)}: only a prompt does; take it out")
        # A response may end with EOS itself, and a line end after it.
        ends = response.rstrip().endswith(eos)
        texts.append(prompt + (response.rstrip() if ends else response + eos))
    # One text per call: a batched call was no faster, since the tokenizer's own work dominates.
    found = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        written = 0  # times that EOS stands at the text's end
        while text.endswith(eos * (written + 1)):
            written += 1
        if ids[-written - 1 :] == [tokenizer.eos_token_id] * (written + 1):  # the tokenizer adds one more
            ids = ids[:-1]
        found.append(ids)
    return found


def _prompt_once(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return prompt and responses with the prompt written once, and with turns that ask moved from responses to it.

    Raises:
        BadRow: the responses begin with different questions.
    """
    if isinstance(prompt, str):
        return prompt, chosen, rejected
    repeated = next(
        (k for k in range(len(prompt), 0, -1) if prompt[-k:] == chosen[:k] == rejected[:k]),
        0,
    )
    chosen, rejected = chosen[repeated:], rejected[repeated:]
    while chosen and rejected and chosen[0] == rejected[0] and chosen[0]["role"] in _ASKING:
        prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if response and response[0]["role"] in _ASKING:
            raise BadRow(
                f"the {name} response begins with a turn of role {response[0]['role']!r}",
                f"{excerpt(str(response[0].get('content')), 0, 80)} would be trained on as the model's words, and the "
                "other response has another: pairs share their prompt",
            )
    return prompt, chosen, rejected


def _repetition(prompt: str, chosen: str, rejected: str) -> str | None:
    """Quote the texts where both responses begin with the prompt, which in one row may be chance."""
    start = prompt.strip()
    if not start or not all(text.lstrip().startswith(start) for text in (chosen, rejected)):
        return None
    return f"prompt {excerpt(prompt, 0, 80)}, chosen {excerpt(chosen, 0, 80)}, rejected {excerpt(rejected, 0, 80)}"


def _check_beside(text: str, prompt: list[Any]) -> None:
    """Raise BadRow unless a text prompt beside conversations repeats a turn, or all turns, of their prompt."""
    contents = [" ".join(formats.strings(turn.get("content"))).strip() for turn in prompt]
    if text.strip() not in contents and not all(content in text for content in contents):
        raise BadRow(
            "column 'prompt' is text that the conversations do not begin with",
            f"{excerpt(text, 0, 80)}, and they begin with {excerpt(contents[0], 0, 80)}: write it as a first turn "
            "(role system) of chosen and rejected, or remove the column",
        )
