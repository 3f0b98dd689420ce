"""`scripts/bench_gpu`: what only a GPU can settle, in one run that is short enough for a borrowed machine.

Each section is a function and runs in a process of its own with a limit of its own: one that fails, hangs or breaks
the device takes nothing but itself down, and what it had reported by then is kept. :mod:`bench_suite.gpu_sections` has
them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .gpu_sections import ROOT, SECTIONS, Job, Section

LIMIT = 8 * 60.0  # of everything
COMMAND = [sys.executable, "-P", "-m", "bench_suite.gpu"]


def run_section(section: Section, job: Job, seconds: float) -> dict[str, Any]:
    """Its reports and how it ended: "done", "failed" or "out of time"."""
    command = [*COMMAND, "--section", section.name, "--lines", str(job.lines)]
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
    missing = [name for name in ("torch", "triton", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{sys.executable} has no {' and no '.join(missing)}; name another Python by KIMI_VL_PYTHON")
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
    whole = {"bench": "gpu", "passed": good, "seconds": round(took), "rehearsal": args.rehearse}
    print(json.dumps(whole | summary(results)))
    return 0 if good else 1


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """How each section ended, and the ladder: tokens a second by rung, sequences and context."""
    ended = {name: [result["ended"], result.get("passed"), result.get("checks")] for name, result in results.items()}
    rates: dict[str, Any] = {}
    for result in results.values():
        for _, value in result.get("reports", []):
            if isinstance(value, dict) and "tokens_per_second" in value:
                place = f"{value['sequences']} sequences of {value['context']}"
                rates.setdefault(place, {})[value["rung"]] = value["tokens_per_second"]
    return {"sections": ended, "tokens_per_second": rates}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
