"""One rule by which a comparison gives every form of the sampler its step size and threshold.

Pilots, which are short trainings with one seed, try the form's own start times each factor of the step size, at the
threshold of the start; then, at the best of these, the start's threshold times each factor. The best is the one with
the smallest measure (`comparison.MEASURES`); one that diverges is worse than any other. A form without a threshold
makes the first half only. The runs that are compared have other seeds. Langevin at AniLA's mean step needs no pilots,
but AniLA's runs: see `effective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from ..evaluation import comparison
from ..samplers import SAMPLERS
from . import presets
from .presets import Choice, Preset
from .settings import Settings

#: Makes runs by name, in a folder of the name given, and returns a line for each: see `several.train_all`.
Make = Callable[[Mapping[str, Settings], str], list[dict[str, Any]]]


class Tuned(NamedTuple):
    choice: Choice
    at_edge: tuple[str, ...]  #: of step_size, threshold those whose factor is the least or largest tried
    failed: bool  #: every run that could tell diverged: the choice has the least step size, and nothing more is known


def rule(preset: Preset) -> str:
    """The rule in words."""
    assert preset.comparison is not None
    pilots = preset.comparison.pilots
    words = "Nothing is tuned: every form has its own start."
    if pilots.iterations:
        steps, thresholds = (", ".join(f"{x:g}" for x in xs) for xs in (pilots.step_sizes, pilots.thresholds))
        words = (
            f"Every form is tuned alike, by pilots of {pilots.iterations} updates with seed {pilots.seed}. They have "
            f"the form's own step size times {steps}; then, at the best of them, its own threshold times {thresholds}."
        )
    if presets.EFFECTIVE in preset.comparison.forms:
        label, source = (presets.FORMS[form].label for form in (presets.EFFECTIVE, presets.ITS_SOURCE))
        words += f" {label} has the step size of {source} times the mean gain with which its runs ended."
    return words


def has_threshold(form: str) -> bool:
    return "threshold" in SAMPLERS[presets.FORMS[form].settings["sampler"]].numbers


def tune(preset: Preset, common: Mapping[str, Any], make: Make) -> tuple[dict[str, Tuned], list[dict[str, Any]]]:
    """What each form of the preset's comparison is given but `presets.EFFECTIVE`, and the lines of all pilots.

    ``common`` is that of `presets.settings_of`. Pilots of no updates tune nothing. Raises ValueError where no pilot of
    any form ends well, and for `presets.EFFECTIVE` without its source.
    """
    assert preset.comparison is not None
    pilots, forms = preset.comparison.pilots, preset.comparison.forms
    own = dict(common) | {"iterations": pilots.iterations}
    wanted = [form for form in forms if form != presets.EFFECTIVE]
    if presets.EFFECTIVE in forms and presets.ITS_SOURCE not in forms:
        raise ValueError(f"samplers must have {presets.ITS_SOURCE} beside {presets.EFFECTIVE}, whose step size is its")
    if not pilots.iterations:
        return {form: Tuned(Choice(form), (), False) for form in wanted}, []

    def tried(choices: list[Choice], folder: str) -> list[dict[str, Any]]:
        settings = {c.name: presets.settings_of(preset, c, seed=pilots.seed, common=own) for c in choices}
        lines = make(settings, folder)
        return [line | {"form": c.form, "factors": [*c[1:]]} for c, line in zip(choices, lines, strict=True)]

    first = tried([Choice(form, factor) for form in wanted for factor in pilots.step_sizes], "step-sizes")
    measure = comparison.measure_of(first)
    steps = {form: _best(first, form, measure) for form in wanted}
    others = [x for x in pilots.thresholds if x != 1]
    second = tried(
        [Choice(form, steps[form].step_size, x) for form in wanted if has_threshold(form) for x in others], "thresholds"
    )
    lines = first + second
    found = {}
    for form in wanted:
        choice = _best(lines, form, measure)
        failed = comparison.best([line for line in lines if line["form"] == form], measure) is None
        tuned = [("step_size", pilots.step_sizes)] + [("threshold", pilots.thresholds)] * has_threshold(form)
        edges = tuple(k for k, tried_ in tuned if getattr(choice, k) in (min(tried_), max(tried_)) and len(tried_) > 1)
        found[form] = Tuned(choice, edges, failed)
    return found, lines


def _best(lines: list[dict[str, Any]], form: str, measure: str) -> Choice:
    of_form = [line for line in lines if line["form"] == form]
    line = comparison.best(of_form, measure) or min(of_form, key=lambda line: line["factors"])
    return Choice(form, *line["factors"])


def effective(source: Tuned, lines: list[dict[str, Any]]) -> Tuned:
    """Plain Langevin whose step size is AniLA's times the mean gain with which AniLA's runs ended.

    ``lines``: of the runs that are compared, and not of pilots: scores of a young energy hardly clip.
    """
    gains = [x["gamma_mean"] for x in lines if x["form"] == presets.ITS_SOURCE and not x["diverged"]]
    step_size = source.choice.step_size * (fmean(gains) if gains else 1.0)
    return Tuned(Choice(presets.EFFECTIVE, step_size), (), not gains)
