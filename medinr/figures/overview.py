"""One self-contained HTML page about the runs of an experiment: no file beside it, no network."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from medinr.figures.html import figure_png, fill, head_table, inline, text, value_table, warning_list

WIDTH = 1600
"""Pictures are made at most so wide, and stored as JPEG: pages are sent by mail."""

Table = tuple[Sequence[str], Sequence[Sequence[str]], int]
"""Heading, rows, and how many columns at the left are words and not numbers."""


def overview_page(title: str, subtitle: str, warnings: Sequence[str], body: Sequence[str]) -> str:
    """The page as HTML 5, of sections that `section`, `gallery` and their like have made."""
    return fill(
        "overview.html",
        title=text(title),
        subtitle=text(subtitle),
        warnings=warning_list(warnings),
        body="\n".join(part for part in body if part),
    )


def section(name: str, *parts: str, note: str = "") -> str:
    """A heading and what stands under it; nothing where all parts are empty."""
    some = [part for part in parts if part]
    if not some:
        return ""
    under = f'<p class="note">{text(note)}</p>' if note else ""
    return "\n".join((f"<h2>{text(name)}</h2>", under, *some))


def table(content: Table) -> str:
    head, rows, words = content
    return head_table(head, rows, words) if rows else ""


def folded(summary: str, content: str) -> str:
    """What is shown when its summary is clicked."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def values(rows: Mapping[str, str]) -> str:
    """Names and values."""
    return value_table(list(rows.items())) if rows else ""


def drawing(figure: Figure, alt: str) -> str:
    return f'<img class="figure" alt="{text(alt)}" src="{inline(figure_png(figure, 90))}">'


def gallery(pictures: Mapping[str, Sequence[tuple[str, Path]]]) -> str:
    """Pictures of several runs: one run is chosen from a list, and its pictures are leafed through.

    Args:
        pictures: name of the run -> captions and files, in order; the last one is shown first.
    """
    images, options = [], []
    for i, (run, files) in enumerate(pictures.items()):
        shown = [(caption, source) for caption, path in files if (source := photograph(path))]
        if shown:
            options.append(f'<option value="{i}">{text(run)}</option>')
        images += [f'<img data-run="{i}" alt="{text(caption)}" src="{source}">' for caption, source in shown]
    if not images:
        return ""
    controls = (
        f'<label>run <select id="run">{"".join(options)}</select></label>',
        '<label>picture <input id="at" type="range" min="0" max="999" value="999"></label>',
        '<span id="caption"></span>',
    )
    return f'<div class="controls">{"".join(controls)}</div>\n<div id="gallery">{"".join(images)}</div>'


def photograph(path: Path) -> str:
    """A picture's file as the address of an image, smaller than it was; nothing where it cannot be read."""
    try:
        with Image.open(path) as image:
            found = image.convert("RGB")
    except OSError:
        return ""
    if found.width > WIDTH:
        found = found.resize((WIDTH, round(found.height * WIDTH / found.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    found.save(out, format="jpeg", quality=82)
    return inline(out.getvalue(), "jpeg")
