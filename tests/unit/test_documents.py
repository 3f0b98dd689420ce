"""What the documents say is so: links, limits, codes, settings and commands that they name exist in the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import predict
from cog_local import schema
from kimi_vl import parameters
from kimi_vl.cli import main as command
from kimi_vl.media import image_files, images
from kimi_vl.text import stop_sequences
from tests.unit.test_cog_yaml import extra

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
TEMPLATES = ROOT / ".github"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(TEMPLATES.rglob("*.md"))]
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Without fenced blocks and code in lines, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def broken(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead nowhere."""
    wrong = []
    for link in (first or second for first, second in LINK.findall(prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        text_there = text if target == page else read(target) if target.suffix == ".md" and target.is_file() else ""
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in anchors(text_there)):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken(page, read(page)) == []


def test_a_link_that_leads_nowhere_is_noticed() -> None:
    text = (
        "## Two words, `x_y`!\n\n## Again\n\n## Again\n\n[a](#two-words-x_y) [b](#again-1) [c](docs/http.md#webhooks)\n"
    )
    assert broken(README, text) == []
    for link in (
        "[a](docs/nothing.md)",
        "[a](docs/http.md#nothing)",
        "[a](#again-2)",
        "[a](../x)",
        '<img src="no.png">',
    ):
        assert len(broken(README, text + link)) == 1, link
    assert broken(README, text + "`[a](nothing.md)`\n\n```\n[a](nothing.md)\n```\n") == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = read(README)
    assert len(text.splitlines()) <= 170
    linked = {(README.parent / link.partition("#")[0]).resolve() for link, _ in LINK.findall(prose(text))}
    assert {*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", ROOT / "BENCHMARKS.md"} <= linked


def table(page: str, header: str) -> list[str]:
    """The lines of the table whose header begins so."""
    return read(DOCS / page).partition(f"\n{header}")[2].partition("\n\n")[0].splitlines()[2:]


def named(page: str, header: str) -> list[str]:
    """The names in the first cells of a table."""
    return [name for line in table(page, header) for name in re.findall(r"`(\w+)`", line.split("|")[1])]


def test_the_table_of_inputs_is_that_of_the_schema() -> None:
    fields = schema.generate(read(ROOT / "predict.py"))["components"]["schemas"]["Input"]
    current = [name for name, field in fields["properties"].items() if not field.get("deprecated")]
    assert named("inputs.md", "| input |") == current


def test_the_table_of_errors_has_every_code() -> None:
    sources = [ROOT / "predict.py", *(ROOT / "kimi_vl").rglob("*.py")]
    codes = set(re.findall(r'"(E_[A-Z_]+)[":]', "".join(map(read, sources))))
    assert {*named("errors.md", "| code |"), "E_CODE"} == codes


def test_the_limits_are_those_that_hold() -> None:
    limits = "\n".join(table("inputs.md", "| limit |"))
    for limit in (
        f"| images in a request | {images.MAX_IMAGES} |",
        f"{image_files.MAX_BYTES // 2**20} MiB; {images.MAX_PIXELS // 10**6} million pixels; {images.MAX_SIDE:,}",
        f"{stop_sequences.MAX_SEQUENCES}, of {stop_sequences.MAX_CHARACTERS:,} characters each",
        f"below 2^{parameters.MAX_SEED.bit_length()}",
        f"{predict.DEFAULT_DEADLINE_S:,.0f} (`KIMI_VL_DEADLINE_S`)",
    ):
        assert limit in limits


def test_the_output_formats_are_those_of_the_schema() -> None:
    fields = schema.generate(read(ROOT / "predict.py"))["components"]["schemas"]
    assert named("output.md", "| `output_format` |") == fields["output_format"]["enum"]


def test_the_table_of_settings_has_every_variable_of_the_service() -> None:
    sources = [ROOT / "predict.py", *(ROOT / "kimi_vl").rglob("*.py")]
    # KIMI_VL_PROGRAM is between the command and the programs that it starts
    variables = set(re.findall(r"\bKIMI_VL_[A-Z_]*[A-Z]\b", "".join(map(read, sources)))) - {"KIMI_VL_PROGRAM"}
    assert {name for name in named("operations.md", "| variable |") if name.startswith("KIMI_VL_")} == variables


def test_every_command_of_the_package_is_in_its_table() -> None:
    cells = [line.split("|")[1].strip(" `") for line in table("cli.md", "| command |")]
    assert cells == [f"kimi-vl {name}" for name in command.COMMANDS]


def commands(text: str) -> list[list[str]]:
    """The lines of fenced shell examples that call `kimi-vl`, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.rpartition("|")[2].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("kimi-vl ")]


def test_commands_that_are_shown_have_options_that_exist() -> None:
    shown = [words for page in PAGES for words in commands(read(page))]
    assert len(shown) > 5
    for words in shown:
        if words[0] not in command.PROGRAMS:
            command._parser().parse_args(words)  # exits where it does not understand


def test_files_that_are_named_exist() -> None:
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # which speaks of the past, too
            continue
        for name in re.findall(r"(?<![\w/.])(?:scripts|tests|kimi_vl|docs|images)/[\w./]*\w", read(page)):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_figures_of_the_readme_are_measured() -> None:
    speed = read(README).partition("\n## Speed\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in speed.splitlines() if line.startswith("|")][2:]
    benchmarks = read(ROOT / "BENCHMARKS.md")
    measured = set(re.findall(r"(?<![\d.])\d+(?:\.\d+)?(?![\d.]*\d)", benchmarks))
    for what, _, figure in rows:
        numbers = re.findall(r"\d+(?:\.\d+)?", figure)
        assert set(numbers) <= measured and (numbers or figure.strip() == "not measured"), what


@pytest.mark.slow
def test_the_picture_of_the_terminal_is_of_this_command() -> None:
    from terminal_picture import SHOWN, output, screen, svg

    assert svg([[("$ " + SHOWN, False)], *screen(output())]) == read(DOCS / "images" / "ask.svg")


def test_a_terminal_is_drawn_as_it_looks() -> None:
    from terminal_picture import screen, svg

    lines = screen("\r\x1b[K\x1b[2mgone…\x1b[0m\r\x1b[Kstays\r\n\r\x1b[K\x1b[2ma<b\x1b[0m\r\n\r\nend\r\n")
    assert lines == [[("stays", False)], [("a<b", True)], [], [("end", False)]]
    assert "a&lt;b</tspan>" in svg(lines) and "gone" not in svg(lines)


def test_hooks_before_a_commit_have_the_versions_of_the_tests() -> None:
    wanted = {f"{name}=={version}" for name, version in extra("dev").items()}
    hooks = [hook for repo in yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {"ruff", "pyright"}
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "pyright"}
    for hook in hooks:
        assert hook["additional_dependencies"] and set(hook["additional_dependencies"]) <= wanted


def test_continuous_integration_runs_every_python_that_is_promised() -> None:
    job = yaml.safe_load(read(TEMPLATES / "workflows" / "ci.yml"))["jobs"]["test"]
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', read(ROOT / "pyproject.toml"))
    assert job["strategy"]["matrix"]["python"] == promised
    assert [step["run"] for step in job["steps"] if "run" in step] == ["scripts/test"]
