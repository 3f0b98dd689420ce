"""What the files in docs/deployment say is so: options, variables, addresses and times fit the server's."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from kimi_vl.cli import main as command
from kimi_vl.serving import options

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "deployment"
COMPOSE = [FOLDER / name / "compose.yaml" for name in ("nginx", "router")]
UNIT = FOLDER / "kimi-vl@.service"
NGINX = FOLDER / "nginx" / "nginx.conf"
DEFAULTS = options.ServerOptions()
KIMI_VL_VARIABLES = {
    *map(options.variable, options.FIELDS),
    *(name for name in re.findall(r"`(KIMI_VL_\w+)`", (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))),
}


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def served(words: list[str], environment: dict[str, str]) -> options.ServerOptions:
    """The options that ``words``, after the name of the program, come to; exits where one is not understood."""
    assert words[0] == "serve"
    parsed: argparse.Namespace = command._parser().parse_args(words)
    assert {name for name in environment if name.startswith("KIMI_VL_")} <= KIMI_VL_VARIABLES
    return options.gather(parsed, environment)


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of the Pods, and their container."""
    deployment = next(each for each in documents(FOLDER / "kubernetes.yaml") if each["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    [container] = template["spec"]["containers"]
    return template, container


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_file_is_yaml(path: Path) -> None:
    assert all(isinstance(each, dict) for each in documents(path))


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.parent.name)
def test_compose_starts_servers_that_the_balancer_knows(path: Path) -> None:
    [project] = documents(path)
    servers = {name: each for name, each in project["services"].items() if name != "balancer"}
    balancer = project["services"]["balancer"]
    devices = []
    for each in servers.values():
        assert each["command"][:3] == ["python", "-m", "kimi_vl.cli"]
        given = served(each["command"][3:], each["environment"])
        assert given.host == "0.0.0.0" and given.port == 8000
        assert minutes(each["stop_grace_period"]) * 60 >= given.deadline_s + given.drain_delay_s
        assert each["volumes"] == ["weights:/src/model_cache"]  # the folder of Cog's image, and the default cache
        devices += each["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    assert len(set(devices)) == len(servers)
    told = NGINX.read_text() if path.parent.name == "nginx" else "\n".join(balancer["command"])
    assert set(re.findall(r"(server-\d+):8000", told)) == servers.keys() == balancer["depends_on"].keys()
    assert all(published.startswith("127.0.0.1:") for published in balancer["ports"])


def test_both_compose_files_start_the_same_servers() -> None:
    first, second = (documents(path)[0]["services"] for path in COMPOSE)
    assert [each for name, each in first.items() if name != "balancer"] == [
        each for name, each in second.items() if name != "balancer"
    ]


def test_the_balancers_wait_longer_than_a_request_may_take() -> None:
    configuration = NGINX.read_text()
    seconds = {name: float(value) for name, value in re.findall(r"(\w+_timeout) (\d+)s;", configuration)}
    assert seconds["proxy_read_timeout"] > DEFAULTS.deadline_s
    assert f"client_max_body_size {DEFAULTS.max_body_mib}m;" in configuration
    assert "proxy_buffering off;" in configuration
    upstream = configuration.partition("upstream kimi_vl")[2].partition("}")[0]
    kept = re.search(r"keepalive_timeout (\d+)s;", upstream)
    assert kept and int(kept.group(1)) < DEFAULTS.keep_alive_s
    [router] = documents(FOLDER / "router" / "compose.yaml")
    flags = dict(word.split("=") for word in router["services"]["balancer"]["command"] if "=" in word)
    assert float(flags["--request-timeout-secs"]) > DEFAULTS.deadline_s
    assert int(flags["--max-payload-size"]) == DEFAULTS.max_body_mib << 20


def test_the_pods_probes_and_grace_period_fit_the_server() -> None:
    template, container = kubernetes()
    environment = {each["name"]: each.get("value", "key") for each in container["env"]}
    given = served([*container["command"][3:], *container["args"]], environment)
    assert container["command"][:3] == ["python", "-m", "kimi_vl.cli"]
    assert given.host == "0.0.0.0" and container["ports"] == [{"name": "http", "containerPort": given.port}]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    [_, slept] = container["lifecycle"]["preStop"]["exec"]["command"]
    ends = float(slept) + given.drain_delay_s + max(given.drain_s, given.deadline_s)
    assert template["spec"]["terminationGracePeriodSeconds"] > ends
    if template["metadata"]["annotations"]["prometheus.io/scrape"] == "true":
        assert given.open_metrics
    assert container["volumeMounts"][0]["mountPath"] == "/src/model_cache"


def test_the_service_selects_the_pods() -> None:
    template, _ = kubernetes()
    for each in documents(FOLDER / "kubernetes.yaml"):
        selector = each["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= template["metadata"]["labels"].items(), each["kind"]


def test_the_unit_starts_a_server_and_lets_it_drain() -> None:
    read = [line.partition("=") for line in UNIT.read_text().splitlines() if "=" in line and line[0] != "#"]
    lines = [(name, value) for name, _, value in read]
    words = [word.partition("=") for name, value in lines if name == "Environment" for word in shlex.split(value)]
    environment = {name: value for name, _, value in words}
    values = dict(lines)
    program, *words = shlex.split(values["ExecStart"].replace("%i", "3"))
    given = served(words, environment)
    assert os.path.basename(program) == "kimi-vl" and given.port == 8003 and given.host == "127.0.0.1"
    assert float(values["TimeoutStopSec"]) > given.drain_delay_s + max(given.drain_s, given.deadline_s)
    assert environment["KIMI_VL_CACHE"] == f"/var/cache/{values['CacheDirectory']}"


def minutes(text: str) -> float:
    assert text.endswith("m")
    return float(text[:-1])
