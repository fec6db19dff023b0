"""The house keeps its rules: who may import whom, no circles, and a README that tells the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("data_prep", "eval", "pipeline", "slurm")
ALLOWED = {
    "data_prep": {"data_prep"},
    "slurm": {"slurm"},
    "eval": {"eval", "data_prep"},
    "pipeline": set(PACKAGES),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_it_may_know(package: str) -> None:
    for name, path in modules().items():
        if name.split(".")[0] == package:
            ours = {i.split(".")[0] for i in imported(path, top_level_only=False)} & set(PACKAGES)
            assert ours <= ALLOWED[package], name


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = {
        name: {i for i in imported(path, top_level_only=True) if i in known and i != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for child in graph[name]:
                visit(child, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_is_named_for_nothing() -> None:
    for name in modules():
        assert name.split(".")[-1] not in {"utils", "helpers", "misc", "common"}


def test_the_links_of_readme_and_docs_lead_somewhere() -> None:
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    pages += sorted((REPOSITORY / "docs").glob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_commands_of_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    named = set(re.findall(r"inherclip ([a-z]+)\b", text)) - {"takes", "makes"}
    assert {"run", "submit", "prepare", "inherit", "train", "evaluate", "doctor"} <= named
    for command in sorted(named):
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", command, "--help"],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"inherclip {command}: {done.stderr}"
        assert "usage: inherclip" in done.stdout


def test_the_configurations_of_the_readme_exist() -> None:
    for name in re.findall(r"configs/[\w./-]+\.yaml", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / name).is_file(), name


def test_make_help_lists_the_two_commands_that_do_everything() -> None:
    done = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "lint", "bench"):
        assert f"make {target}" in done.stdout


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "deb.debian" + ".org", "npmjs" + ".org")
    for name in listed:
        path = REPOSITORY / name
        if path.suffix in {".py", ".md", ".txt", ".toml", ".yaml", ".sh", ""} and path.is_file():
            text = path.read_text(errors="replace")
            for host in hosts:
                assert host not in text, f"{name} names {host}"
