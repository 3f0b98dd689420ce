"""The parts of `scripts/bench_gpu`: what each measures and checks.

To add one, write a function that takes a :class:`Job` and put it into SECTIONS. Knows nothing of processes and limits:
:mod:`bench_suite.gpu` runs each in its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kimi_vl.kernels import Ops
    from kimi_vl.kernels.inputs import Call

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """What a section works with. ``rehearsal`` means toy sizes, on the CPU, in Triton's interpreter."""

    lines: Path
    rehearsal: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def report(self, name: str, value: Any) -> None:
        """Keep a figure, at once; a name may come more than once."""
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, value]) + "\n")
        print(f"  {name}: {value}", flush=True)

    def check(self, name: str, passed: bool, value: Any) -> None:
        """Keep a figure that has to hold."""
        self.report(name, {"passed": bool(passed), "value": value})


@dataclass(frozen=True)
class Section:
    name: str
    seconds: float
    run: Callable[[Job], None]


# Sections import torch themselves: the process that starts them stays light, and touches no device.


def describe_machine(job: Job) -> None:
    """Names, versions and the two ceilings."""
    import torch

    from . import kernels

    for package in ("torch", "triton", "transformers", "flash_attn"):
        try:
            job.report(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            job.report(package, None)
    job.report("python", platform.python_version())
    if not job.rehearsal:
        properties = torch.cuda.get_device_properties(0)
        job.report("multiprocessors", properties.multi_processor_count)
        job.report("memory_gb", round(properties.total_memory / 1e9, 1))
        job.report("cuda", torch.version.cuda)
    where = kernels.machine(torch.device(job.device), job.rehearsal)
    job.report("name", where.name)
    job.report("copy_gb_per_s", round(where.bytes_per_second / 1e9, 1))
    job.report("gemm_tflop_per_s", round(where.operations_per_second / 1e12, 2))


def _widths(job: Job, **more: int) -> Any:
    from kimi_vl.kernels import Widths

    if not job.rehearsal:
        return Widths(**more)
    return Widths(
        hidden=64, experts=8, top_k=3, inner=32, shared=64, heads=3, rank=32, rope=8, nope=16, value=16, page_size=8
    )


def _hold(job: Job, label: str, call: Call, ops: Ops, dtype: torch.dtype) -> None:
    """Within rounding of float64, and the same bits again."""
    import torch

    from kimi_vl.kernels.inputs import apart

    try:
        results = call.run(ops)
        found = apart(call, results, dtype, ties=True)
        same = all(map(torch.equal, results, call.run(ops)))
        value = {"distance_by_tolerance": found, "same_bits_again": same}
        job.check(f"{label}, {dtype}", found <= 1 and same, value)
    except Exception as error:
        job.check(f"{label}, {dtype}", False, f"{type(error).__name__}: {error}"[:300])


def kernels_against_twins(job: Job) -> None:
    """Every kernel at the published widths, in bfloat16 and float32, against float64; memory is poisoned beforehand."""
    import torch

    from kimi_vl.kernels import select_ops
    from kimi_vl.kernels.inputs import Inputs, distances, with_arguments

    ops = select_ops(job.device, "triton")
    # uninitialised memory is filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    tokens = [1, 5] if job.rehearsal else [1, 2, 3, 17, 32, 128, 300, 1100]
    contexts = [[1, 9, 8, 0, 40]] if job.rehearsal else [[1, 31, 32, 33, 0, 2048], [5000], [300, 7] * 64]
    chunks = [(1024, 1024), (1000, 3001), (2, 700), (16, 17), (37, 37), (129, 4096)]
    chunks = [(2, 9), (18, 40)] if job.rehearsal else chunks
    for dtype in (torch.bfloat16, torch.float32):
        inputs = Inputs(_widths(job), dtype, job.device)
        weights = inputs.experts(), inputs.shared_experts()

        def hold(label: str, call: Call, dtype: torch.dtype = dtype) -> None:
            _hold(job, label, call, ops, dtype)

        for count in tokens:
            if dtype == torch.float32 and count > 300:
                continue  # float32 is for correctness, and takes its time
            hold(f"add_rms_norm {count}", inputs.add_rms_norm(count))
            hold(f"norm_router {count}", inputs.norm_router(count))
            hold(f"mla_prepare {count}", inputs.mla_prepare(count, count - count // 3, unwritten=count // 4))
            for routing in ("random", "same"):
                hold(f"moe {count} {routing}", inputs.moe(count, routing, weights=weights))
            hold(f"moe {count} not shared", inputs.moe(count, shared=False, weights=weights))
        for lengths in contexts:
            call = inputs.mla_decode(lengths, 2 * max(lengths) // 8 + 1)
            hold(f"mla_decode {len(lengths)} sequences", call)
        for new, length in chunks:
            if dtype == torch.bfloat16 or new <= 300:
                hold(f"mla_prefill {new} of {length}", inputs.mla_prefill(new, length))
        for splits in (1, 7):
            (result,) = call.run(ops, splits=splits)
            found = max(distances([result], call.twin()))
            job.check(f"mla_decode {splits} splits, {dtype}", found <= call.tolerance(dtype), found)
        # a fault that has to be seen, or the comparison is blind
        shorter = replace(call.arguments[2], seq_lens=(call.arguments[2].seq_lens - 1).clamp(min=0))
        faulty = with_arguments(call, lambda values, shorter=shorter: values.__setitem__(2, shorter))
        seen = max(distances(call.run(ops), faulty.twin()))
        job.check(f"a planted mistake is seen, {dtype}", seen > 3 * call.tolerance(dtype), seen)


def quantised_kernels_against_twins(job: Job) -> None:
    """The kernels that read weights, with weights in every form, at the published widths in bfloat16."""
    import torch

    from kimi_vl.kernels import Form, select_ops
    from kimi_vl.kernels.inputs import Inputs

    ops = select_ops(job.device, "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is filled with NaN
    inputs = Inputs(_widths(job), torch.bfloat16, job.device)
    widths = inputs.widths
    forms: list[Form] = [("int8", 0, "bfloat16"), ("int4", 32, "bfloat16"), ("float8", 0, "bfloat16")]
    for form in forms[:1] if job.rehearsal else forms:
        weights = inputs.experts(form), inputs.shared_experts(form)
        calls = {}
        for tokens in [3] if job.rehearsal else [1, 2, 8, 32, 128, 700]:
            calls[f"project {tokens}"] = inputs.project(tokens, inputs.quantized(form, widths.hidden, widths.hidden))
            for routing in ("random", "same"):
                calls[f"moe {tokens} {routing}"] = inputs.moe(tokens, routing, weights=weights)
            if form[0] != "int4":
                calls[f"mla_prepare {tokens}"] = inputs.mla_prepare(tokens, tokens - tokens // 3, form=form)
                calls[f"mla_decode {tokens}"] = inputs.mla_decode([700, *[5] * (tokens - 1)], 128, form=form)
        for label, call in calls.items():
            _hold(job, f"{form[0]} {label}", call, ops, torch.bfloat16)


def start_up(job: Job) -> None:
    """The check at start-up refuses no kernel of the published model, in any form."""
    import torch

    from kimi_vl.engine.engine import EngineOptions
    from kimi_vl.kernels import select_ops, startup_check
    from kimi_vl.weights import loader

    from . import ladder

    if job.rehearsal:
        job.report("skipped", "the check is for a GPU")
        return
    device = torch.device("cuda", 0)
    for form in (None, "int8", "int4", "float8"):
        model = loader.planned_model(ladder.config(False), torch.bfloat16, form, device)
        use, began = EngineOptions(cache_bytes=1 << 30).use(model, device), time.monotonic()
        refused = startup_check.refusals(device, use)
        job.report(f"{form or 'bfloat16'}: seconds of the check", round(time.monotonic() - began, 1))
        job.check(f"{form or 'bfloat16'}: nothing refused", not refused, refused)
        began = time.monotonic()
        select_ops(device, "auto", use)
        job.report(f"{form or 'bfloat16'}: seconds of launching all", round(time.monotonic() - began, 1))


def demo(job: Job) -> None:
    """The demo model from files to answers, as a user calls it: pictures, thinking, several requests at once."""
    from concurrent.futures import ThreadPoolExecutor

    import kimi_vl

    pipeline = kimi_vl.load("demo", device=job.device)
    engine = pipeline.engine
    job.report("operations", engine.ops.name)
    job.report("dtype", str(engine.model.dtype))
    job.report("decode steps are captured", engine.static_decoder is not None)

    def ask(question: str, *names: str) -> str:
        content = [{"type": "image"} for _ in names] + [{"type": "text", "text": question}]
        pictures = [ROOT / "images" / name for name in names]
        return pipeline.complete([{"role": "user", "content": content}], pictures, temperature=0).answer

    questions = [
        ("Solve this math problem shown in the image.", "math_problem.png", "25 + 13 = 38"),
        ("How many objects are there?", "demo1.jpeg", "There are 3 objects."),
    ]
    with ThreadPoolExecutor(8) as threads:
        for question, picture, wanted in questions:
            job.check(f"{picture} alone", (answer := ask(question, picture)) == wanted, answer)
            answers = list(threads.map(lambda _, q=question, p=picture: ask(q, p), range(8)))
            job.check(f"{picture} eight times at once", answers == [wanted] * 8, answers[0])
    job.check("healthy", pipeline.healthy(), True)
    pipeline.close()


def kernels_in_graphs(job: Job) -> None:
    """A captured graph follows its inputs: other experts, other lengths, other slots, no new capture."""
    import torch

    from kimi_vl.kernels import select_ops
    from kimi_vl.kernels.inputs import Inputs, distances

    from .kernels import replayed

    if job.rehearsal:
        job.report("skipped", "there are no graphs on a CPU")
        return
    ops = select_ops(job.device, "triton")
    inputs = Inputs(_widths(job), torch.bfloat16, job.device)
    weights = inputs.experts(), inputs.shared_experts()
    for count in (1, 32, 128):
        call = inputs.moe(count, weights=weights)
        kept: list[Any] = []
        replay = replayed(lambda call=call, kept=kept: kept.append(call.run(ops)), torch.device(job.device))
        for routing in ("random", "distinct", "same"):
            call.arguments[1].copy_(inputs.choices(count, routing)[0])
            replay()
            found = max(distances(kept[-1], call.twin()))
            job.check(f"moe {count} {routing}", found <= call.tolerance(torch.bfloat16), found)
    call, kept = inputs.mla_decode([3000, 2000, 900], 256), []
    replay = replayed(lambda: kept.append(call.run(ops)), torch.device(job.device))
    seq_lens = call.arguments[2].seq_lens
    whole = seq_lens.clone()
    for length in (1, 64, 65, 900):
        seq_lens.copy_(whole.clamp(max=length))
        replay()
        found = max(distances(kept[-1], call.twin()))
        job.check(f"mla_decode up to {length}", found <= call.tolerance(torch.bfloat16), found)


def decoder_against_float64(job: Job) -> None:
    """Two layers, the second with experts, in a decoding step and in a chunk of a prompt, in bfloat16.

    Triton's error stands beside plain PyTorch's; both are distances from float64.
    """
    import copy

    import torch

    from kimi_vl.engine.decoder import FusedDecoder
    from kimi_vl.engine.kv_cache import Chunk, PagedCache
    from kimi_vl.kernels import REFERENCE, select_ops

    from . import ladder

    config, device = ladder.config(job.rehearsal, text_layers=2, vocabulary=512), torch.device(job.device)
    half = ladder.random_model(config, device).language_model
    exact = FusedDecoder(copy.deepcopy(half).double(), REFERENCE)
    plain, fused = (FusedDecoder(half, select_ops(device, name)) for name in ("torch", "triton"))
    generator, size = torch.Generator(job.device).manual_seed(1), 32
    context = 40 if job.rehearsal else 2048
    works = [(3, 1), (1, 9)] if job.rehearsal else [(1, 1), (32, 1), (128, 1), (1, 1000)]
    for sequences, new in works:
        pages = -(-(context + new) // size)
        chunks = [Chunk(range(at * pages, (at + 1) * pages), context, context + new) for at in range(sequences)]
        latent = config.text_config.kv_lora_rank + config.text_config.qk_rope_head_dim
        apart: dict[str, list[torch.Tensor]] = {"torch": [], "triton": []}
        for _ in range(9 if sequences * new == 1 else 1):
            past = torch.randn(2, sequences * pages, size, latent, generator=generator, device=device).bfloat16()
            states = torch.randn(sequences * new, config.text_config.hidden_size, generator=generator, device=device)
            states = states.bfloat16()
            results: dict[str, torch.Tensor] = {}
            for name, decoder in (("float64", exact), ("torch", plain), ("triton", fused)):
                dtype = torch.float64 if name == "float64" else torch.bfloat16
                cache = PagedCache(config.text_config, sequences * pages, size, dtype=dtype, device=device)
                cache.kv_cache.copy_(past)
                step = cache.step(chunks)
                with torch.inference_mode():
                    results[name] = decoder.states(states.to(dtype), step).double()
            right = results.pop("float64")
            for name, found in results.items():
                apart[name].append(((found - right).norm(dim=-1) / right.norm(dim=-1)).nan_to_num(torch.inf))
        # of the median token: near a tie of two experts a rounding may select another, in either implementation
        errors = {name: float(torch.cat(found).median()) for name, found in apart.items()}
        job.check(f"{sequences} sequences, {new} new", errors["triton"] <= 1.25 * errors["torch"] + 2**-10, errors)
        job.check(f"{sequences} sequences, {new} new, plain", errors["torch"] <= 0.03, errors["torch"])


def engine_against_plain(job: Job) -> None:
    """The engine with kernels, and with graphs too, gives the tokens that it gives without; float32, two layers."""
    import torch

    from . import ladder

    config, device = ladder.config(job.rehearsal, text_layers=2), torch.device(job.device)
    model = ladder.random_model(config, device, torch.float32)
    wanted = ladder.tokens(ladder.engine(model, "torch", job.rehearsal), job.rehearsal)
    for rung in ("kernels", "graphs"):
        found = ladder.tokens(ladder.engine(model, rung, job.rehearsal), job.rehearsal)
        # sums in another order may turn a near tie, after which all is different: in few requests, if any
        alike = sum(map(list.__eq__, found, wanted))
        job.check(f"{rung}: requests alike", alike >= 0.8 * len(wanted), f"{alike} of {len(wanted)}")


def _rung(job: Job, rung: str) -> None:
    """The full model on a rung of the ladder."""
    from . import ladder

    ladder.measure(rung, job.rehearsal, job.device, job.report, job.check)


def chunks(job: Job) -> None:
    """First tokens by the size of a step."""
    from . import ladder

    ladder.chunks(job.rehearsal, job.device, job.report)


def profile(job: Job) -> None:
    """Every kernel's share of a decode step with graphs, of a prompt and of a picture."""
    from . import ladder

    ladder.profile("graphs", job.rehearsal, job.device, job.report)


def memory(job: Job) -> None:
    """The plan of memory holds in the largest steps."""
    from . import ladder

    ladder.fill(job.rehearsal, job.device, job.report, job.check)


def transformers(job: Job) -> None:
    """The same model in transformers."""
    from . import ladder

    ladder.measure_transformers(job.rehearsal, job.device, job.report)


def speed_of_kernels(job: Job) -> None:
    """The table of scripts/bench_kernels."""
    _measure(job, tune=False)


def tiles(job: Job) -> None:
    """Other tiles than those chosen without a GPU at hand."""
    _measure(job, tune=True)


def _measure(job: Job, tune: bool) -> None:
    import torch

    from . import kernels

    with torch.inference_mode():
        where = kernels.machine(torch.device(job.device), job.rehearsal)
        cases = kernels.Cases(_widths(job), where.device, 0 if job.rehearsal else kernels.COLD_BYTES)

        def report(result: dict[str, Any]) -> None:
            job.report(f"{result['op']} {result['size']} {result['who']}", result)

        budget = 0.0 if job.rehearsal else 0.1
        if tune:
            kernels.tune(where, cases, report, job.rehearsal)
        else:
            kernels.bench(where, cases, job.rehearsal, report, budget)


# In the order in which an answer is wanted, should the time not do for all.
SECTIONS: list[Section] = [
    Section("machine", 40, describe_machine),
    Section("kernels_against_twins", 90, kernels_against_twins),
    Section("decoder_against_float64", 45, decoder_against_float64),
    Section("engine_against_plain", 60, engine_against_plain),
    Section("ladder_graphs", 90, partial(_rung, rung="graphs")),
    Section("ladder_kernels", 60, partial(_rung, rung="kernels")),
    Section("ladder_torch", 60, partial(_rung, rung="torch")),
    Section("start_up", 90, start_up),
    Section("demo", 60, demo),
    Section("quantised_kernels_against_twins", 90, quantised_kernels_against_twins),
    Section("profile", 90, profile),
    Section("chunks", 60, chunks),
    Section("ladder_int8", 60, partial(_rung, rung="int8")),
    Section("ladder_int4", 60, partial(_rung, rung="int4")),
    Section("ladder_float8", 60, partial(_rung, rung="float8")),
    Section("memory", 60, memory),
    Section("transformers", 60, transformers),
    Section("kernels_in_graphs", 45, kernels_in_graphs),
    Section("speed_of_kernels", 90, speed_of_kernels),
    Section("tiles", 90, tiles),
]
