"""The package as a wheel, away from the checkout: what is in it, and that its command answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cog_local.client import Client
from cog_local.server import free_port

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "images" / "math_problem.png"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    wanted = ("kimi_vl", "scripts", "images", "predict.py", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in wanted:  # a copy: nothing is written into the checkout
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    return site


def environment(site: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KIMI_VL")}
    return {**kept, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(site / "cache"), "OMP_NUM_THREADS": "1"}


def kimi_vl(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(site / "bin" / "kimi-vl"), *arguments],
        env=environment(site), cwd=site, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"kimi_vl/{path.relative_to(ROOT / 'kimi_vl')}" for path in (ROOT / "kimi_vl").rglob("*.py")}
    assert ours <= names
    assert {"kimi_vl/py.typed", "kimi_vl/demo/model.safetensors", "kimi_vl/_project/predict.py"} <= names
    assert {"kimi_vl/serving/page/index.html", "kimi_vl/serving/page/page.js"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|^tests|model_cache|/\.c", name)]
    version = re.search(r'__version__ = "(.*)"', (ROOT / "kimi_vl" / "__init__.py").read_text())
    assert version and wheel.name.startswith(f"kimi_vl-{version[1]}-")


def test_its_command_answers_without_the_checkout(installed: Path) -> None:
    found = kimi_vl(installed, "ask", "What is the result?", str(PICTURE), "--temperature", "0")
    assert (found.returncode, found.stdout) == (0, "25 + 13 = 38\n"), found.stderr
    where = subprocess.run(
        [sys.executable, "-c", "import kimi_vl; print(kimi_vl.__file__)"],
        env=environment(installed), cwd=installed, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))


def test_check_names_the_users_cache(installed: Path) -> None:
    found = json.loads(kimi_vl(installed, "check", "--json").stdout)
    assert found["cache"] == str(installed / "cache" / "kimi-vl")


def test_its_server_answers_without_the_checkout(installed: Path) -> None:
    port = free_port()
    command = [str(installed / "bin" / "kimi-vl"), "serve", "--cog", "--port", str(port)]
    with subprocess.Popen(
        command, env=environment(installed), cwd=installed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if line.startswith("ready: "):
                    break
            assert process.poll() is None, "".join(said)
            answer = Client(f"http://127.0.0.1:{port}").predict(
                {"prompt": "What is 12 + 30?", "output_format": "answer"}
            )
            assert "".join(answer["output"]) == "12 + 30 = 42"
        finally:
            process.terminate()
            process.communicate(timeout=300)
    assert process.returncode in (0, 130, -15, 143)


def test_the_types_are_seen_by_who_installs_it(installed: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import kimi_vl\nreveal_type(kimi_vl.load().complete([]).answer)\n")
    settings = {"extraPaths": [str(installed)], "venvPath": str(ROOT), "venv": ".venv"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = subprocess.run(
        [sys.executable, "-m", "pyright", "--project", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert 'Type of "kimi_vl.load().complete([]).answer" is "str"' in found.stdout, found.stdout
