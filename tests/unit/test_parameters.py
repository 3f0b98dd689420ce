"""Every parameter at its extremes and in wrong types, by every caller's way in; then another request is answered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import predict
from kimi_vl import parameters, pipeline
from kimi_vl.errors import UserError
from kimi_vl.pipeline import Pipeline

ASK = [{"role": "user", "content": "What is 12 + 30?"}]

# What each parameter may be, what is out of its bounds, and what has the wrong type.
RIGHT: dict[str, list[Any]] = {
    "temperature": [0, 0.0, -0.0, 5e-324, 1e-9, 2, 2.0, 1, np.float16(0.5), torch.tensor(0.5), Fraction(1, 3)],
    "top_p": [0, 1, 5e-324, 1e-300, 0.999999999999, np.float64(0.5), torch.tensor(1)],
    "top_k": [0, 1, 2, 2.0, 163_840, parameters.MAX_TOP_K, 1e6, np.int64(7), np.uint8(255), torch.tensor(3)],
    "max_length_tokens": [1, 2, 3.0, np.int32(5)],
    "thinking_budget": [None, 0, 1, 1.0, 10**30, 1e300, 2**63, np.uint64(2**64 - 1)],
    "seed": [None, 0, 1, 7.0, 2**53 + 1, parameters.MAX_SEED, np.int64(2**63 - 1)],
}  # fmt: skip
OUTSIDE: dict[str, list[Any]] = {
    "temperature": [-1e-300, 2.0000001, 10**400, -(10**400), math.nan, math.inf, -math.inf, np.float32("nan")],
    "top_p": [-1e-300, 1.0000001, 2, 10**400, math.nan, math.inf, torch.tensor(math.nan)],
    "top_k": [-1, parameters.MAX_TOP_K + 1, 2**63, 2**64, 10**19, 10**400, 1e300, np.int8(-1), np.uint64(2**63)],
    "max_length_tokens": [0, -1, parameters.MAX_LENGTH_TOKENS + 1, 2**63, 10**400, 1e300],
    "thinking_budget": [-1, -1.0, -(10**400), np.int64(-(2**63))],
    "seed": [-1, parameters.MAX_SEED + 1, 2**64, 1e19, 10**400, np.uint64(2**63)],
}
NO_NUMBERS: list[Any] = [
    True, False, np.bool_(True), torch.tensor(True), "1", "", b"1", bytearray(b"1"), [], [1], (1,), {}, {"a": 1},
    object(), 1j, np.zeros(2), torch.zeros(2), np.str_("1"), float,
]  # fmt: skip
NO_INTEGERS: list[Any] = [2.5, math.nan, math.inf, -math.inf, 1e-300, Fraction(1, 2), Decimal("NaN"), np.float32(0.5)]
INTEGERS = ("top_k", "max_length_tokens", "thinking_budget", "seed")

WRONG = [
    *((name, value) for name, values in OUTSIDE.items() for value in values),
    *((name, value) for name in RIGHT for value in NO_NUMBERS),
    *((name, value) for name in INTEGERS for value in NO_INTEGERS),
    *((name, None) for name in ("temperature", "top_p", "top_k", "max_length_tokens")),
]


@pytest.fixture(scope="module")
def demo() -> Iterator[Pipeline]:
    loaded = pipeline.load("demo")
    yield loaded
    loaded.close()


@pytest.fixture
def ask(demo: Pipeline, request: pytest.FixtureRequest) -> Any:
    """One request's way in: by the Python interface, or by predict.py, which Cog calls."""

    class Predictor(predict.Predictor):
        def __init__(self) -> None:
            self.pipeline = demo

        def record_metric(self, key: str, value: Any, mode: str = "replace") -> None:
            self.seed = value if key == "seed" else getattr(self, "seed", None)

    inputs: dict[str, Any] = {
        "prompt": ASK[0]["content"], "image": None, "top_p": 1.0, "temperature": 0.6, "max_length_tokens": 4,
        "images": [], "system_prompt": "", "messages": [], "thinking_budget": None, "top_k": 0, "stop_sequences": "",
        "seed": 3, "output_format": "json", "max_tokens": None, "max_new_tokens": None,
        "video": None, "document": None, "fps": 1.0, "max_frames": 64, "start": 0.0, "end": None, "pages": "",
        "json_schema": "",
    }  # fmt: skip

    def by_python(**given: Any) -> int:
        return demo.complete(ASK, **{"max_length_tokens": 4, "seed": 3, **given}).seed

    def by_cog(**given: Any) -> int:
        predictor = Predictor()
        list(predictor.predict(**{**inputs, **given}))
        assert predictor.seed is not None
        return predictor.seed

    return by_cog if request.param == "cog" else by_python


EVERY_WAY = pytest.mark.parametrize("ask", ["python", "cog"], indirect=True)


@EVERY_WAY
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_what_is_within_bounds_is_answered(demo, ask, name, value):
    seed = ask(**{name: value})
    assert demo.healthy() and type(seed) is int
    if name == "seed" and value is not None:
        assert seed == int(value), "the seed that is reported is the one that was asked for, to the last digit"


@EVERY_WAY
def test_what_is_not_is_refused_by_name_and_the_next_request_is_answered(demo, ask):
    for name, value in WRONG:
        with pytest.raises(UserError, match=rf"^E_PARAMETER: {name} must be [^\n]+; change it\.$"):
            ask(**{name: value})
    steps = demo.engine.steps
    assert ask(temperature=0) == 3
    assert demo.healthy() and demo.engine.steps > steps


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
@pytest.mark.parametrize("ask", ["cog"], indirect=True)
def test_other_names_of_the_limit_are_checked_alike(ask, name):
    for value in [*OUTSIDE["max_length_tokens"], *NO_NUMBERS, *NO_INTEGERS]:
        with pytest.raises(UserError, match=f"^E_PARAMETER: {name} must be "):
            ask(**{name: value, "max_length_tokens": 8192})
    assert ask(**{name: 4.0, "max_length_tokens": 8192}) == 3


@pytest.mark.parametrize("value", [0, 1e-9, 3, math.inf, None, 10**400])
def test_a_deadline_is_a_number_of_seconds(demo, value):
    if value in (0, 1e-9):
        with pytest.raises(UserError, match=r"^E_OVERLOADED: "):
            demo.complete(ASK, deadline=value)
    elif value == 10**400:
        with pytest.raises(UserError, match=r"^E_PARAMETER: deadline "):
            demo.complete(ASK, deadline=value)
    else:
        assert demo.complete(ASK, deadline=value, max_length_tokens=2).usage.output_tokens == 2


@pytest.mark.parametrize("value", [-1, math.nan, -math.inf, "3", True, [], object()])
def test_what_is_no_deadline_is_refused(demo, value):
    with pytest.raises(UserError, match=r"^E_PARAMETER: deadline "):
        demo.complete(ASK, deadline=value)


def test_one_stop_sequence_is_a_text_and_not_its_letters(demo):
    whole = demo.complete(ASK, temperature=0).answer
    assert whole == "12 + 30 = 42"
    for given in ("= 4", ["= 4"], ("= 4", "never"), iter(["= 4"]), {"= 4"}):
        done = demo.complete(ASK, temperature=0, stop_sequences=given)
        assert (done.answer, done.finish_reason) == ("12 + 30 ", "stop_sequence")
    for given in (None, "", (), [""]):
        assert demo.complete(ASK, temperature=0, stop_sequences=given).answer == whole


@pytest.mark.parametrize("value", [3, 2.5, True, b"= 4", {"= 4": 1}, [b"= 4"], [None], ["a", 3], [["= 4"]], object()])
def test_what_is_no_list_of_texts_is_refused(demo, value):
    with pytest.raises(UserError, match=r"^E_PARAMETER: stop_sequences must be a list of texts; change it\.$"):
        demo.complete(ASK, stop_sequences=value)
    assert demo.healthy()
