"""Computing with quantised weights: kernels in Triton's interpreter and plain PyTorch, against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench_suite import triton_on_cpu  # isort: skip

assert triton_on_cpu.interpreter  # it comes before any kernel

import torch  # noqa: E402

from kimi_vl import kernels  # noqa: E402
from kimi_vl.engine.decoder import FusedDecoder  # noqa: E402
from kimi_vl.engine.engine import Engine, EngineOptions  # noqa: E402
from kimi_vl.kernels import Form, Widths, linear  # noqa: E402
from kimi_vl.kernels.inputs import Call, Inputs, apart, distance, with_arguments  # noqa: E402
from kimi_vl.kernels.triton import linear as triton_linear  # noqa: E402
from kimi_vl.kernels.triton import moe  # noqa: E402
from kimi_vl.model import generation  # noqa: E402
from kimi_vl.quantization.weight import FLOAT8, QuantizedWeight  # noqa: E402
from kimi_vl.weights import loader, resolve  # noqa: E402
from tests.imitated_engine import Ask  # noqa: E402
from tests.imitated_engine import answers as answered  # noqa: E402

TRITON = kernels.select_ops("cpu", "triton")
DTYPES = [torch.float32, torch.bfloat16]
FORMS: dict[str, Form] = {
    "int8": ("int8", 0, "bfloat16"),
    "int8 in groups": ("int8", 32, "float16"),
    "int4": ("int4", 32, "bfloat16"),
    "int4 in large groups": ("int4", 64, "float32"),
    "int4 in small groups": ("int4", 16, "bfloat16"),
    "int4 by channel": ("int4", 0, "bfloat16"),
    "float8": ("float8", 0, "bfloat16"),
    "float8 in groups": ("float8", 64, "float32"),
}
ODD = Widths(
    hidden=192,
    experts=5,
    top_k=3,
    inner=64,
    shared=128,
    heads=3,
    rank=40,
    rope=12,
    nope=64,
    value=48,
    page_size=8,
    scaling=1.7,
)
SOME = ["int8", "int4", "float8"]  # in the default ring; Triton's interpreter takes seconds for each
PARAMS = [pytest.param(form, marks=[] if form in SOME else pytest.mark.nightly) for form in FORMS]
PAIRS = moe.QUANTIZED_PAIRS
PLANS = {  # of few programs, each of which takes the interpreter as long whatever it computes
    "pairs": moe.Plan(0, dataclasses.replace(PAIRS.gate_up, block_n=32), dataclasses.replace(PAIRS.down, block_n=64)),
    "pairs in steps": moe.Plan(0, moe.Tile(64, 0, 4, 1), moe.Tile(64, 32, 4, 2)),  # several for each expert
    "few": moe.QUANTIZED_FEW,
    "many": dataclasses.replace(moe.QUANTIZED_SOME, block_m=32),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", PARAMS)
@pytest.mark.parametrize(("tokens", "outputs", "plan"), [(1, 40, None), (5, 33, None), (40, 70, triton_linear.SOME)])
def test_projections(form: str, dtype: torch.dtype, tokens: int, outputs: int, plan: Any):
    inputs = Inputs(ODD, dtype)
    call = inputs.project(tokens, inputs.quantized(FORMS[form], outputs, ODD.hidden))
    assert apart(call, call.run(TRITON, **({"plan": plan} if plan and dtype == torch.bfloat16 else {})), dtype) <= 1
    assert apart(call, call.run(kernels.TORCH), dtype) <= 1


@pytest.mark.parametrize("form", PARAMS)
@pytest.mark.parametrize("block_k", [64, 256])  # in several steps, and in one
def test_projections_without_tensor_cores(form: str, block_k: int):
    inputs = Inputs(ODD, torch.float32)
    call = inputs.project(3, inputs.quantized(FORMS[form], 41, ODD.hidden))
    plan = triton_linear.Plan(0, 32, block_k, 4, 2)
    assert apart(call, call.run(TRITON, plan=plan), torch.float32) <= 1
    states, weight = call.arguments
    assert torch.equal(TRITON.project(states[1:2], weight, plan), TRITON.project(states, weight, plan)[1:2])


def test_projections_keep_the_dimensions_in_front():
    """As of a prompt's latents (1, L, R), which are expanded to keys and values."""
    inputs = Inputs(ODD, torch.float32)
    weight = inputs.quantized(FORMS["int8"], 33, ODD.hidden)
    states = inputs.normal(1, 5, ODD.hidden)
    projected = TRITON.project(states, weight)
    assert projected.shape == (1, 5, 33)
    assert torch.equal(projected[0], TRITON.project(states[0], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", PARAMS)
@pytest.mark.parametrize(
    "plan", ["pairs", "few", *(pytest.param(plan, marks=pytest.mark.nightly) for plan in ("pairs in steps", "many"))]
)
def test_experts(form: str, dtype: torch.dtype, plan: str):
    inputs, tokens = Inputs(ODD, dtype), 1 if plan.startswith("pairs") else 9
    shared = form != "int8 in groups"
    weights = inputs.experts(FORMS[form]), inputs.shared_experts(FORMS[form])
    call = inputs.moe(tokens, shared=shared, weights=weights)
    assert apart(call, call.run(TRITON, plan=PLANS[plan]), dtype) <= 1
    assert apart(call, call.run(kernels.TORCH), dtype) <= 1


@pytest.mark.parametrize("form", ["int8", "int4 by channel"])
@pytest.mark.parametrize("inner", [50, 64])
def test_channels_need_not_be_whole_words(form: str, inner: int):
    """Of 4 bytes, in which integers are read where channels are."""
    widths = dataclasses.replace(ODD, hidden=114, inner=inner, shared=2 * inner)
    inputs = Inputs(widths, torch.float32)
    call = inputs.moe(1, weights=(inputs.experts(FORMS[form]), inputs.shared_experts(FORMS[form])))
    assert apart(call, call.run(TRITON, plan=PLANS["pairs in steps"]), torch.float32) <= 1


def test_a_token_gets_the_same_bits_in_any_batch_of_pairs():
    inputs = Inputs(ODD, torch.bfloat16)
    weights = inputs.experts(FORMS["int4"]), inputs.shared_experts(FORMS["int4"])
    whole = inputs.moe(3, weights=weights)
    (wanted,) = whole.run(TRITON, plan=PLANS["pairs in steps"])
    for token in range(3):
        states, topk_ids, topk_weights, *rest = whole.arguments
        own = (each[token : token + 1].contiguous() for each in (states, topk_ids, topk_weights))
        alone = TRITON.moe(*own, *rest, plan=PLANS["pairs in steps"])
        assert torch.equal(alone[0], wanted[token])


@pytest.mark.parametrize("tokens", [1, 6])
def test_shared_experts_may_be_of_another_form(tokens: int):
    inputs = Inputs(ODD, torch.float32)
    pairs = [(FORMS["int4"], FORMS["int8"]), (None, FORMS["int8"]), (FORMS["int4"], None)]
    pairs += [(FORMS["float8"], FORMS["int8"])]  # alike but for what codes mean
    for routed, shared in pairs:
        call = inputs.moe(tokens, weights=(inputs.experts(routed), inputs.shared_experts(shared)))
        assert apart(call, call.run(TRITON), torch.float32) <= 1
        assert apart(call, call.run(kernels.TORCH), torch.float32) <= 1


LATENT = ["int8", "float8"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", LATENT)
def test_the_latent_space_is_entered_and_left_by_quantised_weights(form: str, dtype: torch.dtype):
    """By one sequence and by more than a program combines, of tokens that decode and others."""
    inputs = Inputs(ODD, dtype)
    for call in (
        inputs.mla_prepare(5, 3, form=FORMS[form]),
        inputs.mla_decode([40], form=FORMS[form]),
        inputs.mla_decode([9, 1, 0, 8, 70, 7], 16, form=FORMS[form]),
    ):
        assert apart(call, call.run(TRITON), dtype) <= 1
        assert apart(call, call.run(kernels.TORCH), dtype) <= 1


def test_groups_that_the_kernels_do_not_take_are_computed_without():
    inputs = Inputs(ODD, torch.float32)
    for form in (("int4", 8, "bfloat16"), ("int8", 48, "bfloat16"), ("float8", 8, "float32")):
        weight = inputs.quantized(form, 40, ODD.hidden)
        assert triton_linear.kernel_form(weight) is None
        call = inputs.project(3, weight)
        assert apart(call, call.run(TRITON), torch.float32) <= 1


def test_experts_in_such_groups_are_pytorchs_and_steps_not_captured(caplog: pytest.LogCaptureFixture):
    """A kernel that computed them in PyTorch by itself would break the capture of a decode step as a CUDA graph."""
    use = kernels.Use(ODD, torch.float32, 4, 16)
    for form, taken in (
        *((form, form is None or form[1] < 64) for form in (None, *FORMS.values())),  # 64 are all that one of them has
        (("int4", 8, "bfloat16"), False),
        (("int8", 48, "bfloat16"), False),
    ):
        gate_up, down = Inputs(ODD, torch.float32).experts(form)
        assert (triton_linear.kernel_form(gate_up, down) is not None) == taken
        caplog.clear()
        ops = kernels.select_ops("cpu", "triton", dataclasses.replace(use, experts=form))
        assert ops.static == taken and (ops.moe is TRITON.moe) == taken
        assert ops.project is TRITON.project and len(caplog.records) == 2 * (not taken)


def test_a_large_weight_is_dequantised_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    inputs = Inputs(ODD, torch.float32)
    call = inputs.project(3, inputs.quantized(FORMS["int4"], 70, ODD.hidden))
    monkeypatch.setattr(linear, "_DEQUANTIZED", 20 * ODD.hidden)
    assert apart(call, call.run(kernels.TORCH), torch.float32) <= 1


def test_a_token_gets_the_same_bits_in_any_batch_of_a_plan():
    inputs = Inputs(ODD, torch.bfloat16)
    weight = inputs.quantized(FORMS["int4"], 48, ODD.hidden)
    states = inputs.normal(16, ODD.hidden)
    whole = TRITON.project(states, weight)
    for count in (2, 3, 16):
        assert torch.equal(TRITON.project(states[:count], weight), whole[:count])


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_of_float8_is_widened(dtype: torch.dtype, group: int):
    """Exactly, NaN and subnormal numbers too: each output is one code, of which there are 256, times a scale."""
    codes = torch.zeros(256, 256, dtype=torch.uint8).diagonal_scatter(torch.arange(256).to(torch.uint8))
    scales = torch.full((256, 256 // group if group else 1), 0.5, dtype=torch.bfloat16)
    weight = QuantizedWeight(codes.view(FLOAT8), scales, 8)
    states = torch.ones(1, 256, dtype=dtype)
    wanted = [naive_float8(code) * 0.5 for code in range(256)]
    for found in (TRITON.project(states, weight), weight.dequantize(dtype).sum(1, keepdim=True).T):
        assert [float(value) for value in found[0]] == pytest.approx(wanted, rel=0, abs=0, nan_ok=True)
    assert sum(value != value for value in wanted) == 2


def naive_float8(code: int) -> float:
    """From the definition: a sign, 4 bits of exponent with a bias of 7, and 3 of mantissa; all ones are NaN."""
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# Planted mistakes


def nibbles_swapped(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes << 4 | weight.codes >> 4, weight.scales, weight.bits)


def zero_point_off(weight: QuantizedWeight) -> QuantizedWeight:
    """Integers that begin one lower, as those do whose sign is taken for their code's."""
    return QuantizedWeight(weight.codes ^ (0x80 if weight.bits == 8 else 0x88), weight.scales, weight.bits)


def groups_moved(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes, weight.scales.roll(1, -1), weight.bits)


def channels_moved(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes, weight.scales.roll(1, -2), weight.bits)


def taken_for_integers(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.codes.view(torch.uint8), weight.scales, weight.bits)


MISTAKES = {
    "nibbles": (nibbles_swapped, ("int4", "int4 by channel")),
    "zero point": (zero_point_off, ("int8", "int4")),
    "group off by one": (groups_moved, ("int8 in groups", "int4")),
    "scale of another channel": (channels_moved, ("int8", "int4", "float8")),
    "integers": (taken_for_integers, ("float8",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_seen(mistake: str):
    change, forms = MISTAKES[mistake]
    dtype = torch.bfloat16  # in which the least is seen

    def spoilt(call: Call, index: int) -> Call:
        return with_arguments(call, lambda values: values.__setitem__(index, change(values[index])))

    inputs = Inputs(ODD, dtype)
    for form in forms:
        project = inputs.project(3, inputs.quantized(FORMS[form], 40, ODD.hidden))
        assert apart(project, spoilt(project, 1).run(TRITON), dtype) > 3
        if not FORMS[form][1] and form != "int4 by channel":
            for call, index in (
                (inputs.mla_prepare(2, form=FORMS[form]), 1),
                (inputs.mla_decode([9], form=FORMS[form]), 4),
            ):
                assert apart(call, spoilt(call, index).run(TRITON), dtype) > 3
        experts = inputs.moe(1, weights=(inputs.experts(FORMS[form]), inputs.shared_experts(FORMS[form])))
        for index in (3, 4):
            assert apart(experts, spoilt(experts, index).run(TRITON, plan=PLANS["pairs"]), dtype) > 3


# Models


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request: pytest.FixtureRequest) -> Any:
    return loader.load(resolve.DEMO, dtype=torch.float32, form=request.param)


def floating(model: Any) -> Any:
    """The same weights in floating-point: what quantised ones have to compute."""
    wanted = loader.empty_model(model.config, torch.float32)
    loader._give_memory(wanted, torch.device("cpu"))
    for slot in loader.checkpoint_layout(model.config).values():
        try:
            value = model.get_parameter(slot.parameter)
        except AttributeError:
            value = model.get_submodule(slot.parameter).dequantize(torch.float32)
        wanted.get_parameter(slot.parameter).data[slot.index] = value[slot.index]
    return wanted.eval()


IDS = [1024, 5, 77, 12, 300, 41, 9]


@torch.inference_mode()
def test_the_modules_compute_with_them(model: Any):
    ids = torch.tensor([IDS])
    assert distance(model(ids), floating(model)(ids)) < 1e-5


def answers(model: Any, ops: kernels.Ops | None) -> list[int]:
    options = EngineOptions(max_num_seqs=2, cache_bytes=1 << 20, embedding_bytes=0, max_num_batched_tokens=32)
    engine = Engine(model, 1024, options, ops=ops)
    try:
        return answered(engine, [Ask(IDS, 6)])[0]
    finally:
        engine.close()


def test_an_engine_says_what_plain_generation_says(model: Any):
    (wanted,) = generation.greedy(floating(model), [generation.Prompt(IDS, None, [])], frozenset(), 6)
    assert answers(model, None) == list(wanted)


@pytest.mark.nightly
def test_kernels_say_what_plain_generation_says():
    model = loader.load(resolve.DEMO, dtype=torch.float32, form="int4")
    (wanted,) = generation.greedy(floating(model), [generation.Prompt(IDS, None, [])], frozenset(), 6)
    assert answers(model, TRITON) == list(wanted)


def test_the_decoder_shares_memory_with_the_model(model: Any):
    before = sum(parameter.nbytes for parameter in model.parameters())
    decoder = FusedDecoder(model.language_model, kernels.TORCH)
    attention = model.language_model.model.layers[0].self_attn
    joined = decoder._projections[0].joined
    assert isinstance(joined, QuantizedWeight)
    assert joined.codes.data_ptr() == attention.q_proj.weight.codes.data_ptr()
    assert sum(parameter.nbytes for parameter in model.parameters()) == before


def test_the_use_of_a_model_names_its_forms(model: Any):
    use = EngineOptions().use(model)
    kind, group, dtype = use.experts or ("", 0, "")
    assert (dtype, use.experts in use.projections) == ("bfloat16", True)
    assert ("int8", 0, "bfloat16") in use.projections  # the output head's
    assert (kind, group) in (("int8", 0), ("int4", 32))
    assert use.shared == use.experts
    assert EngineOptions().use(loader.planned_model(model.config, torch.float32)).projections == ()
