"""RowEncoder: one preference row -> token ids of the shared prompt and of each response, and the tokens' weights.

    text            tokens(prompt), tokens(prompt + response + EOS)
    conversations   tokens(template(prompt)), tokens(template(prompt + response)); the template writes the end
    token ids       as given

The ids equal those of trl 1.16, except where those double text: a BOS or EOS that stands in the text and is added too,
a prompt's turns that all responses repeat. The prompt is the token-level common prefix of the tokenized prompt and of
all tokenized prompt + response sequences, so that its forward pass can be shared by the responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpofast.data import columns, formats
from dpofast.data.chat.render import Template, says_something
from dpofast.data.chat.train_tokens import TurnFlags, token_mask, without_flags
from dpofast.data.formats import (
    ID_COLUMNS,
    LIST_ID_COLUMNS,
    LIST_REF_COLUMN,
    LIST_TEXT_COLUMN,
    LIST_WEIGHT_COLUMN,
    PAIR_TEXT_COLUMNS,
    RANK_COLUMN,
    SCORE_COLUMN,
    WEIGHT_COLUMNS,
    BadRow,
    excerpt,
)
from dpofast.data.images.columns import IMAGES
from dpofast.data.images.prompt_images import PromptImages
from dpofast.data.images.turns import check_no_image, with_image_parts
from dpofast.data.lists import Ranking, ranking

TRUNCATION_MODES = ("keep_start", "keep_end")
# Roles whose turns are never a response's: standing at its start, they are a part of the prompt.
_ASKING = ("user", "system", "human", "developer")

Weights = list[float] | None


class EncodedRow(NamedTuple):
    """Token ids of a pair or a list.

    Attributes:
        prompt: the ids of the prompt.
        responses: those of each response: chosen and rejected, or a list's from best to worst.
        weights: of each response's tokens; None: all count 1.
        ranking: of a list; None of a pair.
        truncated: responses that were cut at their end.
        cut_prompt: 1 where the prompt was cut at its start, else 0.
        dropped: the text at the prompt's end that a response displaces, or None.
        repeated: where all text responses begin with the prompt, what they and it say; else None.
        media: the prompt's images as the model takes them, a PromptMedia, or None without images.
    """

    prompt: list[int]
    responses: list[list[int]]
    weights: list[Weights]
    ranking: Ranking | None = None
    truncated: int = 0
    cut_prompt: int = 0
    dropped: str | None = None
    repeated: str | None = None
    media: Any = None


class _Names(NamedTuple):
    """How messages name a row's responses: `of(k)` one of them, `any_of(k)` any, for the reason that rows share."""

    is_list: bool

    def of(self, place: int) -> str:
        return f"response {place} (counted from 0)" if self.is_list else f"the {PAIR_TEXT_COLUMNS[place]} response"

    def bad(self, place: int, problem: str, detail: str = "") -> BadRow:
        """The BadRow of a response."""
        if not self.is_list:
            return BadRow(f"{self.of(place)} {problem}", detail)
        return BadRow(f"a response {problem}", self.of(place) + (f": {detail}" if detail else ""))

    def equal(self, one: int, other: int, within: str) -> BadRow:
        """The BadRow of two responses that are equal and should differ."""
        if not self.is_list:
            return BadRow(f"chosen and rejected are equal{within}")
        detail = f"responses {one} and {other} (counted from 0): one of equal answers cannot be better"
        return BadRow(f"equal responses have different ranks or scores{within}", detail)


@dataclass(frozen=True, kw_only=True)
class RowEncoder:
    """Encodes rows that have the given columns.

    Attributes:
        tokenizer: or None, for token ids.
        columns: as formats.used_columns returns them.
        max_length, truncation_mode, assistant_only_loss, vocab_size, images: as in tokenize_preferences.
    """

    tokenizer: PreTrainedTokenizerBase | None
    columns: tuple[str, ...]
    max_length: int | None
    truncation_mode: str
    assistant_only_loss: bool
    vocab_size: int | None
    images: PromptImages | None = None

    @property
    def is_list(self) -> bool:
        """Whether rows are lists."""
        return formats.holds_list(self.columns)

    def encode(self, row: Mapping[str, Any]) -> EncodedRow:
        """Return the pair or list. Raises BadRow."""
        kinds = columns.row_kinds(row, self.columns)
        if self.images is None and _images(row):
            raise BadRow(
                "images cannot be used without a processor",
                "train a vision-language model with its processor, or remove the column to train on the text alone",
                fatal=True,
            )
        names = _Names(self.is_list)
        ranked = None
        grades: list[Any] = [0, 1]
        if self.is_list:
            count = len(_responses(row))
            for column in (RANK_COLUMN, SCORE_COLUMN, LIST_REF_COLUMN, LIST_WEIGHT_COLUMN):
                if row.get(column) is not None and len(row[column]) != count:
                    detail = f"got {len(row[column])} values for {count} responses"
                    raise BadRow(f"column '{column}' is not of the responses' length", detail)
            ranked = ranking(count, row.get(RANK_COLUMN), row.get(SCORE_COLUMN))
            grades = [(ranked.ranks[at], ranked.scores and ranked.scores[at]) for at in _inverse(ranked.order)]
        if "prompt_ids" in kinds:
            prompt = columns.token_ids(ID_COLUMNS[0], row[ID_COLUMNS[0]])
            encoded = EncodedRow(
                prompt,
                [columns.token_ids("responses", ids) for ids in _responses(row)],
                self._given_weights(row, len(grades)),
                media=None if self.images is None else self.images.of_ids(prompt, _images(row)),
            )
        else:
            encoded = self._tokenized(row, kinds, names)
        prompt, responses, weights = encoded.prompt, encoded.responses, encoded.weights
        if not prompt:
            raise BadRow("the prompt is empty", "a response's first token is predicted from it: begin with a BOS token")
        for place, ids in enumerate(responses):
            if not ids:
                raise names.bad(place, "is empty")
        _check_different(responses, grades, names)
        largest = max(map(max, (prompt, *responses)))
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise BadRow(f"a token id is outside the vocabulary of {self.vocab_size}", f"got {largest}")
        if self.images is not None:
            for place, ids in enumerate(responses):
                if self.images.count(ids):
                    raise names.bad(place, "holds an image token", "images stand in the prompt only")
        for place, (ids, own) in enumerate(zip(responses, weights, strict=True)):
            if own is not None and len(own) != len(ids):
                raise names.bad(
                    place,
                    "has another number of tokens than of weights",
                    f"{len(own)} weights for {len(ids)} tokens, with the end that the tokenizer or template writes",
                )
        encoded = self._cut(encoded, grades, names)
        if ranked is None:
            return encoded
        return encoded._replace(
            responses=[encoded.responses[place] for place in ranked.order],
            weights=[encoded.weights[place] for place in ranked.order],
            ranking=ranked,
        )

    def _cut(self, encoded: EncodedRow, grades: Sequence[Any], names: _Names) -> EncodedRow:
        """Cut to max_length: the ends of the responses, or with keep_end the start of the prompt that all share."""
        if self.max_length is None:
            return encoded
        prompt, responses = encoded.prompt, encoded.responses
        if self.truncation_mode == "keep_end":
            longest = max(map(len, responses))
            room = self.max_length - longest
            if encoded.media is not None and room < len(prompt):
                raise BadRow(
                    f"a prompt with images does not fit max_length={self.max_length}",
                    f"its {len(prompt)} tokens and {longest} of a response are more, and keep_end would cut it: raise "
                    "max_length or use keep_start",
                )
            if room <= 0:
                raise BadRow(
                    f"a response fills max_length={self.max_length}",
                    f"its {longest} tokens leave none for the prompt; raise max_length or use keep_start",
                )
            return encoded._replace(prompt=prompt[-room:], cut_prompt=int(room < len(prompt)))
        room = self.max_length - len(prompt)
        if room <= 0:
            raise BadRow(
                f"the prompt fills max_length={self.max_length}",
                f"its {len(prompt)} tokens leave none for a response; raise max_length or shorten the prompt",
            )
        truncated = sum(len(ids) > room for ids in responses)
        if not truncated:
            return encoded
        responses = [ids[:room] for ids in responses]
        _check_different(responses, grades, names, f" within max_length={self.max_length}")
        weights = [own and own[:room] for own in encoded.weights]
        for place, own in enumerate(weights):
            if own is not None and not any(own):
                raise names.bad(place, f"has no token that counts within max_length={self.max_length}")
        return encoded._replace(responses=responses, weights=weights, truncated=truncated)

    def _tokenized(self, row: Mapping[str, Any], kinds: Mapping[str, str], names: _Names) -> EncodedRow:
        """The row's texts or conversations as token ids that are not cut."""
        if self.tokenizer is None:
            raise BadRow("text cannot be used without a tokenizer", "tokenizer is None", fatal=True)
        is_text = kinds.get(PAIR_TEXT_COLUMNS[0], kinds.get(LIST_TEXT_COLUMN)) in ("text", "texts")
        has_prompt = kinds.get("prompt") == ("text" if is_text else "messages")
        prompt: Any = row.get("prompt")
        responses, repeated = list(_responses(row)), None
        flags: list[TurnFlags] = []
        if is_text and has_prompt:
            repeated = _repetition(prompt, responses, names)
        elif not is_text:
            prompt = without_flags(prompt)[0] if has_prompt else prompt
            parted = [without_flags(response) for response in responses]
            responses, flags = [turns for turns, _ in parted], [own for _, own in parted]
        if has_prompt:
            prompt, responses = _prompt_once(prompt, responses, names)
        else:
            beside = prompt
            prompt, *responses = formats.split_prompt(*responses)
            if not prompt:
                self._check_context(row, "")
                what = "texts share no beginning" if is_text else "conversations share no first turn"
                if not is_text or not self.tokenizer("")["input_ids"]:
                    raise BadRow(
                        "the prompt is empty",
                        f"the {len(responses) if self.is_list else 'two'} {what}: give the prompt in a column `prompt`",
                    )
        for place, response in enumerate(responses):
            if not (response if is_text else says_something(response)):
                raise names.bad(place, "is empty")
        weights = self._given_weights(row, len(responses))
        if is_text:
            self._check_context(row, prompt)
            ids = _text_ids(self.tokenizer, prompt, responses)
            encoded = self._split(ids, weights)._replace(repeated=repeated)
            return self._with_images(encoded, row, prompt, ids[0], special_tokens=True)
        if not prompt:
            raise BadRow("the prompt is empty", "a conversation needs a turn in front of the response")
        words = "\n".join(formats.strings([turn.get("content") for turn in prompt]))
        self._check_context(row, words)
        if not has_prompt and beside is not None:
            _check_beside(beside, prompt)
        prompt = with_image_parts(prompt, len(_images(row)), None if self.images is None else self.images.token)
        for place, response in enumerate(responses):
            check_no_image(response, names.of(place))
        tools = columns.template_value("tools", row.get("tools"))
        template = Template(self.tokenizer, tools, row.get("chat_template_kwargs") or {})
        rendered = template.render(prompt, responses, [names.of(place) for place in range(len(responses))])
        encoded = self._split(rendered.ids, weights)
        for place, response in enumerate(responses):
            own = flags[place][-len(response) :]
            if weights[place] is None:
                encoded.weights[place] = token_mask(
                    template,
                    rendered,
                    place,
                    own,
                    assistant_only=self.assistant_only_loss,
                    first=len(encoded.prompt),
                    name=names.of(place),
                )
            elif any(flag is not None for flag in own):
                raise names.bad(place, "has `train` flags and token weights", "leave one of them out")
        return self._with_images(encoded, row, rendered.alone, rendered.ids[0], special_tokens=False)

    def _with_images(
        self, encoded: EncodedRow, row: Mapping[str, Any], text: str, alone: Sequence[int], *, special_tokens: bool
    ) -> EncodedRow:
        """The same with the processor's placeholders in the prompt; `text` and `alone` are the whole prompt's."""
        if self.images is None:
            return encoded
        images, dropped = _images(row), len(alone) - len(encoded.prompt)
        self.images.check_count(encoded.prompt, images)
        if not images:
            return encoded
        ids, media = self.images.encode(text, images, special_tokens=special_tokens)
        if special_tokens:
            ids = _once(self.images.tokenizer, text, ids)
        if dropped and ids[-dropped:] != list(alone[-dropped:]):
            raise BadRow(
                "the processor writes the prompt's end differently beside images",
                f"{dropped} tokens of it are displaced by a response: end prompts at a word",
            )
        return encoded._replace(prompt=ids[: len(ids) - dropped], media=media)

    def _split(self, ids: Sequence[list[int]], weights: list[Weights]) -> EncodedRow:
        """Split token ids of the prompt alone, and with each response, where the first of these parts from it."""
        alone, *whole = ids
        start = min(_shared(alone, each) for each in whole)
        dropped = None
        if start < len(alone):
            assert self.tokenizer is not None
            dropped = self.tokenizer.decode(alone[start:])
        return EncodedRow(alone[:start], [each[start:] for each in whole], weights, dropped=dropped)

    def _given_weights(self, row: Mapping[str, Any], count: int) -> list[Weights]:
        """The weights that the row gives for the tokens of each response, None where it gives none."""
        if self.is_list:
            given = row.get(LIST_WEIGHT_COLUMN)
            given = [None] * count if given is None else given
        else:
            given = [row.get(column) for column in WEIGHT_COLUMNS]
        return [None if own is None else columns.token_weights("weights", own) for own in given]

    def _check_context(self, row: Mapping[str, Any], prompt: str) -> None:
        for column in filter(formats.is_context, self.columns):
            formats.check_context(column, row.get(column), prompt, _responses(row))


def _responses(row: Mapping[str, Any]) -> Sequence[Any]:
    """The row's responses as they are given: a list's, or chosen and rejected; of token ids, their ids."""
    for column in (LIST_ID_COLUMNS[1], LIST_TEXT_COLUMN):
        if row.get(column) is not None:
            return row[column]
    names = ID_COLUMNS[1:] if ID_COLUMNS[1] in row else PAIR_TEXT_COLUMNS
    return [row[name] for name in names]


def _images(row: Mapping[str, Any]) -> Sequence[Any]:
    return row.get(IMAGES) or ()


def _inverse(order: Sequence[int]) -> list[int]:
    """At which place of `order` every number stands."""
    return sorted(range(len(order)), key=order.__getitem__)


def _check_different(ids: Sequence[Any], grades: Sequence[Any], names: _Names, within: str = "") -> None:
    """Raise BadRow where two responses have equal ids and different grades."""
    for one, other in combinations(range(len(ids)), 2):
        if ids[one] == ids[other] and grades[one] != grades[other]:
            raise names.equal(one, other, within)


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
    return [_once(tokenizer, text, tokenizer(text)["input_ids"]) for text in texts]


def _once(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """The ids of a text without a BOS that it holds too, and without an EOS more than it holds."""
    bos, eos = tokenizer.bos_token, str(tokenizer.eos_token)
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    written = 0  # times that EOS stands at the text's end
    while text.endswith(eos * (written + 1)):
        written += 1
    return ids[:-1] if ids[-written - 1 :] == [tokenizer.eos_token_id] * (written + 1) else ids


def _prompt_once(prompt: Any, responses: list[Any], names: _Names) -> tuple[Any, list[Any]]:
    """Return prompt and responses with the prompt written once, and with turns that ask moved from responses to it.

    Raises:
        BadRow: the responses begin with different questions.
    """
    if isinstance(prompt, str):
        return prompt, responses
    repeated = next(
        (k for k in range(len(prompt), 0, -1) if all(prompt[-k:] == response[:k] for response in responses)),
        0,
    )
    responses = [response[repeated:] for response in responses]
    while all(responses) and responses[0][0]["role"] in _ASKING and all(r[0] == responses[0][0] for r in responses):
        prompt, responses = [*prompt, responses[0][0]], [response[1:] for response in responses]
    for place, response in enumerate(responses):
        if response and response[0]["role"] in _ASKING:
            raise names.bad(
                place,
                f"begins with a turn of role {response[0]['role']!r}",
                f"{excerpt(str(response[0].get('content')), 0, 80)} would be trained on as the model's words, and "
                f"{'another' if names.is_list else 'the other'} response has another: responses share their prompt",
            )
    return prompt, responses


def _repetition(prompt: str, responses: Sequence[str], names: _Names) -> str | None:
    """Quote the texts where all responses begin with the prompt, which in one row may be chance."""
    start = prompt.strip()
    if not start or not all(text.lstrip().startswith(start) for text in responses):
        return None
    quoted = [f"{names.of(place)} {excerpt(text, 0, 80)}" for place, text in enumerate(responses[:2])]
    return f"prompt {excerpt(prompt, 0, 80)}, {', '.join(quoted)}"


def _check_beside(text: str, prompt: list[Any]) -> None:
    """Raise BadRow unless a text prompt beside conversations repeats a turn, or all turns, of their prompt."""
    contents = [" ".join(formats.strings(turn.get("content"))).strip() for turn in prompt]
    if text.strip() not in contents and not all(content in text for content in contents):
        raise BadRow(
            "column 'prompt' is text that the conversations do not begin with",
            f"{excerpt(text, 0, 80)}, and they begin with {excerpt(contents[0], 0, 80)}: write it as a first turn "
            "(role system) of chosen and rejected, or remove the column",
        )
