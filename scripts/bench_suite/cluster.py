"""`scripts/bench cluster`: one replica behind Ray Serve's proxy, and the same server without Ray.

Both answer the same requests with the same seeds, in turns, so that a slow minute of the machine meets both. The client
is one thread with bare sockets in a process of its own; all of them share the cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from cog_local.server import model_environment, say

from .cog import Sample, conditions, prepare, request, seconds_busy
from .conditions import load_average
from .http import body, figures
from .load import rounded
from .openai_server import ROOT, OpenAIServer
from .streams import Client

GOAL = 0.9
"""Of the tokens a second of the server alone."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench cluster", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32], help="requests at once (1 32)")
    parser.add_argument("--tokens", type=int, default=200, help="the most tokens of each answer (200)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (5)")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.tokens, *args.streams) < 1:
        parser.error("all numbers must be at least 1")
    python = python_with_ray()
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, python, model_environment(os.environ, say), Path(scratch))
    print(table(report))
    print(json.dumps(report))
    return 0


def python_with_ray() -> str:
    """This interpreter where it has Ray, or that of an environment that is made for it."""
    if importlib.util.find_spec("ray"):
        return sys.executable
    made = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh && kimi_vl_cluster"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if made.returncode:
        raise SystemExit("error: Ray Serve could not be installed")
    return made.stdout.strip()


def run(args: argparse.Namespace, python: str, environment: dict[str, str], scratch: Path) -> dict[str, Any]:
    model = prepare(environment, scratch)
    flags = ("--max-num-seqs", str(max(*args.streams, 64)))
    loads = [load_average()]
    with (
        OpenAIServer(*flags, environment=environment) as alone,
        OpenAIServer(
            *flags, "--gpus-per-replica", "0", environment=environment, command="cluster", python=python
        ) as behind,
        Client() as client,
    ):
        servers = {"alone": alone, "cluster": behind}
        results = [streams(servers, client, count, args.rounds, args.tokens) for count in args.streams]
    loads.append(load_average())
    return {
        "bench": "cluster",
        **conditions(model, args),
        "load_average": [round(min(loads), 1), round(max(loads), 1)],
        "goal": GOAL,
        "results": results,
    }


def streams(servers: dict[str, OpenAIServer], client: Client, count: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens a second of ``count`` requests at once. The first round warms up."""
    found: dict[str, list[Sample]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        asked = [body(request(1000 * count + number, index, tokens)) for index in range(count)]
        for name in list(servers)[:: -1 if number % 2 else 1]:
            found[name].append(sample(servers[name], client, asked))
    found = {name: samples[1:] for name, samples in found.items()}
    ratios = [behind.rate / alone.rate for alone, behind in zip(found["alone"], found["cluster"], strict=True)]
    return {
        "streams": count,
        **{name: figures(samples) for name, samples in found.items()},
        "of_alone": rounded(statistics.median(ratios)),
        "of_alone_range": [rounded(min(ratios)), rounded(max(ratios))],
    }


def sample(server: OpenAIServer, client: Client, asked: list[dict[str, Any]]) -> Sample:
    pids = family(server.process.pid)
    busy = seconds_busy(pids)
    answered, _ = client.ask(server.address, asked)
    busy = seconds_busy(pids) - busy
    if errors := [stream.error for stream in answered if stream.error]:
        raise SystemExit(f"error: a server did not finish an answer: {errors[0]}")
    tokens = sum(stream.tokens for stream in answered)
    first = statistics.median(stream.first_text for stream in answered)
    rate = tokens / max(stream.end for stream in answered)
    return Sample(first, rate, 1e3 * busy / tokens, load_average())


def family(pid: int) -> list[int]:
    """A process and those that it and they started: a server's, or all of Ray's."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
        except OSError:  # gone meanwhile
            continue
    found = [pid]
    for each in found:
        found += children[each]
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people, as a Markdown table under its conditions."""
    low, high = report["load_average"]
    lines = [
        f"{report['model']}, answers of up to {report['tokens']} tokens; {report['machine']}, {report['cores']} cores; "
        f"load average {low} to {high}; torch {report['torch']}, Python {report['python']}; median of "
        f"{report['rounds']} rounds (least to most)",
        "",
        "| streams | who | first text ms | tok/s | processor ms a token | tok/s of the server alone |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        for name, who in (("alone", "`kimi-vl serve`"), ("cluster", "`kimi-vl cluster`")):
            own = result[name]
            slow, fast = own["tokens_per_second_range"]
            low, high = result["of_alone_range"]
            cells = [
                str(result["streams"]),
                who,
                f"{1e3 * own['first_text_s']:.0f}",
                f"{own['tokens_per_second']:.0f} ({slow:.0f} to {fast:.0f})",
                f"{own['processor_ms_per_token']:.2f}",
                f"{result['of_alone']:.2f} ({low:.2f} to {high:.2f})" if name == "cluster" else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
