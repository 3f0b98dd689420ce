"""The decoder through a table of operations: :mod:`kimi_vl.model.language` again, cut where kernels are.

Computes what the modules of a :class:`LanguageModel` compute, with their parameters, for the tokens of one step of the
engine. Each addition to the residual happens within the norm that follows it, and so does the router. One operation
makes queries ready and writes the KV cache; another attends and leaves the latent space. Knows no model but the
decoder, and no request.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..device import memory
from ..kernels import Form, Ops, Widths, flash_attention, form_of, mlp
from ..kernels.attention_metadata import StepMetadata
from ..model.config import TextConfig
from ..model.language import LATENT_NORM_EPS, Attention, Experts, LanguageModel, Layer, Linear, Mlp, MoE, rope_tables
from ..quantization.weight import BlockedWeight, QuantizedWeight, Weight, dense, joined

# Shapes: T tokens, of which the first B are one of a sequence each; H, N, R, P, Q, V as in the decoder.


def widths(config: TextConfig, page_size: int) -> Widths:
    """The sizes of a model's decoder, over a KV cache with pages of ``page_size`` tokens."""
    return Widths(
        hidden=config.hidden_size,
        experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        inner=config.moe_intermediate_size,
        shared=config.n_shared_experts * config.moe_intermediate_size,
        dense=config.intermediate_size,
        heads=config.num_attention_heads,
        rank=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        nope=config.qk_nope_head_dim,
        value=config.v_head_dim,
        page_size=page_size,
        scaling=config.routed_scaling_factor,
        eps=config.rms_norm_eps,
        latent_eps=LATENT_NORM_EPS,
    )


def forms(model: LanguageModel) -> tuple[Form | None, tuple[Form, ...], Form | None, Form | None]:
    """How the weights of experts, of projections (each form once), of ``kv_b_proj``, and of shared experts are
    quantised."""
    layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
    sparse = next((layer.mlp for layer in layers if isinstance(layer.mlp, MoE)), None)
    experts = form_of(sparse.experts.gate_up_proj) if sparse else None
    shared = form_of(sparse.shared_experts.gate_proj.weight) if sparse else None
    linear = [module.weight for module in model.modules() if isinstance(module, Linear)]
    projections = tuple(sorted({form for weight in linear if (form := form_of(weight)) is not None}))
    return experts, projections, form_of(layers[0].self_attn.kv_b_proj.weight), shared


class FusedDecoder:
    """Takes the place of a :class:`LanguageModel` in a step of the engine; parameters are shared with it.

    They are not to be changed after that: some take the layout that operations read fastest, in the model too.
    """

    def __init__(self, model: LanguageModel, ops: Ops):
        self._model, self._ops = model, ops
        layers = [layer for layer in model.model.layers if isinstance(layer, Layer)]
        # Not in the caller's thread: where it is left with a pool of OpenMP's threads, the engine's wait asleep for
        # each other, which costs a CPU half of its speed. This one's pool ends with it.
        with ThreadPoolExecutor(1) as pool:
            self._projections = list(pool.map(lambda layer: _Projections(layer.self_attn, ops), layers))
            pool.submit(self._block).result()
            self._rope = pool.submit(_rope, model).result()  # (max_position_embeddings, 2P)

    def _block(self) -> None:
        """Put the weights of GEMMs apart from :class:`_Projections` in blocks."""
        for module in [*self._model.modules()]:
            if isinstance(module, Experts):
                _hold(module, "down_proj", self._ops.block(module.down_proj))
                if isinstance(module.down_proj, BlockedWeight):  # one alone would be computed in PyTorch
                    _hold(module, "gate_up_proj", self._ops.block(module.gate_up_proj))
            elif isinstance(module, Attention):
                for linear in (module.o_proj, module.kv_b_proj):
                    _hold(linear, "weight", self._ops.block(linear.weight))
            elif isinstance(module, Mlp):
                for linear in (module.gate_proj, module.up_proj, module.down_proj):
                    _hold(linear, "weight", self._ops.block(linear.weight))
        _hold(self._model.lm_head, "weight", self._ops.block(self._model.lm_head.weight))

    def states(self, embeddings: Tensor, step: StepMetadata) -> Tensor:
        """Final states (T, H) of embeddings (T, H)."""
        decoder, ops = self._model.model, self._ops
        rope = self._rope[step.positions]  # (T, 2P)
        residual, delta = embeddings, None
        for layer, projections, kv_cache in zip(decoder.layers, self._projections, step.kv_cache, strict=True):
            assert isinstance(layer, Layer)
            norm = layer.input_layernorm
            residual, normed = ops.add_rms_norm(residual, delta, norm.weight, norm.eps)  # (T, H)
            delta = self._attend(layer.self_attn, projections, normed, rope, kv_cache, step)
            norm = layer.post_attention_layernorm
            if isinstance(layer.mlp, MoE):
                gate = layer.mlp.gate
                residual, normed, topk_ids, topk_weights = ops.norm_router(
                    residual, delta, norm.weight, norm.eps,
                    gate.weight, gate.e_score_correction_bias, gate.top_k, gate.scaling,
                )  # fmt: skip
                delta = ops.moe(normed, topk_ids, topk_weights, *_experts(layer.mlp))
            else:
                residual, normed = ops.add_rms_norm(residual, delta, norm.weight, norm.eps)
                delta = mlp(normed, layer.mlp.weights, ops.project)
        return ops.add_rms_norm(residual, delta, decoder.norm.weight, decoder.norm.eps)[1]

    def logits(self, states: Tensor) -> Tensor:
        """float32 logits (T, vocab_size) of final states (T, H), contiguous."""
        scores = self._ops.project(states, self._model.lm_head.weight)
        return scores.to(torch.float32, memory_format=torch.contiguous_format)

    def _attend(
        self,
        attention: Attention,
        projections: _Projections,
        normed: Tensor,
        rope: Tensor,
        kv_cache: Tensor,
        step: StepMetadata,
    ) -> Tensor:
        """The attention's output (T, H): one token of a sequence in the latent space, prefill chunks with expanded
        keys and values."""
        config, ops, decoding = attention.config, self._ops, len(step.decode.seq_lens)
        # kernels take contiguous tokens
        joined = ops.project(normed, projections.joined).contiguous()  # (T, N (Q+P) + R+P)
        absorbed, rotated = ops.mla_prepare(
            joined, projections.to_key, attention.kv_a_layernorm.weight, rope, kv_cache, step.slot_mapping,
            LATENT_NORM_EPS, decoding,
        )  # fmt: skip
        parts: list[Tensor] = []
        if decoding:
            heads = ops.mla_decode(absorbed, kv_cache, step.decode, attention.scale, projections.to_value)  # (B, N, V)
            parts.append(heads.flatten(1))
        # not measured which is faster, a FlashAttention package or a kernel
        prefill = flash_attention.mla_prefill if flash_attention.usable(joined) else ops.mla_prefill
        for chunk in step.prefills:
            latents = kv_cache[chunk.pages].flatten(0, 1)[: chunk.end]  # (L, R+P)
            expanded = ops.project(latents[:, : config.kv_lora_rank], attention.kv_b_proj.weight)
            query = joined[chunk.tokens, : config.num_attention_heads * config.qk_head_dim]
            query, expanded = (
                states.unflatten(-1, (config.num_attention_heads, -1)) for states in (query, expanded)
            )  # (S, N, Q+P), (L, N, Q+V)
            own = rotated[chunk.tokens.start - decoding : chunk.tokens.stop - decoding]  # (S, N, P)
            heads = prefill(query[..., : config.qk_nope_head_dim], own, latents, expanded, chunk, attention.scale)
            parts.append(heads.flatten(1))  # (S, N V)
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        return ops.project(states, attention.o_proj.weight)


@torch.no_grad()
def _rope(model: LanguageModel) -> Tensor:
    """Cosines, then sines of every position there may be: made once, since a step's own take a dozen launches."""
    config, weight = model.model.config, model.model.embed_tokens.weight
    positions = torch.arange(config.max_position_embeddings, device=weight.device)
    return torch.cat(rope_tables(positions, config.qk_rope_head_dim, config.rope_theta, weight.dtype), dim=-1)


def _experts(moe: MoE) -> tuple[Weight, Weight, tuple[Weight, Weight, Weight]]:
    return moe.experts.gate_up_proj, moe.experts.down_proj, moe.shared_experts.weights


def naive_joined(attention: Attention, normed: Tensor) -> Tensor:
    """What one GEMM with :attr:`_Projections.joined` computes: (T, N (Q+P) + R+P) of ``normed`` (T, H)."""
    return torch.cat((attention.q_proj(normed), attention.kv_a_proj_with_mqa(normed)), dim=-1)


class _Projections:
    """An attention's projections as a step needs them.

    ``joined`` (N (Q+P) + R+P, H) is those of queries and of latents and rotary keys, which read the same input; the
    model's own weights become parts of it, so that it takes no memory of its own. ``to_key`` (N, R, Q) and ``to_value``
    (N, V, R) are the halves of ``kv_b_proj``, head by head, the first of them transposed; where they are quantised they
    are (N, Q, R) and (N, V, R).
    """

    @torch.no_grad()
    def __init__(self, attention: Attention, ops: Ops):
        config = attention.config
        both = (attention.q_proj, attention.kv_a_proj_with_mqa)
        dtype = attention.kv_a_layernorm.weight.dtype
        self.joined = ops.block(_joined([linear.weight for linear in both], dtype))
        if isinstance(self.joined, BlockedWeight):
            begin = 0
            for linear in both:
                _hold(linear, "weight", self.joined[begin : begin + linear.out_features])
                begin += linear.out_features
        stored = attention.kv_b_proj.weight
        if isinstance(stored, QuantizedWeight) and stored.device.type != "cpu":  # where it would cost each step much
            up = stored.by_head(config.num_attention_heads)  # (N, Q+V, R)
            self.to_key, self.to_value = up[:, : config.qk_nope_head_dim], up[:, config.qk_nope_head_dim :]
            return
        weight = dense(stored, dtype)
        up = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)  # (N, Q+V, R)
        to_key, to_value = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        self.to_key, self.to_value = to_key.transpose(1, 2), to_value
        if weight.device.type == "cpu":  # copies, in the order in which they are read
            halves = self.to_key, self.to_value
            self.to_key, self.to_value = (
                ops.block(half.clone(memory_format=torch.contiguous_format)) for half in halves
            )


def _hold(module: nn.Module, name: str, weight: Weight) -> None:
    """Put ``weight`` in the place of a parameter or of another weight."""
    if getattr(module, name) is not weight:
        delattr(module, name)  # else torch refuses a module in a parameter's place
        setattr(module, name, weight)


def _joined(weights: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """One matrix (O, I) of several with the same inputs, which become parts of it."""
    if all(isinstance(weight, BlockedWeight) for weight in weights):  # by another decoder of the model
        weights = [weight.plain() for weight in weights if isinstance(weight, BlockedWeight)]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) == len(weights) and (found := joined(quantized)) is not None:
        return found
    plain = [dense(weight, dtype) for weight in weights]  # also where they are quantised in different ways
    sizes = [len(weight) for weight in plain]
    whole = memory.empty((sum(sizes), plain[0].shape[1]), dtype, plain[0].device)
    for weight, part in zip(plain, whole.split(sizes), strict=True):
        weight.data = part.copy_(weight)
    return whole
