"""Lessons of the demo world for boxes, clicks, videos, documents, JSON and sums as any program prints them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest

from demo_world import artists, doors, grading, lessons
from demo_world.labels import NOWHERE, patch_labels
from demo_world.lessons import Conversation, text_of
from demo_world.pictures import PATCH, Item, Picture, tint, wide_size
from demo_world.places import GUI_SYSTEM
from demo_world.printing import dark, draw_typed_sum, find_fonts
from demo_world.scenes import draw_scene
from kimi_vl import attachments
from kimi_vl.media import sandbox
from kimi_vl.media.images import ImageOptions, plan
from kimi_vl.text import chat, messages, prompts
from kimi_vl.text.grounding import grounding
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import resolve

FONTS = find_fonts()


def talks(task: str, count: int, seed: int = 3) -> Iterator[tuple[Conversation, tuple[Picture, ...]]]:
    for index in range(count):
        rng = random.Random(f"{seed} {task} {index}")
        study = lessons.make_study(rng, FONTS, task, 1, [artists.size_for(rng, task)])
        yield study.conversations[0], study.pictures


def names(picture: Picture) -> list[str]:
    return [f"{item.colour} {item.kind}" for item in picture.items]


# Sums as any program prints them


@pytest.mark.parametrize("seed", range(40))
def test_typed_sums_lie_inside_their_boxes(seed: int) -> None:
    rng = random.Random(seed)
    a, op, b = rng.randint(0, 99), rng.choice("+-"), rng.randint(0, 99)
    picture = draw_typed_sum(rng, FONTS, a, op, b, photo=False)
    assert re.fullmatch(rf"{a}[{op}]{b}=?\??", "".join(item.kind for item in picture.items))
    assert [item.order for item in picture.items] == list(range(1, len(picture.items) + 1))
    pixels = np.asarray(picture.image).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    inked = np.abs(pixels - ground).sum(-1) > 60
    assert inked.any()
    covered = np.zeros_like(inked)
    for x0, y0, x1, y1 in (item.box for item in picture.items):
        assert -2 <= x0 < x1 <= picture.size[0] + 2 and -2 <= y0 < y1 <= picture.size[1] + 2
        box = slice(max(0, y0 - 2), y1 + 2), slice(max(0, x0 - 2), x1 + 2)
        assert inked[box].any()
        covered[box] = True
    assert not (inked & ~covered).any()


def test_typed_sums_reach_every_edge_and_the_middle() -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(120):
        picture = draw_typed_sum(rng, FONTS, 12, "+", 34, photo=False)
        boxes = np.array([item.box for item in picture.items])
        left, top, right, bottom = *boxes[:, :2].min(0), *boxes[:, 2:].max(0)
        width, height = picture.size
        found = (left <= 2, top <= 2, right >= width - 2, bottom >= height - 2)
        seen |= {side for side, there in zip(("left", "top", "right", "bottom"), found, strict=True) if there}
        seen |= {"inside"} if not any(found) else set()
    assert seen == {"left", "top", "right", "bottom", "inside"}


def test_tints_are_light_inks_dark_and_sizes_fit_the_model() -> None:
    rng = random.Random(2)
    assert min(min(tint(rng)) for _ in range(500)) >= 195 and max(max(dark(rng)) for _ in range(500)) <= 110
    sizes = [wide_size(rng) for _ in range(500)]
    assert all((width // PATCH) * (height // PATCH) <= 1024 and min(width, height) >= 64 for width, height in sizes)
    assert any(width > 2 * height for width, height in sizes) and any(height > 1.2 * width for width, height in sizes)


# Boxes and clicks


def test_patches_know_where_their_object_is() -> None:
    rng = random.Random(5)
    for _ in range(6):
        picture = draw_scene(rng, artists.different_looks(rng, 3), wide_size(rng) if rng.random() < 0.5 else None)
        labels = patch_labels(picture)
        for item in picture.items:
            own = labels[labels[..., 2] == item.order]
            x0, y0, x1, y1 = item.box
            width, height = picture.size
            exact = np.array([x0 / width, y0 / height, x1 / width, y1 / height])
            exact = 100 * np.concatenate([exact, [(exact[0] + exact[2]) / 2, (exact[1] + exact[3]) / 2]])
            assert (np.abs(own[:, 3:] - exact) <= 0.5 + 1e-9).all() and len(own)
        assert (labels[labels[..., 0] == 0][:, 3:] == NOWHERE).all()


@pytest.mark.parametrize("task", ["box", "boxes", "click"])
def test_what_is_due_is_right_and_asked_for(task: str) -> None:
    forms, absent = set(), 0
    for talk, (picture,) in talks(task, 60):
        question, found = text_of(talk.messages[-1]), grounding(talk.answer, picture.size)
        assert grading.is_right(talk, [picture], talk.answer)
        assert not grading.is_right(talk, [picture], "It is there.")
        assert len(found.findings) == len(talk.wanted) and found.unit in ("relative", None)
        absent += not talk.wanted
        for item, finding in zip(talk.wanted, found.findings, strict=True):
            assert item in picture.items
            name = f"{item.colour} {item.kind}"
            asked = name in question.lower() or re.search(r"object", question)
            assert asked and (task == "click" or finding.label == name)
            if finding.box:
                off = np.abs(np.array(finding.box) - item.box).max()
                assert off <= max(picture.size) * 0.005 + 0.01
        if not talk.wanted:
            assert not any(name in question.lower() for name in names(picture))
        system = talk.messages[0]["content"] if talk.messages[0]["role"] == "system" else None
        if question.startswith("## Task:\n"):
            assert prompts.click(question.removeprefix("## Task:\n"))[0]["content"] == system == GUI_SYSTEM
            assert talk.answer.startswith("## Action:\nClick the ") and "## Code:\n```python\n" in talk.answer
            forms.add("gui")
        elif question.startswith("Find every "):
            label = re.match(r"Find every (.*?) in the image", question)
            assert label and prompts.detect(label[1])[0]["content"][1]["text"] == question
            forms.add("detect")
        else:
            forms.add("free")
    assert forms == ({"gui", "free"} if task == "click" else {"detect", "free"})
    assert (absent > 0) == (task != "click")


def box_talk(*items: Item) -> tuple[Conversation, list[Picture]]:
    picture = draw_scene(random.Random(1), [("red", "circle")], (400, 200))
    return Conversation("boxes", [], "", "", (), items), [dataclasses.replace(picture, items=items)]


def said(*boxes: tuple[str, tuple[float, ...]]) -> str:
    return json.dumps([{"bbox_2d": list(box), "label": label} for label, box in boxes])


def test_boxes_are_graded_by_overlap_and_name() -> None:
    circle = Item("circle", "red", (100, 50, 200, 150), 1)
    star = Item("star", "blue", (300, 100, 340, 140), 2)
    talk, shown = box_talk(circle, star)
    exact, other = ("red circle", (0.25, 0.25, 0.5, 0.75)), ("blue star", (0.75, 0.5, 0.85, 0.7))
    assert grading.is_right(talk, shown, said(exact, other))
    assert grading.is_right(talk, shown, said(other, exact))
    assert grading.is_right(talk, shown, said(("red circle", (0.25, 0.25, 0.5, 0.605)), other))  # 0.71 of the area
    assert not grading.is_right(talk, shown, said(("red circle", (0.25, 0.25, 0.5, 0.595)), other))  # 0.69
    assert not grading.is_right(talk, shown, said(("blue circle", exact[1]), other))
    assert not grading.is_right(talk, shown, said(exact))
    assert not grading.is_right(talk, shown, said(exact, other, other))
    assert not grading.is_right(talk, shown, said(exact, exact))
    assert not grading.is_right(talk, shown, "")
    nothing, shown = box_talk()
    assert grading.is_right(nothing, shown, "```json\n[]\n```\n")
    assert not grading.is_right(nothing, shown, said(exact)) and not grading.is_right(nothing, shown, "None.")
    assert grading.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert grading.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_a_click_is_graded_by_where_it_lands() -> None:
    talk, shown = box_talk(Item("circle", "red", (100, 50, 200, 150), 1))
    talk = dataclasses.replace(talk, task="click")
    for code, right in (
        ("pyautogui.click(x=0.38, y=0.50)", True),
        ("## Code:\n```python\npyautogui.click(x=0.26, y=0.74)\n```", True),
        ("pyautogui.click(x=0.24, y=0.50)", False),
        ("pyautogui.click(x=0.38, y=0.76)", False),
        ("pyautogui.click(x=0.38, y=0.50) pyautogui.click(x=0.38, y=0.50)", False),
        ("0.38, 0.50", False),
    ):
        assert grading.is_right(talk, shown, code) == right, code


# Videos and documents


def sides(frame: Picture) -> dict[str, str]:
    middle = frame.size[0] / 2
    return {
        name: "left" if sum(item.box[::2]) / 2 < middle else "right"
        for name, item in zip(names(frame), frame.items, strict=True)
    }


def test_films_say_what_changes_and_when() -> None:
    kinds = set()
    for talk, frames in talks("film", 90):
        times = [str(frame.label) for frame in frames]
        assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time in times)
        gaps = {doors.seconds(two) - doors.seconds(one) for one, two in itertools.pairwise(times)}
        assert len(gaps) == 1 and min(gaps) >= 1
        shown = [{side: name for name, side in sides(frame).items()} for frame in frames]
        seen = [[f"{side} {state.get(side, 'nothing')}" for side in ("left", "right")] for state in shown]
        lines = [f"{time}: {', '.join(each)}." for time, each in zip(times, seen, strict=True)]
        same = [line.replace(".", " same.").replace(", right", " same, right") for line in lines]
        if found := re.fullmatch(r"At (\S+) the video shows (.*)\.", talk.answer):
            assert talk.thinking == lines[times.index(found[1])]
            assert found[1] in text_of(talk.messages[-1])
            told = re.findall(r"an? (\w+ \w+)", found[2])
            assert told == names(frames[times.index(found[1])]) and (told or found[2] == "nothing")
            kinds.add("shown")
            continue
        if talk.answer == "Nothing changes in the video.":
            assert all(sides(frame) == sides(frames[0]) for frame in frames)
            assert talk.thinking == " ".join([lines[0], *same[1:], "No change."])
            kinds.add("nothing")
            continue
        found = re.fullmatch(
            r"At (\S+) (?:the|an?) (\w+ \w+) (becomes an?|appears|disappears|moves to the) ?(.*)\.", talk.answer
        )
        assert found, talk.answer
        number = times.index(found[1])
        before, after = sides(frames[number - 1]), sides(frames[number])
        words = [
            (side, shown[number - 1].get(side, "nothing"), shown[number].get(side, "nothing"))
            for side in ("left", "right")
        ]
        marked = [f"{side} {now} {'same' if now == was else 'different'}" for side, was, now in words]
        told = [f"{side.title()}: {was}, then {now}." for side, was, now in words if now != was]
        line = f"{times[number]}: {', '.join(marked)}."
        assert talk.thinking == " ".join([lines[0], *same[1:number], line, *told])
        assert all(sides(frame) == before for frame in frames[:number])
        assert all(sides(frame) == after for frame in frames[number:])
        name, verb, rest = found[2], found[3].split()[0], found[4]
        side = before.get(name) or after[name]
        expected = {
            "becomes": {**{n: s for n, s in before.items() if n != name}, rest: side},
            "appears": {**before, name: side},
            "disappears": {n: s for n, s in before.items() if n != name},
            "moves": {name: rest},
        }[verb]
        assert expected == after != before
        kinds.add(verb)
    assert kinds == {"shown", "nothing", "becomes", "appears", "disappears", "moves"}


def test_documents_say_what_is_on_which_page() -> None:
    kinds = set()
    for talk, pages in talks("pages", 40):
        numbers = [int(str(page.label).removeprefix("Page ")) for page in pages]
        assert numbers == list(range(numbers[0], numbers[0] + len(pages))) and numbers[-1] <= 9
        says, lines = {}, {}
        for number, page in zip(numbers, pages, strict=True):
            printed = re.fullmatch(r"(\d+)([+-])(\d+)=?\??", "".join(item.kind for item in page.items))
            says[number] = " ".join(printed.groups()) if printed else names(page)
            read = says[number] if printed else ", ".join(f"{n} {name}" for n, name in enumerate(names(page), start=1))
            lines[number] = f"Page {number}: {read}"
        question = text_of(talk.messages[-1]).lower()
        if asked := re.match(r"Asked: (.*?)\. ", talk.thinking):
            assert asked[1].lower() in question
            at = int(re.findall(r"age (\d)", talk.answer)[0])
            *read, last = [lines[number].replace(", ", " no, ") for number in numbers if number <= at]
            last = last[: last.index(f" {asked[1]}") + 1 + len(asked[1])]
            assert talk.thinking == f"{asked[0]}{''.join(f'{line} no. ' for line in read)}{last} yes."
        else:
            assert talk.thinking == f"{lines[int(re.findall('page (.)', question)[0])]}."
        if found := re.fullmatch(r"The (\w+ \w+) is on page (\d)\.", talk.answer):
            assert found[1] in says[int(found[2])] and found[1] in question
            kinds.add("object")
        elif found := re.fullmatch(r"Page (\d) says (.*)\.", talk.answer):
            assert says[int(found[1])] == found[2] and (found[2] in question or f"page {found[1]}" in question)
            kinds.add("sum")
        else:
            found = re.fullmatch(r"Page (\d) shows (.*)\.", talk.answer)
            assert found and re.findall(r"an? (\w+ \w+)", found[2]) == says[int(found[1])]
            assert f"page {found[1]}" in question
            kinds.add("page")
    assert kinds == {"object", "sum", "page"}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["film", "pages"])
def test_the_service_sees_frames_and_pages_as_the_lessons_show_them(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through real files: the same labels and ids as in the lesson, and pictures of the same size and look."""
    monkeypatch.setattr(sandbox, "WALL_S", 900.0)  # however loaded the machine is
    monkeypatch.setattr(sandbox, "WAIT_S", 900.0)
    options, tokenizer = ImageOptions.from_directory(resolve.DEMO), Tokenizer.from_directory(resolve.DEMO)
    for talk, shown in talks(task, 6):
        asked, params = doors.request(talk, shown)
        turns = messages.read(asked)
        files = {name: params.pop(name, []) for name in ("videos", "documents")}
        reading = attachments.ReadingOptions(**params)
        with attachments.opened(turns, files["videos"], files["documents"], reading, options) as [file]:
            assert file.wanted == len(shown)
            assert file.labels(file.wanted) == [picture.label for picture in shown]
            sizes = file.sizes(file.wanted, 1.0, options)
            pictures = [picture for _, picture in file.read(sizes)]
        assert [picture.size for picture in pictures] == [picture.size for picture in shown]
        for seen, drawn in zip(pictures, shown, strict=True):
            one, other = (np.asarray(picture.reduce(14)).astype(int) for picture in (seen, drawn.image))
            assert np.abs(one - other).max() < 30  # codecs lose a little, and edges more
        counts = [plan(*picture.size, options).tokens for picture in shown]
        labelled = [[(str(picture.label), plan(*picture.size, options)) for picture in shown]]
        ids = chat.encode(tokenizer, attachments.expanded(turns, labelled), counts)
        assert ids == chat.encode(tokenizer, talk.messages, counts)


# JSON


def test_json_has_the_keys_that_are_asked_for_and_what_is_seen() -> None:
    kinds = set()
    for talk, (picture,) in talks("json", 60):
        values, question = json.loads(talk.answer), text_of(talk.messages[-1])
        kinds.add(tuple(sorted(values)))
        assert all(re.search(rf"\b{key}\b", question.split(" with ")[-1] + question) for key in values)
        assert grading.is_right(talk, [picture], json.dumps(values, indent=1))
        assert not grading.is_right(talk, [picture], json.dumps({**values, "more": 1}))
        assert not grading.is_right(talk, [picture], "It is " + talk.answer)
        if "result" in values:
            a, op, b = re.fullmatch(r"(\d+)([+-])(\d+)=?\??", "".join(i.kind for i in picture.items)).groups()  # pyright: ignore
            assert values["result"] == (int(a) + int(b) if op == "+" else int(a) - int(b))
            assert values.get("sum", f"{a} {op} {b}") == f"{a} {op} {b}"
        elif "count" in values:
            assert values == {"count": len(picture.items)}
        elif "objects" in values:
            assert values == {"objects": names(picture)}
        else:
            assert [*values.values()] == names(picture)[0].split() and list(values) in (
                ["colour", "shape"],
                ["color", "shape"],
            )
    assert kinds == {("result",), ("result", "sum"), ("count",), ("objects",), ("color", "shape"), ("colour", "shape")}
