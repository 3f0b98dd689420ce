"""Writes the demo's questions in the forms that evaluation programs read: a task of lmms-eval, a table of VLMEvalKit.

They are those that `scripts/train_demo evaluate` asks with the same seed and count.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from demo_world import evaluate, grading, lessons

TASK = "kimi_demo"
MAX_NEW_TOKENS = 512
BY_TEXT = tuple(task for task in lessons.TASKS if task not in (*grading.BOXES, "click"))
"""Tasks whose answers are right word for word, as other programs judge them; places may be a little off."""
ONE_PICTURE = ("sum", "typed_sum", "object", "count", "place", "describe", "json")
"""Those of one picture and one turn, which are all that a table can have."""

YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {{questions}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: !function functions.doc_to_text
doc_to_messages: !function functions.doc_to_messages
doc_to_target: answer
process_results: !function functions.process_results
generation_kwargs:
  max_new_tokens: {MAX_NEW_TOKENS}
  temperature: 0
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""


def write_task(folder: Path, seed: int, count: int, tasks: Sequence[str]) -> Path:
    """A folder for lmms-eval's ``--include_path``: the task, its functions, the questions and their pictures."""
    (folder / "pictures").mkdir(parents=True)
    questions = folder / "questions.jsonl"
    with questions.open("w", encoding="utf-8") as file:
        for task in tasks:
            for number, (conversation, pictures) in enumerate(evaluate.questions(seed, count, task)):
                paths = [folder / "pictures" / f"{task}-{number}-{index}.png" for index in range(len(pictures))]
                for path, picture in zip(paths, pictures, strict=True):
                    picture.image.save(path)
                line = {
                    "id": f"{task}-{number}",
                    "task": task,
                    "messages": json.dumps(conversation.messages),  # as a text: its form differs from line to line
                    "pictures": list(map(str, paths)),
                    "question": lessons.text_of(conversation.messages[-1]),
                    "answer": conversation.answer,
                }
                file.write(json.dumps(line) + "\n")
    shutil.copy(Path(__file__).with_name("lmms_functions.py"), folder / "functions.py")
    (folder / f"{TASK}.yaml").write_text(YAML.format(questions=json.dumps(str(questions))), encoding="utf-8")
    return folder


def lines_of_table(seed: int, count: int, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The lines of a table for VLMEvalKit. System prompts are left out, as its tables have none."""
    index = 0
    for task in tasks:
        for conversation, pictures in evaluate.questions(seed, count, task):
            file = io.BytesIO()
            [picture] = pictures
            picture.image.save(file, "PNG")
            yield {
                "index": index,
                "image": base64.b64encode(file.getvalue()).decode(),
                "question": lessons.text_of(conversation.messages[-1]),
                "answer": conversation.answer,
                "category": task,
            }
            index += 1


def write_table(path: Path, seed: int, count: int, tasks: Sequence[str]) -> int:
    """A file in TSV for VLMEvalKit; the number of its questions."""
    lines = list(lines_of_table(seed, count, tasks))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(lines[0]), delimiter="\t")
        table.writeheader()
        table.writerows(lines)
    return len(lines)
