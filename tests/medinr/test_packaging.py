"""What is installed: the wheel's contents, the declared and the pinned dependencies, the floors, the console script."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
PACKAGES = ("medinr", "data_modules")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BASE: list[str] = PROJECT["dependencies"]
EXTRAS = tuple(PROJECT["optional-dependencies"])


def requirements(*groups: str) -> dict[str, Requirement]:
    """Declared requirements by canonical name: the base ("") and the named extras."""
    lines = [line for group in groups for line in (PROJECT["optional-dependencies"][group] if group else BASE)]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_wheel_holds_both_packages_whole_and_nothing_else(tmp_path: Path) -> None:
    builder = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling builds the wheel; it is in the dev extra"
    )
    for name in ("pyproject.toml", "LICENSE", "README.md", ".gitignore"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    for name in (*PACKAGES, "experiments", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "medinr" / "package_data.yaml").write_text("a: 1\n")
    expected = {str(path.relative_to(tmp_path)) for package in PACKAGES for path in (tmp_path / package).rglob("*.*")}

    [wheel] = builder.WheelBuilder(str(tmp_path)).build(directory=str(tmp_path / "dist"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [entry_points] = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]

    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "medinr = medinr.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_dependency_is_bounded_below_and_pinned_within_its_bound() -> None:
    pinned = pins()
    for name, requirement in requirements("", "dev", "itk").items():
        assert any(specifier.operator == ">=" for specifier in requirement.specifier), f"{name} has no lower bound"
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{name}: {pinned[name]} is outside {requirement.specifier}"


def test_pins_can_be_found_on_the_public_registry() -> None:
    assert not [name for name, version in pins().items() if version.local], "a local label (+cpu) is on no registry"


def test_torchvision_is_neither_required_nor_pinned() -> None:
    assert "torchvision" not in pins()
    assert "torchvision" not in requirements("", *EXTRAS)


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level module, whether a plain import of the file runs it) of every absolute import in a source file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If | ast.Try)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0], node not in lazy


def test_every_import_is_declared_and_extras_are_imported_lazily() -> None:
    distributions = packages_distributions()
    base, optional = set(requirements("")), set(requirements(*(extra for extra in EXTRAS if extra != "dev")))
    wrong = []
    for path in SOURCES:
        for module, eager in imports_of(path):
            if module in PACKAGES or module in sys.stdlib_module_names:
                continue
            names = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if not names & (base if eager else base | optional):
                wrong.append(f"{path.relative_to(ROOT)}: {module}")
    assert not wrong, "not among the dependencies that are there at that point: " + ", ".join(wrong)


def test_every_module_stands_on_a_floor() -> None:
    [contract] = [c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    floors = set(re.findall(r"[\w.]+", " ".join(contract["layers"])))
    modules = {
        f"medinr.{path.stem}"
        for path in (ROOT / "medinr").iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    } - {"medinr.__init__"}
    assert modules <= floors, f"no floor in pyproject.toml's import contract for {sorted(modules - floors)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_importing_medinr_is_cheap() -> None:
    code = "import sys, medinr; print(*sorted({'torch', 'lightning', 'monai'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert result.stdout.split() == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_the_targets() -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    listed = set(re.findall(r"^  make (\w+) ", result.stdout, flags=re.M))
    assert {"help", "install", "demo", "test", "lint", "type", "bench", "wheel"} <= listed


@pytest.mark.skipif(not (ROOT / "medinr" / "cli.py").exists(), reason="the command line is not written yet")
def test_console_script_exists_and_prints_help() -> None:
    module, _, function = PROJECT["scripts"]["medinr"].partition(":")
    code = f"import sys; from {module} import {function}; sys.argv = ['medinr', '--help']; sys.exit({function}())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert "register" in result.stdout
