"""Command lines of ``kimi-vl``: options and files in any order, and the usage of the command that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from kimi_vl.cli.main import _parser


@pytest.mark.parametrize(
    "given",
    [
        ["--seed", "-3", "q", "a.png", "b.mp4"],
        ["q", "a.png", "b.mp4", "--seed", "-3"],
        ["q", "--seed", "-3", "a.png", "b.mp4"],
        ["q", "a.png", "--seed", "-3", "b.mp4"],
        ["q", "--seed", "-3", "--", "a.png", "b.mp4"],
    ],
)
def test_options_may_stand_anywhere(given):
    parsed = _parser().parse_args(["ask", *given])
    assert (parsed.prompt, parsed.files, parsed.seed) == ("q", [Path("a.png"), Path("b.mp4")], -3)


@pytest.mark.parametrize(
    "given", [["pack", "a", "--quantize", "int8", "b.tar"], ["batch", "--ordered", "a", "--seed", "1", "b"]]
)
def test_options_of_other_commands_may_stand_anywhere(given):
    _parser().parse_args(given)


@pytest.mark.parametrize("given", [["ask", "q", "--wrong"], ["check", "extra"], ["batch", "--ordered"], ["pack", "a"]])
def test_a_wrong_command_line_shows_the_usage_of_its_command(given, capsys):
    with pytest.raises(SystemExit, match="2"):
        _parser().parse_args(given)
    assert capsys.readouterr().err.startswith(f"usage: kimi-vl {given[0]} ")
