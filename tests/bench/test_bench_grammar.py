"""`scripts/bench grammar` measures every grammar, and ends with its figures as JSON."""

from __future__ import annotations

import json

import pytest
from bench_suite import grammar


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert grammar.main(["--ids", "1280", "--tokens", "20"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["grammars"].keys() == grammar.GRAMMARS.keys()
    for row in figures["grammars"].values():
        assert 0 < row["median_us"] <= row["p95_us"] <= row["most_us"]


def test_the_vocabulary_has_as_many_ids_as_it_says() -> None:
    tokenizer = grammar.vocabulary(2048)
    assert tokenizer.num_ranks == 2048 - grammar.SPECIAL
    assert tokenizer.decode(tokenizer.encode('{"日本": 1}')) == '{"日本": 1}'
