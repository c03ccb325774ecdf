"""A quiet run: the progress bar, the project's own warnings in one line each, and nothing from the libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    print(f"medinr: warning: {' '.join(str(message).split())}", file=file or sys.stderr)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what Lightning, torch and W&B say of themselves (hardware, tips, deprecations); MEDINR_DEBUG=1 shows it.

    Warnings raised for the user (`medinr.errors.RegistrationWarning`, and any from the project's modules) stay, each
    once and in one line.
    """
    if os.environ.get("MEDINR_DEBUG"):
        yield
        return
    from medinr.errors import RegistrationWarning

    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"medinr\.|data_modules\.")
            warnings.filterwarnings("default", category=RegistrationWarning)
            warnings.showwarning = _one_line
            yield
    finally:
        logging.disable(before)


@contextmanager
def noted() -> Iterator[list[str]]:
    """What `RegistrationWarning`s are shown inside, in words, for those who read the results later."""
    from medinr.errors import RegistrationWarning

    said: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if issubclass(category, RegistrationWarning):
            said.append(str(message))
        show(message, category, *rest, **named)

    warnings.showwarning = note
    try:
        yield said
    finally:
        warnings.showwarning = show
