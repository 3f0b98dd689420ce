"""What a person reads when Cog's server ends by itself: a sentence, not a line of its log."""

from __future__ import annotations

import json
import sys

import pytest

from cog_local import server
from tests.weights_world import ROOT

MESSAGE = json.dumps({"level": "INFO", "target": "coglet", "fields": {"message": "Starting HTTP server\n"}})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (MESSAGE, "Starting HTTP server"),
        (json.dumps({"fields": {"message": "Traceback\n  more\nValueError: no\n\n"}}), "ValueError: no"),
        (json.dumps({"fields": {}}), '{"fields": {}}'),
        ("Address already in use", "Address already in use"),
        ("[1]", "[1]"),
        ("  ", ""),
        ("", ""),
    ],
)
def test_the_words_of_a_line(line, words):
    assert server._message(line) == words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("os.kill(0, 9)", "ended with signal 9 (what a machine does that has no memory left); the last that it said: "),
        ("os.kill(os.getpid(), 6)", "ended with signal 6; the last that it said: "),
        ("sys.exit(3)", "ended with status 3; the last that it said: "),
    ],
)
@pytest.mark.parametrize(("last", "words"), [(MESSAGE, "Starting HTTP server"), ("", "nothing")])
def test_a_server_that_ends_by_itself(monkeypatch, end, says, last, words):
    monkeypatch.setattr(server, "LAUNCH", f"import os, sys\nprint({last!r}, flush=True)\n{end}")
    monkeypatch.setattr(server.schema, "write", lambda *_: None)
    with pytest.raises(server.ServerError) as caught, server.Server(ROOT, environment={"PATH": sys.path[0]}):
        pass
    assert str(caught.value) == f"Cog's server {says}{words}"
