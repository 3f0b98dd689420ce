"""What Prometheus reads: right figures, names that the documents have, and labels that are words of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kimi_vl import __version__
from kimi_vl.engine.engine import EngineStats
from kimi_vl.events import ClosedBy, Done, FinishReason, Usage
from kimi_vl.serving.metrics import PREFIX, Metrics

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations"
STATS = EngineStats(3, 2, 0.25, 70, 900, 100, 400, 1.5, True)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def done(finish: FinishReason = "stop", closed: ClosedBy = "model", output: int = 50, thinking: int = 30) -> Done:
    return Done("thinking", "answer", finish, closed, Usage(100, 40, output, thinking), 7, 0.5, 20.0)


def samples(metrics: Metrics) -> Samples:
    """Every sample, by its name without the prefix and its labels."""
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, tuple(sorted(labels.items()))]


def used() -> Metrics:
    """With a figure for every label."""
    metrics = Metrics("a-model", lambda: STATS)
    metrics.rejects(400, "e_parameter")
    metrics.first_token(0.3)
    metrics.chunk(0.04, 2)
    metrics.queued(0.02)
    ends: list[tuple[FinishReason, ClosedBy]] = [("stop", "model"), ("length", "budget"), ("stop_sequence", "none")]
    for finish, closed in ends:
        metrics.ends(200, 4.0, [done(finish, closed)])
    metrics.ends(499, 1.0, [])
    return metrics


def test_there_are_exactly_the_metrics_that_are_documented() -> None:
    families = {family.name for family in text_string_to_metric_families(used().text().decode())}
    assert families == {
        PREFIX + name
        for name in (
            "build_info cache_usage_ratio engine_healthy engine_steps generation_tokens image_tokens "
            "inter_token_seconds prefix_cache_tokens prompt_tokens queue_seconds request_seconds requests "
            "requests_running requests_waiting thinking_closed time_to_first_token_seconds"
        ).split()
    }
    rows = (OPERATIONS.parent / "operations.md").read_text(encoding="utf-8").partition("| metric |")[2]
    documented = set(re.findall(r"^\| `(kimi_vl_\w+)`", rows.partition("\n\n")[0], re.MULTILINE))
    kinds = {family.name: family.type for family in text_string_to_metric_families(used().text().decode())}
    assert documented == {name + "_total" * (kind == "counter") for name, kind in kinds.items()}


def test_requests_are_counted_by_how_they_ended() -> None:
    metrics = Metrics("a-model", lambda: STATS)
    metrics.ends(200, 1.0, [done("stop")])
    metrics.ends(200, 1.0, [done("stop_sequence")])
    metrics.ends(200, 1.0, [done("stop"), done("length"), done("stop")])
    metrics.ends(499, 1.0, [done("stop")])
    metrics.ends(500, 1.0, [])
    metrics.ends(504, 1.0, [done("stop")])
    metrics.rejects(400, "e_parameter")
    metrics.rejects(400, "whatever a client wrote")
    metrics.rejects(429, "overloaded")
    found = {labels: count for (name, labels), count in samples(metrics).items() if name == "requests_total"}
    assert found == {
        (("finish_reason", "stop"), ("status", "200")): 2,
        (("finish_reason", "length"), ("status", "200")): 1,
        (("finish_reason", "abort"), ("status", "499")): 1,
        (("finish_reason", "error"), ("status", "500")): 1,
        (("finish_reason", "error"), ("status", "504")): 1,
        (("finish_reason", "error"), ("status", "400")): 2,
        (("finish_reason", "error"), ("status", "429")): 1,
    }


def test_tokens_are_counted_once_for_a_prompt_and_for_every_choice() -> None:
    metrics = Metrics("a-model", lambda: STATS)
    metrics.ends(200, 1.0, [done(output=50, thinking=30), done(output=7, thinking=0, closed="none")])
    metrics.ends(200, 1.0, [done(output=5, thinking=5, closed="budget")])
    assert value(metrics, "prompt_tokens_total") == 200
    assert value(metrics, "image_tokens_total") == 80
    assert value(metrics, "generation_tokens_total", kind="thinking") == 35
    assert value(metrics, "generation_tokens_total", kind="answer") == 27
    assert [value(metrics, "thinking_closed_total", by=by) for by in ("model", "none", "budget")] == [1, 1, 1]


def test_the_time_between_tokens_is_shared_among_the_pieces_of_a_chunk() -> None:
    metrics = Metrics("a-model", lambda: STATS)
    metrics.chunk(0.04, 1)
    metrics.chunk(0.04, 4)
    assert value(metrics, "inter_token_seconds_count") == 5
    assert value(metrics, "inter_token_seconds_sum") == pytest.approx(0.08)
    assert value(metrics, "inter_token_seconds_bucket", le="0.005") == 0
    assert value(metrics, "inter_token_seconds_bucket", le="0.01") == 4  # a bound belongs to its bucket
    assert value(metrics, "inter_token_seconds_bucket", le="0.03") == 4
    assert value(metrics, "inter_token_seconds_bucket", le="0.05") == 5
    assert value(metrics, "inter_token_seconds_bucket", le="+Inf") == 5


@pytest.mark.parametrize("name", ["time_to_first_token", "request", "queue"])
def test_times_go_into_their_own_histogram(name: str) -> None:
    metrics = Metrics("a-model", lambda: STATS)
    {"time_to_first_token": metrics.first_token, "queue": metrics.queued}.get(
        name, lambda seconds: metrics.ends(200, seconds, [done()])
    )(1e9)
    found = {key: count for key, count in samples(metrics).items() if key[0].endswith("_seconds_count") and count}
    assert found == {(f"{name}_seconds_count", ()): 1}
    assert value(metrics, f"{name}_seconds_bucket", le="+Inf") == 1
    buckets = {key: count for key, count in samples(metrics).items() if key[0].endswith("_bucket")}
    assert len(buckets) > 50
    assert {labels for (_, labels), count in buckets.items() if count} == {(("le", "+Inf"),)}


def test_figures_of_the_engine_are_those_of_the_moment() -> None:
    now: list[EngineStats | None] = [None]
    metrics = Metrics("a-model", lambda: now[0])
    assert value(metrics, "engine_healthy") == 0
    assert not any(name in ("requests_running", "engine_steps_total") for name, _ in samples(metrics))
    now[0] = STATS
    assert value(metrics, "engine_healthy") == 1
    assert value(metrics, "requests_running") == 3 and value(metrics, "requests_waiting") == 2
    assert value(metrics, "cache_usage_ratio") == 0.25 and value(metrics, "engine_steps_total") == 70
    assert value(metrics, "prefix_cache_tokens_total", hit="true") == 100
    assert value(metrics, "prefix_cache_tokens_total", hit="false") == 900
    now[0] = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, False)
    assert value(metrics, "engine_healthy") == 0
    assert value(metrics, "build_info", version=__version__, model="a-model") == 1


# The dashboard and the alerts


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression of the dashboard and of the alerts, with where it is."""
    for panel in json.loads((OPERATIONS / "grafana.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            yield f"grafana: {panel['title']}", target["expr"]
    for group in yaml.safe_load((OPERATIONS / "alerts.yml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield f"alerts: {rule['alert']}", rule["expr"]


EXPRESSIONS = list(expressions())
FUNCTIONS = {"sum", "rate", "histogram_quantile", "min", "by", "and", "on"}
NOT_OURS = {"up", "le", "job", "instance"}


def faults(expression: str) -> list[str]:
    """What of a PromQL expression would find nothing: names and labels that no sample has, brackets that are open."""
    exported = samples(used())
    names = {PREFIX + name for name, _ in exported}
    labels = {label: {dict(held).get(label) for _, held in exported} for _, held in exported for label, _ in held}
    pairs = ("()", "{}", "[]")
    found = [f"{left}{right} differ" for left, right in pairs if expression.count(left) != expression.count(right)]
    bare = re.sub(r'"[^"]*"', "", re.sub(r"\[\w+(:\w*)?\]|\$\w+", "", expression))
    for word in re.findall(r"[a-z_][a-z0-9_]*", bare):
        if word not in names | FUNCTIONS | NOT_OURS | labels.keys():
            found.append(f"{word} is unknown")
    for label, operator, wanted in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', expression):
        values = labels.get(label)
        if values and "$" not in wanted and "~" not in operator and wanted not in values and label != "status":
            found.append(f"{label} is never {wanted}")
    for name in re.findall(rf"{PREFIX}\w+_total(?![^()]*\[)", expression):
        found.append(f"{name} without a range")
    return found


@pytest.mark.parametrize(("place", "expression"), EXPRESSIONS, ids=[place for place, _ in EXPRESSIONS])
def test_every_expression_finds_something(place: str, expression: str) -> None:
    assert faults(expression) == []


@pytest.mark.parametrize(
    "expression",
    [
        "kimi_vl_requests_runing",
        "sum(rate(kimi_vl_requests_total[5m])",
        "sum by (reason) (rate(kimi_vl_requests_total[5m]))",
        'rate(kimi_vl_generation_tokens_total{kind="thoughts"}[5m])',
        "kimi_vl_requests_total > 3",
        "rate(kimi_vl_inter_token_seconds[5m])",
    ],
)
def test_an_expression_that_finds_nothing_is_noticed(expression: str) -> None:
    assert len(faults(expression)) == 1


def test_every_metric_is_on_the_dashboard() -> None:
    shown = " ".join(expression for place, expression in EXPRESSIONS if place.startswith("grafana"))
    for family in text_string_to_metric_families(used().text().decode()):
        assert family.name in shown


def test_the_dashboard_can_be_imported() -> None:
    board: dict[str, Any] = json.loads((OPERATIONS / "grafana.json").read_text(encoding="utf-8"))
    assert board["title"] and board["uid"] and board["schemaVersion"] >= 39 and board["panels"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
    taken = [
        (p["x"] + dx, p["y"] + dy)
        for p in (panel["gridPos"] for panel in board["panels"])
        for dx in range(p["w"])
        for dy in range(p["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert board["templating"]["list"][0] == {"name": "datasource", "type": "datasource", "query": "prometheus"}


def test_every_alert_says_for_how_long_how_bad_and_what_to_do() -> None:
    groups = yaml.safe_load((OPERATIONS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 4
    for rule in rules:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}
