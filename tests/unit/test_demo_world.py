"""The demo world: pictures, labels and lessons agree with each other, and a seed fixes them."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from demo_world import gallery, lessons, phrases, requests
from demo_world.arithmetic import work_out
from demo_world.grading import BOXES, is_right
from demo_world.labels import PLACES, patch_labels
from demo_world.lessons import SEQUENCES, TASKS, Conversation, Study, make_study, text_of, vocabulary_text
from demo_world.pictures import COLOURS, GLYPHS, KINDS, MAX_ORDER, SHAPES, Item, Picture, picture_size
from demo_world.printing import draw_sum, find_fonts
from demo_world.scenes import draw_scene
from demo_world.soups import draw_soup
from demo_world.talk import TOPICS
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import resolve

FONTS = find_fonts()


def _looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(rng.choice(COLOURS[1:]), rng.choice(SHAPES)) for _ in range(count)]


def _middle(item: Item) -> tuple[float, float]:
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def _plain(study: Study) -> list[object]:
    pictures = [(picture.image.size, picture.image.tobytes(), picture.items) for picture in study.pictures]
    return [pictures, study.conversations]


def _names(picture: Picture) -> list[str]:
    return [f"{item.colour} {item.kind}" for item in picture.items]


def _value(text: str) -> int:
    a, op, b = text.split()
    return int(a) + int(b) if op == "+" else int(a) - int(b)


def _check_steps(thinking: str, a: int, op: str, b: int) -> None:
    """Re-compute a worked sum from its text alone."""
    total = a + b if op == "+" else a - b
    if op == "-" and a < b:
        assert f"{b} is larger, so {b} - {a} with a minus." in thinking
    else:
        assert "larger" not in thinking
    for left, right in re.findall(r"((?:\d+ [+-] )+\d+) = (\d+)", thinking):
        value, *rest = left.split()
        number = int(value)
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            number += int(term) if sign == "+" else -int(term)
        assert number == int(right), thinking
    ones, tens = re.search(r"Ones: (.*?)\. Tens: (.*?)\. So ", thinking).groups()  # pyright: ignore
    digit = re.search(r"write (\d)", ones) or re.search(r"= (\d)$", ones)
    assert digit is not None
    assert 10 * int(tens.split("= ")[1]) + int(digit[1]) == abs(total)
    assert ("carry" in ones) == (op == "+" and a % 10 + b % 10 >= 10)
    large, small = max(a, b), min(a, b)
    assert ("borrow" in ones) == (op == "-" and large % 10 < small % 10)
    assert ones.startswith(f"{(a if op == '+' else large) % 10} {op} {(b if op == '+' else small) % 10}")
    assert thinking.endswith(f"So {total}.")


def test_arithmetic_is_right_everywhere() -> None:
    for a, b in itertools.product(range(100), range(100)):
        for op in "+-":
            _check_steps(work_out(a, op, b), a, op, b)


def test_seed_fixes_pictures_and_texts() -> None:
    for task in TASKS:
        assert _plain(make_study(random.Random(5), FONTS, task)) == _plain(make_study(random.Random(5), FONTS, task))
    assert _plain(make_study(random.Random(1), FONTS, "sum")) != _plain(make_study(random.Random(2), FONTS, "sum"))
    assert list(vocabulary_text(random.Random(3), 30)) == list(vocabulary_text(random.Random(3), 30))
    soups = [draw_soup(random.Random(4), FONTS) for _ in range(2)]
    assert soups[0].items == soups[1].items
    assert soups[0].image.tobytes() == soups[1].image.tobytes()


def test_sizes_stay_within_bounds() -> None:
    rng = random.Random(7)
    drawn = [picture_size(rng) for _ in range(2000)]
    assert min(min(size) for size in drawn) == 224
    assert 440 <= max(max(size) for size in drawn) <= 448
    assert picture_size(rng, sizes=[(252, 280)]) == (252, 280)
    for task in ("sum", "count", "compare"):
        for picture in make_study(rng, FONTS, task, sizes=[(252, 280)]).pictures:
            assert picture.image.size == (252, 280)
        high = 336 if task == "compare" else 448
        for _ in range(5):
            for picture in make_study(rng, FONTS, task).pictures:
                assert all(224 <= side <= high for side in picture.image.size)
                assert picture.image.mode == "RGB"


@pytest.mark.parametrize("seed", range(30))
def test_sum_pictures(seed: int) -> None:
    rng = random.Random(seed)
    a, op, b = rng.randint(0, 99), rng.choice("+-"), rng.randint(0, 99)
    picture = draw_sum(rng, FONTS, a, op, b, photo=False)
    text = "".join(item.kind for item in picture.items)
    assert text in (f"{a}{op}{b}", f"{a}{op}{b}=", f"{a}{op}{b}=?")
    assert [item.order for item in picture.items] == list(range(1, len(text) + 1))
    assert len(text) <= MAX_ORDER
    pixels = np.asarray(picture.image).astype(int)
    inked = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
    covered = np.zeros_like(inked)
    for item in picture.items:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= picture.image.width and 0 <= y0 < y1 <= picture.image.height
        covered[y0:y1, x0:x1] = True
        inside = inked[y0:y1, x0:x1]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    assert not (inked & ~covered).any()


@pytest.mark.parametrize("seed", range(30))
def test_scenes(seed: int) -> None:
    rng = random.Random(seed)
    looks = _looks(rng, 1 + seed % 6)
    picture = draw_scene(rng, looks, photo=False)
    assert Counter((item.colour, item.kind) for item in picture.items) == Counter(looks)
    assert [item.order for item in picture.items] == list(range(1, len(looks) + 1))
    middles = [_middle(item) for item in picture.items]
    stacked = len(looks) == 2 and abs(middles[0][0] - middles[1][0]) < 14
    if stacked:
        assert middles[0][1] < middles[1][1]
    else:
        assert all(two[0] - one[0] >= 14 for one, two in itertools.pairwise(middles))
    for item in picture.items:
        x0, y0, x1, y1 = item.box
        assert 0 <= x0 < x1 <= picture.image.width and 0 <= y0 < y1 <= picture.image.height
        assert 20 <= max(x1 - x0, y1 - y0) <= 132
    for one, two in itertools.combinations([item.box for item in picture.items], 2):
        assert max(two[0] - one[2], one[0] - two[2], two[1] - one[3], one[1] - two[3]) >= 8


def test_labels_lie_where_the_boxes_are() -> None:
    rng = random.Random(11)
    pictures = [draw_sum(rng, FONTS, 37, "+", 48), draw_scene(rng, _looks(rng, 5)), draw_soup(rng, FONTS)]
    for picture in pictures * 2:
        labels = patch_labels(picture)
        width, height = picture.image.size
        assert labels.dtype == np.int64
        assert labels.shape == (-(-height // 28) * 2, -(-width // 28) * 2, 3 + PLACES)
        assert (labels[..., :3].reshape(-1, 3).max(0) < (len(KINDS), len(COLOURS), MAX_ORDER + 1)).all()
        seen = {(KINDS.index(item.kind), COLOURS.index(item.colour or "none"), item.order) for item in picture.items}
        for row, column in np.argwhere(labels[..., 0] > 0):
            assert tuple(labels[row, column, :3]) in seen
            areas = {}
            for item in picture.items:
                x0, y0, x1, y1 = item.box
                wide = min(x1, 14 * column + 14) - max(x0, 14 * column)
                high = min(y1, 14 * row + 14) - max(y0, 14 * row)
                areas[item.kind, item.order] = max(areas.get((item.kind, item.order), 0), max(wide, 0) * max(high, 0))
            kind, order = KINDS[labels[row, column, 0]], labels[row, column, 2]
            assert areas[kind, order] == max(areas.values()) > 0
    plain = draw_scene(rng, [("red", "square")], size=(224, 224))
    (y, x), item = np.argwhere(patch_labels(plain)[..., 0] > 0).mean(0), plain.items[0]
    assert abs(14 * x + 7 - _middle(item)[0]) < 8 and abs(14 * y + 7 - _middle(item)[1]) < 8


def test_soup_is_full_and_unordered() -> None:
    for seed in range(8):
        picture = draw_soup(random.Random(seed), FONTS)
        assert 8 <= len(picture.items) <= 30
        assert all(item.order == 0 and item.kind in (*GLYPHS, *SHAPES) for item in picture.items)
        assert all((item.colour is None) == (item.kind in GLYPHS) for item in picture.items)


def _listing(picture: Picture) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(_names(picture), start=1))


def _check_sum(talk: Conversation, a: int, op: str, b: int) -> None:
    total = _value(f"{a} {op} {b}")
    if "So the" in talk.thinking:
        which, value = ("first", a) if "first" in talk.answer else ("second", b)
        assert talk.answer == f"The {which} number is {value}."
    elif "sign" in talk.thinking:
        assert talk.answer == f"It is {'an addition' if op == '+' else 'a subtraction'}."
    else:
        _check_steps(talk.thinking, a, op, b)
        name = "sum" if op == "+" else "difference"
        described = f"The picture shows the {name} {a} {op} {b} on a light ground. The result is {total}."
        assert talk.answer in (f"{a} {op} {b} = {total}", described)


def _check_place(talk: Conversation, picture: Picture) -> None:
    found = re.match(r"The (\w+ \w+) is (on the |)(left|right|above|below)(?: of)?(?: the (\w+ \w+))?\.$", talk.answer)
    assert found is not None, talk.answer
    one = picture.items[_names(picture).index(found[1])]
    other = picture.items[1 - picture.items.index(one)]
    assert found[4] in (None, f"{other.colour} {other.kind}")
    axis = 0 if found[3] in ("left", "right") else 1
    gap = _middle(one)[axis] - _middle(other)[axis]
    assert abs(gap) >= 30
    assert (gap < 0) == (found[3] in ("left", "above"))
    higher = min(picture.items, key=lambda item: _middle(item)[1])
    assert (f"The {higher.colour} {higher.kind} is higher." in talk.thinking) == (axis == 1)
    asked = text_of(talk.messages[-1]).lower()
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    if "Asked" in talk.thinking:
        told = re.search(r"Asked: (\w+ \w+), (?:number (\d)|(higher|lower))\.", talk.thinking)
        assert told is not None and told[1] == found[1] and found[1] in asked
        assert told[2] in (None, str(one.order)) and told[3] in (None, "higher" if one is higher else "lower")
    if found[4] is None and f" {opposite[found[3]]}" in asked:
        assert found[3] in asked


def _check_compare(talk: Conversation, pictures: tuple[Picture, ...]) -> None:
    one, two = pictures
    assert talk.thinking.startswith(f"First picture: {_listing(one)}. Second picture: {_listing(two)}. ")
    same = Counter(_names(one)) == Counter(_names(two))
    first, second = len(one.items), len(two.items)
    if "Check" in talk.thinking:
        assert talk.answer == f"The pictures show {'the same' if same else 'different'} objects."
        assert same == (_names(one) == _names(two))
        pairs = re.findall(r"(\d) (\w+ \w+) and (\w+ \w+), (same|different)", talk.thinking)
        if first == second:
            assert [pair[1:3] for pair in pairs] == list(zip(_names(one), _names(two), strict=True))[: len(pairs)]
            assert [pair[3] for pair in pairs] == ["same"] * (len(pairs) - 1) + ["same" if same else "different"]
    elif first == second:
        assert talk.answer == "Both pictures have the same number of objects."
        assert f"{first} is equal to {second}." in talk.thinking
    else:
        assert talk.answer == f"The {'first' if first > second else 'second'} picture has more objects."
        assert f"{max(first, second)} is more than {min(first, second)}." in talk.thinking


def _check_scene(talk: Conversation, picture: Picture) -> None:
    names = _names(picture)
    middles = [_middle(item) for item in picture.items]
    stacked = len(names) == 2 and abs(middles[0][0] - middles[1][0]) < 14
    direction = "From top to bottom" if stacked else "From left to right"
    assert talk.thinking.startswith(f"{direction}: {_listing(picture)}.")
    spoken = [f"an {name}" if name.startswith("orange") else f"a {name}" for name in names]
    count = "1 object" if len(names) == 1 else f"{len(names)} objects"
    if re.match(r"The \w+ \w+ is (on the )?(left|right|above|below)\b", talk.answer):
        _check_place(talk, picture)
        return
    joined = spoken[0] if len(names) == 1 else f"{', '.join(spoken[:-1])} and {spoken[-1]}"
    colon = f": {joined}." if len(names) == 1 else f". {direction}: {joined}."
    colour, shape = names[0].split()
    allowed = [
        f"There {'is' if len(names) == 1 else 'are'} {count}.",
        f"The picture shows {count} on a light ground{colon}",
        f"The leftmost object is {spoken[0]}.",
        f"The rightmost object is {spoken[-1]}.",
    ]
    if len(names) == 1:
        allowed += [f"It is {spoken[0]}.", f"The object is {colour}.", f"The object is a {shape}."]
    assert talk.answer in allowed


def _check(study: Study) -> None:
    for talk in study.conversations:
        *_, last = talk.messages
        assert last["role"] == "user"
        assert is_right(talk, study.pictures, f" {talk.answer}\n")
        assert not is_right(talk, study.pictures, talk.answer + " x")
        users = [message for message in talk.messages if message["role"] == "user"]
        if study.pictures:
            parts = users[0]["content"]
            assert isinstance(parts, list)
            assert [part["type"] for part in parts] == ["image"] * len(study.pictures) + ["text"]
        else:
            assert isinstance(users[0]["content"], str)
        assert len(users) == (2 if talk.task == "second_turn" else 1)
        for text in (talk.thinking, talk.answer):
            assert text == text.strip() and text and "\n" not in text
        for text in (talk.thinking, talk.answer, *map(text_of, talk.messages)):
            assert not re.search(r"◁|▷|<\||\|>|[{}]", text)
        if talk.task == "talk":
            continue
        if talk.task == "text_sum":
            found = re.match(r"The question is (\d+) ([+-]) (\d+)\. ", talk.thinking)
            assert found is not None
            assert Counter(re.findall(r"\d+", text_of(last))) == Counter((found[1], found[3]))
            _check_sum(talk, int(found[1]), found[2], int(found[3]))
        elif talk.task == "compare":
            _check_compare(talk, study.pictures)
        elif study.pictures[0].items[0].colour is None:
            text = "".join(item.kind for item in study.pictures[0].items).rstrip("=?")
            a, op, b = re.split(r"([+-])", text)
            assert talk.thinking.startswith(f"The picture shows {a} {op} {b}. ")
            _check_sum(talk, int(a), op, int(b))
        else:
            _check_scene(talk, study.pictures[0])


ELSEWHERE = ("json", "click", *BOXES, *SEQUENCES)
"""Tasks with tests of their own: tests/unit/test_demo_lessons.py."""


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ELSEWHERE])
def test_lessons_agree_with_their_pictures(task: str) -> None:
    rng = random.Random(21)
    for _ in range(60):
        study = make_study(rng, FONTS, task)
        assert len(study.conversations) == 3
        assert {talk.task for talk in study.conversations} == {task}
        _check(study)


def test_questions_have_many_wordings() -> None:
    wordings = set(itertools.chain(*phrases.QUESTIONS.values()))
    assert all(len(set(questions)) >= 8 for questions in phrases.QUESTIONS.values())
    for exact in (
        "Solve this math problem shown in the image.",
        "Describe this image in detail.",
        "What is the result?",
        "What is shown in the image?",
        "How many objects are there?",
        "What colour is the object?",
        "Which object is on the left?",
        "Which picture has more objects?",
        "Are the two pictures the same?",
    ):
        assert exact in wordings
    assert sum(len(questions) for questions in phrases.QUESTIONS.values()) == len(wordings)
    assert all(len(set(questions)) >= 8 for questions in requests.REQUESTS.values())
    assert len(TOPICS) >= 14 and all(len(topic.questions) >= 4 for topic in TOPICS)
    talked = [question for topic in TOPICS for question in topic.questions]
    assert len(talked) == len(set(talked))
    assert "Explain the concept of multimodal large language models." in talked


def test_words_are_few_and_differences_are_sometimes_negative() -> None:
    rng = random.Random(9)
    texts = list(vocabulary_text(rng, 3000))
    words = set(re.findall(r"[A-Za-z][A-Za-z-]*", " ".join(texts)))
    assert {"user", "assistant", "system"} <= words
    assert len(words) < 1100
    differences = [text for text in texts if re.match(r"\d+ - \d+ = ", text)]
    negative = sum("= -" in text for text in differences) / len(differences)
    assert 0.2 < negative < 0.45
    sums = Counter(match[1] for text in texts if (match := re.match(r"The picture shows (\d+) ", text)))
    assert len(sums) >= 98


def test_conclusions_begin_after_a_reading_that_decides_them() -> None:
    tokenizer = Tokenizer.from_directory(resolve.DEMO)
    teacher, rng = gallery.Teacher(4, tokenizer, []), random.Random(4)
    seen = set()
    for _ in range(200):
        talk = lessons.conclusion(rng)
        seen.add(talk.task)
        silent, written, due = teacher.completion(rng, talk, given=True)
        whole = THINK_OPEN + talk.thinking + THINK_CLOSE + ("" if talk.wanted else talk.answer)
        assert not silent and tokenizer.encode(whole) == written[: len(written) - (not talk.wanted)]
        assert talk.wanted or written[-1] == due[-1] == tokenizer.im_end_id
        assert all(one == other or other == gallery.IGNORED for one, other in zip(written, due, strict=True))
        rest = tokenizer.decode([token for token in due if token != gallery.IGNORED])
        given = tokenizer.decode([one for one, other in zip(written, due, strict=True) if other == gallery.IGNORED])
        assert talk.read and given.startswith(THINK_OPEN) and all(read in given for read in talk.read)
        assert rest.endswith("<|im_end|>" if not talk.wanted else THINK_CLOSE)
        concluded = rest.partition(THINK_CLOSE)[0]
        assert "higher" not in concluded.replace(", higher.", "") and not re.search(r"age \d:|:\d\d:", concluded)
        assert [part for part in talk.messages if not isinstance(part["content"], str)] == []
    assert seen == lessons.CONCLUSIONS.keys()
