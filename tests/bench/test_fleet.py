"""`scripts/bench fleet`: the simulation against arithmetic by hand, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_suite import fleet
from bench_suite.fleet import Arrival, Cost, Fleet, Simulation

from kimi_vl.engine.engine import EngineOptions

COST = Cost(0.01, 0.001, 0.0001)
OPTIONS = EngineOptions()


def simulate(trace: list[Arrival], chosen: Fleet = Fleet(), pages: int = 1000, **options: Any) -> fleet.Outcome:
    return Simulation(chosen, COST, pages, EngineOptions(**options)).run(trace)


def test_one_request_takes_its_steps() -> None:
    found = simulate([Arrival(5.0, "a", 100, 3)])
    first = 0.01 + 100 * 0.0001
    assert found.first == [pytest.approx(first)] and found.whole == [pytest.approx(first + 2 * (0.01 + 0.001))]


def test_a_long_prompt_takes_several_steps() -> None:
    found = simulate([Arrival(0.0, "a", 4500, 1)])
    assert found.first == [pytest.approx(3 * 0.01 + 4500 * 0.0001)]  # of 2,048 tokens at the most


def test_a_second_request_waits_for_the_step_that_runs() -> None:
    """It comes 1 ms into a prompt's step of 20 ms, and its own prompt shares a step with a token of the first."""
    found = simulate([Arrival(0.0, "a", 100, 2), Arrival(0.001, "b", 100, 1)])
    assert found.first == [pytest.approx(0.02), pytest.approx(0.02 + 0.01 + 0.001 + 0.01 - 0.001)]


def test_what_the_queue_does_not_hold_is_refused() -> None:
    found = simulate([Arrival(0.0, "a", 32, 9)] * 6, max_num_seqs=2, max_waiting=3)
    assert found.refused == 6 - 4, "one is being computed when the next one comes, three wait"
    assert len(found.whole) == 4


def test_sessions_that_stay_hit_their_prefixes() -> None:
    trace = fleet.make_trace(3, sessions=20, turns=6, rate=5, prompt=64, answer=4)
    by_session, in_turn = (simulate(trace, Fleet(4, affinity)) for affinity in (True, False))
    # Each turn has all but the last page of the turn before: 0 + (1 + … + 5) of 1 + … + 6 turns.
    assert by_session.cached / (by_session.cached + by_session.computed) == pytest.approx(15 / 21)
    assert in_turn.cached < by_session.cached
    assert in_turn.cached + in_turn.computed == by_session.cached + by_session.computed


def test_a_replica_more_answers_after_its_start() -> None:
    trace = [Arrival(number * 0.05, str(number), 1000, 20) for number in range(600)]
    chosen = Fleet(1, True, 3, target_ongoing=8, upscale_delay_s=5, downscale_delay_s=2, start_s=4)
    found = simulate(trace, chosen, max_waiting=10_000)
    alone = simulate(trace, Fleet(1), max_waiting=10_000)
    assert found.most_replicas == 3 and max(found.whole) < max(alone.whole)
    # Nobody is quicker before there is another replica: 1 s to the first look, 5 s of patience, 4 s to start.
    assert found.first[:50] == alone.first[:50]
    late = simulate(trace, Fleet(1, True, 3, 8, upscale_delay_s=5, downscale_delay_s=2, start_s=20), max_waiting=10_000)
    assert max(late.first) > max(found.first)


def test_replicas_are_paid_for_until_they_end() -> None:
    trace = [Arrival(0.0, "a", 32, 1), Arrival(100.0, "b", 32, 1)]
    assert simulate(trace, Fleet(2)).replica_seconds == pytest.approx(2 * (100 + 0.01 + 32 * 0.0001))


def test_the_cost_of_steps_is_found_again() -> None:
    steps = [(d, p, COST.seconds(d, p)) for d, p in [(0, 100), (5, 0), (64, 0), (3, 900), (1, 0)]]
    found = Cost.fitted(steps)
    assert (found.step, found.decode, found.prefill) == pytest.approx((0.01, 0.001, 0.0001))
    assert Cost.fitted([(1, 0, 0.5), (10, 0, 0.4), (0, 10, 0.5)]).decode == 0, "more cannot cost less"


@pytest.mark.parametrize(
    "line", ["", "[]", '{"at": 1}', '{"at": -1, "session": "a", "prompt": 1, "answer": 1}', '{"at": 0, "prompt": "x"}']
)
def test_a_trace_that_is_not_understood_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 2, "session": "a", "prompt": 10, "answer": 3}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        fleet.read_trace(path)


def test_a_trace_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"at": at, "session": 1, "prompt": 10, "answer": 3}) + "\n" for at in (2, 1)))
    assert fleet.read_trace(path) == [Arrival(1.0, "1", 10, 3), Arrival(2.0, "1", 10, 3)]


@pytest.mark.nightly
def test_the_prediction_is_checked_on_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet.main(["--sessions", "6", "--turns", "2", "--check-requests", "8", "--replicas", "1", "2"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    check = report["check"]
    assert check["measured"]["answered"] == check["predicted"]["answered"] == check["requests"] == 8
    assert check["measured"]["prefix_hit_ratio"] == pytest.approx(check["predicted"]["prefix_hit_ratio"], abs=0.1)
    assert report["cost"]["step_s"] > 0
    assert {"1 replicas, by session", "2 replicas, in turn", "1 to 2 replicas"} <= report.keys()
