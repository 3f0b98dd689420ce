"""`scripts/evals/run`: lmms-eval, unmodified, asks a server the demo's questions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_suite.openai_server import OpenAIServer

from cog_local.server import model_environment, say
from demo_world import evaluate
from evals.questions import BY_TEXT, ONE_PICTURE, TASK, write_table, write_task

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TIMEOUT_S = 1800


def run_lmms_eval(python: str, url: str, folder: Path, out: Path, concurrent: int, key: str) -> dict[str, Any]:
    """What lmms-eval finds on the task in ``folder``. ``out`` gets all that it writes."""
    settings = {
        "model": "api-kimi-vl",
        "base_url": f"{url}/v1",
        "api_key": key,
        "timeout": str(TIMEOUT_S),  # ten seconds otherwise, and what takes longer becomes a wrong answer
        "num_concurrent": str(concurrent),
    }
    command = [python, "-m", "lmms_eval", "--model", "openai"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--include_path", str(folder), "--tasks", TASK, "--batch_size", "1"]
    command += ["--output_path", str(out), "--log_samples"]
    environment = {**os.environ, **OFFLINE, "OPENAI_API_KEY": key, "HF_HOME": str(out / "hf")}
    environment.pop("PYTHONPATH", None)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lmms_eval.log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(command, env=environment, cwd=out, stdout=log, stderr=log, check=False)
    results, samples = ([*out.rglob(name)] for name in ("*_results.json", f"*_samples_{TASK}.jsonl"))
    if ended.returncode or not results or not samples:
        tail = (out / "lmms_eval.log").read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise SystemExit("error: lmms-eval failed\n" + "\n".join(tail))
    figures = json.loads(results[0].read_text(encoding="utf-8"))["results"][TASK]
    right = [json.loads(line) for line in samples[0].read_text(encoding="utf-8").splitlines()]
    tasks: dict[str, list[float]] = defaultdict(list)
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    for sample in right:
        tasks[questions[int(sample["doc_id"])]["task"]].append(sample["right"])
    return {
        "questions": len(right),
        "right": round(figures["right,none"], 4),
        "standard_error": round(figures["right_stderr,none"], 4),
        "tasks": {task: round(sum(answers) / len(answers), 4) for task, answers in tasks.items()},
    }


@contextlib.contextmanager
def served(url: str) -> Iterator[str]:
    """``url``, or that of a server which is started for as long."""
    if url:
        yield url
        return
    with OpenAIServer(environment=model_environment(os.environ, say)) as server:
        yield server.url


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/evals/run", description=__doc__)
    parser.add_argument("--url", default="", help="a server that runs, as http://host:8000; otherwise one is started")
    parser.add_argument("--count", type=int, default=24, help="questions of each task (24)")
    parser.add_argument("--seed", type=int, default=evaluate.SEED, help="of the questions")
    parser.add_argument("--tasks", nargs="+", choices=BY_TEXT, help="which tasks (all)")
    parser.add_argument("--concurrent", type=int, default=16, help="requests at a time (16)")
    parser.add_argument("--out", type=Path, help="a new folder for questions, answers and logs, which is kept")
    parser.add_argument("--tsv", type=Path, help="only write questions of one picture for VLMEvalKit to this file")
    args = parser.parse_args(arguments)
    if args.tsv:
        count = write_table(args.tsv, args.seed, args.count, args.tasks or ONE_PICTURE)
        say(f"{count} questions in {args.tsv}")
        return 0
    python = os.environ.get("KIMI_VL_LMMS_EVAL")
    if not python:
        parser.error("KIMI_VL_LMMS_EVAL must be the Python of an environment with lmms-eval")
    if args.out and args.out.exists():
        parser.error(f"--out: {args.out} is there already")
    with tempfile.TemporaryDirectory() as scratch, served(args.url) as url:
        out = (args.out or Path(scratch) / "out").resolve()
        folder = write_task(out / "task", args.seed, args.count, args.tasks or list(BY_TEXT))
        key = os.environ.get("OPENAI_API_KEY", "none")
        found = run_lmms_eval(python, url, folder, out / "logs", args.concurrent, key)
    print("| task | answer exactly right |\n|---|---|")
    for task, share in found["tasks"].items():
        print(f"| {task} | {share:.1%} |")
    print(json.dumps({**found, "seed": args.seed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
