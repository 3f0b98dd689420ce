"""`scripts/bench fleet`: a trace of traffic against n simulated replicas, by the engine's own scheduler.

What a step costs is measured on the demo by the same command: an engine runs a first trace, and seconds a step are
fitted to its sequences that decode and its tokens of prompts. Then a second trace is simulated with one replica and
run on the engine in real time, and both are compared; whatever follows is as good as that.

A trace is made from a seed, or read from a file with a JSON object in each line: `at` (seconds), `session`, `prompt`
and `answer` (tokens). All prompts of a session begin alike.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import itertools
import json
import math
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kimi_vl
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.engine.page_pool import PagePool
from kimi_vl.engine.requests import NullOutputProcessor
from kimi_vl.engine.sampling import Sampling
from kimi_vl.engine.scheduler import Request, ScheduledChunk, Scheduler

CONTROL_S = 1.0
"""How often autoscaling looks."""


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: seconds since its begin, and lengths in tokens."""

    at: float
    session: str
    prompt: int
    answer: int

    def ids(self) -> list[int]:
        """The first tokens of the session: small numbers, which every vocabulary has as ordinary tokens."""
        source = random.Random(self.session)
        return [source.randrange(100, 400) for _ in range(self.prompt)]


def make_trace(seed: int, sessions: int, turns: int, rate: float, prompt: int, answer: int) -> list[Arrival]:
    """Conversations whose prompts grow with every turn; requests arrive by a Poisson process of ``rate`` a second."""
    source = random.Random(seed)
    order = [session for session in range(sessions) for _ in range(turns)]
    source.shuffle(order)
    seen, at, trace = [0] * sessions, 0.0, []
    for session in order:
        at += source.expovariate(rate)
        seen[session] += 1
        length = max(1, round(source.uniform(0.5, 1.5) * answer))
        trace.append(Arrival(at, f"{seed}-{session}", seen[session] * prompt, length))
    return trace


def read_trace(path: Path) -> list[Arrival]:
    """Raises ValueError with the line that is not understood."""
    trace = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            read = json.loads(line)
            arrival = Arrival(float(read["at"]), str(read["session"]), int(read["prompt"]), int(read["answer"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"line {number} must have at, session, prompt and answer") from None
        if not (arrival.at >= 0 and math.isfinite(arrival.at) and arrival.prompt > 0 and arrival.answer > 0):
            raise ValueError(f"line {number}: at must be at least 0, prompt and answer more")
        trace.append(arrival)
    return sorted(trace, key=lambda arrival: arrival.at)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step: of any, for each sequence that decodes, for each token of a prompt."""

    step: float
    decode: float
    prefill: float

    def seconds(self, decoding: int, prefilled: int) -> float:
        return self.step + self.decode * decoding + self.prefill * prefilled

    @classmethod
    def fitted(cls, steps: Sequence[tuple[int, int, float]]) -> Cost:
        """The one with the least squares of relative errors; nothing is less than 0."""
        values = np.array(steps, float)
        features = np.stack([np.ones(len(values)), values[:, 0], values[:, 1]], axis=1)
        active = [0, 1, 2]
        while True:
            scaled = features[:, active] / values[:, 2:]
            found = np.linalg.lstsq(scaled, np.ones(len(values)), rcond=None)[0]
            if (found >= 0).all():
                break
            active.pop(int(found.argmin()))
        whole = dict(zip(active, found.tolist(), strict=True))
        return cls(*(whole.get(index, 0.0) for index in range(3)))


def count(chunks: Sequence[ScheduledChunk]) -> tuple[int, int]:
    """Sequences that decode, and tokens of prompts."""
    decoding = sum(chunk.decodes for chunk in chunks)
    return decoding, sum(chunk.end - chunk.begin for chunk in chunks if not chunk.decodes)


@dataclass
class Outcome:
    """What became of a trace: seconds to first tokens and to ends, since their arrivals."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    refused: int = 0
    cached: int = 0
    computed: int = 0
    replica_seconds: float = 0.0
    most_replicas: int = 1

    def report(self) -> dict[str, Any]:
        tokens = self.cached + self.computed
        return {
            "answered": len(self.whole),
            "refused": self.refused,
            "first_token_s": quantiles(self.first),
            "request_s": quantiles(self.whole),
            "prefix_hit_ratio": round(self.cached / tokens, 3) if tokens else None,
            "most_replicas": self.most_replicas,
            "replica_hours": round(self.replica_seconds / 3600, 4),
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p95": 0.95}
    return {name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) for name, share in at.items()}


@dataclass(frozen=True)
class Fleet:
    """How many replicas there are, and how requests reach them."""

    replicas: int = 1
    affinity: bool = True
    max_replicas: int = 0
    target_ongoing: float = 45.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    start_s: float = 60.0


class Replica:
    """The scheduler of an engine, and when its step ends."""

    def __init__(self, number: int, pages: int, options: EngineOptions):
        self.number = number
        self.scheduler = Scheduler(
            PagePool(pages),
            options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.batched_tokens("cuda"),
        )
        self.chunks: list[ScheduledChunk] = []
        self.began = 0.0
        self.draining = False

    @property
    def ongoing(self) -> int:
        return len(self.scheduler.waiting) + len(self.scheduler.running)


class Simulation:
    """Replays a trace. Refused requests do not come again."""

    def __init__(self, fleet: Fleet, cost: Cost, pages: int, options: EngineOptions):
        self.fleet, self.cost, self.pages, self.options = fleet, cost, pages, options
        self.outcome = Outcome()
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Any]] = []
        self._numbers = itertools.count()
        self._replicas: list[Replica] = []
        self._arrived: dict[Request, float] = {}
        self._starting = 0
        self._over_since = self._under_since = float("inf")
        self._turn = itertools.count()

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        for _ in range(self.fleet.replicas):
            self._start(0.0)
        for arrival in trace:
            self._at(arrival.at, "arrives", arrival)
        if self.fleet.max_replicas > self.fleet.replicas:
            self._at(CONTROL_S, "controls", None)
        left, now = len(trace), 0.0
        while self._events and (left or self._arrived):
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "arrives":
                left -= 1
                self._arrive(now, what)
            elif kind == "steps":
                self._step(now, what)
            elif kind == "starts":
                self._starting -= 1
                self._start(now)
            else:
                self._control(now)
        for replica in self._replicas:
            self._stop(now, replica)
        return self.outcome

    def _at(self, when: float, kind: str, what: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, what))

    def _start(self, now: float) -> None:
        replica = Replica(next(self._numbers), self.pages, self.options)
        replica.began = now
        self._replicas.append(replica)
        self.outcome.most_replicas = max(self.outcome.most_replicas, len(self._replicas))

    def _stop(self, now: float, replica: Replica) -> None:
        self.outcome.replica_seconds += now - replica.began
        self.outcome.cached += replica.scheduler.prompt_tokens_cached
        self.outcome.computed += replica.scheduler.prompt_tokens_computed

    def _choose(self, session: str) -> Replica:
        """By the highest hash, which moves few sessions where a replica comes or goes; or in turn."""
        there = [replica for replica in self._replicas if not replica.draining]
        if not self.fleet.affinity:
            return there[next(self._turn) % len(there)]
        return max(there, key=lambda each: hashlib.sha256(f"{each.number} {session}".encode()).digest())

    def _arrive(self, now: float, arrival: Arrival) -> None:
        replica = self._choose(arrival.session)
        if len(replica.scheduler.waiting) >= self.options.max_waiting:
            self.outcome.refused += 1
            return
        request = Request(arrival.ids(), arrival.answer)
        self._arrived[request] = arrival.at
        replica.scheduler.add(request)
        if not replica.chunks:
            self._plan(now, replica)

    def _plan(self, now: float, replica: Replica) -> None:
        replica.chunks = replica.scheduler.plan()
        if replica.chunks:
            self._at(now + self.cost.seconds(*count(replica.chunks)), "steps", replica)

    def _step(self, now: float, replica: Replica) -> None:
        for chunk in replica.chunks:
            request = chunk.request
            replica.scheduler.computed(chunk)
            if not chunk.complete:
                continue
            if len(request.ids) == request.prompt_length:
                self.outcome.first.append(now - self._arrived[request])
            request.ids.append(1)
            if len(request.ids) == request.prompt_length + request.max_new_tokens:
                replica.scheduler.remove(request)
                self.outcome.whole.append(now - self._arrived.pop(request))
        self._plan(now, replica)
        if replica.draining and not replica.ongoing:
            self._replicas.remove(replica)
            self._stop(now, replica)

    def _control(self, now: float) -> None:
        """As Ray Serve: replicas for the requests that there are, once it has been so for a while."""
        fleet = self.fleet
        there = [replica for replica in self._replicas if not replica.draining]
        wanted = math.ceil(sum(replica.ongoing for replica in self._replicas) / fleet.target_ongoing)
        wanted = min(max(wanted, fleet.replicas), fleet.max_replicas)
        have = len(there) + self._starting
        self._over_since = min(self._over_since, now) if wanted > have else float("inf")
        self._under_since = min(self._under_since, now) if wanted < have else float("inf")
        if now - self._over_since >= fleet.upscale_delay_s:
            for _ in range(wanted - have):
                self._starting += 1
                self._at(now + fleet.start_s, "starts", None)
            self._over_since = float("inf")
        elif now - self._under_since >= fleet.downscale_delay_s and len(there) > wanted:
            for replica in there[wanted:]:
                replica.draining = True
                if not replica.ongoing:
                    self._replicas.remove(replica)
                    self._stop(now, replica)
            self._under_since = float("inf")
        self._at(now + CONTROL_S, "controls", None)


class _Timed(NullOutputProcessor):
    """Takes all tokens of an answer, and keeps the times of the first and the last."""

    sampling = Sampling(0, 1, 0, 0)

    def __init__(self, answer: int):
        self.left, self.first, self.last = answer, 0.0, 0.0
        self.over = threading.Event()

    def take(self, token: int) -> int | None:
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.left -= 1
        if self.left:
            return token
        self.over.set()
        return None

    def fail(self, error: Exception) -> None:
        raise error


def measure(engine: Engine, trace: Sequence[Arrival]) -> tuple[Outcome, list[tuple[int, int, float]]]:
    """A trace in real time, and every step: sequences that decode, tokens of prompts, seconds."""
    steps: list[tuple[int, int, float]] = []
    scheduler, plan = engine.scheduler, engine.scheduler.plan
    last: list[tuple[float, int, int]] = []

    def planned() -> list[ScheduledChunk]:
        chunks, now = plan(), time.monotonic()
        if last and last[0][1] + last[0][2]:
            began, decoding, prefilled = last.pop()
            steps.append((decoding, prefilled, now - began))
        # where nothing is left, the next step begins after a wait, which is no part of one
        last[:] = [(now, *count(chunks))] if chunks else []
        return chunks

    cached, computed = scheduler.prompt_tokens_cached, scheduler.prompt_tokens_computed
    scheduler.plan = planned
    try:
        began, running = time.monotonic(), []
        for arrival in trace:
            time.sleep(max(0.0, began + arrival.at - time.monotonic()))
            processor = _Timed(arrival.answer)
            engine.submit(arrival.ids(), [], arrival.answer, processor)
            running.append((arrival, processor))
        outcome = Outcome()
        for arrival, processor in running:
            processor.over.wait()
            outcome.first.append(processor.first - began - arrival.at)
            outcome.whole.append(processor.last - began - arrival.at)
    finally:
        scheduler.plan = plan
    outcome.cached = scheduler.prompt_tokens_cached - cached
    outcome.computed = scheduler.prompt_tokens_computed - computed
    outcome.replica_seconds = time.monotonic() - began
    return outcome, steps


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench fleet", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a trace, in place of one that is made")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4], help="fleets to simulate (1 2 4)")
    parser.add_argument("--sessions", type=int, default=150, help="conversations of the trace (150)")
    parser.add_argument("--turns", type=int, default=6, help="requests of each (6)")
    parser.add_argument("--load", type=float, default=1.5, help="load, in what one replica can do (1.5)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens that each turn adds (128)")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer, on average (64)")
    parser.add_argument("--cost", type=float, nargs=3, metavar="S", help="seconds: a step, a sequence, a prompt token")
    parser.add_argument("--pages", type=int, default=1000, help="pages of a replica's KV cache (1000)")
    parser.add_argument("--start", type=float, default=5.0, help="seconds that a replica takes to start (5)")
    parser.add_argument("--check-requests", type=int, default=60, help="requests of the measured trace (60)")
    args = parser.parse_args(arguments)
    if min(args.sessions, args.turns, args.prompt, args.answer, args.pages, args.check_requests, *args.replicas) < 1:
        parser.error("all numbers must be at least 1")
    try:
        given = read_trace(args.trace) if args.trace else None
    except (OSError, ValueError) as error:
        parser.error(f"--trace: {error}")
    report = run(args, given)
    for name, value in report.items():
        print(f"{name:<28}{json.dumps(value)}")
    print(json.dumps(report))
    return 0


def run(args: argparse.Namespace, given: list[Arrival] | None) -> dict[str, Any]:
    options = EngineOptions()
    report: dict[str, Any] = {}
    if args.cost:
        cost = Cost(*args.cost)
    else:
        cost, report["check"] = checked(args, options)
    report["cost"] = {"step_s": cost.step, "decode_s": cost.decode, "prefill_s": cost.prefill}
    # What a replica can do, with all of its sequences and nothing cached: a request's share of steps.
    prompt = args.prompt * (args.turns + 1) / 2
    request_s = prompt * cost.prefill + args.answer * (cost.decode + cost.step / options.max_num_seqs)
    rate = args.load / request_s
    trace = given or make_trace(7, args.sessions, args.turns, rate, args.prompt, args.answer)
    for replicas in args.replicas:
        for affinity in (True, False):
            found = Simulation(Fleet(replicas, affinity), cost, args.pages, options).run(trace)
            report[f"{replicas} replicas, " + ("by session" if affinity else "in turn")] = found.report()
    most = max(args.replicas)
    if most > 1:
        fleet = Fleet(1, True, most, 0.7 * options.max_num_seqs, args.start, 60 * args.start, args.start)
        report[f"1 to {most} replicas"] = Simulation(fleet, cost, args.pages, options).run(trace).report()
    return report


def checked(args: argparse.Namespace, options: EngineOptions) -> tuple[Cost, dict[str, Any]]:
    """The cost of the demo's steps, and one replica as simulated beside one as measured, on another trace."""
    torch.set_num_threads(1)
    pipeline = kimi_vl.load("demo", options=options)
    engine = pipeline.engine
    try:
        turns = 4
        sessions = -(-args.check_requests // turns)
        shape = {"sessions": sessions, "turns": turns, "prompt": args.prompt, "answer": args.answer}
        _, steps = measure(engine, make_trace(1, rate=30, **shape))
        cost = Cost.fitted(steps)
        trace = make_trace(2, rate=30, **shape)
        measured, steps = measure(engine, trace)
        predicted = Simulation(Fleet(), cost, engine.scheduler.pool.count, options).run(trace)
    finally:
        pipeline.close()
    errors = [abs(cost.seconds(decoding, prefilled) / seconds - 1) for decoding, prefilled, seconds in steps]
    return cost, {
        "requests": len(trace),
        "steps": len(steps),
        "median_error_of_a_step": round(statistics.median(errors), 3),
        "measured": measured.report(),
        "predicted": predicted.report(),
    }
