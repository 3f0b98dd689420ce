"""The documented cluster of several machines, as two nodes on this one: what it survives, with counts.

docs/deployment/ray/serve.yaml is followed line by line; only the model is a tiny one, and each node claims a GPU. A
node has namespaces of its own, so that it has its own address, ports and processes as a machine has. Two real machines
and KubeRay are not tried.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT

SCENARIO = Path(__file__).with_name("nodes_scenario.py")
ALONE = ["unshare", "-rnmpf", "--mount-proc", "--kill-child"]
ENDS = ["SIGTERM", "SIGKILL", "without power"]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def found(ray_python: str, endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened."""
    cable = [*ALONE, "sh", "-c", "ip link add one type veth peer name two && command -v nsenter && command -v ss"]
    try:
        subprocess.run(cable, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("namespaces, and a cable between two of them, are not at hand")
    home = tmp_path_factory.mktemp("nodes")
    ended = subprocess.run(
        [*ALONE, ray_python, str(SCENARIO), str(endless_model), "8000"],
        cwd=home,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    print(ended.stdout)
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_documented_commands_put_a_replica_on_each_node(found: dict[str, Any]) -> None:
    """Of which the first one's own HAProxy asks its own on loopback."""
    assert found["deploy"]["hosts"] == ["10.7.0.2", "127.0.0.1"]
    assert found["deploy"]["status"] == "RUNNING" and found["deploy"]["replicas"] == ["RUNNING"] * 2


def test_the_dashboard_and_figures_of_haproxy_are_on_loopback_alone(found: dict[str, Any]) -> None:
    assert found["listens"] == [6379, 8000, 8500, 10001]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("key", "key.yaml: applications: kimi-vl: deployments: server: there is no key max_ongoing_request"),
        ("option", "option.yaml: applications: kimi-vl: args: there is no option max_waitin"),
        ("model", "model.yaml: kimi-vl: model '/nothing/is/here' is neither"),
        ("GPUs", 'GPUs.yaml: kimi-vl: a replica waits, since no node has {"GPU": 2.0} free'),
    ],
)
def test_a_wrong_setting_is_said_in_a_line(found: dict[str, Any], wrong: str, said: str) -> None:
    code, lines = found["wrong"]["said"][wrong]
    assert code == 1 and len(lines) == 1 and said in lines[0]


def test_serve_deploy_of_a_wrong_option_leaves_a_line_in_the_status(found: dict[str, Any]) -> None:
    code, message = found["wrong"]["said"]["option to serve deploy"]
    assert code == 0 and message.splitlines()[1:] == ["kimi-vl cannot load: args: there is no option max_waitin"]


def test_what_serves_goes_on_while_settings_are_wrong(found: dict[str, Any]) -> None:
    assert found["wrong"]["answered"] == found["wrong"]["asked"] > 20 and not found["wrong"]["lost"]
    assert found["wrong"]["said"]["right"] == "kimi-vl serves: server on 2 replicas"


def test_a_node_that_is_told_to_end_loses_nothing(found: dict[str, Any]) -> None:
    ends = found["SIGTERM"]
    assert ends["finished there"] == ends["streams there"] > 0 and ends["whole there"] == [200, ""]
    assert ends["answered"] == ends["asked"] > 5, ends["lost"]


@pytest.mark.parametrize("end", ENDS[1:])
def test_only_what_runs_on_a_node_dies_with_it(found: dict[str, Any], end: str) -> None:
    """What its client has seen nothing of yet ends with an error that asks for another try, or a closed connection."""
    dies = found[end]
    assert dies["streams there"] > 0 and dies["finished there"] == 0
    assert dies["whole there"] in ([503, "service_unavailable true"], [0, "closed"])
    # one client asks at a time: it may have met the node's end
    assert dies["answered"] >= dies["asked"] - 1 and dies["asked"] > 5, dies["lost"]


@pytest.mark.parametrize("end", ENDS)
def test_the_other_node_serves_on(found: dict[str, Any], end: str) -> None:
    ends = found[end]
    assert ends["finished elsewhere"] == ends["streams elsewhere"] > 0 and ends["whole elsewhere"] == [200, ""]
    assert ends["then"]["replicas"].count("RUNNING") == 1 and "STARTING" in ends["then"]["replicas"]


@pytest.mark.parametrize("comes", ["comes back", "comes again"])
def test_a_node_that_comes_gets_a_replica(found: dict[str, Any], comes: str) -> None:
    assert found[comes]["replicas"] == ["RUNNING"] * 2 and found[comes]["status"] == "RUNNING"
