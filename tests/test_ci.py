"""What the continuous integration runs: targets and scripts that are there, every experiment, the bounds."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests import (
    minimum_versions,
    test_experiments,
    test_experiments_atlas,
    test_experiments_diffusion,
    test_experiments_learned,
    test_experiments_sequence,
)

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_experiment_is_run_by_one_of_the_tests() -> None:
    """Each family of experiments has a file of its own; none may fall between them."""
    run = [
        *test_experiments.EXPERIMENTS,
        *test_experiments_atlas.ATLASES,
        *test_experiments_diffusion.EXPERIMENTS,
        *test_experiments_learned.LEARNED,
        *test_experiments_sequence.SEQUENCES,
    ]
    assert sorted(run) == sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_what_is_there(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"check", "wheel", "minimum", "benchmarks"} <= set(jobs)
    for target in re.findall(r"\bmake ([\w-]+)", " ".join(lines)):
        assert re.search(rf"^{target}: .*##", MAKEFILE, re.MULTILINE), f"make {target}"
    for script in re.findall(r"(?:bash|sh|python) ((?:\.ci|tests)/\S+)", " ".join([*lines, MAKEFILE])):
        assert (ROOT / script).is_file(), script
    assert all("timeout-minutes" in job for job in jobs.values())


def test_minimum_versions_are_the_lower_bounds() -> None:
    command = [sys.executable, str(ROOT / "tests" / "minimum_versions.py"), "itk"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["itk"])]
    assert len(said) == len(declared)
    for line, requirement in zip(said, declared, strict=True):
        name, _, version = line.partition("==")
        assert name == requirement.name and version in requirement.specifier
        *series, last = [int(part) for part in version.split(".")]
        assert last == 0 or ".".join(map(str, [*series, last - 1])) not in requirement.specifier, "the lowest"
    with pytest.raises(ValueError, match="expected one lower bound"):
        minimum_versions.pinned(Requirement("torch<3"))


def test_the_check_of_the_wheel_is_a_script_that_the_shell_reads() -> None:
    subprocess.run(["sh", "-n", str(ROOT / "tests" / "wheel_check.sh")], check=True)
