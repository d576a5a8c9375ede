"""What runs on one machine have found, in one JSON and in a table of bench/RESULTS.md: kept row by row, over processes
and calls."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from . import report
from .report import Line
from .row import GROUPS

NOT_RUN = {"outcome": "not run"}


@dataclasses.dataclass(frozen=True)
class Record:
    """The two files; either may be None, and is not written then."""

    json: Path | None
    results: Path | None
    device_type: str
    on: dict  #: `report.machine`

    def read(self) -> dict:
        """What the JSON holds, if it is of the same machine and versions; else a report of nothing."""
        exists = self.json is not None and self.json.exists()
        found = json.loads(self.json.read_text(encoding="utf-8")) if exists else {}
        empty = {"machine": self.on, "lines": [], "smoke": NOT_RUN, "tests": NOT_RUN}
        return empty | found if found.get("machine") == self.on else empty

    def lines(self) -> list[Line]:
        return report.lines_of_json(self.read()["lines"])

    def update(self, **changes) -> None:
        """Replace fields of the report, and write both files."""
        found = self.read() | changes
        if self.json is not None:
            report.replace(self.json, report.dumped(found))
        if self.results is not None:
            parts = [report.markdown(report.lines_of_json(found["lines"]), self.on)]
            if found["smoke"] != NOT_RUN or found["tests"] != NOT_RUN:
                parts.append(summary(found))
            report.write("\n\n".join(parts), self.device_type, self.results)

    def keep(self, kept: Sequence[Line], lines: Sequence[Line]) -> None:
        self.update(**report.as_json(joined(kept, lines), self.on))


def name_of(device_type: str, on: dict) -> str:
    """The JSON's name, after the machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device_type} {on['device']}".lower()).strip("-") + ".json"


def joined(kept: Sequence[Line], lines: Sequence[Line]) -> list[Line]:
    """The lines, and those kept of works that they do not touch, by groups in the table's order."""
    touched = {(line.device, line.work) for line in lines}
    both = [*[line for line in kept if (line.device, line.work) not in touched], *lines]
    return sorted(both, key=lambda line: GROUPS.index(line.group))


def summary(found: dict) -> str:
    """One line on what else the report has."""
    tests, smoke = found["tests"], found["smoke"]
    counts = ", ".join(f"{tests[k]} {k}" for k in ("tests", "failures", "errors", "skipped") if tests.get(k))
    failed = ", ".join(smoke.get("failed", ()))
    return (
        f"bench.smoke: {smoke['outcome']}{f' ({failed})' if failed else ''}. "
        f"Tests marked gpu: {tests['outcome']}{f': {counts}' if counts else ''}."
    )
