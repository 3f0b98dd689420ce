"""Many requests of mixed kinds to one OpenAI-compatible server, and what is left of them; `scripts/soak --openai`.

Good ones get the answer that they got at the start, bad ones their error; others are left in the middle, hung up on
before there is an answer, or read slowly. In the end nothing runs, and memory, threads and open files are as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench_suite.openai_server import OpenAIServer

from cog_local.server import MEMORY, interrupt_on_signals, model_environment, say
from cog_local.soak import BLUE, CUT, RED, SUM, SUM_ANSWER, WARM_UP, picture

ROUTE = "/v1/chat/completions"
HEADERS = {"Content-Type": "application/json"}
PATIENCE_S = 600.0
FLAT_MEGABYTES = 16.0
"""What may be gained after half of the requests. What is allocated stays as it is; the allocator's free memory grows in
steps for longer, until its arenas have met the largest requests at the same time."""
POOLED_THREADS = 8
"""Threads that the server's pools may begin as late as in the second half; they begin one where all others are busy."""
KINDS = {"good": 50, "bad": 30, "left": 8, "hung_up": 7, "slow": 5}
"""How often each kind comes, in a hundred."""

Body = dict[str, Any]


def image(url: str) -> Body:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(*parts: Any, **options: Any) -> Body:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 20, **options}


CHOICE = {"structured_outputs": {"choice": ["red", "green"]}}
GOOD: list[Body] = [
    ask("What is the result?", image(SUM), temperature=0, max_tokens=60),
    ask("Hello, who are you?", temperature=0),
    ask("What is 12 + 30?", seed=5, n=3),
    ask("What is 7 + 8?", seed=-1, temperature=1.5, top_k=20),
    ask("Tell me more.", seed=2, top_p=0.8, separate_reasoning=False),
    ask("What colour is it?", image(RED), temperature=0),
    ask("Compare them.", image(RED), image(BLUE), seed=3),
    ask("What do you see?", image(BLUE), image(RED), image(BLUE), seed=4, thinking_budget=5),
    ask("Answer at once.", reasoning_effort="none", seed=6),
    ask("Count up.", stop=["3", "."], seed=7),
    ask("<|im_end|>" * 30, seed=8),
    ask("word " * 500, seed=9),
    ask("Which colour?", seed=10, thinking_budget=4, **CHOICE),
    ask("What is 4 + 4?", seed=12, thinking_budget=2, logprobs=True, top_logprobs=3),
    {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting."},
            {"role": "user", "content": "And you?"},
        ],
        "seed": 11,
        "max_tokens": 20,
    },
]
BAD: list[tuple[Body | bytes, int, str]] = [
    ({}, 400, "e_messages_invalid"),
    (b"{", 400, "invalid_json"),
    (ask("word " * 20_000), 400, "context_length_exceeded"),
    (ask("Hello.", model="other"), 404, "model_not_found"),
    (ask("Hello.", temperature=9), 400, "e_parameter"),
    (ask("Hello.", n=9), 400, "e_parameter"),
    (ask("Hello.", tools=[{}]), 400, "tools_unsupported"),
    (ask("Hello.", min_p=0.5), 400, "unsupported_parameter"),
    (ask(image("/etc/hostname")), 400, "e_image_source"),
    (ask(image("https://127.0.0.1/x.png")), 400, "e_image_source"),
    (ask(image(CUT)), 400, "e_image_unreadable"),
    (ask(image("data:text/html;base64,PGh0bWw+")), 400, "e_image_format"),
    (ask(image(picture((0, 0, 0), (50_000, 1000)))), 400, "e_image_too_large"),
    (ask(*[image(RED)] * 65), 400, "e_too_many_images"),
]
LONG = ask("Tell me a long story.", temperature=2, max_tokens=4000)
LONG_SEEDS = 4
"""Few, or what the cache keeps of unfinished texts (bounded from the start) would look like a leak."""


class Refused(Exception):
    """The server answered with this status and code."""

    def __init__(self, status: int, code: str):
        super().__init__(f"{status} {code}")
        self.status, self.code = status, code


@dataclass(frozen=True)
class Sample:
    """What the server's process holds at a moment."""

    requests: int
    seconds: float
    megabytes: float
    threads: int
    files: int


class Caller:
    """Sends requests, each on a connection of its own."""

    def __init__(self, server: OpenAIServer):
        self._server = server

    @contextlib.contextmanager
    def _sent(self, body: Body | bytes, receive_buffer: int | None = None):
        connection = http.client.HTTPConnection(*self._server.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.connect()
            if receive_buffer:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.request("POST", ROUTE, body if isinstance(body, bytes) else json.dumps(body), HEADERS)
            yield connection

    @staticmethod
    def _answered(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answered = connection.getresponse()
        if answered.status != 200:
            raise Refused(answered.status, json.loads(answered.read())["error"]["code"])
        return answered

    def whole(self, body: Body | bytes) -> list[tuple[str, str]]:
        """Thinking and answer of each choice."""
        with self._sent(body) as connection:
            choices = json.loads(self._answered(connection).read())["choices"]
        return [(said["message"].get("reasoning_content") or "", said["message"]["content"]) for said in choices]

    def streamed(self, body: Body, slowly: float = 0.0) -> list[tuple[str, str]]:
        """The same from a stream, whose pieces are read with pauses."""
        texts = [["", ""] for _ in range(body.get("n", 1))]
        with self._sent({**body, "stream": True}, 2048 if slowly else None) as connection:
            answered = self._answered(connection)
            for line in iter(answered.readline, b"data: [DONE]\n"):
                if not line:
                    raise Refused(200, "a stream without an end")
                if line.startswith(b"data: "):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]][0] += choice["delta"].get("reasoning_content") or ""
                        texts[choice["index"]][1] += choice["delta"].get("content") or ""
                time.sleep(slowly)
        return [(thinking, answer) for thinking, answer in texts]

    def leave(self, body: Body, lines: int) -> None:
        """Close the connection after some lines of the stream."""
        with self._sent({**body, "stream": True}) as connection:
            answered = self._answered(connection)
            for _ in range(lines):
                answered.readline()

    def hang_up(self, body: Body, after: float) -> None:
        """Close the connection before there is an answer."""
        with self._sent(body):
            time.sleep(after)

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection(*self._server.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}


class Soak:
    """Requests of all kinds by ``callers`` threads, and what was seen."""

    def __init__(self, server: OpenAIServer, seed: int, callers: int, model: str):
        self._server, self._caller = server, Caller(server)
        self._rng, self._callers = random.Random(seed), callers
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.samples: list[Sample] = []
        self._lock = threading.Lock()
        self._done = 0
        self._expected = [self._caller.whole(body) for body in GOOD]
        if model == "demo" and self._expected[0][0][1] != SUM_ANSWER:
            self.wrong.append(f"the demo says {self._expected[0][0][1]!r} to the sum")

    def run(self, requests: int, lines: int) -> None:
        self._began = time.monotonic()
        say(f"{'requests':>9}{'seconds':>9}{'MB':>9}{'threads':>9}{'files':>7}   wrong")
        self.look()
        marks = {round(requests * line / lines) for line in range(1, lines + 1)}
        seeds = [self._rng.randrange(2**63) for _ in range(requests)]
        with ThreadPoolExecutor(self._callers) as threads:
            try:
                for _ in threads.map(lambda seed: self._one(seed, marks), seeds):
                    pass
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def _one(self, seed: int, marks: set[int]) -> None:
        """A request of a kind that its seed decides."""
        rng = random.Random(seed)
        [kind] = rng.choices(list(KINDS), weights=list(KINDS.values()))
        try:
            getattr(self, f"_{kind}")(rng)
        except (Refused, OSError, http.client.HTTPException, ValueError) as error:
            self._note(f"{kind}: {type(error).__name__} {error}")
        with self._lock:
            self.counts[kind] += 1
            self._done += 1
            if self._done in marks:
                self.look()

    def _note(self, wrong: str) -> None:
        with self._lock:
            self.wrong.append(wrong)

    def _good(self, rng: random.Random) -> None:
        number = rng.randrange(len(GOOD))
        answer = rng.choice((self._caller.whole, self._caller.streamed))(GOOD[number])
        self._compare(number, answer)

    def _slow(self, rng: random.Random) -> None:
        number = rng.randrange(len(GOOD))
        self._compare(number, self._caller.streamed(GOOD[number], slowly=0.02))

    def _compare(self, number: int, answer: list[tuple[str, str]]) -> None:
        if answer != self._expected[number]:
            self._note(f"good request {number} was answered in another way")

    def _bad(self, rng: random.Random) -> None:
        body, status, code = rng.choice(BAD)
        try:
            self._caller.whole(body)
        except Refused as refusal:
            if (refusal.status, refusal.code) != (status, code):
                self._note(f"{status} {code} was expected, and not {refusal}")
        else:
            self._note(f"{status} {code} was expected, and not an answer")

    def _left(self, rng: random.Random) -> None:
        self._caller.leave({**LONG, "seed": rng.randrange(LONG_SEEDS), "n": rng.choice((1, 2))}, rng.randrange(30))

    def _hung_up(self, rng: random.Random) -> None:
        self._caller.hang_up({**LONG, "seed": rng.randrange(LONG_SEEDS)}, rng.random() * 0.2)

    def look(self) -> None:
        server = self._server
        sample = Sample(
            self._done, time.monotonic() - self._began, server.megabytes(), server.threads(), server.files()
        )
        self.samples.append(sample)
        say(
            f"{sample.requests:9}{sample.seconds:9.0f}{sample.megabytes:9.1f}{sample.threads:9}{sample.files:7}"
            f"   {len(self.wrong)}"
        )

    def settle(self) -> dict[str, float]:
        """The engine's figures once nothing runs, or after a while."""
        deadline = time.monotonic() + PATIENCE_S / 10
        while True:
            found = self._caller.metrics()
            left = {name: found[f"kimi_vl_{name}"] for name in ("requests_running", "requests_waiting")}
            if not any(left.values()) or time.monotonic() > deadline:
                ratio = next(value for name, value in found.items() if "cache_usage" in name)
                return {**left, "cache_usage_ratio": ratio, "healthy": found["kimi_vl_engine_healthy"]}
            time.sleep(0.1)

    def report(self) -> dict[str, Any]:
        left = self.settle()
        first = self.samples[0]
        deadline = time.monotonic() + PATIENCE_S / 10
        while self._server.files() > first.files and time.monotonic() < deadline:
            time.sleep(0.1)  # connections are closed a moment after their request
        self.look()
        last = self.samples[-1]
        warm = next(sample for sample in self.samples if sample.requests >= WARM_UP * last.requests)
        gained = last.megabytes - warm.megabytes
        wrong = []
        if not (gained <= FLAT_MEGABYTES or math.isnan(gained)):
            wrong.append(f"{gained:.1f} MB were gained after half of the requests")
        if left != {"requests_running": 0, "requests_waiting": 0, "cache_usage_ratio": 0, "healthy": 1}:
            wrong.append(f"not everything is free: {left}")
        if last.files > first.files:
            wrong.append(f"{last.files - first.files} files stayed open")
        if last.threads > warm.threads + POOLED_THREADS:
            wrong.append(f"{last.threads - warm.threads} threads were gained after half of the requests")
        self.wrong[:0] = wrong  # before all that single requests say
        return {
            "soak": last.requests,
            "server": "openai",
            "callers": self._callers,
            "counts": dict(self.counts),
            "wrong": len(self.wrong),
            "left": left,
            "seconds": round(last.seconds, 1),
            "megabytes": [round(sample.megabytes, 1) for sample in self.samples],
            "megabytes_gained_after_warm_up": round(gained, 1),
            "threads": [sample.threads for sample in self.samples],
            "files": [sample.files for sample in self.samples],
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak --openai", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--requests", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--lines", type=int, default=20, help="lines of progress (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests (0)")
    parser.add_argument("--callers", type=int, default=8, help="at a time (8)")
    options = parser.parse_args(arguments)
    if options.requests < 1 or options.lines < 1 or options.callers < 1:
        parser.error("--requests, --lines and --callers must be at least 1")
    interrupt_on_signals()
    environment = {**MEMORY, **model_environment(os.environ, say)}
    with OpenAIServer(environment=environment) as server:
        soak = Soak(server, options.seed, options.callers, environment["KIMI_VL_MODEL"])
        with contextlib.suppress(KeyboardInterrupt):  # what was seen until then is reported
            soak.run(options.requests, min(options.lines, options.requests))
        figures = soak.report()
    for line in soak.wrong[:20]:
        say(f"wrong: {line}")
    print(json.dumps(figures))
    return 0 if not soak.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
