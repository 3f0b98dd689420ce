"""`scripts/bench text` measures every step on every text, and ends with its figures as JSON."""

from __future__ import annotations

import json

import pytest
from bench_suite import text

from kimi_vl.text.thinking import RepetitionDetector, ThinkingSplitter
from kimi_vl.text.tokenizer import TextStream, Tokenizer

TOKENIZER = Tokenizer.from_directory(text.DEMO)


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert text.main(["--characters", "200", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["texts"].keys() == text.SENTENCES.keys()
    for row in figures["texts"].values():
        assert row["tokens"] > 0
        assert row["microseconds"].keys() == text.steps(TOKENIZER).keys()
    assert figures["worst_microseconds"] >= max(row["microseconds"]["all"] for row in figures["texts"].values())


@pytest.mark.parametrize("kind", text.SENTENCES)
def test_the_texts_are_what_a_model_would_say(kind: str) -> None:
    ids = TOKENIZER.encode(text.text_of(kind, 5000))
    stream, splitter, loop = TextStream(TOKENIZER), ThinkingSplitter(), RepetitionDetector()
    sections = {section for index in ids for section, _ in splitter.push(stream.push(index))}
    assert sections == {"reasoning", "answer"}
    assert not any(loop.push(index) for index in ids)
