"""One self-contained HTML page of a results file: table, conditions and plots, without scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from . import report
from .results import Results, Row

WIDTH, LABEL, RIGHT, LINE = 860, 250, 70, 26  # pixels of a plot, of its names, its figures, a bar
STAGES = ("text_s", "denoise_s", "decode_s", "own_s")
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")  # told apart by people who see no red
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #8884 }
svg { max-width: 100%; height: auto; display: block }
svg text { fill: currentColor; font-size: 12px } figure { margin: 1.5rem 0 }
:root { color-scheme: light dark }
"""


def page(results: Results, title: str = "sdengine bench") -> str:
    """The whole document."""
    ran = [row for row in results.rows if row["ok"]]
    table = [_table(results)] if results.rows else []
    body = [f"<h1>{escape(title)}</h1>", *table, *_paragraphs(results)]
    body += [f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in plots(ran)]
    if results.ratios:
        cells = [report.ratio_cells(pair) for pair in results.ratios]
        body.append(_html_table([report.RATIO_COLUMNS, *cells]))
        body.append(_ratios([pair for pair in results.ratios if pair["ok"]]))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    inside = f"<head>{head}</head><body>{''.join(body)}</body>"
    return f'<!doctype html>\n<html lang="en">{inside}</html>\n'


def plots(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """(caption, svg) of each plot for which the rows have figures."""
    if not rows:
        return
    yield "Seconds of a picture: median, and p10 to p90", _bars(rows, "total_s")
    yield "Seconds of a step: median, and p10 to p90", _bars(rows, "step_s")
    yield f"Where a picture's time goes: {', '.join(STAGES)}", _stacked(rows)
    judged = [row for row in rows if _decibels(row) is not None]
    if judged:
        yield "Time against quality: seconds of a picture, median PSNR in dB", _scatter(judged)


def _table(results: Results) -> str:
    rows = [list(report.COLUMNS), *[report.cells(row) for row in results.rows]]
    return _html_table(rows)


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for index, row in enumerate(rows):
        tag = "th" if index == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _paragraphs(results: Results) -> Iterator[str]:
    for line in report.markdown(results).splitlines():
        if line and not line.startswith("|"):
            yield f"<p>{escape(line)}</p>"


def _bars(rows: Sequence[Row], metric: str) -> str:
    scale = _scale([row["steady"][metric]["p90"] for row in rows])
    parts = []
    for index, row in enumerate(rows):
        figures, y = row["steady"][metric], index * LINE
        low, middle, high = (scale(figures[name]) for name in ("p10", "median", "p90"))
        parts += [
            _name(row["name"], y),
            _rect(LABEL, y, middle - LABEL, COLOURS[0]),
            f'<path d="M{low:.1f} {y + LINE / 2}H{high:.1f}" stroke="currentColor"/>',
            _text(high + 6, y, report.seconds(figures["median"])),
        ]
    return _svg(parts, len(rows) * LINE)


def _stacked(rows: Sequence[Row]) -> str:
    def middle(row: Row, stage: str) -> float:
        return float(row["steady"][stage]["median"])

    sums = [sum(middle(row, stage) for stage in STAGES) for row in rows]
    scale = _scale(sums)
    parts = []
    for index, row in enumerate(rows):
        done = 0.0
        parts.append(_name(row["name"], index * LINE))
        for stage, colour in zip(STAGES, COLOURS, strict=True):
            left, done = scale(done), done + middle(row, stage)
            parts.append(_rect(left, index * LINE, scale(done) - left, colour, stage))
        parts.append(_text(scale(done) + 6, index * LINE, report.seconds(done)))
    for index, (stage, colour) in enumerate(zip(STAGES, COLOURS, strict=True)):
        x, y = LABEL + index * 110, len(rows) * LINE
        parts += [_rect(x, y, 12, colour), _text(x + 18, y, stage.removesuffix("_s"))]
    return _svg(parts, (len(rows) + 1) * LINE)


def _scatter(rows: Sequence[Row]) -> str:
    """Time to the right, decibels up."""
    height = 280
    x = _scale([row["steady"]["total_s"]["median"] for row in rows])
    decibels = [_decibels(row) or 0.0 for row in rows]
    low, high = min(0.0, *decibels), max(1.0, *decibels)
    parts = [
        f'<path d="M{LABEL} 10V{height}H{WIDTH - RIGHT}" stroke="currentColor" fill="none"/>',
        f'<text x="{LABEL - 8}" y="20" text-anchor="end">{high:.0f} dB</text>',
        f'<text x="{LABEL - 8}" y="{height}" text-anchor="end">{low:.0f} dB</text>',
    ]
    for row, value in zip(rows, decibels, strict=True):
        time = row["steady"]["total_s"]["median"]
        left, top = x(time), 10 + (height - 10) * (high - value) / (high - low)
        label = escape(f"{row['name']}: {report.seconds(time)}, {value:.1f} dB")
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="{COLOURS[1]}"/>')
        anchor = "end" if left > WIDTH / 2 else "start"
        shift = -9 if anchor == "end" else 9
        parts.append(
            f'<text x="{left + shift:.1f}" y="{top + 4:.1f}" text-anchor="{anchor}">{label}</text>'
        )
    return _svg(parts, height + 10)


def _ratios(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Peer / ours with its interval; the line at 1 is where both take equally long."""
    scale = _scale([pair["ratio"]["high"] for pair in pairs] + [1.0])
    parts = [
        f'<path d="M{scale(1.0):.1f} 0V{len(pairs) * LINE}" stroke="currentColor" '
        'stroke-dasharray="3"/>'
    ]
    for index, pair in enumerate(pairs):
        y, ratio = index * LINE + LINE / 2, pair["ratio"]
        low, middle, high = (scale(ratio[name]) for name in ("low", "median", "high"))
        parts += [
            _name(f"{pair['peer']} / {pair['ours']}", index * LINE),
            f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="currentColor"/>',
            f'<circle cx="{middle:.1f}" cy="{y}" r="5" fill="{COLOURS[0]}"/>',
            _text(high + 8, index * LINE, f"{ratio['median']:.2f}"),
        ]
    svg = _svg(parts, len(pairs) * LINE)
    return f"<figure><figcaption>Times as long as ours</figcaption>{svg}</figure>"


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """Seconds to pixels, from 0; the largest value lies at the right edge."""
    largest = max(values)
    room = WIDTH - LABEL - RIGHT

    def place(value: float) -> float:
        return LABEL + room * value / largest

    return place


def _decibels(row: Row) -> float | None:
    found = row.get("quality")
    value: float | None = None if found is None else found["psnr_db"]["median"]
    return value


def _svg(parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" role="img">{"".join(parts)}</svg>'
    )


def _rect(x: float, y: float, width: float, colour: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    box = f'x="{x:.1f}" y="{y + 5:.1f}" width="{max(width, 0.5):.1f}" height="{LINE - 10}"'
    return f'<rect {box} fill="{colour}">{inner}</rect>'


def _name(text: str, y: float) -> str:
    return f'<text x="{LABEL - 8}" y="{y + 17:.1f}" text-anchor="end">{escape(text)}</text>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y + 17:.1f}">{escape(text)}</text>'
