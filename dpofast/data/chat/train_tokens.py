"""token_mask: which tokens of a response of several turns are trained.

A turn counts as its `train` flag says; one without a flag where it is the assistant's, or assistant_only_loss is off.
An assistant's turn begins behind what the generation prompt writes, and ends with the token that ends it. Which tokens
that are says

- a template with {% generation %} markers itself, through transformers' assistant mask;
- else what the template writes of the turns up to each one. Where it writes them differently once others follow
  (reasoning that is left out of earlier turns), a turn is found by altering what it says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from dpofast.data.chat.render import Rendered, Template
from dpofast.data.formats import BadRow, got
from dpofast.data.images.turns import is_image

TRAIN = "train"  # the key of a turn
TurnFlags = list[bool | None]
_ANSWERING = ("assistant", "gpt", "model")
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# No template writes it, and no text ends with it.
_ALTERATION = "\u2042#\u2042"
_WAYS = (
    "use a template with {% generation %} markers, say which tokens count by chosen_weights and rejected_weights "
    "(responses_weights), or train on all turns with assistant_only_loss=False"
)


def without_flags(turns: Sequence[Mapping[str, Any]]) -> tuple[list[Any], TurnFlags]:
    """Return the turns without their `train` keys, which no template sees, and these; None where a turn has none.

    Raises:
        BadRow: a flag that is no boolean.
    """
    flags: TurnFlags = [turn.get(TRAIN) for turn in turns]
    if not any(TRAIN in turn for turn in turns):
        return list(turns), flags
    wrong = next((index for index, flag in enumerate(flags) if flag is not None and not isinstance(flag, bool)), None)
    if wrong is not None:
        raise BadRow("a turn's `train` is neither true nor false", f"turn {wrong} holds {got(flags[wrong])}")
    return [{name: value for name, value in turn.items() if name != TRAIN} for turn in turns], flags


def token_mask(
    template: Template, rendered: Rendered, place: int, flags: TurnFlags, *, assistant_only: bool, first: int, name: str
) -> list[float] | None:
    """Return 1 or 0 for every token of a response, or None where all of it is trained.

    Args:
        template: the one that rendered.
        rendered: the prompt and its responses.
        place: of the response.
        flags: of its turns, as without_flags returns them.
        assistant_only: whether turns without a flag count only where they are the assistant's.
        first: the response's first token among those of the prompt with it.
        name: of the response, in messages.

    Raises:
        BadRow: no turn counts, or the tokens of a turn are not found.
    """
    response = rendered.responses[place]
    roles = [turn["role"] in _ANSWERING for turn in response]
    by_role = assistant_only and len(response) > 1
    wanted = [
        (is_answer or not by_role) if flag is None else flag for flag, is_answer in zip(flags, roles, strict=True)
    ]
    if not any(wanted):
        detail = f"its turns are of role {', '.join(sorted({repr(turn['role']) for turn in response}))}"
        raise BadRow("no turn of a response is trained", f"{name}: {detail}, with train {flags}; {_WAYS}")
    if all(wanted):
        return None
    turns = _Turns(template, rendered, place)
    offsets = template.offsets(turns.text, len(rendered.ids[1 + place]))
    if offsets is None:
        raise BadRow(
            "the tokens of a turn are not known", f"the tokenizer has no offsets; {_WAYS.split(', ', 1)[1]}", fatal=True
        )
    marked = template.assistant_mask(turns.all, len(offsets)) if _MARKER.search(template.source) else None
    if marked is not None and wanted == roles:
        mask = marked
    else:
        mask = [0] * len(offsets)
        for index, is_wanted in enumerate(wanted):
            if is_wanted:
                start, stop = turns.span(index, name)
                own = marked if roles[index] else None
                for token, (begin, end) in enumerate(offsets):
                    # A token belongs to the turn that its last character is in.
                    if start <= max(begin, end - 1) < stop:
                        mask[token] = 1 if own is None else own[token]
    if not any(mask[first:]):
        raise BadRow("no token of a response is trained", f"{name}: the turns that count are empty, or unmarked")
    return [float(counts) for counts in mask[first:]]


class _Turns:
    """Finds the turns of one response in the text of the whole conversation."""

    def __init__(self, template: Template, rendered: Rendered, place: int) -> None:
        self._template = template
        self.all = [*rendered.prompt, *rendered.responses[place]]
        self.text = rendered.whole[place]
        self._first = len(rendered.prompt)

    def span(self, index: int, name: str) -> tuple[int, int]:
        """The characters from start to stop of the response's turn `index`. Raises BadRow."""
        at = self._first + index
        start, stop = self._end(at - 1), self._end(at)
        header = self._header(at) if self.all[at]["role"] in _ANSWERING else ""
        if start is None or stop is None or header is None or stop < start:
            raise BadRow(
                "the tokens of a turn are not found",
                f"{name}, turn {index}: the chat template writes it differently when other turns follow; {_WAYS}",
            )
        return start + len(commonprefix([header, self.text[start:stop]])), stop

    def _header(self, at: int) -> str | None:
        """What the generation prompt adds to the turns in front of turn `at`."""
        before = self._template.text_or_none(self.all[:at])
        asked = self._template.text_or_none(self.all[:at], generation=True)
        if before is None or asked is None:
            return None
        for alone in self._endings(before):
            if asked.startswith(alone):
                return asked[len(alone) :]
        return None

    def _endings(self, text: str) -> list[str]:
        """A rendering, and without the EOS that some templates write behind the last turn only."""
        eos = self._template.eos_token
        return [text, text.removesuffix(eos)] if eos and text.endswith(eos) else [text]

    def _end(self, at: int) -> int | None:
        """Where turn `at` ends in the text."""
        if at == len(self.all) - 1:
            return len(self.text)
        alone = self._template.text_or_none(self.all[: at + 1])
        if alone is None:
            return None
        for written in self._endings(alone):
            if self.text.startswith(written):
                return len(written)
        inside, whole = self._anchor(at, self.all[: at + 1], alone), self._anchor(at, self.all, self.text)
        if inside is None or whole is None:
            return None
        for written in self._endings(alone):
            if self.text.startswith(written[inside:], whole):
                return whole + len(written) - inside
        return None

    def _anchor(self, at: int, turns: list[Any], text: str) -> int | None:
        """The place in the text of `turns` where turn `at` is written differently if it is altered, if there is one."""
        for turn in _alterations(turns[at]):
            other = self._template.text_or_none([*turns[:at], turn, *turns[at + 1 :]])
            if other is not None:
                place = other.find(_ALTERATION)
                if other == text[:place] + _ALTERATION + text[place:]:
                    return place
        return None


def _alterations(turn: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the turn with more content, as it is and without space at its end, or with another name called."""
    content, calls = turn.get("content"), turn.get("tool_calls")
    if content:
        if isinstance(content, str):
            yield {**turn, "content": content + _ALTERATION}
            yield {**turn, "content": content.rstrip() + _ALTERATION}
        else:
            last = max((at for at, part in enumerate(content) if not is_image(part)), default=None)
            if last is not None:
                altered = {**content[last], "text": content[last]["text"] + _ALTERATION}
                yield {**turn, "content": [*content[:last], altered, *content[last + 1 :]]}
    elif isinstance(calls, list) and calls and isinstance(calls[-1], Mapping):
        *others, last = calls
        called = last.get("function", last)
        if isinstance(called, Mapping) and isinstance(called.get("name"), str):
            called = {**called, "name": called["name"] + _ALTERATION}
            yield {**turn, "tool_calls": [*others, {**last, "function": called} if "function" in last else called]}
