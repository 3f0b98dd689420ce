"""A client of Cog's HTTP API: plain and streamed predictions, with the retries that its one slot asks for."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

RETRY_SECONDS = 30.0


class ServerGone(Exception):
    """The server did not answer, or stopped in the middle of an answer."""


class RequestRefused(Exception):
    """The server refused a request before running it; `status` is the HTTP status, `body` what it said."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(_explain(body))
        self.status = status
        self.body = body


@dataclass(frozen=True)
class Event:
    """One server-sent event; Cog's data is always a JSON object."""

    name: str
    data: dict[str, Any]


class Client:
    """Talks to one server; every call has a connection of its own. A busy server is asked again for `patience` s."""

    def __init__(self, url: str, patience: float = RETRY_SECONDS) -> None:
        self.patience = patience
        base = httpx.URL(url)
        self.host, self.port = base.host, base.port or 80
        self._http = httpx.Client(
            verify=base.scheme == "https",  # loading certificates takes 20 ms, which plain HTTP has no use for
            base_url=base,
            headers={"Accept-Encoding": "identity"},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # the server is local: no proxy stands before it
        )

    def health(self) -> dict[str, Any]:
        return self._json("GET", "/health-check", timeout=30.0)[1]

    def settle(self, seconds: float = 30) -> None:
        """Wait until nothing runs: Cog frees its slot a moment after it has answered."""
        deadline = time.monotonic() + seconds
        while self.health()["status"] == "BUSY" and time.monotonic() < deadline:
            time.sleep(0.005)

    def schema(self) -> dict[str, Any]:
        return self._json("GET", "/openapi.json", timeout=30.0)[1]

    def predict(self, inputs: dict[str, Any], prediction_id: str | None = None) -> dict[str, Any]:
        """The finished prediction, whatever its status."""
        with self._post(inputs, prediction_id, "application/json") as response:
            return json.loads(_read(response))

    def stream(self, inputs: dict[str, Any], prediction_id: str | None = None) -> Generator[Event, None, None]:
        """The events of a prediction as they happen; closing the iterator early cancels it."""
        with self._post(inputs, prediction_id, "text/event-stream") as response:
            yield from parse_events(_lines(response))

    def cancel(self, prediction_id: str) -> bool:
        """Whether there was a running prediction of that name to cancel."""
        return self._json("POST", f"/predictions/{quote(prediction_id)}/cancel", timeout=30.0)[0] == 200

    def _json(self, method: str, path: str, timeout: float) -> tuple[int, dict[str, Any]]:
        with self._request(method, path, None, {}, timeout) as response:
            return response.status_code, _decode(_read(response))

    @contextlib.contextmanager
    def _post(self, inputs: dict[str, Any], prediction_id: str | None, accept: str) -> Iterator[httpx.Response]:
        """An accepted prediction's response.

        409 is retried: Cog keeps no queue, and frees its slot a moment after the last response was sent.
        """
        body: dict[str, Any] = {"input": inputs}
        if prediction_id is not None:
            body["id"] = prediction_id
        payload = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": accept}
        deadline = time.monotonic() + self.patience
        delay = 0.005
        while True:
            with self._request("POST", "/predictions", payload, headers, None) as response:
                if response.status_code < 300:
                    yield response
                    return
                refusal = RequestRefused(response.status_code, _decode(_read(response)))
            if refusal.status != 409 or time.monotonic() > deadline:
                raise refusal
            time.sleep(delay)
            delay = min(0.25, delay * 2)

    @contextlib.contextmanager
    def _request(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout: float | None
    ) -> Iterator[httpx.Response]:
        request = self._http.build_request(method, path, content=body, headers=headers, timeout=timeout)
        try:
            response = self._http.send(request, stream=True)
        except httpx.TransportError as error:
            raise ServerGone(f"the server does not answer ({type(error).__name__})") from error
        with contextlib.closing(response):
            yield response


def parse_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """Server-sent events out of the lines of a response; comments, which keep the line open, are skipped."""
    name, data = "message", []
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            if data:
                yield Event(name, json.loads("\n".join(data)))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """The lines of a response as they arrive, split at b"\\n" alone: the separators of Unicode may stand in JSON."""
    rest = b""
    for piece in _pieces(response):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _read(response: httpx.Response) -> bytes:
    return b"".join(_pieces(response))


def _pieces(response: httpx.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_raw()
    except httpx.TransportError as error:
        raise ServerGone("the server stopped in the middle of the answer") from error


def _decode(body: bytes) -> Any:
    text = body.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except ValueError:
        return {"error": text.strip()}


def _explain(body: Any) -> str:
    """A refusal as one line: Cog names the inputs in `detail` and everything else in `error`."""
    if not isinstance(body, dict):
        return str(body)
    detail = body.get("detail")
    if isinstance(detail, list):
        return "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in detail)
    return str(body.get("error") or detail or body)
