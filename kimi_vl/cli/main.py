"""The command ``kimi-vl``: finds the subcommand, and turns whatever ends it into one line and an exit status.

Exit status: 0 done, 1 it could not be done, 2 the command line is wrong, 130 interrupted, 141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import CheckpointError, UserError

# Modules of this package with `add_arguments(parser)` and `run(arguments) -> int`.
COMMANDS = {
    "ask": "ask the model a question, with pictures or without",
    "serve": "serve an OpenAI-compatible API on this machine",
    "cluster": "serve the same API from several engines, on Ray Serve",
    "batch": "answer a file of requests, or describe a folder of pictures",
    "fetch": "fetch and verify a model, and print its folder",
    "pack": "pack a checkpoint as a tar that carries its own hashes",
    "check": "say what this machine has, and which models fit",
    "bench": "measure speed beside its ceiling",
}
# These hand the rest of the command line to a program of their own.
PROGRAMS = {"bench": "bench_suite", "serve --cog": "cog_local.server"}


def main(arguments: Sequence[str] | None = None) -> int:
    debug = False
    _open_closed_streams()
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        given = list(sys.argv[1:] if arguments is None else arguments)
        parser = _parser()
        for name, module in PROGRAMS.items():
            words = name.split()
            if given[: len(words)] == words:
                from . import programs

                _use_cache()
                return programs.run(name, module, given[len(words) :])
        parsed = parser.parse_args(given)
        debug = parsed.debug
        _use_cache()
        return parsed.run(parsed)
    except KeyboardInterrupt:
        say("canceled")
        return 130
    except BrokenPipeError:
        # The reader went away; keep Python from trying to flush to it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, CheckpointError) as error:
        say(f"error: {getattr(error, 'message', error)}")
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = " ".join(str(error).split())[:300]
        say(f"error: {type(error).__name__}: {said or 'no message'} (kimi-vl --debug … shows where)")
        return 1


def say(text: str) -> None:
    """One line on stderr; what would break it or steer a terminal, from a file's name for instance, is escaped."""
    line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    print(line, file=sys.stderr, flush=True)


def _open_closed_streams() -> None:
    """Put the null device where a standard stream is closed: the next file to be opened would take its number."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_WRONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, flags)
            if name != "stdin":  # a missing one is not an empty question
                setattr(sys, name, open(number, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as this runs)


class _Command(argparse.ArgumentParser):
    """The arguments of a subcommand, with files and options in any order; plain argparse has all files in one place."""

    _mixes = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self._mixes:  # called by parse_known_intermixed_args
            return super().parse_known_args(args, namespace)
        self._mixes = False
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixes = True
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kimi-vl",
        description="Kimi-VL-A3B-Thinking on this machine. Without a GPU a small demo model answers.",
        epilog='example: kimi-vl ask "What is the result?" math_problem.png',
    )
    parser.add_argument("--version", action="version", version=f"kimi-vl {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an unexpected error comes from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Command)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name not in PROGRAMS:
            module = importlib.import_module(f".{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _use_cache() -> None:
    """Where models are kept, unless KIMI_VL_CACHE says: ``model_cache`` of a checkout, else the user's cache."""
    from .programs import CHECKOUT

    if os.environ.get("KIMI_VL_CACHE"):
        return
    if CHECKOUT:
        cache = CHECKOUT / "model_cache"
    else:
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kimi-vl"
        except RuntimeError:  # neither HOME nor an entry for this user
            raise CheckpointError("there is no home folder to keep models in; set KIMI_VL_CACHE to a folder") from None
    os.environ["KIMI_VL_CACHE"] = str(cache)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
