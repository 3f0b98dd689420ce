"""`scripts/bench cog`: the concurrent predictor behind Cog's server, beside its own engine called by plain threads.

Both answer the same requests with the same seeds and hand over pieces of the same length, and they take turns, so that
a slow minute of the machine meets both. What is lost between them is what HTTP and Cog cost. The client is one thread
with bare sockets in a process of its own, on the same cores. On a machine with other work, compare processor time: the
clock there says how many threads each of them has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file, save_file

import kimi_vl
from cog_local.server import Server, model_environment, say
from cog_local.soak import processes
from kimi_vl.events import Done
from kimi_vl.pipeline import Pipeline
from kimi_vl.text.tokenizer import Tokenizer

from .conditions import load_average, processor
from .load import rounded
from .streams import Client
from .text import DEMO

Request = dict[str, Any]
WHO = {"engine": "engine, plain threads", "server": "server, concurrent"}

CHUNK_SECONDS = 0.07
"""As `predict.py`, which is not imported here, has it."""

RATIOS = {"first_piece": "first", "tokens_per_second": "rate", "processor_ms_per_token": "busy"}


@dataclass(frozen=True)
class Answer:
    """How one request went: seconds to its first piece and to its end, and the tokens it said."""

    first: float
    end: float
    tokens: int


@dataclass(frozen=True)
class Sample:
    """Requests that began together: the median of their first pieces, tokens a second of all of them, and milliseconds
    of processor time a token of whoever answered."""

    first: float
    rate: float
    busy: float
    load: float


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench cog", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="requests at once (1 8 32)")
    parser.add_argument("--tokens", type=int, default=200, help="the most tokens of each answer (200)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (5)")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.tokens, *args.streams) < 1:
        parser.error("--streams, --tokens and --rounds must be at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, model_environment(os.environ, say), Path(scratch))
    print(table(report))
    print(json.dumps(report))
    return 0


def run(args: argparse.Namespace, environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    model = prepare(environment, scratch)
    with (
        contextlib.closing(kimi_vl.load(environment["KIMI_VL_MODEL"])) as pipeline,
        Server(environment=environment, concurrent=True) as server,
        Client("cog") as client,
    ):
        if max(args.streams) > server.slots:
            raise SystemExit(f"error: --streams: the server takes {server.slots} at a time")
        ask_engine, address, pids = engine_asker(pipeline), server_address(server), processes(server)
        samples: dict[tuple[str, int], list[Sample]] = {(who, n): [] for n in args.streams for who in WHO}
        for number in range(args.rounds + 1):
            for streams in args.streams:
                asked = [request(number, index, args.tokens) for index in range(streams)]
                # there and back, so that nobody always follows the same one
                for who in list(WHO)[:: -1 if number % 2 else 1]:
                    if who == "engine":
                        sample = measure(ask_engine, asked, [os.getpid()])
                    else:
                        sample, _ = by_server(client, address, [{"input": each} for each in asked], pids)
                    if number:  # the first round warms up
                        samples[who, streams].append(sample)
                    server.client.settle()
    loads = [sample.load for taken in samples.values() for sample in taken]
    return {
        "bench": "cog",
        **conditions(model, args),
        "load_average": [min(loads), max(loads)],
        "results": [figures(samples, streams) for streams in args.streams],
    }


def prepare(environment: dict[str, str], scratch: Path) -> str:
    """What the model is called; in ``environment``, which is the server's, an endless demo takes the demo's place.

    This process computes with as many threads as the server will.
    """
    model = environment["KIMI_VL_MODEL"]
    if model == "demo":
        model, environment["KIMI_VL_MODEL"] = "demo without an end", str(endless(scratch / "demo"))
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    return model


def conditions(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Under what a report was measured."""
    return {
        "model": model,
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "tokens": args.tokens,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def endless(folder: Path) -> Path:
    """The demo model, which hardly ever draws a token that ends: its answers are too short to measure."""
    shutil.copytree(DEMO, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"][list(Tokenizer.from_directory(DEMO).stop_ids)] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


def seconds_busy(pids: Sequence[int]) -> float:
    """Processor time of these processes until now; NaN where /proc does not tell."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def request(number: int, index: int, tokens: int) -> Request:
    """Another prompt in every round, so that no prefill is cached."""
    return {
        "prompt": f"{number} {index}: tell me a long story about the pictures that you have seen.",
        "temperature": 1.0,
        "seed": 1000 * number + index,
        "max_length_tokens": tokens,
    }


Asker = Callable[[Request], Answer]


def engine_asker(pipeline: Pipeline, interval: float = CHUNK_SECONDS) -> Asker:
    """Asks the engine of this process, for pieces of so many seconds."""

    def ask(asked: Request) -> Answer:
        began, first = time.monotonic(), 0.0
        messages: list[Any] = [{"role": "user", "content": asked["prompt"]}]
        options: dict[str, Any] = {name: value for name, value in asked.items() if name != "prompt"}
        for event in pipeline.stream(messages, **options, interval=interval):
            first = first or time.monotonic() - began
            if isinstance(event, Done):
                return Answer(first, time.monotonic() - began, event.usage.output_tokens)
        raise AssertionError("a request ends with Done")

    return ask


def server_address(server: Server) -> tuple[str, int]:
    url = urlsplit(server.url)
    assert url.hostname and url.port
    return url.hostname, url.port


def measure(ask: Asker, asked: Sequence[Request], pids: Sequence[int]) -> Sample:
    """Ask all of them at once, each in a thread."""
    together = threading.Barrier(len(asked))

    def one(each: Request) -> tuple[float, Answer]:
        together.wait()
        return time.monotonic(), ask(each)

    busy = seconds_busy(pids)
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(one, asked))
    took = max(began + answer.end for began, answer in answers) - min(began for began, _ in answers)
    tokens = sum(answer.tokens for _, answer in answers)
    first = statistics.median(answer.first for _, answer in answers)
    busy = 1e3 * (seconds_busy(pids) - busy) / tokens
    return Sample(first, tokens / took, busy, load_average())


def by_server(
    client: Client, address: tuple[str, int], bodies: Sequence[Request], pids: Sequence[int]
) -> tuple[Sample, float]:
    """The same of a server, which is the processes ``pids``; and the client's milliseconds a token."""
    busy = seconds_busy(pids)
    streams, cost = client.ask(address, bodies)
    busy = seconds_busy(pids) - busy
    if errors := [stream.error for stream in streams if stream.error]:
        raise SystemExit(f"error: the server did not finish an answer: {errors[0]}")
    tokens = sum(stream.tokens for stream in streams)
    took = max(stream.end for stream in streams)
    first = statistics.median(stream.first_text for stream in streams)
    return Sample(first, tokens / took, 1e3 * busy / tokens, load_average()), 1e3 * cost / tokens


def figures(samples: dict[tuple[str, int], list[Sample]], streams: int) -> dict[str, Any]:
    """The medians of all rounds, and what the server's are of the engine's in the same round."""
    engine, server = samples["engine", streams], samples["server", streams]
    pairs = list(zip(server, engine, strict=True))
    result: dict[str, Any] = {"streams": streams}
    for who, taken in (("engine", engine), ("server", server)):
        result[who] = {
            "first_piece_s": rounded(statistics.median(sample.first for sample in taken)),
            "first_piece_s_range": [rounded(pick(sample.first for sample in taken)) for pick in (min, max)],
            "tokens_per_second": rounded(statistics.median(sample.rate for sample in taken)),
            "tokens_per_second_range": [rounded(pick(sample.rate for sample in taken)) for pick in (min, max)],
            "processor_ms_per_token": rounded(statistics.median(sample.busy for sample in taken)),
        }
    for name, field in RATIOS.items():
        ratios = [getattr(ours, field) / getattr(its, field) for ours, its in pairs]
        result[f"{name}_of_engine"] = rounded(statistics.median(ratios))
    return result


def table(report: dict[str, Any]) -> str:
    """The report for people, as a Markdown table under its conditions."""
    low, high = report["load_average"]
    lines = [
        f"{report['model']}, answers of up to {report['tokens']} tokens; {report['machine']}, {report['cores']} cores, "
        f"{report['threads']} threads; load average {low} to {high}; torch {report['torch']}, "
        f"Python {report['python']}; median of {report['rounds']} rounds (least to most)",
        "",
        "| streams | who | first piece ms | tok/s | processor ms a token | of the engine's: first piece | tok/s "
        "| processor time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for who, title in WHO.items():
            own = result[who]
            least, most = (1e3 * value for value in own["first_piece_s_range"])
            slow, fast = own["tokens_per_second_range"]
            cells = [
                str(result["streams"]),
                title,
                f"{1e3 * own['first_piece_s']:.0f} ({least:.0f} to {most:.0f})",
                f"{own['tokens_per_second']:.0f} ({slow:.0f} to {fast:.0f})",
            ]
            cells.append(f"{own['processor_ms_per_token']:.2f}")
            cells += [f"{result[f'{name}_of_engine']:.2f}" if who == "server" else "" for name in RATIOS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
