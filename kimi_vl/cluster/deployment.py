"""What Ray Serve runs: the application in each replica, and how there are more or fewer of them.

Ray reads many of its settings from the environment when it is imported, so it is imported where it is used, after
:mod:`~kimi_vl.cluster.environment` has been applied.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, UserError
from ..serving import options as server_options
from ..serving.options import OptionError, ServerOptions
from . import environment
from .options import ClusterOptions

QUIET = {"log_level": "WARNING", "enable_access_log": False}
BESIDE = 64
"""Requests that a replica takes beside those that its own queue may hold: for /health, /metrics, and refusals."""

FAILED = "kimi-vl cannot load: "


class Replica:
    """One engine and its application, in a process of Ray's."""

    def __init__(self, options: ServerOptions):
        self._options = options
        self._app: Any = None

    async def __serve_build_asgi_app__(self) -> Any:
        """Load the model beside the event loop, on which Ray may ask the replica to end meanwhile."""
        from ray import serve  # pyright: ignore[reportMissingImports]

        from ..serving.access import JsonLines
        from ..serving.app import build_app
        from ..serving.server import load_pipeline

        if environment.is_one_machine():
            _listen_on_loopback()
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        logger = logging.getLogger("kimi_vl")
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
        try:
            pipeline = await asyncio.to_thread(load_pipeline, self._options)
        except (CheckpointError, UserError, OptionError) as error:
            raise RuntimeError(f"{FAILED}{getattr(error, 'message', error)}\n") from None
        replica = serve.get_replica_context().replica_id.unique_id
        self._app = build_app(pipeline, self._options, labels={"replica": replica})
        return self._app

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        self._app.state.service.available()


def _listen_on_loopback() -> None:
    """Replicas listen for one another on all addresses, and unpickle what comes there. Ray has no setting for it."""
    from ray.serve._private import replica  # pyright: ignore[reportMissingImports]

    listen = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: listen(server, f"{environment.LOOPBACK}:0")


def deployment(options: ServerOptions, cluster: ClusterOptions) -> Any:
    """The application for Ray Serve."""
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import AutoscalingConfig  # pyright: ignore[reportMissingImports]

    chosen: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas > cluster.replicas:
        window = min(30.0, max(3.0, cluster.upscale_delay_s))
        chosen = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=cluster.max_replicas,
                target_ongoing_requests=cluster.target_ongoing or 0.7 * options.max_num_seqs,
                upscale_delay_s=cluster.upscale_delay_s,
                downscale_delay_s=cluster.downscale_delay_s,
                # What counts is the mean of the last moments, in which replicas say often enough how much they have.
                look_back_period_s=window,
                metrics_interval_s=window / 3,
            )
        }
    wrapped = serve.deployment(
        serve.ingress()(Replica),
        name="server",
        # Ray's bound is above that of our own queue, whose refusals say when to come again.
        max_ongoing_requests=options.max_num_seqs + options.max_waiting + BESIDE,
        ray_actor_options={"num_cpus": 0, "num_gpus": cluster.gpus_per_replica},
        graceful_shutdown_timeout_s=options.deadline_s + options.drain_delay_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=1,  # until it is known that a replica is gone
        health_check_timeout_s=30,
        max_constructor_retry_count=1,
        logging_config=QUIET,
        **chosen,
    )
    return wrapped.bind(options)


def application(arguments: Mapping[str, Any]) -> Any:
    """For a configuration file of Ray Serve: ``arguments`` are those of :class:`ServerOptions`, by name.

    What they do not say is taken from the environment. Raises :class:`ray.serve.exceptions.RayServeException` with one
    line, which Ray shows as it is; of all others it shows the way that they came.
    """
    from ray.serve.exceptions import RayServeException  # pyright: ignore[reportMissingImports]

    try:
        return deployment(with_arguments(arguments, "args"), ClusterOptions())
    except OptionError as error:
        raise RayServeException(f"{FAILED}{error}") from None


def with_arguments(arguments: Mapping[str, Any], where: str) -> ServerOptions:
    """What ``arguments``, which stand at ``where``, and the environment say. Raises :class:`OptionError`."""
    import argparse

    given = server_options.gather(argparse.Namespace())
    given = dataclasses.replace(given, **server_options.checked(arguments, where))
    if given.model == "auto":
        raise OptionError(f"{where}: model must be said, since the nodes of a cluster may differ")
    return given
