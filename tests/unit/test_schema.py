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


def test_the_concurrent_predictor_has_the_same_inputs_and_does_not_stream(document: dict[str, Any]) -> None:
    concurrent = schema.generate((ROOT / "predict.py").read_text(encoding="utf-8"), "ConcurrentPredictor")
    assert concurrent["components"]["schemas"] == document["components"]["schemas"]
    assert "x-cog-streaming" not in json.dumps(concurrent)


def test_nothing_is_required(document: dict[str, Any]) -> None:
    assert "required" not in document["components"]["schemas"]["Input"]


def test_output_format_is_an_enumeration(document: dict[str, Any]) -> None:
    enumeration = document["components"]["schemas"]["output_format"]
    assert enumeration["type"] == "string"
    assert enumeration["enum"] == ["text", "think_tags", "answer", "json"]


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
