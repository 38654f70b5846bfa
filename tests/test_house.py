"""The house keeps its shape: namespaces, type markers, light imports, one license, sane scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("protocol", "client", "server", "sims")
COMMANDS = {
    "talkoot": "talkoot.client.cli",
    "talkoot-coordinator": "talkoot.server.cli",
    "talkoot-sim": "talkoot.sims.cli",
}
HEAVY = ("torch", "transformers", "flwr", "matplotlib", "datasets")


def modules() -> list[Path]:
    return [file for side in SIDES for file in sorted((ROOT / side / "talkoot").rglob("*.py"))]


@pytest.mark.parametrize("side", SIDES)
def test_the_import_root_is_a_namespace_that_the_four_sides_share(side: str) -> None:
    assert [entry.name for entry in (ROOT / side).iterdir() if entry.name != "__pycache__"] == [
        "talkoot"
    ]
    inside = {e.name for e in (ROOT / side / "talkoot").iterdir()} - {"__pycache__"}
    assert inside == {side}
    assert (ROOT / side / "talkoot" / side / "__init__.py").is_file()


@pytest.mark.parametrize("side", SIDES)
def test_type_checkers_are_told_that_the_package_is_typed(side: str) -> None:
    assert (ROOT / side / "talkoot" / side / "py.typed").is_file()


def test_each_folder_of_modules_is_a_package() -> None:
    folders = {file.parent for file in modules()}
    missing = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if folder.name != "versions"
        and not (folder / "__init__.py").is_file()
        # alembic runs env.py and the versions as scripts, not as modules
        and folder.name != "migrations"
    ]
    assert missing == []


def test_the_commands_are_the_three_that_the_design_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {name: f"{module}:main" for name, module in COMMANDS.items()}


@pytest.mark.parametrize("module", COMMANDS.values())
def test_a_command_imports_nothing_heavy_before_it_needs_it(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", COMMANDS.values())
def test_help_is_given_without_anything_heavy(module: str) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['command', '--help']\n"
        f"from {module} import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_nothing_is_ever_unpickled() -> None:
    forbidden = re.compile(
        r"^\s*(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b"
        r"|\btorch\.load\(|allow_pickle\s*=\s*True|weights_only\s*=\s*False",
        re.MULTILINE,
    )
    found = [str(f.relative_to(ROOT)) for f in modules() if forbidden.search(f.read_text())]
    assert found == []


def test_each_pinned_version_is_one_that_the_project_allows() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["report"], *extras["dev"]):
        wanted = Requirement(text)
        if wanted.name == "talkoot":
            continue
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_the_license_is_the_one_that_the_project_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"


@pytest.mark.parametrize("python", ["/nonexistent/python3", "/bin/true-of-no-kind"])
def test_bootstrap_says_in_one_sentence_that_a_python_will_not_do(
    tmp_path: Path, python: str
) -> None:
    done = subprocess.run(
        ["sh", str(ROOT / "tools" / "bootstrap.sh"), str(tmp_path / "venv")],
        env=os.environ | {"PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert python in done.stderr
    assert not (tmp_path / "venv").exists()


def test_bootstrap_says_in_one_sentence_that_there_is_no_python(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("sh", "dirname"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True)
        (bare / tool).symlink_to(found.stdout.strip())
    done = subprocess.run(
        [str(bare / "sh"), str(ROOT / "tools" / "bootstrap.sh"), str(tmp_path / "venv")],
        env={"PATH": str(bare)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "No Python of version 3.11 or newer was found" in done.stderr
    assert done.stderr.count("\n") == 1


def test_make_lists_every_target_that_it_has() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    done = subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(re.findall(r"make ([a-z]+)", done.stdout)) == targets
    assert targets >= {"demo", "test", "lint", "types", "contracts", "check", "proto", "clean"}
