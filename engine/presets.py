"""Speed presets: they write a table's two columns, the guidance and the graph of each row.

with_guidance    on only between two noise levels
with_cache       full rows that keep their deep features, shallow rows that reuse them
cost             what the rows cost, in calls of the full UNet with both halves
PRESETS          the named ones

Guidance is written first: `with_cache` runs a row deep wherever guidance sets in. The columns are
checked whenever they are written: a shallow row never runs more halves, or another precision, than
the deep row whose features it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np

from . import columns
from .errors import RequestError
from .spec import Component, Precision
from .table import Table

CUT = 0  # the outermost skip: the cheapest shallow rows, and on the embedded model the best ones
HALF = 0.5  # a row without guidance runs one of two halves


def with_guidance(table: Table, scale: float, interval: tuple[float, float] | None = None) -> Table:
    """Guidance of this scale in the rows whose sigma / alpha lies in the interval, 1 elsewhere.

    interval    see columns.guided_between; None: everywhere
    raises      RequestError: an empty interval; a shallow row that would run a half that the
                features it takes lack
    """
    guided = table.guided(scale)
    return checked(guided if interval is None else columns.guided_between(table, scale, *interval))


def with_cache(table: Table, rows: int | Sequence[int], cut: int = CUT) -> Table:
    """Deep rows that keep features, and between them rows of the graph `shallow<cut>`.

    rows        an interval: 2 means every second row runs deep; or the rows that run deep, the
                first one 0, see `quadratic_rows`. A row where guidance sets in runs deep too
    cut         the skip, 0 the outermost: the lower, the cheaper and the coarser
    returns     the table as it was for an interval of 1, or when every row would run deep
    raises      RequestError: an interval below 1; rows that are not 0, ascending, within the table
    source      Ma et al. 2023, DeepCache, arXiv:2312.00858, section 3.3
    """
    asked = range(0, len(table), _interval(rows)) if isinstance(rows, int) else rows
    deep = set(asked)
    if not deep or list(asked) != sorted(deep) or min(deep) != 0 or max(deep) >= len(table):
        raise RequestError(
            f"the rows that run deep are {', '.join(map(str, asked)) or 'none'}",
            hint=f"name rows of 0 to {len(table) - 1}, ascending, the first one 0",
        )
    if cut < 0:
        raise RequestError(f"the cut is {cut}", hint="give the number of a skip: 0 or more")
    guided = table.guidance != 1.0
    graphs: list[str] = []
    halves = False  # whether the last deep row ran both
    for row in range(len(table)):
        if row in deep or (guided[row] and not halves):
            halves = bool(guided[row])
            graphs.append("deep")
        else:
            graphs.append(f"shallow{cut}")
    if all(name == "deep" for name in graphs):
        return table
    return checked(replace(table, graphs=tuple(graphs)))


def quadratic_rows(rows: int, deep: int, centre: float, power: float = 1.4) -> list[int]:
    """Rows that run deep, densest around the centre: floor(l^p + c), l even from (-c)^(1/p) on.

    rows        of the table
    deep        how many of them run deep
    centre      a row
    power       1 is uniform; where rows of this power would coincide, the largest that keeps them
                apart, in steps of 0.02
    raises      RequestError
    source      Ma et al. 2023, DeepCache, arXiv:2312.00858, appendix B
    """
    if not 1 <= deep <= rows or not 0 <= centre < rows or power < 1:
        raise RequestError(
            f"{deep} of {rows} rows around row {centre:g} with power {power:g}",
            hint="give at most as many deep rows as the table has, a centre within it, and a power "
            "of 1 or more",
        )
    tried = power
    while True:
        low, high = -(centre ** (1 / tried)), (rows - centre) ** (1 / tried)
        even = np.linspace(low, high, deep, endpoint=False)
        found = np.floor(np.sign(even) * np.abs(even) ** tried + centre + 1e-9).astype(int)
        if len(set(found)) == deep or tried == 1.0:
            return [int(row) for row in found]
        tried = max(1.0, tried - 0.02)


def sources(table: Table) -> list[int | None]:
    """For each row the deep row whose features it takes; None where it takes none.

    raises      RequestError: a shallow row before the first deep one
    """
    found: list[int | None] = []
    last = None
    for row, graph in enumerate(table.graphs):
        last = row if graph.startswith("deep") else last
        shallow = graph.startswith("shallow")
        if shallow and last is None:
            _refuse(row, graph, "no deep row comes before it", "let the first row run `deep`")
        found.append(last if shallow else None)
    return found


def checked(table: Table) -> Table:
    """The table, its columns being fit to run. Raises RequestError."""
    for row, source in enumerate(sources(table)):
        if source is None:
            continue
        graph, kept = table.graphs[row], table.graphs[source]
        if graph.partition("@")[2] != kept.partition("@")[2]:
            _refuse(
                row,
                graph,
                f"the features it takes are of row {source}, which runs {kept}",
                "deep and shallow rows run in one precision",
            )
        if table.guidance[row] != 1.0 and table.guidance[source] == 1.0:
            _refuse(
                row,
                graph,
                f"it is guided, and row {source}, whose features it takes, is not",
                "write the guidance before the cache: `with_cache` runs such a row deep",
            )
    return table


def check_start(table: Table, first: int) -> None:
    """Whether a run that is resumed with row `first`, without kept features, has all it needs.

    raises      RequestError, whose hint names the rows to resume from
    """
    for row, source in enumerate(sources(table)):
        if source is None or row < first or source >= first:
            continue
        later = [r for r in range(first, len(table)) if table.graphs[r].startswith("deep")]
        ahead = f", or behind it at row {later[0]}" if later else ""
        raise RequestError(
            f"row {row} takes the features of row {source}: a run cannot be resumed at row {first}",
            hint=f"resume at row {source}{ahead}; or run without a feature cache",
        )


def costs_of(unet: Component) -> dict[str, float]:
    """What each graph costs, the full one being 1, by the multiply-adds that the bundle states; 1
    where it states none."""
    counted = {name: graph.macs for name, graph in unet.graphs.items()}
    full = counted["full"]
    return {
        name: 1.0 if macs is None or full is None else macs / full
        for name, macs in counted.items()
        if name != "prologue"
    }


def cost(table: Table, costs: Mapping[str, float]) -> float:
    """The cost of all rows in calls of the full UNet with both halves; one half alone is 0.5."""
    halves = np.where(table.guidance == 1.0, HALF, 1.0)
    return float(sum(costs[g] * h for g, h in zip(table.graphs, halves, strict=True)))


@dataclass(frozen=True)
class Preset:
    """A trade of quality for speed, by name.

    precision   of the arithmetic; where the backend or the bundle lacks it, the next better one
    or_int8     int8 instead, where the bundle has it and the backend can: the preset's own loss is
                large enough that of rounding hardly adds to it
    steps, sampler, schedule, guidance    as in a Request; None leaves it open
    cache       interval of the feature cache, or the rows that run deep; 1: no cache
    cut         see `with_cache`
    interval    see `with_guidance`
    rescale     phi of engine.guidance
    """

    precision: Precision
    steps: int
    sampler: str
    schedule: str | None = None
    cache: int | tuple[int, ...] = 1
    cut: int = CUT
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    guidance: float | None = None
    or_int8: bool = False

    def fields(self) -> dict[str, Any]:
        """As fields of a Request; None where the preset leaves one open."""
        return {
            "steps": self.steps,
            "sampler": self.sampler,
            "schedule": self.schedule,
            "cache": self.cache,
            "cut": self.cut,
            "guidance_interval": self.interval,
            "rescale": self.rescale,
            "guidance": self.guidance,
        }

    def columns(self, table: Table, scale: float) -> Table:
        """The table with guidance of this scale and this preset's two columns."""
        guided = with_guidance(table, scale, None if scale == 1.0 else self.interval)
        return with_cache(guided, self.cache, self.cut)


PRESETS: Mapping[str, Preset] = {
    "reference": Preset("f32", 25, "dpmpp_2m"),
    "exact": Preset("bf16", 25, "dpmpp_2m"),
    "high": Preset("int8", 25, "dpmpp_2m"),
    # these two lie on the front that bench/presets_search.py found: bench/results/presets.jsonl
    "balanced": Preset("bf16", 16, "dpmpp_2m", "beta", cache=3, or_int8=True),
    "fast": Preset("bf16", 16, "dpmpp_2m", "karras", cache=4, or_int8=True),
    # SD-Turbo as its authors run it: reference-spec 3.12
    "turbo": Preset("bf16", 1, "euler", "trailing", guidance=1.0),
}


def _interval(rows: int) -> int:
    if rows < 1:
        raise RequestError(
            f"the cache interval is {rows}",
            hint="give 1 (no cache) or more: 2 runs every second row deep",
        )
    return rows


def _refuse(row: int, graph: str, why: str, hint: str) -> NoReturn:
    raise RequestError(f"row {row} runs {graph}, but {why}", hint=hint)
