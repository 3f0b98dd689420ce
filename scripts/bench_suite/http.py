"""`scripts/bench http`: the OpenAI-compatible server beside the same engine called by plain threads.

Both answer the same requests with the same seeds, and they take turns, so that a slow minute of the machine meets both.
What is lost between them is what HTTP costs. Then many streams are opened at once, more than are computed at a time,
and the server's memory is watched. The client is one thread with bare sockets in a process of its own, on the same
cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import kimi_vl
from cog_local.server import model_environment, say
from kimi_vl.engine.engine import EngineOptions

from .cog import Request, Sample, by_server, conditions, engine_asker, measure, prepare, request
from .conditions import load_average
from .load import rounded
from .openai_server import OpenAIServer
from .streams import Client, Stream

GOALS = {"tokens_per_second_of_engine": 0.9, "first_text_over_engine_ms": 5.0, "megabytes_gained": 500.0}
FIRST_TOKENS = 16
WATCH_S = 0.1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench http", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64], help="requests at once (1 8 64)")
    parser.add_argument("--tokens", type=int, default=200, help="the most tokens of each answer (200)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (5)")
    parser.add_argument("--first", type=int, default=40, help="single requests for the time to the first text (40)")
    parser.add_argument("--open", type=int, default=1000, help="streams that are opened together at the end (1000)")
    parser.add_argument("--open-tokens", type=int, default=40, help="the most tokens of each of those (40)")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.tokens, args.first, args.open, args.open_tokens, *args.streams) < 1:
        parser.error("all numbers must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, model_environment(os.environ, say), Path(scratch))
    print(table(report))
    print(json.dumps(report))
    return 0


def run(args: argparse.Namespace, environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    model = prepare(environment, scratch)
    sequences = max(*args.streams, 64)
    flags = ("--max-num-seqs", str(sequences), "--max-waiting", str(max(args.open, sequences)))
    options = EngineOptions(max_num_seqs=sequences)
    loads = [load_average()]
    with (
        contextlib.closing(kimi_vl.load(environment["KIMI_VL_MODEL"], options=options)) as pipeline,
        OpenAIServer(*flags, environment=environment) as server,
        Client() as client,
    ):
        bench = Bench(pipeline, server, client)
        results = [bench.streams(count, args.rounds, args.tokens) for count in args.streams]
        loads.append(load_average())
        first = bench.first(args.first)
        opened = bench.open(args.open, args.open_tokens)
    loads.append(load_average())
    return {
        "bench": "http",
        **conditions(model, args),
        "load_average": [round(min(loads), 1), round(max(loads), 1)],
        "goals": GOALS,
        "results": results,
        "first": first,
        "open": opened,
    }


class Bench:
    """A pipeline in this process, a server with the same model in another, and the server's client in a third."""

    def __init__(self, pipeline: Any, server: OpenAIServer, client: Client):
        self._server, self._client = server, client
        self._ask_engine = engine_asker(pipeline, interval=0.0)
        self._round = 0

    def streams(self, count: int, rounds: int, tokens: int) -> dict[str, Any]:
        """Tokens a second of ``count`` requests at once."""
        engine, server, costs = [], [], []
        for number in range(rounds + 1):
            self._round += 1
            asked = [request(self._round, index, tokens) for index in range(count)]
            for who in ("engine", "server")[:: -1 if number % 2 else 1]:
                if who == "engine":
                    engine.append(measure(self._ask_engine, asked, [os.getpid()]))
                else:
                    server.append(self._by_server(asked, costs))
        engine, server, costs = engine[1:], server[1:], costs[1:]  # the first round warms up
        ratios = [ours.rate / its.rate for ours, its in zip(server, engine, strict=True)]
        return {
            "streams": count,
            **{name: figures(samples) for name, samples in (("engine", engine), ("server", server))},
            "client_processor_ms_per_token": rounded(statistics.median(costs)),
            "tokens_per_second_of_engine": rounded(statistics.median(ratios)),
            "tokens_per_second_of_engine_range": [rounded(min(ratios)), rounded(max(ratios))],
        }

    def _by_server(self, asked: list[Request], costs: list[float]) -> Sample:
        sample, cost = by_server(
            self._client, self._server.address, [body(each) for each in asked], [self._server.process.pid]
        )
        costs.append(cost)
        return sample

    def first(self, count: int) -> dict[str, Any]:
        """Time to the first text of single requests, in turns."""
        engine, server, byte = [], [], []
        for number in range(count + 2):
            self._round += 1
            asked = request(self._round, 0, FIRST_TOKENS)
            for who in ("engine", "server")[:: -1 if number % 2 else 1]:
                if who == "engine":
                    engine.append(1e3 * self._ask_engine(asked).first)
                else:
                    [stream], _ = self._client.ask(self._server.address, [body(asked)])
                    server.append(1e3 * stream.first_text)
                    byte.append(1e3 * stream.first_byte)
        engine, server, byte = engine[2:], server[2:], byte[2:]
        over = [ours - its for ours, its in zip(server, engine, strict=True)]
        return {
            "requests": count,
            "engine_ms": rounded(statistics.median(engine)),
            "server_ms": rounded(statistics.median(server)),
            "server_first_byte_ms": rounded(statistics.median(byte)),
            "first_text_over_engine_ms": rounded(statistics.median(over)),
        }

    def open(self, count: int, tokens: int) -> dict[str, Any]:
        """Many streams at once: what goes wrong, and what the server holds meanwhile."""
        before, held = self._server.megabytes(), [self._server.megabytes()]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_S):
                held.append(self._server.megabytes())

        watching = threading.Thread(target=watch)
        watching.start()
        self._round += 1
        try:
            streams, _ = self._client.ask(
                self._server.address, [body(request(self._round, index, tokens)) for index in range(count)]
            )
        finally:
            over.set()
            watching.join()
        return {
            "streams": count,
            "tokens": tokens,
            "errors": errors(streams),
            "seconds": rounded(max(stream.end for stream in streams)),
            "last_first_byte_s": rounded(max(stream.first_byte for stream in streams)),
            "megabytes_before": round(before, 1),
            "megabytes_gained": round(max(held) - before, 1),
            "threads": self._server.threads(),
        }


def errors(streams: list[Stream]) -> dict[str, int]:
    found = [stream.error for stream in streams if stream.error]
    return {error: found.count(error) for error in sorted(set(found))}


def body(asked: Request) -> dict[str, Any]:
    """A request of the engine's in the form of OpenAI's API."""
    return {
        "messages": [{"role": "user", "content": asked["prompt"]}],
        "temperature": asked["temperature"],
        "seed": asked["seed"],
        "max_tokens": asked["max_length_tokens"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def figures(samples: list[Sample]) -> dict[str, Any]:
    rates = [sample.rate for sample in samples]
    return {
        "first_text_s": rounded(statistics.median(sample.first for sample in samples)),
        "tokens_per_second": rounded(statistics.median(rates)),
        "tokens_per_second_range": [rounded(min(rates)), rounded(max(rates))],
        "processor_ms_per_token": rounded(statistics.median(sample.busy for sample in samples)),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people, as a Markdown table under its conditions."""
    low, high = report["load_average"]
    lines = [
        f"{report['model']}, answers of up to {report['tokens']} tokens; {report['machine']}, {report['cores']} cores, "
        f"{report['threads']} threads; load average {low} to {high}; torch {report['torch']}, "
        f"Python {report['python']}; median of {report['rounds']} rounds (least to most); the client is one thread "
        "with bare sockets in a process of its own, on the same cores",
        "",
        "| streams | who | first text ms | tok/s | processor ms a token | tok/s of engine's | client's ms a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for who in ("engine", "server"):
            own = result[who]
            slow, fast = own["tokens_per_second_range"]
            cells = [
                str(result["streams"]),
                f"{who}{', plain threads' * (who == 'engine')}",
                f"{1e3 * own['first_text_s']:.0f}",
                f"{own['tokens_per_second']:.0f} ({slow:.0f} to {fast:.0f})",
                f"{own['processor_ms_per_token']:.2f}",
            ]
            if who == "server":
                low, high = result["tokens_per_second_of_engine_range"]
                cells.append(f"{result['tokens_per_second_of_engine']:.2f} ({low:.2f} to {high:.2f})")
                cells.append(f"{result['client_processor_ms_per_token']:.3f}")
            else:
                cells += ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    first, opened = report["first"], report["open"]
    lines += [
        "",
        f"first text of {first['requests']} single requests: engine {first['engine_ms']} ms, server "
        f"{first['server_ms']} ms, {first['first_text_over_engine_ms']} ms more in the median of pairs",
        f"{opened['streams']} streams at once, of {opened['tokens']} tokens: errors {opened['errors'] or 'none'}, "
        f"{opened['seconds']} s, {opened['megabytes_gained']} MB gained over {opened['megabytes_before']} MB",
    ]
    return "\n".join(lines)
