"""Which packages are here, against the project's ranges and the versions it was tested with."""

from __future__ import annotations

import netrc
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent

_EXTRAS = {
    "tensorboard": "only needed for tracking with TensorBoard",
    "wandb": "only needed for tracking with Weights & Biases",
    "export": "only needed for `inherclip export --format onnx`",
    "near-duplicates": "only needed for near-duplicate search in `inherclip verify`",
    "dev": "only needed for `make test` and `make lint`",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `needed` tells whether its absence stops inherclip from running."""

    name: str
    status: Literal["OK", "warning", "missing"]
    detail: str
    remedy: str = ""
    needed: bool = False

    @property
    def fatal(self) -> bool:
        """Whether this alone makes the exit code 1."""
        return self.needed and self.status == "missing"


@dataclass(frozen=True)
class Wanted:
    """What the project asks of its surroundings."""

    python: str
    packages: list[Requirement]
    extras: dict[str, list[Requirement]]


def wanted(repository: Path = REPOSITORY) -> Wanted:
    """Read the version ranges from `pyproject.toml`, or else from the installed package."""
    import tomllib

    from packaging.requirements import Requirement

    file = repository / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        extras = {
            name: [Requirement(line) for line in lines]
            for name, lines in project.get("optional-dependencies", {}).items()
        }
        packages = [Requirement(line) for line in project["dependencies"]]
        return Wanted(project["requires-python"], packages, extras)
    about = metadata.metadata("inherclip")
    lines = [Requirement(line) for line in metadata.requires("inherclip") or []]
    extras = {
        name: [line for line in lines if line.marker and line.marker.evaluate({"extra": name})]
        for name in about.get_all("Provides-Extra") or []
    }
    packages = [
        line for line in lines if line.marker is None or line.marker.evaluate({"extra": ""})
    ]
    return Wanted(about["Requires-Python"] or "", packages, extras)


def read_constraints(repository: Path = REPOSITORY) -> dict[str, str] | None:
    """Return the tested version of each package, or None where there is no `constraints.txt`."""
    file = repository / "constraints.txt"
    if not file.is_file():
        return None
    lines = (line.split("#")[0].partition("==") for line in file.read_text().splitlines())
    return {
        _canonical(name): version.split(";")[0].strip() for name, _, version in lines if version
    }


def check_python(wanted_range: str) -> Finding:
    """Compare the interpreter with the range the project supports."""
    from packaging.specifiers import SpecifierSet

    version, remedy = platform.python_version(), f"make an environment with Python {wanted_range}"
    if SpecifierSet(wanted_range).contains(version, prereleases=True):
        return Finding("python", "OK", f"{version}, {sys.executable}")
    return Finding("python", "missing", f"{version} is not {wanted_range}", remedy, needed=True)


def check_packages(packages: list[Requirement], tested: dict[str, str] | None) -> Iterator[Finding]:
    """Compare installed versions with the ranges, then with the versions the tests passed with."""
    if tested is None:
        where = "not found: only a source checkout has it; versions compared with the ranges only"
        yield Finding(
            "constraints.txt", "warning", where, "run from a checkout, as `make setup` does"
        )
    for package in packages:
        yield _check_package(package, (tested or {}).get(_canonical(package.name)))


def _check_package(package: Requirement, tested: str | None) -> Finding:
    installed, exact = (
        version(package.name),
        f"{package.name}=={tested}" if tested else str(package),
    )
    remedy = f'pip install "{exact}"'
    if installed is None:
        return Finding(package.name, "missing", f"not installed; want {exact}", remedy, needed=True)
    if not package.specifier.contains(installed, prereleases=True):
        detail = f"{installed} is not {package.specifier}"
        return Finding(package.name, "missing", detail, remedy, needed=True)
    if tested and installed.split("+")[0] != tested.split("+")[0]:
        detail = f"{installed}; the tests passed with {tested}"
        return Finding(package.name, "warning", detail, remedy)
    return Finding(package.name, "OK", installed)


def check_torchvision_fits() -> Finding | None:
    """Compare torch with what torchvision was built for: a wrong pair cannot be imported at all."""
    from packaging.requirements import Requirement

    torch, torchvision = version("torch"), version("torchvision")
    if torch is None or torchvision is None:
        return None  # reported above
    pinned = [
        line
        for line in map(Requirement, metadata.requires("torchvision") or [])
        if line.name == "torch" and not line.specifier.contains(torch, prereleases=True)
    ]
    if not pinned and ("+cpu" in torch) == ("+cpu" in torchvision):
        return None
    why = f"torch {torch} and torchvision {torchvision} are not a pair"
    remedy = "install both in one command, from one index, as constraints.txt names them"
    return Finding("torch + torchvision", "missing", why, remedy, needed=True)


def check_extras(extras: dict[str, list[Requirement]]) -> Iterator[Finding]:
    """Look for the optional packages, one line per extra."""
    for name, packages in extras.items():
        absent = [package for package in packages if version(package.name) is None]
        if absent:
            names = ", ".join(package.name for package in absent)
            remedy = "pip install " + " ".join(
                f'"{package.name}{package.specifier}"' for package in absent
            )
            what = f"{names}: {_EXTRAS.get(name, 'optional')}"
            yield Finding(f"[{name}]", "missing", what, remedy)
        elif name == "wandb" and not _wandb_ready():
            detail = "installed, not logged in"
            yield Finding(
                "[wandb]", "warning", detail, "`wandb login`, or export WANDB_MODE=offline"
            )
        else:
            yield Finding(f"[{name}]", "OK", "installed")


def version(name: str) -> str | None:
    """Return an installed package's version, None where it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _canonical(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _wandb_ready() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in {"offline", "disabled"}:
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
