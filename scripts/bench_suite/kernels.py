"""`scripts/bench_kernels`: each operation in plain PyTorch and in kernels at the published widths, beside its ceilings.

The ceilings are measured first: bytes a second of a large copy (read and written), and operations a second of a large
GEMM. Bytes are the fewest that an operation has to move, so a share of the copy says how far there is to go;
what only reads can pass 100 %. Weights and the KV cache rotate among enough sets that no cache holds them, as in a
model, where other layers come between; activations are as warm as they are there. On a GPU calls are replayed from a
graph, unless the operation synchronises, which the table then says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kimi_vl.kernels import TORCH, Ops, Widths, native_ops, select_ops
from kimi_vl.kernels.attention_metadata import DecodeMetadata
from kimi_vl.kernels.inputs import PUBLISHED, Call, Inputs, with_arguments

from . import conditions

COLD_BYTES = 256 << 20  # several times the caches of anything we know
MOST_SETS = 512
WEIGHTS = {"moe": (3, 4, 5), "mla_prepare": (1,), "mla_decode": (4,)}
"""The arguments of operations that are weights of GEMMs."""


@dataclass(frozen=True)
class Machine:
    """What runs the operations, and what it can do at most; ``triton`` says whether it runs kernels."""

    name: str
    device: torch.device
    bytes_per_second: float
    operations_per_second: float
    triton: bool


@dataclass(frozen=True)
class Case:
    """One operation at one size: calls that take turns, and what each needs at least (means over the calls)."""

    op: str
    size: str
    calls: Sequence[Call]
    nbytes: float
    operations: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], object], device: torch.device, budget: float = 0.2) -> float:
    """The median time of ``action``, which is called for ``budget`` seconds and at least three times."""
    action()
    synchronize(device)
    times: list[float] = []
    until = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < until and len(times) < 200):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            action()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
        else:
            moment = time.perf_counter()
            action()
            times.append(time.perf_counter() - moment)
    return statistics.median(times)


def replayed(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``action`` as a graph, after a first call outside of it, which compiles."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        action()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def machine(device: torch.device, rehearsal: bool = False) -> Machine:
    """Its ceilings are measured. A rehearsal runs kernels in Triton's interpreter."""
    cuda = device.type == "cuda"
    size, count = (8192, 1 << 30) if cuda else (1024, 1 << 28)
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    copying = 2 * count / seconds(lambda: target.copy_(source), device, 0.5)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    multiplying = 2 * size**3 / seconds(lambda: left @ right, device, 0.5)
    name = torch.cuda.get_device_name(device) if cuda else conditions.processor()
    return Machine(name, device, copying, multiplying, cuda or rehearsal)


def _sets(nbytes: float, cold: float) -> int:
    return max(1, min(MOST_SETS, -(-int(cold) // max(1, int(nbytes)))))


class Cases:
    """Builds cases; weights are made once."""

    def __init__(self, widths: Widths, device: torch.device, cold: float = COLD_BYTES):
        self.widths, self.device, self.cold = widths, device, cold
        self.inputs = Inputs(widths, torch.bfloat16, device)
        self._experts: list[Any] = []

    def add_rms_norm(self, tokens: int) -> Case:
        width = self.widths.hidden
        call = self.inputs.add_rms_norm(tokens)
        return Case("add_rms_norm", f"{tokens} tokens", [call], 2 * width * (4 * tokens + 1), 0)

    def norm_router(self, tokens: int) -> Case:
        widths = self.widths
        nbytes = 2 * widths.hidden * (widths.experts + 4 * tokens + 1) + 8 * tokens * widths.top_k
        calls = [self.inputs.norm_router(tokens) for _ in range(_sets(2 * widths.hidden * widths.experts, self.cold))]
        return Case("norm_router", f"{tokens} tokens", calls, nbytes, 2 * tokens * widths.experts * widths.hidden)

    def moe(self, tokens: int, shared: bool = True) -> Case:
        """Sets differ in the experts that are chosen, and in their weights as far as three sets go."""
        widths, inputs = self.widths, self.inputs
        if not self._experts:
            sets = 3 if self.cold and self.device.type == "cuda" else 1  # 1.2 GB each
            self._experts = [(inputs.experts(), inputs.shared_experts()) for _ in range(sets)]
        expert = 6 * widths.hidden * widths.inner
        count = _sets(min(tokens * widths.top_k, widths.experts) * expert, 4 * self.cold)
        calls = [
            inputs.moe(tokens, shared=shared, weights=self._experts[number % len(self._experts)])
            for number in range(max(count, len(self._experts)))
        ]
        met = statistics.mean(call.arguments[1].unique().numel() for call in calls)
        always = widths.shared / widths.inner if shared else 0
        nbytes = (met + always) * expert + 4 * tokens * widths.hidden
        operations = tokens * (widths.top_k + always) * expert
        size = f"{tokens} tokens, {'with' if shared else 'no'} shared"
        return Case("moe", size, calls, nbytes, operations)

    def mla_prepare(self, tokens: int) -> Case:
        """Every token is a sequence's only one."""
        widths = self.widths
        weights = 2 * widths.heads * widths.rank * widths.nope
        joined = widths.heads * (widths.nope + widths.rope) + widths.rank + widths.rope
        written = (widths.heads + 1) * (widths.rank + widths.rope)
        calls = [self.inputs.mla_prepare(tokens) for _ in range(_sets(weights, self.cold))]
        nbytes = weights + 2 * tokens * (joined + 2 * widths.rope + written)
        return Case("mla_prepare", f"{tokens} tokens", calls, nbytes, tokens * weights)

    def mla_decode(self, sequences: int, context: int) -> Case:
        """Pages in any order, each set its own; the page table has room for twice the context."""
        widths, size = self.widths, self.widths.page_size
        width, pages = widths.rank + widths.rope, -(-context // size)
        read = 2 * sequences * context * width
        count = _sets(read, self.cold)
        kv_cache = self.inputs.normal(count * sequences * pages, size, width)
        places = self.inputs.shuffled(len(kv_cache)).view(count, sequences, pages)
        seq_lens = torch.full((sequences,), context, dtype=torch.int32, device=self.device)
        scale, to_value = 2 * width**-0.5, self.inputs.to_value()
        calls = []
        for own in places:
            page_table = torch.zeros(sequences, 2 * pages, dtype=torch.int32, device=self.device)
            page_table[:, :pages] = own
            query = self.inputs.normal(sequences, widths.heads, width)
            seen = DecodeMetadata(page_table, seq_lens, size, [context] * sequences)
            calls.append(Call("mla_decode", (query, kv_cache, seen, scale, to_value), 3))
        nbytes = read + 2 * sequences * widths.heads * (width + widths.value) + to_value.nbytes
        operations = 2 * sequences * widths.heads * (context * (width + widths.rank) + widths.rank * widths.value)
        return Case("mla_decode", f"{sequences} sequences of {context}", calls, nbytes, operations)

    def mla_prefill(self, tokens: int, length: int) -> Case:
        """The last ``tokens`` of ``length``; keys and values have just been expanded, as in a model, so they are warm
        where a cache holds them."""
        widths = self.widths
        values = widths.heads * (widths.nope + widths.rope + widths.value) * tokens  # queries and results
        values += (widths.heads * (widths.nope + widths.value) + widths.rope) * length
        pairs = tokens * (length - tokens) + tokens * (tokens + 1) // 2
        operations = 2 * widths.heads * (widths.nope + widths.rope + widths.value) * pairs
        call = self.inputs.mla_prefill(tokens, length)
        return Case("mla_prefill", f"{tokens} tokens of {length}", [call], 2 * values, operations)


def measure(case: Case, where: Machine, ops: Ops, budget: float = 0.2, **more: Any) -> dict[str, Any]:
    """One row of the table."""

    def action() -> None:
        for call in case.calls:
            # not Call.run, which copies what is written to
            getattr(ops, call.op)(*call.arguments, **call.options, **more)

    graph = where.device.type == "cuda"
    took = seconds(replayed(action, where.device) if graph else action, where.device, budget) / len(case.calls)
    return {
        "op": case.op,
        "size": case.size,
        "who": ops.name,
        "how": "graph" if graph else "calls",
        "microseconds": round(took * 1e6, 2),
        "gb_per_s": round(case.nbytes / took / 1e9, 1),
        "percent_of_copy": round(100 * case.nbytes / took / where.bytes_per_second, 1),
        "tflop_per_s": round(case.operations / took / 1e12, 3),
        "percent_of_gemm": round(100 * case.operations / took / where.operations_per_second, 1),
    }


def heading() -> str:
    return (
        "| operation | size | who | how | µs | GB/s | of copy | TFLOP/s | of GEMM |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )


def row(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {result['op']} | {result['size']} | {result['who']} | {result['error']} | | | | | |"
    return (
        f"| {result['op']} | {result['size']} | {result['who']} | {result['how']} | {result['microseconds']} "
        f"| {result['gb_per_s']} | {result['percent_of_copy']} % | {result['tflop_per_s']} "
        f"| {result['percent_of_gemm']} % |"
    )


def sizes(cases: Cases, cuda: bool, quick: bool) -> list[Callable[[], Case]]:
    """What is measured, smallest first: decoding by sequences, and a chunk of a prefill."""
    tokens = [1, 3] if quick else [1, 4, 32, 128] if cuda else [1, 4, 16]
    long = [] if quick or not cuda else [1024, 4096]
    contexts = [(1, 2048), (32, 2048), (128, 2048)] if cuda else [(1, 140), (4, 140), (16, 140), (1, 2000), (16, 1000)]
    contexts = [(1, 40), (2, 40)] if quick else contexts
    made: list[Callable[[], Case]] = []
    for count in tokens:
        made.append(lambda count=count: cases.add_rms_norm(count))
        made.append(lambda count=count: cases.norm_router(count))
        made.append(lambda count=count: cases.mla_prepare(count))
    made += [lambda pair=pair: cases.mla_decode(*pair) for pair in contexts]
    if cuda and not quick:
        made.append(lambda: cases.mla_decode(1, 32768))
    chunks = [(3, 3), (2, 9)] if quick else [(256, 256)]
    chunks = [(1024, 1024), (1024, 2048), (1024, 8192), (16, 8192)] if cuda and not quick else chunks
    made += [lambda pair=pair: cases.mla_prefill(*pair) for pair in chunks]
    made += [lambda count=count: cases.moe(count) for count in [*tokens, *long]]
    return made


def contenders(where: Machine) -> list[Ops]:
    """Who computes an operation."""
    if where.triton:
        return [TORCH, select_ops(where.device, "triton")]
    try:
        return [TORCH, native_ops()]
    except ImportError:  # this machine cannot have them
        return [TORCH]


def in_blocks(case: Case, ops: Ops) -> Case:
    """``case`` with copies of its weights in the layout that ``ops`` reads fastest, one for each weight."""
    made: dict[int, Any] = {}

    def blocked(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(blocked, value))
        if value is not None and id(value) not in made:
            made[id(value)] = ops.block(value.clone(memory_format=torch.contiguous_format))
        return made.get(id(value))

    def change(values: list[Any]) -> None:
        for place in WEIGHTS.get(case.op, ()):
            values[place] = blocked(values[place])

    return (
        case if ops.block is TORCH.block else replace(case, calls=[with_arguments(each, change) for each in case.calls])
    )


def bench(
    where: Machine, cases: Cases, quick: bool, report: Callable[[dict[str, Any]], None], budget: float = 0.2
) -> None:
    """Measure everything; what fails is reported and does not stop the rest."""
    for make in sizes(cases, where.device.type == "cuda", quick):
        case = make()
        for ops in contenders(where):
            try:
                report(measure(in_blocks(case, ops), where, ops, budget))
            except Exception as error:
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                report({"op": case.op, "size": case.size, "who": ops.name, "error": said[:200]})


PREFILL_PLANS = ((64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2))
"""Queries of a program, keys at a time, warps, stages."""


def tune(where: Machine, cases: Cases, report: Callable[[dict[str, Any]], None], quick: bool = False) -> None:
    """Other tiles than the chosen ones, a line each."""
    from kimi_vl.kernels.triton import prefill
    from kimi_vl.kernels.triton.mla import Tile as SplitTile
    from kimi_vl.kernels.triton.moe import FEW, MANY, PAIRS, SOME, Plan, Tile

    ops = select_ops(where.device, "triton")

    def attempt(case: Case, label: str, **more: Any) -> None:
        try:
            report(measure(case, where, ops, 0.1, **more) | {"tile": label})
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            report({"op": case.op, "size": case.size, "who": ops.name, "tile": label, "error": said[:200]})

    def plans(base: Plan, gates: Sequence[Tile], downs: Sequence[Tile]) -> list[Plan]:
        kept = [Plan(base.block_m, gate, base.down) for gate in gates]
        return [base, *kept, *(Plan(base.block_m, base.gate_up, down) for down in downs)]

    tried: list[tuple[int, list[Plan]]] = [
        (
            1,
            plans(
                PAIRS,
                [Tile(2, 0, 4, 1), Tile(8, 0, 4, 1), Tile(8, 0, 8, 1), Tile(16, 0, 8, 1)],
                [Tile(2, 512, 4, 5), Tile(4, 512, 4, 3), Tile(8, 512, 4, 4), Tile(4, 1024, 4, 3), Tile(8, 256, 4, 6)],
            ),
        ),
        (
            32,
            plans(
                FEW,
                [Tile(64, 128, 4, 4), Tile(64, 64, 4, 5), Tile(32, 128, 4, 4), Tile(128, 64, 4, 4)],
                [Tile(64, 128, 4, 3), Tile(32, 128, 4, 5), Tile(128, 64, 4, 5), Tile(128, 128, 8, 3)],
            ),
        ),
        (1024, [FEW, SOME, MANY]),
        (4096, [SOME, MANY, Plan(128, Tile(64, 64, 8, 4), Tile(128, 64, 8, 4)), Plan(64, MANY.gate_up, MANY.down)]),
    ]
    if quick:
        tried = [(1, [PAIRS]), (3, [FEW])]
    for tokens, listed in tried:
        case = cases.moe(tokens)
        for plan in listed:
            attempt(case, str(plan), plan=plan)
    few = [8] if not quick else []
    for tokens in few:  # where sorting begins to pay
        case = cases.moe(tokens)
        for name, plan in (("pairs", PAIRS), ("few", FEW)):
            attempt(case, name, plan=plan)
    shares = [(1, 40, [1])] if quick else [(1, 2048, [8, 16, 32]), (32, 2048, [4, 8, 16]), (128, 2048, [1, 2, 4, 8])]
    for sequences, context, splits in shares:
        case = cases.mla_decode(sequences, context)
        for split in splits:
            attempt(case, f"{split} splits", splits=split)
        for share in (
            ()
            if quick
            else (
                SplitTile(32, 4, 2),
                SplitTile(32, 4, 3),
                SplitTile(64, 4, 3),
                SplitTile(16, 4, 4),
                SplitTile(32, 8, 3),
            )
        ):
            attempt(case, str(share), tile=share)
    chunks = [(3, 9)] if quick else [(1024, 1024), (1024, 8192), (200, 3001)]
    others = [] if quick else [prefill.NARROW, *(prefill.Plan(*sizes) for sizes in PREFILL_PLANS)]
    for tokens, length in chunks:
        case = cases.mla_prefill(tokens, length)
        for block in (prefill.WIDE, *others):
            attempt(case, str(block), plan=block)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few small sizes")
    parser.add_argument("--tune", action="store_true", help="also other tiles (GPU only)")
    parser.add_argument("--experts", type=int, default=0, help="routed experts, where memory is small")
    parser.add_argument("--cards", action="store_true", help="what each kernel needs on each card, and nothing else")
    args = parser.parse_args(arguments)
    if args.cards:
        from . import cards

        return cards.main()
    device = torch.device(args.device)
    widths = PUBLISHED if not args.experts else Widths(experts=args.experts, top_k=min(6, args.experts))
    if device.type != "cuda":
        print("no GPU is used: native kernels are measured, where this machine has them, and PyTorch", flush=True)
    where = machine(device)
    print(
        f"{where.name}: copy {where.bytes_per_second / 1e9:.1f} GB/s, "
        f"bfloat16 product {where.operations_per_second / 1e12:.2f} TFLOP/s\n\n{heading()}",
        flush=True,
    )
    results: list[dict[str, Any]] = []

    def report(result: dict[str, Any]) -> None:
        results.append(result)
        print(row(result) + (f" {result['tile']}" if "tile" in result else ""), flush=True)

    with torch.inference_mode():
        cases = Cases(widths, device, 0 if args.quick else COLD_BYTES)
        bench(where, cases, args.quick, report)
        if args.tune and device.type == "cuda":
            tune(where, cases, report, args.quick)
    summary = {
        "bench": "kernels",
        "machine": where.name,
        "device": str(device),
        "torch": torch.__version__,
        "experts": widths.experts,
        "copy_gb_per_s": round(where.bytes_per_second / 1e9, 1),
        "gemm_tflop_per_s": round(where.operations_per_second / 1e12, 2),
        "results": results,
    }
    print(json.dumps(summary))
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
