"""One rule by which a comparison gives every form of the sampler its step size and threshold.

Pilots, which are short trainings with one seed, try the form's own start times each factor of the step size, at the
threshold of the start; then, at the best of these, the start's threshold times each factor. The best is the one with
the smallest measure (`comparison.MEASURES`); one that diverges is worse than any other. A form without a threshold
makes the first half only. The runs that are compared have other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    failed: bool  #: every pilot diverged: the choice is the one with the least step size, and nothing more is known


def rule(preset: Preset) -> str:
    """The rule in words."""
    assert preset.comparison is not None
    pilots = preset.comparison.pilots
    if not pilots.iterations:
        return "Nothing is tuned: every form has its own start."
    steps, thresholds = (", ".join(f"{x:g}" for x in xs) for xs in (pilots.step_sizes, pilots.thresholds))
    return (
        f"Every form is tuned alike, by pilots of {pilots.iterations} updates with seed {pilots.seed}. They have the "
        f"form's own step size times {steps}; then, at the best of them, its own threshold times {thresholds}."
    )


def has_threshold(form: str) -> bool:
    return "threshold" in SAMPLERS[presets.FORMS[form].settings["sampler"]].numbers


def tune(preset: Preset, common: Mapping[str, Any], make: Make) -> tuple[dict[str, Tuned], list[dict[str, Any]]]:
    """What each form of the preset's comparison is given, and the lines of all pilots. ``common`` is that of
    `presets.settings_of`. Pilots of no updates tune nothing. Raises ValueError where a form cannot be tuned."""
    assert preset.comparison is not None
    pilots, forms = preset.comparison.pilots, preset.comparison.forms
    own = dict(common) | {"iterations": pilots.iterations}
    wanted = [form for form in forms if form != presets.EFFECTIVE]
    if presets.EFFECTIVE in forms and presets.ITS_SOURCE not in forms:
        raise ValueError(f"samplers must have {presets.ITS_SOURCE} beside {presets.EFFECTIVE}, whose step size is its")

    if not pilots.iterations:
        if presets.EFFECTIVE in forms:
            raise ValueError(f"pilots must be at least 1 with {presets.EFFECTIVE}, whose step size they find; got 0")
        return {form: Tuned(Choice(form), (), False) for form in forms}, []

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
    if presets.EFFECTIVE in forms:
        found[presets.EFFECTIVE] = Tuned(_effective(lines, found[presets.ITS_SOURCE].choice), (), False)
    return {form: found[form] for form in forms}, lines


def _best(lines: list[dict[str, Any]], form: str, measure: str) -> Choice:
    of_form = [line for line in lines if line["form"] == form]
    line = comparison.best(of_form, measure) or min(of_form, key=lambda line: line["factors"])
    return Choice(form, *line["factors"])


def _effective(lines: list[dict[str, Any]], source: Choice) -> Choice:
    """Plain Langevin whose step size is AniLA's times the mean gain with which its pilot ended."""
    gains = [x["gamma_mean"] for x in lines if x["form"] == source.form and x["factors"] == [*source[1:]] and
             not x["diverged"]]  # fmt: skip
    return Choice(presets.EFFECTIVE, source.step_size * (gains[0] if gains else 1.0))
