"""Events of a request to what clients read: one completion, or its chunks as server-sent events. Knows no HTTP server.

Chunks are put together as text, for there is one for every few tokens of every stream; a test reads them back with
OpenAI's own types.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..events import Answer, Done, Event, Reasoning, TokenLogprob
from ..text.grounding import grounding_of
from ..text.thinking import THINK_CLOSE, THINK_OPEN
from .errors import ApiError
from .protocol import ReasoningForm

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Head:
    """What every object of one answer says: ``model`` is the served name, ``created`` in seconds since 1970.

    ``reasoning_field`` is the name under which thinking is sent, ``grounding`` adds the places that an answer names.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    reasoning: ReasoningForm = "separate"
    reasoning_field: str = "reasoning_content"
    grounding: bool = False

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def completion(head: Head, choices: Sequence[Done]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    return {
        **head.fields("chat.completion"),
        "choices": [_choice(head, index, done) for index, done in enumerate(choices)],
        "usage": usage(choices),
    }


def _choice(head: Head, index: int, done: Done) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": done.answer, "refusal": None}
    if head.reasoning == "separate":
        message[head.reasoning_field] = done.reasoning or None
    elif head.reasoning == "inline" and done.reasoning:
        message["content"] = f"{THINK_OPEN}{done.reasoning}{THINK_CLOSE}{done.answer}"
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs(done.logprobs),
        "finish_reason": finish_reason(done),
        "kimi_vl": details(done, head.grounding),
    }


def finish_reason(done: Done) -> str:
    """OpenAI has one word for the end of a turn and for a stop sequence."""
    return "length" if done.finish_reason == "length" else "stop"


def details(done: Done, grounded: bool = False) -> dict[str, Any]:
    """What else is known of an answer; OpenAI's clients keep such a field."""
    found: dict[str, Any] = {
        "seed": done.seed,
        "thinking_closed_by": done.thinking_closed_by,
        "time_to_first_token": round(done.time_to_first_token, 6),
    }
    if done.media:
        found["media"] = [dataclasses.asdict(use) for use in done.media]
    if grounded:
        found["grounding"] = grounding_of(done).to_dict()
    return found


def logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Log-probabilities of tokens of the answer; None where there are none."""
    if not tokens:
        return None
    return {
        "content": [{**_logprob(token), "top_logprobs": [_logprob(each) for each in token.top]} for token in tokens],
        "refusal": None,
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    """A token may be a part of a character: its bytes are what counts. JSON has no infinity."""
    text = token.token_bytes.decode("utf-8", "replace")
    return {"token": text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(token.token_bytes)}


def usage(choices: Iterable[Done]) -> dict[str, Any]:
    """Tokens of all choices together; their prompt counts once."""
    used = [done.usage for done in choices]
    prompt, output = used[0].input_tokens, sum(each.output_tokens for each in used)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "completion_tokens_details": {"reasoning_tokens": sum(each.reasoning_tokens for each in used)},
        "prompt_tokens_details": {"cached_tokens": used[0].cached_tokens, "image_tokens": used[0].image_tokens},
    }


class Chunks:
    """Writes the server-sent events of one streamed answer, as bytes."""

    def __init__(self, head: Head, include_usage: bool):
        self._head, self._include_usage = head, include_usage
        fields = json.dumps(head.fields("chat.completion.chunk"))[:-1]
        self._begin = f"data: {fields}, "
        self._tail = ', "usage": null}\n\n' if include_usage else "}\n\n"
        self._thinking: set[int] = set()  # choices whose thinking has its opening marker alone, where it is inline

    def start(self, choices: int) -> bytes:
        """The first chunk of each choice, which says who speaks."""
        role = '"role": "assistant", "content": ""'
        return "".join(self._chunk(index, role) for index in range(choices)).encode()

    def events(self, items: Iterable[tuple[int, Event]]) -> bytes:
        """What events of the choices with these numbers say: neighbours of one kind and choice are one chunk."""
        choices: dict[int, list[Event]] = {}
        for index, event in items:
            choices.setdefault(index, []).append(event)
        return "".join(self._choice(index, events) for index, events in choices.items()).encode()

    def _choice(self, index: int, events: Sequence[Event]) -> str:
        parts: list[str] = []
        for kind, group in itertools.groupby(events, type):
            if kind is Done:
                parts += [self._finish(index, event) for event in group if isinstance(event, Done)]
            elif kind is Reasoning:
                parts.append(
                    self._reasoning(index, "".join(event.text for event in group if isinstance(event, Reasoning)))
                )
            else:
                answers = [event for event in group if isinstance(event, Answer)]
                tokens = [token for event in answers for token in event.logprobs]
                parts.append(self._answer(index, "".join(event.text for event in answers), tokens))
        return "".join(parts)

    def usage(self, choices: Sequence[Done]) -> bytes:
        """The chunk with the usage, where it was asked for."""
        if not self._include_usage:
            return b""
        return f'{self._begin}"choices": [], "usage": {json.dumps(usage(choices))}}}\n\n'.encode()

    def _reasoning(self, index: int, text: str) -> str:
        if not text or self._head.reasoning == "omitted":
            return ""
        if self._head.reasoning == "separate":
            return self._chunk(index, f'"{self._head.reasoning_field}": {json.dumps(text)}')
        if index not in self._thinking:
            self._thinking.add(index)
            text = THINK_OPEN + text
        return self._chunk(index, f'"content": {json.dumps(text)}')

    def _answer(self, index: int, text: str, tokens: Sequence[TokenLogprob]) -> str:
        text = self._closed(index) + text
        if not text and not tokens:
            return ""
        found = json.dumps(logprobs(tokens)) if tokens else "null"
        return self._chunk(index, f'"content": {json.dumps(text)}', logprobs=found)

    def _finish(self, index: int, done: Done) -> str:
        closing = self._closed(index)
        before = self._chunk(index, f'"content": {json.dumps(closing)}') if closing else ""
        finish = f'"{finish_reason(done)}", "kimi_vl": {json.dumps(details(done, self._head.grounding))}'
        return before + self._chunk(index, "", finish)

    def _closed(self, index: int) -> str:
        """The closing marker, once, where thinking is inline and has begun."""
        if index not in self._thinking:
            return ""
        self._thinking.remove(index)
        return THINK_CLOSE

    def _chunk(self, index: int, delta: str, finish: str = "null", logprobs: str = "null") -> str:
        choice = f'{{"index": {index}, "delta": {{{delta}}}, "logprobs": {logprobs}, "finish_reason": {finish}}}'
        return f'{self._begin}"choices": [{choice}]{self._tail}'


def error_event(error: ApiError) -> bytes:
    """An error after the headers have left; the stream ends with it."""
    return b"data: " + error.body() + b"\n\n"


def models(names: Sequence[str], created: int, max_model_len: int) -> dict[str, Any]:
    return {"object": "list", "data": [model(name, created, max_model_len) for name in names]}


def model(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "kimi_vl",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
    }
