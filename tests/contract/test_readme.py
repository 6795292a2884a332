"""What the README tells people to type is accepted as it stands."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from speechalign.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    lines = [line.strip().partition("#")[0].strip() for line in README.splitlines()]
    inline = [part for part in README.split("`") if part.startswith("speechalign ")]
    written = [line for line in lines if line.startswith("speechalign ")] + inline
    return sorted({command for command in written if ".yaml" in command})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_resolves(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    dry = [] if arguments[0] == "clusters" else ["--dry-run"]  # it starts nothing as it is
    result = CliRunner().invoke(app, [*arguments, *dry])
    assert result.exit_code == 0, f"{command}: {result.exception or result.output}"


def test_the_readme_has_its_commands():
    verbs = {shlex.split(command)[1] for command in commands()}
    wanted = {"align", "corpus", "codec", "sft", "prepare", "compare", "submit", "clusters"}
    assert wanted <= verbs


def test_make_knows_what_the_readme_asks_it_for():
    makefile = (ROOT / "Makefile").read_text()
    targets = {line.split()[1] for line in README.splitlines() if line.startswith("    make ")}
    assert {"demo", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_files_that_the_readme_names_exist():
    named = [part for part in README.split("`") if part.endswith((".py", ".parquet", ".md"))]
    own = [part for part in named if part.startswith(("speechalign/", "docs/", "jobs/"))]
    assert own
    assert [name for name in own if not (ROOT / name).exists()] == []
