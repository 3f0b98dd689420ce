"""Options of a cluster, what Ray is told, and what is said where Ray is absent. Ray itself is not needed here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from kimi_vl.cli import cluster as command
from kimi_vl.cli import main
from kimi_vl.cluster import deploy, deployment, environment, run
from kimi_vl.cluster.options import ClusterOptions
from kimi_vl.errors import UserError
from kimi_vl.serving import options
from kimi_vl.serving.metrics import Metrics
from kimi_vl.serving.options import OptionError, ServerOptions

ROOT = Path(__file__).resolve().parents[2]
RAY = ROOT / "docs" / "deployment" / "ray"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"replicas": 0}, "--replicas must be at least 1"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas must not be less than --replicas"),
        ({"gpus_per_replica": 1.5}, "--gpus-per-replica must be a whole number where it is more than 1"),
        ({"gpus_per_replica": -1.0}, "--gpus-per-replica must be at least 0"),
        ({"target_ongoing": float("nan")}, "--target-ongoing must be at least 0"),
        ({"upscale_delay_s": float("inf")}, "--upscale-delay-s must be at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_line(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        ClusterOptions(**wrong)


@pytest.mark.parametrize("right", [{"gpus_per_replica": 0.5}, {"gpus_per_replica": 2.0}, {"max_replicas": 1}])
def test_options_that_can_be_are_taken(right: dict[str, Any]) -> None:
    ClusterOptions(**right)


def test_haproxy_keeps_sessions_and_streams() -> None:
    told = environment.everywhere(ServerOptions(deadline_s=100.0, drain_delay_s=5.0))
    assert told["RAY_SERVE_ENABLE_HA_PROXY"] == "1" and told["RAY_USAGE_STATS_ENABLED"] == "0"
    assert told["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] == "hdr(x-session-id)"
    for name in ("HARD_STOP_AFTER_S", "TIMEOUT_SERVER_S", "TIMEOUT_CLIENT_S"):
        assert told[f"RAY_SERVE_HAPROXY_{name}"] == "105"
    assert "RAY_AUTH_MODE" not in told


def test_on_one_machine_ray_stays_on_loopback_and_its_files_in_a_folder(tmp_path: Path) -> None:
    told = environment.one_machine(ServerOptions(host="0.0.0.0"), tmp_path)
    assert told["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    paths = {name: value for name, value in told.items() if value.startswith("/")}
    assert len(paths) == 6 and all(Path(value).is_relative_to(tmp_path) for value in paths.values())
    assert "0.0.0.0" in Path(told["RAY_SERVE_HAPROXY_BINARY_PATH"]).read_text()
    head, _, body = (tmp_path / "unavailable.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and f"Content-Length: {len(body)}".encode() in head
    assert b"Retry-After: 1" in head and json.loads(body)["error"]["code"] == "service_unavailable"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(UserError, match=re.escape('pip install "kimi-vl[cluster]"')):
        command.run(main._parser().parse_args(["cluster", "--model", "demo"]))


def test_a_replica_that_cannot_load_is_said_in_a_line() -> None:
    raised = "RuntimeError: Deploying application kimi-vl failed: ... \x1b[36mray::...\nRuntimeError: "
    assert run.reason(f"{raised}kimi-vl cannot load: no config.json in the folder\n\nmore") == (
        "no config.json in the folder"
    )
    assert "\n" not in run.reason("something\nelse")


def test_figures_of_a_replica_carry_its_label() -> None:
    text = Metrics("demo", lambda: None, {"replica": "a1"}).text().decode()
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) > 20 and all('replica="a1"' in line for line in samples)
    assert "replica" not in Metrics("demo", lambda: None).text().decode()


def test_arguments_of_a_configuration_file_are_checked() -> None:
    assert options.checked({"model": "demo", "deadline_s": 5}, "args") == {"model": "demo", "deadline_s": 5.0}
    with pytest.raises(OptionError, match="args: there is no option modle"):
        options.checked({"modle": "demo"}, "args")
    with pytest.raises(OptionError, match="args: max_waiting must be a whole number"):
        options.checked({"max_waiting": "9"}, "args")


def test_the_launcher_for_several_machines_is_where_the_files_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file for `serve deploy` tells to do, and what it exports; KubeRay's manifest exports the same."""
    if importlib.util.find_spec("ray") is None:
        monkeypatch.setattr(command, "NEEDED", ())
    text = (RAY / "serve.yaml").read_text()
    [folder] = re.findall(r"kimi-vl cluster --write-launcher (\S+)", text)
    assert f"RAY_SERVE_HAPROXY_BINARY_PATH={folder}/haproxy\n" in text
    manifest = (RAY / "kuberay.yaml").read_text()
    assert f"{{name: RAY_SERVE_HAPROXY_BINARY_PATH, value: {folder}/haproxy}}" in manifest
    assert f"kimi-vl cluster --write-launcher {folder}" in manifest
    assert main.main(["cluster", "--write-launcher", str(tmp_path / "new" / "folder")]) == 0
    launcher = tmp_path / "new" / "folder" / "haproxy"
    assert capsys.readouterr().out == f"{launcher}\n" and os.access(launcher, os.X_OK)
    assert " '' 10000 " in launcher.read_text()
    (tmp_path / "file").touch()
    assert main.main(["cluster", "--write-launcher", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


class Options(pydantic.BaseModel):
    num_gpus: float = 0.0
    resources: dict[str, float] = {}


class Scaling(pydantic.BaseModel):
    min_replicas: int = 1


class Deployment(pydantic.BaseModel):
    name: str
    ray_actor_options: Options = Options()
    autoscaling_config: dict[str, Any] | Scaling | None = None


class Application(pydantic.BaseModel):
    name: str
    import_path: str = ""
    args: dict[str, Any] = {}
    deployments: list[Deployment] = []


class File(pydantic.BaseModel):
    """As Ray has them."""

    applications: list[Application]


def file(**server: Any) -> dict[str, Any]:
    return {"applications": [{"name": "a", "deployments": [{"name": "one"}, {"name": "server", **server}]}]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({**file(), "aplications": []}, "f: there is no key aplications"),
        (file(max_ongoing=3), "f: applications: a: deployments: server: there is no key max_ongoing"),
        (file(ray_actor_options={"gpus": 1}), "server: ray_actor_options: there is no key gpus"),
        (file(ray_actor_options={"num_gpus": "all"}), "server: ray_actor_options: num_gpus: Input should be a valid"),
        (file(autoscaling_config={"least": 1}), "server: autoscaling_config: there is no key least"),
        (file(autoscaling_config={"min_replicas": "two"}), "autoscaling_config: min_replicas: Input should be a valid"),
        ({"applications": [{"deployments": []}]}, "f: applications: 0: name: Field required"),
        (
            {"applications": [{"name": "a", "import_path": deploy.APPLICATION, "args": {"model": "demo", "modle": 1}}]},
            "f: applications: a: args: there is no option modle",
        ),
        (
            {"applications": [{"name": "a", "import_path": deploy.APPLICATION, "args": {"max_waiting": 3}}]},
            "f: applications: a: args: model must be said",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(value: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as refused:
        deploy.check(value, File, "f: ")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_right_passes() -> None:
    deploy.check(file(ray_actor_options={"num_gpus": 1, "resources": {"any": 1}}), File, "f: ")
    deploy.check(file(autoscaling_config={"min_replicas": 2}), File, "f: ")
    other = {"name": "a", "import_path": "another:application", "args": {"anything": 1}}
    deploy.check({"applications": [other]}, File, "f: ")


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "line 1: is not YAML"), ("- a", "has no applications"), (None, "cannot be read")]
)
def test_what_is_no_file_for_ray_is_said(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "f.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=said) as refused:
        deploy.read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def ray_says(status: str, message: str = "", server: str = "", replicas: str = "there there") -> dict[str, Any]:
    kinds = {
        "there": {"state": "RUNNING", "node_id": "a"},
        "loads": {"state": "STARTING", "node_id": "a"},
        "waits": {"state": "STARTING", "node_id": None},
        "ends": {"state": "STOPPING", "node_id": "a"},
    }
    found = [kinds[kind] for kind in replicas.split()]
    deployments = {"server": {"message": server, "replicas": found}} if found else {}
    return {"status": status, "message": message, "deployments": deployments}


def test_what_becomes_of_a_deployment_is_said_in_a_line() -> None:
    assert deploy.outcome(ray_says("DEPLOYING")) is None
    assert deploy.outcome(ray_says("RUNNING")) == "server on 2 replicas"
    failed = "ray::Server\n  File ...\nRuntimeError: kimi-vl cannot load: no config.json in the folder\n"
    with pytest.raises(OptionError, match=r"^no config\.json in the folder; what served before still does$"):
        deploy.outcome(ray_says("DEPLOY_FAILED", "Failed to update the deployments", server=failed))
    refused = "Deploying app 'kimi-vl' failed with exception:\nkimi-vl cannot load: args: there is no option modle"
    with pytest.raises(OptionError, match=r"^args: there is no option modle; "):
        deploy.outcome(ray_says("DEPLOY_FAILED", refused, replicas=""))


WAITS = 'has 1 replicas ... Resources required for each replica: {"GPU": 2.0}, total resources available: {}. Use'


class Client:
    """Of Ray's dashboard, which says one thing after the other, the last one for ever."""

    def __init__(self, *said: dict[str, Any]):
        self.said = [each | {"last_deployed_time_s": 2} for each in said]

    def get_serve_details(self) -> dict[str, Any]:
        return {"applications": {"a": self.said.pop(0) if len(self.said) > 1 else self.said[0]}}


def follow(*said: dict[str, Any]) -> str:
    return deploy.follow(Client(*said), "a", {"a": {"last_deployed_time_s": 1}}, lambda seconds: None)


def test_a_replica_that_nobody_has_room_for_is_said() -> None:
    with pytest.raises(OptionError, match=re.escape('a: a replica waits, since no node has {"GPU": 2.0} free')):
        follow(ray_says("DEPLOYING", server=WAITS, replicas="there waits"))


@pytest.mark.parametrize("replicas", ["there ends waits", "there loads", "loads loads"])
def test_a_replica_whose_place_is_still_in_use_or_found_is_waited_for(replicas: str) -> None:
    """However long; the message may be that of before."""
    goes_on = [ray_says("DEPLOYING", server=WAITS, replicas=replicas)] * 3 * deploy.PATIENCE_S
    assert follow(*goes_on, ray_says("RUNNING", server=WAITS)) == "a serves: server on 2 replicas"


def test_a_place_that_comes_in_time_is_waited_for() -> None:
    waits = [ray_says("DEPLOYING", server=WAITS, replicas="there waits")] * (deploy.PATIENCE_S - 1)
    assert follow(*waits, ray_says("DEPLOYING"), *waits, ray_says("RUNNING")).startswith("a serves")


def test_what_was_deployed_before_is_not_taken_for_the_new_one() -> None:
    before = ray_says("DEPLOY_FAILED", "kimi-vl cannot load: the old one") | {"last_deployed_time_s": 1}
    client = Client(ray_says("RUNNING"))
    client.said.insert(0, before)
    assert deploy.follow(client, "a", {"a": before}, lambda seconds: None) == "a serves: server on 2 replicas"


def applications() -> list[dict[str, Any]]:
    """Those of the file for `serve deploy`, and of the one in KubeRay's manifest."""
    [manifest] = yaml.safe_load_all((RAY / "kuberay.yaml").read_text())
    files = [yaml.safe_load((RAY / "serve.yaml").read_text()), yaml.safe_load(manifest["spec"]["serveConfigV2"])]
    return [application for file in files for application in file["applications"]]


def test_kuberay_serves_what_the_file_serves() -> None:
    [manifest] = yaml.safe_load_all((RAY / "kuberay.yaml").read_text())
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == yaml.safe_load((RAY / "serve.yaml").read_text())


def test_files_for_ray_fit_the_application() -> None:
    found = applications()
    assert len(found) == 2
    for application in found:
        module, _, name = application["import_path"].partition(":")
        assert (module, name) == ("kimi_vl.cluster.deployment", "application") and callable(deployment.application)
        given = ServerOptions(**options.checked(application["args"], "args"))
        [server] = application["deployments"]
        assert server["name"] == "server"
        assert server["max_ongoing_requests"] == given.max_num_seqs + given.max_waiting + deployment.BESIDE
        assert server["graceful_shutdown_timeout_s"] >= given.deadline_s
        scaling = server["autoscaling_config"]
        assert 1 <= scaling["min_replicas"] <= scaling["max_replicas"]
        assert scaling["target_ongoing_requests"] < given.max_num_seqs + given.max_waiting


def test_files_for_ray_set_what_the_command_sets() -> None:
    """All processes of the nodes have the variables."""
    wanted = environment.everywhere(ServerOptions())
    [manifest] = yaml.safe_load_all((RAY / "kuberay.yaml").read_text())
    cluster_spec = manifest["spec"]["rayClusterConfig"]
    groups = [cluster_spec["headGroupSpec"], *cluster_spec["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        given = {each["name"]: each["value"] for each in container["env"]}
        assert wanted.items() <= given.items()
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > float(
            wanted["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        )
    comment = (RAY / "serve.yaml").read_text()
    for name, value in wanted.items():
        assert f"{name}={value}" in comment.replace('"', "").replace("'", ""), name
