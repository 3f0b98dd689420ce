"""Native products and experts: against float64 in every format, over poisoned memory, alone and in any batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kimi_vl import kernels
from kimi_vl.kernels import Form, Widths, linear, reference, startup_check
from kimi_vl.kernels.cpu import build, products
from kimi_vl.kernels.inputs import Call, Inputs, distance, with_arguments
from kimi_vl.quantization.weight import BlockedWeight, QuantizedWeight, Weight, dense
from tests.unit.test_kernels import Fences, fences  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(
    not set(build.NEEDED) <= build.processor_features(), reason="this processor has no AVX-512 or no VNNI"
)
FORMS: dict[str, Form | None] = {
    "bfloat16": None,
    "int8": ("int8", 0, "bfloat16"),
    "int8, wide scales": ("int8", 0, "float32"),
    "int4": ("int4", 32, "bfloat16"),
    "int4 in large groups": ("int4", 128, "float16"),
    "int4 by channel": ("int4", 0, "float32"),
}
# Relative errors of a product before its result is rounded: of vectors rounded to 16 and to 8 bits.
ERRORS = {"bfloat16": 1e-6, "int8": 1e-4, "int4": 7e-3}
ROUNDED = 2.0**-8  # the most that rounding to bfloat16 makes of it
# No width is whole tiles, chunks of them, or a multiple of a large group alone.
ODD = Widths(hidden=9 * 32, experts=5, top_k=3, inner=5 * 32, shared=3 * 32)
GROUPED = Widths(hidden=3 * 128, experts=5, top_k=3, inner=128, shared=2 * 128)
COUNTS = [*range(1, 18), 97, 130]


@pytest.fixture(autouse=True)
def one_thread():
    """What two threads share out is the same; a busy machine keeps them waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def error(form: str) -> float:
    return next(value for name, value in ERRORS.items() if form.startswith(name)) + ROUNDED


def blocked(weight: Weight, fences: Fences) -> tuple[BlockedWeight, Tensor]:  # noqa: F811
    """The weight in blocks, in memory between fences that no vector register is aligned to, and its float64 values."""

    def moved(values: Tensor) -> Tensor:
        return fences.around((values.numel() + 2,), values.dtype)[2:].view(values.shape).copy_(values)

    right = dense(weight, torch.float64).double()
    if isinstance(weight, QuantizedWeight):
        codes = fences.copy(weight.codes.data.view(torch.int32)).view(torch.uint8)
        weight = QuantizedWeight(codes, moved(weight.scales.data), weight.bits)
    elif isinstance(weight, Tensor):
        weight = moved(weight)
    made = products.block(weight)
    assert isinstance(made, BlockedWeight)
    return made, right


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outliers", [False, True])
def test_a_product_is_the_naive_one_and_the_same_in_any_batch(form: str, outliers: bool, fences: Fences):  # noqa: F811
    inputs = Inputs(ODD)
    weight, right = blocked(inputs.weight(11 * 16, 3 * 128, scale=0.05, form=FORMS[form]), fences)
    states = fences.copy(inputs.normal(COUNTS[-1], 3 * 128))
    if outliers:
        states[:, ::48] *= 30
    alone = torch.cat([products.project(one, weight) for one in states.split(1)])
    for count in COUNTS:
        found = products.project(states[:count], weight)
        wanted = linear.naive_project(states[:count].double(), right)
        assert distance(found, wanted) <= error(form) * (2 if outliers and form.startswith("int4") else 1)
        assert torch.equal(found, alone[:count]), count
    exact = states.float() @ right.float().T
    if form.startswith("int8"):  # as exact as with activations in bfloat16
        assert distance(alone, exact) <= 2e-3
    assert torch.equal(products.project(states.t().contiguous().t(), weight), alone), "not contiguous"
    assert torch.equal(products.project(states.unflatten(0, (2, -1)), weight).flatten(0, 1), alone)


def in_blocks(call: Call) -> Call:
    """The same call of ``moe``; the plain weights are gone after that."""

    def change(arguments: list[Any]) -> None:
        arguments[3:5] = map(products.block, arguments[3:5])
        arguments[5] = arguments[5] and tuple(map(products.block, arguments[5]))

    return with_arguments(call, change)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 6, 19, pytest.param(110, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("shared", [True, False])
def test_experts_are_the_naive_ones_and_the_same_in_any_batch(form: str, tokens: int, shared: bool):
    inputs = Inputs(GROUPED if form.startswith("int4") else ODD)
    weights = inputs.experts(FORMS[form]), inputs.shared_experts(FORMS[form])
    call = inputs.moe(tokens, shared=shared, weights=weights)
    (wanted,), native = call.twin(), in_blocks(call)
    found = products.moe(*native.arguments)
    assert distance(found, wanted) <= 2 * error(form)
    for token in range(tokens):
        own = (each[token : token + 1] for each in native.arguments[:3])
        assert torch.equal(products.moe(*own, *native.arguments[3:]), found[token : token + 1])


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_shared_experts_may_be_of_another_format(form: str | None, tokens: int):
    inputs = Inputs(GROUPED)
    weights = inputs.experts(FORMS["int4"]), inputs.shared_experts(FORMS[form] if form else None)
    call = inputs.moe(tokens, weights=weights)
    (wanted,) = call.twin()
    assert distance(products.moe(*in_blocks(call).arguments), wanted) <= 2 * error("int4")


@pytest.mark.parametrize("count", [1, 2, 5, 21])
def test_heads_have_a_matrix_each(count: int, fences: Fences):  # noqa: F811
    inputs = Inputs(ODD)
    weight, right = blocked(inputs.normal(3, 48, 64), fences)
    states = inputs.normal(count, 3, 80)[..., 8:72]  # as queries are, parts of wider ones
    found = products.per_head(states, weight)
    assert distance(found, reference.per_head(states.double(), right)) <= ROUNDED
    assert torch.equal(found, torch.cat([products.per_head(one, weight) for one in states.split(1)]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_own_vector_alone(form: str, spoilt: float):
    inputs = Inputs(GROUPED)
    weight = products.block(inputs.weight(48, 256, scale=0.1, form=FORMS[form]))
    experts, shared = inputs.experts(FORMS[form]), inputs.shared_experts(FORMS[form])
    call = in_blocks(inputs.moe(5, "same", weights=(experts, shared)))
    states = inputs.normal(5, 256)
    clean, mixed = products.project(states, weight), products.moe(*call.arguments)
    states[2, 100] = call.arguments[0][2, 100] = spoilt
    others = [0, 1, 3, 4]
    for before, after in ((clean, products.project(states, weight)), (mixed, products.moe(*call.arguments))):
        assert torch.equal(after[others], before[others])
        assert not after[2].isfinite().any() or (form == "bfloat16" and not after[2].isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_zeros_and_the_smallest_and_largest_values_stay_what_they_are(form: str):
    inputs = Inputs(GROUPED)
    plain = inputs.weight(32, 256, scale=0.1, form=FORMS[form])
    right = dense(plain, torch.float64).double()
    weight = products.block(plain)
    assert products.project(torch.zeros(3, 256, dtype=torch.bfloat16), weight).eq(0).all()
    for scale in (1e-20, 1e30):
        states = (inputs.normal(3, 256).double() * scale).bfloat16()
        assert distance(products.project(states, weight), states.double() @ right.T) <= error(form)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_take_the_memory_of_the_plain_weight_and_give_it_back(form: str):
    plain = Inputs(GROUPED).weight(3, 48, 256, scale=1.0, form=FORMS[form])
    assert not isinstance(plain, BlockedWeight)
    right, nbytes, address = dense(plain, torch.float32).clone(), plain.nbytes, next(tensors(plain)).data_ptr()
    made = products.block(plain)
    assert isinstance(made, BlockedWeight) and products.block(made) is made
    assert (made.shape, made.nbytes, next(tensors(made.stored)).data_ptr()) == (right.shape, nbytes, address)
    assert torch.equal(dense(made, torch.float32), right.float())
    assert torch.equal(dense(made[1][16:48], torch.float32), right[1, 16:48].float())
    assert torch.equal(dense(copy.deepcopy(made)[2], torch.float32), right[2].float())
    assert kernels.form_of(made) == FORMS[form]
    states = Inputs(GROUPED).normal(2, 256)
    assert torch.equal(linear.project(states, made[1]), linear.project(states, dense(made[1], torch.bfloat16)))


def tensors(weight: Tensor | QuantizedWeight) -> Iterator[Tensor]:
    yield from [weight] if isinstance(weight, Tensor) else [weight.codes, weight.scales]


def test_what_blocks_have_no_place_for_stays_as_it_is():
    inputs = Inputs(GROUPED)
    for weight in (
        inputs.normal(32, 256).float(), inputs.normal(40, 256), inputs.normal(32, 48), inputs.normal(256, 32).t(),
        inputs.quantized(("int8", 32, "bfloat16"), 32, 256), inputs.quantized(("int4", 16, "bfloat16"), 32, 256),
        inputs.quantized(("float8", 0, "bfloat16"), 32, 256), inputs.normal(32, 256).to("meta"),
    ):  # fmt: skip
        assert products.block(weight) is weight
    weight = products.block(inputs.normal(32, 256))
    states = inputs.normal(3, 256)
    right = states.double() @ dense(weight, torch.float64).T
    assert distance(products.project(states.float(), weight), right) <= 1e-5, "in PyTorch"
    assert products.project(states[:0], weight).shape == (0, 32)


def test_a_wrong_kernel_is_refused_and_the_weights_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    use = dataclasses.replace(kernels.Use(GROUPED, torch.bfloat16, 4, 20), projections=(("int4", 32, "bfloat16"),))
    sound = kernels.native_ops()
    for name, wrong in (("project", lambda *given: sound.project(*given) * 1.02), ("moe", lambda *given: given[0] / 0)):
        broken = dataclasses.replace(sound, **{name: wrong})
        inputs = Inputs(startup_check.NATIVE_WIDTHS, torch.bfloat16, block=broken.block)
        use = dataclasses.replace(use, widths=inputs.widths, max_num_batched_tokens=20)
        calls = startup_check.Calls(use, "cpu", inputs)
        reasons = {each: startup_check.reason_against(each, broken, calls.of(each), use.dtype)
                   for each in kernels.OPERATIONS}  # fmt: skip
        assert {each for each, reason in reasons.items() if reason} == {name}
        ops = kernels.without(broken, {name})
        assert getattr(ops, name) is getattr(kernels.TORCH, name) and ops.add_rms_norm is sound.add_rms_norm
        weight = inputs.normal(32, 256)
        assert ops.block(weight) is weight


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("shared", ["int4", "int8", ""])
def test_kernels_are_checked_with_groups_of_any_size(group: int, shared: str):
    """Sound kernels are taken, also where shared experts are of another form than the routed ones."""
    form, other = ("int4", group, "bfloat16"), (shared, group, "bfloat16") if shared else None
    use = kernels.Use(GROUPED, torch.bfloat16, 3, 3, form, (form,), shared=other)
    use = dataclasses.replace(use, widths=startup_check.native_widths(use))
    ops = kernels.native_ops()
    calls = startup_check.Calls(use, "cpu", Inputs(use.widths, use.dtype, block=ops.block))
    for operation in ("moe", "project"):
        assert startup_check.reason_against(operation, ops, calls.of(operation), use.dtype) == ""
    weights = [weight for call in calls.of("moe") for weight in call.arguments[3:5]]
    assert {kernels.form_of(weight) for weight in weights} == {form}


def test_a_library_is_checked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    library, asked = tmp_path / "key.so", []
    monkeypatch.setattr(build, "library", lambda: SimpleNamespace(_name=str(library)))
    answers = iter([{"moe": "no"}, {}, {}])
    monkeypatch.setattr(startup_check, "check", lambda device, use: asked.append(use) or next(answers))
    use = kernels.Use(GROUPED, torch.bfloat16, 4, 20)
    assert startup_check.check_native(use) == {"moe": "no"}, "which is not kept"
    assert startup_check.check_native(use) == startup_check.check_native(use) == {}
    assert len(asked) == 2
    assert startup_check.check_native(dataclasses.replace(use, experts=("int8", 0, "bfloat16"))) == {}
    assert len(asked) == 3


@pytest.mark.slow
def test_kernels_are_checked_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch):
    use = kernels.Use(startup_check.NATIVE_WIDTHS, torch.bfloat16, 2, 3)
    assert startup_check.check(torch.device("cpu"), use) == {}


def test_native_kernels_are_for_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(startup_check, "refusals", lambda device, use: {})
    use = kernels.Use(GROUPED, torch.bfloat16, 4, 20)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.select_ops("cpu", use=use).name == "native"
    assert kernels.select_ops("cpu", use=dataclasses.replace(use, dtype=torch.float32)) is kernels.TORCH
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    assert kernels.select_ops("cpu", use=use) is kernels.TORCH
    assert kernels.select_ops("cpu", "native").name == "native"

    def missing() -> None:
        raise build.Unavailable("there is no g++")

    monkeypatch.setattr(build, "library", missing)
    with pytest.raises(RuntimeError, match=r"native kernels were asked for \(there is no g\+\+\)"):
        kernels.select_ops("cpu", "native")
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    with caplog.at_level("WARNING"):
        assert kernels.select_ops("cpu", use=use) is kernels.TORCH
    (record,) = caplog.records
    assert "there is no g++" in record.getMessage()
