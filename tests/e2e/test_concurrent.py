"""`ConcurrentPredictor` behind Cog's server: many requests at once, each as alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cog_local.server import Server
from tests.e2e.conftest import DEMO, data_url, picture


@pytest.fixture(scope="module")
def concurrent() -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO}, concurrent=True) as running:
        yield running


def request(number: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {"seed": number, "temperature": 1.0, "max_length_tokens": 60, "output_format": "json"}
    if number % 3 == 0:
        return inputs | {"prompt": "What do you see?", "image": data_url(picture(("red", "blue")[number % 2]))}
    if number % 7 == 0:
        return inputs | {"prompt": " "}
    return inputs | {"prompt": f"What is {number} + 3?"}


def outcome(server: Server, number: int) -> tuple[str, str]:
    answer = server.client.predict(request(number))
    return answer["status"], "".join(answer["output"]) if answer["status"] == "succeeded" else answer["error"]


def test_requests_beside_each_other_are_as_alone(concurrent: Server) -> None:
    alone = [outcome(concurrent, number) for number in range(24)]
    with ThreadPoolExecutor(24) as callers:
        together = list(callers.map(lambda number: outcome(concurrent, number), range(24)))
    assert together == alone
    assert {status for status, _ in alone} == {"succeeded", "failed"}
    for number, (status, text) in enumerate(alone):
        if number % 7 == 0 and number % 3:
            assert status == "failed" and "E_PROMPT_EMPTY" in text
        else:
            assert json.loads(text.splitlines()[-1])["seed"] == number


def test_metrics_go_to_their_own_request(concurrent: Server) -> None:
    with ThreadPoolExecutor(12) as callers:
        answers = list(
            callers.map(
                lambda n: concurrent.client.predict(request(n)),
                [n for n in range(1, 20) if n % 7],
            )
        )
    assert [answer["metrics"]["seed"] for answer in answers] == [n for n in range(1, 20) if n % 7]


def test_the_same_seed_gives_the_same_text_a_hundred_times_beside_others(concurrent: Server) -> None:
    inputs = {"prompt": "What is 4 + 9?", "seed": 11, "temperature": 1.5, "max_length_tokens": 16}
    same = {**inputs, "image": data_url(picture("green"))}

    def text(number: int) -> tuple[int, str]:
        chosen = [same, inputs, {**same, "seed": number}, {**inputs, "prompt": "word " * number}][number % 4]
        return number % 4, "".join(concurrent.client.predict(chosen)["output"])

    alone = {text(0), text(1)}
    with ThreadPoolExecutor(24) as callers:
        together = list(callers.map(text, range(4, 204)))
    assert len([kind for kind, _ in together if kind < 2]) == 100
    assert {(kind, said) for kind, said in together if kind < 2} == alone
    assert len({said for kind, said in together if kind == 2}) > 25, "other seeds give other texts"
