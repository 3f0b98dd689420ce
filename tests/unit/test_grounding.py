"""Places in answers: every form that Kimi-VL and its peers write, texts that break off, and texts that mean nothing."""

from __future__ import annotations

import json
import os
import random
import sys
from types import FrameType
from typing import Any

import pytest

from kimi_vl.errors import UserError
from kimi_vl.text import prompts
from kimi_vl.text.grounding import MAX_FINDINGS, Grounding, grounding
from kimi_vl.text.loose_json import MAX_DEPTH, Value, values
from kimi_vl.text.thinking import MARKERS

SIZE = (1000, 500)
FUZZED = int(os.environ.get("KIMI_VL_FUZZ", "0")) * 50 or 3_000


def found(answer: str, size: Any = SIZE, unit: Any = None) -> list[Any]:
    """What a case says of each finding: label, action, box or points in pixels."""
    return [
        tuple(part for part in (each.label, each.action, each.box, *each.points) if part is not None)
        for each in grounding(answer, size, unit).findings
    ]


HALF = (100.0, 100.0, 500.0, 250.0)  # what (0.1, 0.2, 0.5, 0.5) is in SIZE

FORMS: dict[str, tuple[str, str, list[Any]]] = {
    # what Kimi-VL is known to write
    "a tool call": ("Thought: …\nToolcall: click(x=0.365, y=0.318)", "relative", [("click", (365.0, 159.0))]),
    "a code block": (
        "## Code:\n```python\npyautogui.click(x=0.204, y=0.15)\n```",
        "relative",
        [("click", (204.0, 75.0))],
    ),
    "a call at the corner": ("pyautogui.click(x=0, y=1)", "relative", [("click", (0.0, 500.0))]),
    "bbox_2d": ('{"bbox_2d": [0.100, 0.200, 0.500, 0.500]}', "relative", [(HALF,)]),
    "bbox_2d in a fence": (
        '```json\n[{"bbox_2d": [0.1, 0.2, 0.5, 0.5], "label": "a"}]\n```',
        "relative",
        [("a", HALF)],
    ),
    "detections": (
        '```json\n{"detections":[{"bbox_2d":[0.1,0.2,0.5,0.5],"label":"a"},{"bbox_2d":[0,0,1,1],"label":"b"}]}\n```',
        "relative",
        [("a", HALF), ("b", (0.0, 0.0, 1000.0, 500.0))],
    ),
    "keypoints": ('{"keypoints":[{"point_2d":[0.5,0.5],"label":"nose"}]}', "relative", [("nose", (500.0, 250.0))]),
    "text detections": (
        '{"text_detections":[{"bbox_2d":[0.1,0.2,0.5,0.5],"text_type":"title","text":"Hello"}]}',
        "relative",
        [("Hello", HALF)],
    ),
    "min_x and caption": (
        '[{"bounding_box": {"min_x": 100, "min_y": 100, "max_x": 500, "max_y": 250}, "caption": "a dog"}]',
        "pixels",
        [("a dog", HALF)],
    ),
    "a drag": (
        "pyautogui.dragTo(from_coord=[0.87, 0.423], to_coord=[0.8102, 0.9463])",
        "relative",
        [("drag_to", (870.0, 211.5), (810.2, 473.15))],
    ),
    "a swipe": (
        "mobile.swipe(from_coord=[0.5, 0.9], to_coord=[0.5, 0.1])",
        "relative",
        [("swipe", (500.0, 450.0), (500.0, 50.0))],
    ),
    "a long press": ("mobile.long_press(x=0.5,y=0.6)", "relative", [("long_press", (500.0, 300.0))]),
    "a move by position": ("pyautogui.moveTo(0.5, 0.25)", "relative", [("move_to", (500.0, 125.0))]),
    "a drag with a duration": ("pyautogui.dragTo(0.5, 0.25, duration=0.5)", "relative", [("drag_to", (500.0, 125.0))]),
    "clicks and interval": (
        "pyautogui.click(x=0.5, y=0.25, clicks=2, interval=0.5)",
        "relative",
        [("click", (500.0, 125.0))],
    ),
    "two calls": (
        "click(x=0.1, y=0.2)\nrightClick(x=0.5, y=0.5)",
        "relative",
        [("click", (100.0, 100.0)), ("right_click", (500.0, 250.0))],
    ),
    # the spellings of actions
    "doubleClick": ("pyautogui.doubleClick(x=0.5, y=0.5)", "relative", [("double_click", (500.0, 250.0))]),
    "tripleClick": ("tripleClick(0.5, 0.5)", "relative", [("triple_click", (500.0, 250.0))]),
    "middleClick": ("middleClick(0.5, 0.5)", "relative", [("middle_click", (500.0, 250.0))]),
    "left_click": ("left_click(0.5, 0.5)", "relative", [("click", (500.0, 250.0))]),
    "right_click": ("right_click(0.5, 0.5)", "relative", [("right_click", (500.0, 250.0))]),
    "tap": ("tap(0.5, 0.5)", "relative", [("tap", (500.0, 250.0))]),
    "brackets in a call": ("click([0.5, 0.5])", "relative", [("click", (500.0, 250.0))]),
    "parentheses in a call": ("click((0.5, 0.5))", "relative", [("click", (500.0, 250.0))]),
    # peers
    "DeepSeek-VL2": (
        "<|ref|>a cat<|/ref|><|det|>[[100, 200, 500, 500]]<|/det|>.",
        "thousandths",
        [("a cat", HALF)],
    ),
    "DeepSeek-VL2, two": (
        "<|ref|>cats<|/ref|><|det|>[[100, 200, 500, 500], [0, 0, 100, 200]]<|/det|>",
        "thousandths",
        [("cats", HALF), ("cats", (0.0, 0.0, 100.0, 100.0))],
    ),
    "Qwen2-VL": (
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(100,200),(500,500)<|box_end|>",
        "thousandths",
        [("dog", HALF)],
    ),
    "Qwen-VL": ("<ref>the dog</ref><box>(100,200),(500,500)</box>", "thousandths", [("the dog", HALF)]),
    "InternVL": ("<ref>dog</ref><box>[[100, 200, 500, 500]]</box>", "thousandths", [("dog", HALF)]),
    "box with spaces": ("<box>100 200 500 500</box>", "thousandths", [(HALF,)]),
    "bbox tag": ("<bbox>0.1, 0.2, 0.5, 0.5</bbox>", "relative", [(HALF,)]),
    "point tag": ("<point>500 250</point>", "thousandths", [((500.0, 125.0),)]),
    "point in a call": ("click(point='<point>500 250</point>')", "thousandths", [("click", (500.0, 125.0))]),
    "UI-TARS": ("click(start_box='(500,250)')", "thousandths", [("click", (500.0, 125.0))]),
    "UI-TARS with a box": ("click(start_box='[100,200,500,500]')", "thousandths", [("click", (300.0, 175.0))]),
    "Gemini": ('[{"box_2d": [200, 100, 500, 500], "label": "a"}]', "thousandths", [("a", HALF)]),
    "box_2d in fractions": ('[{"box_2d": [0.1, 0.2, 0.5, 0.5]}]', "relative", [(HALF,)]),
    "Qwen2.5-VL": ('[{"bbox_2d": [100, 100, 500, 250], "label": "a"}]', "pixels", [("a", HALF)]),
    "computer use": ('{"action": "left_click", "coordinate": [500, 250]}', "pixels", [("click", (500.0, 250.0))]),
    "ms-swift": ("[(100,100),(500,250)]", "pixels", [(HALF,)]),
    "lmms-eval": ("[0.5, 0.5]", "relative", [((500.0, 250.0),)]),
    # other shapes of JSON
    "xmin": ('{"xmin": 100, "ymin": 100, "xmax": 500, "ymax": 250, "name": "a"}', "pixels", [("a", HALF)]),
    "x1": ('{"x1": 0.1, "y1": 0.2, "x2": 0.5, "y2": 0.5}', "relative", [(HALF,)]),
    "left": ('{"left": 100, "top": 100, "right": 500, "bottom": 250}', "pixels", [(HALF,)]),
    "width and height": ('{"x": 0.1, "y": 0.2, "width": 0.4, "height": 0.3}', "relative", [(HALF,)]),
    "w and h": ('{"x": 0.1, "y": 0.2, "w": 0.4, "h": 0.3}', "relative", [(HALF,)]),
    "x and y": ('{"x": 0.5, "y": 0.5, "class": "a"}', "relative", [("a", (500.0, 250.0))]),
    "a point as an object": ('{"point": {"x": 0.5, "y": 0.5}}', "relative", [((500.0, 250.0),)]),
    "pairs": ('{"bbox": [[0.1, 0.2], [0.5, 0.5]]}', "relative", [(HALF,)]),
    "several boxes of one label": (
        '{"label": "cat", "boxes": [[0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1]]}',
        "relative",
        [("cat", HALF), ("cat", (0.0, 0.0, 1000.0, 500.0))],
    ),
    "a box and its centre": (
        '{"bbox": [0.1, 0.2, 0.5, 0.5], "center": [0.3, 0.35]}',
        "relative",
        [(HALF, (300.0, 175.0))],
    ),
    "numbers as texts": ('{"bbox": ["0.1", "0.2", "0.5", "0.5"]}', "relative", [(HALF,)]),
    "percent as texts": ('{"bbox": ["10%", "20%", "50%", "50%"]}', "percent", [(HALF,)]),
    "what is no box": (
        '{"bbox_2d": [0.1, 0.2, 0.5, 0.5], "size": [3, 4], "color": [1, 2, 3, 4]}',
        "relative",
        [(HALF,)],
    ),
    # repair
    "single quotes": ("[{'bbox_2d': [0.1, 0.2, 0.5, 0.5], 'label': 'it\\'s'}]", "relative", [("it's", HALF)]),
    "a trailing comma": ('[{"bbox_2d": [0.1, 0.2, 0.5, 0.5,], "label": "a",},]', "relative", [("a", HALF)]),
    "cut in a number": (
        '[{"bbox": [0.1, 0.2, 0.5, 0.5], "label": "a"}, {"bbox": [0.1, 0.2, 0.',
        "relative",
        [("a", HALF)],
    ),
    "cut behind three numbers": ('[{"bbox": [0.1, 0.2, 0.5, 0.5]}, {"bbox": [0.1, 0.2, 0.5,', "relative", [(HALF,)]),
    "cut before the label": ('[{"bbox": [0.1, 0.2, 0.5, 0.5], "lab', "relative", [(HALF,)]),
    "an open fence": ('```json\n[{"bbox": [0.1, 0.2, 0.5, 0.5]}', "relative", [(HALF,)]),
    "Python's constants": ("{'bbox': [0.1, 0.2, 0.5, 0.5], 'ok': True, 'x': None}", "relative", [(HALF,)]),
    # bare text
    "a box in words": ("It is at [0.1, 0.2, 0.5, 0.5].", "relative", [(HALF,)]),
    "a box in parentheses": ("It is at (0.1, 0.2, 0.5, 0.5).", "relative", [(HALF,)]),
    "two corners": ("from (0.1, 0.2), (0.5, 0.5)", "relative", [(HALF,)]),
    "x and y in words": ("at x: 0.5, y: 0.5", "relative", [((500.0, 250.0),)]),
    "x and y with =": ("x = 0.5 and y = 0.5", "relative", [((500.0, 250.0),)]),
    "percent": ("at (50%, 50%)", "percent", [((500.0, 250.0),)]),
    # bounds
    "corners in the wrong order": ("[0.5, 0.5, 0.1, 0.2]", "relative", [(HALF,)]),
    "beyond the edge": ("[-0.02, 0.2, 1.03, 0.5]", "relative", [((0.0, 100.0, 1000.0, 250.0),)]),
    "partly outside": ("[900, 400, 1200, 600]", "pixels", [((900.0, 400.0, 1000.0, 500.0),)]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str) -> None:
    answer, unit, expected = FORMS[name]
    result = grounding(answer, SIZE)
    assert found(answer) == expected
    assert result.unit == unit
    for each in result.findings:
        begin, end = each.span
        assert 0 <= begin < end <= len(answer) and any(letter.isdigit() for letter in answer[begin:end])


NOTHING = {
    "no place": "The dog is on the left, 3 metres away (about 10 feet).",
    "an empty text": "",
    "outside": "click(x=1200, y=700)",
    "no area": '{"bbox": [0.1, 0.2, 0.1, 0.5]}',
    "three numbers": '{"bbox": [0.1, 0.2, 0.1]}',
    "five numbers": '{"bbox": [0.1, 0.2, 0.5, 0.5, 0.9]}',
    "not a number": '{"bbox": [NaN, 0.2, 0.5, 0.5]}',
    "infinity": '{"bbox": [1e999, 0.2, 0.5, 0.5]}',
    "digits that run away": "[0." + "1" * 300 + ", 0.2, 0.5, 0.5]",
    "booleans": '{"bbox": [true, false, true, true]}',
    "words like a call": "onclick_handler(1, 2) misclick(0.1, 0.2)",
    "only thinking": "◁think▷It may be at [0.1, 0.2].",
    "a range of times": "from 00:15 to 00:30",
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_names_no_place(name: str) -> None:
    assert grounding(NOTHING[name], SIZE).findings == ()


def test_guesses_of_the_thinking_do_not_count() -> None:
    answer = '◁think▷{"bbox": [0.5, 0.5, 0.6, 0.6]} no…◁/think▷{"bbox": [0.1, 0.2, 0.5, 0.5]}'
    (finding,) = grounding(answer, SIZE).findings
    assert finding.box == HALF and answer[slice(*finding.span)] == '{"bbox": [0.1, 0.2, 0.5, 0.5]}'
    for opener, closer in MARKERS:
        guess = f"{opener}maybe [0.5, 0.5, 0.6, 0.6]"
        assert found(guess) == [] and found(f"{guess}{closer}none") == []
        assert found(f"{guess}{closer}[0.1, 0.2, 0.5, 0.5]{guess}") == [(HALF,)]
        assert found(f"{guess}{closer}{guess}{closer}[0.1, 0.2, 0.5, 0.5]") == [(HALF,)]


def test_bare_numbers_beside_something_clearer_do_not_count() -> None:
    assert found("The button [2, 3] is here: click(x=0.5, y=0.5)") == [("click", (500.0, 250.0))]
    assert found('Rows [1, 2]: {"bbox": [0.1, 0.2, 0.5, 0.5]}') == [(HALF,)]


def test_a_call_inside_of_json_is_counted_once() -> None:
    answer = '{"thought": "click(0.9, 0.9)", "action": "click", "coordinate": [0.5, 0.5]}'
    assert found(answer) == [("click", (500.0, 250.0))]


def test_the_caller_decides_the_unit() -> None:
    assert found("[100, 200, 500, 500]", unit="thousandths") == [(HALF,)]
    assert found("[100, 100, 500, 250]", unit="pixels") == [(HALF,)]
    assert found("[10, 20, 50, 50]", unit="percent") == [(HALF,)]
    with pytest.raises(UserError, match="unit"):
        grounding("[1, 2]", SIZE, "metres")  # pyright: ignore[reportArgumentType]


def test_one_unit_for_an_answer() -> None:
    """A small box of pixels beside a large one is no fraction."""
    assert found("[0, 0, 1, 1] and [100, 100, 500, 250]") == [((0.0, 0.0, 1.0, 1.0),), (HALF,)]


def test_objects_without_a_label_count_beside_a_call() -> None:
    box = '{"bbox": [0.1, 0.2, 0.5, 0.5]}'
    for written in (box, f"[{box}]", f"[[{box}]]"):
        result = grounding(f"{written} and click(0.3, 0.4)", SIZE)
        assert [(each.box is not None, each.action) for each in result.findings] == [(True, None), (False, "click")]
    only_call = grounding("[[0.1, 0.2, 0.5, 0.5]] and click(0.3, 0.4)", SIZE)
    assert [each.action for each in only_call.findings] == ["click"]


def test_which_picture() -> None:
    sizes = [(100, 100), (200, 400)]
    box = '"bbox": [0, 0, 0.5, 0.5]'
    result = grounding(f'[{{"image": 2, {box}}}, {{"image": 1, {box}}}, {{{box}}}, {{"image": 9, {box}}}]', sizes)
    assert [(each.image, each.box) for each in result.findings] == [
        (1, (0.0, 0.0, 100.0, 200.0)),
        (0, (0.0, 0.0, 50.0, 50.0)),
        (0, (0.0, 0.0, 50.0, 50.0)),
        (0, (0.0, 0.0, 50.0, 50.0)),
    ]
    others = grounding(f'[{{"image": 1, {box}}}, {{{box}}}, {{"image": 9, {box}}}]', sizes, image=1)
    assert [each.image for each in others.findings] == [0, 1, 1]
    nowhere = grounding(f'[{{"image": 2, {box}}}, {{{box}}}, {{"image": 9, {box}}}]', sizes, image=None)
    assert [each.image for each in nowhere.findings] == [1]
    for number in (-1, 2, "1"):
        with pytest.raises(UserError, match="image must be"):
            grounding(box, sizes, image=number)  # pyright: ignore[reportArgumentType]
    counted_from_0 = grounding(f'[{{"image": 0, {box}}}, {{"image": 1, {box}}}]', sizes)
    assert [each.image for each in counted_from_0.findings] == [0, 1]


@pytest.mark.parametrize("size", [(), (0, 5), (5,), "ab", None, [(1, 2), (3,)], (float("nan"), 1), [(1, -1)]])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(UserError, match="image_size"):
        grounding("[0.1, 0.2]", size)


def test_an_answer_that_is_none() -> None:
    with pytest.raises(UserError, match="answer"):
        grounding(None, SIZE)  # pyright: ignore[reportArgumentType]


def test_findings_are_limited() -> None:
    assert len(grounding("[0.1, 0.2, 0.5, 0.5]," * (MAX_FINDINGS + 10), SIZE).findings) == MAX_FINDINGS


def test_the_dictionary_is_json() -> None:
    result = grounding('{"bbox": [0.1, 0.2, 0.5, 0.5], "label": "a \\ud800"}', SIZE)
    assert json.loads(json.dumps(result.to_dict())) == {
        "unit": "relative",
        "findings": [
            {
                "label": "a ?",
                "action": None,
                "box": list(HALF),
                "points": [],
                "relative_box": [0.1, 0.2, 0.5, 0.5],
                "relative_points": [],
                "image": 0,
                "span": [0, 51],
            }
        ],
    }


@pytest.mark.parametrize("seed", range(4))
def test_boxes_come_back_from_every_way_to_write_them(seed: int) -> None:
    rng = random.Random(seed)
    size = (rng.randint(30, 4000), rng.randint(30, 4000))
    for _ in range(50):
        x1, x2 = sorted(rng.sample(range(1001), 2))
        y1, y2 = sorted(rng.sample(range(1001), 2))
        numbers = [x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000]
        texts = [
            json.dumps({"bbox_2d": numbers}),
            f"```json\n{json.dumps([{'label': 'a', 'bbox': numbers}], indent=2)}\n```",
            str([{"box": numbers}]),
            str(numbers),
            str(tuple(numbers)),
            f"({numbers[0]}, {numbers[1]}), ({numbers[2]}, {numbers[3]})",
            f"<ref>a</ref><box>({x1},{y1}),({x2},{y2})</box>",
            f"<|ref|>a<|/ref|><|det|>[[{x1}, {y1}, {x2}, {y2}]]<|/det|>",
            json.dumps({"box_2d": [y1, x1, y2, x2]}),
        ]
        for text in texts:
            if max(x2, y2) <= 1 and not text.startswith(("{", "[", "`", "(0.")):
                continue  # thousandths that look like fractions
            (finding,) = grounding(text, size).findings
            expected = [numbers[0] * size[0], numbers[1] * size[1], numbers[2] * size[0], numbers[3] * size[1]]
            assert finding.box == pytest.approx(expected, abs=0.01), text


PIECES = (
    *"[{()}],:\"'% \n\\x",
    *("0.5", "12", "1000", "-3", "1e5", "NaN", "true", "é", "\x00", "\\u", "\\ud800", "9" * 20, "0.123456789123456789"),
    *("```json\n", "```", "click(", "pyautogui.click(x=", "y=", "dragTo(", "from_coord=[", "((((((", "[[[[[", '{"a":'),
    *("<point>", "</point>", "<|det|>", "<|/det|>", "<box>", "</box>", "<|ref|>", "<|/ref|>", "bbox_2d", '"label"'),
    *("◁/think▷", "◁think▷", "<think>", "</think>", "[0.1,0.2,0.3,0.4]", '{"bbox": [1, 2, 3, 4]}'),
)


def test_whatever_is_written() -> None:
    rng = random.Random(5)
    some = 0
    for _ in range(FUZZED):
        pieces = rng.sample(PIECES, rng.randint(1, 8)) if rng.random() < 0.6 else PIECES
        text = "".join(rng.choice(pieces) for _ in range(rng.choice((5, 20, 60, 200))))
        result = grounding(text, (640, 480))
        check(result, text)
        some += bool(result.findings)
    assert some > FUZZED / 20, "most of this means nothing, but not all"


def check(result: Grounding, text: str) -> None:
    answer = max(text.rfind(closer) for _, closer in MARKERS)
    thinking = [text.find(opener, max(answer, 0)) for opener, _ in MARKERS]
    end = min((at for at in thinking if at >= 0), default=len(text))
    for each in result.findings:
        assert each.box or each.points
        assert each.box is None or (0 <= each.box[0] <= each.box[2] <= 640 and 0 <= each.box[1] <= each.box[3] <= 480)
        assert all(0 <= x <= 640 and 0 <= y <= 480 for x, y in each.points)
        assert max(answer, 0) <= each.span[0] < each.span[1] <= end
    json.dumps(result.to_dict(), allow_nan=False).encode()


@pytest.mark.parametrize(
    "piece", ["[", '{"a":', "click(", "click((", "[0.1,", "(1,", "```", '["', "<box>", "x=1 ", "1"]
)
def test_long_repetitions_are_read_in_one_pass(piece: str) -> None:
    """Reading twice as much reads no more than about twice as many tokens; what is quadratic would not end here."""
    assert isinstance(grounding(piece * (150_000 // len(piece)), SIZE), Grounding)


@pytest.mark.parametrize("piece", ["```[.1,.2]```", '{"a": [1]} ', "[.1, .2] ", "click(.1, .2) ", "<box>1 2 3 4</box>"])
def test_twice_as_many_places_take_twice_the_work(piece: str) -> None:
    """Counted in the steps of the interpreter."""

    def steps(text: str) -> int:
        count = 0

        def count_step(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            return count_step

        before = sys.gettrace()
        sys.settrace(count_step)
        try:
            grounding(text, SIZE)
        finally:
            sys.settrace(before)
        return count

    assert steps(piece * 400) < 2.5 * steps(piece * 200)


def test_values_keep_their_places() -> None:
    text = 'see {"a": [1, {"b": "c"}]} and [2]'
    first, second = values(text)
    assert text[first.begin : first.end] == '{"a": [1, {"b": "c"}]}'
    assert first.fields is not None and first.fields["a"].items is not None
    inner = first.fields["a"].items[1]
    assert text[inner.begin : inner.end] == '{"b": "c"}'
    assert second.items == [Value(second.begin + 1, second.end - 1, scalar=2.0)]


def test_deep_nesting_ends() -> None:
    assert list(values("[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)))
    assert len(list(values("[" * 10_000))) < 10_000 / (MAX_DEPTH - 1)


def test_prompts_show_a_form_that_is_read() -> None:
    system, _ = prompts.click("Open the settings")
    assert found(system["content"]) == [("click", (500.0, 250.0))]
    assert prompts.detect(["dog", "cat"])[0]["content"][0] == {"type": "image"}
    assert "dog, cat" in prompts.detect(["dog", "cat"])[0]["content"][1]["text"]
    assert prompts.detect("dog")[0]["content"][1]["text"].startswith("Find every dog in")
