"""Rounds in which contestants take turns, so that a slow minute of the machine meets all of them.

They are all in memory, each stopped while another has its turn; or, where there is no room for that, each is started
for its turn and ended after it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .conditions import Others, busy_neighbour
from .contestants import Process

Question = tuple[Any, ...]
"""A method of a contestant and what it is given."""
Answers = dict[str, list[dict[str, Any]]]
"""Of everybody, by name, one of each round."""


class Contest:
    """``starts`` has for each contestant, by its name, what starts it. ``apart``: one is in memory at a time.
    ``neighbour``: meanwhile another process keeps a core busy. ``wait``: each round begins when a line comes on
    standard input. ``others`` are the cores that other processes kept busy, turn by turn."""

    def __init__(
        self,
        starts: dict[str, Callable[[], Process]],
        *,
        apart: bool = False,
        neighbour: bool = False,
        wait: bool = False,
    ):
        self._starts, self._apart, self._neighbour, self._wait = starts, apart, neighbour, wait
        self._running: dict[str, Process] = {}
        self.versions: dict[str, str] = {}
        self.weights: dict[str, tuple[int, int]] = {}
        self.ready_s: dict[str, list[float]] = {name: [] for name in starts}
        self.others: list[float] = []
        if not apart:
            try:
                for name in starts:
                    self._process(name)
            except BaseException:
                self.end()
                raise

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
        self._running.clear()

    def ask(self, questions: Sequence[Question], rounds: int, before: Callable[[], None]) -> list[Answers]:
        """To every question everybody's answers. ``before`` is called before each round; a first round warms up, counts
        nothing and waits for nobody."""
        answers: list[Answers] = [{name: [] for name in self._starts} for _ in questions]
        for number in range(rounds + 1):
            if number and self._wait:
                sys.stdin.readline()
            before()
            for name, index, answer, others in self._round(questions, backwards=number % 2 == 1):
                if number:
                    answers[index][name].append(answer)
                    self.others.append(others)
            if number:
                print(f"round {number} of {rounds} is over", file=sys.stderr, flush=True)
        return answers

    def once(self, questions: Sequence[Question]) -> list[dict[str, dict[str, Any]]]:
        """Everybody's answer to every question, asked once."""
        answers: list[dict[str, dict[str, Any]]] = [{} for _ in questions]
        for name, index, answer, _ in self._round(questions):
            answers[index][name] = answer
        return answers

    def _round(self, questions: Sequence[Question], backwards: bool = False) -> Any:
        # there and back, so that nobody always follows the same one
        names = list(self._starts)[:: -1 if backwards else 1]
        turns = [(name, index) for index in range(len(questions)) for name in names]
        if self._apart:
            turns.sort(key=lambda turn: names.index(turn[0]))
        for name, index in turns:
            process = self._process(name)
            with busy_neighbour() if self._neighbour else contextlib.nullcontext(0) as neighbour:
                others = Others([process.group, neighbour])
                answer = process.ask(*questions[index])
                yield name, index, answer, others.cores()

    def _process(self, name: str) -> Process:
        if name not in self._running:
            if self._apart:
                self.end()
            process = self._running[name] = self._starts[name]()
            self.versions[name] = process.version
            self.ready_s[name].append(round(process.ready_s, 2))
            if process.weights:
                self.weights[name] = process.weights
        return self._running[name]
