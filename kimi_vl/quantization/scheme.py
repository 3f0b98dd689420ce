"""How a checkpoint's weights are quantised: ``quantization_config`` of ``config.json``, as compressed-tensors has it.

What this package reads and writes: weights alone, symmetric, as integers of 4 or 8 bits or as float8, with a scale for
a group of inputs, an output channel, a block or a whole matrix. Anything else is refused by name. Knows no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError

METHOD = "compressed-tensors"
_SECTION = "quantization_config"
_LINEAR = "Linear"  # the class of modules that a target may name, instead of modules
# Formats whose tensors are known, and whether their integers are packed into words of 32 bits.
_FORMATS = {
    "pack-quantized": True,
    "int-quantized": False,
    "naive-quantized": False,
    "float-quantized": False,
}
_MIXED = "mixed-precision"  # each group of modules has its own format
_INPUT_ORDERS = (None, "weight", "static")  # of quantising, which leave the inputs where they are


@dataclass(frozen=True)
class Scheme:
    """How one matrix is stored. A scale is for ``rows`` output channels and ``group`` inputs; 0 is all of them."""

    bits: int
    group: int = 0
    rows: int = 1
    packed: bool = True
    floating: bool = False

    @property
    def kind(self) -> str:
        """Of the numbers: "int4", "int8" or "float8"."""
        return "float8" if self.floating else f"int{self.bits}"

    def scales(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The shape of the scales of a matrix (outputs, inputs)."""
        return -(-outputs // (self.rows or outputs)), -(-inputs // (self.group or inputs))


@dataclass(frozen=True)
class Quantization:
    """Schemes by the modules that they are for; the first that names a module counts, and those that name a class are
    looked at last."""

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, values: Any) -> Quantization:
        """Read a ``quantization_config``; :class:`CheckpointError` names what is not supported in it."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{_SECTION} is not an object")
        if values.get("quant_method") != METHOD:
            raise CheckpointError(
                f"{_SECTION}.quant_method is {values.get('quant_method')!r}; only {METHOD!r} is supported: "
                "take a checkpoint in that form, or quantise the published one with kimi-vl pack --quantize"
            )
        _only(values, "quantization_status", (None, "compressed"))
        _only(values, "kv_cache_scheme", (None,))
        for name in ("sparsity_config", "transform_config"):
            if values.get(name):
                raise CheckpointError(f"{_SECTION}.{name} is there; only plain quantised weights are supported")
        _only(values, "format", (*_FORMATS, _MIXED))
        groups = values.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError(f"{_SECTION}.config_groups is missing or empty")
        schemes = [
            (
                _names(group, "targets", f"config_groups.{name}"),
                _scheme(group, f"config_groups.{name}", values["format"]),
            )
            for name, group in groups.items()
        ]
        return cls(tuple(schemes), _names(values, "ignore", ""))

    def scheme(self, module: str, *, linear: bool) -> Scheme | None:
        """That of a module's weight, or None where it is floating-point. ``linear``: the module is of that class."""
        if any(_matches(pattern, module) for pattern in self.ignored):
            return None
        for targets, scheme in self.schemes:
            if any(_matches(pattern, module) for pattern in targets):
                return scheme
        return next((scheme for targets, scheme in self.schemes if linear and _LINEAR in targets), None)


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _names(values: Any, field: str, section: str) -> tuple[str, ...]:
    full = ".".join(filter(None, (_SECTION, section, field)))
    names = (values.get(field) or []) if isinstance(values, Mapping) else None
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{full} is not a list of names")
    for name in names:
        try:
            re.compile(name[3:] if name.startswith("re:") else "")
        except re.error:
            raise CheckpointError(f"{full} has a pattern that is no regular expression: {name[:80]!r}") from None
    return tuple(names)


def _only(values: Mapping[str, Any], field: str, allowed: Sequence[Any], section: str = _SECTION) -> Any:
    """The value of a field. True and 1 are different ones."""
    value = values.get(field)
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        said = " or ".join(repr(one) for one in allowed)
        raise CheckpointError(f"{section}.{field} is {value!r}; only {said} is supported")
    return value


def _scheme(group: Mapping[str, Any], section: str, stored: str) -> Scheme:
    section = f"{_SECTION}.{section}"
    if group.get("format") is not None or stored == _MIXED:
        stored = _only(group, "format", tuple(_FORMATS), section)
    activations, weights = group.get("input_activations"), group.get("weights")
    if isinstance(activations, Mapping):  # the weights serve without: these stay floating-point
        _only(activations, "dynamic", (True, "local"), f"{section}.input_activations")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{section}.weights is missing")
    section += ".weights"
    kind = _only(weights, "type", ("int", "float"), section)
    bits = _only(weights, "num_bits", (8,) if kind == "float" else (4, 8), section)
    _only(weights, "symmetric", (True,), section)
    _only(weights, "dynamic", (None, False), section)
    _only(weights, "actorder", _INPUT_ORDERS, section)
    strategy = _only(weights, "strategy", ("tensor", "channel", "group", "block"), section)
    if kind == "float" and _FORMATS[stored]:
        raise CheckpointError(f"{section}.type is 'float', which the format {stored!r} does not have")
    rows, size = 1, 0
    if strategy == "group":
        size = _size(weights.get("group_size"), f"{section}.group_size")
    elif strategy == "block":
        structure = weights.get("block_structure")
        if not isinstance(structure, Sequence) or len(structure) != 2:
            raise CheckpointError(f"{section}.block_structure is {structure!r}; two sizes are expected")
        rows, size = (_size(each, f"{section}.block_structure") for each in structure)
    elif strategy == "tensor":
        rows = 0
    return Scheme(bits, size, rows, _FORMATS[stored], kind == "float")


def _size(value: Any, full: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{full} is {value!r}; it must be a positive integer")
    return value


# The forms that this package writes

# What has 8 bits in every form: the output head, and kv_b_proj, which takes queries into the latent space and is read
# along its outputs there, where it has no groups.
EXACT = ("re:.*lm_head$", "re:.*kv_b_proj$")
# What stays floating-point: the router decides, and what is small or read once is not worth an error.
KEPT = (
    "re:.*vision_tower.*",
    "re:.*multi_modal_projector.*",
    "re:.*mlp\\.gate$",
    "re:.*embed_tokens$",
)
FORMS: dict[str, Scheme] = {
    "int8": Scheme(8),
    "float8": Scheme(8, packed=False, floating=True),
    "int4": Scheme(4, 32),
    "int4-g128": Scheme(4, 128),
}
"""By name, how the decoder's matrices are quantised; ``EXACT`` ones have 8 bits in all of them."""


def form(name: str) -> Quantization:
    """A form by its name. Raises ValueError for another one."""
    if name not in FORMS:
        raise ValueError(f"weights are quantised as {', '.join(FORMS)}, not as {name!r}")
    exact = ((EXACT, FORMS["int8"]),) if FORMS[name].bits != 8 else ()
    return Quantization((*exact, ((_LINEAR,), FORMS[name])), KEPT)


def to_config(quantization: Quantization) -> dict[str, Any]:
    """A ``quantization_config`` of a form, as compressed-tensors, transformers and vLLM read it."""
    groups, stored = {}, ""
    for number, (targets, scheme) in enumerate(quantization.schemes):
        stored = "pack-quantized" if scheme.packed else "float-quantized"
        weights = {
            "num_bits": scheme.bits,
            "type": "float" if scheme.floating else "int",
            "symmetric": True,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group or None,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "observer": None,
            "observer_kwargs": {},
        }
        groups[f"group_{number}"] = {
            "targets": [*targets],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": stored,
        }
    return {
        "quant_method": METHOD,
        "format": stored,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [*quantization.ignored],
    }
