"""Tables in Markdown, and their places in bench/RESULTS.md: the blocks between two markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastanila.files import write_text

RESULTS = Path(__file__).parent / "RESULTS.md"


def table(columns: Sequence[str], sides: str, rows: Iterable[Iterable[object]]) -> str:
    """``sides``: for each column "l" or "r", the side that it keeps to."""
    lines = [columns, [{"l": "---", "r": "---:"}[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(text: str, block: str, path: Path = RESULTS) -> None:
    """Replace what stands in the block, atomically. Raises ValueError if the file has no such block."""
    begin, end = markers(block, path)
    head, rest = path.read_text(encoding="utf-8").split(begin, 1)
    write_text(path, f"{head}{begin}\n{text}\n\n{end}{rest.split(end, 1)[1]}")


def markers(block: str, path: Path) -> tuple[str, str]:
    """Where the block begins and ends. Raises ValueError if the file does not hold both."""
    begin, end = f"<!-- bench.table {block} -->\n", f"<!-- end of bench.table {block} -->"
    whole = path.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{path} must hold the markers {begin.strip()} and {end}")
    return begin, end
