"""`kimi-vl ask` refuses what no model takes before it loads one, by the same bounds as a request."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kimi_vl.cli import ask
from kimi_vl.errors import UserError
from kimi_vl.parameters import MAX_LENGTH_TOKENS, MAX_SEED, MAX_TOP_K
from kimi_vl.text.stop_sequences import MAX_CHARACTERS, MAX_SEQUENCES

PICTURE = str(Path(__file__).parents[2] / "images" / "math_problem.png")


class Loaded(Exception):
    """The model would be loaded now."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def load(*_):
        raise Loaded

    monkeypatch.setattr(ask, "_load", load)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    ask.add_arguments(parser)
    return ask.run(parser.parse_intermixed_args(["What is this?", *arguments]))  # as the command does


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "2.1"],
        ["--temperature=-0.1"],
        ["--temperature", "nan"],
        ["--top-p", "1.5"],
        ["--top-k=-1"],
        ["--top-k", str(MAX_TOP_K + 1)],
        ["--max-tokens", "0"],
        ["--max-tokens", str(MAX_LENGTH_TOKENS + 1)],
        ["--thinking-budget=-1"],
        ["--seed=-1"],
        ["--seed", str(MAX_SEED + 1)],
        ["--stop", "x" * (MAX_CHARACTERS + 1)],
        [f"--stop={number}" for number in range(MAX_SEQUENCES + 1)],
        ["--fps", "2"],
        ["--max-frames", "2"],
        ["--start", "0"],
        ["--end", "1"],
        ["--pages", "1"],
        [PICTURE, "--pages", "1"],
        [PICTURE, "--boxes", "out.png", "--thinking", "only"],
        [PICTURE, "--boxes", "out.png", "--estimate"],
    ],
    ids=lambda arguments: Path(arguments[0]).name[:20],
)
def test_what_no_model_takes_is_refused_before_one_is_loaded(arguments):
    with pytest.raises(UserError) as refused:
        run(*arguments)
    assert refused.value.code == "E_PARAMETER"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--temperature", "0", "--top-p", "0", "--top-k", "0", "--max-tokens", "1", "--thinking-budget", "0"],
        ["--temperature", "2", "--top-p", "1", "--top-k", str(MAX_TOP_K), "--max-tokens", str(MAX_LENGTH_TOKENS)],
        ["--seed", "0"],
        ["--seed", str(MAX_SEED), "--stop", "x" * MAX_CHARACTERS],
        [f"--stop={number}" for number in range(MAX_SEQUENCES)],
        [PICTURE, "--boxes", "out.png", "--thinking", "only", "--json"],  # which has the whole answer
    ],
    ids=str,
)
def test_the_bounds_themselves_pass(arguments):
    with pytest.raises(Loaded):
        run(*arguments)
