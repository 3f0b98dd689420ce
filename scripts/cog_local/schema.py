"""Writes `.cog/openapi_schema.json` from predict.py, which is parsed and never imported.

Cog's own tool does this when it builds an image; without the file its server validates nothing and does not
stream. That tool drops or mangles several constructs without a word. Here each of them is an error, so that a
predict.py accepted by this generator means the same thing to both.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import os
import re
import tempfile
import tokenize
from pathlib import Path
from typing import Any

SCHEMA_PATH = Path(".cog") / "openapi_schema.json"

PRIMITIVES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "Path": {"type": "string", "format": "uri"},
    "dict": {"type": "object"},
}
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "Path": (str,),
    "dict": (dict,),
}
CONSTRAINTS = {
    "ge": "minimum",
    "le": "maximum",
    "min_length": "minLength",
    "max_length": "maxLength",
    "regex": "pattern",
    "accept": "x-cog-accept",
}
KEYWORD_KINDS: dict[str, tuple[type, ...]] = {
    "ge": (int, float),
    "le": (int, float),
    "min_length": (int,),
    "max_length": (int,),
    "regex": (str,),
    "accept": (str,),
    "description": (str,),
    "deprecated": (bool,),
}
CONSTRAINED_TYPES = {
    "ge": ("int", "float"),
    "le": ("int", "float"),
    "min_length": ("str",),
    "max_length": ("str",),
    "regex": ("str",),
    "accept": ("Path",),
}
INPUT_KEYWORDS = {"default", "description", "choices", "deprecated", *CONSTRAINTS}
COG_NAMES = {
    "AsyncConcatenateIterator",
    "BasePredictor",
    "BaseRunner",
    "ConcatenateIterator",
    "Input",
    "Path",
    "concurrent",
    "streaming",
}
OUTPUTS: dict[str, dict[str, Any]] = {
    "str": {"title": "Output", "type": "string"},
    "Iterator[str]": {
        "title": "Output",
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
    },
    "ConcatenateIterator[str]": {
        "title": "Output",
        "type": "array",
        "items": {"type": "string"},
        "x-cog-array-type": "iterator",
        "x-cog-array-display": "concatenate",
    },
}
OUTPUTS["AsyncConcatenateIterator[str]"] = OUTPUTS["ConcatenateIterator[str]"]
Method = ast.FunctionDef | ast.AsyncFunctionDef


class SchemaError(Exception):
    """A construct that Cog's static parser refuses or, worse, misreads; the message has its line."""

    def __init__(self, node: ast.AST | None, message: str) -> None:
        super().__init__(f"predict.py:{getattr(node, 'lineno', 1)}: {message}")


def generate(source: str, class_name: str = "Predictor") -> dict[str, Any]:
    """The OpenAPI document for the text of a predict.py."""
    module = ast.parse(source)
    _check_imports(module)
    method = _find_method(module, class_name)
    streaming = _is_streaming(method)
    output = _output_schema(method, streaming)

    properties: dict[str, Any] = {}
    required: list[str] = []
    enums: dict[str, Any] = {}
    for order, (argument, default) in enumerate(_parameters(method)):
        field = _field(source, argument, _input_call(module, argument.arg, default))
        choices = field.pop("choices", None)
        if choices is not None:
            enums[argument.arg] = {
                "title": argument.arg,
                "description": "An enumeration.",
                "enum": choices,
                "type": field.pop("type"),
            }
            field.pop("title")
            field["allOf"] = [{"$ref": f"#/components/schemas/{argument.arg}"}]
        if "default" not in field and not field.get("nullable"):
            required.append(argument.arg)
        properties[argument.arg] = {"x-order": order, **field}

    inputs: dict[str, Any] = {"title": "Input", "type": "object", "properties": properties}
    if required:
        inputs["required"] = required
    return _document(inputs, output, enums, streaming)


def slots(source: str, class_name: str = "Predictor") -> int:
    """How many requests the predictor takes at a time, which Cog's build writes into the image's environment."""
    return _slots(_find_method(ast.parse(source), class_name))


def write(root: Path, class_name: str = "Predictor") -> Path:
    """Brings the schema file of the project at `root` up to date and returns its path.

    The file is replaced in one step, and only when its content changes: a server that is just starting never
    reads half a schema.
    """
    path = root / SCHEMA_PATH
    document = generate((root / "predict.py").read_text(encoding="utf-8"), class_name)
    content = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _check_imports(module: ast.Module) -> None:
    """Cog knows its own names only by a plain import at the top level."""
    plain: set[str] = set()
    for statement in module.body:
        if isinstance(statement, ast.ImportFrom) and statement.module == "cog":
            for alias in statement.names:
                if alias.name == "*":
                    raise SchemaError(statement, "`from cog import *` hides @streaming from Cog; import the names")
                if alias.asname and alias.asname != alias.name:
                    raise SchemaError(statement, f"import {alias.name} from cog under its own name")
                plain.add(alias.name)
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                if bound in COG_NAMES and bound not in plain:
                    raise SchemaError(node, f"{bound} must come from a plain `from cog import {bound}` at the top")
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    for name in sorted((used & COG_NAMES) - plain):
        raise SchemaError(None, f"{name} must come from a plain `from cog import {name}` at the top")


def _find_method(module: ast.Module, class_name: str) -> Method:
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    if len(classes) != 1:
        raise SchemaError(None, f"expected one class {class_name} at the top level, found {len(classes)}")
    methods = [
        node
        for node in classes[0].body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in ("predict", "run")
    ]
    if len(methods) != 1:
        raise SchemaError(classes[0], f"{class_name} must define exactly one of predict and run")
    return methods[0]


def _is_streaming(method: Method) -> bool:
    """Whether Cog offers server-sent events; refuses decorators that it does not know."""
    names = [ast.unparse(decorator) for decorator in method.decorator_list if not isinstance(decorator, ast.Call)]
    unknown = [name for name in names if name != "streaming"]
    if unknown:
        raise SchemaError(method, f"the decorators known here are @streaming and @concurrent(max=…), not @{unknown[0]}")
    _slots(method)
    return bool(names)


def _slots(method: Method) -> int:
    """How many requests `@concurrent(max=…)` lets run at a time; 1 without it."""
    calls = [decorator for decorator in method.decorator_list if isinstance(decorator, ast.Call)]
    if not calls:
        return 1
    found = re.fullmatch(r"concurrent\(max=([1-9][0-9]*)\)", ast.unparse(calls[0]))
    if len(calls) > 1 or found is None:
        raise SchemaError(calls[0], f"write @concurrent(max=…) with a plain number, not @{ast.unparse(calls[-1])}")
    if not isinstance(method, ast.AsyncFunctionDef):
        raise SchemaError(calls[0], "Cog gives a plain def one request at a time; @concurrent is for async def")
    return int(found[1])


def _output_schema(method: Method, streaming: bool) -> dict[str, Any]:
    name = ast.unparse(method.returns) if method.returns else "nothing"
    if name not in OUTPUTS:
        raise SchemaError(method, f"the return annotation must be one of {', '.join(OUTPUTS)}, not {name}")
    if streaming and name == "str":
        raise SchemaError(method, "@streaming needs an iterator as the return annotation")
    if isinstance(method, ast.AsyncFunctionDef):
        yields = any(isinstance(node, ast.Yield) for node in ast.walk(method))
        if streaming and yields:
            raise SchemaError(method, "Cog collects an async generator before it sends anything; return a plain one")
        if yields != name.startswith("Async"):
            raise SchemaError(method, f"{name} does not fit: AsyncConcatenateIterator[str] is for async def with yield")
    elif name.startswith("Async"):
        raise SchemaError(method, f"{name} does not fit a plain def")
    return OUTPUTS[name]


def _parameters(method: Method) -> list[tuple[ast.arg, ast.expr]]:
    """The inputs with their defaults, without self."""
    arguments = method.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        raise SchemaError(method, "inputs must be ordinary named parameters")
    if not arguments.args or arguments.args[0].arg != "self":
        raise SchemaError(method, "the first parameter must be self")
    inputs = arguments.args[1:]
    if len(arguments.defaults) != len(inputs):
        missing = inputs[: len(inputs) - len(arguments.defaults)]
        raise SchemaError(missing[0], f"{missing[0].arg} needs `= Input(...)`")
    return list(zip(inputs, arguments.defaults, strict=True))


def _input_call(module: ast.Module, name: str, default: ast.expr) -> ast.Call:
    """The `Input(...)` of a parameter: its default itself, or what `Class.attribute` names at the top of the file."""
    found = default
    if isinstance(default, ast.Attribute) and isinstance(default.value, ast.Name):
        found = _class_attribute(module, default, default.value.id)
    if isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and found.func.id == "Input":
        return found
    raise SchemaError(default, f"{name}: write the default inside Input(...)")


def _class_attribute(module: ast.Module, reference: ast.Attribute, class_name: str) -> ast.expr:
    """The one value that a plain top-level class gives an attribute; Cog knows nothing of imports and inheritance.

    What Python would find elsewhere (a base class, a second assignment, a name bound again) is refused.
    """
    text = f"{class_name}.{reference.attr}"
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    if len(classes) != 1 or _times_bound(module, class_name) != 1:
        raise SchemaError(reference, f"{text}: Cog needs one class {class_name} at the top level of this file")
    if classes[0].bases or classes[0].keywords or classes[0].decorator_list:
        raise SchemaError(classes[0], f"{class_name} must be a plain class, or Cog and Python differ in what it holds")
    values = [
        statement.value
        for statement in classes[0].body
        if isinstance(statement, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == reference.attr for target in statement.targets)
        and len(statement.targets) == 1
    ]
    if len(values) != 1 or _times_bound(classes[0], reference.attr) != 1:
        raise SchemaError(reference, f"{text} must be assigned once in the class, as `{reference.attr} = Input(...)`")
    return values[0]


def _times_bound(root: ast.AST, name: str) -> int:
    """How often anything below `root` binds a name, or an attribute of what has that name."""
    return sum(
        (isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and ast.unparse(node.value) == name)
        or (isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name)
        or (isinstance(node, ast.alias) and (node.asname or node.name).partition(".")[0] == name)
        for node in ast.walk(root)
    )


def _field(source: str, argument: ast.arg, default: ast.Call) -> dict[str, Any]:
    """The schema of one input; `choices` stays in it for the caller, who makes it an enumeration."""
    name = argument.arg
    kind, is_list, nullable = _annotation(argument)
    if default.args:
        raise SchemaError(default, f"{name}: Input takes keywords only")

    values: dict[str, Any] = {}
    for keyword in default.keywords:
        if keyword.arg not in INPUT_KEYWORDS:
            raise SchemaError(default, f"{name}: unknown keyword {keyword.arg or '**'} of Input")
        if kind not in CONSTRAINED_TYPES.get(keyword.arg, (kind,)):
            raise SchemaError(default, f"{name}: Cog refuses {keyword.arg} of an input of the type {kind}")
        values[keyword.arg] = _literal(source, name, keyword)
    if "choices" in values:
        _check_choices(default, name, kind, is_list, values["choices"])
    if not name.isascii():
        raise SchemaError(argument, f"{name}: Cog spoils the title of a name that is not ASCII")

    field: dict[str, Any] = {"title": " ".join(word[:1].upper() + word[1:] for word in name.split("_"))}
    field |= {"type": "array", "items": PRIMITIVES[kind]} if is_list else PRIMITIVES[kind]
    if "default" in values:
        field["default"] = _checked_default(default, name, kind, is_list, nullable, values)
    if nullable:
        field["nullable"] = True
    if "description" in values:
        field["description"] = values["description"]
    if "choices" in values:
        field["choices"] = values["choices"]
    for python_name, json_name in CONSTRAINTS.items():
        if python_name in values:
            field[json_name] = values[python_name]
    if values.get("deprecated"):
        field["deprecated"] = True
    return field


def _annotation(argument: ast.arg) -> tuple[str, bool, bool]:
    """(primitive, is it a list, may it be None) of an input's annotation."""
    node = argument.annotation
    if node is None:
        raise SchemaError(argument, f"{argument.arg} has no annotation, so Cog would leave it out")
    nullable = False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and ast.unparse(node.right) == "None":
        node, nullable = node.left, True
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Optional":
        node, nullable = node.slice, True
    is_list = isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list"
    if isinstance(node, ast.Subscript) and is_list:
        node = node.slice
    kind = ast.unparse(node)
    if kind not in PRIMITIVES:
        raise SchemaError(
            argument, f"{argument.arg}: unsupported annotation {ast.unparse(argument.annotation or node)}"
        )
    return kind, is_list, nullable


def _literal(source: str, name: str, keyword: ast.keyword) -> Any:
    """The value of a keyword of Input, which must be a literal: Cog drops what it would have to compute."""
    try:
        value = ast.literal_eval(keyword.value)
    except ValueError:
        raise SchemaError(keyword.value, f"{name}: {keyword.arg} must be a literal, or Cog drops it") from None
    if isinstance(keyword.value, ast.BinOp):
        raise SchemaError(keyword.value, f"{name}: {keyword.arg} must be a literal, or Cog drops it")
    # A keyword's own span includes parentheses around its value; the value's does not.
    segment = ast.get_source_segment(source, keyword) or ""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(f"({segment})").readline) if token.string.strip()]
    tokens = tokens[3:-1]  # without our own parentheses, the name and its equals sign
    if tokens[0].string == "(":
        raise SchemaError(keyword.value, f"{name}: Cog does not see {keyword.arg} in parentheses")
    strings = [token.type == tokenize.STRING for token in tokens]
    if any(first and second for first, second in itertools.pairwise(strings)):
        raise SchemaError(keyword.value, f"{name}: Cog does not join the adjacent strings of {keyword.arg}")
    for token in tokens:
        if token.type == tokenize.STRING and (token.string[0] not in "'\"" or "\\" in token.string):
            raise SchemaError(keyword.value, f"{name}: {keyword.arg} must be a string without prefix and escapes")
        if token.type == tokenize.NUMBER and not _is_number_of_cog(token.string):
            raise SchemaError(keyword.value, f"{name}: Cog drops {keyword.arg}={token.string}; write a plain number")
        if token.type == tokenize.COMMENT:
            raise SchemaError(keyword.value, f"{name}: Cog drops a value with a comment inside; move it out")
    for first, second in itertools.pairwise(tokens):
        if first.string in ("-", "+") and first.end != second.start:
            raise SchemaError(keyword.value, f"{name}: Cog drops {keyword.arg} with a space after its sign")
    _check_kind(name, keyword, value)
    return value


def _is_number_of_cog(text: str) -> bool:
    """Whether Cog reads a number as Python does: integers of 64 bits in decimal, finite floats, no `_` and no `j`."""
    if re.fullmatch("[0-9]+", text):
        return int(text) < 2**63
    return re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is not None and math.isfinite(
        float(text)
    )


def _check_kind(name: str, keyword: ast.keyword, value: Any) -> None:
    """Refuses a value that the keyword does not take: Cog drops it, or rounds it."""
    kind = KEYWORD_KINDS.get(keyword.arg or "")
    if kind is not None and type(value) not in kind:
        raise SchemaError(keyword.value, f"{name}: {keyword.arg} must be {' or '.join(one.__name__ for one in kind)}")
    if keyword.arg in ("ge", "le") and float(value) != value:
        raise SchemaError(keyword.value, f"{name}: Cog rounds {keyword.arg} to a float; choose one that it can hold")
    if keyword.arg in ("min_length", "max_length") and not 0 <= value < 2**53:
        raise SchemaError(keyword.value, f"{name}: {keyword.arg} must be a length")


def _check_choices(node: ast.AST, name: str, kind: str, is_list: bool, choices: Any) -> None:
    if is_list or kind not in ("str", "int") or not isinstance(choices, list) or len(choices) < 2:
        raise SchemaError(node, f"{name}: choices are a list of at least two values of a str or int input")
    if not all(_fits(choice, kind) for choice in choices):
        raise SchemaError(node, f"{name}: every choice must be of the type {kind}")


def _checked_default(node: ast.AST, name: str, kind: str, is_list: bool, nullable: bool, values: dict[str, Any]) -> Any:
    default = values["default"]
    if default is None:
        if not nullable:
            raise SchemaError(node, f"{name}: Cog makes a None default of a type without `| None` a required input")
        return None
    items = default if is_list else [default]
    if not isinstance(items, list) or not all(_fits(item, kind) for item in items):
        raise SchemaError(node, f"{name}: the default does not have the annotated type")
    for item in items:
        if ("ge" in values and item < values["ge"]) or ("le" in values and item > values["le"]):
            raise SchemaError(node, f"{name}: the default is out of its own bounds")
        if "choices" in values and item not in values["choices"]:
            raise SchemaError(node, f"{name}: the default is not one of the choices")
    return default


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, PYTHON_TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def _document(inputs: dict[str, Any], output: dict[str, Any], enums: dict[str, Any], streaming: bool) -> dict[str, Any]:
    """The parts that are the same for every model, around the inputs and the output."""
    text = {"type": "string"}
    predict: dict[str, Any] = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {"content": _json_content(_reference("PredictionRequest"))},
        "responses": {
            "200": {
                "description": "Successful Response",
                "content": _json_content(_reference("PredictionResponse")),
            },
            "422": {
                "description": "Validation Error",
                "content": _json_content(_reference("HTTPValidationError")),
            },
        },
    }
    if streaming:
        predict["x-cog-streaming"] = True
    cancel: dict[str, Any] = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [{"name": "prediction_id", "in": "path", "required": True, "schema": text}],
        "responses": {
            "200": {"description": "Successful Response", "content": _json_content({})},
            "422": {
                "description": "Validation Error",
                "content": _json_content(_reference("HTTPValidationError")),
            },
        },
    }
    schemas: dict[str, Any] = {
        "Input": inputs,
        "Output": output,
        **enums,
        "PredictionRequest": {
            "title": "PredictionRequest",
            "type": "object",
            "properties": {"id": text, "input": _reference("Input")},
        },
        "PredictionResponse": {
            "title": "PredictionResponse",
            "type": "object",
            "properties": {
                "input": _reference("Input"),
                "output": _reference("Output"),
                "id": text,
                "status": _reference("Status"),
                "error": text,
                "logs": text,
                "metrics": {"type": "object"},
            },
        },
        "Status": {
            "title": "Status",
            "type": "string",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
        },
        "HTTPValidationError": {
            "title": "HTTPValidationError",
            "type": "object",
            "properties": {"detail": {"type": "array", "items": _reference("ValidationError")}},
        },
        "ValidationError": {
            "title": "ValidationError",
            "type": "object",
            "required": ["loc", "msg", "type"],
            "properties": {
                "loc": {"type": "array", "items": {"anyOf": [text, {"type": "integer"}]}},
                "msg": text,
                "type": text,
            },
        },
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {
            "/": {"get": _plain_get("Root", "root__get")},
            "/health-check": {"get": _plain_get("Healthcheck", "healthcheck_health_check_get")},
            "/predictions": {"post": predict},
            "/predictions/{prediction_id}/cancel": {"post": cancel},
        },
        "components": {"schemas": schemas},
    }


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _plain_get(summary: str, operation: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": operation,
        "responses": {"200": {"description": "Successful Response", "content": _json_content({})}},
    }


if __name__ == "__main__":
    print(write(Path(__file__).resolve().parents[2]))
