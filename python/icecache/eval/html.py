"""A report as one HTML page that needs nothing else: the text and tables of the markdown, and figures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from typing import Final

from icecache.eval.figures import Drawing

STYLE: Final = """
:root { color-scheme: light dark; --ink: #1d2830; --paper: #ffffff; --line: #d5dce2; --soft: #f3f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4eaef; --paper: #12181d; --line: #36424c; --soft: #1b242b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
code { background: var(--soft); padding: 0 .25em; border-radius: 3px; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead th:first-child { background: var(--soft); }
figure { margin: 1.5rem 0; } figcaption { font-size: .875rem; opacity: .85; }
svg { display: block; width: 100%; min-width: 20rem; max-width: 42rem; height: auto; margin: .5rem auto; }
summary { cursor: pointer; font-size: 1.3rem; font-weight: bold; margin-top: 2.2rem; }
"""
# Nothing may be loaded, whatever a prediction or a path in the text looks like.
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def to_page(sections: Iterable[str], drawings: Iterable[Drawing], *, folded: str) -> str:
    """Write a page.

    Parameters
    ----------
    sections : iterable of str
        Markdown as `report.sections` writes it; the first one holds the title.
    drawings : iterable of Drawing
        Figures; they stand before the first section about a single setup.
    folded : str
        Sections that begin with this heading are closed until they are opened.

    Returns
    -------
    str
        The document.
    """
    parts = list(sections)
    first = next((i for i, part in enumerate(parts) if part.startswith("## Setup")), len(parts))
    title = html.escape(parts[0].lstrip("# "))
    body: list[str] = []
    for i, part in enumerate(parts):
        if i == first:
            body.extend(map(_figure, drawings))
        if part.startswith(folded):
            heading, _, rest = part.partition("\n\n")
            inside = "\n".join(to_elements(rest))
            body.append(f"<details><summary>{_inline(heading.lstrip('# '))}</summary>\n{inside}\n</details>")
        else:
            body.extend(to_elements(part))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def to_elements(text: str) -> Iterator[str]:
    """Turn the markdown that reports are written in into elements: headings, tables, paragraphs."""
    for block in text.split("\n\n"):
        if heading := re.fullmatch(r"(#{1,4}) (.*)", block):
            level = len(heading[1])
            yield f"<h{level}>{_inline(heading[2])}</h{level}>"
        elif block.startswith("| "):
            yield _table(block)
        elif block.strip():
            yield f"<p>{_inline(block).replace(chr(10), '<br>')}</p>"


def _table(block: str) -> str:
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in lines[0])
    rows = ["".join(f"<td>{_inline(cell)}</td>" for cell in line) for line in lines[2:]]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _inline(text: str) -> str:
    """Escape text; code, bold and italics become elements."""
    pieces = []
    for i, piece in enumerate(text.split("`")):
        escaped = html.escape(piece)
        if i % 2:
            pieces.append(f"<code>{escaped}</code>")
        else:
            escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
            pieces.append(re.sub(r"\*(\S.*?)\*", r"<em>\1</em>", escaped))
    return "".join(pieces)


def _figure(drawing: Drawing) -> str:
    title, caption = html.escape(drawing.title), html.escape(drawing.caption)
    svg = drawing.svg.replace('role="img"', f'role="img" aria-label="{title}"', 1)
    return (
        f'<figure>\n<h2>{title}</h2>\n<div class="scroll" tabindex="0">\n{svg}\n</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )
