"""`scripts/bench text`: microseconds a token for everything between a sampled token and the text that leaves.

The floor is a call of an empty function for each token; the promise is 20 microseconds for all steps together.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kimi_vl.text.stop_sequences import StopSequences
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN, RepetitionDetector, ThinkingSplitter
from kimi_vl.text.tokenizer import TextStream, Tokenizer

from . import conditions

DEMO = Path(__file__).parents[2] / "kimi_vl" / "demo"
PROMISE = 20.0
Step = Callable[[int], object]

SENTENCES = {
    "English": "Let me look at object {n}: it is a red circle, {n} pixels wide, so the sum grows to {m}. ",
    "digits": "{n} + {m} = {s}\n",
    "Chinese": "让我看看第{n}个物体：它是一个红色的圆，宽度为{m}像素。",
    "emoji": "🧑‍🚀{n}👨‍👩‍👧‍👦🇩🇪👍🏽",
}


def text_of(kind: str, characters: int) -> str:
    """Thinking and an answer, half of the text each, without a loop in it."""
    pieces: list[str] = []
    while sum(map(len, pieces)) < characters // 2:
        n = len(pieces)
        pieces.append(SENTENCES[kind].format(n=n, m=n * 7919 % 1000, s=n + n * 7919 % 1000))
    half = "".join(pieces)
    return THINK_OPEN + half + THINK_CLOSE + half


def steps(tokenizer: Tokenizer) -> dict[str, Callable[[], Step]]:
    """What is measured; each call begins a new request."""

    def nothing() -> Step:
        return lambda token: None

    def bytes_to_text() -> Step:
        return TextStream(tokenizer).push

    def thinking() -> Step:
        stream, splitter = TextStream(tokenizer), ThinkingSplitter()
        return lambda token: splitter.push(stream.push(token))

    def whole(*stops: str) -> Step:
        stream, splitter, ends, loop = (
            TextStream(tokenizer),
            ThinkingSplitter(),
            StopSequences(stops),
            RepetitionDetector(),
        )

        def step(token: int) -> None:
            for section, piece in splitter.push(stream.push(token)):
                if section == "answer":
                    ends.push(piece)
            if splitter.section != "answer":
                loop.push(token)

        return step

    def looping() -> Step:
        return RepetitionDetector().push

    return {
        "floor": nothing,
        "text": bytes_to_text,
        "text, split": thinking,
        "loops": looping,
        "all": whole,
        "all, 4 stops": lambda: whole("\n\nUser:", "END", "Observation:", "</s>"),
    }


def microseconds(begin: Callable[[], Step], ids: Sequence[int], rounds: int) -> float:
    """Processor time a token, the least of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        step = begin()
        began = time.process_time()
        for token in ids:
            step(token)
        best = min(best, time.process_time() - began)
    return best / len(ids) * 1e6


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench text", description="Microseconds a token, beside the promise.")
    parser.add_argument("--folder", type=Path, default=DEMO, help="a checkpoint with the tokenizer to use (the demo)")
    parser.add_argument("--characters", type=int, default=40_000, help="length of each text (40000)")
    parser.add_argument("--rounds", type=int, default=5, help="the least of so many is taken (5)")
    options = parser.parse_args(arguments)
    tokenizer = Tokenizer.from_directory(options.folder)
    measured = steps(tokenizer)
    print(conditions.processor())
    print(f"microseconds a token; all together are to stay below {PROMISE:.0f}")
    print(f"{'':10}{'tokens':>8}" + "".join(f"{name:>14}" for name in measured))
    figures: dict[str, dict[str, Any]] = {}
    for kind in SENTENCES:
        ids = tokenizer.encode(text_of(kind, options.characters))
        row = {name: round(microseconds(begin, ids, options.rounds), 2) for name, begin in measured.items()}
        print(f"{kind:10}{len(ids):8}" + "".join(f"{value:14.2f}" for value in row.values()), flush=True)
        figures[kind] = {"tokens": len(ids), "microseconds": row}
    worst = max(row["microseconds"][name] for row in figures.values() for name in measured)
    print(
        json.dumps(
            {
                "benchmark": "text",
                "promise_microseconds": PROMISE,
                "worst_microseconds": worst,
                "texts": figures,
                "folder": options.folder.name,
                "machine": conditions.processor(),
                "python": platform.python_version(),
            },
            ensure_ascii=False,
        )
    )
    return 0
