"""`python -m bench.report FILE.json`: a pytest-benchmark JSON as a Markdown table, with ratios within each group."""

from __future__ import annotations

import json
import sys

import torch


def table(report: dict) -> str:
    """Median times and, for each row, how many times slower it is than the group's first (the fastest way)."""
    machine = report["machine_info"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine["cpu"].get("brand_raw", "CPU")
    try:
        import triton

        versions = f"torch {torch.__version__}, triton {triton.__version__}"
    except ModuleNotFoundError:
        versions = f"torch {torch.__version__}, no triton"
    lines = [f"{device}, {torch.get_num_threads()} threads, {versions}", ""]
    lines += ["| work | way | median | times the first |", "| --- | --- | --- | --- |"]
    groups: dict[str, list] = {}
    for row in report["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        first = rows[0]["stats"]["median"]
        for row in rows:
            median = row["stats"]["median"]
            lines.append(f"| {group} | {row['name']} | {1e6 * median:,.0f} us | {median / first:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.report FILE.json")
    with open(sys.argv[1], encoding="utf-8") as file:
        print(table(json.load(file)))
