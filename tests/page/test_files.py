"""The files of the page as a browser gets them, and what no file of it may contain."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from kimi_vl.serving import page

FILES = {route.path: route for route in page.page_routes()}
SCRIPTS = sorted(page.FOLDER.glob("*.js"))


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page.page_routes()))


@pytest.mark.parametrize("path", FILES)
def test_every_file_confines_the_page_to_this_server(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    assert {policy[name] for name in ("object-src", "base-uri", "frame-ancestors", "form-action")} == {"'none'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert not set(policy) & {"script-src", "style-src", "connect-src"}  # they would be wider than the default
    assert response.headers["x-content-type-options"] == "nosniff"
    assert policy["media-src"] == "blob:"
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "json": "application/json"}
    kind = kinds.get(path.rpartition(".")[2], "text/html")
    assert response.headers["content-type"].partition(";")[0] == kind


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_known_is_not_sent_again(client: TestClient, path: str) -> None:
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"other"'}).content == first.content


def test_only_files_of_the_page_are_served(client: TestClient) -> None:
    assert "/page/page.js" in FILES and "/" in FILES
    for path in ("/page/__init__.py", "/page/index.html", "/page/../__init__.py", "/page/%2e%2e/__init__.py", "/page/"):
        assert client.get(path).status_code == 404, path


class Inline(HTMLParser):
    """Scripts and styles that a document holds itself, and addresses that lead out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        for name, value in attrs:
            if name == "style" or name.startswith("on") or re.match(r"(https?:)?//", value or ""):
                self.found.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style") and data.strip():
            self.found.append(data)


def test_the_document_holds_no_script_and_no_style() -> None:
    parser = Inline()
    parser.feed((page.FOLDER / "index.html").read_text())
    assert parser.found == []
    parser.feed('<p style="x"><a onclick="x"></a><script>x</script><link href="//a.b">')
    assert parser.found == ["p style", "a onclick", "x", "link href"]


FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|setHTML|\beval\b"
    r"|new Function|srcdoc|\bimport\(|https?://(?!www\.w3\.org/2000/svg)"
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_reads_text_as_markup_or_names_another_host(script) -> None:
    assert FORBIDDEN.findall(script.read_text()) == []
    assert len(script.read_text().splitlines()) <= 450


def test_every_module_is_fetched_at_once_and_not_one_after_the_other() -> None:
    document = (page.FOLDER / "index.html").read_text()
    preloaded = re.findall(r'<link rel="modulepreload" href="page/([\w.]+)">', document)
    assert sorted(preloaded) == [path.name for path in SCRIPTS if path.name not in ("page.js", "theme.js")]


def test_every_script_and_style_is_named_by_another_file() -> None:
    texts = {path.name: path.read_text() for path in page.FOLDER.iterdir() if path.suffix in page.TYPES}
    for name in texts.keys() - {"index.html"}:
        assert any(f"/{name}" in text for other, text in texts.items() if other != name), name
