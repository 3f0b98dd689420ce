"""The demo model does what its card says, on pictures drawn for this test, in both implementations."""

from __future__ import annotations

import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import kimi_vl
import predict
from demo_world import doors, evaluate, lessons
from demo_world.pictures import MOST_PATCHES, PATCH
from kimi_vl.media import sandbox
from kimi_vl.weights import resolve

ROOT = Path(__file__).parents[2]
SEED = 31_000_000  # neither training's nor the card's


@pytest.fixture(scope="module")
def examinee():
    return evaluate.Examinee(resolve.DEMO)


@pytest.fixture(scope="module")
def pipeline():
    return kimi_vl.load("demo")


def promised() -> dict[str, tuple[int, float]]:
    """How many questions the model card measured for each task, and the share answered right."""
    card = (resolve.DEMO / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+)% \|", card, re.MULTILINE)
    return {task: (int(count), float(share) / 100) for task, count, share in rows}


def test_the_card_covers_every_task():
    assert promised().keys() == lessons.TASKS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [24, pytest.param(96, marks=pytest.mark.nightly)])  # questions
@pytest.mark.parametrize("task", lessons.TASKS)
def test_fresh_pictures(examinee, task, asked):
    """New questions, right as often as the card says but for chance: three standard deviations of both samples."""
    check(evaluate.examine(examinee, SEED, asked, [task]))


def check(results: list[evaluate.Result]) -> None:
    """All of one task."""
    asked, (measured, share) = len(results), promised()[results[0].task]
    share = (share * measured + 1) / (measured + 2)  # no finite sample shows that a model is never wrong
    allowed = asked * share - 3 * math.sqrt(asked * share * (1 - share) * (1 + asked / measured))
    wrong = [(result.question, result.due, result.came) for result in results if not result.right]
    assert asked - len(wrong) >= allowed, wrong


def strangers_sum(rng: random.Random) -> tuple[Image.Image, str, str]:
    """A sum as another program draws it, in Pillow's own face at 28 to 90 px: picture, question, answer."""
    while True:
        width, height = rng.randint(200, 640), rng.randint(100, 448)
        a, op, b = rng.randint(0, 99), rng.choice("+-"), rng.randint(0, 99)
        text = rng.choice(("{} {} {}", "{} {} {} =", "{} {} {} = ?", "{}{}{}")).format(a, op, b)
        font = ImageFont.load_default(rng.randint(28, 90))
        left, top, right, bottom = font.getbbox(text)
        free = width - math.ceil(right - left), height - math.ceil(bottom - top)
        if width * height <= MOST_PATCHES * PATCH**2 and min(free) >= 0:
            break
    image = Image.new("RGB", (width, height), tuple(rng.randint(215, 255) for _ in range(3)))
    x, y = (rng.choice((0, room, room // 2, *(rng.randint(0, room) for _ in range(3)))) for room in free)
    ink = tuple(rng.randint(0, 110) for _ in range(3))
    ImageDraw.Draw(image).text((x - left, y - top), text, fill=ink, font=font)
    question = rng.choice(("What is the result?", "Solve this.", "Calculate the result.", "How much is it?"))
    return image, question, f"{a} {op} {b} = {a + b if op == '+' else a - b}"


@pytest.mark.slow
@pytest.mark.parametrize("asked", [24, pytest.param(240, marks=pytest.mark.nightly)])  # questions
def test_sums_of_another_program(pipeline, asked):
    """Right as often as the card says but for chance: three standard deviations."""
    rng = random.Random(asked)
    drawn = [strangers_sum(rng) for _ in range(asked)]
    streams = [
        pipeline.stream(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            [image],
            temperature=0,
        )
        for image, question, _ in drawn
    ]
    wrong = []
    for stream, (_, _, due) in zip(streams, drawn, strict=True):
        *_, done = stream
        if done.answer.strip() != due:
            wrong.append((due, done.answer))
    [share] = re.findall(r"draws them, ([\d.]+) % of \d+", (resolve.DEMO / "README.md").read_text("utf-8"))
    share = float(share) / 100
    assert asked - len(wrong) >= asked * share - 3 * math.sqrt(asked * share * (1 - share)), wrong


def test_the_sample_pictures(pipeline):
    def ask(text: str, *names: str) -> str:
        parts = [{"type": "image"} for _ in names] + [{"type": "text", "text": text}]
        images = [ROOT / "images" / name for name in names]
        return pipeline.complete([{"role": "user", "content": parts}], images, temperature=0).answer

    assert ask("Solve this math problem shown in the image.", "math_problem.png") == "25 + 13 = 38"
    assert ask("How many objects are there?", "demo1.jpeg") == "There are 3 objects."


def test_thinking_comes_first_and_names_what_it_reads(pipeline):
    image = Image.open(ROOT / "images" / "math_problem.png")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the result?"}]}]
    done = pipeline.complete(messages, [image], temperature=0)
    assert done.reasoning.startswith("The picture shows 25 + 13.")
    assert done.thinking_closed_by == "model"
    assert done.usage.image_tokens == 15 * 9


def test_a_budget_still_brings_an_answer(pipeline):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the result?"}]}]
    images = [ROOT / "images" / "math_problem.png"]
    for budget in (0, 3, 9):
        done = pipeline.complete(messages, images, temperature=0, thinking_budget=budget)
        assert (done.thinking_closed_by, done.finish_reason) == ("budget", "stop")
        assert done.answer.strip()


def test_an_output_of_any_length_has_whole_markers_in_every_form(pipeline):
    """All at once: equal beginnings are computed once, and the steps are shared. Every length and budget is cut in
    tests/unit/test_cut_output.py, and here with KIMI_VL_FUZZ."""
    every = "KIMI_VL_FUZZ" in os.environ
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    whole = pipeline.complete(messages, temperature=0)
    assert whole.answer == "12 + 30 = 42"
    streams = {
        (length, budget): pipeline.stream(messages, temperature=0, max_length_tokens=length, thinking_budget=budget)
        for length in (range(1, 41) if every else (*range(1, 11), 13, 40))
        for budget in ((None, 0, 1, 2, 5, 20) if every else (None, 0, 2, 5))
    }
    for case, stream in streams.items():
        events = list(stream)
        done = events[-1]
        assert whole.reasoning.startswith(done.reasoning), case
        assert not re.search(r"[◁▷\ufffd]|think", done.reasoning + done.answer), case
        around = f"◁think▷{done.reasoning}◁/think▷" if done.reasoning else ""
        tags = f"<think>{done.reasoning}</think>" if done.reasoning else ""
        said = {"text": around + done.answer, "think_tags": tags + done.answer, "answer": done.answer}
        for form, expected in said.items():
            assert "".join(predict.format_events(iter(events), form)) == expected, (case, form)
        lines = [json.loads(line) for line in predict.format_events(iter(events), "json")]
        assert "".join(line["text"] for line in lines if line["type"] == "answer") == done.answer, case


@pytest.mark.slow
def test_the_service_answers_as_the_model_alone_does(examinee, monkeypatch):
    """The two ways to measure the demo: plain generation, and whole requests, where some pictures come as files."""
    monkeypatch.setattr(sandbox, "WALL_S", 900.0)  # however loaded the machine is
    monkeypatch.setattr(sandbox, "WAIT_S", 900.0)
    service = doors.Service(resolve.DEMO)
    for task in ("sum", "compare", "talk"):
        asked = list(evaluate.questions(SEED, 3, task))
        assert list(service.answer(asked)) == list(examinee.answer(asked))


@pytest.mark.slow
@pytest.mark.parametrize("asked", [6, pytest.param(48, marks=pytest.mark.nightly)])  # questions
@pytest.mark.parametrize("task", lessons.SEQUENCES)
def test_films_and_documents_come_as_files(task, asked, monkeypatch):
    """A video's frames are compressed and a document's pages drawn, and the service takes the same of them."""
    monkeypatch.setattr(sandbox, "WALL_S", 900.0)  # however loaded the machine is
    monkeypatch.setattr(sandbox, "WAIT_S", 900.0)
    check(evaluate.examine(doors.Service(resolve.DEMO), SEED, asked, [task]))


@torch.inference_mode()
def test_both_implementations_say_the_same(examinee):
    from kimi_vl import KimiVLForConditionalGeneration

    other = KimiVLForConditionalGeneration.from_pretrained(resolve.DEMO, dtype=torch.float32)
    (asked,) = evaluate.questions(SEED, 1, "compare")
    prompt = examinee.prompt(*asked)
    ids = torch.tensor([list(prompt.ids)])
    ours = examinee.model(ids, prompt.pixel_values, prompt.grids)
    theirs = other(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixel_values,
        image_grid_hws=torch.tensor(prompt.grids),
    ).logits
    assert (ours - theirs).abs().max() < 5e-4


def test_the_checkpoint_is_small_and_in_the_published_format():
    files = {path.name for path in resolve.DEMO.iterdir()}
    assert {"config.json", "model.safetensors", "tiktoken.model", "tokenizer_config.json"} <= files
    assert (resolve.DEMO / "model.safetensors").stat().st_size <= 8e6
    assert not list(resolve.DEMO.glob("*.py"))
