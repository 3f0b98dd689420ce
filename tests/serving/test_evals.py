"""`scripts/evals`: the demo's questions as lmms-eval and VLMEvalKit read them, and lmms-eval's own figure."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from evals import lmms, lmms_functions, questions
from PIL import Image, ImageChops

from demo_world import evaluate, lessons
from kimi_vl.weights import resolve

from .conftest import ROOT, python_with

SEED = evaluate.SEED


def test_a_task_has_the_conversations_with_their_pictures(tmp_path: Path) -> None:
    folder = questions.write_task(tmp_path / "task", SEED, 1, list(questions.BY_TEXT))
    docs = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert [doc["task"] for doc in docs] == list(questions.BY_TEXT)
    for doc in docs:
        [(conversation, pictures)] = evaluate.questions(SEED, 1, doc["task"])
        assert doc["answer"] == conversation.answer
        messages = lmms_functions.doc_to_messages(doc)
        assert [message["role"] for message in messages] == [message["role"] for message in conversation.messages]
        parts = [part for message in messages for part in message["content"]]
        shown = [part["url"] for part in parts if part["type"] == "image"]
        assert len(shown) == len(pictures) == len(lmms_functions.doc_to_visual(doc))
        for picture, due in zip(shown, pictures, strict=True):
            assert ImageChops.difference(picture, due.image).getbbox() is None
        assert parts[-1]["text"] == lmms_functions.doc_to_text(doc) == lessons.text_of(conversation.messages[-1])
    assert (folder / "functions.py").read_bytes() == (ROOT / "scripts" / "evals" / "lmms_functions.py").read_bytes()


def test_only_the_right_answer_is_right() -> None:
    doc = {"answer": "1 + 1 = 2"}
    for said, right in ((" 1 + 1 = 2\n", 1.0), ("1 + 1 = 2.", 0.0), ("", 0.0), ("◁think▷◁/think▷1 + 1 = 2", 0.0)):
        assert lmms_functions.process_results(doc, [said]) == {"right": right}


def of_one_picture_and_turn(task: str) -> bool:
    for conversation, pictures in evaluate.questions(SEED, 3, task):
        asked = [message for message in conversation.messages if message["role"] == "user"]
        if (len(pictures), len(asked)) != (1, 1):
            return False
    return True


def test_a_table_has_questions_of_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "demo.tsv"
    assert lmms.main(["--tsv", str(path), "--count", "1"]) == 0
    usual = csv.field_size_limit(1 << 24)
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t"))
    finally:
        csv.field_size_limit(usual)
    assert [line["category"] for line in lines] == list(questions.ONE_PICTURE)
    assert list(questions.ONE_PICTURE) == [task for task in questions.BY_TEXT if of_one_picture_and_turn(task)]
    assert [line["index"] for line in lines] == [str(index) for index in range(len(lines))]
    [(conversation, [picture])] = evaluate.questions(SEED, 1, "sum")
    assert lines[0]["answer"] == conversation.answer
    shown = Image.open(io.BytesIO(base64.b64decode(lines[0]["image"])))
    assert ImageChops.difference(shown.convert("RGB"), picture.image).getbbox() is None


@pytest.mark.nightly
def test_lmms_eval_finds_what_the_demo_s_own_evaluation_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same questions; of 66 answers at most two may be another, as sums are rounded in another order in a batch."""
    monkeypatch.setenv("KIMI_VL_LMMS_EVAL", python_with("lmms_eval", "lmms-eval"))
    monkeypatch.setenv("KIMI_VL_MODEL", "demo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert lmms.main(["--count", "6", "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    due = evaluate.examine(evaluate.Examinee(resolve.DEMO), SEED, 6, list(questions.BY_TEXT))
    assert found["questions"] == len(due) == 66
    assert abs(found["right"] * 66 - sum(result.right for result in due)) <= 2.01
    assert found["right"] > 0.8 and found["standard_error"] < 0.06
    assert found["tasks"].keys() == set(questions.BY_TEXT)
