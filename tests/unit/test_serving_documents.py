"""docs/openai.md names every field, option and code of the server, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from kimi_vl.serving.options import FIELDS, WITHOUT_FLAG
from kimi_vl.serving.protocol import IGNORED, READ, UNSUPPORTED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "openai.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    table = PAGE.partition(f"\n{header}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_every_field_is_in_the_table():
    named = [name for field, _ in rows("| field |") for name in re.findall(r"`(\w+)`", field)]
    assert len(named) == len(set(named)) and set(named) == READ | IGNORED | UNSUPPORTED


def test_every_option_is_in_the_table_with_its_default():
    shown = {"()": "", "False": "off"}
    expected = []
    for name, each in FIELDS.items():
        if name in WITHOUT_FLAG:
            continue
        value = f"{each.default:g}" if isinstance(each.default, float) else str(each.default)
        value = f"`{value}`" if isinstance(each.default, str) else shown.get(value, value)
        expected.append([f"`--{name.replace('_', '-')}`", value, each.metadata["help"]])
    assert rows("| option |") == expected


def test_every_status_is_in_the_table():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kimi_vl" / "serving").glob("*.py"))
    statuses = set(re.findall(r"ApiError\(\s*(\d{3})", sources))
    codes = set(re.findall(r'(?:code=|", )"([a-z_]+)"(?=[,)])', sources.replace("\n", " ")))
    told = " ".join(code for _, code, _ in rows("| status | code |"))
    assert statuses <= set(re.findall(r"\d{3}", " ".join(row[0] for row in rows("| status | code |"))))
    for code in {"overloaded", "out_of_memory", "service_unavailable", "internal_error", "deadline_exceeded"} | {
        code for code in codes if code.endswith(("_json", "_http", "_key", "_found", "_large", "_type", "_timeout"))
    }:
        assert f"`{code}`" in told, code
