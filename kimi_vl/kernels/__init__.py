"""The decoder's operations in one table: PyTorch on every device, and kernels where they pass a check: Triton's on a
GPU, native ones on a CPU.

Triton is imported only where it is selected, and only by this package. Kernels list the integers that differ from step
to step in ``do_not_specialize``: otherwise Triton compiles a kernel once more for an integer that is 1 and for one that
16 divides, while requests are served.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantization.weight import BlockedWeight, Weight
from . import flash_attention, linear, plain, reference
from .linear import mlp

__all__ = [
    "OPERATIONS",
    "REFERENCE",
    "TORCH",
    "VARIABLE",
    "Form",
    "Ops",
    "Use",
    "Widths",
    "form_of",
    "mlp",
    "prepare",
    "select_ops",
]

VARIABLE = "KIMI_VL_KERNELS"
SYNCHRONISING = frozenset({"moe", "mla_prepare", "mla_decode"})
"""PyTorch operations that cannot be captured: they synchronise with the device, or need a slot for every token."""
BLOCKED = frozenset({"project", "moe", "mla_prepare", "mla_decode"})
"""Operations that read weights in blocks; PyTorch's read them as they are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation; :mod:`kimi_vl.kernels.reference` says what each computes.

    ``static`` operations never synchronise with the device and skip tokens without a slot, so that they can be captured
    (:mod:`kimi_vl.engine.cuda_graphs`). ``block`` gives a weight the layout that ``project``, ``moe``, ``mla_prepare``
    and ``mla_decode`` read fastest, in its own memory; they take it as it is too.
    """

    name: str
    static: bool
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    norm_router: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    project: Callable[..., Tensor]
    moe: Callable[..., Tensor]
    mla_prepare: Callable[..., tuple[Tensor, Tensor]]
    mla_decode: Callable[..., Tensor]
    mla_prefill: Callable[..., Tensor]
    block: Callable[[Weight], Weight] = lambda weight: weight


OPERATIONS = tuple(
    field.name for field in dataclasses.fields(Ops) if field.name not in ("name", "static", "block")
)  # fmt: skip


@dataclass(frozen=True)
class Widths:
    """The sizes of a model and of its KV cache that operations depend on; the defaults are the published model's."""

    hidden: int = 2048
    experts: int = 64
    top_k: int = 6
    inner: int = 1408
    shared: int = 2816
    dense: int = 11264
    heads: int = 16
    rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128
    page_size: int = 32
    scaling: float = 2.446
    eps: float = 1e-5
    latent_eps: float = 1e-6


Form = tuple[str, int, str]
"""How a weight is quantised: "int4", "int8" or "float8", inputs that share a scale (0: all of them), and the dtype of
scales."""


def form_of(weight: Weight) -> Form | None:
    """None for a floating-point weight."""
    if isinstance(weight, BlockedWeight):
        weight = weight.stored
    if isinstance(weight, Tensor):
        return None
    return weight.kind, weight.group % weight.shape[-1], str(weight.scales.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Use:
    """What an engine will call the operations with: the widths of its model, the sizes of its largest step, and how the
    weights of experts, of projections, into and out of the latent space, and of shared experts are quantised."""

    widths: Widths
    dtype: torch.dtype
    max_num_seqs: int
    max_num_batched_tokens: int
    experts: Form | None = None
    projections: tuple[Form, ...] = ()
    latent: Form | None = None
    shared: Form | None = None


REFERENCE = Ops(
    "reference",
    True,
    reference.add_rms_norm,
    reference.norm_router,
    linear.naive_project,
    reference.moe,
    reference.mla_prepare,
    reference.mla_decode,
    reference.mla_prefill,
)
TORCH = Ops(
    "torch",
    False,
    reference.add_rms_norm,
    reference.norm_router,
    linear.project,
    plain.moe,
    plain.mla_prepare,
    plain.mla_decode,
    plain.mla_prefill,
)


def select_ops(device: torch.device | str, name: str | None = None, use: Use | None = None) -> Ops:
    """The operations for a device: those called ``name``, else what the variable KIMI_VL_KERNELS names, else "auto".

    "auto" is every kernel that passes the check of :mod:`startup_check <kimi_vl.kernels.startup_check>` for ``use``:
    Triton's on a GPU, native ones on a CPU in bfloat16. The others fall back to PyTorch, and the log gives the reason.
    With ``use``, kernels are compiled for every launch that a step can need before this returns. Raises ValueError for
    an unknown name, or for "auto" without ``use`` on a GPU, and RuntimeError where Triton's or native kernels are asked
    for and not available.
    """
    device, asked = torch.device(device), _asked(name)
    if asked == "torch" or (asked == "auto" and device.type != "cuda" and not _native_for(device, use)):
        return TORCH
    if asked == "native":
        ops = _forced_native(device)
    elif asked == "triton":
        ops = _forced(device)
    elif use is None:
        raise ValueError("kernels are chosen by trying them: say what for, or ask for 'torch', 'native' or 'triton'")
    else:
        ops = _automatic(device, use, triton_ops if device.type == "cuda" else native_ops)
    if use is not None and ops.static:
        ops = _for_experts(ops, use)
    if use is not None and device.type == "cuda" and ops is not TORCH:
        from . import startup_check

        startup_check.launch_all(ops, device, use)
    return ops


def _for_experts(ops: Ops, use: Use) -> Ops:
    """``ops``, of Triton, with PyTorch's experts where these are quantised in groups that the kernel does not take.

    The kernel itself would compute them in PyTorch, which a CUDA graph cannot capture."""
    from .triton.linear import takes

    if takes(use.experts, use.widths.hidden, use.widths.inner):
        return ops
    refused = {"moe": "experts are quantised in groups that it does not take"}
    ops = without(ops, refused)
    report(refused, ops)
    return ops


def prepare(device: torch.device | str, use: Use) -> None:
    """Start the check that :func:`select_ops` waits for, so that it runs while the weights are loaded."""
    device = torch.device(device)
    if _asked(None) == "auto" and (device.type == "cuda" or _native_for(device, use)):
        from . import startup_check

        startup_check.begin(device, use)


def triton_ops() -> Ops:
    """The table of all Triton kernels. Raises ImportError where Triton is missing."""
    from .triton import linear, mla, moe, norm, prefill

    return Ops(
        "triton",
        True,
        norm.add_rms_norm,
        norm.norm_router,
        linear.project,
        moe.moe,
        mla.mla_prepare,
        mla.mla_decode,
        prefill.mla_prefill,
    )


def native_ops() -> Ops:
    """The table of all native kernels. Raises ImportError where this machine cannot have them."""
    from .cpu import build, mla, norm, products

    try:
        build.library()
    except build.Unavailable as reason:
        raise ImportError(str(reason)) from None
    return Ops(
        "native",
        False,
        norm.add_rms_norm,
        norm.norm_router,
        products.project,
        products.moe,
        functools.partial(mla.mla_prepare, per_head=products.per_head),
        functools.partial(mla.mla_decode, per_head=products.per_head),
        plain.mla_prefill,
        products.block,
    )


def missing_native() -> str:
    """Why this machine has no native kernels, or "" where its processor and compiler are what they need.

    Nothing is compiled for the answer.
    """
    from .cpu import build

    if _asked(None) not in ("auto", "native"):
        return f"{VARIABLE} asks for others"
    try:
        build.needed(build.processor_features())
    except build.Unavailable as reason:
        return str(reason)
    return ""


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    from .cpu import build

    return bool({"avx512_bf16", "amx_bf16"} & build.processor_features())


def without(ops: Ops, refused: Collection[str]) -> Ops:
    """``ops`` with PyTorch as the fallback for the operations in ``refused``."""
    if not refused:
        return ops
    if all(name in refused or getattr(ops, name) is getattr(TORCH, name) for name in OPERATIONS):
        return TORCH
    fallbacks = {name: getattr(TORCH, name) for name in refused}
    block = TORCH.block if BLOCKED & set(refused) else ops.block
    static = ops.static and not SYNCHRONISING & set(refused)
    return dataclasses.replace(ops, name="mixed", static=static, block=block, **fallbacks)


def _asked(name: str | None) -> str:
    asked = name or os.environ.get(VARIABLE) or "auto"
    if asked not in ("auto", "torch", "native", "triton"):
        raise ValueError(f"kernels are 'auto', 'torch', 'native' or 'triton', not {asked!r}; change {VARIABLE}")
    return asked


def _native_for(device: torch.device, use: Use | None) -> bool:
    return device.type == "cpu" and use is not None and use.dtype == torch.bfloat16


def _forced_native(device: torch.device) -> Ops:
    try:
        if device.type != "cpu":
            raise ImportError(f"they do not run on {device.type}")
        return native_ops()
    except ImportError as error:
        raise RuntimeError(f"native kernels were asked for ({error}); ask for 'auto', or unset {VARIABLE}") from error


def _forced(device: torch.device) -> Ops:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"Triton's kernels run on an NVIDIA GPU, not on {device.type}; ask for 'torch' there, or unset {VARIABLE}"
        )
    try:
        return triton_ops()
    except ImportError as error:
        raise RuntimeError(
            f"Triton's kernels were asked for and cannot be imported ({error}); install triton, or unset {VARIABLE}"
        ) from error


def _automatic(device: torch.device, use: Use, table: Callable[[], Ops]) -> Ops:
    from . import startup_check

    try:
        ops = table()
    except ImportError as error:
        log.warning("all operations run in plain PyTorch: kernels cannot be imported (%s)", error)
        return TORCH
    refused = dict(startup_check.refusals(device, use))
    for name in [name for name in refused if name not in OPERATIONS]:
        flash_attention.refuse(name, refused.pop(name))
    ops = without(ops, refused)
    report(refused, ops)
    return ops


def report(refused: Mapping[str, str], ops: Ops) -> None:
    """Log one line for each reason, and one where decode steps can no longer be captured."""
    for reason in dict.fromkeys(refused.values()):
        names = ", ".join(name for name, own in refused.items() if own == reason)
        log.warning("plain PyTorch instead of kernels for %s: %s", names, reason)
    if refused and not ops.static:
        log.warning("decoding steps are not captured as CUDA graphs: plain PyTorch in them synchronises the device")
