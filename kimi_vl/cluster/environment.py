"""What Ray reads from the environment when it is imported, in every one of its processes."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from ..serving.errors import unavailable
from ..serving.options import ServerOptions
from . import haproxy

SESSION = "x-session-id"
LOOPBACK = "127.0.0.1"
_LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def everywhere(options: ServerOptions) -> dict[str, str]:
    """What Ray has to find in the environment of every one of its processes, on any number of machines."""
    longest = str(math.ceil(options.deadline_s + options.drain_delay_s))
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # every line of a replica's log counts
        "RAY_COLOR_PREFIX": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": f"hdr({SESSION})",
        # replicas that come and go reload HAProxy: the old process keeps its streams for so long
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": longest,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": longest,
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": longest,
        # A replica that is gone refuses connections: HAProxy takes another one at once. One that is late is busy; Ray,
        # which waits for longer, replaces those that hang.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "6",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "2s",
        # Pieces of a stream go to the connection on the event loop that made them, which waits for slow clients.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        # A busy machine starts HAProxy more slowly than Ray expects, and answers it later.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
        "RAY_raylet_start_wait_time_s": "120",
        # How long a replica that ends is reachable for balancers that have not heard of it
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # a node that ends waits for what runs on it
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": longest,
    }


def one_machine(options: ServerOptions, folder: Path) -> dict[str, str]:
    """What Ray has to find beside :func:`everywhere` where it is alone on its machine.

    All of Ray's ports are on loopback then, and HAProxy's, but for the service where another host was asked for.
    ``folder`` is for HAProxy's files: nobody else may look into it, since all who do may command HAProxy. The name of a
    socket may have 97 characters, of which Ray takes 69.
    """
    launcher = haproxy.write_launcher(folder, options.host, options.head_timeout_s, _unavailable())
    return {
        # On systems whose firewalls ask the user, Ray stays on loopback. This says that the system is such a one.
        _LOOPBACK_ALONE: "0",
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": f"{__name__}:leave_out_other_machines",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(launcher),
    }


def write_launcher(options: ServerOptions, folder: Path) -> Path:
    """On each of several machines: what Ray is to start as HAProxy, in ``folder``. Raises :class:`OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    return haproxy.write_launcher(folder.resolve(), haproxy.AS_RAY_SAYS, options.head_timeout_s, _unavailable())


def is_one_machine() -> bool:
    """Whether this process of Ray's was started with :func:`one_machine`."""
    return os.environ.get(_LOOPBACK_ALONE) == "0"


def leave_out_other_machines() -> None:
    """In Ray's controller: its log does not warn that other machines, which are not there, could not be reached."""
    logging.getLogger("ray.serve").addFilter(lambda record: "from HAProxy on other nodes" not in record.getMessage())


def _unavailable() -> bytes:
    """What HAProxy answers where a replica is gone before it has answered, and where there is none."""
    error = unavailable("no replica answers, or the one that ran this request is gone; send it again.", 1)
    body = error.body()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Cache-Control": "no-cache"}
    lines = [f"HTTP/1.1 {error.status} Service Unavailable"]
    lines += [f"{name}: {value}" for name, value in {**headers, **error.headers, "Connection": "close"}.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
