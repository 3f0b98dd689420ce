"""Tensors that say they are on a GPU: each operation is judged as CUDA would judge it, and computed on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .machine import Machine, current, imitating
from .timelines import Block

# Operations after which the host has waited, since shapes or values come from the device.
_WAIT = frozenset(
    "_local_scalar_dense nonzero masked_select equal is_nonzero _unique2 unique_consecutive unique_dim bincount".split()
)
# Nothing runs on a device for these; views are known by their schemas.
_EMPTY = frozenset("empty empty_like empty_strided new_empty new_empty_strided _efficientzerotensor".split())
_FREE = frozenset("_unsafe_view resize_ set_ detach_ is_same_size".split())
# Composite operations that are one here; taken apart they would look for CUDA's own kernels.
_WHOLE = frozenset(("scaled_dot_product_attention",))
# They take numbers of the host as tensors without dimensions.
_GATHERS = frozenset("index index_select embedding gather take take_along_dim".split())
_PUTS = frozenset("index_put_ _index_put_impl_ index_copy_ scatter_ index_fill_ index_add_".split())
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "exponential", "dropout", "uniform")


@dataclass(frozen=True)
class _Facts:
    """What an operation's name and schema say of it."""

    name: str
    composite: bool
    free: bool
    writes: tuple[tuple[int, str], ...]  # arguments that are written to: their places and names
    one: bool  # one result, not several


@functools.cache
def _facts(func: Any) -> _Facts:
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    writes = tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    views = not writes and any(each.alias_info is not None for each in schema.returns)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Facts(
        name,
        composite and name not in (*_WHOLE, "is_pinned", "pin_memory"),
        views or name in _FREE or name in _EMPTY,
        writes,
        len(schema.returns) == 1,
    )


class DeviceTensor(Tensor):
    """Says ``cuda:N``; ``inner`` holds the values on the CPU, ``block`` is the device's memory that they are in."""

    inner: Tensor
    block: Block

    @staticmethod
    def __new__(cls, inner: Tensor, block: Block) -> DeviceTensor:
        with torch.inference_mode(False):  # else no view could be taken outside of inference
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(f"cuda:{block.device}"),
                requires_grad=False,
            )
        made.inner, made.block = inner, block
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is _SET_DATA:
            args[0].inner, args[0].block = args[1].inner, args[1].block
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


_SET_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


class DeviceMode(TorchDispatchMode):
    """Sees what has no tensor of a device among its arguments; each thread needs its own."""

    def __enter__(self) -> Any:
        # torch.tensor(…, device="cuda") shows its copy then; a setting of each thread
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _inner(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, list | tuple):
        return type(value)([_inner(each) for each in value])
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """All tensors among arguments, which are at most one list deep."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _wanted(args: Any, kwargs: Any) -> torch.device | None:
    device = kwargs.get("device")
    if device is None:
        device = next((value for value in args if isinstance(value, torch.device)), None)
    return None if device is None else torch.device(device)


def _size(values: Tensor) -> int:
    """Bytes that ``values`` take, repeated ones once."""
    pairs = zip(values.shape, values.stride(), strict=True)
    return math.prod(count for count, stride in pairs if stride) * values.element_size()


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    if not imitating():
        return func(*_inner(args), **{name: _inner(value) for name, value in kwargs.items()})
    machine, facts = current(), _facts(func)
    tensors, device = _tensors(args, kwargs), _wanted(args, kwargs)
    ours = [value for value in tensors if isinstance(value, DeviceTensor)]
    if not ours and not (device is not None and device.type == "cuda"):
        return _on_host(machine, facts, func, args, kwargs, tensors)
    if facts.composite:
        if device is not None and device.type == "cuda" and device.index is None:
            # torch's own code would ask the guard for the current one
            named = torch.device("cuda", machine.own.device)
            args = [named if isinstance(value, torch.device) else value for value in args]
            kwargs = {**kwargs, "device": named} if "device" in kwargs else kwargs
        with DeviceMode():  # in inference mode such operations come whole
            return func.decompose(*args, **kwargs)
    if facts.name == "is_pinned":
        return False
    with machine.lock, torch.inference_mode():
        if facts.name in ("_to_copy", "copy_"):
            return _copy(machine, func, facts, args, kwargs, device)
        return _on_device(machine, func, facts, args, kwargs, tensors, ours, device)


def _on_host(machine: Machine, facts: _Facts, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
    if facts.name == "is_pinned":
        return args[0].untyped_storage()._cdata in machine.pinned
    if facts.name in ("pin_memory", "_pin_memory"):
        return machine.pin(args[0].clone())
    if kwargs.get("pin_memory"):
        return machine.pin(func(*args, **{**kwargs, "pin_memory": False}))
    if machine.pinned and not facts.free:
        written = [args[place] if place < len(args) else kwargs.get(name) for place, name in facts.writes]
        for value in tensors:
            machine.host_access(value, facts.name, any(value is each for each in written))
    return func(*args, **kwargs)


def _on_device(
    machine: Machine,
    func: Any,
    facts: _Facts,
    args: Any,
    kwargs: Any,
    tensors: Sequence[Tensor],
    ours: Sequence[DeviceTensor],
    device: torch.device | None,
) -> Any:
    name = facts.name
    if device is not None and device.type == "cuda":
        index = machine.index(device)
    elif device is not None:  # empty_like(…, device="cpu") and such: only the shape is taken
        pinned = kwargs.get("pin_memory", False)
        with torch.inference_mode(False):
            made = func(*_inner(args), **{**{key: _inner(each) for key, each in kwargs.items()}, "pin_memory": False})
        return machine.pin(made) if pinned else made
    else:
        index = ours[0].block.device or 0
    _judge(machine, facts, args, tensors, index)
    plain, named = _inner(args), {key: _inner(value) for key, value in kwargs.items()}
    graph = machine.own.graph
    if facts.free:
        result = func(*plain, **named)
        if name in _EMPTY:
            spoil(result) if graph is None else result.zero_()  # a capture computes nothing
        return _wrapped(machine, result, index, facts, args, kwargs, graph)
    if name in _WAIT:
        machine.wait(f"{name}: its shape or value comes from the device", [machine.stream(index)])
    mark = machine.begin(index, name, launches=graph is None and name != "_local_scalar_dense")
    written = [args[place] if place < len(args) else kwargs.get(key) for place, key in facts.writes]
    written = [value for value in tree_leaves(written) if isinstance(value, DeviceTensor)]
    reads = [value for value in ours if not any(value is each for each in written)]
    if graph is not None:
        graph.belongs(index, name)
        if any(word in name for word in _RANDOM):
            machine.report("capture", f"random numbers of the device in a capture ({name})")
        results = None if written else func(*plain, **named)
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                value.zero_()  # a capture computes nothing
    else:
        for value in reads:
            machine.access(value.block, mark, name, False, value.inner)
        for value in written:
            machine.access(value.block, mark, name, True, value.inner)
        results = func(*plain, **named)
    if name == "_local_scalar_dense" or (results is not None and not tree_leaves(results)):
        return results
    made = [value for value in tree_leaves(results) if isinstance(value, Tensor)]
    outputs = made if not written else [value.inner for value in written]
    traffic = _traffic(name, [value.inner for value in reads], outputs, args)
    if graph is None:
        machine.counts.bytes_read += traffic[0]
        machine.counts.bytes_written += traffic[1]
    if written:
        if graph is not None:
            graph.add(name, lambda: func(*plain, **named), reads, written, traffic)
        return _returned(facts, args, kwargs)
    if isinstance(results, bool | int | float):
        return results
    wrapped = _wrapped(machine, results, index, facts, args, kwargs, graph)
    new = [value for value in tree_leaves(wrapped) if isinstance(value, DeviceTensor)]
    for value in new if graph is None else ():
        machine.access(value.block, mark, name, writes=True)
    if graph is not None:
        graph.add(name, functools.partial(_again, func, plain, named, made), reads, new, traffic)
    return wrapped


def _again(func: Any, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> None:
    """A captured operation, into the memory that its results had."""
    results = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
    for output, result in zip(outputs, results, strict=True):
        if output.shape != result.shape:
            raise RuntimeError("a captured operation has results of another shape")
        output.copy_(result)


def _returned(facts: _Facts, args: Any, kwargs: Any) -> Any:
    """The arguments themselves, where an operation returns what it has written to."""
    found = [args[place] if place < len(args) else kwargs[name] for place, name in facts.writes]
    return found[0] if facts.one else tuple(found)


def _wrapped(machine: Machine, result: Any, index: int, facts: _Facts, args: Any, kwargs: Any, graph: Any) -> Any:
    if facts.writes:
        return _returned(facts, args, kwargs)
    if isinstance(result, Tensor):
        block = machine.block(result)
        if block is None:
            block = machine.allocate(result, index)
            if graph is not None:
                graph.adopt(block, result)
        return DeviceTensor(result, block)
    if isinstance(result, list | tuple):
        return type(result)([_wrapped(machine, each, index, facts, args, kwargs, graph) for each in result])
    return result


def spoil(values: Tensor) -> None:
    """Fills ``values`` with what memory holds that nobody has written: nothing that may ever be used."""
    if values.is_floating_point():
        values.fill_(float("nan"))
    elif values.dtype != torch.bool:
        values.fill_(101)


def _judge(machine: Machine, facts: _Facts, args: Any, tensors: Sequence[Tensor], index: int) -> None:
    """Reports arguments that CUDA's operations would not take, and raises where these would."""
    name = facts.name
    indices = args[1] if name.startswith(("index_put", "_index_put")) or name == "index" else ()
    for value in tensors:
        if isinstance(value, DeviceTensor):
            if value.block.device != index:
                machine.report("device", f"{name} of tensors on cuda:{index} and cuda:{value.block.device}")
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"cuda:{index} and cuda:{value.block.device}!"
                )
        elif any(value is each for each in indices):
            machine.report("device", f"{name}: an index {tuple(value.shape)} lies on the host")
            machine.counts.pageable_copies += 1
            machine.wait(f"{name}: an index is copied to the device", [machine.stream(index)])
        elif value.dim():
            machine.report("device", f"{name} of a tensor {tuple(value.shape)} of the host and others on cuda:{index}")
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:{index} and cpu!"
            )
        elif indices:
            machine.counts.pageable_copies += 1
            machine.wait(f"{name}: a number of the host is copied to the device", [machine.stream(index)])
    for each in indices:
        if isinstance(each, DeviceTensor) and each.dtype in (torch.bool, torch.uint8):
            machine.wait(f"{name}: how many a mask chooses comes from the device", [machine.stream(index)])
    if name == "_grouped_mm":
        _judge_groups(machine, args, index)


def _judge_groups(machine: Machine, args: Any, index: int) -> None:
    """What torch's grouped GEMM asks of its arguments, and where it is one launch."""
    states, weight, ends = args[:3]
    for value in (states, weight):
        last, other, itemsize = value.stride(-1), value.stride(-2), value.element_size()
        rows = other if last == 1 else last if other == 1 else 0
        if value.dtype != torch.bfloat16 or not rows or rows * itemsize % 16:
            machine.report("kernel", "grouped_mm takes bfloat16 in rows of 16 bytes")
        if value.storage_offset() * itemsize % 16:
            machine.report("kernel", "grouped_mm takes addresses that are multiples of 16")
    if ends is None or ends.dtype != torch.int32 or weight.shape[0] >= 1024:
        machine.report("kernel", "grouped_mm takes int32 ends of fewer than 1024 groups")
    if machine.devices[index].card.capability not in ((9, 0), (10, 0)):
        machine.wait("grouped_mm asks the device for its groups, and launches a GEMM each", [machine.stream(index)])
        machine.counts.launches += weight.shape[0]


def _traffic(name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], args: Any) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    written = sum(map(_size, writes))
    if name == "_grouped_mm":  # a group without rows is not looked at
        ends = _inner(args[2])
        used = int((ends.diff(prepend=ends.new_zeros(1)) > 0).sum())
        return _size(reads[0]) + _size(reads[1]) // len(ends) * used + _size(ends), written
    if name in _GATHERS:
        return written + sum(map(_size, reads[1:])), written
    if name in _PUTS:
        values = [value for value in args[2:] if isinstance(value, Tensor)]
        touched = sum(_size(value) for value in values if value.dim()) or written
        return sum(map(_size, reads)), min(written, touched)
    return sum(map(_size, reads)), written


# ---------------------------------------------------------------------------------------------
# Copies


def _copy(machine: Machine, func: Any, facts: _Facts, args: Any, kwargs: Any, device: torch.device | None) -> Any:
    """Between host and device, between devices, and from one type to another."""
    target = args[0] if facts.name == "copy_" else None
    source = args[1] if target is not None else args[0]
    begins = source.block.device if isinstance(source, DeviceTensor) else None
    if target is not None:
        ends = target.block.device if isinstance(target, DeviceTensor) else None
    elif device is None:
        ends = begins
    else:
        ends = machine.index(device) if device.type == "cuda" else None
    quick = bool(kwargs.get("non_blocking") or (target is not None and len(args) > 2 and args[2]))
    if begins is not None and ends is not None:
        if begins == ends:
            rest = {key: value for key, value in kwargs.items() if key != "device"}
            tensors = [value for value in (target, source) if value is not None]
            return _on_device(machine, func, facts, args, rest, tensors, tensors, None)
        return _between_devices(machine, func, args, kwargs, target, source, ends)
    if begins is None:
        return _up(machine, func, kwargs, target, source, ends or 0, quick)
    return _down(machine, func, kwargs, target, source, begins, quick)


def _between_devices(
    machine: Machine, func: Any, args: Any, kwargs: Any, target: Any, source: DeviceTensor, ends: int
) -> Any:
    mark = machine.begin(source.block.device or 0, "a copy between devices")
    machine.access(source.block, mark, "a copy between devices", False, source.inner)
    if target is None:
        values = func(*_inner(args), **{key: _inner(value) for key, value in kwargs.items()})
        values = values.clone() if values is source.inner else values
        target = DeviceTensor(values, machine.allocate(values, ends))
    else:
        target.inner.copy_(source.inner)
    # torch orders the copy with the current streams of both devices
    machine.stream(ends).timeline.follow(machine.stream(source.block.device).timeline.known)
    machine.access(
        target.block, machine.begin(ends, "a copy between devices", launches=0), "a copy", True, target.inner
    )
    return target


def _up(machine: Machine, func: Any, kwargs: Any, target: Any, source: Tensor, index: int, quick: bool) -> Any:
    """From the host to a device."""
    found, graph = machine.pinned.get(source.untyped_storage()._cdata), machine.own.graph
    if target is not None:
        whole = target.inner.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        whole = whole and target.shape == source.shape
        if not whole and source.dim():
            found = None  # torch copies from a temporary of its own, which is pageable
    what = f"{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')} to the device"
    if found is None:
        machine.forbid_in_capture(f"pageable memory is copied, {what}")
        machine.counts.pageable_copies += 1
        machine.note("pageable copy", f"a pageable copy of {what}")
    else:
        machine.counts.pinned_copies += 1
        machine.note("pinned copy", f"a copy of {what}", forbidden=False)
    stream = machine.stream(index)
    mark = machine.begin(index, "a copy to the device", launches=0)
    if target is None:
        named = {key: _inner(value) for key, value in kwargs.items() if key not in ("non_blocking", "device")}
        values = func(source, **named) if found is None else torch.empty_like(func(source, **named))
        values = values.clone() if values is source else values
        target = _wrapped(machine, values, index, _facts(func), (), {}, graph)
    machine.access(target.block, mark, "a copy to the device", True, target.inner)
    machine.counts.bytes_written += _size(target.inner)
    inner = target.inner
    if found is None:
        inner.copy_(source)
    else:
        machine.access(found[0], mark, "a copy to the device", False, source)
        arrival = functools.partial(_arrive, inner, source)
        if graph is not None:
            graph.belongs(index, "copy_")
            graph.add("copy_", arrival, [], [target], (0, _size(inner)))
        else:
            machine.later(None, arrival)
    if not quick:
        machine.wait(f"a blocking copy of {what}", [stream])
    return target


def _down(machine: Machine, func: Any, kwargs: Any, target: Any, source: DeviceTensor, index: int, quick: bool) -> Any:
    """From a device to the host."""
    what = f"{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')} to the host"
    found = None if target is None else machine.pinned.get(target.untyped_storage()._cdata)
    machine.forbid_in_capture(f"a result is copied, {what}")
    stream = machine.stream(index)
    mark = machine.begin(index, "a copy to the host", launches=0)
    machine.access(source.block, mark, "a copy to the host", False, source.inner)
    machine.counts.bytes_read += _size(source.inner)
    with torch.inference_mode(False):
        values = func(source.inner.clone(), **{**kwargs, "device": torch.device("cpu")}) if target is None else None
        kept = source.inner.clone() if values is None else values
    if target is None and quick:  # torch makes it pinned, and does not wait
        target, kept = machine.pin(torch.empty_like(kept)), kept
        found = machine.pinned[target.untyped_storage()._cdata]
    if found is not None and quick:
        machine.counts.pinned_copies += 1
        machine.note("pinned copy", f"a copy of {what}", forbidden=False)
        assert target is not None
        machine.access(found[0], mark, "a copy to the host", True, target)
        spoil(target)
        machine.later(mark, functools.partial(_arrive, target, kept))
        return target
    if found is None:
        machine.counts.pageable_copies += 1
        if quick:
            machine.report("race", f"a copy to pageable memory that does not wait: {what}")
    machine.wait(f"a blocking copy of {what}", [stream])
    return values if target is None else target.copy_(kept)


def _arrive(target: Tensor, source: Tensor) -> None:
    with torch._C._DisableTorchDispatch(), torch.inference_mode():
        target.copy_(source)


# ---------------------------------------------------------------------------------------------
# What the host reads without an operation


def replaced_reads() -> dict[str, Callable[..., Any]]:
    """Methods of torch.Tensor that look into memory past the dispatcher, as they are while a machine is imitated."""
    tolist, numpy = torch.Tensor.tolist, torch.Tensor.numpy

    def read_list(self: Tensor) -> Any:
        if isinstance(self, DeviceTensor):
            machine = current()
            machine.wait("tolist", [machine.stream(self.block.device)])
            return tolist(self.inner)
        current().host_access(self, "tolist", writes=False)
        return tolist(self)

    def as_numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, DeviceTensor):
            raise TypeError("can't convert cuda device type tensor to numpy; use Tensor.cpu() first")
        current().host_access(self, "numpy", writes=True)
        return numpy(self, *args, **kwargs)

    return {"tolist": read_list, "numpy": as_numpy}
