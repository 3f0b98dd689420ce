"""Schemathesis reads the served openapi.json and sends what it allows and what it forbids.

No such request is a fault of the server, and what succeeds has the form that the document says.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from cog_local.server import Server

from .conftest import data_url, picture, worker_of

FILES = [data_url(picture()), data_url(b"no picture"), "data:,", "/etc/hostname", "http://127.0.0.1:1/x.png"]


def bounded(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what would reach other machines or take minutes."""
    document = copy.deepcopy(document)
    schemas = document["components"]["schemas"]
    request, inputs = schemas["PredictionRequest"]["properties"], schemas["Input"]["properties"]
    for name in ("webhook", "webhook_events_filter", "output_file_prefix"):
        request.pop(name, None)
    for name in ("max_length_tokens", "max_tokens", "max_new_tokens"):
        inputs[name]["maximum"] = 12
    for field in (inputs["image"], inputs["video"], inputs["document"], inputs["images"]["items"]):
        field.pop("format")
        field["enum"] = FILES
    schemas["PredictionRequest"]["additionalProperties"] = False
    return document


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_nothing_that_the_schema_allows_or_forbids_is_the_servers_fault(server: Server, mode: GenerationMode) -> None:
    client = server.client
    schema = schemathesis.openapi.from_dict(bounded(client.schema()))
    operation = schema["/predictions"]["POST"]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=120,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: schemathesis.Case) -> None:
        inputs = case.body.get("input") if isinstance(case.body, dict) else None
        if isinstance(inputs, dict):
            inputs.setdefault("max_length_tokens", 12)  # thousands, left out
        client.settle()
        response = case.call(base_url=f"http://{client.host}:{client.port}", timeout=300)
        statuses[response.status_code] += 1
        checks: list[Any] = [not_a_server_error]
        if response.status_code == 200:
            checks.append(response_schema_conformance)
        case.validate_response(response, checks=checks)

    worker = worker_of(server)
    one()
    client.settle()
    assert client.health()["status"] == "READY"
    assert worker_of(server) == worker
    assert (200 if mode is GenerationMode.POSITIVE else 422) in statuses, statuses
