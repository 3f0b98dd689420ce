"""Who decodes for `scripts/bench latency`, `throughput` and `mixed`, each in a process of its own.

One process for all would slow them down: two pools of threads that both want every core no longer wait for each other
awake. A contestant reads a question a line and answers it in a line; while it is not its turn it is stopped, since some
wait for work with a core in use.

Only the standard library is imported before a contestant is known, so that one may live in another environment.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import derived

NAMES = ("kimi_vl", "transformers", "vllm", "llamacpp")
QUANTIZED = ("kimi_vl", "llamacpp")
"""Those who decode quantised weights as well."""


class Contestant(Protocol):
    def decode(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """``max_new_tokens`` after each of some prompts of one length: ``first``, seconds to the first token of the
        last sequence, ``step``, seconds a token after that, and ``last``, the last token of each."""
        ...

    def count(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """``experts``: how many a layer reads in a step in the mean, or none where that is hidden."""
        ...

    def mixed(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Requests that come all at once, each ``ids``, ``max_new_tokens`` and ``side``, the patches on a side of its
        picture (0: none): ``seconds`` for all of them, and ``first``, seconds to the first token of each."""
        ...


class Process:
    """A contestant as the one who asks sees it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        device: str,
        dtype: str,
        sequences: int,
        threads: int,
        form: str = "bf16",
        python: str = "",
    ):
        command = [python or sys.executable, "-P", "-m", f"{__package__}.contestants", name, str(folder)]
        command += ["--device", device, "--dtype", dtype, "--sequences", str(sequences), "--threads", str(threads)]
        command += ["--form", form]
        self.kind, self.form, self.folder = name, form, folder
        self.name = name if form == "bf16" else f"{name} {form}"
        began = time.monotonic()
        # a group of its own, which takes in what a contestant starts
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        greeting = self._answer()
        self.version: str = greeting["version"]
        # bytes of weights that every step reads, and of all routed experts', where they are not the checkpoint's
        self.weights: tuple[int, int] | None = greeting.get("weights") and tuple(greeting["weights"])
        self.ready_s = time.monotonic() - began

    @property
    def group(self) -> int:
        """Of the processes that belong to it."""
        return self._process.pid

    def ask(self, question: str, *values: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        self._process.stdin.write(json.dumps([question, *values]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name} ended with status {self._process.wait()}")
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)


# ---------------------------------------------------------------------------------------------
# In the process


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--form", required=True)
    args = parser.parse_args()
    _end_with_parent()
    # answers leave by a descriptor of their own: what libraries print goes elsewhere
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    make: Callable[[argparse.Namespace], tuple[str, Contestant]] = {
        "kimi_vl": _kimi_vl,
        "transformers": _transformers,
        "vllm": _vllm,
        "llamacpp": _llamacpp,
    }[args.name]
    version, contestant = make(args)
    greeting = {"version": version, "weights": getattr(contestant, "weights", None)}
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        question, *values = json.loads(line)
        print(json.dumps(getattr(contestant, question)(*values)), file=answers, flush=True)
    return 0


def _end_with_parent() -> None:
    """Where Linux does that: a contestant that is stopped would outlive a benchmark that was killed."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGKILL))


def _kimi_vl(args: argparse.Namespace) -> tuple[str, Contestant]:
    import torch

    from kimi_vl import __version__
    from kimi_vl.engine.engine import Engine, EngineOptions
    from kimi_vl.weights import loader

    from . import decode, ladder

    if args.threads:
        torch.set_num_threads(args.threads)
    model = loader.load(args.folder, dtype=getattr(torch, args.dtype), device=torch.device(args.device))
    options = EngineOptions(prefix_caching=False, max_num_seqs=args.sequences, embedding_bytes=0)
    engine = Engine(model, model.config.text_config.vocab_size, options)

    pictured = itertools.count()

    class KimiVL:
        def decode(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            first, step, last = decode.run_engine(engine, ids, max_new_tokens)
            return {"first": first, "step": step, "last": last}

        def count(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            """None where graphs hide it."""
            with decode.counted_experts(engine, len(ids)) as counts:
                decode.run_engine(engine, ids, max_new_tokens)
            return {"experts": statistics.mean(counts) if counts else None}

        def mixed(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
            asked = []
            for request in requests:
                # never one that was encoded before
                pictures = [ladder.square_picture(request["side"], next(pictured))] if request["side"] else []
                asked.append(
                    (request["ids"], pictures, request["max_new_tokens"], decode.Clock(request["max_new_tokens"]))
                )
            began = time.perf_counter()
            for request in asked:
                engine.submit(*request)
            clocks = [clock for *_, clock in asked]
            for clock in clocks:
                clock.wait()
            seconds = max(clock.times[-1] for clock in clocks) - began
            return {"seconds": seconds, "first": [clock.times[0] - began for clock in clocks]}

    return __version__, KimiVL()


def _transformers(args: argparse.Namespace) -> tuple[str, Contestant]:
    import torch
    import transformers

    from kimi_vl.hf import KimiVLForConditionalGeneration

    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, args.dtype)
    model = KimiVLForConditionalGeneration.from_pretrained(args.folder, dtype=dtype, device_map=args.device).eval()
    return transformers.__version__, of_transformers(model)


def of_transformers(model: Any) -> Contestant:
    """``generate`` of a model of transformers."""
    import torch
    import transformers

    from . import ladder

    class Moments(transformers.StoppingCriteria):
        """Notes when tokens come, and stops nothing."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    class Transformers:
        def decode(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            began = time.perf_counter()
            times, last = self._times(ids, max_new_tokens)
            return {"first": times[0] - began, "step": (times[-1] - times[0]) / (max_new_tokens - 1), "last": last}

        def count(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            counts: list[int] = []

            def note(_: Any, arguments: tuple[Any, ...]) -> None:
                chosen = arguments[1]  # (T, K)
                if len(chosen) == len(ids):
                    counts.append(chosen.unique().numel())

            experts = [module for name, module in model.named_modules() if name.endswith("mlp.experts")]
            hooks = [module.register_forward_pre_hook(note) for module in experts]
            self._times(ids, max_new_tokens)
            for hook in hooks:
                hook.remove()
            return {"experts": statistics.mean(counts) if counts else None}

        def mixed(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
            """One after another: prompts with pictures cannot share a batch there without padding."""
            began, first = time.perf_counter(), []
            for request in requests:
                side, pixels = request["side"], {}
                if side:
                    values = torch.from_numpy(ladder.square_picture(side).pixel_values).to(model.device)
                    pixels = {"pixel_values": values, "image_grid_hws": torch.tensor([[side, side]])}
                first.append(self._times([request["ids"]], request["max_new_tokens"], **pixels)[0][0] - began)
            return {"seconds": time.perf_counter() - began, "first": first}

        @torch.inference_mode()
        def _times(self, ids: Sequence[list[int]], count: int, **more: Any) -> tuple[list[float], list[int]]:
            inputs, moments = torch.tensor(ids, device=model.device), Moments()
            more |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            mask, noting = torch.ones_like(inputs), transformers.StoppingCriteriaList([moments])
            found = model.generate(input_ids=inputs, attention_mask=mask, stopping_criteria=noting, **more)
            return moments.times, found[:, -1].tolist()

    return Transformers()


def _vllm(args: argparse.Namespace) -> tuple[str, Contestant]:
    """Decodes text alone, as a model of DeepSeek-V3's kind, which is what the decoder is.

    On a CPU it gets what its documentation advises: Intel's OpenMP, and every core, of which it would keep one free.
    """
    cores = args.threads or os.cpu_count() or 1
    advised = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    advised["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if openmp.exists():
        advised["LD_PRELOAD"] = str(openmp)  # for the process that it starts
    for name, value in advised.items():
        os.environ.setdefault(name, value)
    import vllm  # pyright: ignore[reportMissingImports]

    model = vllm.LLM(
        model=str(derived.beside(args.folder, "-decoder", lambda part: _decoder_alone(args.folder, part))),
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_num_seqs=args.sequences,
        max_model_len=16384,
        enable_prefix_caching=False,
    )

    class VLLM:
        def decode(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            first, _ = self._seconds(ids, 1)
            all_of_them, last = self._seconds(ids, max_new_tokens)
            return {"first": first, "step": (all_of_them - first) / (max_new_tokens - 1), "last": last}

        def count(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
            return {"experts": None}  # compiled away

        def mixed(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
            raise NotImplementedError("its pictures are not measured")

        def _seconds(self, ids: Sequence[list[int]], count: int) -> tuple[float, list[int]]:
            exactly = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            began = time.perf_counter()
            found = model.generate([{"prompt_token_ids": prompt} for prompt in ids], exactly, use_tqdm=False)
            return time.perf_counter() - began, [answer.outputs[0].token_ids[-1] for answer in found]

    return vllm.__version__, VLLM()


def _decoder_alone(folder: Path, target: Path) -> None:
    """The checkpoint's decoder as a checkpoint of its own."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name.removeprefix("language_model."): value for name, value in load_file(path).items()}
        tensors = {name: value for name, value in tensors.items() if name.startswith(("model.", "lm_head."))}
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    kind = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(text | kind, indent=1), encoding="utf-8")


def _llamacpp(args: argparse.Namespace) -> tuple[str, Contestant]:
    """Decodes text alone."""
    from . import llamacpp

    contestant = llamacpp.LlamaCpp(args.folder, None if args.form == "bf16" else args.form, args.threads)
    return contestant.version, contestant


if __name__ == "__main__":
    sys.exit(main())
