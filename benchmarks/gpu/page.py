"""What `everything.py` found, as a page and as a table of winners for `dslc build --tuned`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def page(content: Row) -> str:
    """Markdown: the machine, what it gives at most, and a table for each step."""
    machine = f"{content.get('gpu', 'no GPU')}, torch {content.get('torch', '?')}"
    machine += f", Triton {content.get('triton', '?')}"
    ceilings = {row["of"]: row["a_second"] for row in all_rows(content) if "a_second" in row}
    lines = [
        f"# {content['spec']} on {machine}",
        "",
        f"`{content['command']}`, commit {content['commit'] or 'unknown'}. Rooflines are made of"
        " what this card gave at most in `ceilings`. Ratios are the time of a library over ours.",
    ]
    for step in content["steps"]:
        lines += ["", f"## {step['step']}", ""]
        cases = [row for row in step["rows"] if "bound_by" in row]
        rest = [row for row in step["rows"] if "bound_by" not in row]
        if cases:
            lines += [
                "| case | file | us | of roofline | check | libraries |",
                "|---|---|--:|--:|---|---|",
            ]
            lines += [case_line(row, ceilings) for row in cases]
        lines += [""] if cases and rest else []
        lines += [f"- {row['row']}: {facts(row)}" for row in rest]
    return "\n".join(lines) + "\n"


def all_rows(content: Row) -> Iterator[Row]:
    for step in content["steps"]:
        yield from step["rows"]


def case_line(row: Row, ceilings: dict[str, float]) -> str:
    us, share = row.get("us"), roofline(row, ceilings)
    cells = [
        row["row"],
        row["file"],
        f"{us:.1f}" if us else "",
        f"{share:.0%}" if share else "",
        row.get("check", ""),
        libraries(row),
    ]
    return f"| {' | '.join(cells)} |"


def roofline(row: Row, ceilings: dict[str, float]) -> float | None:
    """The least time by the card's own ceilings, over the time it took."""
    if "us" not in row or "bandwidth" not in ceilings:
        return None
    least = row.get("bytes", 0) / ceilings["bandwidth"]
    if row["bound_by"] in ceilings:
        least = max(least, row.get("flops", 0) / ceilings[row["bound_by"]])
    return float(1e6 * least / row["us"])


def libraries(row: Row) -> str:
    return ", ".join(
        f"{name} {us}" if isinstance(us, str) else f"{name} x{us / row['us']:.2f}"
        for name, us in row.get("peers_us", {}).items()
    )


def facts(row: Row) -> str:
    """`ms 131.8, tokens_per_s 31,081`."""
    return ", ".join(f"{key} {shown(value)}" for key, value in row.items() if key != "row")


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def tuned(content: Row) -> str:
    """The fastest file of each size that was right, as `dslc tune` writes it."""
    found: dict[str, dict[str, float]] = {}
    for row in all_rows(content):
        if "size_key" in row and row.get("check") == "ok" and "us" in row:
            found.setdefault(row["size_key"], {})[row["file"]] = round(row["us"], 1)
    choices: dict[str, Any] = {}
    for key, us in sorted(found.items()):
        choices[key] = {"fastest": min(us, key=us.__getitem__), "us": us}
    head = {key: content.get(key) for key in ("target", "gpu", "torch", "triton", "commit")}
    return json.dumps({**head, "choices": choices}, indent=1) + "\n"
