"""What a run has written into a folder: the list by which a later run knows which files are its own to remove."""

import json
from pathlib import Path
from typing import Any

from medinr.io.files import write_text

LISTING = "files.json"


def replace_listing(folder: Path, staged: Path) -> list[Path]:
    """Write the list of all files of a new run, and find those of an earlier run that the new one does not replace.

    Args:
        folder: where earlier results may be.
        staged: the folder, inside it or elsewhere, that holds the new files; the list goes there too.

    Returns:
        Files in ``folder`` that an earlier list names and the new one does not. Never a link, a folder, or anything
        outside.
    """
    new = sorted(f.relative_to(staged).as_posix() for f in staged.rglob("*") if f.is_file())
    stale = [file for name in listed(folder) if name not in new and (file := _own(folder, name)) is not None]
    write_text(staged / LISTING, json.dumps({"written_by": "medinr", "files": [*new, LISTING]}, indent=2) + "\n")
    return stale


def listed(folder: Path) -> list[str]:
    """Names in the list of an earlier run; none where there is no list or it is not ours."""
    try:
        content: Any = json.loads((folder / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(content, dict) or content.get("written_by") != "medinr":
        return []
    names = content.get("files")
    return [n for n in names if isinstance(n, str) and n != LISTING] if isinstance(names, list) else []


def _own(folder: Path, name: str) -> Path | None:
    """The file of a listed name, if it is a plain one inside the folder."""
    file = folder / name
    if file.is_symlink() or not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        return None
    return file
