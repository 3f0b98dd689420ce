"""`scripts/bench plan`: what the published model takes in each form of its weights, counted without it.

Bytes of weights, those that a decode step of one sequence reads, and the KV cache that cards hold beside the weights.
Nothing is loaded: weights are counted off a model without memory, and the cache is the engine's own plan.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from kimi_vl import placement
from kimi_vl.model.config import Config
from kimi_vl.quantization.scheme import FORMS
from kimi_vl.weights import loader

from . import checkpoint

GIB = 2**30
CARDS = {"16 GB": 15, "24 GB": 22, "48 GB": 44, "80 GB": 78}
"""GiB that are free on an empty card of each size, of which its driver and context take the rest."""
NAMES: tuple[str | None, ...] = (None, *FORMS)


@dataclass(frozen=True)
class Plan:
    """A form of the weights (None: bfloat16): bytes of them all, bytes that a decode step of one sequence reads of
    them, and by card the tokens of KV cache beside them, all requests together."""

    form: str | None
    weights: int
    a_step: int
    tokens: dict[str, int]


def published() -> Config:
    return Config.from_dict(checkpoint.divided(1, 27, 27))


def bytes_a_step(config: Config, form: str | None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of weights, for one token: all of the decoder but the embedding, of the routed experts those that are chosen."""
    text, model = config.text_config, loader.planned_model(config, dtype, form)
    total = 0
    for name, parameter in model.language_model.named_parameters():
        if "embed_tokens" in name:
            total += parameter.nbytes // text.vocab_size
        elif ".mlp.experts." in name:
            total += parameter.nbytes * text.num_experts_per_tok // text.n_routed_experts
        else:
            total += parameter.nbytes
    return total


def rows(config: Config) -> Iterator[Plan]:
    for form in NAMES:
        weights = placement.weight_bytes(config, torch.bfloat16, form)
        tokens = {
            card: placement.place(config, torch.bfloat16, form, "cuda", free * GIB).tokens
            for card, free in CARDS.items()
        }
        yield Plan(form, weights, bytes_a_step(config, form), tokens)


def table(found: Sequence[Plan]) -> str:
    """In Markdown; a dash where a card has no memory for a KV cache."""
    heads = [f"{card} ({free} GiB free)" for card, free in CARDS.items()]
    lines = [f"| weights | in memory | read for a token | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for row in found:
        tokens = [f"{count:,}" if count else "–" for count in row.tokens.values()]
        cells = [f"`{row.form or 'none'}`", f"{row.weights / GIB:.1f} GiB", f"{row.a_step / 1e9:.2f} GB", *tokens]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__).parse_args(arguments)
    found = [*rows(published())]
    print(table(found))
    print(json.dumps({"bench": "plan", "forms": [asdict(row) for row in found]}))
    return 0
