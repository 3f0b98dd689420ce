"""What a cluster of two replicas goes through: prints what happened as JSON.

python cluster_scenario.py MODEL PORT, with the Python of an environment that has Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 300
PORT = int(sys.argv[2])
SEQUENCES, WAITING = 8, 4
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
"""As /proc/net shows 127.0.0.1, the same as an IPv6 address, and ::1."""
URL = f"http://127.0.0.1:{PORT}"


class Cluster:
    def __init__(self, model: str):
        bounds = [f"--max-num-seqs={SEQUENCES}", f"--max-waiting={WAITING}", "--drain-delay-s=1"]
        command = [sys.executable, "-m", "kimi_vl.cli", "cluster", "--model", model, "--gpus-per-replica=0"]
        began = time.monotonic()
        self.log = Path("log").open("w")  # noqa: SIM115 (as long as the cluster)
        self.process = subprocess.Popen(
            [*command, "--replicas=2", f"--port={PORT}", *bounds], stdout=self.log, stderr=self.log
        )
        until(lambda: self.process.poll() is not None or "\nready: " in Path("log").read_text())
        assert self.process.poll() is None, Path("log").read_text()[-3000:]
        self.ready_s = time.monotonic() - began

    def replica_pids(self) -> set[int]:
        return {pid for pid in family(self.process.pid) if title(pid).startswith("ray::ServeReplica")}


def family(pid: int) -> list[int]:
    """A process and those that it and they started: all of Ray's."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children[each]
    return found


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def listens_elsewhere(pids: list[int]) -> list[str]:
    """Addresses other than loopback on which these processes listen, with their ports."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(path).removeprefix("socket:[").removesuffix("]"))
    found, seen = [], 0
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" or fields[9] not in sockets:
                continue
            seen += 1
            host, _, port = fields[1].partition(":")
            if host not in LOOPBACK:
                found.append(f"{host}:{int(port, 16)}")
    assert seen >= 8, "of Ray, HAProxy and the replicas"
    return found


def until(condition: Any) -> float:
    """Wait until something is so; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S, Path("log").read_text()[-3000:]
        time.sleep(0.1)
    return time.monotonic() - began


def body(text: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": tokens, **more}


def ask(session: str, text: str = "Hello.", tokens: int = 2) -> httpx.Response:
    headers = {"x-session-id": session}
    return httpx.post(f"{URL}/v1/chat/completions", json=body(text, tokens), headers=headers, timeout=PATIENCE_S)


def figures(session: str) -> tuple[str, dict[str, float]]:
    """The replica that answers a session, and figures of it without further labels."""
    text = httpx.get(f"{URL}/metrics", headers={"x-session-id": session}, timeout=PATIENCE_S).text
    found = re.findall(r'^(kimi_vl_\w+)\{replica="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return found[0][1], {name: float(value) for name, _, value in found}


def replicas() -> set[str]:
    found = set()
    for number in range(12):
        with contextlib.suppress(httpx.HTTPError, IndexError):
            found.add(figures(f"look-{number}")[0])
    return found


class Stream(threading.Thread):
    """A stream that is read to its end: how many chunks came, and how it ended."""

    def __init__(self, session: str, tokens: int):
        super().__init__(daemon=True)
        self.session, self.tokens = session, tokens
        self.chunks, self.status, self.done = 0, 0, False
        self.error = ""
        self.leave = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            self.read()
        except httpx.HTTPError as error:
            self.error = repr(error)

    def read(self) -> None:
        sent, headers = body("Hello.", self.tokens, stream=True), {"x-session-id": self.session}
        with httpx.stream("POST", f"{URL}/v1/chat/completions", json=sent, headers=headers, timeout=PATIENCE_S) as got:
            self.status = got.status_code
            for line in got.iter_lines():
                if self.leave.is_set():
                    return
                self.chunks += line.startswith("data: {")
                self.done |= line == "data: [DONE]"


def streams(count: int, tokens: int) -> list[Stream]:
    """Streams of as many sessions, which one replica could run together; each has begun."""
    assert count <= SEQUENCES
    begun = []
    for number in range(count):  # one after the other: a replica refuses more than WAITING between two steps
        begun.append(Stream(f"stream-{number}", tokens))
        until(lambda: begun[-1].chunks > 1 or not begun[-1].is_alive())
    return begun


class Load(threading.Thread):
    """Asks with a new session each time until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.statuses: list[int] = []
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.statuses.append(ask(f"load-{len(self.statuses)}").status_code)
            except httpx.HTTPError:
                self.statuses.append(0)
            time.sleep(0.05)

    def counts(self) -> dict[str, Any]:
        self.over.set()
        self.join(PATIENCE_S)
        other = sorted(status for status in self.statuses if status != 200)
        return {"asked": len(self.statuses), "answered": self.statuses.count(200), "other": other}


def lost(begun: list[Stream]) -> list[str]:
    """How streams ended that did not end well."""
    return [f"{each.session}: {each.status}, {each.chunks}, {each.error}" for each in begun if not each.done]


def joined(begun: list[Stream]) -> list[Stream]:
    for stream in begun:
        stream.join(PATIENCE_S)
    return begun


def sessions_stay() -> dict[str, Any]:
    """200 requests of 8 sessions, whose prompts grow."""
    text = "Say something about a number. " * 30

    def converse(session: str) -> dict[str, Any]:
        places, prompt, cached, answered = set(), 0, 0, 0
        for turn in range(25):
            got = ask(session, f"{session}. {text}{'And one more. ' * turn}")
            assert got.status_code == 200, (turn, got.status_code, got.text)
            answered += 1
            if turn:
                usage = got.json()["usage"]
                prompt += usage["prompt_tokens"]
                cached += usage["prompt_tokens_details"]["cached_tokens"]
            if turn % 8 == 0:
                places.add(figures(session)[0])
        return {"places": places, "answered": answered, "hit ratio": round(cached / prompt, 3)}

    with ThreadPoolExecutor(WAITING) as pool:
        found = list(pool.map(converse, (f"session-{number}" for number in range(8))))
    return {
        "answered": sum(each["answered"] for each in found),
        "replicas a session": [len(each["places"]) for each in found],
        "hit ratios": [each["hit ratio"] for each in found],
    }


def client_leaves() -> dict[str, Any]:
    session = "leaves"
    sent, headers = body("Hello.", 100_000, stream=True), {"x-session-id": session}
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=sent, headers=headers, timeout=PATIENCE_S) as got:
        lines = got.iter_lines()
        for _ in range(6):
            next(lines)
        running = figures(session)[1]["kimi_vl_requests_running"]
    left = time.monotonic()
    while figures(session)[1]["kimi_vl_requests_running"]:
        assert time.monotonic() - left < PATIENCE_S
    seconds = time.monotonic() - left
    return {"running": running, "seconds": round(seconds, 3), "held": figures(session)[1]["kimi_vl_cache_usage_ratio"]}


def too_many() -> dict[str, Any]:
    """One replica runs and queues as much as it may; then those leave that run."""
    running, waiting = [], []
    for _ in range(SEQUENCES):
        running.append(Stream("crowd", 100_000))
        until(lambda: running[-1].chunks > 0)
    for _ in range(WAITING):
        waiting.append(Stream("crowd", 3))
        until(lambda: figures("crowd")[1]["kimi_vl_requests_waiting"] == len(waiting))
    refused = [ask("crowd") for _ in range(3)]
    for stream in running:
        stream.leave.set()
    return {
        "refused": [got.status_code for got in refused],
        "retry after": [got.headers.get("retry-after") for got in refused],
        "waited": len(waiting),
        "finished": sum(stream.done for stream in joined(waiting)),
    }


def replica_dies(cluster: Cluster) -> dict[str, Any]:
    there = replicas()
    at = {figures(session)[0]: session for session in (f"whole-{number}" for number in range(24))}
    begun, waits = streams(6, 4000), [Whole(session, 4000) for session in at.values()]
    until(lambda: sum(figures(session)[1]["kimi_vl_requests_running"] for session in at.values()) == 8)
    places = {stream.session: figures(stream.session)[0] for stream in begun}
    pid, load = min(cluster.replica_pids()), Load()
    until(lambda: len(load.statuses) > 4)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(cluster.replica_pids() - {pid}) == 2 and len(replicas() - there) == 1)
    serves_s = time.monotonic() - killed
    joined(begun)
    for each in waits:
        each.join(PATIENCE_S)
    return {
        "failed at": sorted({places[stream.session] for stream in begun if not stream.done}),
        "finished at": sorted({places[stream.session] for stream in begun if stream.done}),
        "failed": sum(not stream.done for stream in begun),
        "finished": sum(stream.done for stream in begun),
        "not begun": sorted((each.status, each.told) for each in waits),
        "meanwhile": load.counts(),
        "lost": lost(begun),
        "new replica s": round(serves_s, 1),
    }


class Whole(threading.Thread):
    """A request without a stream: what its client is told."""

    def __init__(self, session: str, tokens: int):
        super().__init__(daemon=True)
        self.session, self.tokens = session, tokens
        self.status, self.told = 0, ""
        self.start()

    def run(self) -> None:
        try:
            answer = ask(self.session, tokens=self.tokens)
        except httpx.HTTPError:
            self.told = "closed"
            return
        code = answer.json().get("error", {}).get("code", "")
        self.status, self.told = answer.status_code, f"{code} {answer.headers.get('x-should-retry', '')}".strip()


def deploy(model: str, cluster: dict[str, Any], **more: Any) -> None:
    """Other replicas, or another number of them, by way of the running Ray."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    from kimi_vl.cluster.deployment import deployment
    from kimi_vl.cluster.options import ClusterOptions
    from kimi_vl.cluster.run import NAME
    from kimi_vl.serving.options import ServerOptions

    bounds = {"max_num_seqs": SEQUENCES, "max_waiting": WAITING, "drain_delay_s": 1.0}
    options = ServerOptions(model=model, port=PORT, **bounds, **more)
    serve.run(deployment(options, ClusterOptions(gpus_per_replica=0, **cluster)), name=NAME)


def other_replicas(cluster: Cluster, model: str) -> dict[str, Any]:
    """Each replica is replaced, since an option has changed."""
    before = replicas()
    begun, load = streams(8, 2000), Load()
    deploy(model, {"replicas": 2}, lenient=True)
    until(lambda: len(cluster.replica_pids()) == 2 and not replicas() & before)
    joined(begun)
    return {"streams": len(begun), "finished": sum(each.done for each in begun), "lost": lost(begun), **load.counts()}


def cannot_load(cluster: Cluster) -> dict[str, Any]:
    """The next version has no weights: the one that is there goes on."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    from kimi_vl.cluster.run import NAME

    load, said = Load(), ""
    try:
        deploy("/nothing/is/here", {"replicas": 2})
    except RuntimeError:
        said = serve.status().applications[NAME].deployments["server"].message
    until(lambda: len(load.statuses) > 20)
    return {"said": said, **load.counts()}


def as_many_as_needed(cluster: Cluster, model: str) -> dict[str, Any]:
    """A replica goes while few requests are there, and one comes while requests wait."""
    begun, load = streams(3, 4000), Load()
    scaling = {"replicas": 1, "max_replicas": 2, "target_ongoing": 6.0}
    deploy(model, {**scaling, "upscale_delay_s": 1.0, "downscale_delay_s": 2.0}, lenient=True)
    until(lambda: len(cluster.replica_pids()) == 1)
    joined(begun)
    fewer = {"streams": len(begun), "finished": sum(each.done for each in begun), "lost": lost(begun), **load.counts()}
    crowd = []
    for number in range(SEQUENCES + WAITING):
        crowd.append(Stream(f"crowd-{number}", 100_000))
        until(
            lambda: sum(figures("any")[1][f"kimi_vl_requests_{name}"] for name in ("running", "waiting")) == len(crowd)
        )
    began = time.monotonic()
    until(lambda: len(replicas()) == 2)
    seconds = time.monotonic() - began
    for each in crowd:
        each.leave.set()
    return {"fewer": fewer, "waiting": WAITING, "replicas": len(cluster.replica_pids()), "seconds": round(seconds, 1)}


def ends(cluster: Cluster) -> dict[str, Any]:
    begun = streams(4, 1000)
    cluster.process.send_signal(signal.SIGTERM)
    code = cluster.process.wait(PATIENCE_S)
    return {"streams": len(begun), "finished": sum(stream.done for stream in joined(begun)), "code": code}


def main() -> None:
    import ray  # pyright: ignore[reportMissingImports]

    model = sys.argv[1]
    cluster = Cluster(model)
    try:
        until(lambda: len(replicas()) == 2)  # HAProxy hears of the second one a little later
        one = Stream("one", 40)
        one.join(PATIENCE_S)
        found = {
            "ready s": round(cluster.ready_s, 1),
            "listens elsewhere": listens_elsewhere(family(cluster.process.pid)),
            "stream": {"chunks": one.chunks, "done": one.done, "status": one.status},
        }

        def does(name: str, part: Callable[..., dict[str, Any]], *given: Any) -> None:
            began = time.monotonic()
            found[name] = part(*given)
            print(name, found[name], f"{time.monotonic() - began:.1f} s", flush=True)

        does("sessions", sessions_stay)
        does("client leaves", client_leaves)
        does("too many", too_many)
        does("replica dies", replica_dies, cluster)
        ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
        does("other replicas", other_replicas, cluster, model)
        does("cannot load", cannot_load, cluster)
        does("as many as needed", as_many_as_needed, cluster, model)
        ray.shutdown()
        does("ends", ends, cluster)
        print(json.dumps(found), flush=True)
    finally:
        cluster.process.terminate()
        cluster.process.wait(PATIENCE_S)


if __name__ == "__main__":
    main()
