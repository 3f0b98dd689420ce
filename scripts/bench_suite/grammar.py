"""`scripts/bench grammar`: microseconds of a grammar's mask, at the size of the published vocabulary.

The vocabulary is made here: pieces of words, digits, punctuation and characters of several scripts. The promise is a
median of 100 microseconds for a mask; beside it stand what the first grammar of a process and each new one cost, and
the masks of 64 sequences at once.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kimi_vl.engine import sampling
from kimi_vl.text import grammar
from kimi_vl.text.grammar import GrammarCompiler, Matcher
from kimi_vl.text.tokenizer import Tokenizer

from . import conditions

PROMISE = 100.0
SPECIAL = 256
BATCH = 64
RESULT = {
    "type": "object",
    "properties": {
        "count": {"type": "integer"},
        "label": {"type": "string"},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "boxes": {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "maxItems": 4}},
    },
    "required": ["count", "label", "kind", "boxes"],
    "additionalProperties": False,
}  # fmt: skip
BOUNDED = {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 8}
GRAMMARS = {
    "an object": grammar.json_schema(RESULT),
    "bounded strings": grammar.json_schema(BOUNDED),
    "any object": grammar.json_object(),
    "a choice": grammar.choice(["cat", "dog", "bird"]),
}


def vocabulary(size: int) -> Tokenizer:
    """A tokenizer of ``size`` ids, 256 of them special."""
    rng = random.Random(0)
    pieces = {bytes([value]): None for value in range(256)}
    letters, marks, others = "etaoinshrdlucmfwypvbgkjqxz", "\"{}[]:,.-_/\\'()<>= \n", "的一是在不了日本語éüßжд😀ก"
    while len(pieces) < size - SPECIAL:
        kind = rng.random()
        if kind < 0.75:
            weights = range(len(letters), 0, -1)
            word = "".join(rng.choices(letters, weights, k=rng.randrange(2, 10)))
            piece = rng.choice(["", " "]) + rng.choice([word, word.title()])
        elif kind < 0.8:
            piece = "".join(rng.choices("0123456789", k=rng.randrange(2, 4)))
        elif kind < 0.9:
            piece = "".join(rng.choices(marks, k=rng.randrange(2, 7)))
        else:
            piece = "".join(rng.choices(others, k=rng.randrange(1, 5)))
        pieces[piece.encode()] = None
    return Tokenizer({piece: rank for rank, piece in enumerate(pieces)})


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def walk(compiler: GrammarCompiler, wanted: grammar.Grammar, size: int, tokens: int) -> list[float]:
    """Seconds of the mask before each of ``tokens`` tokens, drawn evenly from those that are allowed."""
    rng, times = random.Random(1), []
    matcher = compiler.matcher(wanted)
    masks = np.zeros((1, -(-size // 32)), dtype=np.int32)
    while len(times) < tokens:
        taken, _ = seconds(lambda: Matcher.fill([matcher], masks))  # noqa: B023
        times.append(taken)
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8)[0], bitorder="little"))
        going_on = allowed[allowed < size - SPECIAL]
        if len(going_on):
            matcher.consume(int(rng.choice(going_on)))
        if not len(going_on) or matcher.complete:
            matcher = compiler.matcher(wanted)
    return times


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench grammar", description="Microseconds of a grammar's mask.")
    parser.add_argument("--ids", type=int, default=163_840, help="size of the vocabulary (163840)")
    parser.add_argument("--tokens", type=int, default=500, help="tokens of each grammar's answers (500)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    compiler = GrammarCompiler(vocabulary(options.ids), options.ids)
    first, _ = seconds(lambda: compiler.matcher(grammar.json_object()))
    print(conditions.processor())
    print(f"vocabulary of {options.ids} ids: {first:.2f} s once; the median mask is to take {PROMISE:.0f} us")
    print(f"{'':18}{'new, ms':>10}{'median, us':>12}{'95 %':>10}{'most':>10}{f'{BATCH} at once':>14}")
    figures: dict[str, dict[str, float]] = {}
    for name, wanted in GRAMMARS.items():
        new = statistics.median(seconds(lambda: compiler.matcher(wanted))[0] for _ in range(9))  # noqa: B023
        times = sorted(walk(compiler, wanted, options.ids, options.tokens))
        matchers = [compiler.matcher(wanted) for _ in range(BATCH)]
        masks = np.zeros((BATCH, -(-options.ids // 32)), dtype=np.int32)
        together = statistics.median(seconds(lambda: Matcher.fill(matchers, masks))[0] for _ in range(9))  # noqa: B023
        found = [
            new * 1e3,
            *(each * 1e6 for each in (times[len(times) // 2], times[len(times) * 95 // 100], times[-1])),
        ]
        row = dict(zip(("new_ms", "median_us", "p95_us", "most_us"), found, strict=True))
        figures[name] = {key: round(value, 2) for key, value in row.items()} | {"batch_us": round(together * 1e6, 1)}
        print(f"{name:18}{found[0]:10.2f}{found[1]:12.1f}{found[2]:10.1f}{found[3]:10.1f}{together * 1e6:14.1f}")
    logits, mask = torch.randn(1, options.ids), np.full(-(-options.ids // 32), 5, dtype=np.int32)
    applied = statistics.median(seconds(lambda: sampling._change(logits, [None], [mask]))[0] for _ in range(99)) * 1e6
    print(f"putting one mask on logits of a CPU: {applied:.1f} us")
    print(json.dumps({"benchmark": "grammar", "ids": options.ids, "once_s": round(first, 3), "grammars": figures,
                      "applied_us": round(applied, 1), "promise_us": PROMISE, "machine": conditions.processor(),
                     }))  # fmt: skip
    return 0
