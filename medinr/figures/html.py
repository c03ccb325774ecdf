"""Pieces of self-contained HTML pages: escaped text, tables, pictures inline, one style for all pages."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image  # matplotlib brings it: grey PNG, a quarter of the size of what matplotlib itself writes

from medinr.figures.planes import Array

FOLDER = Path(__file__).parent


def fill(template: str, **parts: str) -> str:
    """A page from one of the templates beside this file: every ``$name`` in it, and the style that all pages share."""
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    return Template((FOLDER / template).read_text(encoding="utf-8")).substitute(style=style, **parts)


def figure_png(figure: Figure, dpi: float = 100) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def grey_png(picture: Array) -> bytes:
    """Values [rows, columns] in [0, 1]."""
    out = io.BytesIO()
    Image.fromarray(np.round(255 * picture).astype(np.uint8)).save(out, format="png")
    return out.getvalue()


def inline(image: bytes, form: str = "png") -> str:
    """A PNG, or another form, as the address of an image."""
    return f"data:image/{form};base64,{base64.b64encode(image).decode('ascii')}"


def value_table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: names, and values in `plain` form."""
    return f"<table>{''.join(f'<tr><td>{text(k)}</td>{numbers(v)}</tr>' for k, v in rows)}</table>"


def head_table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table with a heading; all but the first ``words`` columns are numbers, set to the right."""
    top = "".join(f"<th{'' if i < words else ' class=number'}>{text(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row[:words])}{numbers(*row[words:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def warning_list(lines: Sequence[str]) -> str:
    if not lines:
        return '<p class="fine">No warnings.</p>'
    return f'<ul class="warnings">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>'


def numbers(*cells: str) -> str:
    return "".join(f'<td class="number">{text(c)}</td>' for c in cells)


def plain(value: Any) -> str:
    """A setting or a metric as it is printed."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, default=str)
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def text(value: str) -> str:
    """Escaped: names may come from anywhere."""
    return html.escape(value)
