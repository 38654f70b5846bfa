"""What the documents say is so: links, commands, configuration, public surface, caps."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer
from typer.testing import CliRunner

from talkoot.client import cli as client_cli
from talkoot.protocol import limits
from talkoot.server import cli as server_cli
from talkoot.sims import cli as sims_cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPERATOR = ROOT / "docs" / "operator.md"
SURFACE = ROOT / "docs" / "surface.md"
COMMANDS = {
    "talkoot": client_cli.app,
    "talkoot-coordinator": server_cli.app,
    "talkoot-sim": sims_cli.app,
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def section(page: Path, title: str) -> str:
    """The text below a heading, up to the next heading."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


# Links ----------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_link_within_the_repository_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def test_each_decision_is_numbered_once() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs" / "adr").glob("*.md"))]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "adr").glob("000[1-9]*.md")), ids=name_of)
def test_each_file_that_a_decision_names_is_there(page: Path) -> None:
    named = re.findall(
        r"`((?:protocol|client|server|sims|tests|tools|docs)/[\w./-]+\.\w+)`", page.read_text()
    )
    roots = [ROOT, *(ROOT / side / "talkoot" for side in ("protocol", "client", "server", "sims"))]
    missing = [path for path in named if not any((root / path).exists() for root in roots)]
    assert missing == []


# Commands ----------------------------------------------------------------------


def spoken(page: Path) -> Iterator[str]:
    """Lines that begin with one of our commands: in code blocks, and in code spans."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    for line in lines + spans:
        if line.partition(" ")[0] in COMMANDS and " " in line:
            yield line


def complaint(line: str) -> str | None:
    """What is wrong with a command line, without running it."""
    words = shlex.split(line, comments=True)
    command: click.Command = typer.main.get_command(COMMANDS[words[0]])
    rest = words[1:]
    while isinstance(command, click.Group):
        rest = [word for word in rest if word != "--help"]
        if not rest:
            return None
        if rest[0] not in command.commands:
            return f"{line}: no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    options = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
    unknown = [word for word in rest if word.startswith("-") and word not in options]
    return f"{line}: no option {unknown[0]}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_command_in_a_document_exists_with_its_options(page: Path) -> None:
    assert [problem for line in spoken(page) if (problem := complaint(line))] == []


def test_the_readme_shows_the_commands_of_all_three_people() -> None:
    said = {line.partition(" ")[0] for line in spoken(ROOT / "README.md")}
    assert said == set(COMMANDS)


def every_command() -> Iterator[tuple[list[str], click.Command, typer.Typer]]:
    """Each command with the words that lead to it, and the app that they are said to."""
    for app in COMMANDS.values():
        waiting: list[tuple[list[str], click.Command]] = [([], typer.main.get_command(app))]
        while waiting:
            words, command = waiting.pop()
            yield words, command, app
            if isinstance(command, click.Group):
                waiting += [([*words, name], one) for name, one in command.commands.items()]


def test_help_on_80_columns_says_what_each_argument_and_command_is() -> None:
    for words, command, app in every_command():
        shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).stdout
        plain = " ".join(shown.replace("│", " ").split())
        for line in (command.help or "").splitlines():
            assert " ".join(line.split()) in plain, (words, "brackets are markup in a help text")
        for paragraph in (command.help or "").split("\n\n")[1:]:
            assert max(map(len, paragraph.splitlines())) < 80, (words, "typer keeps these lines")
        for one in command.params:
            if isinstance(one, click.Argument):
                assert getattr(one, "help", None), (words, one.name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_each_make_target_in_a_document_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = set(re.findall(r"(?:^|`|&& )make ([a-z]+)", page.read_text("utf-8"), re.MULTILINE))
    assert said <= targets


# Sentences ----------------------------------------------------------------------


def sentences_in_the_code() -> str:
    """Every string of the software, one a line; what is filled in later is cut out."""
    lines = [(ROOT / "tools" / "bootstrap.sh").read_text(encoding="utf-8")]
    for side in ("protocol", "client", "server", "sims"):
        for file in (ROOT / side / "talkoot").rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            lines += [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return "\n".join(lines)


def test_the_sentences_that_the_documents_explain_are_said_by_the_software() -> None:
    said = sentences_in_the_code()
    explained: list[str] = []
    for page in PAGES:
        for table in re.findall(
            r"^\| it says \|.*?(?=^$|\Z)", page.read_text("utf-8"), re.M | re.S
        ):
            explained += re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    assert len(explained) > 20
    parts = {part.strip(" .,:;()") for row in explained for part in re.split(r"…| / |\(|\)", row)}
    strange = [part for part in sorted(parts) if len(part) > 3 and part not in said]
    assert strange == []


# Configuration ----------------------------------------------------------------------


def reference_tool() -> ModuleType:
    path = ROOT / "tools" / "config_reference.py"
    spec = importlib.util.spec_from_file_location("config_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_the_configuration_is_current() -> None:
    page = OPERATOR.read_text(encoding="utf-8")
    current = reference_tool().with_reference(page)
    assert page == current, "run: .venv/bin/python tools/config_reference.py --write"


def test_each_key_of_the_configuration_has_a_meaning() -> None:
    tool = reference_tool()
    silent = [
        f"{name}.{key}"
        for name, model in tool.sections()
        for key, *_, meaning in tool.rows(model)
        if not meaning
    ]
    assert silent == []


# What is public: the rest is in test_surface.py --------------------------------------------------


def test_the_page_about_the_surface_lists_every_cap_with_its_value() -> None:
    units = {"KIB", "MIB", "GIB", "PROTOCOL_VERSION"}
    caps = {k: v for k, v in vars(limits).items() if k.isupper() and k not in units}
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section(SURFACE, "Caps"), re.MULTILINE)
    assert {name: int(value) for name, value in rows} == caps
