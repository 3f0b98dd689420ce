"""A cluster of this machine, from its start to its end."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable

from ..serving.options import OptionError, ServerOptions
from .deployment import FAILED, QUIET, deployment
from .environment import LOOPBACK
from .options import ClusterOptions

NAME = "kimi-vl"
OBJECT_STORE_BYTES = 200 << 20
"""Requests do not pass through Ray's object store, which would otherwise take 30 % of the memory."""

_LOGS = "the logs in /tmp/ray/session_latest/logs say why"


def serve(
    options: ServerOptions,
    cluster: ClusterOptions,
    ready: Callable[[str], None],
    signals: Callable[[], threading.Event],
) -> int:
    """Run a cluster of this machine until the event of ``signals`` is set; the exit status. What runs then is finished.

    ``signals`` is called once Ray, which sets handlers of signals, has started. The variables of ``environment`` must
    have been applied. Raises :class:`OptionError` where the cluster cannot serve.
    """
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve as ray_serve  # pyright: ignore[reportMissingImports]

    try:
        ray.init(
            address="local",
            include_dashboard=cluster.dashboard,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
        )
    except Exception:  # Ray raises that itself
        raise OptionError(f"Ray cannot start on this machine; {_LOGS}") from None
    over = signals()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        gpus = ray.cluster_resources().get("GPU", 0)
        if gpus < cluster.replicas * cluster.gpus_per_replica:
            raise OptionError(
                f"--replicas {cluster.replicas} with --gpus-per-replica {cluster.gpus_per_replica:g} needs more than "
                f"the {gpus:g} GPUs of this machine; lower one of them"
            )
        # HAProxy listens on the host of the options in place of this one, which is the replicas'
        listen = {"host": LOOPBACK, "port": options.port, "keep_alive_timeout_s": options.keep_alive_s}
        try:
            ray_serve.start(proxy_location="EveryNode", http_options=listen, logging_config=QUIET)
            ray_serve.run(deployment(options, cluster), name=NAME)
        except (RuntimeError, ray.exceptions.RayError) as error:
            raise OptionError(reason(f"{error}\n{_messages()}")) from None
        ready(f"http://{options.host}:{options.port}")
        over.wait()
        ray_serve.delete(NAME)  # lets requests end, which a shutdown would not
        return 0
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def _messages() -> str:
    """What Ray Serve says about the deployments that it knows."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    applications = serve.status().applications.values()
    return "\n".join(deployment.message for each in applications for deployment in each.deployments.values())


def reason(text: str) -> str:
    """One line of what Ray says where a replica did not start."""
    found = re.search(f"{FAILED}([^\n]+)", text)
    return found.group(1) if found else f"no replica could be started; {_LOGS}"
