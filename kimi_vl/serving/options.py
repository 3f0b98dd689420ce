"""What the server is told: by flags, else by environment variables, else by a file in TOML.

An option ``--max-body-mib`` is ``max_body_mib`` in the file, and the same in capitals after ``KIMI_VL_`` in the
environment. A value that is not understood is refused in one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORIES = {
    "thinking": "moonshotai/Kimi-VL-A3B-Thinking",
    "thinking-2506": "moonshotai/Kimi-VL-A3B-Thinking-2506",
    "instruct": "moonshotai/Kimi-VL-A3B-Instruct",
}
DEMO = "kimi-vl-demo"
CLIENTS_NAMES = ("api-kimi-vl-thinking", "api-kimi-vl-thinking-2506", "api-kimi-vl")
"""What clients that cannot be told a name send."""


class OptionError(ValueError):
    """An option that is not understood; one line for the person who gave it."""


def option(default: Any, text: str, *, low: float | None = None, metavar: str | None = None) -> Any:
    """A field of :class:`ServerOptions`: its help, and for a number the least that it may be."""
    return field(default=default, metadata={"help": text, "low": low, "metavar": metavar})


@dataclass(frozen=True)
class ServerOptions:
    """How the server listens, what it calls its model, and what clients may ask of it. Seconds and MiB."""

    model: str = option("auto", "as KIMI_VL_MODEL: a published name, demo, auto, a folder, …")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one", low=0)
    served_model_name: tuple[str, ...] = option((), "what clients call the model; may be repeated", metavar="NAME")
    api_keys: tuple[str, ...] = option((), "keys of which clients must send one")
    cors_origin: tuple[str, ...] = option((), "a web page's origin that may ask; may be repeated", metavar="ORIGIN")
    reasoning_field: str = option("reasoning_content", "the field that thinking is sent in", metavar="FIELD")
    lenient: bool = option(False, "ignore sampling parameters that are not applied, in place of refusing them")
    ignore_tools: bool = option(False, "ignore tools, in place of refusing them")
    open_metrics: bool = option(False, "let /metrics be read without a key")
    allow_image_urls: bool = option(False, "fetch images at https URLs; others must come as data URLs")
    image_url_host: tuple[str, ...] = option(
        (), "fetch from this host alone, or with *.NAME from those below it; may be repeated", metavar="NAME"
    )
    allow_http_image_urls: bool = option(False, "fetch images at http URLs, too")
    deadline_s: float = option(1800.0, "seconds that a request may take", low=0.1)
    drain_delay_s: float = option(5.0, "seconds from SIGTERM, in which /health says 503, to closing the port", low=0)
    drain_s: float = option(1800.0, "seconds that requests may still take after that", low=0)
    max_body_mib: int = option(100, "size of a body", low=1)
    max_bodies_mib: int = option(1024, "size of all bodies in memory at a time", low=1)
    body_timeout_s: float = option(30.0, "seconds for a body, and one more for every 64 KiB of it", low=0)
    head_timeout_s: float = option(10.0, "seconds for the head of a request", low=0)
    write_timeout_s: float = option(60.0, "seconds in which a client must read some of what waits for it", low=0)
    keep_alive_s: int = option(30, "seconds that a connection is kept without a request", low=0)
    max_connections: int = option(2048, "connections at a time", low=1)
    max_decoding: int = option(
        4, "requests whose images are decoded at a time; as many with videos or documents are read beside them", low=1
    )
    max_num_seqs: int = option(64, "sequences that are computed at a time", low=1)
    max_waiting: int = option(256, "requests that wait before more are refused", low=1)

    def names(self) -> tuple[str, ...]:
        """The names that are listed, the first of which answers carry."""
        return self.served_model_name or (default_names(self.model)[0],)

    def served(self, name: str | None) -> str | None:
        """The listed name that a client means by ``name``; None where there is no such model."""
        names = self.names()
        if name is None:
            return names[0]
        aliases = (*default_names(self.model), *CLIENTS_NAMES)
        meant = {**{alias.lower(): names[0] for alias in aliases}, **{each.lower(): each for each in names}}
        return meant.get(name.lower())


def default_names(model: str) -> tuple[str, ...]:
    """What a model is called where nobody says: the name that answers carry, then others that are understood.

    The demo answers to the published names, too, so that a client's code can be tried on it; it says who it is.
    """
    if model in ("auto", "demo"):
        published = [part for name in REPOSITORIES.values() for part in (name, name.rpartition("/")[2])]
        return (DEMO, "demo", *published)
    repository = REPOSITORIES.get(model, model).partition("@")[0].rstrip("/")
    last = repository.rpartition("/")[2].removesuffix(".tar")
    is_repository = repository.count("/") == 1 and not repository.startswith(("/", ".")) and ":" not in repository
    return (repository, last, model) if is_repository else (last, model)


FIELDS = {each.name: each for each in dataclasses.fields(ServerOptions)}
WITHOUT_FLAG = ("api_keys",)  # a command line can be read by every user of the machine


def variable(name: str) -> str:
    """The environment variable of an option."""
    return f"KIMI_VL_{name.upper()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE.toml", help="options in a file, under their names")
    for name, each in FIELDS.items():
        if name in WITHOUT_FLAG:
            continue
        flag, text = f"--{name.replace('_', '-')}", each.metadata["help"]
        if isinstance(each.default, bool):
            parser.add_argument(flag, action="store_const", const=True, help=text)
        elif isinstance(each.default, tuple):
            parser.add_argument(flag, action="append", metavar=each.metadata["metavar"], help=text)
        else:
            shown = each.metadata["metavar"] or name.rpartition("_")[2].upper()
            parser.add_argument(flag, metavar=shown, help=f"{text} ({each.default})")


def gather(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ServerOptions:
    """The options as they were given. Raises :class:`OptionError`."""
    values: dict[str, Any] = {}
    if getattr(arguments, "config", None) is not None:
        values = checked(_file(arguments.config), str(arguments.config))
    for name in FIELDS:
        text = environment.get(variable(name), "")
        if text:
            values[name] = _read(name, text, variable(name))
        given = getattr(arguments, name, None)
        if given is not None:
            flag = f"--{name.replace('_', '-')}"
            values[name] = _checked(name, given, flag) if isinstance(given, list) else _read(name, given, flag)
    return ServerOptions(**values)


def checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options by their names, as they stand in ``where``. Raises :class:`OptionError`."""
    for name in values:
        if name not in FIELDS:
            raise OptionError(f"{where}: there is no option {name}")
    return {name: _checked(name, value, f"{where}: {name}") for name, value in values.items()}


def _file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: is not TOML ({error})") from None


def _read(name: str, given: Any, where: str) -> Any:
    """The value of a text from a flag or the environment."""
    default = FIELDS[name].default
    if not isinstance(given, str):
        return given
    if isinstance(default, bool):
        if given.lower() in ("1", "true", "on", "yes", "0", "false", "off", "no"):
            return given.lower() in ("1", "true", "on", "yes")
        raise OptionError(f"{where} must be 1 or 0, not {given!r}")
    if isinstance(default, tuple):
        return _checked(name, [part for part in (part.strip() for part in given.split(",")) if part], where)
    if isinstance(default, int | float):
        kind = type(default)
        try:
            given = kind(given)
        except ValueError:
            raise OptionError(f"{where} must be a {'whole ' * (kind is int)}number, not {given!r}") from None
    return _checked(name, given, where)


def _checked(name: str, value: Any, where: str) -> Any:
    """``value`` in the type of the option and within its bounds."""
    default, low = FIELDS[name].default, FIELDS[name].metadata["low"]
    if isinstance(default, tuple):
        if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) and v for v in value):
            return tuple(value)
        raise OptionError(f"{where} must be a list of texts")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise OptionError(f"{where} must be {_KINDS[type(default)]}")
    if low is not None and not (low <= value and math.isfinite(value)):
        raise OptionError(f"{where} must be at least {low}")
    if name == "port" and value > 65535:
        raise OptionError(f"{where} must be at most 65535")
    if value == "":
        raise OptionError(f"{where} must not be empty")
    if name == "reasoning_field" and (value in _MESSAGE_FIELDS or not re.fullmatch("[a-z_]+", str(value))):
        raise OptionError(f"{where} must be a name of small letters that the message does not have yet")
    return value


_MESSAGE_FIELDS = ("role", "content", "refusal")
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
