"""What the documented service on two nodes of Ray goes through: prints what happened as JSON.

python nodes_scenario.py MODEL 8000, with the Python of an environment that has Ray, in new namespaces of users,
networks, mounts and processes. Each node is in further ones: it has its own address, ports, files in /tmp, and
processes, all of which end with the first of them. Only the model is another one than in
docs/deployment/ray/serve.yaml, and each node claims a GPU.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster_scenario as one
import httpx

FILE = Path(__file__).parents[2] / "docs" / "deployment" / "ray" / "serve.yaml"
HEAD, OTHER = "10.7.0.1", "10.7.0.2"
STREAMS, TOKENS = 6, 3000
NAMED = (6379, 8000, 8265, 8404, 8500, 9101, 10001)
SCRIPTS = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts", "kimi-vl": "kimi_vl.cli"}

one.URL = f"http://{HEAD}:{one.PORT}"


def commands() -> list[list[str]]:
    """What the file's comment tells to do, line by line."""
    return [shlex.split(line, comments=True) for line in re.findall(r"^#   (.+)$", FILE.read_text(), re.MULTILINE)]


def exported() -> dict[str, str]:
    return dict(word.split("=", 1) for line in commands() if line[0] == "export" for word in line[1:])


def command(*words: str) -> list[str]:
    """A documented command, of this environment."""
    return [sys.executable, "-m", SCRIPTS[words[0]], *words[1:]]


# As documented, but for folders that belong to the machine, and for how long Ray waits: 30 s until it says that a
# replica waits for a node, and five times 10 s until a silent node is gone.
LAUNCHER = Path.cwd() / "haproxy"
ENVIRONMENT = {
    **os.environ,
    **exported(),
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(LAUNCHER),
    "KIMI_VL_CACHE": str(Path.cwd() / "cache"),
    "SERVE_SLOW_STARTUP_WARNING_S": "5",
    "RAY_health_check_timeout_ms": "3000",
}


class Node:
    """A machine: `ray start` in namespaces of its own, on the end of a cable."""

    def __init__(self, address: str, start: list[str]):
        self.cable = f"node{address[-1]}"
        prepare = (
            "ip link set lo up; until ip link show cable; do sleep 0.1; done; "
            f"ip addr add {address}/24 dev cable; ip link set cable up; ip route add default via {address[:-1]}254; "
            f"for folder in ray haproxy-serve; do mkdir -p -m 1777 {address}/$folder /tmp/$folder; "
            f'mount --bind {address}/$folder /tmp/$folder; done; exec "$@"'
        )
        alone = ["unshare", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc", "sh", "-c", prepare, "sh"]
        started = command(*start, "--num-gpus=1", "--num-cpus=2")
        log = Path("log").open("a")  # noqa: SIM115 (as long as the node)
        self.process = subprocess.Popen([*alone, *started], env=ENVIRONMENT, stdout=log, stderr=log)
        one.until(lambda: len(one.family(self.process.pid)) > 1)
        self.first = one.family(self.process.pid)[1]
        subprocess.run(["ip", "link", "del", self.cable], capture_output=True, check=False)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "cable", "netns", str(self.first))
        ip("link", "set", self.cable, "master", "bridge")
        ip("link", "set", self.cable, "up")

    def runs(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A documented command on this machine."""
        return self.inside(*command(*words))

    def inside(self, *words: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", str(self.first), "-n", "-m", "-p"]
        return subprocess.run(
            [*enter, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=one.PATIENCE_S, check=False
        )

    def ends(self) -> None:
        """SIGTERM, as a service manager or Kubernetes sends it."""
        os.kill(self.first, signal.SIGTERM)

    def dies(self) -> None:
        """All processes are killed; the kernel closes their connections."""
        os.kill(self.first, signal.SIGKILL)

    def vanishes(self) -> None:
        """As if without power: nobody hears from it any more."""
        ip("link", "set", self.cable, "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def other() -> Node:
    [start] = [line for line in commands() if line[:2] == ["ray", "start"] and "--head" not in line]
    return Node(OTHER, [word.replace("FIRST", HEAD) for word in start])


def written(name: str, model: str, *changes: tuple[str, str]) -> str:
    """The documented file with another model, and changes of its text."""
    text = FILE.read_text()
    for old, new in [("model: thinking", f"model: {model}"), *changes]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path(name).write_text(text)
    return str(Path(name).resolve())


ASK_RAY = """
import pathlib, urllib.request
request = urllib.request.Request("http://127.0.0.1:8265/api/serve/applications/")
request.add_header("Authorization", "Bearer " + (pathlib.Path.home() / ".ray/auth_token").read_text().strip())
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""
"""What `serve status` asks, which imports Ray for it."""


def status(head: Node) -> dict[str, Any]:
    """What Ray says: the state of the application, of its replicas, and why."""
    asked = head.inside(sys.executable, "-I", "-c", ASK_RAY)
    if asked.returncode:
        return {}
    said = json.loads(asked.stdout)["applications"].get("kimi-vl", {"status": "", "message": "", "deployments": {}})
    server = said["deployments"].get("server", {"replicas": [], "message": ""})
    states = sorted(each["state"] for each in server["replicas"])
    return {"status": said["status"], "replicas": states, "said": [said["message"], server["message"]]}


def patiently(condition: Callable[[], bool]) -> float:
    """Wait until something is so that costs something to find out; the seconds that took."""
    return round(one.until(lambda: bool(condition() or time.sleep(0.5))), 1)


def serves(count: int) -> float:
    """Wait until so many replicas answer through the first machine."""
    return patiently(lambda: len(one.replicas()) == count)


class Load(threading.Thread):
    """A few requests a second, a session each, through the first machine, until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.asked = 0
        self.lost: list[str] = []
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.2):
            self.asked += 1
            began = time.monotonic()
            try:
                status = one.ask(f"load-{self.asked}").status_code
                told = "" if status == 200 else str(status)
            except httpx.HTTPError as error:
                told = repr(error)
            if told:
                self.lost.append(f"request {self.asked} after {time.monotonic() - began:.1f} s: {told}")

    def counts(self) -> dict[str, Any]:
        self.over.set()
        self.join(one.PATIENCE_S)
        return {"asked": self.asked, "answered": self.asked - len(self.lost), "lost": self.lost}


def wrong(head: Node, model: str) -> dict[str, Any]:
    """What is said of files that are not right, while others ask, and after the right one."""
    load, said = Load(), {}
    for name, change in {
        "key": ("max_ongoing_requests: ", "max_ongoing_request: "),
        "option": ("max_waiting: ", "max_waitin: "),
        "model": (model, "/nothing/is/here"),
        "GPUs": ("num_gpus: 1}", "num_gpus: 2}"),
    }.items():
        ended = head.runs("kimi-vl", "cluster", "--deploy", written(f"{name}.yaml", model, change))
        said[name] = [ended.returncode, [line for line in ended.stderr.splitlines() if "error: " in line]]
    deployed = head.runs("serve", "deploy", str(Path("option.yaml").resolve()))
    patiently(lambda: status(head).get("status") == "DEPLOY_FAILED")
    said["option to serve deploy"] = [deployed.returncode, status(head)["said"][0]]
    said["right"] = head.runs("kimi-vl", "cluster", "--deploy", written("right.yaml", model)).stderr.splitlines()[-1]
    return {"said": said, **load.counts()}


def loses(head: Node, end: Callable[[], None]) -> dict[str, Any]:
    """Streams and whole answers on both nodes, of which one ends."""
    before = one.replicas()
    begun = one.streams(STREAMS, TOKENS)
    at = {one.figures(session)[0]: session for session in (f"whole-{number}" for number in range(24))}
    waits = {replica: one.Whole(session, TOKENS) for replica, session in at.items()}
    one.until(lambda: sum(one.figures(each)[1]["kimi_vl_requests_running"] for each in at.values()) >= STREAMS + 2)
    places = {stream.session: one.figures(stream.session)[0] for stream in begun}
    load = Load()
    one.until(lambda: load.asked > 2)
    began = time.monotonic()
    end()
    serves(1)
    [stays] = one.replicas()
    one.joined(begun)
    for each in waits.values():
        each.join(one.PATIENCE_S)
    seconds = round(time.monotonic() - began, 1)
    patiently(lambda: status(head).get("replicas", []).count("RUNNING") == 1)
    [gone] = before - {stays}
    return {
        "streams there": sum(place == gone for place in places.values()),
        "finished there": sum(each.done for each in begun if places[each.session] == gone),
        "streams elsewhere": sum(place == stays for place in places.values()),
        "finished elsewhere": sum(each.done for each in begun if places[each.session] == stays),
        "whole there": [waits[gone].status, waits[gone].told],
        "whole elsewhere": [waits[stays].status, waits[stays].told],
        "all ended s": seconds,
        "then": status(head),
        **load.counts(),
    }


def listens(head: Node) -> list[int]:
    """Ports of the first machine on which others are heard, but for those that Ray takes at random."""
    found = head.inside("ss", "-Hltn").stdout.split("\n")
    places = [line.split()[3].rpartition(":") for line in found if line]
    return sorted({int(port) for host, _, port in places if "127.0.0.1" not in host and int(port) in NAMED})


def haproxy(head: Node) -> str:
    """Its file, as it is after the launcher."""
    return head.inside("sh", "-c", "cat /tmp/haproxy-serve/*/haproxy.cfg").stdout


def main() -> None:
    model = sys.argv[1]
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    ip("addr", "add", f"{HEAD[:-1]}254/24", "dev", "bridge")
    ip("link", "set", "bridge", "up")
    lines = commands()
    [token] = [line for line in lines if line[:2] == ["ray", "get-auth-token"]]
    [launcher] = [line for line in lines if "--write-launcher" in line]
    [start] = [line for line in lines if line[:2] == ["ray", "start"] and "--head" in line]
    subprocess.run(command(*token), check=True, stdout=subprocess.DEVNULL)
    subprocess.run(command(*launcher[:-1], str(LAUNCHER.parent)), env=ENVIRONMENT, check=True)
    nodes = [Node(HEAD, start)]
    head, found = nodes[0], {}

    def does(name: str, part: Callable[..., Any], *given: Any) -> None:
        began = time.monotonic()
        found[name] = part(*given)
        print(name, found[name], f"{time.monotonic() - began:.1f} s", flush=True)

    def comes() -> dict[str, Any]:
        nodes.append(other())
        return {"two replicas s": serves(2), **status(head)}

    def deploys() -> dict[str, Any]:
        ended = head.runs("serve", "deploy", written("serve.yaml", model))
        assert ended.returncode == 0, ended.stderr
        serves(2)
        hosts = re.findall(r"^    server SERVE_REPLICA\S+ (\S+):\d+ ", haproxy(head), re.MULTILINE)
        return {"hosts": sorted(hosts), **status(head)}

    try:
        patiently(lambda: bool(status(head)))
        nodes.append(other())
        does("deploy", deploys)
        does("listens", listens, head)
        does("wrong", wrong, head, model)
        does("SIGTERM", loses, head, nodes[-1].ends)
        found["SIGTERM"]["node ended"] = nodes[-1].process.wait(one.PATIENCE_S)
        does("comes back", comes)
        does("SIGKILL", loses, head, nodes[-1].dies)
        does("comes again", comes)
        does("without power", loses, head, nodes[-1].vanishes)
        print(json.dumps(found), flush=True)
    finally:
        for node in nodes:
            node.process.kill()


if __name__ == "__main__":
    main()
