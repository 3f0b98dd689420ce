"""The program behind `scripts/predict`: one request to Cog's real server, its text on stdout as it comes."""

from __future__ import annotations

import argparse
import base64
import contextlib
import difflib
import json
import mimetypes
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from cog_local import schema
from cog_local.client import Client, Event, RequestRefused, ServerGone
from cog_local.server import ROOT, Server, ServerError, interrupt_on_signals, model_environment, say

mimetypes.add_type("image/webp", ".webp")


class InputError(Exception):
    """An `-i` that cannot be sent; the message says what to write instead."""


def read_inputs(pairs: list[str], document: dict[str, Any]) -> dict[str, Any]:
    """The request's input out of `name=value` pairs, each converted to the type that the schema gives it.

    A list input collects its repetitions; a single one is enough for a list of one.
    """
    schemas = document["components"]["schemas"]
    properties = schemas["Input"]["properties"]
    inputs: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise InputError(f"write -i {name}=value")
        if name not in properties:
            near = difflib.get_close_matches(name, properties, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(properties)}"
            raise InputError(f"there is no input {name}; {hint}")
        field = properties[name]
        if "allOf" in field:
            field = schemas[field["allOf"][0]["$ref"].rpartition("/")[2]]
        value = _convert(name, text, field)
        if field["type"] == "array":
            inputs.setdefault(name, []).extend(value)
        else:
            inputs[name] = value
    return inputs


def _convert(name: str, text: str, field: dict[str, Any]) -> Any:
    kind = field["type"]
    if kind == "array":
        item = field["items"]
        if item["type"] == "object" or text.lstrip().startswith("["):
            value = _json(name, _file_text(name, text))
            return value if isinstance(value, list) else [value]
        return [_convert(name, text, item)]
    if kind == "object":
        return _json(name, _file_text(name, text))
    if kind == "string":
        return _data_url(name, text[1:]) if text.startswith("@") else text
    try:
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind == "boolean":
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise InputError(f"{name} must be of the type {kind}, not {text!r}") from None
    raise InputError(f"{name} has the type {kind}, which the command line cannot give")


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} must be JSON: {error}") from None


def _read_file(name: str, path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot read {path}: {error.strerror}") from None


def _file_text(name: str, text: str) -> str:
    """JSON that is given as @file is read from it: as a data URL it could not be valid."""
    if not text.startswith("@"):
        return text
    try:
        return _read_file(name, text[1:]).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name}: {text[1:]} is not UTF-8 text") from None


def _data_url(name: str, path: str) -> str:
    """A file as Cog's own command line sends it: whatever the input's type, as a data URL."""
    content = base64.b64encode(_read_file(name, path)).decode("ascii")
    mime = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{mime};base64,{content}"


def plain_error(error: str) -> str:
    """Our own sentence out of Cog's wrapping ("Prediction failed: … UserError: E_CODE: …")."""
    match = re.search(r"\bE_[A-Z_]+: .*", error, re.DOTALL)
    return match.group() if match else error


def run_streamed(client: Client, inputs: dict[str, Any]) -> int:
    """Prints the answer as it comes. Returns the exit status."""
    prediction_id = uuid.uuid4().hex
    last = ""
    final: Event | None = None
    try:
        with contextlib.closing(client.stream(inputs, prediction_id)) as events:
            for event in events:
                if event.name == "output":
                    last = event.data["chunk"] or last
                    sys.stdout.write(event.data["chunk"])
                    sys.stdout.flush()
                elif event.name == "log":
                    sys.stderr.write(event.data.get("data", ""))
                elif event.name in ("completed", "error"):
                    final = event
    finally:
        if last and not last.endswith("\n"):
            with contextlib.suppress(OSError):
                sys.stdout.write("\n")
                sys.stdout.flush()
    return _report(final.data if final else {"error": "the server ended the stream without a result"})


def run_json(client: Client, inputs: dict[str, Any]) -> int:
    """Prints the whole response. Returns the exit status."""
    response = client.predict(inputs)
    print(json.dumps(response, indent=2, ensure_ascii=False))
    return _report(response)


def _report(result: dict[str, Any]) -> int:
    if result.get("status") == "succeeded":
        return 0
    say(f"error: {plain_error(str(result.get('error') or result.get('status')))}")
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/predict",
        description="Ask the model once, through Cog's HTTP server on this machine.",
        epilog='example: scripts/predict -i prompt="What is this?" -i image=@photo.jpg',
    )
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input; @FILE as the value sends a file",
    )
    parser.add_argument("--json", action="store_true", help="print the whole response as JSON at the end")
    arguments = parser.parse_args()
    interrupt_on_signals()
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # an answer must not fail on what the terminal cannot show
        reconfigure(errors="replace")
    try:
        document = schema.generate((ROOT / "predict.py").read_text(encoding="utf-8"))
        inputs = read_inputs(arguments.input, document)
        environment = model_environment(os.environ, say)
        with Server(environment=environment, log=say) as server:
            server.log = lambda line: None  # from here on, what matters comes with the answer
            return (run_json if arguments.json else run_streamed)(server.client, inputs)
    except KeyboardInterrupt:
        say("canceled")
        return 130
    except BrokenPipeError:
        # The reader went away; keep Python from trying to flush to it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, RequestRefused, ServerError, ServerGone, schema.SchemaError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
