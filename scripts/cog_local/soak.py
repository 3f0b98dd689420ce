"""Many requests of mixed kinds to one server, and what becomes of its answers, memory and threads; `scripts/soak`."""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from cog_local.client import Client, RequestRefused
from cog_local.server import ROOT, Server, interrupt_on_signals, model_environment, say

WARM_UP = 0.5
"""The part of the requests after which memory should stay as it is. What the engine keeps on purpose (pages of its KV
cache, image vectors) is complete long before: the texts and the pictures are few, and the same ones again and again. It
is the allocator's free memory that takes so long, until every thread has met the largest requests."""
FLAT_MEGABYTES = 10.0
"""What may be gained after that. The more requests, the smaller a leak is seen: 4 kB a request in 5,000."""


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (112, 84)) -> str:
    """A data URL of a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255), (60, 200))
CUT = RED[: len("data:image/png;base64,") + 80]


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


SUM = "data:image/png;base64," + base64.b64encode((ROOT / "images" / "math_problem.png").read_bytes()).decode()
SUM_LENGTH = {"max_length_tokens": 60}
TEXT = {"type": "text", "text": "What colour is it?"}
GOOD: list[dict[str, Any]] = [
    {"prompt": "What is the result?", "image": SUM, "temperature": 0, "output_format": "answer", **SUM_LENGTH},
    {"prompt": "Hello, who are you?", "temperature": 0},
    {"prompt": "What is 12 + 30?", "seed": 5, "output_format": "answer"},
    {"prompt": "What is 7 + 8?", "seed": 1, "temperature": 1.5, "top_k": 20, "output_format": "json"},
    {"prompt": "Tell me more.", "seed": 2, "top_p": 0.8, "output_format": "think_tags"},
    {"prompt": "What colour is it?", "image": RED, "temperature": 0, "output_format": "answer"},
    {"prompt": "Compare them.", "image": RED, "images": [BLUE], "seed": 3},
    {"prompt": "What do you see?", "images": [BLUE, RED, BLUE], "seed": 4, "thinking_budget": 5},
    {"prompt": "Answer at once.", "thinking_budget": 0, "seed": 6},
    {"prompt": "Count up.", "stop_sequences": "3, .,\n", "seed": 7},
    {"prompt": "<|im_end|>" * 30, "seed": 8, "max_length_tokens": 24},
    {"prompt": "word " * 500, "seed": 9, "max_length_tokens": 24},
    {"messages": [user({"type": "image_url", "image_url": {"url": RED}}, TEXT)], "seed": 10},
    {"messages": [user({"type": "image"}, TEXT)], "image": BLUE, "seed": 10, "system_prompt": ""},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "◁think▷A greeting.◁/think▷Hello!"},
            {"role": "user", "content": "And you?"},
        ],
        "seed": 11,
    },
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "E_PROMPT_EMPTY"),
    ({"prompt": "word " * 20_000}, "E_PROMPT_TOO_LONG"),
    ({"prompt": "hi", "messages": [user(TEXT)]}, "E_PARAMETER"),
    ({"prompt": "hi", "seed": -1}, "E_PARAMETER"),
    ({"prompt": "hi", "max_tokens": 3, "max_new_tokens": 4}, "E_PARAMETER"),
    ({"messages": [{"role": "user"}]}, "E_MESSAGES_INVALID"),
    ({"messages": [user({"type": "image"})]}, "E_MESSAGES_INVALID"),
    ({"prompt": "hi", "image": "/etc/hostname"}, "E_IMAGE_SOURCE"),
    ({"prompt": "hi", "image": CUT}, "E_IMAGE_UNREADABLE"),
    ({"prompt": "hi", "image": "data:text/html;base64,PGh0bWw+"}, "E_IMAGE_FORMAT"),
    ({"prompt": "hi", "image": picture((0, 0, 0), (50_000, 1000))}, "E_IMAGE_TOO_LARGE"),
    ({"prompt": "hi", "images": [RED] * 65}, "E_TOO_MANY_IMAGES"),
    ({"prompt": "hi", "temperature": 9}, "422"),
    ({"prompt": 3}, "422"),
]
SUM_ANSWER = "25 + 13 = 38"
LONG: dict[str, Any] = {"prompt": "Tell me a long story.", "temperature": 2, "max_length_tokens": 4000}
LONG_SEEDS = 4
"""Few, or what the cache keeps of unfinished texts (bounded from the start) would look like a leak."""
LENGTH = {"max_length_tokens": 20}
CANCELLED_EARLY = "CancelationException"
"""Cog's exception, where it is raised while Cog itself still reads the inputs."""


@dataclass
class Sample:
    """What the server's processes hold at a moment."""

    requests: int
    seconds: float
    megabytes: float
    threads: int


@dataclass
class Soak:
    server: Server
    client: Client
    rng: random.Random
    callers: int = 1
    expected: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    done: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, requests: int, lines: int) -> None:
        self.expected = [self.answer(inputs, self.rng) for inputs in GOOD]
        if self.server.environment.get("KIMI_VL_MODEL") == "demo":
            self.expected[0] = SUM_ANSWER
        self.began = time.monotonic()
        say(f"{'requests':>9}{'seconds':>9}{'MB':>9}{'threads':>9}   good, bad, cancelled, wrong")
        self.look()
        marks = {round(requests * line / lines) for line in range(1, lines + 1)}
        seeds = (self.rng.randrange(2**63) for _ in range(requests))
        with ThreadPoolExecutor(self.callers) as callers:
            try:
                for _ in callers.map(self.one, seeds, itertools.repeat(marks)):
                    pass
            except BaseException:
                callers.shutdown(cancel_futures=True)
                raise

    def one(self, seed: int, marks: set[int]) -> None:
        """A request of a kind that its seed decides."""
        rng = random.Random(seed)
        kind = rng.choices(("good", "bad", "cancelled"), weights=(5, 4, 1))[0]
        getattr(self, kind)(rng)
        with self.lock:
            self.done += 1
            if self.done in marks:
                self.look()

    def count(self, kind: str) -> None:
        with self.lock:
            self.counts[kind] += 1

    def answer(self, inputs: dict[str, Any], rng: random.Random) -> str:
        """The whole output, by either way; of JSON the last line, since where the others are cut depends on time."""
        inputs = {**LENGTH, **inputs}
        if rng.random() < 0.5:
            final = self.client.predict(inputs)
        else:
            *_, last = self.client.stream(inputs)
            final = last.data
        if final["status"] != "succeeded":
            self.wrong.append(f"a good request ended as {final['status']}: {final.get('error')}")
            return ""
        text = "".join(final["output"])
        return text.splitlines()[-1] if inputs.get("output_format") == "json" else text

    def good(self, rng: random.Random) -> None:
        number = rng.randrange(len(GOOD))
        self.count("good")
        if self.answer(GOOD[number], rng) != self.expected[number]:
            self.wrong.append(f"good request {number} was answered in another way")

    def bad(self, rng: random.Random) -> None:
        inputs, code = rng.choice(BAD)
        self.count("bad")
        try:
            said = str(self.client.predict(inputs).get("error"))
        except RequestRefused as refusal:
            said = str(refusal.status)
        if code not in said:
            self.wrong.append(f"{code} was expected, and not: {said}")

    def cancelled(self, rng: random.Random) -> None:
        """Cancelled by name or by leaving, at the start or after some output."""
        name, after = uuid.uuid4().hex, rng.choice(("start", "output"))
        leave = rng.random() < 0.5
        with contextlib.closing(self.client.stream({**LONG, "seed": rng.randrange(LONG_SEEDS)}, name)) as events:
            for event in events:
                if event.name == after:
                    break
            if leave:
                self.count("left")
                return
            self.client.cancel(name)
            (final,) = [event.data for event in events if event.name == "completed"]
        status = final["status"]
        if status == "failed" and CANCELLED_EARLY in str(final.get("error")):
            status = "cancelled so early that Cog calls it failed"
        elif status not in ("canceled", "succeeded"):
            self.wrong.append(f"a cancelled request ended as {status}: {final.get('error')}")
        self.count({"canceled": "cancelled", "succeeded": "over before it was cancelled"}.get(status, status))

    def look(self) -> None:
        sample = Sample(self.done, time.monotonic() - self.began, *held(self.server))
        self.samples.append(sample)
        gone = self.counts["cancelled"] + self.counts["left"]
        say(
            f"{self.done:9}{sample.seconds:9.0f}{sample.megabytes:9.1f}{sample.threads:9}   "
            f"{self.counts['good']}, {self.counts['bad']}, {gone}, {len(self.wrong)}"
        )

    def report(self) -> dict[str, Any]:
        warm = [sample for sample in self.samples if sample.requests >= WARM_UP * self.samples[-1].requests]
        health = self.client.health()["status"]
        gained = warm[-1].megabytes - warm[0].megabytes
        return {
            "soak": self.samples[-1].requests,
            "callers": self.callers,
            "counts": dict(self.counts),
            "wrong": len(self.wrong),
            "health": health,
            "seconds": round(self.samples[-1].seconds, 1),
            "megabytes": [round(sample.megabytes, 1) for sample in self.samples],
            "megabytes_gained_after_warm_up": round(gained, 1),
            "memory_flat": gained <= FLAT_MEGABYTES,
            "threads": [sample.threads for sample in self.samples],
            "threads_gained_after_warm_up": warm[-1].threads - warm[0].threads,
        }


def processes(server: Server) -> list[int]:
    """The server's process and those below it."""
    assert server.process is not None
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in listing.splitlines())}
    found = [server.process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def held(server: Server) -> tuple[float, int]:
    """Megabytes in memory and threads of all the server's processes; threads only where /proc tells."""
    names = ",".join(map(str, processes(server)))
    sizes = subprocess.run(["ps", "-o", "rss=", "-p", names], capture_output=True, text=True, check=True).stdout
    threads = 0
    for name in names.split(","):
        with contextlib.suppress(OSError):
            threads += len(os.listdir(Path("/proc") / name / "task"))
    return sum(map(int, sizes.split())) * 1024 / 1e6, threads


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Many requests of mixed kinds to one server.")
    parser.add_argument("--requests", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--lines", type=int, default=20, help="lines of progress (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests (0)")
    parser.add_argument(
        "--callers", type=int, default=1, help="at a time; more than one: scripts/serve --concurrent (1)"
    )
    options = parser.parse_args()
    if options.requests < 1 or options.lines < 1 or options.callers < 1:
        parser.error("--requests, --lines and --callers must be at least 1")
    interrupt_on_signals()
    environment = model_environment(os.environ, say)
    with Server(environment=environment, concurrent=options.callers > 1) as server:
        soak = Soak(server, server.client, random.Random(options.seed), options.callers)
        with contextlib.suppress(KeyboardInterrupt):  # what was seen until then is reported
            soak.run(options.requests, min(options.lines, options.requests))
        soak.client.settle()
        if not soak.samples:
            return 130
        if soak.done > soak.samples[-1].requests:
            soak.look()
        figures = soak.report()
    for line in soak.wrong[:20]:
        say(f"wrong: {line}")
    if not figures["memory_flat"]:
        say(f"wrong: {figures['megabytes_gained_after_warm_up']} MB were gained after half of the requests")
    print(json.dumps(figures))
    return 0 if not soak.wrong and figures["memory_flat"] and figures["health"] == "READY" else 1


if __name__ == "__main__":
    sys.exit(main())
