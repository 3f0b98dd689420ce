"""`kimi-vl cluster` with two replicas on the CPU, in a network namespace: what it survives, with counts.

Ray is in an environment of its own (`kimi_vl_cluster` in scripts/environment.sh; RAY_PYTHON names another one).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT

SCENARIO = Path(__file__).with_name("cluster_scenario.py")

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def python() -> str:
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs network namespaces: Ray's ports would be open to others")
    if found := os.environ.get("RAY_PYTHON"):
        return found
    made = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh && kimi_vl_cluster"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("Ray cannot be installed from the registry of packages, or not now")
    return made.stdout.strip()


def in_namespace(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """A command whose home, where Ray keeps its token, is its own."""
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "-rn", *command],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module", params=["127.0.0.1", "0.0.0.0"], ids=["Ray's proxy", "HAProxy"])
def found(
    request: pytest.FixtureRequest, python: str, endless_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What happened."""
    home = tmp_path_factory.mktemp("cluster")
    ended = in_namespace([python, str(SCENARIO), str(endless_model), request.param], home)
    assert ended.returncode == 0, ended.stderr[-3000:]
    print(ended.stdout)
    return {**json.loads(ended.stdout.splitlines()[-1]), "host": request.param}


def test_a_stream_comes_whole(found: dict[str, Any]) -> None:
    assert found["stream"]["status"] == 200 and found["stream"]["done"] and found["stream"]["chunks"] > 3


def test_sessions_stay_on_their_replicas_and_hit_their_prefixes(found: dict[str, Any]) -> None:
    assert found["sessions"]["answered"] == 200
    places = found["sessions"]["replicas a session"]
    # Ray's proxy goes to the next replica where one does not say in time whether it is free: a machine may be busy
    assert len(places) == 8 and places.count(1) >= 6 and found["sessions"]["replicas"] == 2
    assert found["sessions"]["hit ratio"] > 0.9


def test_a_client_that_leaves_frees_its_pages(found: dict[str, Any]) -> None:
    assert found["client leaves"]["running"] == 1 and found["client leaves"]["held"] == 0


def test_the_refusal_of_a_full_replica_passes(found: dict[str, Any]) -> None:
    assert found["too many"]["refused"] == [429] * 3
    assert all(int(seconds) >= 1 for seconds in found["too many"]["retry after"])
    assert found["too many"]["finished"] == found["too many"]["waited"] == 4


def test_only_what_runs_on_a_replica_dies_with_it(found: dict[str, Any]) -> None:
    """HAProxy may give a dead replica one or two requests more, which end with a closed connection."""
    dies = found["replica dies"]
    assert len(dies["failed at"]) == 1 and not set(dies["failed at"]) & set(dies["finished at"])
    assert dies["failed"] + dies["finished"] == 8
    assert set(dies["statuses after"]) <= {0, 200}
    assert dies["asked after"] - dies["answered after"] <= (2 if found["host"] == "0.0.0.0" else 0)


def test_fewer_replicas_lose_nothing(found: dict[str, Any]) -> None:
    fewer = found["fewer replicas"]
    assert fewer["finished"] == fewer["streams"] and fewer["answered during"] == fewer["asked during"]


def test_the_end_waits_for_streams(found: dict[str, Any]) -> None:
    assert found["ends"]["finished"] == found["ends"]["streams"] and found["ends"]["code"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model=demo", "--gpus-per-replica=1"], "needs more than the 0 GPUs of this machine"),
        (["--model=nothing/there/is"], "model 'nothing/there/is' is neither"),
        (["--model=demo", "--replicas=0"], "--replicas must be at least 1"),
    ],
)
def test_what_cannot_start_is_said_in_a_line(python: str, tmp_path: Path, flags: list[str], said: str) -> None:
    command = " ".join([f"ip link set lo up; {python} -m kimi_vl.cli cluster --port 0", *flags])
    if shutil.which("ip") is None:
        pytest.skip("needs ip(8)")
    ended = in_namespace(["bash", "-c", command], tmp_path)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in ended.stderr
