"""What a cluster of two replicas goes through, run in a network namespace of its own: prints what happened as JSON.

python cluster_scenario.py MODEL HOST, with the Python of an environment that has Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

PATIENCE_S = 240
PORT = 8123
SEQUENCES, WAITING = 8, 4
URL = f"http://127.0.0.1:{PORT}"


def loopback_up() -> None:
    """Set IFF_UP and IFF_RUNNING on lo, which is down in a new namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))


class Cluster:
    def __init__(self, model: str, host: str):
        bounds = [f"--max-num-seqs={SEQUENCES}", f"--max-waiting={WAITING}", "--drain-delay-s=1"]
        command = [sys.executable, "-m", "kimi_vl.cli", "cluster", "--model", model, "--gpus-per-replica=0"]
        began = time.monotonic()
        self.log = Path("log").open("w")  # noqa: SIM115 (as long as the cluster)
        self.process = subprocess.Popen(
            [*command, "--replicas=2", f"--host={host}", f"--port={PORT}", *bounds], stdout=self.log, stderr=self.log
        )
        until(lambda: self.process.poll() is not None or "\nready: " in Path("log").read_text())
        assert self.process.poll() is None, Path("log").read_text()[-3000:]
        self.ready_s = time.monotonic() - began

    def replica_pids(self) -> set[int]:
        titles = {path.parent.name: title(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        own = {pid for pid, text in titles.items() if text.startswith("ray::ServeReplica")}
        return {int(pid) for pid in own if net(pid) == net("self")}


def title(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def net(pid: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return ""


def until(condition: Any) -> float:
    """Wait until something is so; the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S, Path("log").read_text()[-3000:]
        time.sleep(0.02)
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
    for number in range(24):
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
    until(lambda: all(figures(f"stream-{number}")[1]["kimi_vl_requests_running"] == 0 for number in range(count)))
    begun = []
    for number in range(count):
        begun.append(Stream(f"stream-{number}", tokens))
        until(lambda: begun[-1].chunks > 1 or not begun[-1].is_alive())
    return begun


def lost(begun: list[Stream]) -> list[str]:
    """How streams ended that did not end well."""
    return [f"{each.session}: {each.status}, {each.chunks}, {each.error}" for each in begun if not each.done]


def joined(begun: list[Stream]) -> list[Stream]:
    for stream in begun:
        stream.join(PATIENCE_S)
    return begun


def sessions_stay() -> dict[str, Any]:
    text = "Say something about a number. " * 30
    places: dict[str, set[str]] = {}
    prompt = cached = answered = 0
    for session in (f"session-{number}" for number in range(8)):
        for turn in range(25):
            got = ask(session, f"{session}. {text}{'And one more. ' * turn}")
            answered += got.status_code == 200
            if turn:
                usage = got.json()["usage"]
                prompt += usage["prompt_tokens"]
                cached += usage["prompt_tokens_details"]["cached_tokens"]
            if turn % 8 == 0:
                places.setdefault(session, set()).add(figures(session)[0])
    return {
        "answered": answered,
        "replicas a session": [len(found) for found in places.values()],
        "replicas": len(set().union(*places.values())),
        "hit ratio": round(cached / prompt, 3),
    }


def client_leaves() -> dict[str, Any]:
    session = "leaves"
    sent, headers = body("Hello.", 100_000, stream=True), {"x-session-id": session}
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=sent, headers=headers, timeout=PATIENCE_S) as got:
        lines = got.iter_lines()
        for _ in range(6):
            next(lines)
        running = figures(session)[1]["kimi_vl_requests_running"]
    seconds = until(lambda: figures(session)[1]["kimi_vl_requests_running"] == 0)
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
    before = cluster.replica_pids()
    begun = streams(8, 2500)
    places = {stream.session: figures(stream.session)[0] for stream in begun}
    pid = min(before)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: pid not in cluster.replica_pids())
    after = []
    for number in range(30):  # none of these reached it
        try:
            after.append(ask(f"after-{number}").status_code)
        except httpx.HTTPError:
            after.append(0)
    until(lambda: len(replicas()) == 2 and len(cluster.replica_pids() - {pid}) == 2)
    serves_s = time.monotonic() - killed
    joined(begun)
    return {
        "failed at": sorted({places[stream.session] for stream in begun if not stream.done}),
        "finished at": sorted({places[stream.session] for stream in begun if stream.done}),
        "failed": sum(not stream.done for stream in begun),
        "finished": sum(stream.done for stream in begun),
        "asked after": len(after),
        "answered after": after.count(200),
        "statuses after": sorted(set(after)),
        "lost": lost(begun),
        "new replica s": round(serves_s, 1),
    }


def fewer_replicas(cluster: Cluster, model: str) -> dict[str, Any]:
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    from kimi_vl.serving import cluster as clusters
    from kimi_vl.serving.options import ServerOptions

    ray.init(address="auto", logging_level="ERROR", log_to_driver=False)
    begun = streams(8, 2000)
    options = ServerOptions(
        model=model, port=PORT, max_num_seqs=SEQUENCES, max_waiting=WAITING, drain_delay_s=1.0, host=sys.argv[2]
    )
    one = clusters.ClusterOptions(replicas=1, gpus_per_replica=0)
    serve.run(clusters.deployment(options, one), name=clusters.NAME)
    during = [ask(f"during-{number}").status_code for number in range(20)]
    joined(begun)
    until(lambda: len(cluster.replica_pids()) == 1)
    ray.shutdown()
    return {
        "streams": len(begun),
        "finished": sum(stream.done for stream in begun),
        "lost": lost(begun),
        "asked during": len(during),
        "answered during": during.count(200),
    }


def ends(cluster: Cluster) -> dict[str, Any]:
    begun = streams(4, 1000)
    cluster.process.send_signal(signal.SIGTERM)
    code = cluster.process.wait(PATIENCE_S)
    return {"streams": len(begun), "finished": sum(stream.done for stream in joined(begun)), "code": code}


def main() -> None:
    loopback_up()
    model, host = sys.argv[1:]
    cluster = Cluster(model, host)
    try:
        until(lambda: len(replicas()) == 2)  # HAProxy hears of the second one a little later
        one = Stream("one", 40)
        one.join(PATIENCE_S)
        found = {
            "ready s": round(cluster.ready_s, 1),
            "stream": {"chunks": one.chunks, "done": one.done, "status": one.status},
            "sessions": sessions_stay(),
            "client leaves": client_leaves(),
            "too many": too_many(),
            "replica dies": replica_dies(cluster),
            "fewer replicas": fewer_replicas(cluster, model),
            "ends": ends(cluster),
        }
        print(json.dumps(found), flush=True)
    finally:
        cluster.process.terminate()
        cluster.process.wait(PATIENCE_S)


if __name__ == "__main__":
    main()
