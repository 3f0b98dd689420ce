"""`scripts/bench load` at a tiny size: nothing is missing from its report, and it loads what was stored."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_suite import checkpoint, load
from safetensors.torch import load_file

from kimi_vl.weights import loader

ROOT = Path(__file__).parents[2]
TINY = 0.012  # GB
LOADERS = {"kimi_vl", "transformers"}
CEILINGS = {"copy", "read", "read_new"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "bench"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_the_report_is_complete(cache):
    process = bench("load", "--gb", str(TINY), "--rounds", "1", "--threads", "3", "--cache", str(cache))
    assert process.returncode == 0, process.stderr
    *lines, last = process.stdout.splitlines()
    report = json.loads(last)
    (folder,) = cache.iterdir()
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 6e6 < report["bytes"] <= TINY * 1e9 * 1.01
    assert (report["bench"], report["rounds"], report["threads"], report["device"]) == ("load", 1, 3, "cpu")
    assert report["torch"] == torch.__version__
    assert "/ 16" in report["shape"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(report["results"])
    assert report["results"].keys() == LOADERS | CEILINGS
    for (name, result), row in zip(report["results"].items(), rows[2:], strict=True):
        assert len(result["seconds"]) == 1
        assert result["gb_per_s"] > 0
        for ceiling in CEILINGS:
            share = 100 * result["gb_per_s"] / report["results"][ceiling]["gb_per_s"]
            assert math.isclose(result[f"percent_of_{ceiling}"], share, rel_tol=0.002)
        if name in LOADERS:
            assert math.isclose(result["seconds"][0] * result["gb_per_s"], report["bytes"] / 1e9, rel_tol=0.002)
            assert 0 < result["gb_per_s_until_touched"] <= result["gb_per_s"] * 1.001
            assert result["peak_over_model"] > 0.3
            assert all(row)
        assert len(row) == len(rows[0])
        assert row[0]
    times = report["results"]["kimi_vl"]["gb_per_s"] / report["results"]["transformers"]["gb_per_s"]
    assert math.isclose(report["times_transformers"], times, rel_tol=0.002)


def test_the_checkpoint_is_made_once_and_loads_as_stored(cache):
    made = checkpoint.ready(cache, TINY * 1e9)
    leftover = made.folder.with_name(f"{made.folder.name}.part-1")
    leftover.mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert checkpoint.ready(cache, TINY * 1e9) == made
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == before
    model = loader.load(made.folder)
    parameters = dict(model.named_parameters())
    stored = {name: value for path in made.shards for name, value in load_file(path).items()}
    layout = loader.checkpoint_layout(model.config)
    assert stored.keys() == layout.keys()
    for name, slot in layout.items():
        assert torch.equal(parameters[slot.parameter][slot.index], stored[name]), name
    (made.folder / "config.json").write_text("{}")  # as another version of the bench may have left it
    assert checkpoint.ready(cache, TINY * 1e9) == made
    assert loader.load(made.folder).config == model.config
    # no two tensors of a shape are the same, or a loader could mix them up unseen
    seen = {(value.shape, value.view(torch.uint8).numpy().tobytes()) for value in stored.values() if value.numel() > 9}
    assert len(seen) == len([value for value in stored.values() if value.numel() > 9])


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_both_loaders_give_the_stored_values_and_others_are_an_error(cache, name):
    folder = checkpoint.ready(cache, TINY * 1e9).folder
    sample = load.measure(name, folder, threads=2, device=torch.device("cpu"))
    load._same_values({other: [sample] for other in LOADERS}, folder)
    assert sample.values is not None
    wrong = load.Sample(sample.seconds, sample.nbytes, values=sample.values + 1)
    with pytest.raises(SystemExit, match="did not give the checkpoint's values"):
        load._same_values({other: [wrong if other == name else sample] for other in LOADERS}, folder)


def test_sizes(cache):
    published = checkpoint._configuration(4e9)[1]
    assert (published["text_config"]["hidden_size"], published["text_config"]["n_routed_experts"]) == (2048, 64)
    for gigabytes in (0.02, 0.3, 2.0, 4.0, 40.0):
        size = checkpoint._size(checkpoint._configuration(gigabytes * 1e9)[1])
        assert size <= gigabytes * 1e9
        assert size > 0.6 * gigabytes * 1e9 or gigabytes == 40.0
    with pytest.raises(ValueError, match="is too little for a checkpoint"):
        checkpoint._configuration(1e6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["load", "--gb", "0.001"], "--gb: 1.0 MB is too little"),
        (["load", "--rounds", "0"], "--rounds must be at least 1"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: name"),
    ],
    ids=["too small", "no rounds", "unknown", "none"],
)
def test_mistakes_are_named(arguments, words):
    command = [sys.executable, "-P", "-m", "bench_suite", *arguments]
    environment = {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}", "PATH": "/usr/bin:/bin"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 2
    assert words in process.stderr
    assert "Traceback" not in process.stderr
