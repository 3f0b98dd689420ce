"""llama.cpp as a contestant, by the functions of its library that llama-cpp-python binds.

Greedy decoding of all sequences in one batch, a token of each a step, with the library's own defaults: mapped files,
weights repacked where it does that, flash attention where it thinks fit.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import derived, gguf_file

_ROOM = 256  # a sequence's context is cut in pieces of so many tokens


class _Tensor(ctypes.Structure):
    """The beginning of a ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class LlamaCpp:
    """``form`` is that of the checkpoint in ``folder``, and decides llama.cpp's own: bf16, q8_0 or q4_0."""

    def __init__(self, folder: Path, form: str | None, threads: int):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._library: Any = llama_cpp
        self._base = ctypes.CDLL(str(Path(llama_cpp.__path__[0], "lib", "libggml-base.so")))
        self._base.ggml_get_name.restype = ctypes.c_char_p
        kind = gguf_file.TYPES[form]
        path = derived.beside(
            folder, f"-{kind.lower()}.gguf", lambda part: gguf_file.write(folder, part, form, self._base)
        )
        self.weights = gguf_file.weights_read(path)
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads or os.cpu_count() or 1
        self._contexts: dict[tuple[int, int], Any] = {}
        self.version = f"{importlib.metadata.version('llama-cpp-python')} {kind.lower()}"

    def decode(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        context = self._context(len(ids), len(ids[0]) + max_new_tokens)
        began = time.perf_counter()
        tokens = self._read(context, ids)
        first = time.perf_counter()
        for step in range(max_new_tokens - 1):
            tokens = self._step(context, tokens, len(ids[0]) + step)
        step_s = (time.perf_counter() - first) / (max_new_tokens - 1)
        return {"first": first - began, "step": step_s, "last": tokens}

    def mixed(self, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError("its pictures are not measured")

    def count(self, ids: Sequence[list[int]], max_new_tokens: int) -> dict[str, Any]:
        """In a context of its own, which stops at every layer to be asked."""
        counts: list[int] = []

        def look(tensor: int, asking: bool, _: Any) -> bool:
            chosen = self._base.ggml_get_name(ctypes.c_void_p(tensor)).startswith(b"ffn_moe_topk")
            if chosen and not asking:
                counts.append(self._distinct(tensor))
            return chosen if asking else True

        context = self._new_context(len(ids), len(ids[0]) + max_new_tokens, look)
        tokens = self._read(context, ids)
        counts.clear()
        for step in range(max_new_tokens - 1):
            tokens = self._step(context, tokens, len(ids[0]) + step)
        self._library.llama_free(context)
        return {"experts": sum(counts) / len(counts) if counts else None}

    def _distinct(self, address: int) -> int:
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        rows = np.empty((tensor.ne[1], tensor.ne[0]), np.int32)
        for number, row in enumerate(rows):
            self._base.ggml_backend_tensor_get(
                ctypes.c_void_p(address), row.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_size_t(number * tensor.nb[1]), ctypes.c_size_t(row.nbytes),
            )  # fmt: skip
        return len(np.unique(rows))

    def _context(self, sequences: int, length: int) -> Any:
        """Empty, from an earlier question where it has the size."""
        room = -(-length // _ROOM) * _ROOM
        if (sequences, room) not in self._contexts:
            self._contexts[sequences, room] = self._new_context(sequences, room)
        context = self._contexts[sequences, room]
        self._library.llama_memory_clear(self._library.llama_get_memory(context), False)
        return context

    def _new_context(self, sequences: int, room: int, look: Any = None) -> Any:
        params = self._library.llama_context_default_params()
        room = -(-room // _ROOM) * _ROOM
        params.n_ctx, params.n_seq_max, params.n_batch = sequences * room, sequences, max(params.n_batch, room)
        params.n_threads = params.n_threads_batch = self._threads
        if look:
            self._look = params.cb_eval = self._library.ggml_backend_sched_eval_callback(look)
        return self._library.llama_init_from_model(self._model, params)

    def _read(self, context: Any, ids: Sequence[list[int]]) -> list[int]:
        """Prompts, as many whole ones at a time as a batch takes; the first new token of each."""
        at_once = max(1, self._library.llama_n_batch(context) // len(ids[0]))
        tokens: list[int] = []
        for begin in range(0, len(ids), at_once):
            some = ids[begin : begin + at_once]
            entries = [
                (token, place, begin + number, place == len(prompt) - 1)
                for number, prompt in enumerate(some)
                for place, token in enumerate(prompt)
            ]
            tokens += self._compute(context, entries)
        return tokens

    def _step(self, context: Any, tokens: Sequence[int], place: int) -> list[int]:
        return self._compute(context, [(token, place, number, True) for number, token in enumerate(tokens)])

    def _compute(self, context: Any, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest token after each of ``entries`` (token, position, sequence, whether it is asked for)."""
        batch = self._library.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for number, (token, place, sequence, wanted) in enumerate(entries):
            batch.token[number], batch.pos[number], batch.n_seq_id[number] = token, place, 1
            batch.seq_id[number][0], batch.logits[number] = sequence, wanted
        failed = self._library.llama_decode(context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        found = [self._likeliest(context, number) for number, entry in enumerate(entries) if entry[3]]
        self._library.llama_batch_free(batch)
        return found

    def _likeliest(self, context: Any, number: int) -> int:
        logits = self._library.llama_get_logits_ith(context, number)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
