"""Several hundred files, good, damaged and hostile, through one process: each gives what is promised, and it lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_corpus
import pytest
from image_corpus import ANSWER, SIZE, Case, quarters, saved

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 500_000_000
"""Bytes that one image may take beyond what the process held before it."""
HANG_SECONDS = 240
CORPUS = image_corpus.corpus()


class Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("image_worker.py"))],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.replies: list[dict[str, Any]] = []

    def look(self, data: bytes, suffix: str = "") -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        watchdog = threading.Timer(HANG_SECONDS, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps({"length": len(data), "suffix": suffix}).encode() + b"\n" + data)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watchdog.cancel()
        assert line, f"the process died or hung: {self.process.poll()}"
        self.replies.append(json.loads(line))
        return self.replies[-1]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    running = Worker()
    yield running
    running.close()


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 300
    assert len({case.name for case in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("case", CORPUS, ids=[case.name for case in CORPUS])
def test_a_file_gives_the_promised_answer_or_error(worker: Worker, case: Case) -> None:
    reply = worker.look(case.make(), case.suffix)
    assert reply["code"] in case.codes, reply
    assert reply["memory"] <= MEMORY
    if reply["code"] != ANSWER:
        code, _, sentence = reply["error"].partition(": ")
        assert code == reply["code"] and sentence.endswith(".")
        assert "/" not in sentence and "PIL" not in sentence
        return
    if case.size is not None:
        assert tuple(reply["size"]) == case.size
    if case.digest is not None:
        assert reply["digest"] == case.digest
    for spot, colour in zip(reply["spots"], case.colours or reply["spots"], strict=True):
        assert max(abs(a - b) for a, b in zip(spot, colour, strict=True)) <= case.tolerance, reply["spots"]


def test_the_process_lives_on_and_keeps_nothing(worker: Worker) -> None:
    before = len(worker.replies)
    reply = worker.look(saved(quarters(), "PNG"))
    assert (reply["code"], tuple(reply["size"])) == (ANSWER, SIZE)
    assert worker.process.poll() is None
    if before > 300:
        assert reply["resting"] - worker.replies[0]["resting"] < 150_000_000
