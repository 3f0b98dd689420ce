"""Structured answers: a grammar decides which tokens may follow, through llguidance.

:func:`json_schema`, :func:`json_object`, :func:`regex` and :func:`choice` make a :class:`Grammar`, a value that knows
no model; a :class:`GrammarCompiler` makes of it the :class:`Matcher` of one answer. What a caller gets wrong raises
:class:`~kimi_vl.errors.UserError` (E_GRAMMAR) in words of our own: those of the library quote its state.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np

from ..errors import UserError
from .tokenizer import Tokenizer

MAX_BYTES = 64 << 10  # of a schema, a regular expression, or all texts of a choice
MAX_DEPTH = 64
MAX_CHOICES = 1024
MAX_LEXER_STATES = 50_000  # of about 1.5 KB; the library's own limit is five times as many

# JSON may be on one line or indented, and does not go on for ever with white space.
WHITESPACE = r"(\n {0,64}| )?"

# Keywords that are refused by their name.
_KEYWORDS = {
    "$dynamicRef", "$recursiveRef", "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if",
    "maxContains", "minContains", "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties",
    "uniqueItems",
}  # fmt: skip
_NAMED = {"oneOf constraints": "oneOf", "Unknown format": "format", "Invalid type": "type", "Resource": "$ref"}


@dataclass(frozen=True)
class Grammar:
    """What an answer may look like; ``source`` is what the functions of this module make of a caller's value.

    ``parameter`` is the caller's own name for it, which refusals carry.
    """

    kind: Literal["json_schema", "regex", "choice"]
    source: str
    parameter: str | None = field(default=None, compare=False)


def json_schema(schema: Mapping[str, Any] | bool | str) -> Grammar:
    """Answers that are JSON and fit a JSON schema, given as a mapping or as JSON text."""
    if isinstance(schema, str):
        _check_size(schema, "json_schema")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise UserError("E_GRAMMAR", "json_schema is not JSON; change it.") from None
    if not isinstance(schema, Mapping | bool):
        raise UserError("E_GRAMMAR", "json_schema must be an object; change it.")
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    _check_nodes(schema)
    try:
        source = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        _check_size(source, "json_schema")
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("E_GRAMMAR", "json_schema holds a value that is not JSON; change it.") from None
    return Grammar("json_schema", source)


def json_object() -> Grammar:
    """Answers that are any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """Answers that a regular expression matches as a whole: Rust's syntax, without look-around."""
    if not isinstance(pattern, str):
        raise UserError("E_GRAMMAR", "a regular expression must be a text; change it.")
    _check_size(pattern, "the regular expression")
    return Grammar("regex", pattern)


def choice(texts: Sequence[str]) -> Grammar:
    """Answers that are one of ``texts``."""
    if (
        isinstance(texts, str)
        or not isinstance(texts, Sequence)
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise UserError("E_GRAMMAR", "a choice must be a list of texts that are not empty; change it.")
    if not 0 < len(texts) <= MAX_CHOICES:
        raise UserError("E_GRAMMAR", f"a choice must have 1 to {MAX_CHOICES} texts; change it.")
    source = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts))
    _check_size(source, "the choice")
    return Grammar("choice", source)


def _check_size(text: str, name: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError("E_GRAMMAR", f"{name} holds half a character; change it.") from None
    if size > MAX_BYTES:
        raise UserError("E_GRAMMAR", f"{name} may have {MAX_BYTES // 1024} KB; shorten it.")


def _check_nodes(schema: Any) -> None:
    """Depth and names, without recursion: a schema may be nested as deeply as its author likes, or in a circle."""
    if isinstance(schema, Mapping) and "x-guidance" in schema:  # the library's own, which it would obey
        raise _unsupported(["x-guidance"])
    nodes = [(schema, 1)]
    count = 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_BYTES:  # each node takes a byte at least
            bound = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_BYTES // 1024} KB"
            raise UserError("E_GRAMMAR", f"json_schema may have {bound}; simplify it.")
        if isinstance(node, Mapping):
            if not all(isinstance(name, str) for name in node):
                raise UserError("E_GRAMMAR", "json_schema has a name that is no text; change it.")
            nodes += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, list | tuple):
            nodes += [(value, depth + 1) for value in node]


def _unsupported(names: Sequence[str]) -> UserError:
    return UserError("E_GRAMMAR", f"json_schema uses {' and '.join(names)}, which is not supported; leave it out.")


class GrammarCompiler:
    """Makes the matchers of one tokenizer's answers. Any number of threads may ask at once."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """``vocab_size`` is how many logits the model gives."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._library_tokenizer: Any = None  # made for the first grammar: it takes a second for a large vocabulary

    def matcher(self, grammar: Grammar, prefill: str = "") -> Matcher:
        """A matcher at the beginning of an answer, or after ``prefill``, which the answer continues.

        Raises :class:`~kimi_vl.errors.UserError` (E_GRAMMAR), also where llguidance is not installed.
        """
        try:
            return Matcher(self._inner(grammar, prefill), grammar.parameter)
        except UserError as error:
            raise UserError(error.code, error.message, grammar.parameter) from None

    def _inner(self, grammar: Grammar, prefill: str) -> Any:
        library = _library()
        make = library.LLMatcher
        if grammar.kind == "json_schema":
            options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, "lenient": False}
            source = make.grammar_from_json_schema(grammar.source, overrides=options | {"coerce_one_of": False})
        elif grammar.kind == "regex":
            source = make.grammar_from_regex(grammar.source)
        else:
            source = make.grammar_from_lark(grammar.source)
        limits = library.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        inner = make(self._tokenizer_of(library), source, log_level=0, limits=limits)
        if inner.is_error():
            raise _refusal(grammar, inner.get_error())
        ids = self._tokenizer.encode(prefill)
        if inner.try_consume_tokens(ids) != len(ids):
            raise UserError(
                "E_GRAMMAR", "the last message does not begin an answer that fits the grammar; change one of them."
            )
        return inner

    def _tokenizer_of(self, library: ModuleType) -> Any:
        with self._lock:
            if self._library_tokenizer is None:
                self._library_tokenizer = library.LLTokenizer(
                    _Vocabulary(self._tokenizer, self._vocab_size),
                    n_vocab=self._vocab_size,
                    eos_token=sorted(self._tokenizer.stop_ids),
                    slices=library.LLTokenizer.json_slices(),
                )
            return self._library_tokenizer


class Matcher:
    """Follows one answer, token by token. For one thread at a time."""

    _executor: Any = None  # of all matchers, made where several masks are filled at once

    def __init__(self, inner: Any, parameter: str | None = None):
        self._inner, self._parameter = inner, parameter

    def consume(self, token: int) -> None:
        """Go on by a token that the mask allows."""
        self._inner.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether the answer fits and nothing may follow it."""
        return self._inner.is_stopped()

    @staticmethod
    def fill(constraints: Sequence[Matcher], masks: np.ndarray) -> None:
        """See :meth:`kimi_vl.engine.sampling.Constraint.fill`. Other threads of Python run meanwhile."""
        filling = _library().numpy
        if len(constraints) == 1:
            filling.fill_next_token_bitmask(constraints[0]._inner, masks, 0)
        else:
            if Matcher._executor is None:
                Matcher._executor = _library().LLExecutor(min(8, os.cpu_count() or 1))
            matchers = [(each._inner, index) for index, each in enumerate(constraints)]
            filling.fill_next_token_bitmask_par(Matcher._executor, matchers, masks)
        for each in constraints:
            each._check()

    def _check(self) -> None:
        """A matcher that has failed lets an answer end anywhere."""
        if self._inner.is_error():
            sentence = "no answer fits the grammar, or it became too complex; simplify it."
            raise UserError("E_GRAMMAR", sentence, self._parameter)


class _Vocabulary:
    """The tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.im_end_id, None
        self.tokens = [tokenizer.token_bytes(token) for token in range(min(tokenizer.size, vocab_size))]
        self.special_token_ids = list(range(tokenizer.num_ranks, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def _library() -> ModuleType:
    try:
        import llguidance
        import llguidance.numpy
    except ImportError:
        raise UserError(
            "E_GRAMMAR", 'structured answers need llguidance; install it with: pip install "kimi-vl[structured]".'
        ) from None
    return llguidance


def _refusal(grammar: Grammar, said: str) -> UserError:
    """What to tell a caller of a library's error, which is not shown."""
    if grammar.kind == "choice":
        return UserError("E_GRAMMAR", "the choice cannot be followed; give fewer or shorter texts.")
    if grammar.kind == "regex":
        return UserError("E_GRAMMAR", "the regular expression is not one that can be followed; simplify it.")
    found = re.match(r"Unimplemented keys: \[(.*)\]", said)
    names = [name for name in re.findall(r'"([^"]*)"', found.group(1)) if name in _KEYWORDS] if found else []
    names = names or [name for beginning, name in _NAMED.items() if said.startswith(beginning)]
    if names:
        return _unsupported(names)
    if said.startswith("Unsatisfiable schema"):
        return UserError("E_GRAMMAR", "no value fits json_schema; change it.")
    return UserError("E_GRAMMAR", "json_schema cannot be followed; correct or simplify it.")
