"""Grammars as values: what is refused, in which words and how soon, and which answers fit."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kimi_vl.errors import UserError
from kimi_vl.text import grammar
from kimi_vl.text.grammar import Grammar, GrammarCompiler, Matcher
from kimi_vl.text.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
TOKENIZER = Tokenizer.from_directory(CHECKPOINT)
VOCABULARY = 1280
COMPILER = GrammarCompiler(TOKENIZER, VOCABULARY)


def allowed(matcher: Matcher) -> set[int]:
    masks = np.zeros((1, VOCABULARY // 32), dtype=np.int32)
    Matcher.fill([matcher], masks)
    return {token for token in range(VOCABULARY) if masks[0, token // 32] >> token % 32 & 1}


def fits(wanted: Grammar, text: str) -> bool:
    """Whether every token of ``text`` is allowed in turn, and then the end."""
    matcher = COMPILER.matcher(wanted)
    for token in TOKENIZER.encode(text):
        if token not in allowed(matcher):
            return False
        matcher.consume(token)
    return TOKENIZER.stop_ids <= allowed(matcher)


BOX = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "box": {"type": "array", "items": {"type": "integer"}, "minItems": 2}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        (grammar.json_schema(BOX), ['{"name": "a", "box": [1, 2]}', '{"name":"日本"}'], ['{"box": []}', '{"a": 1}']),
        (grammar.json_schema(json.dumps(BOX)), ['{"name": "a"}'], ['{"name": "a", "x": 1}', '{"name": "a"']),
        (grammar.json_schema(BOX), [json.dumps({"name": "a", "box": [1, 2]}, indent=n) for n in (None, 0, 2, 8)], []),
        (grammar.json_schema(True), ["1", '"a"', "[]", "null"], ["nul", "{]"]),
        (grammar.json_schema({"type": "integer", "minimum": 3}), ["3", "40"], ["2", "3.5", "-4", ""]),
        (grammar.json_object(), ["{}", '{"a": {"b": [1, 2.5e3, null]}}'], ["[]", "1", "{", " " * 9 + "{}"]),
        (grammar.regex(r"\d{2}|[a-c]+é?"), ["12", "abcé", "c"], ["1", "123", "abd", ""]),
        (grammar.regex("a*"), ["", "aaa"], ["b"]),
        (grammar.choice(["yes", 'say "no"\n', "日本", "◁think▷"]), ["yes", 'say "no"\n', "◁think▷"], ["y", "yesyes"]),
    ],
)  # fmt: skip
def test_what_fits(wanted: Grammar, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert fits(wanted, text), text
    for text in wrong:
        assert not fits(wanted, text), text


def test_an_answer_that_nothing_may_follow_is_complete() -> None:
    matcher = COMPILER.matcher(grammar.choice(["yes", "yes!"]))
    for token in TOKENIZER.encode("yes"):
        assert not matcher.complete
        matcher.consume(token)
    assert not matcher.complete  # it may end here, or go on
    matcher.consume(*TOKENIZER.encode("!"))
    assert matcher.complete
    assert allowed(matcher) == TOKENIZER.stop_ids


def test_no_special_token_is_allowed_but_those_that_end_a_turn() -> None:
    names = "".join(TOKENIZER.special)
    for wanted in (grammar.json_schema({"type": "string"}), grammar.regex("(?s:.*)"), grammar.choice([names, "x"])):
        matcher = COMPILER.matcher(wanted)
        assert not any(map(TOKENIZER.is_special, allowed(matcher) - TOKENIZER.stop_ids))


def test_masks_of_many_are_those_of_each() -> None:
    grammars = [
        grammar.json_schema(BOX),
        grammar.regex("[a-f]{3}"),
        grammar.choice(["yes", "no"]),
        grammar.json_object(),
    ]
    matchers = [COMPILER.matcher(each) for each in grammars * 3]
    matchers[0].consume(*TOKENIZER.encode("{"))
    masks = np.zeros((len(matchers), VOCABULARY // 32), dtype=np.int32)
    Matcher.fill(matchers, masks)
    again = masks.copy()
    Matcher.fill(matchers, again)  # nothing has changed
    assert np.array_equal(masks, again)
    for matcher, mask in zip(matchers, masks, strict=True):
        assert allowed(matcher) == {token for token in range(VOCABULARY) if mask[token // 32] >> token % 32 & 1}


def test_a_prefill_is_the_beginning_of_the_answer() -> None:
    matcher = COMPILER.matcher(grammar.json_schema(BOX), '{"name": "日')
    for token in TOKENIZER.encode('本"}'):
        assert token in allowed(matcher)
        matcher.consume(token)
    assert matcher.complete or TOKENIZER.stop_ids <= allowed(matcher)
    with pytest.raises(UserError, match=r"^E_GRAMMAR: the last message does not begin an answer"):
        COMPILER.matcher(grammar.json_schema(BOX), '{"nome"')


def test_a_token_that_is_not_allowed_fails_the_answer() -> None:
    matcher = COMPILER.matcher(grammar.json_object())
    with pytest.raises(UserError, match=r"^E_GRAMMAR: no answer fits the grammar, or it became too complex"):
        matcher.consume(*TOKENIZER.encode("x"))
    with pytest.raises(UserError, match="E_GRAMMAR"):  # it would let the answer end here
        allowed(matcher)


def test_a_grammar_without_any_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"^E_GRAMMAR: no answer fits"):
        allowed(COMPILER.matcher(grammar.regex(r"[^\s\S]")))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CIRCLE: dict[str, Any] = {"type": "array"}
CIRCLE["items"] = CIRCLE

REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "uses not, which"),
    ({"if": {}, "then": {}}, "uses if and then, which"),
    ({"type": "array", "items": {"uniqueItems": True}}, "uses uniqueItems, which"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "uses oneOf, which"),
    ({"type": "string", "format": "zork"}, "uses format, which"),
    ({"type": "zork"}, "uses type, which"),
    ({"$ref": "https://example.org/schema.json"}, r"uses \$ref, which"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "uses x-guidance, which"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "no value fits json_schema"),
    (False, "no value fits json_schema"),
    ({"type": "string", "pattern": "("}, "json_schema cannot be followed"),
    ({"$ref": "#/$defs/nowhere"}, "json_schema cannot be followed"),
    (nested(2000), "may have 64 levels"),
    (CIRCLE, "may have 64 levels"),
    ({"enum": ["x" * 100] * 700}, "may have 64 KB"),
    ({"enum": [0] * 70_000}, "may have 64 KB"),
    (json.dumps({"enum": ["日" * 100] * 300}, ensure_ascii=False), "may have 64 KB"),
    ("[" * 60_000, "json_schema is not JSON"),
    ('{"type": "integer"', "json_schema is not JSON"),
    ('{"const": ' + "9" * 5000 + "}", "json_schema is not JSON"),
    ("3", "must be an object"),
    (None, "must be an object"),
    ([{"type": "integer"}], "must be an object"),
    ({"const": float("nan")}, "a value that is not JSON"),
    ({"const": object()}, "a value that is not JSON"),
    ({"const": "\ud800"}, "half a character"),
    ({1: {}}, "a name that is no text"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=range(len(REFUSED)))
def test_a_schema_that_cannot_be_followed_is_refused_in_our_words(schema: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^E_GRAMMAR: .*{words}") as refused:
        COMPILER.matcher(grammar.json_schema(schema))
    assert len(refused.value.message) < 120 and refused.value.message.endswith(".")
    assert not any(word in refused.value.message for word in ("zork", "example", "nowhere", "Unimplemented", "regex"))
    assert refused.value.__cause__ is None and refused.value.__suppress_context__ is (
        refused.value.__context__ is not None
    )


def test_a_property_may_have_any_name() -> None:
    names = ["not", "if", "x-guidance", "oneOf", "$ref"]
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in names}, "required": names}
    assert fits(grammar.json_schema(schema), json.dumps(dict.fromkeys(names, True)))
    assert COMPILER.matcher(grammar.json_schema(nested(30)))


@pytest.mark.parametrize("pattern", ["[", "(?=a)b", r"\bfoo", "(a|b", "x" * 70_000, 5, "\ud800"])
def test_a_regular_expression_that_cannot_be_followed_is_refused(pattern: Any) -> None:
    with pytest.raises(UserError, match=r"^E_GRAMMAR: .*regular expression") as refused:
        COMPILER.matcher(grammar.regex(pattern))
    assert "foo" not in refused.value.message and "parse" not in refused.value.message


@pytest.mark.parametrize("texts", ["yes", [], [""], ["a", 5], [f"{n}" for n in range(1025)], ["x" * 70_000], None, 5])
def test_a_choice_of_nothing_is_refused(texts: Any) -> None:
    with pytest.raises(UserError, match=r"^E_GRAMMAR: .*choice"):
        grammar.choice(texts)


def test_hostile_grammars_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only seems harmless takes its bounded share of steps, and then either goes on or fails this answer alone."""
    hostile = [
        grammar.regex("(a?){500}a{500}"),
        grammar.regex("(.*a){40}"),
        grammar.json_schema({"type": "string", "pattern": "^(a|aa)+$", "minLength": 200, "maxLength": 100_000}),
        grammar.json_schema({"type": "array", "minItems": 20_000}),
        grammar.json_schema({"anyOf": [{"type": "object", "required": [f"k{n}"]} for n in range(300)]}),
        grammar.json_schema({"enum": [f"v{n}" for n in range(6000)]}),
    ]
    for each in hostile:
        try:
            matcher = COMPILER.matcher(each)
            for _ in range(60):
                going_on = sorted(allowed(matcher) - TOKENIZER.stop_ids)
                if not going_on:
                    break
                matcher.consume(going_on[0])
        except UserError as error:
            assert error.code == "E_GRAMMAR"


def test_a_refusal_names_what_the_caller_calls_it() -> None:
    for name in ("response_format", "structured_outputs", None):
        with pytest.raises(UserError) as caught:
            COMPILER.matcher(dataclasses.replace(grammar.regex("(?=a)b"), parameter=name))
        assert (caught.value.code, caught.value.parameter) == ("E_GRAMMAR", name)
        with pytest.raises(UserError) as caught:
            COMPILER.matcher(dataclasses.replace(grammar.json_object(), parameter=name)).consume(*TOKENIZER.encode("x"))
        assert (caught.value.code, caught.value.parameter) == ("E_GRAMMAR", name)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llguidance")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    wanted = grammar.json_object()  # the value needs no library
    with pytest.raises(UserError, match=r'^E_GRAMMAR: .*pip install "kimi-vl\[structured\]"'):
        GrammarCompiler(TOKENIZER, VOCABULARY).matcher(wanted)
