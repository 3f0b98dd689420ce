"""A body of ``/v1/chat/completions`` to a request: every field is taken, ignored, or refused by its path.

A null is an absent field. Keys that nobody here knows are ignored, as clients of several services send them. Knows
neither HTTP nor the engine; the messages themselves are read by :mod:`kimi_vl.text.messages`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .. import parameters
from ..errors import UserError
from ..media.documents import ranges
from ..media.video import MAX_FPS, MAX_FRAMES, VideoOptions
from ..text import grammar
from ..text import messages as chat_messages
from ..text.grammar import Grammar
from ..text.messages import DocumentPart, Turn, VideoPart
from ..text.stop_sequences import MAX_CHARACTERS, MAX_SEQUENCES
from ..text.thinking import THINK_CLOSE, THINK_OPEN
from .errors import ApiError, bad_request, unsupported, with_param

MAX_CHOICES = 8
SEEDS = parameters.MAX_SEED + 1
"""How many seeds there are; others are taken modulo this."""

BUDGETS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
"""Thinking tokens for a ``reasoning_effort``; None is all but what is kept for the answer."""

LENGTH_NAMES = ("max_completion_tokens", "max_tokens", "max_new_tokens")
BUDGET_NAMES = ("thinking_budget", "thinking_token_budget")
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0}
"""Sampling that is not done, with the value that asks for nothing."""

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    | {"safety_identifier", "verbosity", "parallel_tool_calls", "prediction", "moderation"}
)
UNSUPPORTED = frozenset(
    {"stop_token_ids", "echo", "best_of", "use_beam_search", "prompt_logprobs", "web_search_options"}
    | {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}
)
READ = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "top_p", "top_k", "seed", "n", "stop"}
    | {"reasoning_effort", "thinking", "reasoning", "chat_template_kwargs", "enable_thinking", "include_reasoning"}
    | {"separate_reasoning", "response_format", "structured_outputs", "logprobs", "top_logprobs", "logit_bias"}
    | {"tools", "tool_choice", "functions", "function_call", "modalities", "continue_final_message"}
    | {"media_io_kwargs", "kimi_vl", *LENGTH_NAMES, *BUDGET_NAMES, *NEUTRAL}
)

ReasoningForm = Literal["separate", "inline", "omitted"]


@dataclass(frozen=True)
class Rules:
    """What a server lets pass: ``lenient`` ignores sampling that is not done, ``ignore_tools`` tools."""

    lenient: bool = False
    ignore_tools: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion: ``params`` are keyword arguments of :meth:`kimi_vl.pipeline.Pipeline.submit`, and ``reading``
    those of :meth:`~kimi_vl.pipeline.Pipeline.prepare`, once for all answers.

    ``reasoning`` says where the thinking goes: to a field of its own, between its markers into the content, or nowhere.
    ``grounding`` asks for the places that the answer names. ``unknown`` are the keys of the body that were ignored
    because nobody knows them.
    """

    model: str | None
    turns: tuple[Turn, ...]
    params: Mapping[str, Any]
    reading: Mapping[str, Any]
    seed: int
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    reasoning: ReasoningForm = "separate"
    grounding: bool = False
    unknown: tuple[str, ...] = field(default=(), compare=False)

    def params_of(self, choice: int) -> dict[str, Any]:
        """The keyword arguments for the ``choice``-th of ``n`` answers."""
        return {**self.params, "seed": (self.seed + choice) % SEEDS}


def read_chat(body: Any, rules: Rules = Rules()) -> ChatRequest:
    """The request that a body (JSON as Python's values) asks for. Raises :class:`~kimi_vl.serving.errors.ApiError`."""
    fields = Fields.of(body)
    model = fields.text("model")
    _refuse_unsupported(fields, rules)
    stream = bool(fields.boolean("stream"))
    options = fields.object("stream_options")
    own = fields.object("kimi_vl")
    seed = fields.integer("seed")
    params: dict[str, Any] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": _top_k(fields),
        "max_length_tokens": _length(fields),
        "thinking_budget": _thinking_budget(fields),
        "stop_sequences": _stops(fields),
        "grammar": _grammar(fields),
        "logprobs": _logprobs(fields),
        "logit_bias": _logit_bias(fields),
    }
    if params["grammar"] is not None and params["stop_sequences"]:
        raise fields.refuse("stop", "would cut a structured answer; leave it out.")
    return ChatRequest(
        model=model,
        turns=read_turns(fields),
        params={name: value for name, value in params.items() if value is not None},
        reading=read_estimated(fields),
        seed=secrets.randbelow(2**31) if seed is None else seed % SEEDS,
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=bool(options and options.boolean("include_usage")),
        reasoning=_reasoning_form(fields),
        grounding=bool(own and own.boolean("grounding")),
        unknown=tuple(sorted(fields.values.keys() - READ - IGNORED - UNSUPPORTED)),
    )


def json_value(text: str) -> Any:
    """The value of a JSON text as the standard has it: no NaN, nothing after the end. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


class Fields:
    """Reads an object's values by name; None for what is absent or null. Refusals name the path of the value."""

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values, self._path = values, path

    @classmethod
    def of(cls, body: Any) -> Fields:
        if not isinstance(body, dict):
            raise bad_request(None, "the body must be a JSON object.", "invalid_json")
        return cls(body)

    def path(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def refuse(self, name: str, sentence: str) -> ApiError:
        return bad_request(self.path(name), f"{self.path(name)} {sentence}")

    def boolean(self, name: str) -> bool | None:
        return self._typed(name, bool, "true or false")

    def text(self, name: str) -> str | None:
        return self._typed(name, str, "a text")

    def object(self, name: str) -> Fields | None:
        value = self._typed(name, dict, "an object")
        return None if value is None else Fields(value, self.path(name))

    def one_of(self, name: str, choices: Any) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.refuse(name, f"must be one of {', '.join(choices)}; change it.")
        return value

    def number(self, name: str, low: float = float("-inf"), high: float | None = None) -> float | None:
        value = self.get(name)
        with _at(self.path(name)):
            return None if value is None else parameters.number(self.path(name), value, low, high)

    def integer(self, name: str, low: int = -(2**63), high: int = 2**63 - 1) -> int | None:
        value = self.get(name)
        with _at(self.path(name)):
            return None if value is None else parameters.integer(self.path(name), value, low, high)

    def _typed(self, name: str, kind: type, what: str) -> Any:
        value = self.get(name)
        if value is not None and not isinstance(value, kind):
            raise self.refuse(name, f"must be {what}; change it.")
        return value


class _at:
    """Gives a :class:`UserError` raised inside the path of the field at fault."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            raise with_param(error, self._path) from None


# Messages


def read_turns(fields: Fields) -> tuple[Turn, ...]:
    """The conversation in ``messages``."""
    found = fields.get("messages")
    if not isinstance(found, list) or not found:
        raise bad_request("messages", "messages must be a list with at least one message.", "e_messages_invalid")
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(found)]
    last = len(turns) - 1
    _check_continued(fields, Fields(found[last], f"messages[{last}]"), turns[last])
    if turns[last].role == "assistant":
        thinking = Fields(found[last], f"messages[{last}]")
        reasoning = thinking.text("reasoning_content") or thinking.text("reasoning")
        if reasoning:
            turns[last] = Turn("assistant", (f"{THINK_OPEN}{reasoning}{THINK_CLOSE}", *turns[last].parts))
    return tuple(turns)


def _turn(message: Any, path: str) -> Turn:
    if isinstance(message, dict) and message.get("role") == "assistant" and message.get("content") is None:
        message = {**message, "content": message.get("refusal") or ""}
    try:
        return _read(message)
    except UserError as error:
        raise with_param(error, _part_at_fault(message, path)) from None


def _read(message: Any) -> Turn:
    """A message; its parts have their files, as none comes beside them, and options that make sense."""
    [turn] = chat_messages.read([message], bare=False)
    for part in turn.files:
        if isinstance(part, VideoPart):
            VideoOptions.checked(**part.options)
        elif isinstance(part, DocumentPart):
            ranges(part.options.get("pages"))
    return turn


def _part_at_fault(message: Any, path: str) -> str:
    """The path of the first part of a message that is refused by itself, or of the whole message."""
    parts = message.get("content") if isinstance(message, dict) else None
    for index, part in enumerate(parts if isinstance(parts, list) else ()):
        try:
            _read({**message, "content": [part]})
        except UserError:
            try:
                _read({**message, "content": []})
            except UserError:
                return path
            return f"{path}.content[{index}]"
    return path


def _check_continued(fields: Fields, last: Fields, turn: Turn) -> None:
    """What asks for the last message to be continued must find one of the assistant's: those are, asked or not."""
    asked = [("continue_final_message", fields), ("partial", last), ("prefix", last)]
    for name, where in asked:
        if where.boolean(name) and turn.role != "assistant":
            raise where.refuse(name, "continues a last message of the assistant; add one, or leave it out.")


# Parameters


def read_file_options(fields: Fields) -> dict[str, Any]:
    """How many frames of videos are taken, as clients of vLLM say it: keyword arguments of the pipeline."""
    videos = (fields.object("media_io_kwargs") or Fields({})).object("video") or Fields({})
    found = {"fps": videos.number("fps", 0, MAX_FPS), "max_frames": videos.integer("num_frames", 1, MAX_FRAMES)}
    if found["fps"] == 0:
        raise videos.refuse("fps", "must be above 0; change it.")
    return {name: value for name, value in found.items() if value is not None}


def read_estimated(fields: Fields) -> dict[str, Any]:
    """What an estimate of ``messages`` depends on beside them: keyword arguments of the pipeline."""
    length = _length(fields)
    return {**read_file_options(fields), **({} if length is None else {"max_length_tokens": length})}


def _top_k(fields: Fields) -> int | None:
    top_k = fields.integer("top_k", -1, parameters.MAX_TOP_K)
    return 0 if top_k == -1 else top_k  # how vLLM's clients turn it off


def _length(fields: Fields) -> int | None:
    """New tokens at most; the first of the names that is given counts."""
    given = [fields.integer(name, 1, parameters.MAX_LENGTH_TOKENS) for name in LENGTH_NAMES]
    return next((length for length in given if length is not None), None)


def _stops(fields: Fields) -> tuple[str, ...]:
    with _at("stop"):
        stops = tuple(filter(None, parameters.texts("stop", fields.get("stop"))))
    if len(stops) > MAX_SEQUENCES:
        raise fields.refuse("stop", f"may have {MAX_SEQUENCES} texts; give fewer.")
    if any(len(stop) > MAX_CHARACTERS for stop in stops):
        raise fields.refuse("stop", f"may have texts of {MAX_CHARACTERS} characters; shorten them.")
    return stops


def _grammar(fields: Fields) -> Grammar | None:
    """What the answer may look like, by OpenAI's field or by vLLM's."""
    asked = {"response_format": _response_format(fields), "structured_outputs": _structured_outputs(fields)}
    found = [replace(each, parameter=name) for name, each in asked.items() if each is not None]
    if len(found) > 1:
        raise fields.refuse("structured_outputs", "and response_format both give the answer a form; keep one.")
    return found[0] if found else None


def _response_format(fields: Fields) -> Grammar | None:
    form = fields.object("response_format")
    if form is None:
        return None
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise form.refuse("type", "must be text, json_object or json_schema; add it.")
    if kind == "text":
        return None
    if kind == "json_object":
        return grammar.json_object()
    inner = form.object("json_schema")
    schema = inner.object("schema") if inner else None
    if inner is None or schema is None:
        raise form.refuse("json_schema.schema", "must be a JSON schema; add it.")
    with _at(inner.path("schema")):
        return grammar.json_schema(schema.values)


def _structured_outputs(fields: Fields) -> Grammar | None:
    """``json``, ``regex`` or ``choice``, one of them; what else asks for a form is refused, not ignored."""
    form = fields.object("structured_outputs")
    if form is None:
        return None
    makers = {"json": grammar.json_schema, "regex": grammar.regex, "choice": grammar.choice}
    given = {name: value for name, value in form.values.items() if value not in (None, False)}
    for name in sorted(given.keys() & {"grammar", "structural_tag"}):
        raise unsupported(form.path(name), f"{form.path(name)} is not supported; leave it out.")
    if given.get("json_object"):
        makers["json_object"] = lambda _: grammar.json_object()
    asked = given.keys() & makers.keys()
    if len(asked) != 1:
        raise bad_request("structured_outputs", "structured_outputs must have one of json, regex and choice.")
    [name] = asked
    with _at(form.path(name)):
        return makers[name](given[name])


def _logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens come with each; None for no log-probabilities at all."""
    asked, top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, parameters.MAX_LOGPROBS)
    if asked:
        return top or 0
    if top:
        raise fields.refuse("top_logprobs", "needs logprobs to be true; set it, or leave top_logprobs out.")
    return None


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    """By token id, which is a text in JSON."""
    given = fields.object("logit_bias")
    if given is None or not given.values:
        return None
    if not all(name.isascii() and name.isdigit() and len(name) < 10 for name in given.values):
        raise fields.refuse("logit_bias", "must map token ids to numbers; change it.")
    if len(given.values) > parameters.MAX_BIASED:
        raise fields.refuse("logit_bias", f"may have {parameters.MAX_BIASED} tokens; give fewer.")
    with _at("logit_bias"):
        return {
            int(name): parameters.number("a value in logit_bias", bias, -parameters.MAX_BIAS, parameters.MAX_BIAS)
            for name, bias in given.values.items()
        }


def _thinking_budget(fields: Fields) -> int | None:
    """Thinking tokens at most, by whichever name: a number counts before an on or off, and that before an effort."""
    thinking, reasoning = fields.object("thinking"), fields.object("reasoning")
    template = fields.object("chat_template_kwargs")
    numbers = [fields.integer(name, 0) for name in BUDGET_NAMES]
    switches = [fields.boolean("enable_thinking")]
    efforts = [fields.one_of("reasoning_effort", BUDGETS)]
    if thinking:
        numbers.append(thinking.integer("budget_tokens", 0))
        kind = thinking.one_of("type", ("enabled", "disabled"))
        switches.append(None if kind is None else kind == "enabled")
    if template:
        switches += [template.boolean("enable_thinking"), template.boolean("thinking")]
    if reasoning:
        numbers.append(reasoning.integer("max_tokens", 0))
        switches.append(reasoning.boolean("enabled"))
        efforts.append(reasoning.one_of("effort", BUDGETS))
    for number in numbers:
        if number is not None:
            return number
    for switch in switches:
        if switch is not None:
            return None if switch else 0
    return next((BUDGETS[effort] for effort in efforts if effort is not None), None)


def _reasoning_form(fields: Fields) -> ReasoningForm:
    reasoning = fields.object("reasoning")
    included, separate = fields.boolean("include_reasoning"), fields.boolean("separate_reasoning")
    if included is False or (reasoning and reasoning.boolean("exclude")):
        return "omitted"
    return "inline" if separate is False else "separate"


# What is refused


def _refuse_unsupported(fields: Fields, rules: Rules) -> None:
    for name, neutral in NEUTRAL.items():
        value = fields.number(name)
        if value is not None and value != neutral and not rules.lenient:
            raise unsupported(name, f"{name} is not applied here; leave it out, or give {neutral}.")
    for name in sorted(UNSUPPORTED):
        value = fields.get(name)
        asks = value is not None and value is not False and value != [] and not (name == "best_of" and value == 1)
        if asks:
            raise unsupported(name, f"{name} is not supported; leave it out.")
    modalities = fields.get("modalities")
    if modalities not in (None, [], ["text"]):
        raise unsupported("modalities", 'only text is generated; leave modalities out, or give ["text"].')
    if not rules.ignore_tools:
        _refuse_tools(fields, "tools", "tool_choice")
        _refuse_tools(fields, "functions", "function_call")


def _refuse_tools(fields: Fields, tools: str, choice: str) -> None:
    chosen = fields.get(choice)
    if (fields.get(tools) and chosen != "none") or (chosen not in (None, "none", "auto")):
        raise bad_request(
            tools, f'the model calls no tools; leave {tools} out, or set {choice} to "none".', "tools_unsupported"
        )
