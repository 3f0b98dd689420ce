"""`scripts/bench NAME …`: hands the rest of the command line to the subcommand's module."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

# Each is a module of this package and a function in it, `(arguments: list[str]) -> int`; imported only when called.
COMMANDS = {
    "cluster": ("cluster", "main", "the OpenAI-compatible server behind Ray Serve, beside the same server alone"),
    "cog": ("cog", "main", "the concurrent predictor through Cog, beside its engine by plain threads"),
    "fleet": ("fleet", "main", "a trace of traffic against n replicas, simulated with the engine's scheduler"),
    "grammar": ("grammar", "main", "microseconds of a grammar's mask, at the size of the published vocabulary"),
    "http": ("http", "main", "the OpenAI-compatible server, beside its engine by plain threads"),
    "launches": ("launches", "main", "launches, waits and bytes of a decode step, counted on an imitated GPU"),
    "load": ("load", "main", "seconds from a checkpoint in the page cache to a model, against transformers"),
    "latency": ("traffic", "latency", "first token and tokens a second of one request, by context length"),
    "media": ("media", "main", "seconds from a film or a document to frames or pages"),
    "mixed": ("traffic", "mixed", "requests of all kinds at once, with pictures"),
    "plan": ("plan", "main", "what each form of the weights takes: memory, bytes of a step, KV cache by card"),
    "text": ("text", "main", "microseconds a token between a sampled token and the text that leaves"),
    "throughput": ("traffic", "throughput", "tokens a second of many requests at once, all alike"),
    "vision": ("vision", "main", "milliseconds of a picture through the vision tower, by its size"),
}


def main() -> int:
    listed = "\n".join(f"  {name:<12}{text}" for name, (_, _, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=os.environ.get("KIMI_VL_PROGRAM", "scripts/bench"),
        description=f"Measure speed beside its ceiling.\n\n{listed}\n\nscripts/bench NAME --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=COMMANDS)
    name = parser.parse_args(sys.argv[1:2]).name
    module, function, _ = COMMANDS[name]
    return getattr(importlib.import_module(f".{module}", __package__), function)(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
