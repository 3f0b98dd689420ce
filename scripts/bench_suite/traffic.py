"""`scripts/bench latency`, `throughput` and `mixed`: first tokens and tokens a second, beside what the machine can do.

Random weights at the published widths, as many layers as are asked for, in bfloat16 or quantised (``--form``). The
engine and its peers (``--peer``) take turns, so that a slow minute of the machine meets all of them. The weights are
those of a model that counts, so everybody's last tokens are checked. What they share is measured in every round: bytes
a second of reading; and once, of a copy, and operations a second of a large product.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kimi_vl.model.config import Config, num_image_tokens

from . import checkpoint, conditions, decode, kernels, vision
from .contest import Answers, Contest, Question
from .contestants import NAMES, QUANTIZED, Process
from .gguf_file import TYPES, Source
from .load import rounded

Result = dict[str, Any]


class Run:
    """The contestants and the ceilings; the contestants end with the block."""

    def __init__(self, args: argparse.Namespace, most_sequences: int):
        device = torch.device(args.device)
        self.shape, folders = _checkpoints(args)
        self.args, self.config = args, Config.from_directory(folders[args.form[0]])
        self.itemsize = getattr(torch, args.dtype).itemsize
        self.machine = kernels.machine(device)
        self.reading = self._read_bandwidth()
        self.loads = [conditions.load_average()]
        self.results: list[Result] = []
        self._weights = {form: Source(folder).weights_read() for form, folder in folders.items()}
        common = {
            "device": args.device,
            "dtype": args.dtype,
            "sequences": max(64, most_sequences),
            "threads": args.threads,
        }
        pythons = {"vllm": args.vllm, "llamacpp": args.llamacpp}
        starts = {}
        self.forms: dict[str, str] = {}
        for kind in ("kimi_vl", *args.peer):
            for form in args.form if kind in QUANTIZED else ["bf16"]:
                name = kind if form == "bf16" else f"{kind} {form}"
                python = pythons.get(kind, "")
                starts[name] = partial(Process, kind, folders[form], form=form, python=python, **common)
                self.forms[name] = form
        self.threads = args.threads or torch.get_num_threads()
        self.contest = Contest(starts, apart=args.apart, neighbour=args.neighbour, wait=args.wait)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.contest.end()

    def ask(self, *questions: Question) -> list[Answers]:
        """To every question everybody's answers, round after round."""
        answers = self.contest.ask(questions, self.args.rounds, self._measure_reading)
        self.loads.append(conditions.load_average())
        return answers

    def _measure_reading(self) -> None:
        self.reading = max(self.reading, self._read_bandwidth())

    def _read_bandwidth(self) -> float:
        """Of 1 GiB; a model that is a part of the published one's size is held to a part of it."""
        return decode.read_bandwidth(self.machine.device, (1 << 30) // self.args.divide)

    def nbytes(self, name: str, sequences: int, context: int, experts: float) -> float:
        """What a step of a contestant has to read of weights, as it holds them, and of latents."""
        text = self.config.text_config
        form = self.forms[name]
        always, routed = self.contest.weights.get(name) or self._weights[form]
        weights = always + routed * experts / text.n_routed_experts
        wider = self.itemsize / 2
        latents = sequences * context * text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim)
        return weights * (wider if form == "bf16" else 1) + self.itemsize * latents

    def ours(self, name: str) -> str:
        """Our engine with weights of the form that a contestant has, or of the first one."""
        form = self.forms[name]
        return next((one for one in self.forms if one.startswith("kimi_vl") and self.forms[one] == form), "kimi_vl")

    def of_reading(self, nbytes: float, seconds: float) -> float:
        return rounded(100 * nbytes / seconds / self.reading)

    def of_product(self, operations: float, seconds: float) -> float:
        return rounded(100 * operations / seconds / self.machine.operations_per_second)

    def conditions(self) -> str:
        """In words, for people."""
        others = self.contest.others or [float("nan")]
        lines = [
            f"{self.shape}, {self.args.dtype}, forms {' '.join(self.args.form)}; {self.machine.name}, "
            f"{os.cpu_count()} cores, {self.threads} threads, torch {torch.__version__}",
            ", ".join(f"{name} {version}" for name, version in self.contest.versions.items()),
            f"reading {self.reading / 1e9:.1f} GB/s, copy {self.machine.bytes_per_second / 1e9:.1f} GB/s, "
            f"bfloat16 product {self.machine.operations_per_second / 1e12:.2f} TFLOP/s",
            f"load average {self.loads[0]} before, {self.loads[-1]} after; other processes kept "
            f"{statistics.median(others)} cores busy in the median turn, {max(others)} at most; median of "
            f"{self.args.rounds} rounds" + (", beside one process that keeps a core busy" * self.args.neighbour),
        ]
        return "\n".join(lines)

    def finish(self, name: str) -> int:
        print(f"\n{self.conditions()}")
        summary = {
            "bench": name,
            "shape": self.shape,
            "dtype": self.args.dtype,
            "device": self.args.device,
            "machine": self.machine.name,
            "cores": os.cpu_count(),
            "threads": self.threads,
            "rounds": self.args.rounds,
            "apart": self.args.apart,
            "neighbour": self.args.neighbour,
            "torch": torch.__version__,
            "versions": self.contest.versions,
            "ready_s": self.contest.ready_s,
            "load_average": self.loads,
            "others_cores": self.contest.others,
            "copy_gb_per_s": rounded(self.machine.bytes_per_second / 1e9),
            "read_gb_per_s": rounded(self.reading / 1e9),
            "gemm_tflop_per_s": rounded(self.machine.operations_per_second / 1e12),
            "results": self.results,
        }
        print(json.dumps(summary))
        return 0


def _checkpoints(args: argparse.Namespace) -> tuple[str, dict[str, Path]]:
    """In words what the model is, and its folders by the forms of weights that somebody decodes."""
    if args.model:
        return str(args.model), {"bf16": args.model}
    layers = args.layers or (27 if torch.device(args.device).type == "cuda" else 6)
    forms = [*args.form, *(["bf16"] if set(args.peer) - set(QUANTIZED) else [])]
    made = {
        form: checkpoint.with_layers(
            args.cache, layers, args.blocks, args.divide, args.vocabulary, None if form == "bf16" else form
        )
        for form in forms
    }
    return made[forms[0]].shape, {form: one.folder for form, one in made.items()}


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
    parser.add_argument("--picture", type=int, default=0, help="also a picture with so many patches on a side")
    args = _parsed(parser, arguments)
    if args.picture % 2 or (args.picture and set(args.peer) - {"transformers"}):
        parser.error("--picture is an even number, and not for --peer vllm or llamacpp")
    with Run(args, max(args.sequences)) as run:
        _equal(run)
        if args.picture:
            _picture(run)
        return run.finish(name)


def _equal(run: Run) -> None:
    args, text = run.args, run.config.text_config
    sizes = [(sequences, context) for sequences in args.sequences for context in args.context]
    prompts = [decode.prompts(*size, text.vocab_size) for size in sizes]
    counts = run.contest.once([("count", ids, args.tokens) for ids in prompts])
    given = run.ask(*(("decode", ids, args.tokens) for ids in prompts))
    print("| sequences | prompt | who | experts read | first token s | of GEMM | step ms (least to most) | tok/s "
          "| GB a step | GB/s | of reading | of kimi_vl's tok/s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for size, ids, counted, answers in zip(sizes, prompts, counts, given, strict=True):
        for who in answers:
            if not args.model:
                _check(who, ids, answers[who], args.tokens)
            result = _figures(run, size, who, counted, answers)
            run.results.append(result)
            print(_row(result), flush=True)


def _check(who: str, ids: Sequence[list[int]], answers: Sequence[Result], tokens: int) -> None:
    expected = [prompt[-1] + tokens for prompt in ids]
    for answer in answers:
        wrong = sum(given != wanted for given, wanted in zip(answer["last"], expected, strict=True))
        if wrong:
            raise SystemExit(f"error: {who} gave {wrong} of {len(ids)} sequences other tokens than the weights ask for")


def _figures(run: Run, size: tuple[int, int], who: str, counted: dict[str, Result], answers: Answers) -> Result:
    sequences, context = size
    text, given = run.config.text_config, answers[who]
    even = decode.distinct_experts(text, sequences)
    experts = counted[who]["experts"]
    likely = experts or counted[run.ours(who)]["experts"] or even
    nbytes = run.nbytes(who, sequences, context + run.args.tokens // 2, likely)
    operations = sequences * decode.prefill_operations(text, context)
    first, step = (statistics.median(answer[key] for answer in given) for key in ("first", "step"))
    of_ours = [ours["step"] / its["step"] for ours, its in zip(answers[run.ours(who)], given, strict=True)]
    return {
        "sequences": sequences,
        "context": context,
        "who": who,
        "first_token_s": rounded(first),
        "first_token_percent_of_gemm": run.of_product(operations, first),
        "step_ms": rounded(step * 1e3),
        "step_ms_range": [rounded(1e3 * pick(answer["step"] for answer in given)) for pick in (min, max)],
        "tokens_per_second": rounded(sequences / step),
        "experts_read": experts and round(experts, 2),
        "experts_if_even": round(even, 2),
        "experts_off_percent": experts and rounded(100 * (experts / even - 1)),
        "gb_a_step": rounded(nbytes / 1e9),
        "gb_per_s": rounded(nbytes / step / 1e9),
        "percent_of_reading": run.of_reading(nbytes, step),
        "times_kimi_vl": rounded(statistics.median(of_ours)),
        "first_token_times_kimi_vl": rounded(
            statistics.median(
                ours["first"] / its["first"] for ours, its in zip(answers[run.ours(who)], given, strict=True)
            )
        ),
    }


def _row(result: Result) -> str:
    low, high = result["step_ms_range"]
    experts = "not counted"
    if result["experts_read"]:
        experts = f"{result['experts_read']:.1f} ({result['experts_off_percent']:+.1f} % of even)"
    cells = [
        result["sequences"],
        result["context"],
        result["who"],
        experts,
        f"{result['first_token_s']:.3f}",
        f"{result['first_token_percent_of_gemm']:.0f} %",
        f"{result['step_ms']:.1f} ({low:.1f} to {high:.1f})",
        f"{result['tokens_per_second']:.1f}",
        f"{result['gb_a_step']:.2f}",
        f"{result['gb_per_s']:.1f}",
        f"{result['percent_of_reading']:.0f} %",
        f"{result['times_kimi_vl']:.2f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _picture(run: Run) -> None:
    """The first token of a question about one picture."""
    side, pad = run.args.picture, run.config.media_placeholder_token_id
    ids = [1, 2, *[pad] * num_image_tokens((side, side)), *range(3, 20)]
    (answers,) = run.ask(("mixed", [{"ids": ids, "side": side, "max_new_tokens": 2}]))
    print(f"\n| first token of a picture of {14 * side} x {14 * side} pixels, {len(ids)} tokens | s (least to most) |")
    print("|---|---|")
    for who, given in answers.items():
        firsts = [answer["first"][0] for answer in given]
        median, low, high = statistics.median(firsts), min(firsts), max(firsts)
        run.results.append({"who": who, "picture": side, "first_token_s": rounded(median)})
        print(f"| {who} | {median:.2f} ({low:.2f} to {high:.2f}) |", flush=True)


def mixed(arguments: list[str]) -> int:
    """Requests of all kinds that come at once: short and long prompts and answers, a third of them with a picture."""
    parser = _parser("mixed")
    cuda = torch.cuda.is_available()
    parser.add_argument("--requests", type=int, default=96 if cuda else 12)
    parser.add_argument("--longest", type=int, default=2048 if cuda else 256, help="tokens of the longest prompt")
    parser.add_argument("--side", type=int, default=64 if cuda else 16, help="patches on a side of the largest picture")
    parser.add_argument("--tokens", type=int, default=128 if cuda else 24, help="new tokens of the longest answer")
    args = _parsed(parser, arguments)
    if {"vllm", "llamacpp"} & set(args.peer):
        parser.error("--peer vllm and llamacpp: only decoding is measured there; try latency or throughput")
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
    (answers,) = run.ask(("mixed", requests))
    for who, given in answers.items():
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
    parser.add_argument("--llamacpp", default="", metavar="PYTHON", help="the Python that llama.cpp is built for")
    forms = [form or "bf16" for form in TYPES]
    parser.add_argument("--form", nargs="+", default=["bf16"], choices=forms, help="weights of ours and of llama.cpp")
    parser.add_argument("--apart", action="store_true", help="one contestant in memory at a time, started for its turn")
    parser.add_argument("--neighbour", action="store_true", help="beside one process that keeps a core busy")
    parser.add_argument("--wait", action="store_true", help="begin each round when a line comes on standard input")
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
    for name in {"vllm", "llamacpp"} & set(args.peer):
        if args.model or not getattr(args, name):
            parser.error(f"--peer {name} needs --{name} and weights made here")
    if args.model and args.form != ["bf16"]:
        parser.error("--form is for weights made here")
    return args
