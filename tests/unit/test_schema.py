"""The schema made from predict.py is the promised one, and what Cog would misread is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cog_local import schema

ROOT = Path(__file__).resolve().parents[2]
NONE = {"default": None, "nullable": True}
URI = {"type": "string", "format": "uri"}

PROMISED: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"type": "string", "default": ""}),
    ("image", {**URI, **NONE}),
    ("top_p", {"type": "number", "default": 1.0, "minimum": 0, "maximum": 1}),
    ("temperature", {"type": "number", "default": 0.6, "minimum": 0, "maximum": 2}),
    ("max_length_tokens", {"type": "integer", "default": 8192, "minimum": 1, "maximum": 131072}),
    ("images", {"type": "array", "items": URI, "default": []}),
    ("system_prompt", {"type": "string", "default": ""}),
    ("messages", {"type": "array", "items": {"type": "object"}, "default": []}),
    ("thinking_budget", {"type": "integer", **NONE, "minimum": 0}),
    ("top_k", {"type": "integer", "default": 0, "minimum": 0}),
    ("stop_sequences", {"type": "string", "default": ""}),
    ("seed", {"type": "integer", **NONE}),
    ("output_format", {"allOf": [{"$ref": "#/components/schemas/output_format"}], "default": "text"}),
    ("video", {**URI, **NONE}),
    ("document", {**URI, **NONE}),
    ("fps", {"type": "number", "default": 1.0, "minimum": 0, "maximum": 60}),
    ("max_frames", {"type": "integer", "default": 64, "minimum": 1, "maximum": 512}),
    ("start", {"type": "number", "default": 0.0, "minimum": 0}),
    ("end", {"type": "number", **NONE, "minimum": 0}),
    ("pages", {"type": "string", "default": ""}),
    ("json_schema", {"type": "string", "default": ""}),
    ("max_tokens", {"type": "integer", **NONE, "deprecated": True}),
    ("max_new_tokens", {"type": "integer", **NONE, "deprecated": True}),
]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return schema.generate((ROOT / "predict.py").read_text(encoding="utf-8"))


def test_inputs_in_order(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["Input"]["properties"]
    ordered = sorted(properties, key=lambda name: properties[name]["x-order"])
    assert ordered == [name for name, _ in PROMISED]
    assert [properties[name]["x-order"] for name in ordered] == list(range(len(PROMISED)))


@pytest.mark.parametrize(("name", "promised"), PROMISED, ids=[name for name, _ in PROMISED])
def test_input(document: dict[str, Any], name: str, promised: dict[str, Any]) -> None:
    field = dict(document["components"]["schemas"]["Input"]["properties"][name])
    assert field.pop("description").endswith(".")
    del field["x-order"]
    if "allOf" not in field:
        assert field.pop("title") == name.replace("_", " ").title()
    assert field == promised


def test_the_concurrent_predictor_has_the_same_document_and_more_slots(document: dict[str, Any]) -> None:
    source = (ROOT / "predict.py").read_text(encoding="utf-8")
    assert schema.generate(source, "ConcurrentPredictor") == document
    assert [schema.slots(source, name) for name in ("Predictor", "ConcurrentPredictor")] == [1, 32]


ASYNC = """
from cog import AsyncConcatenateIterator, BasePredictor, ConcatenateIterator, Input, concurrent, streaming
class Predictor(BasePredictor):
    {decorators}
    {define} predict(self, x: int = Input(default=1)) -> {returns}:
        {body}
"""
OK = {
    "decorators": "@streaming\n    @concurrent(max=4)",
    "define": "async def",
    "returns": "ConcatenateIterator[str]",
    "body": "return pieces()",
}


@pytest.mark.parametrize(
    ("changes", "slots", "streams"),
    [
        ({}, 4, True),
        ({"decorators": "@concurrent(max=4)\n    @streaming"}, 4, True),
        ({"decorators": "@streaming"}, 1, True),
        ({"decorators": "@concurrent(max=4)"}, 4, False),
        ({"decorators": "", "body": "yield ''", "returns": "AsyncConcatenateIterator[str]"}, 1, False),
    ],
)
def test_async_predictors(changes: dict[str, str], slots: int, streams: bool) -> None:
    source = ASYNC.format(**{**OK, **changes})
    assert schema.slots(source) == slots
    assert ("x-cog-streaming" in json.dumps(schema.generate(source))) == streams


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": "yield ''"}, "collects"),
        ({"body": "yield ''", "decorators": "@concurrent(max=4)"}, "does not fit"),
        ({"returns": "AsyncConcatenateIterator[str]"}, "does not fit"),
        ({"define": "def"}, "for async def"),
        ({"decorators": "@concurrent(max=N)"}, "plain number"),
        ({"decorators": "@concurrent(max=0)"}, "plain number"),
        ({"decorators": "@concurrent(4)"}, "plain number"),
        ({"decorators": "@concurrent(max=4)\n    @concurrent(max=5)"}, "plain number"),
        ({"decorators": "@concurrent"}, "known here"),
        ({"decorators": "@streaming()"}, "plain number"),
        ({"define": "def", "decorators": "", "returns": "AsyncConcatenateIterator[str]"}, "does not fit"),
    ],
)
def test_refused_async_predictors(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(schema.SchemaError, match=reason):
        schema.generate(ASYNC.format(**{**OK, **changes}))


def test_nothing_is_required(document: dict[str, Any]) -> None:
    assert "required" not in document["components"]["schemas"]["Input"]


def test_output_format_is_an_enumeration(document: dict[str, Any]) -> None:
    enumeration = document["components"]["schemas"]["output_format"]
    assert enumeration["type"] == "string"
    assert enumeration["enum"] == ["text", "think_tags", "answer", "json", "grounding", "grounding_image"]


def test_output_streams(document: dict[str, Any]) -> None:
    assert document["components"]["schemas"]["Output"] == {
        "title": "Output",
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
        "x-cog-array-display": "concatenate",
    }
    assert document["paths"]["/predictions"]["post"]["x-cog-streaming"] is True


MODULE = """
from __future__ import annotations
from cog import BasePredictor, ConcatenateIterator, Input, Path, streaming
LIMIT = 10
class Predictor(BasePredictor):
    @streaming
    def predict(self, {parameter}) -> ConcatenateIterator[str]:
        yield ""
"""


def field_of(parameter: str) -> dict[str, Any]:
    document = schema.generate(MODULE.format(parameter=parameter))
    return document["components"]["schemas"]["Input"]["properties"]["x"]


@pytest.mark.parametrize(
    ("parameter", "expected"),
    [
        ("x: int = Input(default=-1)", {"type": "integer", "default": -1}),
        ("x: Optional[int] = Input(default=None)", {"type": "integer", **NONE}),
        ("x: list[str] | None = Input(default=None)", {"type": "array", "items": {"type": "string"}, **NONE}),
        ("x: list[str] = Input(default=['a', 'b'])", {"type": "array", "items": {"type": "string"}}),
        ('x: str = Input(description="""a\nb""")', {"type": "string", "description": "a\nb"}),
        ("x: bool = Input(default=False)", {"type": "boolean", "default": False}),
        ("x: Path = Input(accept='image/*')", {**URI, "x-cog-accept": "image/*"}),
    ],
)
def test_accepted(parameter: str, expected: dict[str, Any]) -> None:
    field = field_of(parameter)
    assert {key: field[key] for key in expected} == expected


def test_an_input_without_default_is_required() -> None:
    document = schema.generate(MODULE.format(parameter="x: int = Input(ge=1)"))
    assert document["components"]["schemas"]["Input"]["required"] == ["x"]


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("x: Path = Input(default=None)", "required"),
        ("x: int = Input(default=None)", "required"),
        ("x: list[Path] = Input(default=None)", "required"),
        ("x: int = 3", "inside Input"),
        ("x: int | None = None", "inside Input"),
        ("x: int", "needs"),
        ("x=Input(default=3)", "no annotation"),
        ("x: int = Input(3)", "keywords"),
        ("x: int = Input(default=2**10)", "literal"),
        ("x: int = Input(default=LIMIT)", "literal"),
        ("x: int = Input(default=config.limit)", "literal"),
        ("x: int = Input(default=1, ge=LIMIT)", "literal"),
        ("x: int = Input(default=1, le=2 * 5)", "literal"),
        ("x: int = Input(default=(1))", "parentheses"),
        ("x: str = Input(description='a' 'b')", "adjacent"),
        ("x: str = Input(description=('a'))", "parentheses"),
        ("x: str = Input(description=(\n'a'\n'b'))", "parentheses"),
        ("x: str = Input(description=f'a')", "literal"),
        ("x: str = Input(description='a' + 'b')", "literal"),
        (r"x: str = Input(description='a\nb')", "escapes"),
        (r"x: str = Input(description='it\'s')", "escapes"),
        ("x: str = Input(description=r'a')", "prefix"),
        ("x: str = Input(default='a' 'b')", "adjacent"),
        ("x: str = Input(choices=list(NAMES))", "literal"),
        ("x: str = Input(choices=['a'])", "at least two"),
        ("x: str = Input(choices=['a', 1])", "type"),
        ("x: str = Input(default='c', choices=['a', 'b'])", "one of the choices"),
        ("x: int = Input(default=0, ge=1)", "bounds"),
        ("x: int = Input(default='1')", "type"),
        ("x: int = Input(default=True)", "type"),
        ("x: int = Input(default=1, minimum=0)", "unknown keyword"),
        ("x: int = Input(**common)", "unknown keyword"),
        ("x: Path | str = Input(default='a')", "unsupported"),
        ("x: Literal['a', 'b'] = Input(default='a')", "unsupported"),
        ("*x: int", "ordinary"),
        ("**x: int", "ordinary"),
        ("*, x: int = Input(default=1)", "ordinary"),
    ],
)
def test_refused_inputs(parameter: str, reason: str) -> None:
    with pytest.raises(schema.SchemaError, match=reason):
        field_of(parameter)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            "from cog import BasePredictor, ConcatenateIterator, Input, Path, streaming",
            "from cog import *",
            r"\*",
        ),
        ("import BasePredictor,", "import BasePredictor as B,", "own name"),
        (", streaming\n", "\ntry:\n    from cog import streaming\nexcept ImportError: pass\n", "plain"),
        (", Path, streaming\n", ", streaming\nfrom pathlib import Path\n", "plain"),
        (", streaming\n", "\n", "plain"),
        ("    def predict", "    async def predict", "async"),
        ("    @streaming\n    def predict", "    async def predict", "does not fit"),
        (", streaming\n", ", streaming\nfrom asyncio import concurrent\n", "plain"),
        ("ConcatenateIterator[str]:", "ConcatenateIterator:", "return annotation"),
        (" -> ConcatenateIterator[str]:", ":", "return annotation"),
        ("-> ConcatenateIterator[str]:", "-> str:", "iterator"),
        ("    @streaming", "    @streaming\n    @timed", "decorator"),
        ("class Predictor", "class Other", "one class"),
        ("    @streaming", "    def run(self) -> str: ...\n    @streaming", "exactly one"),
        ("(self, ", "(", "first parameter"),
    ],
)
def test_refused_modules(before: str, after: str, reason: str) -> None:
    source = MODULE.format(parameter="x: Path | None = Input(default=None)")
    assert before in source
    with pytest.raises(schema.SchemaError, match=reason):
        schema.generate(source.replace(before, after))


# Beside Cog's own parser

RECORDED = [
    json.loads(line) for line in (Path(__file__).parent / "cog_schemas.jsonl").read_text(encoding="utf-8").splitlines()
]
"""What Cog's parser makes of one input: its schema, or null where it refuses; and whether this generator takes it."""

ONE_INPUT = """
from cog import BasePredictor, ConcatenateIterator, Input, Path, streaming
class Inputs:
    field = {shared}
class Predictor(BasePredictor):
    @streaming
    def predict(self, {name}: {type} = {value}) -> ConcatenateIterator[str]:
        yield ""
"""


def recorded_source(case: dict[str, Any], by_class: bool) -> str:
    shared, value = (case["input"], "Inputs.field") if by_class else ("Input()", case["input"])
    return ONE_INPUT.format(shared=shared, name=case["name"], type=case["type"], value=value)


@pytest.mark.parametrize("by_class", [False, True], ids=["in place", "by class"])
def test_what_is_taken_is_what_cog_makes_of_it_and_the_rest_is_refused(by_class: bool) -> None:
    taken = 0
    for case in RECORDED:
        source = recorded_source(case, by_class)
        if not case["accepted"]:
            with pytest.raises((schema.SchemaError, SyntaxError)):
                schema.generate(source)
            continue
        made = json.loads(json.dumps(schema.generate(source)))["components"]["schemas"]
        expected = case["cog"]
        assert made["Input"]["properties"] == {case["name"]: expected["input"]}, case
        assert ("required" in made["Input"]) == expected["required"], case
        assert made.get(case["name"]) == expected.get("enum"), case
        taken += 1
    assert taken > 150


@pytest.mark.parametrize(
    "parameter",
    [
        "x: int = Input(default=5, ge=0x10)",
        "x: int = Input(default=5, le=0b11)",
        "x: int = Input(default=5, ge=True)",
        "x: int = Input(default=5, le=None)",
        "x: int = Input(default=5, le=1j)",
        "x: int = Input(default=5, le=1_000)",
        "x: int = Input(default=5, ge=- 1)",
        "x: int = Input(default=5, le=9007199254740993)",
        "x: int = Input(default=9223372036854775808)",
        "x: list[int] = Input(default=[-9223372036854775809])",
        "x: float = Input(default=1e400)",
        "x: list[int] = Input(default=[1, # one\n 2])",
        "x: str = Input(default='a', ge=1)",
        "x: int = Input(min_length=1)",
        "x: str = Input(min_length=-1)",
        "x: str = Input(regex=None)",
        "x: str = Input(accept='image/*')",
        "x: int = Input(default=5, deprecated=1)",
        "x: dict = Input(default={}, choices={1, 2})",
        "é: int = Input(default=5)",
    ],
)
def test_what_cog_drops_without_a_word_is_refused(parameter: str) -> None:
    with pytest.raises(schema.SchemaError):
        schema.generate(MODULE.format(parameter=parameter))


def test_titles_keep_capitals() -> None:
    document = schema.generate(MODULE.format(parameter="URL0_max: int = Input(default=5)"))
    assert document["components"]["schemas"]["Input"]["properties"]["URL0_max"]["title"] == "URL0 Max"


# Inputs of a class

SHARED = """
from cog import BasePredictor, ConcatenateIterator, Input, Path, streaming
class Inputs:
    x = Input(default=3)
class Predictor(BasePredictor):
    @streaming
    def predict(self, x: int = Inputs.x) -> ConcatenateIterator[str]:
        yield ""
"""


def test_an_input_of_a_class_is_the_same_as_in_place() -> None:
    assert schema.generate(SHARED) == schema.generate(SHARED.replace("= Inputs.x", "= Input(default=3)"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("class Inputs:", "class Other:"),
        ("class Inputs:", "class Inputs(Base):"),
        ("class Inputs:", "class Inputs(metaclass=M):"),
        ("class Inputs:", "@frozen\nclass Inputs:"),
        ("class Inputs:\n    x = Input(default=3)\n", "from shared import Inputs\n"),
        ("class Inputs:\n    x", "class Outer:\n  class Inputs:\n    x"),
        ("class Predictor", "class Inputs:\n    x = Input(default=4)\nclass Predictor"),
        ("class Predictor", "Inputs = object()\nclass Predictor"),
        ("class Predictor", "import shared as Inputs\nclass Predictor"),
        ("class Predictor", "Inputs.x = Input(default=4)\nclass Predictor"),
        ("class Predictor", "def Inputs(): ...\nclass Predictor"),
        ("    x = Input", "    x: int = Input"),
        ("    x = Input", "    x = y = Input"),
        ("    x = Input", "    x = Input(default=2)\n    x = Input"),
        ("    x = Input", "    if True:\n        x = Input"),
        ("    x = Input(default=3)", "    def x(): return Input(default=3)"),
        ("    x = Input(default=3)", "    x = 3"),
        ("    x = Input(default=3)", "    y = Input(default=3)"),
        ("= Inputs.x", "= Inputs.x()"),
        ("= Inputs.x", "= other.Inputs.x"),
        ("= Inputs.x", "= X"),
    ],
)
def test_what_cog_or_python_would_read_in_another_way_is_refused(before: str, after: str) -> None:
    assert before in SHARED
    with pytest.raises(schema.SchemaError):
        schema.generate(SHARED.replace(before, after))


def test_errors_name_the_line() -> None:
    with pytest.raises(schema.SchemaError, match=r"^predict\.py:7: x: "):
        field_of("x: int = Input(default=LIMIT)")


def test_file_is_written_only_when_it_changes(tmp_path: Path) -> None:
    (tmp_path / "predict.py").write_text(MODULE.format(parameter="x: int = Input(default=1)"))
    path = schema.write(tmp_path)
    first = path.stat()
    assert path == tmp_path / ".cog" / "openapi_schema.json"
    assert schema.write(tmp_path).stat().st_ino == first.st_ino
    (tmp_path / "predict.py").write_text(MODULE.format(parameter="x: int = Input(default=2)"))
    assert schema.write(tmp_path).stat().st_ino != first.st_ino
    assert json.loads(path.read_text())["components"]["schemas"]["Input"]["properties"]["x"]["default"] == 2
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
