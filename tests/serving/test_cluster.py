"""`kimi-vl cluster` with two replicas on the CPU: what it survives, with counts.

It runs in a network namespace where there may be one, and otherwise on loopback, where all of it listens. Ray is in an
environment of its own (`ray_python` in conftest.py).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT

SCENARIO = Path(__file__).with_name("cluster_scenario.py")

pytestmark = pytest.mark.nightly


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def isolated(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """A command whose home, where Ray keeps its token, is its own, and whose network is where that is allowed."""
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        subprocess.run([*alone, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        alone = []
    return subprocess.run(
        [*alone, *command], cwd=home, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )


@pytest.fixture(scope="module")
def found(ray_python: str, endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened."""
    ended = isolated(
        [ray_python, str(SCENARIO), str(endless_model), str(free_port())], tmp_path_factory.mktemp("cluster")
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    print(ended.stdout)
    return json.loads(ended.stdout.splitlines()[-1])


def test_nothing_listens_beside_loopback(found: dict[str, Any]) -> None:
    assert found["listens elsewhere"] == []


def test_a_stream_comes_whole(found: dict[str, Any]) -> None:
    assert found["stream"]["status"] == 200 and found["stream"]["done"] and found["stream"]["chunks"] > 3


def test_sessions_stay_on_their_replicas_and_hit_their_prefixes(found: dict[str, Any]) -> None:
    assert found["sessions"]["answered"] == 200
    assert found["sessions"]["replicas a session"] == [1] * 8
    assert min(found["sessions"]["hit ratios"]) > 0.9


def test_a_client_that_leaves_frees_its_pages(found: dict[str, Any]) -> None:
    assert found["client leaves"]["running"] == 1 and found["client leaves"]["held"] == 0


def test_the_refusal_of_a_full_replica_passes(found: dict[str, Any]) -> None:
    assert found["too many"]["refused"] == [429] * 3
    assert all(int(seconds) >= 1 for seconds in found["too many"]["retry after"])
    assert found["too many"]["finished"] == found["too many"]["waited"] == 4


def test_only_what_runs_on_a_replica_dies_with_it(found: dict[str, Any]) -> None:
    """What its client has seen nothing of yet ends with an error that asks for another try, or a closed connection."""
    dies = found["replica dies"]
    assert len(dies["failed at"]) <= 1 and not set(dies["failed at"]) & set(dies["finished at"])
    assert dies["failed"] + dies["finished"] == 6
    assert [200, ""] in dies["not begun"] and len(dies["not begun"]) == 2
    assert [503, "service_unavailable true"] in dies["not begun"] or [0, "closed"] in dies["not begun"]
    # one client asks at a time: it may have met the replica's end
    assert dies["meanwhile"]["other"] in ([], [503], [0])
    assert dies["meanwhile"]["answered"] >= dies["meanwhile"]["asked"] - 1


@pytest.mark.parametrize("change", ["other replicas", "fewer"])
def test_a_change_of_replicas_loses_nothing(found: dict[str, Any], change: str) -> None:
    changed = found["as many as needed"]["fewer"] if change == "fewer" else found[change]
    assert changed["finished"] == changed["streams"] > 0 and not changed["lost"]
    assert changed["answered"] == changed["asked"] > 0


def test_a_version_that_cannot_load_is_said_and_does_not_replace_what_serves(found: dict[str, Any]) -> None:
    assert "kimi-vl cannot load: model '/nothing/is/here'" in found["cannot load"]["said"]
    assert found["cannot load"]["answered"] == found["cannot load"]["asked"] > 20


def test_a_replica_comes_while_requests_wait(found: dict[str, Any]) -> None:
    assert found["as many as needed"]["waiting"] > 0 and found["as many as needed"]["replicas"] == 2


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
def test_what_cannot_start_is_said_in_a_line(ray_python: str, tmp_path: Path, flags: list[str], said: str) -> None:
    ended = isolated([ray_python, "-m", "kimi_vl.cli", "cluster", "--port", "0", *flags], tmp_path)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in ended.stderr
