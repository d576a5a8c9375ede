"""What a comparison of a preset writes: its document (compare.json), its page (compare.md) and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data import Images, completion, densities
from ..evaluation import comparison
from . import tuning
from .presets import FORMS, Preset
from .run import Run, box_of, data_of, load

RIVAL = "langevin"  #: the form that the others are set against


def document(
    preset: Preset,
    common: Mapping[str, Any],
    tuned: Mapping[str, tuning.Tuned],
    pilots: list[dict[str, Any]],
    lines: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that was found, as JSON has it. ``common``: settings that won over the preset's. ``lines``: of the
    runs that are compared, with their forms."""
    return {
        "preset": preset.name,
        "settings": preset.settings | dict(common),
        "measure": comparison.measure_of(lines),
        "rule": tuning.rule(preset),
        "tuned": {
            form: {"factors": [*found.choice[1:]], "at_edge": found.at_edge, "failed": found.failed}
            for form, found in tuned.items()
        },
        "summary": comparison.by_form(lines, RIVAL),
        "runs": lines,
        "pilots": pilots,
    }


def finite(value: Any) -> Any:
    """The same, numbers that are not finite as None: JSON has none."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(preset: Preset, found: Mapping[str, Any]) -> str:
    """The page: the table, the rule, and where the settings are from."""
    runs = {line["form"]: line for line in reversed(found["runs"])}
    words = {form: _tuned(form, runs[form], found["tuned"][form]) for form in runs}
    lines = [f"# {preset.title}: forms of the sampler side by side", ""]
    lines += [comparison.form_table(found["summary"], {k: f.label for k, f in FORMS.items()}, words, RIVAL), ""]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(line["seed"] for line in found["runs"]))
    lines += [
        f"{found['rule']} Mean and standard deviation over the seeds {seeds}. 'Less than' is by how much the measure "
        f"is less than {FORMS[RIVAL].label}'s with the same seed, and for how many seeds it is less at all.",
        "",
    ]
    if found["pilots"]:
        edge = (
            "Numbers with * are the least or the largest that the pilots tried; with ! all that could tune it failed."
        )
        lines += [edge, ""]
    lines += ["| setting | value | the papers' | chosen, because |", "| --- | --- | --- | --- |"]
    for name, value in found["settings"].items():
        cells = [name, str(value), preset.papers.get(name, ""), preset.chosen.get(name, "")]
        if value != preset.settings.get(name):
            cells[2:] = ["", f"asked for; the preset has {preset.settings.get(name, 'the default')}"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _tuned(form: str, line: Mapping[str, Any], tuned: Mapping[str, Any]) -> str:
    def number(name: str) -> str:
        return f"{line[name]:.4g}{'*' if name in tuned['at_edge'] else ''}"

    words = f"eps {number('step_size')}"
    if tuning.has_threshold(form):
        words += f", b {number('threshold')}"
    if line["noise_scale"] != 1 and line["sampler"] != "gd":
        words += f", sigma {line['noise_scale']:g}"
    return words + (" !" if tuned["failed"] else "")


def picture(path: str | Path, found: Mapping[str, Any], data_dir: str | None = None) -> None:
    """Each form's chains, of its first run that did not diverge, beside data: grids of images, or the plane with what
    was learned."""
    runs: dict[str, Run] = {}
    for line in found["runs"]:
        if not line["diverged"] and FORMS[line["form"]].label not in runs:
            runs[FORMS[line["form"]].label] = load(line["run"], "cpu")
    if not runs:
        return
    first = next(iter(runs.values()))
    data = data_of(first, data_dir)
    if isinstance(data, densities.Density):
        comparison.save_planes(path, data, {name: (run.energy, run.chains) for name, run in runs.items()})
        return
    images = data.images if isinstance(data, completion.Completions) else data
    assert isinstance(images, Images)
    sets = {"held-out images": images.draw(64, seed=0, step=0, purpose="held-out", device="cpu")}
    for name, run in runs.items():
        sets[name] = completion.images(run.chains[:64]) if isinstance(data, completion.Completions) else run.chains[:64]
    comparison.save_grids(path, sets, box_of(first))
