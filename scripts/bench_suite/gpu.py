"""`scripts/bench_gpu`: what only a GPU can settle, in one run that is short enough for a borrowed machine.

Each section is a function and runs in a process of its own with a limit of its own: one that fails, hangs or breaks
the device takes nothing but itself down, and what it had reported by then is kept. To add one, write a function that
takes a :class:`Job` and put it into SECTIONS.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 8 * 60.0  # of everything


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
    from .kernel_inputs import Widths

    if not job.rehearsal:
        return Widths(**more)
    return Widths(hidden=64, experts=8, top_k=3, inner=32, shared=64, heads=3, rank=32, rope=8, nope=16, page_size=8)


def kernels_against_twins(job: Job) -> None:
    """Every kernel at the published widths, in bfloat16 and float32, against float64; memory is poisoned beforehand."""
    import torch

    from kimi_vl.kernels import choose

    from .kernel_inputs import Call, Inputs, distances, routed_alike, with_arguments

    ops = choose(job.device, "triton")
    # uninitialised memory is filled with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    tokens = [1, 5] if job.rehearsal else [1, 2, 3, 17, 32, 128, 300, 1100]
    contexts = [[1, 9, 8, 0, 40]] if job.rehearsal else [[1, 31, 32, 33, 0, 2048], [5000], [300, 7] * 64]
    for dtype in (torch.bfloat16, torch.float32):
        inputs = Inputs(_widths(job), dtype, job.device)
        weights = inputs.experts(), inputs.shared_experts()

        def hold(label: str, call: Call, dtype: torch.dtype = dtype) -> None:
            try:
                results = call.run(ops)
                alike = call.op == "router"
                found = routed_alike(call, results) if alike else max(distances(results, call.twin()))
                same = all(map(torch.equal, results, call.run(ops)))
                limit = call.tolerance(dtype)
                value = {"distance": found, "limit": limit, "same_bits_again": same}
                job.check(f"{label}, {dtype}", found <= limit and same, value)
            except Exception as error:
                job.check(f"{label}, {dtype}", False, f"{type(error).__name__}: {error}"[:300])

        for count in tokens:
            if dtype == torch.float32 and count > 300:
                continue  # float32 is for correctness, and takes its time
            hold(f"add_rms_norm {count}", inputs.add_rms_norm(count))
            hold(f"router {count}", inputs.router(count))
            hold(f"latent_write {count}", inputs.latent_write(count, unwritten=count // 4))
            for routing in ("random", "same"):
                hold(f"moe {count} {routing}", inputs.moe(count, routing, weights=weights))
            hold(f"moe {count} not shared", inputs.moe(count, shared=False, weights=weights))
        for lengths in contexts:
            call = inputs.mla_decode(lengths, 2 * max(lengths) // 8 + 1)
            hold(f"mla_decode {len(lengths)} rows", call)
        for splits in (1, 7):
            (result,) = call.run(ops, splits=splits)
            found = max(distances([result], call.twin()))
            job.check(f"mla_decode {splits} splits, {dtype}", found <= call.tolerance(dtype), found)
        # a fault that has to be seen, or the comparison is blind
        faulty = with_arguments(call, lambda values: values.__setitem__(3, (values[3] - 1).clamp(min=0)))
        seen = max(distances(call.run(ops), faulty.twin()))
        job.check(f"a planted mistake is seen, {dtype}", seen > 3 * call.tolerance(dtype), seen)


def kernels_in_graphs(job: Job) -> None:
    """A captured graph follows its inputs: other experts, other lengths, other slots, no new capture."""
    import torch

    from kimi_vl.kernels import choose

    from .kernel_inputs import Inputs, distances
    from .kernels import replayed

    if job.rehearsal:
        job.report("skipped", "there are no graphs on a CPU")
        return
    ops = choose(job.device, "triton")
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
    whole = call.arguments[3].clone()
    for length in (1, 64, 65, 900):
        call.arguments[3].copy_(whole.clamp(max=length))
        replay()
        found = max(distances(kept[-1], call.twin()))
        job.check(f"mla_decode up to {length}", found <= call.tolerance(torch.bfloat16), found)


def layer_against_float64(job: Job) -> None:
    """One whole layer with experts, decoding, in bfloat16: Triton's error beside plain PyTorch's, both from float64."""
    import copy

    import torch

    from kimi_vl.config import TextConfig
    from kimi_vl.kernels import TORCH, choose
    from kimi_vl.language import Layer, MoE, rope_tables

    from . import layer as composed
    from .kernel_inputs import Inputs

    widths = _widths(job)
    config = TextConfig(
        vocab_size=64, hidden_size=widths.hidden, intermediate_size=64, moe_intermediate_size=widths.inner,
        num_hidden_layers=1, num_attention_heads=widths.heads, kv_lora_rank=widths.rank,
        qk_nope_head_dim=widths.nope, qk_rope_head_dim=widths.rope, v_head_dim=widths.nope,
        n_routed_experts=widths.experts, n_shared_experts=widths.shared // widths.inner,
        num_experts_per_tok=widths.top_k, first_k_dense_replace=0, routed_scaling_factor=widths.scaling,
        max_position_embeddings=131072, rms_norm_eps=widths.eps, rope_theta=800000.0,
    )  # fmt: skip
    device, generator = torch.device(job.device), torch.Generator(job.device).manual_seed(0)
    with torch.device(device):
        half = Layer(config, 0).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator, device=device))
            else:
                scale = (2 if "gate" in name else 1) * parameter.shape[-1] ** -0.5
                parameter.normal_(std=scale, generator=generator)
        assert isinstance(half.mlp, MoE)
        half.mlp.gate.e_score_correction_bias.sub_(1)
    exact = copy.deepcopy(half).double()
    inputs = Inputs(widths, torch.bfloat16, device, seed=1)
    for rows in (1, 3) if job.rehearsal else (1, 32, 128):
        context = 40 if job.rehearsal else 2048
        size, pages = widths.page_size, -(-context // widths.page_size)
        entries = inputs.normal(rows * pages, size, widths.rank + widths.rope)
        table = inputs.shuffled(rows * pages).view(rows, pages)
        lengths = context - inputs.integers(size, rows)
        slots = table[torch.arange(rows, device=device), (lengths.long() - 1) // size] * size + (lengths - 1) % size
        cos, sin = rope_tables((lengths - 1).unsqueeze(0), widths.rope, config.rope_theta, torch.bfloat16)
        step = composed.Step(cos[0], sin[0], slots, table, lengths)
        double = composed.Step(cos[0].double(), sin[0].double(), slots, table, lengths)
        residual, delta = inputs.normal(rows, widths.hidden), inputs.normal(rows, widths.hidden)
        wanted = sum(composed.decode(exact, TORCH, residual.double(), delta.double(), entries.double(), double))
        errors: dict[str, float] = {}
        for ops in (TORCH, choose(device, "triton")):
            found = sum(value.double() for value in composed.decode(half, ops, residual, delta, entries.clone(), step))
            # the median row: near a tie of two experts a rounding may choose another, in either implementation
            away = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)  # pyright: ignore[reportAttributeAccessIssue]
            errors[ops.name] = float(away.median()) if bool(away.isfinite().all()) else float("inf")
        passed = errors["triton"] <= 1.25 * errors["torch"] + 2**-10
        job.check(f"{rows} rows, median error", passed, errors)


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


SECTIONS: list[Section] = [
    Section("machine", 60, describe_machine),
    Section("kernels_against_twins", 180, kernels_against_twins),
    Section("kernels_in_graphs", 60, kernels_in_graphs),
    Section("layer_against_float64", 60, layer_against_float64),
    Section("speed_of_kernels", 120, speed_of_kernels),
    Section("tiles", 120, tiles),
]


def run_section(section: Section, job: Job, seconds: float) -> dict[str, Any]:
    """Its reports and how it ended: "done", "failed" or "out of time"."""
    command = [sys.executable, "-P", "-m", "bench_suite.gpu", "--section", section.name, "--lines", str(job.lines)]
    command += ["--rehearse"] if job.rehearsal else []
    print(f"== {section.name} (at most {seconds:.0f} s)", flush=True)
    began = time.monotonic()
    # a session of its own, so that compilers it started end with it
    process = subprocess.Popen(command, start_new_session=True)
    try:
        ended = "done" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        ended = "out of time"
    reports: list[Any] = []
    if job.lines.exists():
        for line in job.lines.read_text(encoding="utf-8").splitlines():
            try:
                reports.append(json.loads(line))
            except ValueError:
                reports.append(["unreadable", line[:200]])  # cut off in the middle
    took = round(time.monotonic() - began, 1)
    checks = [value["passed"] for _, value in reports if isinstance(value, dict) and "passed" in value]
    print(f"== {section.name}: {ended}, {took} s, {sum(checks)} of {len(checks)} checks passed", flush=True)
    return {"ended": ended, "seconds": took, "checks": len(checks), "passed": sum(checks), "reports": reports}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench_gpu")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / ".cache" / "bench"))
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=[section.name for section in SECTIONS])
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for everything")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU, through Triton's interpreter")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.section:
        if args.rehearse:
            from . import triton_on_cpu

            assert triton_on_cpu.interpreter  # it has to come before any kernel
        (section,) = (section for section in SECTIONS if section.name == args.section)
        section.run(Job(args.lines, args.rehearse))
        return 0
    began, results = time.monotonic(), {}
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "results.json"
    with tempfile.TemporaryDirectory() as folder:
        for section in SECTIONS:
            if args.only and section.name not in args.only:
                continue
            left = args.seconds - (time.monotonic() - began)
            if left < 5:
                results[section.name] = {"ended": "no time left"}
                continue
            job = Job(Path(folder) / section.name, args.rehearse)
            results[section.name] = run_section(section, job, min(left, section.seconds))
            # written again after each, so that a machine taken away leaves what there was
            target.write_text(json.dumps({"rehearsal": args.rehearse, "sections": results}, indent=1), encoding="utf-8")
    good = all(result["ended"] == "done" and result["passed"] == result["checks"] for result in results.values())
    for name, result in results.items():
        failed = [
            label
            for label, value in result.get("reports", [])
            if isinstance(value, dict) and value.get("passed") is False
        ]
        print(f"{name}: {result['ended']}" + (f"; failed: {failed}" if failed else ""))
    took = sum(result.get("seconds", 0) for result in results.values())
    print(f"{'everything passed' if good else 'NOT everything passed'}, {took:.0f} s; {target}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
