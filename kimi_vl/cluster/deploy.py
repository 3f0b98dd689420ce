"""A configuration file of Ray Serve to a cluster that runs, and what becomes of it, in one line.

``serve deploy`` passes over keys that it does not know and ends before anything is loaded, and ``serve status`` has the
reason of a failure within what Ray says about itself.
"""

from __future__ import annotations

import os
import re
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..serving.options import OptionError
from .deployment import application, with_arguments
from .run import reason

APPLICATION = f"{application.__module__}:{application.__name__}"
PATIENCE_S = 60
"""How long a replica may wait for resources; also long enough for a process to start."""

_REQUIRED = re.compile(r"Resources required for each replica: (\{[^}]*\})")


def deploy(path: Path, pause: Callable[[float], None] = time.sleep) -> str:
    """Deploy a file and wait until all of its applications serve; says so in a line. Raises :class:`OptionError`."""
    from ray.serve.schema import ServeDeploySchema  # pyright: ignore[reportMissingImports]

    said = read(path)
    check(said, ServeDeploySchema, f"{path}: ")
    schema = ServeDeploySchema.model_validate(said)
    client = _client()
    before = _states(client)
    client.deploy_applications(schema.model_dump(exclude_unset=True))
    try:
        return "; ".join(follow(client, each.name, before, pause) for each in schema.applications)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


def follow(client: Any, name: str, before: Mapping[str, Any], pause: Callable[[float], None]) -> str:
    """Wait until the application serves that has been deployed since ``before``; says so in a line.

    Raises :class:`OptionError` where it does not come to serve.
    """
    waiting = 0
    while True:
        pause(1)
        found = _states(client).get(name)
        if found is None or found["last_deployed_time_s"] == before.get(name, {}).get("last_deployed_time_s"):
            continue
        try:
            if line := outcome(found):
                return f"{name} serves: {line}"
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None
        required = waits_for(found)
        waiting = waiting + 1 if required else 0
        if waiting == PATIENCE_S:
            raise OptionError(
                f"{name}: a replica waits, since no node has {required} free; what served before still does"
            )


def read(path: Path) -> dict[str, Any]:
    """What stands in a file. Raises :class:`OptionError`."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise OptionError(f"{path}{line}: is not YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise OptionError(f"{path}: is not YAML") from None
    if not isinstance(found, dict):
        raise OptionError(f"{path}: has no applications")
    return found


def check(value: Mapping[str, Any], model: Any, where: str) -> None:
    """Refuse keys that ``model``, of pydantic, does not have, and values that it does not take, at any depth.

    ``where`` is the beginning of what :class:`OptionError` says.
    """
    from pydantic import ValidationError

    for key, inner in value.items():
        field = model.model_fields.get(key)
        if field is None:
            raise OptionError(f"{where}there is no key {key}")
        for each, place in _parts(inner, f"{where}{key}"):
            for nested in _models(field.annotation):
                check(each, nested, f"{place}: ")
    if value.get("import_path") == APPLICATION and isinstance(value.get("args"), dict):
        with_arguments(value["args"], f"{where}args")
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        raise OptionError(f"{where}{place}{first['msg'].removeprefix('Value error, ')}") from None


def _parts(value: Any, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The mappings that stand under a key, alone or in a list, and where."""
    for number, each in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(each, dict):
            yield each, f"{where}: {each.get('name', number)}" if isinstance(value, list) else where


def _models(annotation: Any) -> list[Any]:
    """The model that an annotation names beside types that are none; none where there are several to choose from."""
    found = [annotation] if hasattr(annotation, "model_fields") else []
    for inner in typing.get_args(annotation):
        found += _models(inner)
    return found if len(found) == 1 else []


def outcome(found: Mapping[str, Any]) -> str | None:
    """What there is to say about an application of which Ray says ``found``; None while it is being deployed.

    Raises :class:`OptionError` where it does not serve as the file wants it.
    """
    deployments = found["deployments"]
    messages = "\n".join([found["message"], *(each["message"] for each in deployments.values())])
    if found["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise OptionError(f"{reason(messages)}; what served before still does")
    if found["status"] == "RUNNING":  # beside which messages of before may stand
        return ", ".join(f"{name} on {len(each['replicas'])} replicas" for name, each in deployments.items())
    return None


def waits_for(found: Mapping[str, Any]) -> str | None:
    """The resources, in JSON, for which a replica waits according to Ray, while none is ending that may have them.

    Ray says so until the process of the replica has started, which may have got them meanwhile.
    """
    deployments = found["deployments"].values()
    replicas = [replica for each in deployments for replica in each["replicas"]]
    ending = any(replica["state"] == "STOPPING" for replica in replicas)
    placeless = any(replica["state"] == "STARTING" and not replica.get("node_id") for replica in replicas)
    required = _REQUIRED.search("\n".join(each["message"] for each in deployments))
    return required.group(1) if required and placeless and not ending else None


def _client() -> Any:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient  # pyright: ignore[reportMissingImports]
    from ray.exceptions import AuthenticationError  # pyright: ignore[reportMissingImports]

    address = os.environ.get("RAY_DASHBOARD_ADDRESS", "http://localhost:8265")
    try:
        return ServeSubmissionClient(address)
    except AuthenticationError:
        raise OptionError(f"Ray's dashboard at {address} wants another token; set RAY_AUTH_MODE=token") from None
    except (ConnectionError, RuntimeError, ValueError):
        raise OptionError(
            f"no dashboard of Ray answers at {address}; deploy from the first machine, after `ray start --head`"
        ) from None


def _states(client: Any) -> dict[str, Any]:
    return client.get_serve_details().get("applications", {})
