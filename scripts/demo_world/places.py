"""Questions for boxes and clicks, answered in forms that the published model writes and `kimi_vl.grounding` reads."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from demo_world.artists import other_look
from demo_world.pictures import Item, Picture, hundredths
from demo_world.requests import REQUESTS
from demo_world.turns import Turn, name_of, reading, vary
from kimi_vl.text import prompts

ABSENT_SHARE = 0.08
DETECT_SHARE = 0.4
"""Of the questions for boxes are those of `kimi_vl.text.prompts.detect`."""


def _gui_system() -> str:
    content = prompts.click("")[0]["content"]
    assert isinstance(content, str)
    return content


GUI_SYSTEM = _gui_system()
"""The system message of `kimi_vl.text.prompts.click`, which asks for a click in a form of its own."""


def fraction(number: int) -> str:
    """A number of hundredths as the model writes it."""
    return f"{number / 100:.2f}"


def _box(item: Item, picture: Picture) -> str:
    numbers = ", ".join(map(fraction, hundredths(item, picture.size).box))
    return f'{{"bbox_2d": [{numbers}], "label": {json.dumps(name_of(item))}}}'


def _boxes(items: Sequence[Item], picture: Picture) -> str:
    return "```json\n[" + ", ".join(_box(item, picture) for item in items) + "]\n```"


def _click(item: Item, picture: Picture) -> str:
    x, y = map(fraction, hundredths(item, picture.size).centre)
    return f"pyautogui.click(x={x}, y={y})"


def texts(item: Item, picture: Picture) -> tuple[str, str]:
    """What an answer may say of an object's place: its box, or a click on it."""
    return _box(item, picture), _click(item, picture)


def _detect(labels: str) -> str:
    return prompts.detect(labels)[0]["content"][1]["text"]


def turn_box(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """For the box of one object that is named, or of one that is not there."""
    picture = pictures[0]
    item = rng.choice(picture.items)
    name, asked, wanted = name_of(item), f"number {item.order}", (item,)
    if rng.random() < ABSENT_SHARE:
        taken = [(each.colour or "", each.kind) for each in picture.items]
        name, asked, wanted = " ".join(other_look(rng, taken)), "none", ()
    elif len(picture.items) == 1 and rng.random() < 0.3:
        name = "object"
    question = _detect(name) if rng.random() < DETECT_SHARE else vary(rng, rng.choice(REQUESTS["box"]).format(one=name))
    read = reading(picture.items)
    return Turn(question, f"{read} Asked: {name}, {asked}.", _boxes(wanted, picture), (read,), wanted)


def turn_boxes(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """For the boxes of all objects."""
    picture = pictures[0]
    question = _detect("object") if rng.random() < DETECT_SHARE else vary(rng, rng.choice(REQUESTS["boxes"]))
    read = reading(picture.items)
    return Turn(question, f"{read} Asked: all.", _boxes(picture.items, picture), (read,), picture.items)


def turn_click(rng: random.Random, pictures: Sequence[Picture], gui: bool) -> Turn:
    """For a click on an object; ``gui`` is the form of :data:`GUI_SYSTEM`."""
    picture = pictures[0]
    item = rng.choice(picture.items)
    question = vary(rng, rng.choice(REQUESTS["instruction" if gui else "click"]).format(one=name_of(item)))
    answer = _click(item, picture)
    if gui:
        question = f"## Task:\n{question}"
        answer = f"## Action:\nClick the {name_of(item)}.\n## Code:\n```python\n{answer}\n```"
    read = reading(picture.items)
    return Turn(question, f"{read} Asked: {name_of(item)}, number {item.order}.", answer, (read,), (item,))
