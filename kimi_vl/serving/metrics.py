"""What Prometheus reads: figures of requests, counted as they end, and of the engine, read when they are asked for.

Everything is a number in this object, changed by the event loop alone: telling it of a chunk costs an addition in a
list. Labels are words of ours (a status, an end, a kind); nothing that a client writes becomes one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from .. import __version__
from ..engine.engine import EngineStats
from ..events import Done
from . import responses
from .service import Observer

PREFIX = "kimi_vl_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200, 1800)
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 600)
QUEUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 600)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5)


class Metrics(Observer, Collector):
    """Figures of one server; ``model`` is the name that its answers carry, ``stats`` gives those of its engine.

    ``stats`` returns None while the model is loaded. All figures carry ``labels``.
    """

    def __init__(self, model: str, stats: Callable[[], EngineStats | None], labels: Mapping[str, str] | None = None):
        self._model, self._stats, self._labels = model, stats, labels or {}
        self._requests: Counter[tuple[str, str]] = Counter()
        self._closed: Counter[str] = Counter()
        self._prompt_tokens = self._image_tokens = self._thinking_tokens = self._answer_tokens = 0
        self._first_token = _Histogram(FIRST_TOKEN_BUCKETS)
        self._inter_token = _Histogram(INTER_TOKEN_BUCKETS)
        self._request = _Histogram(REQUEST_BUCKETS)
        self._queue = _Histogram(QUEUE_BUCKETS)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """All figures of this moment, in Prometheus' text format (:data:`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    # What the server tells

    def queued(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def chunk(self, seconds: float, pieces: int) -> None:
        self._inter_token.observe(seconds / pieces, pieces)

    def ends(self, status: int, seconds: float, choices: Sequence[Done]) -> None:
        self._requests[str(status), _end(status, choices)] += 1
        self._request.observe(seconds)
        if choices:  # they share their prompt
            self._prompt_tokens += choices[0].usage.input_tokens
            self._image_tokens += choices[0].usage.image_tokens
        for done in choices:
            self._closed[done.thinking_closed_by] += 1
            self._thinking_tokens += done.usage.reasoning_tokens
            self._answer_tokens += done.usage.output_tokens - done.usage.reasoning_tokens

    def rejects(self, status: int, code: str | None) -> None:
        self._requests[str(status), "error"] += 1

    # What Prometheus asks

    def collect(self) -> Iterator[Metric]:
        for family in self._families():
            family.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in family.samples]
            yield family

    def _families(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from self._of_requests()
        yield _gauge("engine_healthy", "1 while requests can be served.", float(stats is not None and stats.healthy))
        if stats is not None:
            yield from _of_engine(stats)
        build = GaugeMetricFamily(PREFIX + "build_info", "1, with what runs.", labels=["version", "model"])
        build.add_metric([__version__, self._model], 1)
        yield build

    def _of_requests(self) -> Iterator[Metric]:
        yield _counters(
            "requests",
            "Chat completions that are over, by HTTP status (499: the client left) and how they ended.",
            ["status", "finish_reason"],
            self._requests,
        )
        yield _counters(
            "thinking_closed",
            "Answers by what closed their thinking.",
            ["by"],
            {(by,): count for by, count in self._closed.items()},
        )
        yield _counter("prompt_tokens", "Tokens of the prompts of answered requests.", self._prompt_tokens)
        yield _counter("image_tokens", "Of these, tokens of images.", self._image_tokens)
        yield _counters(
            "generation_tokens",
            "Generated tokens of answered requests.",
            ["kind"],
            {("thinking",): self._thinking_tokens, ("answer",): self._answer_tokens},
        )
        yield self._first_token.family("time_to_first_token_seconds", "From a request to its first text.")
        yield self._inter_token.family(
            "inter_token_seconds",
            "Between pieces of text as they leave in streams: the time between two chunks of an answer, shared among "
            "the pieces of the later one. A piece is a token, or several where a character needs them.",
        )
        yield self._request.family("request_seconds", "From a request that the engine takes to the end of its answer.")
        yield self._queue.family("queue_seconds", "From the engine's queue to the first step with the sequence.")


def _of_engine(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("requests_running", "Sequences that the engine computes.", stats.running)
    yield _gauge("requests_waiting", "Sequences that wait for the engine.", stats.waiting)
    yield _gauge("cache_usage_ratio", "Share of the KV cache that running sequences hold.", stats.cache_usage_ratio)
    yield _counters(
        "prefix_cache_tokens",
        "Prompt tokens of admitted sequences, by whether prefix caching found them.",
        ["hit"],
        {("true",): stats.prompt_tokens_cached, ("false",): stats.prompt_tokens_computed},
    )
    yield _counter("engine_steps", "Steps of the engine.", stats.steps)


class _Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        buckets, total = [], 0
        for bound, count in zip([*map(float, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        return HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=self._sum)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _counters(name: str, text: str, labels: list[str], values: dict[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for words, value in sorted(values.items()):
        family.add_metric(list(words), value)
    return family


def _end(status: int, choices: Sequence[Done]) -> str:
    """One word for a request: its choices ended by themselves, or one was cut; the client left; or it failed."""
    if status == 200 and choices:
        return "length" if any(responses.finish_reason(done) == "length" for done in choices) else "stop"
    return "abort" if status == 499 else "error"
