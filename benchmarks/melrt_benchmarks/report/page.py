"""Pages of reports: the look, tables, and the frame of an HTML file that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# A table wider than the page scrolls inside its box. The four backgrounds draw a shadow at each side where columns are hidden (two
# covers move with the content, two shadows stay), and `.hint` says so in words on narrow screens. On a telephone a row of sentences is
# a paragraph instead, because its last column holds what matters.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 1.5rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem } p { margin: .4rem 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid #ddd; border-radius: 4px; background:
 linear-gradient(to right, #fff 50%, #fff0) 0 0 / 48px 100% no-repeat local,
 linear-gradient(to left, #fff 50%, #fff0) 100% 0 / 48px 100% no-repeat local,
 linear-gradient(to right, #0004, #0000) 0 0 / 16px 100% no-repeat scroll,
 linear-gradient(to left, #0004, #0000) 100% 0 / 16px 100% no-repeat scroll }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd } th { border-bottom: 2px solid #888 }
th:first-child, td:first-child, .text th, .text td { text-align: left } .wrong { color: #b00020; font-weight: bold }
.text td + td { white-space: normal; overflow-wrap: anywhere } .text td { vertical-align: top }
.sentences td:first-child { min-width: 8rem } .sentences td:last-child { min-width: 16rem; white-space: pre-line }
.scroll + .scroll { margin-top: .8rem } pre { font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: .6rem 0 } h3 { font-size: 1rem; margin: 1rem 0 .3rem }
.plots { display: flex; flex-wrap: wrap; gap: 0 2rem } .plots section { flex: 0 1 36rem } img { width: 100%; height: auto }
.quiet, .hint { color: #555 } .hint { display: none; font-size: 13px }
.note { background: #fff3cd; padding: .6rem 1rem; border-radius: 4px }
@media (max-width: 60rem) { .hint { display: block } .text td { white-space: normal }
 table:not(.text) :is(th, td):first-child { position: sticky; left: 0; background: #fff; background-clip: padding-box }
 table:not(.text) td:first-child { white-space: normal; min-width: 7rem } }
@media (max-width: 34rem) { .hint:has(+ .scroll .sentences), .sentences :is(th, td:empty) { display: none }
 .sentences tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid #ddd } .sentences td { border: 0; padding: .15rem .6rem }
 .sentences :is(td:first-child, td:last-child) { flex: 1 0 100%; box-sizing: border-box } .sentences td:first-child { font-weight: bold } }
"""
# Tables with more columns than this do not fit a telephone.
NARROW_COLUMNS = 3


class Raw(str):
    """HTML that is not escaped."""

    __slots__ = ()


def whole_page(title: str, sections: Iterable[str]) -> str:
    """Return a page of sections; empty ones are left out."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def section(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], text: str = "", css: str = "") -> str:
    """Return a table with a heading; nothing if it has no rows.

    Args:
        title: Heading; none if empty.
        heads: Names of the columns.
        rows: Cells, which are escaped unless they are `Raw`.
        text: Paragraph above the table.
        css: `text` for a table whose cells are sentences.
    """
    rows = list(rows)
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "\n".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    intro = f'<p class="quiet">{escape(text)}</p>' if text else ""
    hint = '<p class="hint">Scroll the table sideways to see all columns &rarr;</p>' if len(heads) > NARROW_COLUMNS else ""
    table = f'<table class="{css}"><tr>{head}</tr>\n{body}\n</table>'
    return f'{heading}{intro}{hint}<div class="scroll">{table}</div>'


def _cell(value: str) -> str:
    if value == "WRONG":
        return f'<td class="wrong">{value}</td>'
    return f"<td>{value if isinstance(value, Raw) else escape(value)}</td>"
