"""``python tests/minimum_versions.py [EXTRA ...]``: the lower bounds of pyproject.toml as constraints for pip.

    python tests/minimum_versions.py itk > minimum.txt
    pip install -e ".[itk]" pytest -c minimum.txt

Of the base and the extras that are named. Needs ``packaging``, which pytest brings.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def minimum(*extras: str) -> list[str]:
    """One line a requirement: its name and the release that its lower bound names.

    Raises:
        KeyError: no such extra.
        ValueError: a requirement without a lower bound.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return [pinned(Requirement(line)) for line in lines]


def pinned(requirement: Requirement) -> str:
    """``torch>=2.6`` as ``torch==2.6``."""
    bounds = [s.version for s in requirement.specifier if s.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement}: expected one lower bound (>=), found {len(bounds)}")
    return f"{requirement.name}=={bounds[0]}"


if __name__ == "__main__":
    print("\n".join(minimum(*sys.argv[1:])))
