"""Measures the demo model on freshly drawn pictures: the share of right answers, task by task.

Answers are greedy, in float32 or as loaded, through the same chat format and generation as the service; with
``--doors`` through the service's own entry, where frames come as a video file and pages as a PDF document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from demo_world import artists, doors, grading, lessons, pictures, printing
from kimi_vl.media.images import ImageOptions, preprocess
from kimi_vl.model import generation
from kimi_vl.model.config import num_image_tokens
from kimi_vl.text import chat
from kimi_vl.text.thinking import ThinkingSplitter
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader, resolve

SEED = 77_000_000  # far from the seeds of training
LIMIT = 320
ROWS = 24


@dataclass(frozen=True)
class Result:
    """One question: what was due, what came, and what the thinking says the answer is."""

    task: str
    question: str
    due: str
    came: str
    right: bool
    thinking_right: bool


def questions(seed: int, count: int, task: str) -> Iterator[tuple[lessons.Conversation, tuple[pictures.Picture, ...]]]:
    """``count`` fresh conversations of ``task``, with their pictures; sizes of whole rows stay together."""
    fonts = printing.find_fonts()
    for index in range(count):
        rng = random.Random(f"{seed} {task} {index // ROWS}")
        size = artists.size_for(rng, task)
        study = lessons.make_study(random.Random(f"{seed} {task} {index} study"), fonts, task, 1, [size])
        yield study.conversations[0], study.pictures


Asked = tuple[lessons.Conversation, tuple[pictures.Picture, ...]]


class Answering(Protocol):
    """Gives thinking and answer of each conversation."""

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[str, str]]: ...


class Examinee:
    """A loaded checkpoint that answers batches of conversations greedily."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32):
        self.model = loader.load(directory, dtype=dtype)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.options = ImageOptions.from_directory(directory)

    def prompt(self, conversation: lessons.Conversation, shown: Sequence[pictures.Picture]) -> generation.Prompt:
        encoded = [preprocess(picture.image, self.options) for picture in shown]
        ids = chat.encode(self.tokenizer, conversation.messages, [num_image_tokens(grid) for _, grid in encoded])
        pixels = torch.cat([torch.from_numpy(patches) for patches, _ in encoded]) if encoded else None
        return generation.Prompt(ids, pixels, [grid for _, grid in encoded])

    def answer(self, asked: Sequence[Asked]) -> Iterator[tuple[str, str]]:
        """Thinking and answer of each conversation."""
        prompts = [self.prompt(conversation, shown) for conversation, shown in asked]
        for ids in generation.greedy(self.model, prompts, self.tokenizer.stop_ids, LIMIT):
            splitter = ThinkingSplitter()
            pieces = splitter.push(self.tokenizer.decode(ids)) + splitter.finish()
            yield tuple("".join(text for kind, text in pieces if kind == wanted) for wanted in ("reasoning", "answer"))  # pyright: ignore[reportReturnType]


def examine(examinee: Answering, seed: int, count: int, tasks: Sequence[str]) -> list[Result]:
    """Results of ``count`` questions of every task."""
    results = []
    for task in tasks:
        asked = list(questions(seed, count, task))
        for begin in range(0, count, ROWS):
            batch = asked[begin : begin + ROWS]
            for (conversation, shown), (thinking, answer) in zip(batch, examinee.answer(batch), strict=True):
                question = lessons.text_of(conversation.messages[-1])
                right = grading.is_right(conversation, shown, answer)
                thought = thinking.strip() == conversation.thinking
                results.append(Result(task, question, conversation.answer, answer, right, thought))
    return results


def table(results: Sequence[Result]) -> str:
    """Accuracy by task as the rows of a Markdown table."""
    by_task: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_task[result.task].append(result)
    lines = ["| task | questions | answer right | thinking exactly right |", "|---|---|---|---|"]
    for task, rows in by_task.items():
        right = sum(row.right for row in rows) / len(rows)
        thought = sum(row.thinking_right for row in rows) / len(rows)
        lines.append(f"| {task} | {len(rows)} | {right:.1%} | {thought:.1%} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the demo model on fresh pictures.")
    parser.add_argument("--model", type=Path, default=resolve.DEMO)
    parser.add_argument("--count", type=int, default=192, help="questions of each task")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--tasks", nargs="*", choices=lessons.TASKS, default=list(lessons.TASKS))
    parser.add_argument("--doors", action="store_true", help="ask the service, with videos and documents as files")
    parser.add_argument("--mistakes", type=int, default=0, help="print this many wrong answers of each task")
    args = parser.parse_args()
    examinee = doors.Service(args.model) if args.doors else Examinee(args.model)
    results = examine(examinee, args.seed, args.count, args.tasks)
    print(table(results))
    for task in args.tasks:
        wrong = [result for result in results if result.task == task and not result.right]
        for result in wrong[: args.mistakes]:
            print(f"{task}: {result.question!r} due {result.due!r}, came {result.came!r}")
    right = sum(result.right for result in results) / len(results)
    print(json.dumps({"questions": len(results), "right": round(right, 4), "seed": args.seed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
