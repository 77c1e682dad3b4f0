"""What the README shows works: its Python runs, its commands parse, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from workbench import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_its_python_runs() -> None:
    scope: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), scope)
    assert {"result", "pruned", "tuned", "int8"} <= scope.keys()


def test_its_commands_parse() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {"make", "workbench"} == {command[0] for command in commands}
    for command in commands:
        if command[0] == "workbench":
            assert cli._parser().parse_args(command[1:]).command in cli.COMMANDS.values()
        else:
            assert re.search(rf"^{command[1]}:.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
