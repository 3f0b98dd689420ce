"""Questions whose answer is a JSON object with named keys."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from demo_world import phrases
from demo_world.arithmetic import read_sum, result_of, work_out
from demo_world.pictures import Picture
from demo_world.requests import REQUESTS
from demo_world.turns import Turn, many, name_of, reading, sum_reading


def turn_json(rng: random.Random, pictures: Sequence[Picture]) -> Turn:
    """A sum, a count, a list of objects or one object, as JSON."""
    items = pictures[0].items
    if items[0].colour is None:
        a, op, b = read_sum(items)
        thinking = f"{sum_reading(items)} {work_out(a, op, b)}"
        values: dict[str, object] = {"result": result_of(a, op, b)}
        if rng.random() < 0.3:
            values = {"sum": f"{a} {op} {b}", **values}
        return _turn(rng, "sum", thinking, values)
    read = reading(items)
    if len(items) == 1 and rng.random() < 0.6:
        colour = rng.choice(("colour", "color"))
        thinking = f"{read} So it is {name_of(items[0])}."
        return _turn(rng, "what", thinking, {colour: items[0].colour, "shape": items[0].kind})
    thinking = f"{read} So {many(len(items))}."
    if rng.random() < 0.5:
        return _turn(rng, "count", thinking, {"count": len(items)})
    return _turn(rng, "describe", thinking, {"objects": [name_of(item) for item in items]})


def _turn(rng: random.Random, kind: str, thinking: str, values: dict[str, object]) -> Turn:
    """The question of this kind, with the keys of its answer named."""
    names = list(values)
    form = (
        rng.choice(('the key "{}"', "the key {}"))
        if len(names) == 1
        else rng.choice(('the keys "{}" and "{}"', "the keys {} and {}"))
    )
    wanted = rng.choice(REQUESTS["json"]).format(keys=form.format(*names))
    question = f"{rng.choice(phrases.QUESTIONS[kind])} {wanted}"
    return Turn(question, thinking, json.dumps(values))
