"""Tables of what was found, one for each question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .rows import EXACT, Row

Found = Sequence[tuple[str, Sequence[Row]]]
"""What each run was made on, and its rows."""


def tables(runs: Found) -> dict[str, str]:
    """Markdown, by the name of the section: a table for what runs have been made on."""
    found: dict[str, str] = {}
    for name, make in MAKERS.items():
        parts: dict[str, list[Row]] = {}
        for about, rows in runs:
            own = [row for row in rows if row.section == name]
            if own:
                parts.setdefault(about, []).extend(own)
        if parts:
            found[name] = "\n\n".join(f"{about}.\n\n{make(own)}" for about, own in parts.items())
    return found


def table(head: str, alignment: str, lines: Iterable[Sequence[str]]) -> str:
    """`alignment` has a letter for each column, `l` or `r`."""
    rule = "|".join("---" if letter == "l" else "---:" for letter in alignment)
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in lines)])


def instead(row: Row) -> str:
    """What stands in the place of a time that is not shown."""
    return "WRONG" if row.wrong else "-"


def ms(row: Row | None, digits: int = 1) -> str:
    if row is None:
        return ""
    return f"{row.seconds * 1e3:,.{digits}f}" if row.shown and row.seconds else instead(row)


def number(row: Row | None, value: float | None, digits: int = 2) -> str:
    if row is None or not row.shown or value is None:
        return ""
    return f"{value:,.{digits}f}"


def ratio(row: Row | None) -> str:
    """Of the baseline's time; 1 for itself."""
    if row is None:
        return ""
    return "1.00" if row.arm == EXACT and row.shown else number(row, row.ratio)


def named(row: Row) -> str:
    plain = row.arm.split(",")[0] in (EXACT, "StaticCache", "quanto", "flash attention")
    return row.arm if plain else f"kvpolicy {row.arm}"


def of_layer(rows: Sequence[Row]) -> str:
    base = {(r.batch, r.tokens): r for r in rows if r.arm == "flash attention"}
    lines = []
    for row in rows:
        flash = base[row.batch, row.tokens]
        if row is flash or not flash.shown:
            continue
        more = {
            name: number(row, row.more.get(name))
            for name in ("times as fast", "cold times as fast", "at most, by bytes")
        }
        us = f"{row.seconds * 1e6:.1f}" if row.shown else instead(row)
        lines.append([str(row.batch), f"{row.tokens:,}", row.arm, f"{flash.seconds * 1e6:.1f}", us, *more.values()])
    head = "batch | tokens | recipe | flash attention, us | kvpolicy, us | times as fast | cold | at most, by bytes"
    return table(head, "rrlrrrrr", lines)


def of_steps(rows: Sequence[Row]) -> str:
    lines = []
    replayed = {(r.batch, r.tokens, r.arm): r for r in rows if r.graphs}
    for row in rows:
        if row.graphs:
            continue
        twin = replayed.get((row.batch, row.tokens, row.arm))
        peak = number(row, row.more.get("peak MB"), 0)
        beside = number(row, row.more.get("DynamicCache ms"), 1)
        cells = [named(row), ms(row), beside, ratio(row), ms(twin), ratio(twin), peak]
        lines.append([str(row.batch), f"{row.tokens:,}", *cells])
    of = "of DynamicCache's"
    head = f"batch | tokens | cache | ms per step | DynamicCache in turns, ms | {of} | with graphs, ms | {of}"
    return table(f"{head} | a step's memory, MB", "rrlrrrrrr", lines)


def of_first(rows: Sequence[Row]) -> str:
    shapes = list(dict.fromkeys((r.batch, r.tokens) for r in rows))
    names = list(dict.fromkeys(r.arm for r in rows))
    known = {(r.arm, r.batch, r.tokens): r for r in rows}
    head = ["cache"]
    for batch, tokens in shapes:
        head += [f"{tokens:,} tokens, batch {batch}, ms", "of DynamicCache's"]
    lines = []
    for name in names:
        cells = [next(named(r) for r in rows if r.arm == name)]
        for shape in shapes:
            row = known.get((name, *shape))
            cells += [ms(row, 0), ratio(row)]
        lines.append(cells)
    return table(" | ".join(head), "l" + "rr" * len(shapes), lines)


def of_peak(rows: Sequence[Row]) -> str:
    lengths = list(dict.fromkeys(r.tokens for r in rows))
    known = {(r.arm, r.tokens): r for r in rows}
    lines = []
    for arm in dict.fromkeys(r.arm for r in rows):
        cells = [arm]
        for tokens in lengths:
            row = known.get((arm, tokens))
            found = [number(row, row.more.get(name), 1) if row else "" for name in ("peak MB", "bound MB")]
            cells += [found[0] or (instead(row) if row else ""), found[1]]
        lines.append(cells)
    head = ["recipe", *(part for tokens in lengths for part in (f"{tokens:,} tokens: peak, MB", "bound, MB"))]
    return table(" | ".join(head), "l" + "rr" * len(lengths), lines)


def of_context(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(r.arm for r in rows))
    known = {(r.arm, r.tokens): r for r in rows}
    lines = []
    for tokens in dict.fromkeys(r.tokens for r in rows):
        lines.append([f"{tokens:,}", *(ms(known.get((name, tokens))) for name in names)])
    head = [f"{next(named(r) for r in rows if r.arm == name)}, ms" for name in names]
    return table(" | ".join(["tokens", *head]), "r" + "r" * len(names), lines)


def of_rows(rows: Sequence[Row]) -> str:
    """As many rows as the memory holds."""
    lines = []
    for row in rows:
        if row.more.get("most"):
            base = row.arm == EXACT
            times = "1.00" if base else number(row, row.more.get("times the rows"))
            faster = "1.00" if base else number(row, row.throughput)
            tokens = f"{row.more['tokens/s']:,.0f}" if row.shown else instead(row)
            taken = number(row, row.more.get("allocated GB"), 1)
            lines.append([named(row), f"{row.batch}", times, taken, tokens, faster])
        elif not row.batch:
            lines.append([named(row), instead(row), "", "", "", ""])
    gigabytes = max((row.more.get("of GB", 0.0) for row in rows), default=0.0)
    of = "of DynamicCache's"
    head = f"cache | rows in {gigabytes:.0f} GB | {of} | allocated, GB | tokens per second | {of}"
    return table(head, "lrrrrr", lines)


MAKERS: dict[str, Callable[[Sequence[Row]], str]] = {
    "layer": of_layer,
    "steps": of_steps,
    "first": of_first,
    "peak": of_peak,
    "context": of_context,
    "rows": of_rows,
}
