"""Answers under a grammar, of the demo model: they fit or are cut, alone and beside others, however steps are run.

KIMI_VL_FUZZ takes 500 schemas and 2,000 answers in place of some.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

import kimi_vl
from kimi_vl import kernels
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.errors import UserError
from kimi_vl.events import Done
from kimi_vl.pipeline import Pipeline
from kimi_vl.text import grammar
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN

ASK = [{"role": "user", "content": "What is 12 + 30?"}]
SCHEMAS, ANSWERS = (500, 4) if "KIMI_VL_FUZZ" in os.environ else (20, 1)
RESULT = {
    "type": "object",
    "properties": {"op": {"enum": ["+", "-"]}, "result": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["op", "result"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    pipeline = kimi_vl.load("demo", device="cpu")
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def static(demo: Pipeline) -> Iterator[Pipeline]:
    """The same model with decode steps over static buffers."""
    pipeline = kimi_vl.load("demo", device="cpu")
    pipeline.close()
    options = EngineOptions(max_num_seqs=16, cache_bytes=1 << 24)
    pipeline.engine = Engine(pipeline.model, pipeline.tokenizer.num_ranks, options, ops=kernels.REFERENCE)
    assert pipeline.engine.static_decoder is not None
    yield pipeline
    pipeline.close()


def some_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema of every kind of value that an answer of a few hundred tokens can fit."""
    kinds = ["integer", "number", "string", "enum", "const", "boolean", "null", "pattern", "format"]
    kind = rng.choice([*kinds, "array", "object", "object", "object", "anyOf", "ref"] if depth else kinds)
    low = rng.randrange(-50, 50)
    if kind == "integer":
        bounds = {"minimum": low, "maximum": low + rng.randrange(90)}
        return {"type": "integer", **(bounds if rng.random() < 0.7 else {"exclusiveMinimum": low, "multipleOf": 5})}
    if kind == "number":
        return {"type": "number", "minimum": low, "maximum": low + 40}
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 12)}
    if kind == "enum":
        return {"enum": rng.sample(["red", "blue", 'a "b"', "日本", 1, 2.5, None, True, [1], {"a": 1}], 4)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, None, [1, "a"], {"k": False}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,5}$", "^(yes|no)$", r"^\d{1,3}-[A-Z]$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
    if kind == "array":
        least = rng.randrange(3)
        return {"type": "array", "items": some_schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == "object":
        names = rng.sample(["name", "op", "not", "π", "a b", 'q"', "x-guidance", "items"], rng.randrange(1, 5))
        return {
            "type": "object",
            "properties": {name: some_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)),
            "additionalProperties": False if rng.random() < 0.8 else {"type": "boolean"},
        }
    if kind == "anyOf":
        return {"anyOf": [some_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "ref":
        items = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}
        node = {"type": "object", "properties": {"v": {"type": "boolean"}, "next": items}, "required": ["v"]}
        return (
            {"type": "object", "properties": {"node": {"$ref": "#/$defs/node"}}, "$defs": {"node": node}}
            if (depth == 3)
            else {"type": "boolean"}
        )
    return {"type": kind}


def settings(number: int) -> dict[str, Any]:
    """How an answer is sampled; hot, so that no two are alike."""
    kinds = [{"temperature": 1.2}, {"temperature": 0}, {"temperature": 2, "top_k": 50}, {"top_p": 0.9}]
    return {"seed": number, "thinking_budget": number % 3 * 8, "max_length_tokens": 200, **kinds[number % 4]}


def fits(schema: dict[str, Any], done: Done) -> bool:
    """Whether an answer is valid by another library than the one that made it."""
    return jsonschema_rs.is_valid(schema, json.loads(done.answer))


def last(stream: Any) -> Done:
    *_, done = stream
    assert isinstance(done, Done)
    return done


@pytest.mark.parametrize("first", range(0, SCHEMAS, 20))
def test_every_answer_fits_its_schema_or_is_cut(demo: Pipeline, static: Pipeline, first: int) -> None:
    """And is the same alone, beside others, and where steps are overlapped."""
    schemas = [some_schema(random.Random(number)) for number in range(first, first + 20)] * ANSWERS
    params = [{"grammar": grammar.json_schema(schema), **settings(n)} for n, schema in enumerate(schemas, first)]
    found = [last(stream) for stream in [demo.stream(ASK, (), **each) for each in params]]
    valid = 0
    for schema, done in zip(schemas, found, strict=True):
        assert done.finish_reason in ("stop", "length")
        if done.finish_reason == "stop":
            assert fits(schema, done), (schema, done.answer)
            valid += 1
    assert valid >= len(schemas) * 0.6
    assert len({done.answer for done in found}) > len(found) // ANSWERS // 2  # of equal schemas some are greedy
    some = range(0, len(found), 1 if "KIMI_VL_FUZZ" in os.environ else 7)
    streams = [static.stream(ASK, (), **params[n]) for n in some]
    assert [last(stream).answer for stream in streams] == [found[n].answer for n in some]
    for n in some:
        alone = demo.complete(ASK, (), **params[n])
        assert (alone.reasoning, alone.answer) == (found[n].reasoning, found[n].answer)


def test_requests_without_a_grammar_stay_as_they_are(demo: Pipeline, static: Pipeline) -> None:
    options = {"temperature": 1, "thinking_budget": 12, "max_length_tokens": 80}
    alone = [demo.complete(ASK, (), seed=seed, **options) for seed in range(2)]
    for pipeline in (demo, static):
        plain, steered = [], []
        for seed in range(2):
            plain.append(pipeline.stream(ASK, (), seed=seed, **options))
            steered.append(pipeline.stream(ASK, (), seed=seed, grammar=grammar.json_schema(RESULT), **options))
        beside = [last(stream) for stream in plain]
        assert [(each.reasoning, each.answer) for each in beside] == [(each.reasoning, each.answer) for each in alone]
        answers = [last(stream) for stream in steered]
        assert all(fits(RESULT, done) for done in answers)
        # the thinking is free: it is the same with and without
        assert [done.reasoning for done in answers] == [done.reasoning for done in alone]


@pytest.mark.parametrize("thinks", [True, False])
def test_a_grammar_of_each_kind(demo: Pipeline, monkeypatch: pytest.MonkeyPatch, thinks: bool) -> None:
    monkeypatch.setattr(demo, "thinks", thinks)
    for wanted, right in [
        (grammar.regex(r"The result is \d{1,2}\."), lambda text: text.startswith("The result is ")),
        (grammar.choice(["forty-two", "◁think▷ 7"]), lambda text: text in ("forty-two", "◁think▷ 7")),
        (grammar.choice(["◁think▷ 7"]), lambda text: text == "◁think▷ 7"),
        (grammar.json_schema(RESULT), lambda text: jsonschema_rs.is_valid(RESULT, json.loads(text))),
    ]:
        done = demo.complete(ASK, (), temperature=0, grammar=wanted, logprobs=2)
        assert right(done.answer), done.answer
        assert done.finish_reason == "stop"
        assert (done.reasoning != "") == thinks
        assert b"".join(each.token_bytes for each in done.logprobs).decode() == done.answer


def test_an_answer_continues_its_prefill(demo: Pipeline) -> None:
    for prefill, thinking in (
        ('{"op": "-",', False),
        ("◁think▷So◁/think▷{", False),
        ("◁think▷So it", True),
        (" ", True),
    ):
        messages = [*ASK, {"role": "assistant", "content": prefill}]
        done = demo.complete(messages, (), temperature=0, grammar=grammar.json_schema(RESULT))
        begun = "" if thinking else prefill.partition(THINK_CLOSE)[2] or prefill
        assert jsonschema_rs.is_valid(RESULT, json.loads(begun + done.answer)), done.answer
        assert (done.reasoning != "") == thinking
    with pytest.raises(UserError, match="E_GRAMMAR: the last message"):
        demo.complete([*ASK, {"role": "assistant", "content": "[1"}], (), grammar=grammar.json_schema(RESULT))


def test_what_does_not_go_with_a_grammar_is_refused(demo: Pipeline) -> None:
    with pytest.raises(UserError, match="E_PARAMETER: stop_sequences"):
        demo.stream(ASK, (), grammar=grammar.json_object(), stop_sequences=["}"])
    with pytest.raises(UserError, match="E_PARAMETER: grammar"):
        demo.stream(ASK, (), grammar={"type": "object"})
    with pytest.raises(UserError, match="E_GRAMMAR: json_schema uses not"):
        demo.stream(ASK, (), grammar=grammar.json_schema({"not": {}}))


def drive(demo: Pipeline, script: list[int], **params: Any) -> tuple[Done, list[int]]:
    """What becomes of a model that says ``script`` while its thinking goes on, and then the lowest id that is allowed;
    the events' end, and the tokens that follow the sequence."""
    import numpy as np

    events: list[Any] = []
    caught: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.engine, "submit", lambda *given: caught.append(given[3]))
        demo.submit(ASK, (), events.append, **params)
    (processor,) = caught
    tokens: list[int] = []
    following: int | None = 0
    at = 0
    while following is not None:
        drawn = processor.forced()
        if drawn is None and processor.constraint is not None:
            mask = np.zeros((1, 40), dtype=np.int32)
            processor.constraint.fill([processor.constraint], mask)
            drawn = min(token for token in range(1280) if mask[0, token // 32] >> token % 32 & 1)
        elif drawn is None:
            drawn, at = script[at], at + 1
        following = processor.take(drawn)
        tokens += [] if following is None else [following]
    assert isinstance(events[-1], Done), events[-1]
    return events[-1], tokens


def test_a_token_that_ends_the_thinking_and_goes_on_is_replaced_by_the_marker(
    demo: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the marker it holds, and whatever follows: the answer begins with a token of its own."""
    tokenizer = demo.tokenizer
    wanted = grammar.choice(["yes"])
    opener, closer, thinking = (tokenizer.encode(text) for text in (THINK_OPEN, THINK_CLOSE, "It is"))
    stand_in = tokenizer.encode("~")[0]  # its bytes are those of each token that is tried
    whole = THINK_CLOSE.encode()
    for begin in range(len(whole)):
        for extra in ("{", " no", "\n", "日", "\xff"):
            own = whole[begin:] + extra.encode("latin-1" if extra == "\xff" else "utf-8")
            with pytest.MonkeyPatch.context() as patch:
                real = [*tokenizer._bytes]
                patch.setattr(tokenizer, "_bytes", [*real[:stand_in], own, *real[stand_in + 1 :]])
                script = [*thinking, *tokenizer.encode_bytes(whole[:begin]), stand_in]
                done, tokens = drive(demo, script, grammar=wanted, temperature=0)
            assert (done.reasoning, done.answer, done.thinking_closed_by) == ("It is", "yes", "model"), (begin, extra)
            said = b"".join(tokenizer.token_bytes(token) for token in tokens)
            assert said.startswith(f"{THINK_OPEN}It is{THINK_CLOSE}".encode())
    done, tokens = drive(demo, [*thinking, *closer], grammar=wanted, temperature=0)
    assert tokens[: len(opener + thinking + closer)] == opener + thinking + closer
    assert (done.answer, done.finish_reason) == ("yes", "stop")


def test_more_is_kept_for_an_answer_that_must_be_whole(demo: Pipeline) -> None:
    endless = [demo.tokenizer.encode(str(n % 10))[0] for n in random.Random(1).choices(range(100), k=5000)]
    done, _ = drive(demo, endless, grammar=grammar.json_object(), temperature=0, max_length_tokens=400)
    assert 400 // 2 - 8 <= 400 - done.usage.reasoning_tokens <= 400 // 2 + 8
    assert done.thinking_closed_by == "budget"
    plain, _ = drive(demo, [*demo.tokenizer.encode(THINK_OPEN), *endless], temperature=0, max_length_tokens=400)
    assert 400 - plain.usage.reasoning_tokens <= 400 // 4 + 8


def test_an_answer_ends_with_its_last_token(demo: Pipeline) -> None:
    """Where nothing can follow, no end of the turn is waited for, and a length that is just enough is no cut."""
    count = len(demo.tokenizer.encode("yes"))
    messages = [*ASK, {"role": "assistant", "content": f"{THINK_OPEN}So{THINK_CLOSE}"}]
    for length, reason in ((count, "stop"), (count + 5, "stop"), (count - 1, "length")):
        if length:
            done = demo.complete(messages, (), grammar=grammar.choice(["yes"]), max_length_tokens=length)
            assert done.finish_reason == reason
            assert done.usage.output_tokens == min(length, count)
