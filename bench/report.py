"""Tables from a results file: Markdown and CSV. JSON is the truth; nothing is measured here."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..engine.describe import size
from ..engine.errors import RequestError
from .results import Results, Row

BEGIN, END = "<!-- bench: {} -->", "<!-- /bench -->"

COLUMNS = (
    "row",
    "picture",
    "step",
    "UNet, of the rate",
    "cold start",
    "warm start",
    "peak memory",
    "PSNR, SSIM (worst)",
)


def markdown(results: Results) -> str:
    """The table of a run, its conditions under it, and what failed."""
    rows = [*_table(results), ""] if results.rows else []
    return "\n".join([*rows, *_conditions(results), *_rest(results)]) + "\n"


def table(results: Results) -> str:
    """The table and one paragraph of conditions: what a README takes."""
    found = [*_table(results), ""] if results.rows or not results.ratios else []
    pairs = [*ratio_table(results.ratios), ""] if results.ratios else []
    notes = [f"Note: {note}." for note in results.notes] if pairs else []
    return "\n".join([*found, *pairs, *_conditions(results), *notes])


def _table(results: Results) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * len(COLUMNS)
    for row in results.rows:
        yield "| " + " | ".join(map(_cell, cells(row))) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def cells(row: Row) -> list[str]:
    """One row as text, in the order of COLUMNS; what failed says why in its second cell."""
    if not row["ok"]:
        return [row["name"], f"failed: {row['failure']['error']}", *[""] * (len(COLUMNS) - 2)]
    steady = row["steady"]
    return [
        row["name"],
        spread(steady["total_s"]),
        spread(steady["step_s"]),
        _share(row),
        seconds(row["cold_start"]["to_first_picture_s"]),
        seconds(row["warm_start"]["to_first_picture_s"]) if "warm_start" in row else "",
        size(row["memory"]["peak_bytes"]) if row["memory"]["peak_bytes"] is not None else "",
        quality(row),
    ]


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def spread(summary: Mapping[str, Any]) -> str:
    """`0.46 s (0.45 s to 0.49 s)`: median, p10, p90."""
    if not summary:
        return ""
    low, high = seconds(summary["p10"]), seconds(summary["p90"])
    return f"{seconds(summary['median'])} ({low} to {high})"


def _share(row: Row) -> str:
    found = [p for p in row["components"] if (p["component"], p["what"]) == ("unet", "run")]
    return f"{found[0]['share']:.0%}" if found and "share" in found[0] else ""


def quality(row: Row) -> str:
    found = row.get("quality")
    if found is None:
        return str(row.get("why", "not measured"))
    if found["reference"] == row["name"]:
        return "the reference"
    decibels, ssim = found["psnr_db"], found["ssim"]
    if decibels["worst"] is None:
        return "equal to the reference"
    # a median of None: more than half of the pictures are equal
    middle = "equal" if decibels["median"] is None else f"{decibels['median']:.1f} dB"
    return f"{middle}, {ssim['median']:.3f} ({decibels['worst']:.1f} dB, {ssim['worst']:.3f})"


def conditions_line(results: Results) -> str:
    """Everything that a figure needs beside it, in one line."""
    c = results.conditions
    cpu, memory, system = c["processor"], c["memory"], c["system"]
    quota = "" if cpu["quota"] is None else f", quota {cpu['quota']:g}"
    code = c["sdengine"]
    state = "" if code["commit"] is None else f" at {code['commit'][:10]}"
    state += " with changes" if code["dirty"] else ""
    engines = ("openvino", "onnxruntime", "torch")
    versions = ", ".join(f"{n} {c['packages'][n]}" for n in engines if n in c["packages"])
    governor = "" if cpu["governor"] is None else f", governor {cpu['governor']}"
    settings = "".join(f", {k}={v}" for k, v in c["settings"].items())
    return (
        f"{cpu['name'].partition(' avx')[0]}, {cpu['visible']} processors visible, "
        f"{cpu['threads']} threads{quota}{governor}; "
        f"{'' if memory['total'] is None else size(memory['total'])} memory; "
        f"{system['distribution'] or system['name']}, kernel {system['kernel']}; "
        f"load {c['load']} at the start; Python {c['python']}, {versions}{settings}; "
        f"sdengine {code['version']}{state}; {c['time'][:10]}"
    )


def _conditions(results: Results) -> Iterator[str]:
    model = results.model
    if model:
        height, width = model["native_size"]
        what = f"{model['name']} ({model['variant']}), {width}x{height}"
        yield f"Model: {what}, {size(model['bytes'])} on disk, sha256 {model['sha256'][:16]}."
    ran = [row for row in results.rows if row["ok"]]
    if ran:
        case = ran[0]["case"]
        samples = ran[0]["steady"]["total_s"]["n"]
        yield (
            f"Median (p10 to p90) of {samples} pictures after {case['warmups']} that did not "
            f"count, each row in its own process; quality over {len(case['prompts'])} prompts "
            "against the float32 picture of the same seed."
        )
    for rate in best_rates(results):
        yield (
            f"Matrix products here: {rate['flops'] / 1e9:.0f} GFLOP/s in {rate['ran_in']}, "
            f"{rate['threads']} threads ({rate['side']} cubed, {rate['engine']})."
        )
    yield f"Conditions: {conditions_line(results)}."
    if not results.complete:
        yield "This run was ended before all of its rows were measured."


def best_rates(results: Results) -> list[Mapping[str, Any]]:
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for rate in results.rates:
        key = (rate["precision"], rate["threads"])
        if key not in best or rate["flops"] > best[key]["flops"]:
            best[key] = rate
    return [best[key] for key in sorted(best)]


def _networks(results: Results) -> Iterator[str]:
    """Each network of each row: its share of the machine's rate says what is left to win."""
    yield "| row | network | shape | calls a picture | a call | GFLOP | GFLOP/s | of the rate |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in results.rows:
        for part in row["components"] if row["ok"] else ():
            shape = " ".join(f"{name}{n}" for name, n in part["dims"].items())
            figures = ["", "", ""]
            if "flop" in part:
                figures[:2] = [f"{part['flop'] / 1e9:.4g}", f"{part['flops'] / 1e9:.3g}"]
            if "share" in part:
                figures[2] = f"{part['share']:.0%}"
            what = part["component"] if part["what"] == "run" else f"{part['component']}, once"
            cells = [_cell(row["name"]), what, shape, f"{part['calls']:g}", spread(part["seconds"])]
            yield "| " + " | ".join([*cells, *figures]) + " |"


def _rest(results: Results) -> Iterator[str]:
    if any(row["ok"] for row in results.rows):
        yield from ("", *_networks(results))
    failed = [row for row in results.rows if not row["ok"]]
    if failed:
        yield from ("", "Failed:", "")
        for row in failed:
            failure = row["failure"]
            yield f"- {row['name']}, at {failure['stage']}: {failure['error']} ({failure['hint']})"
    if results.ratios:
        yield from ("", *ratio_table(results.ratios))
    for note in results.notes:
        yield f"\nNote: {note}"


RATIO_COLUMNS = (
    "peer",
    "ours",
    "peer's picture",
    "our picture",
    "peer / ours (95 %)",
    "peak memory, peer and ours",
    "PSNR to our float32, peer and ours",
)


def ratio_table(ratios: list[dict[str, Any]]) -> Iterator[str]:
    """Interleaved runs: how many times as long the peer takes as we do; settings underneath."""
    yield "| " + " | ".join(RATIO_COLUMNS) + " |"
    yield "|" + "---|" * len(RATIO_COLUMNS)
    for pair in ratios:
        yield "| " + " | ".join(ratio_cells(pair)) + " |"
    settings = {pair["peer"]: pair["settings"] for pair in ratios}
    settings |= {pair["ours"]: pair["our_settings"] for pair in ratios}
    yield ""
    yield from (f"- {name}: {text}" for name, text in settings.items())


def ratio_cells(pair: Mapping[str, Any]) -> list[str]:
    """One pair as text, in the order of RATIO_COLUMNS."""
    if not pair["ok"]:
        reason = f"failed: {pair['failure']['error']}"
        return [pair["peer"], pair["ours"], reason, *[""] * (len(RATIO_COLUMNS) - 3)]
    ratio, both = pair["ratio"], ("peer", "ours")
    peaks = [pair["peak_bytes"][who] for who in both]
    return [
        pair["peer"],
        pair["ours"],
        spread(pair["seconds"]["peer"]) + _composed(pair),
        spread(pair["seconds"]["ours"]),
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        ", ".join("?" if peak is None else size(peak) for peak in peaks),
        ", ".join(_one_quality(pair["quality"][who]) for who in both),
    ]


def _composed(pair: Mapping[str, Any]) -> str:
    return f", composed of {pair['composed_of']} steps" if "composed_of" in pair else ""


def _one_quality(found: Mapping[str, Any] | None) -> str:
    """Of one picture: `33.2 dB`, `equal`, or `?` where it could not be compared."""
    if found is None:
        return "?"
    return "equal" if found["psnr_db"] is None else f"{found['psnr_db']:.1f} dB"


def as_csv(results: Results) -> str:
    """One line a row; times in seconds, sizes in bytes, decibels empty where equal."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("median", "p10", "p90")
    stages = ("total_s", "step_s", "text_s", "denoise_s", "decode_s", "own_s")
    head = [f"{stage}_{name}" for stage in stages for name in names]
    starts = ("import_s", "load_s", "build_s", "to_first_step_s", "to_first_picture_s")
    head += [f"{which}_{name}" for which in ("cold", "warm") for name in starts]
    writer.writerow(["row", "ok", "backend", "precision", *head, "peak_bytes", "psnr_db_median",
                     "psnr_db_worst", "ssim_median", "ssim_worst", "failure"])  # fmt: skip
    for row in results.rows:
        load = row["case"]["load"]
        line = [row["name"], row["ok"], load.get("backend"), load.get("precision")]
        if not row["ok"]:
            blank = [None] * (len(head) + 5)
            writer.writerow([*line, *blank, row["failure"]["error"]])
            continue
        line += [row["steady"][s].get(n) for s in stages for n in names]
        line += [row.get(f"{w}_start", {}).get(n) for w in ("cold", "warm") for n in starts]
        found = row.get("quality") or {"psnr_db": {}, "ssim": {}}
        line += [row["memory"]["peak_bytes"]]
        line += [found[m].get(n) for m in ("psnr_db", "ssim") for n in ("median", "worst")]
        writer.writerow([*line, None])
    return out.getvalue()


def renew(text: str, folder: Path, load: Any) -> str:
    """`text` with each part between `<!-- bench: NAME -->` and `<!-- /bench -->` made anew from
    `folder`/NAME. `load`: results.load. Raises RequestError: a mark without its end, a file that
    is not there."""
    begin, _, rest = BEGIN.partition("{}")
    parts = text.split(begin)
    done = [parts[0]]
    for part in parts[1:]:
        name, closed, body = part.partition(rest)
        _, ended, after = body.partition(END)
        if not closed or not ended:
            raise RequestError(
                f"the mark `{begin}{name.splitlines()[0]}` has no end",
                hint=f"close it with `{END}` behind the table",
            )
        found = table(load(folder / name))
        done.append(f"{begin}{name}{rest}\n{found}\n{END}{after}")
    return "".join(done)
