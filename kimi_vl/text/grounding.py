"""Boxes, points and clicks in an answer: where the model says things are, in pixels of the picture that was sent.

Kimi-VL has no tokens for places: it writes them as text, as fractions of the picture with x first and the origin at the
top left, in JSON, as calls like ``pyautogui.click(x=0.2, y=0.3)``, or bare. Forms of other models that users ask for
or fine-tune into it are read as well. Only the answer counts: thinking holds guesses that were given up.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from ..errors import UserError
from ..events import Done
from .loose_json import Value, values

Sizes = tuple[int, int] | Sequence[tuple[int, int]]
Unit = Literal["relative", "percent", "thousandths", "pixels"]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

MAX_FINDINGS = 1_000
MAX_CHARACTERS = 100_000
"""Of an answer, from its beginning; the rest is not read."""
MAX_LABEL = 500

_OPENER, _CLOSER = re.compile("◁think▷|<think>"), re.compile("◁/think▷|</think>")
_SCALES = {"relative": 1, "percent": 100, "thousandths": 1000}
_TOLERANCE = 0.05  # a fraction slightly beyond the edge is still a fraction

_N = r"[-+]?\d{1,6}(?:\.\d{1,12})?(?![\d.]*\d)\s?%?"
_NUMBER = re.compile(rf"({_N})")
_PAIR = re.compile(rf"(?:\b[xy]\d?\s*[=:]\s*)?({_N})\s*[,\s]\s*(?:\b[xy]\d?\s*[=:]\s*)?({_N})")
_QUAD = re.compile(rf"({_N})\s*[,\s]\s*({_N})[\s\])]*[,\s][\s\[(]*({_N})\s*[,\s]\s*({_N})")
_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL)
_CALL = re.compile(
    r"(?<![A-Za-z0-9_])(?:[A-Za-z_]{1,30}\.){0,3}"
    r"((?:left|right|middle|double|triple)?_?click|move_?to|drag(?:_?to)?|swipe|long_?press|tap|hover)"
    r"\s{0,3}\(([^()]{0,200}(?:\([^()]{0,100}\)[^()]{0,100}){0,4})\)",
    re.IGNORECASE,
)
_TAGGED = re.compile(
    r"(?:(?:<\|ref\|>|<\|object_ref_start\|>|<ref>)(?P<label>[^<>]{0,500})(?:<\|/ref\|>|<\|object_ref_end\|>|</ref>)\s{0,9})?"
    r"<(?P<tag>\|det\||\|box_start\||box|bbox|point)>(?P<body>[^<>]{1,4000})<(?:\|/det\||\|box_end\||/box|/bbox|/point)>"
)
_BARE = re.compile(
    r"(?<![\w\])}])(?:"  # not the arguments of something
    rf"\[\s*({_N})\s*,\s*({_N})\s*,\s*({_N})\s*,\s*({_N})\s*\]"
    rf"|\(\s*({_N})\s*,\s*({_N})\s*,\s*({_N})\s*,\s*({_N})\s*\)"
    rf"|\(\s*({_N})\s*,\s*({_N})\s*\)\s*,\s*\(\s*({_N})\s*,\s*({_N})\s*\)"
    rf"|\[\s*({_N})\s*,\s*({_N})\s*\]|\(\s*({_N})\s*,\s*({_N})\s*\)"
    rf"|x\s*[:=]\s*({_N})[^\w.%-]{{1,6}}(?:and\s+)?y\s*[:=]\s*({_N}))",
    re.IGNORECASE,
)
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "bounding_box", "boundingBox", "rect", "bboxes", "boxes")
_CORNER_KEYS = (
    ("min_x", "min_y", "max_x", "max_y"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
_SIZE_KEYS = (("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height"))
_POINT_KEYS = ("point_2d", "point", "coordinate", "coordinates", "click", "center", "points")
_LABEL_KEYS = ("label", "caption", "name", "class", "category", "object", "element", "text", "description")


@dataclass(frozen=True)
class Finding:
    """A place that an answer names: a ``box``, or ``points`` (of an ``action``: where, or from where to where).

    Pixels are of the picture that was sent, turned upright; ``relative_…`` are the same as fractions of it. Boxes are
    (left, top, right, bottom). ``image`` counts the pictures of the request from 0; ``span`` is where in the answer's
    text the place is named, as indices of characters.
    """

    label: str | None
    action: str | None
    box: Box | None
    points: tuple[Point, ...]
    relative_box: Box | None
    relative_points: tuple[Point, ...]
    image: int
    span: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what is not there is null or empty."""
        return {
            "label": self.label,
            "action": self.action,
            "box": self.box and list(self.box),
            "points": [list(point) for point in self.points],
            "relative_box": self.relative_box and list(self.relative_box),
            "relative_points": [list(point) for point in self.relative_points],
            "image": self.image,
            "span": list(self.span),
        }


@dataclass(frozen=True)
class Grounding:
    """All findings of an answer in its order, and the ``unit`` that its numbers were taken for (None: no numbers)."""

    unit: Unit | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "findings": [finding.to_dict() for finding in self.findings]}


class _Number(NamedTuple):
    value: float
    percent: bool = False


@dataclass(slots=True)
class _Raw:
    """A place before its unit is known."""

    span: tuple[int, int]
    box: Sequence[_Number] | None = None
    points: Sequence[tuple[_Number, _Number]] = ()
    label: str | None = None
    action: str | None = None
    image: int | None = None
    thousandths: bool = False  # a form that is written in thousandths
    y_first: bool = False  # where its numbers are thousandths
    sized: bool = False  # the box is left, top, width, height

    def numbers(self) -> Iterator[_Number]:
        yield from self.box or ()
        for point in self.points:
            yield from point


def grounding(answer: str, image_size: Sizes, unit: Unit | None = None, image: int | None = 0) -> Grounding:
    """The places that ``answer`` names in a picture of ``image_size`` (width, height), or in several pictures.

    The unit of the numbers is decided once for the whole answer: any ``%`` makes it percent; all within 0 to 1,
    relative; all up to 1,000 in a form that is written so, thousandths; else pixels. ``unit`` decides it instead.
    With several pictures a place is in the one of number ``image``, counted from 0, or in none where that is None,
    unless its JSON has an ``image`` number (from 1, or from 0 where an answer uses 0). Boxes are ordered and cut at the
    picture's edges; what has no area or lies outside is left out.
    Raises :class:`UserError` (E_PARAMETER) for an answer that is no text, and a size or a number that is none.
    """
    sizes = _sizes(image_size)
    if not isinstance(answer, str):
        raise UserError("E_PARAMETER", "answer must be a text; change it.")
    if unit is not None and unit not in get_args(Unit):
        raise UserError("E_PARAMETER", f"unit must be one of {', '.join(get_args(Unit))}; change it.")
    if image is not None and not (isinstance(image, int) and 0 <= image < len(sizes)):
        raise UserError("E_PARAMETER", "image must be the number of one of the pictures, from 0, or None; change it.")
    raw = _found(*_answer_part(answer))[:MAX_FINDINGS]
    unit = unit or _unit(raw)
    first = 0 if any(each.image == 0 for each in raw) else 1
    findings = [_placed(each, unit, sizes, first, image) for each in raw] if unit else []
    return Grounding(unit, tuple(finding for finding in findings if finding is not None))


def grounding_of(done: Done) -> Grounding:
    """The places in the images of a request that its answer names."""
    if not done.image_sizes:
        return Grounding(None, ())
    return grounding(done.answer, done.image_sizes, image=done.asked_image)


def _sizes(image_size: Any) -> list[tuple[int, int]]:
    try:
        pairs = [image_size] if isinstance(image_size[0], int | float) else list(image_size)
        sizes = [(int(width), int(height)) for width, height in pairs]
    except Exception:  # whatever a stranger's conversion raises
        sizes = []
    if not sizes or min(min(size) for size in sizes) < 1:
        raise UserError(
            "E_PARAMETER", "image_size must be a width and a height in pixels, or a list of these; change it."
        )
    return sizes


def _answer_part(text: str) -> tuple[str, int]:
    """The text up to where its answer ends, and where that begins: behind the last thinking that ends, up to thinking
    that does not end."""
    begin = max((closer.end() for closer in _CLOSER.finditer(text)), default=0)
    opener = _OPENER.search(text, begin)
    return text[: min(begin + MAX_CHARACTERS, opener.start() if opener else len(text))], begin


# From text to places


def _found(text: str, begin: int) -> list[_Raw]:
    """All places from ``begin`` on, in order. Bare numbers count only where nothing says more."""
    clear, bare = [], []
    fences = [match.span(1) for match in _FENCE.finditer(text, begin)]
    for value in values(text, begin):
        (clear if _inside_one(value.begin, fences) or value.has_fields else bare).extend(_of_json(value, None, None))
    for places in (_of_calls(text, begin), _of_tags(text, begin)):
        covered = sorted(place.span for place in clear)
        clear.extend(place for place in places if not _inside_one(place.span[0], covered))
    found = clear or _without_overlaps([*_of_bare_text(text, begin), *bare])
    return sorted(found, key=lambda place: place.span)


def _inside_one(at: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether ``at`` is inside one of the ``spans``, which are sorted."""
    before = bisect.bisect_right(spans, at, key=lambda span: span[0])
    return before > 0 and at < spans[before - 1][1]


def _without_overlaps(places: list[_Raw]) -> list[_Raw]:
    """The longer of places that are found twice."""
    kept: list[_Raw] = []
    for place in sorted(places, key=lambda place: (place.span[0], -place.span[1])):
        if not kept or place.span[0] >= kept[-1].span[1]:
            kept.append(place)
    return kept


def _of_json(value: Value, label: str | None, image: int | None) -> Iterator[_Raw]:
    """The places in a value; ``label`` and ``image`` are what an object around it says."""
    if value.items is not None:
        if (box := _box_of(value)) is not None:
            yield _Raw((value.begin, value.end), box=box, label=label, image=image)
        elif (point := _pair_of(value)) is not None:
            yield _Raw((value.begin, value.end), points=[point], label=label, image=image)
        else:
            for item in value.items:
                yield from _of_json(item, label, image)
    elif value.fields is not None:
        yield from _of_object(value, value.fields, label, image)


def _of_object(value: Value, fields: dict[str, Value], label: str | None, image: int | None) -> Iterator[_Raw]:
    label = next((text for key in _LABEL_KEYS if key in fields and (text := _text(fields[key]))), label)
    images = (_index(fields[key]) for key in ("image", "image_index", "picture") if key in fields)
    image = next((number for number in images if number is not None), image)
    action = _action(_text(fields.get("action")) or _text(fields.get("type")))
    place = _Raw((value.begin, value.end), label=label, image=image, action=action)
    used, several = set(), []
    for key in _BOX_KEYS:
        inner = fields.get(key)
        if inner is None:
            continue
        used.add(key)
        if place.box is None and (box := _box_of(inner) or _corners(inner.fields)) is not None:
            place.box, place.thousandths, place.y_first = box, key == "box_2d", key == "box_2d"
        else:
            several.append(inner)
    for key in _POINT_KEYS:
        inner = fields.get(key)
        if inner is None or (inner.items is None and inner.fields is None):
            continue
        used.add(key)
        if not place.points and (point := _pair_of(inner) or _xy(inner.fields)) is not None:
            place.points = [point]
        elif place.box is None and (box := _box_of(inner)) is not None:
            place.box = box
        else:
            several.append(inner)
    if place.box is None and not place.points:
        place.box = _corners(fields)
        if place.box is None and (sized := _sized(fields)) is not None:
            place.box, place.sized = sized, True
        elif place.box is None and (point := _xy(fields)) is not None:
            place.points = [point]
    if place.box is not None or place.points:
        yield place
    for inner in several:
        yield from _of_json(inner, label, image)
    for key, inner in fields.items():
        if key not in used and (inner.fields is not None or (inner.items and not _numbers_of(inner))):
            yield from _of_json(inner, label, image)


def _numbers_of(value: Value | None) -> list[_Number] | None:
    """The numbers of an array of nothing else."""
    if value is None or not value.items or not value.whole:
        return None
    numbers = [_number_of(item) for item in value.items]
    return None if None in numbers else [number for number in numbers if number is not None]


def _number_of(value: Value | None) -> _Number | None:
    """A number, or a text that is one (``"0.5"``, ``"12%"``)."""
    if value is None or value.items is not None or value.fields is not None or isinstance(value.scalar, bool):
        return None
    if isinstance(value.scalar, str):
        match = _NUMBER.fullmatch(value.scalar.strip())
        return _read(match[1]) if match else None
    return None if value.scalar is None or not math.isfinite(value.scalar) else _Number(value.scalar)


def _box_of(value: Value) -> list[_Number] | None:
    """Four numbers, or two pairs."""
    numbers = _numbers_of(value)
    if numbers is None and value.whole and value.items is not None and len(value.items) == 2:
        pairs = [_numbers_of(item) for item in value.items]
        numbers = [number for pair in pairs for number in pair or ()] if all(p and len(p) == 2 for p in pairs) else None
    return numbers if numbers is not None and len(numbers) == 4 else None


def _pair_of(value: Value | None) -> tuple[_Number, _Number] | None:
    numbers = _numbers_of(value)
    return (numbers[0], numbers[1]) if numbers is not None and len(numbers) == 2 else None


def _named(fields: dict[str, Value] | None, keys: Iterable[str]) -> list[_Number] | None:
    numbers = [_number_of((fields or {}).get(key)) for key in keys]
    return None if None in numbers else [number for number in numbers if number is not None]


def _corners(fields: dict[str, Value] | None) -> list[_Number] | None:
    return next((numbers for keys in _CORNER_KEYS if (numbers := _named(fields, keys))), None)


def _sized(fields: dict[str, Value]) -> list[_Number] | None:
    return next((numbers for keys in _SIZE_KEYS if (numbers := _named(fields, keys))), None)


def _xy(fields: dict[str, Value] | None) -> tuple[_Number, _Number] | None:
    numbers = _named(fields, ("x", "y"))
    return (numbers[0], numbers[1]) if numbers else None


def _text(value: Value | None) -> str | None:
    return value.scalar[:MAX_LABEL] if value is not None and isinstance(value.scalar, str) and value.scalar else None


def _index(value: Value | None) -> int | None:
    number = value.scalar if value is not None else None
    whole = isinstance(number, float) and number.is_integer() and 0 <= number < 10_000
    return int(number) if whole and isinstance(number, float) else None


def _action(name: str | None) -> str | None:
    """The one spelling of an action: ``rightClick`` and ``right_click`` are ``right_click``."""
    match = _CALL.fullmatch(f"{name}()") if name else None
    if match is None:
        return None
    plain = match[1].lower().replace("_", "")
    return {"moveto": "move_to", "dragto": "drag_to", "longpress": "long_press", "leftclick": "click"}.get(
        plain, plain.replace("click", "_click").lstrip("_")
    )


def _of_calls(text: str, begin: int) -> Iterator[_Raw]:
    for match in _CALL.finditer(text, begin) if "(" in text else ():
        arguments = match[2]
        action = _action(match[1])
        boxed = re.search(rf"[\[(>]\s*{_QUAD.pattern}\s*[\])<]", arguments)
        if boxed:  # a click on a box means its middle
            a, b, c, d = (_read(number) for number in boxed.groups())
            points = [(_middle(a, c), _middle(b, d))]
        else:
            points = [(_read(pair[1]), _read(pair[2])) for pair in _PAIR.finditer(arguments)][:2]
        if points:
            thousandths = "<point>" in arguments or "_box" in arguments
            yield _Raw(match.span(), points=points, action=action, thousandths=thousandths)


def _of_tags(text: str, begin: int) -> Iterator[_Raw]:
    for match in _TAGGED.finditer(text, begin):
        label = (match["label"] or "").strip() or None
        thousandths = match["tag"] != "bbox"
        boxes = list(_QUAD.finditer(match["body"])) if match["tag"] != "point" else []
        for box in boxes:
            yield _Raw(match.span(), box=[_read(n) for n in box.groups()], label=label, thousandths=thousandths)
        if not boxes and (pair := _PAIR.search(match["body"])):
            yield _Raw(match.span(), points=[(_read(pair[1]), _read(pair[2]))], label=label, thousandths=thousandths)


def _of_bare_text(text: str, begin: int) -> Iterator[_Raw]:
    for match in _BARE.finditer(text, begin):
        numbers = [_read(number) for number in match.groups() if number is not None]
        if len(numbers) == 4:
            yield _Raw(match.span(), box=numbers)
        else:
            yield _Raw(match.span(), points=[(numbers[0], numbers[1])])


def _read(text: str) -> _Number:
    return _Number(float(text.rstrip("% ")), text.endswith("%"))


def _middle(a: _Number, b: _Number) -> _Number:
    return _Number((a.value + b.value) / 2, a.percent or b.percent)


# From places to pixels


def _unit(raw: Sequence[_Raw]) -> Unit | None:
    numbers = [number for place in raw for number in place.numbers()]
    if not numbers:
        return None
    if any(number.percent for number in numbers):
        return "percent"
    if all(-_TOLERANCE <= number.value <= 1 + _TOLERANCE for number in numbers):
        return "relative"
    if any(place.thousandths for place in raw) and all(number.value <= 1000 for number in numbers):
        return "thousandths"
    return "pixels"


def _placed(raw: _Raw, unit: Unit, sizes: Sequence[tuple[int, int]], first: int, default: int | None) -> Finding | None:
    image = default if raw.image is None or not first <= raw.image < first + len(sizes) else raw.image - first
    if image is None:
        return None
    width, height = sizes[image]
    scale_x, scale_y = (width, height) if unit == "pixels" else (_SCALES[unit], _SCALES[unit])
    swapped = raw.y_first and unit == "thousandths"

    def fractions(x: _Number, y: _Number) -> Point:
        x, y = (y, x) if swapped else (x, y)
        return x.value / scale_x, y.value / scale_y

    box = None
    if raw.box is not None:
        (x1, y1), (x2, y2) = fractions(raw.box[0], raw.box[1]), fractions(raw.box[2], raw.box[3])
        if raw.sized:
            x2, y2 = x1 + x2, y1 + y2
        x1, y1, x2, y2 = _inside(x1), _inside(y1), _inside(x2), _inside(y2)
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) if x1 != x2 and y1 != y2 else None
    points: list[Point] = []
    if raw.points:
        points = [fractions(x, y) for x, y in raw.points]
        outside = any(not -_TOLERANCE <= each <= 1 + _TOLERANCE for point in points for each in point)
        points = [] if outside else [(_inside(x), _inside(y)) for x, y in points]
    if box is None and not points:
        return None
    return Finding(
        label=raw.label,
        action=raw.action,
        box=box
        and (round(box[0] * width, 2), round(box[1] * height, 2), round(box[2] * width, 2), round(box[3] * height, 2)),
        points=tuple([(round(x * width, 2), round(y * height, 2)) for x, y in points]),
        relative_box=box and (round(box[0], 6), round(box[1], 6), round(box[2], 6), round(box[3], 6)),
        relative_points=tuple([(round(x, 6), round(y, 6)) for x, y in points]),
        image=image,
        span=raw.span,
    )


def _inside(fraction: float) -> float:
    return 0.0 if fraction < 0 else 1.0 if fraction > 1 else fraction
