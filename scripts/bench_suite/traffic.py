"""`scripts/bench latency`, `throughput` and `mixed`: first tokens and tokens a second, beside what the machine can do.

Random weights at the published widths, as many layers as are asked for. The engine and its peers (``--peer``) take
turns, so that a slow minute of the machine meets all of them. What they share is measured first: bytes a second of a
copy and of reading, operations a second of a large product.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kimi_vl.model.config import Config, num_image_tokens

from . import checkpoint, decode, kernels, vision
from .contestants import NAMES, Process
from .load import rounded

Result = dict[str, Any]


class Run:
    """The contestants and the ceilings; the contestants end with the block."""

    def __init__(self, args: argparse.Namespace, most_sequences: int):
        device = torch.device(args.device)
        layers = args.layers or (27 if device.type == "cuda" else 6)
        if args.model:
            folder, self.shape = args.model, str(args.model)
        else:
            made = checkpoint.with_layers(args.cache, layers, args.blocks, args.divide, args.vocabulary)
            folder, self.shape = made.folder, made.shape
        self.args, self.config = args, Config.from_directory(folder)
        self.machine = kernels.machine(device)
        self.reading = decode.read_bandwidth(device)
        self.results: list[Result] = []
        common = {
            "device": args.device,
            "dtype": args.dtype,
            "sequences": max(64, most_sequences),
            "threads": args.threads,
        }
        self.contestants: list[Process] = []
        with contextlib.ExitStack() as stack:
            for name in ("kimi_vl", *args.peer):
                one = Process(name, folder, python=args.vllm if name == "vllm" else "", **common)
                stack.callback(one.kill)
                self.contestants.append(one)
            self._end = stack.pop_all()
        self.threads = args.threads or torch.get_num_threads()
        print(
            f"{self.shape}, {args.dtype}; {self.machine.name}, {self.threads} threads, torch {torch.__version__}, "
            + ", ".join(f"{one.name} {one.version}" for one in self.contestants)
            + f"\ncopy {self.machine.bytes_per_second / 1e9:.1f} GB/s, reading {self.reading / 1e9:.1f} GB/s, "
            f"bfloat16 product {self.machine.operations_per_second / 1e12:.2f} TFLOP/s\n"
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def ask(self, question: str, *values: Any) -> dict[str, list[dict[str, Any]]]:
        """Everybody's answers, round after round; a first round warms up and does not count."""
        answers: dict[str, list[dict[str, Any]]] = {one.name: [] for one in self.contestants}
        for number in range(self.args.rounds + 1):
            self.reading = max(self.reading, decode.read_bandwidth(self.machine.device))
            # there and back, so that nobody always follows the same one
            for one in self.contestants[:: -1 if number % 2 else 1]:
                answer = one.ask(question, *values)
                if number:
                    answers[one.name].append(answer)
        return answers

    def of_reading(self, nbytes: float, seconds: float) -> float:
        return rounded(100 * nbytes / seconds / self.reading)

    def of_product(self, operations: float, seconds: float) -> float:
        return rounded(100 * operations / seconds / self.machine.operations_per_second)

    def finish(self, name: str) -> int:
        summary = {
            "bench": name,
            "shape": self.shape,
            "dtype": self.args.dtype,
            "device": self.args.device,
            "machine": self.machine.name,
            "cores": os.cpu_count(),
            "threads": self.threads,
            "torch": torch.__version__,
            "versions": {one.name: one.version for one in self.contestants},
            "copy_gb_per_s": rounded(self.machine.bytes_per_second / 1e9),
            "read_gb_per_s": rounded(self.reading / 1e9),
            "gemm_tflop_per_s": rounded(self.machine.operations_per_second / 1e12),
            "results": self.results,
        }
        print(json.dumps(summary))
        return 0


def latency(arguments: list[str]) -> int:
    """One request, at several lengths of its prompt."""
    return _decoding("latency", arguments, [1], [128, 2048, 8192] if torch.cuda.is_available() else [128, 1024])


def throughput(arguments: list[str]) -> int:
    """Several requests at once, all alike."""
    sequences = [1, 4, 16, 32, 64, 128] if torch.cuda.is_available() else [1, 4, 16]
    return _decoding("throughput", arguments, sequences, [128])


def _decoding(name: str, arguments: list[str], all_sequences: list[int], contexts: list[int]) -> int:
    parser = _parser(name)
    parser.add_argument("--sequences", type=int, nargs="*", default=all_sequences, help="requests at once")
    parser.add_argument("--context", type=int, nargs="*", default=contexts, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    args = _parsed(parser, arguments)
    with Run(args, max(args.sequences)) as run:
        _equal(run)
        return run.finish(name)


def _equal(run: Run) -> None:
    args, text = run.args, run.config.text_config
    itemsize = getattr(torch, args.dtype).itemsize
    print("| sequences | prompt | who | first token s | of GEMM | step ms | tok/s | GB a step | GB/s | of reading |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for sequences in args.sequences:
        for context in args.context:
            ids = decode.prompts(sequences, context, text.vocab_size)
            experts = run.contestants[0].ask("count", ids, args.tokens)["experts"]
            answers = run.ask("decode", ids, args.tokens)
            nbytes = decode.bytes_a_step(text, sequences, context + args.tokens // 2, experts, itemsize)
            operations = sequences * decode.prefill_operations(text, context)
            for who, given in answers.items():
                first, step = (statistics.median(answer[key] for answer in given) for key in ("first", "step"))
                result = {
                    "sequences": sequences,
                    "context": context,
                    "who": who,
                    "first_token_s": rounded(first),
                    "first_token_percent_of_gemm": run.of_product(operations, first),
                    "step_ms": rounded(step * 1e3),
                    "step_ms_range": [rounded(1e3 * pick(answer["step"] for answer in given)) for pick in (min, max)],
                    "tokens_per_second": rounded(sequences / step),
                    "experts_read": experts and round(experts, 1),
                    "gb_a_step": rounded(nbytes / 1e9),
                    "gb_per_s": rounded(nbytes / step / 1e9),
                    "percent_of_reading": run.of_reading(nbytes, step),
                }
                run.results.append(result)
                print(
                    f"| {sequences} | {context} | {who} | {first:.3f} | {result['first_token_percent_of_gemm']} % "
                    f"| {step * 1e3:.1f} | {sequences / step:.1f} | {nbytes / 1e9:.2f} | {result['gb_per_s']} "
                    f"| {result['percent_of_reading']} % |",
                    flush=True,
                )


def mixed(arguments: list[str]) -> int:
    """Requests of all kinds that come at once: short and long prompts and answers, a third of them with a picture."""
    parser = _parser("mixed")
    cuda = torch.cuda.is_available()
    parser.add_argument("--requests", type=int, default=96 if cuda else 12)
    parser.add_argument("--longest", type=int, default=2048 if cuda else 256, help="tokens of the longest prompt")
    parser.add_argument("--side", type=int, default=64 if cuda else 16, help="patches on a side of the largest picture")
    parser.add_argument("--tokens", type=int, default=128 if cuda else 24, help="new tokens of the longest answer")
    args = _parsed(parser, arguments)
    if "vllm" in args.peer:
        parser.error("--peer vllm: only decoding is measured there; try latency or throughput")
    if args.side < 8 or args.side % 8:
        parser.error("--side must be a multiple of 8")
    with Run(args, args.requests) as run:
        _mixed(run)
        return run.finish("mixed")


def _mixed(run: Run) -> None:
    args = run.args
    requests = mixture(run.config, args.requests, args.longest, args.side, args.tokens)
    least = least_seconds(run, requests)
    count, tokens = len(requests), sum(request["max_new_tokens"] for request in requests)
    read, pictures = sum(len(request["ids"]) for request in requests), sum(bool(r["side"]) for r in requests)
    print(f"{count} requests, {pictures} with a picture, {read} tokens of prompts, {tokens} new tokens\n")
    print("| who | s | requests/s | new tok/s | first token s, median | latest | of the ceiling |")
    print("|---|---|---|---|---|---|---|")
    for who, given in run.ask("mixed", requests).items():
        seconds = statistics.median(answer["seconds"] for answer in given)
        firsts = [statistics.median(answer["first"]) for answer in given], [max(answer["first"]) for answer in given]
        median, latest = map(statistics.median, firsts)
        result = {
            "who": who,
            "requests": count,
            "seconds": rounded(seconds),
            "requests_per_second": rounded(count / seconds),
            "tokens_per_second": rounded(tokens / seconds),
            "first_token_s": rounded(median),
            "last_first_token_s": rounded(latest),
            "percent_of_ceiling": rounded(100 * least / seconds),
        }
        run.results.append(result)
        print(
            f"| {who} | {seconds:.2f} | {count / seconds:.2f} | {tokens / seconds:.1f} | {median:.2f} | {latest:.2f} "
            f"| {result['percent_of_ceiling']} % |",
            flush=True,
        )


def mixture(config: Config, count: int, longest: int, side: int, tokens: int) -> list[Result]:
    """The same requests each time: lengths spread evenly over their logarithm, pictures of three sizes."""
    pad, words = config.media_placeholder_token_id, config.text_config.vocab_size - 300
    chance, requests = random.Random(count), []
    for number in range(count):
        ids = [chance.randrange(words) for _ in range(round(longest ** chance.uniform(0.3, 1)))]
        picture = 0 if number % 3 else side // chance.choice([1, 2, 4])
        requests.append(
            {
                "ids": [*ids[:2], *[pad] * num_image_tokens((picture, picture)), *ids[2:]],
                "max_new_tokens": max(2, round(tokens * chance.uniform(0.25, 1))),
                "side": picture,
            }
        )
    return requests


def least_seconds(run: Run, requests: Sequence[Result]) -> float:
    """Every product of prompts and pictures at the speed of a large one, then all decoding together as long as it can,
    each step reading its weights once, of the experts no more than one token needs."""
    text = run.config.text_config
    operations = sum(decode.prefill_operations(text, len(request["ids"])) for request in requests)
    operations += sum(vision.operations(run.config, request["side"]) for request in requests if request["side"])
    itemsize = getattr(torch, run.args.dtype).itemsize
    nbytes = 0.0
    for step in range(1, max(request["max_new_tokens"] for request in requests)):
        going = [request for request in requests if request["max_new_tokens"] > step]
        context = round(statistics.mean(len(request["ids"]) + step for request in going))
        nbytes += decode.bytes_a_step(text, len(going), context, text.num_experts_per_tok, itemsize)
    return operations / run.machine.operations_per_second + nbytes / run.reading


def _parser(name: str) -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog=f"scripts/bench {name}")
    parser.add_argument("--layers", type=int, default=0, help="text layers (default: all 27 on a GPU, 6 on a CPU)")
    parser.add_argument("--blocks", type=int, default=27 if cuda else 1, help="vision blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--peer", nargs="*", default=[], choices=NAMES[1:], help="who else decodes the same weights")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="the Python that vLLM is installed for")
    parser.add_argument("--divide", type=int, default=1, help="divide the published widths, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=0, help="fewer ids than published, for less memory")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of random weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cache", type=Path, default=checkpoint.CACHE)
    return parser


def _parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.vocabulary and not 512 <= args.vocabulary <= checkpoint.PUBLISHED["text_config"]["vocab_size"]:
        parser.error("--vocabulary is 512 or more, and not more than published")
    if "vllm" in args.peer and (args.model or not args.vllm):
        parser.error("--peer vllm needs --vllm and weights made here")
    return args
