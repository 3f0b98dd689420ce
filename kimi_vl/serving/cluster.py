"""The application of ``kimi-vl serve`` in replicas on Ray Serve: one engine each.

Ray reads many of its settings from the environment when it is imported, so it is imported where it is used, after
:func:`environment` has been applied.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UserError
from . import options as server_options
from .options import OptionError, ServerOptions

NAME = "kimi-vl"
SESSION = "x-session-id"
EVERYWHERE = "0.0.0.0"
OBJECT_STORE_BYTES = 200 << 20
"""Requests do not pass through Ray's object store, which would otherwise take 30 % of the memory."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}
BESIDE = 64
"""Requests that a replica takes beside those that its own queue may hold: for /health, /metrics, and refusals."""

_FAILED = "kimi-vl cannot load: "


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas there are, and what each of them gets."""

    replicas: int = 1
    max_replicas: int = 0
    """More than ``replicas``: replicas are added while requests wait, up to this many."""
    gpus_per_replica: float = 1.0
    target_ongoing: float = 0.0
    """Requests a replica that autoscaling aims at; 0 is 0.7 of ``max_num_seqs``."""
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    dashboard: bool = False

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise OptionError("--replicas must be at least 1")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise OptionError("--max-replicas must not be less than --replicas")
        for name in ("gpus_per_replica", "target_ongoing", "upscale_delay_s", "downscale_delay_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"--{name.replace('_', '-')} must be at least 0")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise OptionError("--gpus-per-replica must be a whole number where it is more than 1")


def environment(options: ServerOptions) -> dict[str, str]:
    """What Ray has to find in the environment of every one of its processes.

    Ray's own proxy listens where it is told. HAProxy, which costs less for each token, listens on all addresses, and
    makes replicas do so: it is used where that was asked for.
    """
    longest = math.ceil(options.deadline_s + options.drain_delay_s)
    found = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",  # every line of a replica's log counts
        "RAY_COLOR_PREFIX": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        # a node that ends waits for what runs on it
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(longest),
    }
    if options.host != EVERYWHERE:
        return found
    folder = Path(tempfile.gettempdir()) / f"kimi-vl-haproxy-{options.port}"  # Ray's default is one for all clusters
    return found | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": f"hdr({SESSION})",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # replicas that come and go reload HAProxy: the old process keeps its streams for so long
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(longest),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(longest),
    }


class Replica:
    """One engine and its application, in a process of Ray's."""

    def __init__(self, options: ServerOptions):
        from ray import serve  # pyright: ignore[reportMissingImports]

        from .access import JsonLines
        from .app import build_app
        from .server import load_pipeline

        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logger = logging.getLogger("kimi_vl")
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
        try:
            pipeline = load_pipeline(options)
        except (CheckpointError, UserError, OptionError) as error:
            raise RuntimeError(f"{_FAILED}{getattr(error, 'message', error)}\n") from None
        replica = serve.get_replica_context().replica_id.unique_id
        self._app = build_app(pipeline, options, labels={"replica": replica})

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self._app.state.service.available()


def deployment(options: ServerOptions, cluster: ClusterOptions) -> Any:
    """The application for Ray Serve."""
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig  # pyright: ignore[reportMissingImports]

    chosen: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas > cluster.replicas:
        chosen = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=cluster.target_ongoing or 0.7 * options.max_num_seqs,
                upscale_delay_s=cluster.upscale_delay_s,
                downscale_delay_s=cluster.downscale_delay_s,
            )
        }
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1":  # which has a balance of its own, and refuses another one
        router = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
        chosen["request_router_config"] = RequestRouterConfig(request_router_class=router)
    wrapped = serve.deployment(
        serve.ingress()(Replica),
        name="server",
        # Ray's bound is above that of our own queue, whose refusals say when to come again.
        max_ongoing_requests=options.max_num_seqs + options.max_waiting + BESIDE,
        ray_actor_options={"num_cpus": 0, "num_gpus": cluster.gpus_per_replica},
        graceful_shutdown_timeout_s=options.deadline_s + options.drain_delay_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
        logging_config=QUIET,
        **chosen,
    )
    return wrapped.bind(options)


def application(arguments: Mapping[str, Any]) -> Any:
    """For a configuration file of Ray Serve: ``arguments`` are those of :class:`ServerOptions`, by name.

    What they do not say is taken from the environment. Raises :class:`OptionError`.
    """
    import argparse

    given = server_options.gather(argparse.Namespace())
    given = dataclasses.replace(given, **server_options.checked(arguments, "args"))
    if given.model == "auto":
        raise OptionError("args: model must be said, since the nodes of a cluster may differ")
    return deployment(given, ClusterOptions())


def serve(
    options: ServerOptions,
    cluster: ClusterOptions,
    ready: Callable[[str], None],
    signals: Callable[[], threading.Event],
) -> int:
    """Run a cluster of this machine until the event of ``signals`` is set; the exit status. What runs then is finished.

    ``signals`` is called once Ray, which sets handlers of signals, has started. :func:`environment` must have been
    applied. Raises :class:`OptionError` where the cluster cannot serve.
    """
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]

    ray.init(
        address="local",
        include_dashboard=cluster.dashboard,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    over = signals()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < cluster.replicas * cluster.gpus_per_replica:
            raise OptionError(
                f"--replicas {cluster.replicas} with --gpus-per-replica {cluster.gpus_per_replica:g} needs more than "
                f"the {gpus:g} GPUs of this machine; lower one of them"
            )
        listen = {"host": options.host, "port": options.port, "keep_alive_timeout_s": options.keep_alive_s}
        ray_serve.start(proxy_location="EveryNode", http_options=listen, logging_config=QUIET)
        try:
            ray_serve.run(deployment(options, cluster), name=NAME)
        except RuntimeError as error:
            raise OptionError(_reason(str(error))) from None
        ready(f"http://{options.host}:{options.port}")
        over.wait()
        ray_serve.delete(NAME)  # lets requests end, which a shutdown would not
        return 0
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def _reason(text: str) -> str:
    """One line of what Ray says where a replica did not start."""
    found = re.search(f"{_FAILED}([^\n]+)", text)
    return (
        found.group(1) if found else "no replica could be started; Ray's logs in /tmp/ray/session_latest/logs say why"
    )
