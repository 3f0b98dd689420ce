"""What becomes of Ray's file for HAProxy: who may reach what, and where sessions go. HAProxy itself is not needed."""

from __future__ import annotations

import re
import stat
import subprocess
from pathlib import Path

import pytest

from kimi_vl.cluster import haproxy

FILE = """global
    stats socket /tmp/x/admin.sock mode 666 level admin
defaults
    mode http
    timeout client 1805s
    errorfile 503 /tmp/x/500.http
    balance hdr(x-session-id)
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    http-request return status 404
backend http-kimi-vl
    http-reuse always
    default-server fastinter 250ms fall 2 rise 2 check
    server SERVE_REPLICA--kimi-vl-server-a 127.0.0.1:30000 check observe layer4
    server SERVE_REPLICA--kimi-vl-server-b 127.0.0.1:30001 check observe layer4
    server SERVE_PROXY_ACTOR-0 127.0.0.1:8500 check backup
listen stats
  bind *:8404
  stats enable
"""


def changed(text: str, host: str = "127.0.0.1", head_timeout_ms: int = 10_000) -> str:
    return haproxy.changed(text, host, head_timeout_ms, "/tmp/x/unavailable.http")


def binds(text: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.split()[:1] == ["bind"]]


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("127.0.0.1", "127.0.0.1:8000"),
        ("0.0.0.0", "0.0.0.0:8000"),
        ("10.1.2.3", "10.1.2.3:8000"),
        ("::", "[::]:8000 v4v6"),
        ("::1", "[::1]:8000"),
    ],
)
def test_only_the_service_listens_on_the_host(host: str, service: str) -> None:
    assert binds(changed(FILE, host)) == ["127.0.0.1:9101", service, "127.0.0.1:8404"]


def test_on_several_machines_the_service_listens_as_ray_says() -> None:
    text = FILE.replace("bind 127.0.0.1:8000", "bind 0.0.0.0:8000")
    assert binds(changed(text, haproxy.AS_RAY_SAYS)) == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]


def test_no_other_user_may_command_it() -> None:
    assert "    stats socket /tmp/x/admin.sock mode 600 level admin\n" in changed(FILE)


def test_a_machine_that_is_silent_is_noticed() -> None:
    """By keep-alive where the replica is to speak, by the user's timeout where HAProxy has spoken."""
    text = changed(FILE)
    assert "    option srvtcpka\n    srvtcpka-idle 15s\n    srvtcpka-intvl 5s\n    srvtcpka-cnt 3\n" in text
    servers = [line for line in text.splitlines() if line.startswith("    server ")]
    assert len(servers) == 3 and all(" tcp-ut 30s " in line for line in servers)


def ids(text: str) -> dict[str, str]:
    return dict(re.findall(r"^    server (\S+) .* id (\d+) weight 16$", text, re.MULTILINE))


def test_servers_keep_their_places_when_others_go() -> None:
    found = ids(changed(FILE))
    assert len(found) == len(set(found.values())) == 3 and all(0 < int(number) < 2**31 for number in found.values())
    without = "".join(line for line in FILE.splitlines(keepends=True) if "server-a " not in line)
    fewer = ids(changed(without))
    assert len(fewer) == 2 and fewer.items() < found.items()


def test_sessions_are_hashed_consistently_and_heads_have_a_time() -> None:
    text = changed(FILE, head_timeout_ms=2500)
    assert "    balance hdr(x-session-id)\n    hash-type consistent\n    timeout http-request 2500ms\n" in text
    assert text.count("hash-type") == 1


def test_errors_are_those_of_the_service() -> None:
    found = [line.split() for line in changed(FILE).splitlines() if "errorfile" in line]
    assert found == [["errorfile", status, "/tmp/x/unavailable.http"] for status in ("502", "503", "504")]


def test_the_rest_is_as_it_was() -> None:
    ours = (
        "bind",
        "server",
        "errorfile",
        "hash-type",
        "stats socket",
        "option srvtcpka",
        "srvtcpka",
        "timeout http-re",
    )

    def rest(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.strip().startswith(ours)]

    assert rest(changed(FILE)) == rest(FILE) and len(rest(FILE)) == 16


@pytest.mark.parametrize(
    "other",
    [
        FILE.replace("frontend http_frontend", "frontend web"),
        FILE.replace("    balance hdr(x-session-id)\n", ""),
        FILE.replace("bind :9101", "bind /tmp/socket"),
    ],
)
def test_a_file_that_is_not_known_starts_nothing(other: str) -> None:
    with pytest.raises(haproxy.UnknownFile):
        changed(other)


@pytest.mark.slow
def test_the_launcher_changes_the_file_or_says_why_not(tmp_path: Path) -> None:
    launcher = haproxy.write_launcher(tmp_path, "127.0.0.1", 10.0, b"")
    assert stat.S_IMODE(launcher.stat().st_mode) == 0o755
    (tmp_path / "unknown.cfg").write_text("global\n")
    ended = subprocess.run(
        [launcher, "-db", "-f", tmp_path / "unknown.cfg"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and ended.stderr.startswith("error: Ray's file for HAProxy")
    assert ended.stderr.count("\n") == 1 and (tmp_path / "unknown.cfg").read_text() == "global\n"
