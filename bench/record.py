"""What runs on one machine have found, in one JSON and in a table of bench/RESULTS.md: kept row by row, over processes
and calls."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from fastanila.files import write_text

from . import markdown, report
from .report import Goal, Line
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
        return [of_json(fields) for fields in self.read()["lines"]]

    def keep(self, lines: Sequence[Line] | None = None, **phases: dict) -> None:
        """Replace the lines, or what smoke or tests have found, and write both files."""
        found = self.read() | phases
        if lines is not None:
            by_group = sorted(lines, key=lambda line: GROUPS.index(line.group))
            found["lines"] = [dataclasses.asdict(line) | {"met": line.met} for line in by_group]
        if self.json is not None:
            write_text(self.json, json.dumps(found, indent=1) + "\n")
        if self.results is not None:
            markdown.write(text(found), self.device_type, self.results)


def of_json(fields: dict) -> Line:
    goals = tuple(Goal(**goal) for goal in fields["goals"])
    own = {name: x for name, x in fields.items() if name != "met"}
    return Line(**own | {"shape": tuple(fields["shape"]), "goals": goals})


def text(found: dict) -> str:
    """What `Record.read` gives, as Markdown: the table, and one line on the other phases if there were any."""
    tests, smoke = found["tests"], found["smoke"]
    table = report.text([of_json(fields) for fields in found["lines"]], found["machine"])
    if tests == smoke == NOT_RUN:
        return table
    counts = ", ".join(f"{tests[k]} {k}" for k in ("tests", "failures", "errors", "skipped") if tests.get(k))
    failed = ", ".join(smoke.get("failed", ()))
    return (
        f"{table}\n\nbench.smoke: {smoke['outcome']}{f' ({failed})' if failed else ''}. "
        f"Tests marked gpu: {tests['outcome']}{f': {counts}' if counts else ''}."
    )


def name_of(device_type: str, on: dict) -> str:
    """The JSON's name, after the machine."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device_type} {on['device']}".lower()).strip("-") + ".json"
