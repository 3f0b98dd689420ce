"""`scripts/bench launches`: what a decode step asks of a GPU, counted on an imitated one: launches, waits, bytes.

Launches and waits are those of the engine's own steps, with a model of the published numbers of layers' parts (heads,
experts, choices) and small widths. Bytes are those of one step over buffers that stay at the published widths. Both are
counted with one layer and with two, of which the second has experts, and carried on to all layers: every one that is
added takes the same. Nothing here says how fast a GPU is.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import imitated_cuda  # isort: skip  # before any kernel

import torch
from torch import Tensor

from kimi_vl import kernels
from kimi_vl.engine import cuda_graphs
from kimi_vl.engine.cuda_graphs import DecodeInput, StaticDecoder
from kimi_vl.engine.decoder import FusedDecoder
from kimi_vl.engine.engine import Engine, EngineOptions
from kimi_vl.engine.kv_cache import PagedCache
from kimi_vl.engine.sampling import Sampling
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.quantization.scheme import FORMS
from kimi_vl.weights import loader

from . import checkpoint, decode, ladder
from .imitated_cuda import A100, H100, Card, Counts, DeviceTensor
from .imitated_cuda import kernels as watched

LAYERS = 27
CONTEXT = 2048
PAGE = 32
# the way, the kernels and graphs that it takes, and the card, which decides how plain PyTorch computes experts
WAYS: dict[str, tuple[str, str, Card]] = {
    "torch": ("torch", "0", H100),
    "torch, sm_80": ("torch", "0", A100),
    "kernels": ("triton", "0", H100),
    "graphs": ("triton", "1", H100),
}
SAMPLING = Sampling(0.8, 1, 0, 1)
CUT = Sampling(0.8, 0.95, 0, 1)


@dataclass(frozen=True)
class Step:
    """One decode step of all layers. ``launches`` are those of the host; a graph's is one, and repeats ``captured``."""

    way: str
    sequences: int
    launches: int
    captured: int
    device_waits: int
    event_waits: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of one decode step of all layers, and the fewest: weights, the KV cache that is read, and nothing
    else."""

    way: str
    sequences: int
    context: int
    experts: float  # met in a layer
    bytes_read: int
    bytes_written: int
    fewest: int

    @property
    def ratio(self) -> float:
        return (self.bytes_read + self.bytes_written) / self.fewest


# Launches and waits


def small(layers: int) -> dict[str, Any]:
    """The published configuration with small widths: as many heads and experts, which decide how steps are launched."""
    values = checkpoint.with_vocabulary(checkpoint.divided(1, layers, 1), 640)
    values["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "init_pos_emb_height": 4,
        "init_pos_emb_width": 4,
    }  # fmt: skip
    values["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 256,
    }  # fmt: skip
    return values


class _OutputProcessor(decode.Clock):
    """Takes every token, and says so in the engine's thread."""

    def __init__(self, max_new_tokens: int, sampling: Sampling, taken: Any):
        super().__init__(max_new_tokens)
        self.sampling, self._taken = sampling, taken  # pyright: ignore[reportIncompatibleVariableOverride]

    def take(self, token: int) -> int | None:
        self._taken()
        return super().take(token)


@contextlib.contextmanager
def _graphs(value: str) -> Iterator[None]:
    before = os.environ.get(cuda_graphs.VARIABLE)
    os.environ[cuda_graphs.VARIABLE] = value
    try:
        yield
    finally:
        os.environ.pop(cuda_graphs.VARIABLE)
        if before is not None:
            os.environ[cuda_graphs.VARIABLE] = before


def _ops(name: str) -> kernels.Ops:
    """Without the check of each kernel: they run in the interpreter."""
    return kernels.TORCH if name == "torch" else kernels.triton_ops()


def count_steps(
    way: str, sequences: int, layers: int, sampling: Sampling = SAMPLING, max_new_tokens: int = 12
) -> Counts:
    """What the most frequent step of an engine of a small model counts, while all sequences decode."""
    chosen, captured, card = WAYS[way]
    values = small(layers)
    with tempfile.TemporaryDirectory() as name, imitated_cuda.imitated(card=card) as machine:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(values))
        made = ladder.random_model(Config.from_dict(values), torch.device("cpu"))
        loader.save(made, folder / "model.safetensors", torch.bfloat16)
        model = loader.load(folder, dtype=torch.bfloat16, device="cuda:0", threads=1)
        options = EngineOptions(page_size=PAGE, max_num_seqs=sequences, cache_bytes=sequences << 16, embedding_bytes=0)
        with _graphs(captured), _only(sequences):
            engine = Engine(model, 600, options, ops=_ops(chosen))
        counts: list[tuple[Counts, int]] = []
        processors: list[_OutputProcessor] = []

        def taken() -> None:
            counts.append((copy.copy(machine.counts), min(len(processor.times) for processor in processors)))

        processors += [
            _OutputProcessor(max_new_tokens, sampling, taken if place == 0 else lambda: None)
            for place in range(sequences)
        ]
        with engine._lock:  # they begin together
            for place, processor in enumerate(processors):
                engine.submit([place + 1, 2, 3], [], max_new_tokens, processor)
        for processor in processors:
            processor.wait()
        engine.close()
        machine.check()
    differences = [
        tuple(asdict(after - before).values())
        for (before, begun), (after, _) in itertools.pairwise(counts[:-1])
        if begun
    ]
    ((most, _),) = collections.Counter(differences).most_common(1)  # a step that clears or lengthens pages takes more
    return Counts(*most)


@contextlib.contextmanager
def _only(sequences: int) -> Iterator[None]:
    """Graphs of the one bucket that is counted: capturing every one would take its time."""
    buckets, cuda_graphs.buckets = cuda_graphs.buckets, lambda most: [sequences]
    try:
        yield
    finally:
        cuda_graphs.buckets = buckets


def carried_on(one: int, two: int, layers: int = LAYERS) -> int:
    """A count with ``layers`` layers, given those with one and with two."""
    return one + (layers - 1) * (two - one)


def step_of(way: str, sequences: int, sampling: Sampling = SAMPLING) -> Step:
    one, two = (count_steps(way, sequences, layers, sampling) for layers in (1, 2))
    names = ("launches", "captured", "device_waits", "event_waits")
    return Step(way, sequences, *(carried_on(getattr(one, name), getattr(two, name)) for name in names))


# Bytes


class _Sectors(watched._Watch):
    """Counts each sector of 32 bytes once a launch, as memory does whose cache holds what a launch uses again."""

    def expect(self, arguments: list[Tensor]) -> None:
        super().expect(arguments)
        self._begins = [begin & -32 for begin, _, _ in self.extents]
        self._touched = [
            [np.zeros((end - (begin & -32) + 31) >> 5, dtype=bool) for begin, end, _ in self.extents] for _ in range(2)
        ]
        self.read = self.wrote = 0

    def note(self, pointers: Any, mask: Any, writes: bool) -> None:
        chosen = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[chosen]
        if not addresses.size:
            return
        low = int(addresses.min())
        for number, (begin, end, place) in enumerate(self.extents):
            if begin <= low < end:
                self._touched[writes][number][(addresses.astype(np.int64) - self._begins[number]) >> 5] = True
                if writes:
                    self.written.add(place)
                return

    @property
    def read(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 32 * sum(int(np.count_nonzero(each)) for each in self._touched[0])

    @read.setter
    def read(self, value: int) -> None: ...

    @property
    def wrote(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 32 * sum(int(np.count_nonzero(each)) for each in self._touched[1])

    @wrote.setter
    def wrote(self, value: int) -> None: ...

    def __init__(self) -> None:
        self._touched: list[list[np.ndarray[Any, Any]]] = [[], []]
        super().__init__()


def _values(tensor: Tensor) -> Tensor:
    """Those of a tensor on the imitated device, to be set or read without being counted."""
    assert isinstance(tensor, DeviceTensor)
    return tensor.inner


def _filled(config: Config, form: str | None) -> KimiVL:
    """Weights on the device that are random where that decides which experts are met, and else repeat a few."""
    model = loader.planned_model(config, torch.bfloat16, form)
    loader._give_memory(model, torch.device("cuda:0"))
    pool = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for name, parameter in model.named_parameters():
        flat = _values(parameter.data).view(-1)
        if name.endswith((".codes", ".scales")):
            codes = 1 if parameter.is_floating_point() else 0x55
            flat.fill_(codes if name.endswith(".codes") else 0.01)
            continue
        for part in flat.split(len(pool)):
            part.copy_(pool[: len(part)])
        if parameter.ndim == 1:  # norms, and the router's bias
            flat.fill_(float("norm" in name))
        if name.endswith("embed_tokens.weight"):
            flat.mul_(100)  # what distinguishes sequences outweighs what layers add, or they meet the same experts
        if name.endswith("gate.weight"):
            flat.copy_(torch.randn(len(flat), generator=torch.Generator().manual_seed(1)) * 0.05)
    return model.eval()


def count_bytes(
    way: str, sequences: int, layers: int, context: int = CONTEXT, values: Any = None, form: str | None = None
) -> tuple[Counts, float]:
    """The counts of one step over buffers that stay, and how many experts a layer has met."""
    chosen, _, card = WAYS[way]
    config = Config.from_dict(values or checkpoint.divided(1, layers, 1))
    met: list[int] = []
    with imitated_cuda.imitated(card=card) as machine, _only(sequences), torch.inference_mode():
        model = _filled(config, form)
        ops = _ops(chosen)

        def norm_router(*arguments: Any) -> Any:
            results = ops.norm_router(*arguments)
            met.append(len({*_values(results[2]).flatten().tolist()}))
            return results

        own, vocabulary = -(-context // PAGE), config.text_config.vocab_size
        cache = PagedCache(config.text_config, sequences * own, PAGE, dtype=torch.bfloat16, device="cuda:0")
        _values(cache.kv_cache).normal_(generator=torch.Generator().manual_seed(2))
        decoder = FusedDecoder(model.language_model, replace(ops, norm_router=norm_router))
        static = StaticDecoder(model, decoder, cache, sequences)
        inputs = [
            DecodeInput(7 * place + 1, context - 1, [*range(place * own, (place + 1) * own)], SAMPLING, 0.5, vocabulary)
            for place in range(sequences)
        ]
        watch, watched._watch = watched._watch, _Sectors()
        try:
            before = copy.copy(machine.counts)
            static.launch(inputs)
            return machine.counts - before, sum(met) / len(met) if met else 0
        finally:
            watched._watch = watch


def traffic_of(way: str, sequences: int, context: int = CONTEXT, form: str | None = None) -> Traffic:
    (one, _), (two, met) = (count_bytes(way, sequences, layers, context, form=form) for layers in (1, 2))
    config = Config.from_dict(checkpoint.divided(1, LAYERS, 1)).text_config
    return Traffic(
        way,
        sequences,
        context,
        met,
        carried_on(one.bytes_read, two.bytes_read),
        carried_on(one.bytes_written, two.bytes_written),
        int(decode.bytes_a_step(config, sequences, context, met)),
    )


# The command


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench launches", description=__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--cut", action="store_true", help="sample with a top_p of 0.95")
    parser.add_argument("--bytes", action="store_true", help="also count bytes, which takes minutes and 8 GB")
    parser.add_argument("--form", choices=FORMS, help="count bytes with weights quantised; the fewest stay bfloat16's")
    args = parser.parse_args(arguments)
    sampling = CUT if args.cut else SAMPLING
    print(f"imitated, {LAYERS} layers; speed on a GPU: not measured\n")
    print("| way | sequences | launches | repeated by a graph | waits for the device | waits for an event |")
    print("|---|---|---|---|---|---|", flush=True)
    steps, traffics = [], []
    for way in args.ways:
        for sequences in args.sequences:
            step = step_of(way, sequences, sampling)
            steps.append(step)
            print("| " + " | ".join(map(str, asdict(step).values())) + " |", flush=True)
    if args.bytes:
        print("\n| way | sequences of context | experts met | GB read | GB written | the fewest | ratio |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for way in [way for way in args.ways if way != "graphs"]:  # which repeat what kernels do
            for sequences in args.sequences:
                traffic = traffic_of(way, sequences, form=args.form)
                traffics.append(traffic)
                gigabytes = (traffic.bytes_read, traffic.bytes_written, traffic.fewest)
                print(
                    f"| {way} | {sequences} of {traffic.context} | {traffic.experts:.0f} | "
                    + " | ".join(f"{value / 1e9:.3f}" for value in gigabytes)
                    + f" | {traffic.ratio:.3f} |",
                    flush=True,
                )
    report = {
        "bench": "launches",
        "layers": LAYERS,
        "imitated": True,
        "sampling": asdict(sampling),
        "steps": [asdict(step) for step in steps],
        "bytes": [asdict(traffic) | {"ratio": traffic.ratio} for traffic in traffics],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
