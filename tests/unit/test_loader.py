"""Every value arrives exactly; a checkpoint that is not whole is refused with one sentence that names what is off."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kimi_vl.errors import CheckpointError
from kimi_vl.model.config import Config
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader, shards

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "golden_a" / "checkpoint"
GATE = "language_model.model.layers.1.mlp.gate.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    return tmp_path


def rewritten(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_saving_gives_back_every_tensor(folder):
    model = loader.load(folder, dtype=torch.float32)
    loader.save(model, folder / "again.safetensors", dtype=torch.float32)
    before, after = load_file(folder / "model.safetensors"), load_file(folder / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_split_checkpoint_is_the_same_model(folder):
    whole = loader.load(folder, dtype=torch.float32).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(7):
        file = f"model-{number + 1:05d}-of-00007.safetensors"
        save_file({name: tensors[name] for name in names[number::7]}, folder / file)
        weight_map |= dict.fromkeys(names[number::7], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    split = loader.load(folder, dtype=torch.float32, threads=3).state_dict()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    (folder / "model-00003-of-00007.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00007\.safetensors: is missing"):
        loader.load(folder)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(tmp_path, odd_config):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    right = weight_map[GATE]
    weight_map[GATE] = wrong = f"model-{1 - int(right[6])}.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        loader.check(tmp_path)
    assert f"{wrong}: tensor {GATE} is not in it" in str(caught.value)
    assert f"{right}: unexpected tensor {GATE}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(GATE), rf"missing tensor {GATE}"),
        (lambda t: t.pop(EXPERT), rf"missing tensor {EXPERT}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (
            lambda t: t.update({GATE: t[GATE][:4].clone()}),
            rf"{GATE} has shape \(4, 64\); \(8, 64\) was expected",
        ),
        (lambda t: t.update({GATE: t[GATE].int()}), rf"{GATE} has dtype I32"),
    ],
    ids=["missing", "missing expert", "unexpected", "misshapen", "integers"],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=words):
        loader.load(folder)


@pytest.mark.parametrize("length", [0, 5, 2000, 1_000_000])
def test_a_cut_off_file_is_named(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a complete safetensors file"):
        loader.load(folder)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        loader.load(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"weight_map": {"x": "../model.safetensors"}}', '{"weight_map": 3}'])
def test_a_bad_index_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        loader.load(folder)


# ---------------------------------------------------------------------------------------------
# Values

ODD = {
    "vision_config": {"num_attention_heads": 3, "hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 1},
    "text_config": {
        "vocab_size": 101,
        "hidden_size": 7,
        "intermediate_size": 13,
        "moe_intermediate_size": 3,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
    },
    "media_placeholder_token_id": 99,
}
FLOATING = [torch.float32, torch.float16, torch.bfloat16]
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Values on which a conversion can go wrong: ties, subnormals, the largest, beyond the largest of a narrower type.
CORNERS = [0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 65504.0, 65520.0, 6e-8, 1e-40, float("inf"), -float("inf")]


@pytest.fixture(scope="module")
def odd_config():
    """A configuration whose sizes are odd wherever they may be: nothing fits into round numbers of bytes."""
    values = json.loads((CHECKPOINT / "config.json").read_text())
    for name, change in ODD.items():
        values[name] = values[name] | change if isinstance(change, dict) else change
    return values


def random_tensors(values: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in ``dtype``, all different, with the corners at one's end."""
    generator = torch.Generator().manual_seed(7)
    layout = loader.checkpoint_layout(Config.from_dict(values))
    tensors = {name: torch.randn(slot.shape, generator=generator) for name, slot in layout.items()}
    tensors[GATE].view(-1)[-len(CORNERS) :] = torch.tensor(CORNERS)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], padding: int = 0) -> None:
    """A safetensors file with the tensors in the order given, and ``padding`` spaces after its header."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode() + b" " * padding
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def write_folder(
    folder: Path, values: dict, tensors: dict[str, torch.Tensor], shards: int = 1, padding: int = 0
) -> None:
    """A checkpoint folder; tensors are dealt to the shards in turn, so that every shard has parts of fused ones."""
    (folder / "config.json").write_text(json.dumps(values))
    if shards == 1:
        write(folder / "model.safetensors", tensors, padding)
        return
    weight_map = {}
    for number in range(shards):
        names = list(tensors)[number::shards]
        write(folder / f"model-{number}.safetensors", {name: tensors[name] for name in names}, padding + number)
        weight_map |= dict.fromkeys(names, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_holds(model: KimiVL, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every parameter is, to the bit, the stored tensor as torch converts it."""
    parameters = dict(model.named_parameters())
    for name, slot in loader.checkpoint_layout(model.config).items():
        expected = tensors[name].to(torch.float32 if name.endswith("e_score_correction_bias") else dtype)
        found = parameters[slot.parameter][slot.index].cpu()
        assert found.dtype == expected.dtype, name
        same = found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))
        assert same, name


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("stored", [*FLOATING, torch.float64], ids=str)
def test_values_are_exact(tmp_path, odd_config, stored, dtype, padding):
    tensors = random_tensors(odd_config, stored)
    mixed = {name: tensors[name] for name in sorted(tensors, key=lambda name: name[::-1])}  # no order of ours
    mixed |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")}
    write_folder(tmp_path, odd_config, mixed, padding=padding)
    assert_holds(loader.load(tmp_path, dtype=dtype), mixed, dtype)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["in place", "converted"])
@pytest.mark.parametrize(("threads", "piece"), [(1, 8), (1, 24), (16, 8), (16, 72), (3, 2**24)])
def test_threads_and_pieces_change_nothing(tmp_path, odd_config, monkeypatch, stored, threads, piece):
    tensors = random_tensors(odd_config, stored)
    write_folder(tmp_path, odd_config, tensors, shards=5)
    monkeypatch.setattr(loader, "_PIECE", piece)
    assert_holds(loader.load(tmp_path, threads=threads), tensors, torch.bfloat16)


def test_large_tensors_are_shared_among_threads(tmp_path, odd_config, monkeypatch):
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors)
    monkeypatch.setattr(loader, "_PIECE", 1000)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert largest > 4 * 1000
    both, real = threading.Barrier(2, timeout=300), os.preadv
    reads: dict[int, list[tuple[int, int]]] = {}

    def preadv(file, buffers, offset):
        mine = reads.setdefault(threading.get_ident(), [])
        mine.append((offset, len(buffers[0])))
        if len(mine) == 1:
            both.wait()  # neither goes on before the other has some work too
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert_holds(loader.load(tmp_path, threads=2), tensors, torch.bfloat16)
    assert len(reads) == 2
    for mine in reads.values():
        assert mine == sorted(mine)
        assert max(count for _, count in mine) == 1000
    assert sum(count for mine in reads.values() for _, count in mine) == sum(t.nbytes for t in tensors.values())


def test_a_read_may_give_less_than_was_asked_for(tmp_path, odd_config, monkeypatch):
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: real(file, [buffers[0][:7]], offset))
    for dtype in (torch.bfloat16, torch.float32):
        assert_holds(loader.load(tmp_path, dtype=dtype), tensors, dtype)


@pytest.mark.slow
def test_loading_imports_little():
    """The parts of torch that compile and reason about shapes take longer to import than the demo model to load."""
    program = f"""
        import sys
        from kimi_vl.weights import loader
        before = set(sys.modules)
        loader.load({str(CHECKPOINT)!r})
        new = set(sys.modules) - before
        print(len(new), *sorted({{"sympy", "torch._dynamo", "torch.fx"}} & new))
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    count, *heavy = output.split()
    assert heavy == []
    assert int(count) < 50


def test_nothing_needs_values_that_no_file_holds(odd_config):
    model = loader.empty_model(Config.from_dict(odd_config))
    assert list(model.buffers()) == []


class LateLane(loader._Lane):
    """Copies as late as a device may: only when it is waited for."""

    buffers = 2

    def _send(self, values, target):
        return lambda: target.copy_(values)


def test_a_buffer_is_used_again_only_when_its_copy_is_done(tmp_path, odd_config, monkeypatch):
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors)
    monkeypatch.setitem(loader._LANES, "cpu", LateLane)
    for threads in (1, 4):
        assert_holds(loader.load(tmp_path, dtype=torch.float32, threads=threads), tensors, torch.float32)


def test_the_lane_to_a_gpu_keeps_its_order(tmp_path, odd_config, monkeypatch):
    """Its calls, with this machine's memory as the device: each copy is marked on the lane's own stream, and waited
    for before its buffer is used again and before the end."""
    calls: list[tuple[str, object]] = []
    within: list[object] = []

    class Event:
        def record(self, stream):
            assert within == [stream]
            calls.append(("record", self))

        def synchronize(self):
            calls.append(("wait", self))

    @contextlib.contextmanager
    def current(stream):
        within.append(stream)
        yield
        within.pop()

    class Lane(loader._CudaLane):
        def _buffer(self):
            return torch.empty(loader._PIECE, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setitem(loader._LANES, "cpu", Lane)
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors)
    assert_holds(loader.load(tmp_path, dtype=torch.float32, threads=1), tensors, torch.float32)
    assert calls.pop(0) == ("device", torch.device("cpu"))
    waiting: list[object] = []
    for call, event in calls:
        if call == "record":
            waiting.append(event)
            assert len(waiting) <= 2
        else:
            assert event is waiting.pop(0)
    assert waiting == []
    assert len(calls) > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_values_are_exact_on_a_gpu(tmp_path, odd_config, monkeypatch, dtype):
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors, shards=2)
    for piece in (96, 2**24):
        monkeypatch.setattr(loader, "_PIECE", piece)
        model = loader.load(tmp_path, dtype=dtype, device="cuda")
        assert model.device.type == "cuda"
        assert_holds(model, tensors, dtype)


# ---------------------------------------------------------------------------------------------
# Faults while reading


def test_a_file_cut_off_after_the_check_is_named(tmp_path, odd_config, monkeypatch):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16))
    path, check = tmp_path / "model.safetensors", loader.read_headers

    def cut(*arguments):
        headers = check(*arguments)
        path.write_bytes(path.read_bytes()[:-9])
        return headers

    monkeypatch.setattr(loader, "read_headers", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was cut off while it was read"):
        loader.load(tmp_path)


def test_the_first_fault_ends_all_threads(tmp_path, odd_config, monkeypatch):
    tensors = random_tensors(odd_config, torch.bfloat16)
    write_folder(tmp_path, odd_config, tensors)
    calls, real = [], os.preadv

    def preadv(file, buffers, offset):
        calls.append(offset)
        if len(calls) == 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        time.sleep(0.01)
        return real(file, buffers, offset)

    monkeypatch.setattr(loader, "_PIECE", 8)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Input/output error\)"):
        loader.load(tmp_path, threads=4)
    after = len(calls)
    assert after < sum(tensor.nbytes for tensor in tensors.values()) / 8 / 2  # of all, eight bytes each
    time.sleep(0.1)
    assert len(calls) == after


def test_loading_is_reported(tmp_path, odd_config, monkeypatch, caplog):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16))
    caplog.set_level(logging.INFO, logger="kimi_vl.weights.loader")
    monkeypatch.setattr(loader, "_REPORT_S", 3600)
    loader.load(tmp_path)
    quick = [record.getMessage() for record in caplog.records]
    assert len(quick) == 1
    assert re.fullmatch(r"loaded \d+\.\d\d GB in \d+\.\d s \(\d+\.\d\d GB/s\)", quick[0])
    caplog.clear()
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: time.sleep(0.002) or real(*arguments))
    monkeypatch.setattr(loader, "_REPORT_S", 0.02)
    loader.load(tmp_path, threads=2)
    slow = [record.getMessage() for record in caplog.records]
    assert len(slow) >= 2
    assert all(re.fullmatch(r"loading: \d+\.\d\d of \d+\.\d\d GB, \d+\.\d\d GB/s", line) for line in slow[:-1])
    assert slow[-1].startswith("loaded ")


# ---------------------------------------------------------------------------------------------
# Headers that lie


def with_header(folder: Path, change, tail: bytes = b"") -> Path:
    """The folder's file with another header: ``change`` gets the entries and gives back entries, or the text itself."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header if changed is None else changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :] + tail)
    return path


def shifted(name: str, begin: int, end: int):
    def change(header):
        header[name]["data_offsets"][0] += begin
        header[name]["data_offsets"][1] += end

    return change


def replaced(name: str, **values):
    return lambda header: header[name].update(values)


def twice(header):
    text = json.dumps(header)
    entry = json.dumps({GATE: header[GATE]})[1:-1]
    return f"{text[:-1]}, {entry}}}".encode()


NOTHING = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
LIES = {
    "overlap": (shifted(GATE, -2, -2), "begins at byte"),
    "shorter": (shifted(GATE, 0, -2), f"{GATE} has 110 bytes, which is not BF16 of shape"),
    "backwards": (lambda h: h[GATE]["data_offsets"].reverse(), f"the entry of tensor {GATE} is not one"),
    "far outside": (shifted(GATE, 2**40, 2**40), "begins at byte"),
    "negative": (replaced(GATE, data_offsets=[-112, 0]), f"the entry of tensor {GATE} is not one"),
    "fraction": (replaced(GATE, data_offsets=[0.0, 112.0]), f"the entry of tensor {GATE} is not one"),
    "three offsets": (replaced(GATE, data_offsets=[0, 1, 2]), f"the entry of tensor {GATE} is not one"),
    "true as a size": (replaced(GATE, shape=[True, 56]), f"the entry of tensor {GATE} is not one"),
    "negative sizes": (replaced(GATE, shape=[-8, -7]), f"the entry of tensor {GATE} is not one"),
    "endless sizes": (replaced(GATE, shape=[9] * 100_000), f"the entry of tensor {GATE} is not one"),
    "other dtype": (replaced(GATE, dtype="F32"), f"{GATE} has 112 bytes, which is not F32 of shape"),
    "no dtype": (lambda h: h[GATE].pop("dtype") and None, f"the entry of tensor {GATE} is not one"),
    "a number": (lambda h: h.update({GATE: 3}), f"the entry of tensor {GATE} is not one"),
    "twice": (twice, "has a name twice"),
    "a hole": (lambda h: h.pop(GATE) and None, "begins at byte"),
    "metadata": (lambda h: h.update(__metadata__={"format": 3}), "__metadata__ is not an object of texts"),
    "half a pair": (lambda h: h.update({"\ud800": NOTHING}), "surrogates not allowed"),
    "a list": (lambda h: b"[]", "the header is not an object"),
    "blank first": (lambda h: b" " + json.dumps(h).encode(), "the header is not an object"),
    "other encoding": (lambda h: json.dumps(h).encode("utf-16-le"), "is not a complete safetensors file"),
    "not UTF-8": (lambda h: b'{"\xff": 1}', "is not a complete safetensors file"),
    "nothing": (lambda h: b"", "the header is not an object"),
    "too deep": (lambda h: b'{"a":' * 200_000, "is not a complete safetensors file"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path, odd_config, lie):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16))
    change, words = LIES[lie]
    path = with_header(tmp_path, change)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: is not a complete safetensors file (")) as caught:
        loader.check(tmp_path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        loader.load(tmp_path)


@pytest.mark.parametrize("change", [(b"\0", 0), (b"", -1)], ids=["one more", "one less"])
def test_a_file_of_another_length_is_refused(tmp_path, odd_config, change):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16))
    path = tmp_path / "model.safetensors"
    tail, cut = change
    content = path.read_bytes()
    path.write_bytes(content[: len(content) + cut] + tail)
    with pytest.raises(CheckpointError, match=r"its tensors end at byte \d+, the file at \d+"):
        loader.check(tmp_path)


def test_two_tensors_in_one_place_are_refused(tmp_path, odd_config):
    """Each begins where another ends or both begin, and the last ends with the file: only the overlap is wrong."""
    tensors = random_tensors(odd_config, torch.bfloat16)
    shared = tensors.pop(EXPERT.replace("layers.2", "layers.1"))
    write_folder(tmp_path, odd_config, tensors)
    twin = EXPERT.replace("layers.2", "layers.1").replace("up_proj", "gate_proj")
    assert tensors[twin].shape == shared.shape
    with_header(tmp_path, lambda header: header.update({EXPERT.replace("layers.2", "layers.1"): header[twin]}))
    with pytest.raises(CheckpointError, match=r"begins at byte \d+, where \d+ was expected"):
        loader.check(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000])
def test_an_absurd_header_length_is_refused_without_reading_it(tmp_path, odd_config, length):
    write_folder(tmp_path, odd_config, random_tensors(odd_config, torch.bfloat16))
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(max(9_000, length + 9 if length < 2**30 else 0))  # sparse; long enough but for the limit
    if length == 10_000:
        path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(CheckpointError, match=rf"a header of {length} bytes in a file of \d+"):
        loader.check(tmp_path)


def test_headers_are_judged_as_by_safetensors(tmp_path, odd_config):
    """Thousands of small changes to a header: what safetensors refuses is refused, what is accepted is the same."""
    small = dict(list(random_tensors(odd_config, torch.bfloat16).items())[:4])
    path = tmp_path / "model.safetensors"
    write(path, small)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    pristine, chance = content[8 : 8 + length].decode(), random.Random(5)
    accepted = refused = 0
    for _ in range(3000):
        entries = json.loads(pristine)
        for _ in range(chance.choice([0, 1, 1, 2])):
            mutate(entries, chance)
        text = json.dumps(entries).encode()
        if chance.random() < 0.2:
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice([b"", b"0", b" ", b'"', b"}", b"\\"]) + text[at + 1 :]
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        try:
            held = shards.read_header(path)
        except CheckpointError:
            refused += 1
            continue
        if any(stored.kind not in KINDS.values() for stored in held.values()):
            continue  # refused by name, see above
        accepted += 1
        with safe_open(path, framework="pt") as file:  # raises where it finds a fault
            assert set(file.keys()) == held.keys()
            for name, stored in held.items():
                part = file.get_slice(name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (stored.kind, stored.shape)
                raw = path.read_bytes()[stored.begin : stored.end]
                assert file.get_tensor(name).view(-1).view(torch.uint8).numpy().tobytes() == raw
    assert accepted > 300
    assert refused > 1000


def mutate(entries: dict, chance: random.Random) -> None:
    """One small change to a parsed header."""
    name = chance.choice(sorted(entries))
    other = chance.choice(sorted(entries))
    entry = entries[name]
    if not isinstance(entry, dict) or not isinstance(entries[other], dict) or name == "__metadata__":
        return
    offsets, shape = entry.get("data_offsets"), entry.get("shape")
    match chance.randrange(10):
        case 0 if offsets:
            offsets[chance.randrange(len(offsets))] += chance.choice([-2, -1, 1, 2, 2**33])
        case 1 if shape:
            shape[chance.randrange(len(shape))] += chance.choice([-1, 1, 2**62])
        case 2:
            entry["dtype"] = chance.choice(["F32", "BF16", "F16", "f16", "Q8", None])
        case 3:
            entries[name], entries[other] = entries[other], entry
        case 4:
            del entries[name]
        case 5:
            entry.pop(chance.choice(sorted(entry)), None)
        case 6:
            entries["__metadata__"] = chance.choice([{}, {"format": "pt"}, {"format": 1}, [], "x"])
        case 7:
            entries["extra"] = {"dtype": "F16", "shape": [chance.choice([0, 1])], "data_offsets": [0, 0]}
        case 8 if shape:
            shape.reverse()
        case 9:
            entry[chance.choice(["dtype", "shape", "data_offsets"])] = chance.choice(
                [None, 1, "x", [], [0, 0], {}, True]
            )
