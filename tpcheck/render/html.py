"""A report as one self-contained HTML page: no script, no font, no picture from elsewhere.

Requirement: the page opens from a disk or a CI artefact years later and shows the same; whatever
came from a subject is text and never markup.
"""

from __future__ import annotations

from html import escape

from tpcheck.records import Report
from tpcheck.render.content import (
    COLUMNS,
    count_line,
    findings,
    footnotes,
    headline,
    rows,
    sensitivity_line,
    subject_line,
)
from tpcheck.render.text import printable, render_finding

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; border-left: .5rem solid; padding-left: .7rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #8884 }
pre { background: #8881; padding: .8rem; overflow-x: auto }
dt { font-weight: 600 }
.PASS { color: #17803d } .WRONG, .ERROR { color: #b91c1c } .DRIFT, .ILLEGAL { color: #b45309 }
.INCONCLUSIVE { color: #6b7280 }
"""


def render_html(report: Report) -> str:
    """Return the whole page: every verdict's row, and every failing verdict in full."""
    failing = "\n".join(f"<pre>{_text(render_finding(item))}</pre>" for item in findings(report))
    notes = "\n".join(
        f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>" for name, text in _notes(report)
    )
    line = sensitivity_line(report)
    caught = f"<br>{_text(line)}" if line else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{_text(f"{report.outcome} {report.subject}")}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1 class="{report.outcome}">{_text(headline(report))}</h1>
<p><code>{_text(subject_line(report))}</code><br>{_text(count_line(report))}{caught}</p>
{_table(report)}
{failing}
<dl>
{notes}
</dl>
</body>
</html>
"""


def _table(report: Report) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in COLUMNS)
    outcome = COLUMNS.index("outcome")
    body = "\n".join(
        f'<tr class="{row[outcome]}">{"".join(f"<td>{_text(cell)}</td>" for cell in row)}</tr>'
        for row in rows(report)
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _notes(report: Report) -> list[tuple[str, str]]:
    environment = [(str(name), str(value)) for name, value in report.environment.items()]
    return footnotes(report) + environment


def _text(value: str) -> str:
    return escape(printable(value))
