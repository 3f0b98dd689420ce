"""The decoder of a checkpoint as a GGUF file for llama.cpp, with the same weights.

Integers of 4 bits with a scale for 32 inputs are what q4_0 is, and those of 8 bits fit q8_0: both are moved, not
quantised again. What the checkpoint keeps in bfloat16 becomes what llama.cpp's own quantiser makes of it. Runs in the
environment of llama.cpp, which has no torch; a tensor at a time is in memory.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # weights that share a scale in q4_0 and q8_0
TYPES = {None: "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""What a form of the checkpoint becomes."""
_FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # as llama.cpp numbers them
_ALL, _ROWS = slice(None), 8192
_KINDS = {"F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}
_LAYER = "language_model.model.layers"
# In a layer, by llama.cpp's names. Norms and the router stay floating-point.
_FLOATING = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_MATRICES = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_PARTS = ("gate", "up", "down")  # of an MLP

Bytes = NDArray[np.uint8]
Quantize = Callable[[NDArray[np.float32], str], Bytes]


class Source:
    """The tensors of a checkpoint's folder: bfloat16, float32, and packed integers of compressed-tensors' form."""

    def __init__(self, folder: Path):
        self._tensors: dict[str, tuple[Path, str, tuple[int, ...], int]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin = 8 + size + entry["data_offsets"][0]
                self._tensors[name] = path, entry["dtype"], tuple(entry["shape"]), begin

    def weights_read(self) -> tuple[int, int]:
        """Bytes of the weights that every decode step reads, and of all routed experts'."""
        always = routed = 0
        for name, (_, kind, shape, _) in self._tensors.items():
            nbytes = np.dtype(_KINDS[kind]).itemsize * int(np.prod(shape))
            if ".mlp.experts." in name:
                routed += nbytes
            elif name.startswith("language_model.") and ".embed_tokens." not in name:
                always += nbytes
        return always, routed

    def shape(self, name: str) -> tuple[int, ...]:
        packed = self._tensors.get(f"{name}_packed")
        return self._tensors[name][2] if packed is None else tuple(self._raw(f"{name}_shape").tolist())

    def _raw(self, name: str) -> NDArray[Any]:
        path, kind, shape, begin = self._tensors[name]
        return np.memmap(path, _KINDS[kind], "r", begin, shape)

    def floating(self, name: str, rows: slice = _ALL) -> NDArray[np.float32]:
        if f"{name}_packed" in self._tensors:
            integers, scales = self.integers(name, rows)
            groups = integers.reshape(*scales.shape, -1) * scales[..., None]
            return groups.reshape(integers.shape)
        return _widened(self._raw(name)[rows])

    def integers(self, name: str, rows: slice = _ALL) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """(O, I) and their scales (O, G)."""
        inputs = self.shape(name)[1]
        codes = self._raw(f"{name}_packed").view(np.uint8)[rows]  # (O, I * bits / 8)
        if codes.shape[1] == inputs:
            integers = (codes ^ 128).view(np.int8)
        else:
            integers = np.stack((codes & 15, codes >> 4), -1).reshape(-1, inputs).view(np.int8) - np.int8(8)
        return integers, _widened(self._raw(f"{name}_scale")[rows])

    def bits(self, name: str) -> int:
        """Of its integers; 16 where it has none."""
        if f"{name}_packed" not in self._tensors:
            return 16
        return 8 * self._raw(f"{name}_packed").nbytes // int(np.prod(self.shape(name)))

    def encoded(self, name: str, kind: str, quantize: Quantize) -> Bytes:
        """The bytes of a matrix as a type of GGUF."""
        if kind == "BF16" and self.bits(name) == 16:
            return np.ascontiguousarray(self._raw(name)).view(np.uint8).reshape(-1)
        if (kind, self.bits(name)) in (("Q4_0", 4), ("Q8_0", 8)):
            return moved(*self.integers(name), kind)
        rows = range(0, self.shape(name)[0], _ROWS)  # of a vocabulary all in float32 are 1.3 GB
        return np.concatenate([quantize(self.floating(name, slice(at, at + _ROWS)), kind) for at in rows])


def _widened(values: NDArray[Any]) -> NDArray[np.float32]:
    """Of bfloat16, which numpy does not have."""
    return (values.astype("<u4") << 16).view("<f4") if values.dtype == "<u2" else np.asarray(values, "<f4")


def moved(integers: NDArray[np.int8], scales: NDArray[np.float32], kind: str) -> Bytes:
    """Integers (O, I) with scales (O, G) as blocks of q4_0 or q8_0: a scale in float16, then the integers; of 4 bits a
    byte has one of the first half of the block and one of the second."""
    blocks = integers.reshape(-1, BLOCK)
    each = np.repeat(scales, len(blocks) // scales.size, axis=-1).astype("<f2").reshape(-1, 1)
    if kind == "Q4_0":
        codes = (blocks + np.int8(8)).view(np.uint8)
        values = codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] * np.uint8(16)
    else:
        values = blocks.view(np.uint8)
    return np.concatenate((each.view(np.uint8), values), axis=1).reshape(-1)


def ggml_quantizer(base: ctypes.CDLL) -> Quantize:
    """llama.cpp's own, of its library ``ggml-base``."""
    import gguf  # pyright: ignore[reportMissingImports]

    base.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantize(values: NDArray[np.float32], kind: str) -> Bytes:
        values = np.ascontiguousarray(values, np.float32)
        width, number = values.shape[-1], gguf.GGMLQuantizationType[kind]
        rows = values.size // width
        out = np.empty(_nbytes(values.shape, kind), np.uint8)
        base.ggml_quantize_chunk(
            ctypes.c_int(number), values.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(width), None,
        )  # fmt: skip
        return out

    return quantize


def _nbytes(shape: Sequence[int], kind: str) -> int:
    import gguf  # pyright: ignore[reportMissingImports]

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // values * size


Entry = tuple[str, tuple[int, ...], str, Callable[[], Any]]
"""Name, shape, type and content of a tensor of the file."""


def entries(source: Source, config: dict[str, Any], kind: str, quantize: Quantize) -> list[Entry]:
    """What a file whose matrices are of a ``kind`` consists of, in its order."""
    # llama.cpp's quantiser gives the output head of a q4_0 file 6 bits
    head = "Q6_K" if kind == "Q4_0" and config["hidden_size"] % 256 == 0 else "Q8_0" if kind == "Q4_0" else kind
    found: list[Entry] = []

    def floating(name: str, origin: str) -> None:
        found.append((name, source.shape(origin), "F32", partial(source.floating, origin)))

    def matrix(name: str, origin: str, kind: str = kind) -> None:
        found.append((name, source.shape(origin), kind, partial(source.encoded, origin, kind, quantize)))

    matrix("token_embd.weight", "language_model.model.embed_tokens.weight")
    floating("output_norm.weight", "language_model.model.norm.weight")
    matrix("output.weight", "language_model.lm_head.weight", head)
    experts = config["n_routed_experts"]
    for number in range(config["num_hidden_layers"]):
        block, layer = f"blk.{number}", f"{_LAYER}.{number}"
        dense = number < config["first_k_dense_replace"]
        for name, origin in (_FLOATING if dense else _FLOATING | _ROUTER).items():
            floating(f"{block}.{name}", f"{layer}.{origin}")
        for name, origin in _MATRICES.items():
            matrix(f"{block}.{name}", f"{layer}.{origin}")
        found += _halves(source, f"{layer}.self_attn.kv_b_proj.weight", block, config, kind, quantize)
        for part in _PARTS:
            if dense:
                matrix(f"{block}.ffn_{part}.weight", f"{layer}.mlp.{part}_proj.weight")
                continue
            matrix(f"{block}.ffn_{part}_shexp.weight", f"{layer}.mlp.shared_experts.{part}_proj.weight")
            origins = [f"{layer}.mlp.experts.{expert}.{part}_proj.weight" for expert in range(experts)]
            shape = experts, *source.shape(origins[0])
            content = partial(_stacked, source, origins, kind, quantize)
            found.append((f"{block}.ffn_{part}_exps.weight", shape, kind, content))
    return found


def _stacked(source: Source, origins: Sequence[str], kind: str, quantize: Quantize) -> Bytes:
    return np.concatenate([source.encoded(origin, kind, quantize) for origin in origins])


def _halves(
    source: Source, origin: str, block: str, config: dict[str, Any], kind: str, quantize: Quantize
) -> list[Entry]:
    """``kv_b_proj`` by heads: the half of the keys transposed, for queries, and that of the values."""
    heads, keys = config["num_attention_heads"], config["qk_nope_head_dim"]
    rank, values = config["kv_lora_rank"], config["v_head_dim"]

    def half(keep: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
        whole = keep(source.floating(origin).reshape(heads, keys + values, rank))
        return _bfloat16(whole) if kind == "BF16" else quantize(whole, kind)

    return [
        (f"{block}.attn_k_b.weight", (heads, rank, keys), kind, lambda: half(lambda w: w[:, :keys].swapaxes(1, 2))),
        (f"{block}.attn_v_b.weight", (heads, values, rank), kind, lambda: half(lambda w: w[:, keys:])),
    ]


def _bfloat16(values: NDArray[np.float32]) -> Bytes:
    """Of values that are bfloat16 already."""
    return (np.ascontiguousarray(values).view("<u4") >> 16).astype("<u2").view(np.uint8).reshape(-1)


def weights_read(path: Path) -> tuple[int, int]:
    """:meth:`Source.weights_read`, of a GGUF file."""
    import gguf  # pyright: ignore[reportMissingImports]

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    routed = sum(nbytes for name, nbytes in sizes.items() if "_exps." in name)
    return sum(sizes.values()) - routed - sizes["token_embd.weight"], routed


def write(folder: Path, target: Path, form: str | None, base: ctypes.CDLL) -> None:
    """The decoder of the checkpoint in ``folder``, whose weights are in ``form``."""
    import gguf  # pyright: ignore[reportMissingImports]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    kind = TYPES[form]
    writer = gguf.GGUFWriter(target, "deepseek2")
    _describe(writer, config)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(2)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    found = entries(Source(folder), config, kind, ggml_quantizer(base))
    for name, shape, type_name, _ in found:
        if type_name == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
        else:
            stored = *shape[:-1], _nbytes(shape[-1:], type_name)
            raw = gguf.GGMLQuantizationType[type_name]
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), _nbytes(shape, type_name), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, content in found:
        writer.write_tensor_data(content())
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """The sizes of the model, as llama.cpp has them for models of DeepSeek-V2's kind."""
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # all heads look at one latent
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
