"""The papers' experiments: what the files say, what becomes of it, how forms are tuned, a comparison made whole."""

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from fastanila import compare, data, train
from fastanila.data import registry
from fastanila.evaluation import comparison, extractors, plots, quadrature
from fastanila.samplers import EXACT, SAMPLERS
from fastanila.training import build, config, needs, presets, several, side_by_side, tuning
from fastanila.training.presets import Choice
from fastanila.training.settings import Settings
from run_files import quiet

COMPARED = [name for name in presets.names() if presets.read(name).comparison is not None]

TINY = """
title = "Tiny rings"
[settings]
data = "rings"
steps = 4
batch_size = 16
chains = 16
width = 8
features = 4
iterations = 2
step_size = 0.01
threshold = 5.0
[papers]
data = "the first figure"
[chosen]
steps = "quick"
batch_size = "quick"
chains = "quick"
width = "quick"
features = "quick"
iterations = "quick"
step_size = "small"
threshold = "|s| seldom exceeds it"
[compare]
forms = ["langevin", "anila", "anila-coded", "langevin-effective", "hmc"]
seeds = [1, 2]
[compare.pilots]
seed = 0
iterations = 1
step_sizes = [1, 4]
thresholds = [0.1, 1]
[compare.own.hmc]
leapfrog_steps = 3
"""


# ---------------------------------------------------------------------------------------------------------- the files


def test_the_papers_experiments_are_there():
    wanted = {"rings", "mixture", "flowers", "cifar10", "cifar10-vae", "completion", "flowers-gpu", "cifar10-gpu"}
    assert set(presets.names()) == wanted
    assert set(COMPARED) == {name for name in wanted if not name.endswith("-gpu")}
    root = Path(__file__).parents[2]
    (patterns,) = (
        config.tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][name]
        for name in ["fastanila.training"]
    )
    shipped = {path for pattern in patterns for path in (root / "fastanila" / "training").glob(pattern)}
    assert {path.stem for path in shipped} == wanted


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_settings_that_all_have_an_effect(name):
    preset = presets.read(name)
    settings = config.resolve(Settings(**presets.for_training(preset)))
    assert not needs.idle(settings, preset.settings.keys() - {"threshold"})
    assert all(len(reason) > 3 for reason in (preset.papers | preset.chosen).values())


@pytest.mark.parametrize("name", COMPARED)
def test_forms_have_equal_gradients(name):
    preset = presets.read(name)
    most = preset.settings["steps"]
    for form in preset.comparison.forms:
        settings = presets.settings_of(preset, Choice(form), seed=7)
        assert settings.seed == 7 and settings.sampler == presets.FORMS[form].settings["sampler"]
        sampler = build.build_sampler(settings, (-1.0, 1.0))
        gradients = settings.steps * sampler.gradients + (settings.sampler in EXACT)
        assert most - 1 <= gradients <= most
        other = presets.settings_of(preset, Choice(form, 4.0, 0.5), seed=7)
        assert other.step_size == pytest.approx(4 * settings.step_size)
        expected = {"tamed": settings.threshold}.get(settings.sampler, 0.5 * settings.threshold)  # 0.5 sqrt(4)
        assert other.threshold == pytest.approx(expected)


def test_a_start_that_is_asked_for_is_that_of_every_form_without_one_of_its_own():
    preset, start = presets.read("rings"), dict(step_size=0.02, threshold=5.0, steps=20)
    of = {f: presets.settings_of(preset, Choice(f), seed=0, common=start) for f in preset.comparison.forms}
    for form in ("langevin", "anila", "anila-channel", "shrunk-noise", "anila-mh", "mala", "gd"):
        assert of[form].step_size == 0.02 and of[form].steps == 20 - (form in ("anila-mh", "mala"))
    assert of["anila"].threshold == of["shrunk-noise"].threshold == of["anila-mh"].threshold == 5.0
    assert build.build_sampler(of["tamed"], (-1.0, 1.0))._level == pytest.approx(5.0)
    assert (of["anila-coded"].step_size, of["anila-coded"].threshold) == (0.0196, 1.02)


def test_the_printed_and_the_coded_form_begin_with_the_papers_numbers():
    """In the plane the energy is that of temperature 1, see tests/samplers/test_ablations.py."""
    for name, threshold in (("flowers", (0.01, 0.01)), ("cifar10", (2e-4, 1e-4)), ("rings", (0.01, 0.01))):
        preset = presets.read(name)
        printed, coded = (presets.settings_of(preset, Choice(f), seed=0) for f in ("anila-printed", "anila-coded"))
        scale = 0.14 if name == "rings" else 0.01
        for form, half in ((printed, 0.5), (coded, 1.0)):
            assert form.noise_scale * math.sqrt(form.step_size) == pytest.approx(scale, rel=1e-4)
            times = 2 * half / form.step_size  # of U, so that the drift is as theirs
            wanted = threshold[form is coded] * times
            assert form.threshold == pytest.approx(wanted, rel=1e-2) and not form.clamp
        assert (printed.refresh, printed.norm, coded.norm) == ("update", "element", "channel")
        assert coded.refresh == "transition"


@pytest.mark.parametrize("form", ["anila-mh", "mala"])
def test_exact_forms_of_cold_chains_propose_as_the_others_do(form):
    """U / sigma^2 at step sigma^2 eps and threshold b / sigma^2 is U at step eps, threshold b and noise scale sigma."""
    preset = presets.read("cifar10")._replace(comparison=presets.read("cifar10").comparison._replace(own={}))
    cold = presets.settings_of(preset, Choice("anila" if form == "anila-mh" else "langevin"), seed=0)
    exact = presets.settings_of(preset, Choice(form), seed=0)
    shape = (3, 32, 32)
    z = torch.rand(2, *shape, dtype=torch.float64) * 2 - 1
    score = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 50
    a = build.build_sampler(cold, (-1, 1)).proposal(z, score)
    b = build.build_sampler(exact, (-1, 1)).proposal(z, score / exact.temperature)
    torch.testing.assert_close(b.mean, a.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.sd, a.sd, rtol=1e-12, atol=1e-12)
    bare, tempered = (
        build.build_energy(dataclasses.replace(exact, temperature=t), shape) for t in (1.0, exact.temperature)
    )
    assert torch.equal(tempered(z.float()), bare(z.float()) / exact.temperature)


@pytest.mark.parametrize(
    "change, message",
    [
        (('steps = "quick"\n', ""), r"preset tiny must say of its settings, .* where each is from: \['steps'\]"),
        (('data = "the first', 'steps = "x"\ndata = "the first'), "has steps both as the papers' and as chosen"),
        (("[chosen]", "[why]\n[chosen]"), "has an unknown key 'why'; known are title, settings"),
        (("width = 8", "breadth = 8"), "preset tiny has an unknown key 'breadth'"),
        (("width = 8", 'width = "8"'), "width must be an integer, got '8'"),
        (('"hmc"]', '"nuts"]'), r"forms that it does not compare, or that are none: \['hmc', 'nuts'\]"),
        (("step_sizes = [1, 4]", "step_sizes = [2, 4]"), "must have 1 among the factors"),
    ],
)
def test_a_file_that_does_not_say_what_it_must_is_refused(change, message):
    assert presets.parsed("tiny", TINY).title == "Tiny rings"
    with pytest.raises(ValueError, match=message):
        presets.parsed("tiny", TINY.replace(*change, 1))


def test_train_takes_a_preset(tmp_path, capsys):
    asked = train.parse(["--preset", "rings", "--width", "32"]).settings
    assert (asked.width, asked.steps, asked.sampler, asked.threshold) == (32, 100, "anila", 10.0)
    cold = train.parse(["--preset", "cifar10", "--sampler", "mala"]).settings
    assert cold.temperature == pytest.approx(2.5e-5) and cold.step_size == pytest.approx(1e-4)
    assert cold.noise_scale == 1 and capsys.readouterr().err == ""
    train.parse(["--preset", "flowers", "--data", "digits"])
    assert capsys.readouterr().err.startswith("warning: preset flowers: image_size has no effect with data=digits")
    for flags, message in (
        ("--preset rings --config x.toml", "x.toml"),
        ("--preset rings --resume x", "preset cannot be given with resume"),
        ("--preset nothing", "preset must be one of cifar10, .*, got 'nothing'"),
    ):
        (tmp_path / "x.toml").write_text("width = 8\n")
        flags = flags.replace("x.toml", str(tmp_path / "x.toml")).split()
        with pytest.raises(ValueError, match=message if message != "x.toml" else "preset cannot be given with config"):
            train.parse(flags)


# ------------------------------------------------------------------------------------------------------------- tuning


def made_up(gap):
    """Lines as runs would give them, of gap(settings); those that return None diverge."""
    calls = []

    def make(resolved, folder):
        calls.append((folder, dict(resolved)))
        lines = []
        for settings in resolved.values():
            value = gap(settings)
            line = presets.described(settings) | {"seed": settings.seed, "run": "r", "diverged": value is None}
            lines.append(line if value is None else line | {"gap": value, "gamma_mean": 0.4, "nll": 1.0})
        return lines

    return make, calls


def test_the_rule_is_steps_first_then_thresholds():
    preset = presets.changed(presets.read("rings"), forms=("langevin", "anila", "langevin-effective", "mala"))

    def gap(settings):
        if settings.sampler == "langevin" and settings.step_size > 0.01:
            return None
        best = {"langevin": 0.005, "anila": 0.02, "mala": 0.00125}[settings.sampler]
        return abs(math.log(settings.step_size / best)) + 0.1 * abs(math.log(settings.threshold / 2.0))

    make, calls = made_up(gap)
    tuned, lines = tuning.tune(preset, {}, make)
    assert [folder for folder, _ in calls] == ["step-sizes", "thresholds"]
    assert [len(resolved) for _, resolved in calls] == [9, 3]
    assert all(s.iterations == 200 and s.seed == 0 for _, resolved in calls for s in resolved.values())
    assert {s.step_size for s in calls[1][1].values()} == {0.02}  # at the best step size alone
    assert list(tuned) == ["langevin", "anila", "mala"] and len(lines) == 12
    assert tuned["langevin"] == (Choice("langevin", 1, 1), (), False)
    assert tuned["anila"] == (Choice("anila", 4, 0.2), ("step_size", "threshold"), False)
    assert tuned["mala"] == (Choice("mala", 0.25, 1), ("step_size",), False)


def test_the_mean_step_is_that_of_the_runs_which_are_compared():
    preset = presets.read("rings")
    source = tuning.Tuned(Choice("anila", 4, 0.2), ("step_size",), False)
    gains = {1: 0.5, 2: 0.7, 3: math.nan}
    lines = [dict(form="anila", seed=s, diverged=s == 3, gamma_mean=gain) for s, gain in gains.items()]
    lines += [dict(form="langevin", seed=1, diverged=False, gamma_mean=1.0)]
    found = tuning.effective(source, lines)
    assert found == (Choice("langevin-effective", pytest.approx(4 * 0.6), 1), (), False)
    settings = presets.settings_of(preset, found.choice, seed=1)
    assert (settings.sampler, settings.step_size) == ("langevin", pytest.approx(0.005 * 4 * 0.6))
    assert tuning.effective(source, lines[2:]) == (Choice("langevin-effective", 4, 1), (), True)


def test_without_pilots_every_form_has_its_own_start():
    preset = presets.read("rings")
    none = presets.changed(preset, pilots=preset.comparison.pilots._replace(iterations=0))
    tuned, lines = tuning.tune(none, {}, lambda *_: pytest.fail("a pilot"))
    assert lines == [] and set(tuned) == set(preset.comparison.forms) - {"langevin-effective"}
    assert all(found == (Choice(form), (), False) for form, found in tuned.items())
    assert tuning.rule(none).startswith("Nothing is tuned: every form has its own start. Langevin at AniLA's mean step")


def test_a_form_whose_pilots_all_fail_keeps_the_least_step():
    preset = presets.changed(presets.read("rings"), forms=("anila", "gd"))
    make, _ = made_up(lambda s: {"gd": math.nan, "anila": 1.0}[s.sampler])
    tuned, _ = tuning.tune(preset, {}, make)
    assert tuned["gd"].failed and tuned["gd"].choice == Choice("gd", 0.25, 1)
    assert not tuned["anila"].failed and tuned["anila"].choice == Choice("anila", 0.25, 1)
    make, _ = made_up(lambda s: None)
    with pytest.raises(ValueError, match="no run reports any of gap, mse_revised, kid, frechet: 6 runs, 6 diverged"):
        tuning.tune(preset, {}, make)
    with pytest.raises(ValueError, match="samplers must have anila beside langevin-effective"):
        tuning.tune(presets.changed(preset, forms=("langevin-effective",)), {}, make)


# -------------------------------------------------------------------------------------------------------------- table


def line(form, seed, **numbers):
    return dict(form=form, seed=seed, diverged=False, seconds=1.0) | numbers


def test_rows_are_means_and_differences_seed_by_seed():
    lines = [
        line("langevin", 1, kid=5.0, recall=0.5), line("langevin", 2, kid=7.0, recall=0.5),
        line("langevin", 3, kid=9.0, recall=0.7), line("anila", 1, kid=4.0, recall=0.1),
        line("anila", 2, kid=4.5, recall=0.1), dict(form="anila", seed=3, diverged=True),
        line("gd", 1, kid=math.nan, recall=0.0),
    ]  # fmt: skip
    first, second, third = comparison.by_form(lines, "langevin")
    assert first["of"] == "kid" and first["mean"] == 7 and first["sd"] == statistics.stdev([5, 7, 9])
    assert first["less"] is None and first["recall"] == pytest.approx(1.7 / 3)
    assert second["mean"] == 4.25 and second["failed"] == 1 and second["seeds"] == 3
    assert second["less"] == pytest.approx(1.75) and second["less_sd"] == pytest.approx(statistics.stdev([1.0, 2.5]))
    assert third["mean"] is None and third["failed"] == 1
    labels = {form: presets.FORMS[form].label for form in presets.FORMS}
    text = comparison.form_table([first, second, third], labels, dict.fromkeys(labels, "eps 1"), "langevin")
    assert (second["wins"], second["pairs"], first["pairs"]) == (2, 2, 0)
    assert "| AniLA, by element | eps 1 | 4.25 ± 0.35 | 1.75 ± 1.1 (2 of 2) | 0.1 | 1 | 1 of 3 |" in text.splitlines()
    assert len({row.count("|") for row in text.splitlines()}) == 1


def test_runs_are_ranked_by_what_their_data_have():
    for numbers, wanted in (
        (dict(gap=1.0, frechet=2.0), "gap"), (dict(kid=1.0, frechet=2.0), "kid"), (dict(frechet=2.0), "frechet"),
        (dict(mse_revised=1.0), "mse_revised"),
    ):  # fmt: skip
        assert comparison.measure_of([line("anila", 0, **numbers), dict(diverged=True)]) == wanted


# -------------------------------------------------------------------------------------------------------- made whole


@pytest.fixture
def in_process(monkeypatch):
    """Trainings without processes of their own, which take seconds to begin; how many there were."""
    made = []

    def trained(settings, directory, threads):
        if several.progress(directory) is None:
            made.append(directory.name)
            quiet(dataclasses.replace(settings, out=str(directory)))
        return True

    monkeypatch.setattr(several, "train", trained)
    return made


def test_a_preset_is_compared(in_process, tmp_path, monkeypatch, capsys):
    forms = ["langevin", "anila", "langevin-effective"]
    tiny = presets.changed(presets.parsed("rings", TINY), forms=tuple(forms), seeds=(1,))
    monkeypatch.setattr(presets, "read", lambda name: tiny)

    def coarse(run, *, data_dir, fused):
        density = registry.load("rings")
        cells = quadrature.grid(density.box, 40)
        learned = quadrature.model_log_density(run.energy, cells)
        gap = quadrature.kl(quadrature.data_log_density(density, cells), learned, cells)
        return {"iteration": run.iteration, "gap": gap}

    monkeypatch.setattr(compare, "evaluate", coarse)
    command = ["--preset", "rings", "--no-fused", "--iterations", "2", "--settings", "chains=32"]
    command += ["--out", str(tmp_path)]
    assert compare.main(command) == 0
    assert in_process == [
        "langevin-step1-b1", "langevin-step4-b1", "anila-step1-b1", "anila-step4-b1", in_process[4],
        "langevin-seed1", "anila-seed1", "langevin-effective-seed1",
    ]  # fmt: skip
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [row["form"] for row in found["summary"]] == forms and len(found["pilots"]) == 5
    assert all(math.isfinite(row["mean"]) and row["failed"] == 0 for row in found["summary"])
    assert {run["seed"] for run in found["pilots"]} == {0} and {run["iteration"] for run in found["pilots"]} == {1}
    plain, ours, effective = found["runs"]
    assert found["summary"][1]["less"] == pytest.approx(plain["gap"] - ours["gap"])
    chosen, step_size = found["tuned"]["anila"]["factors"], tiny.settings["step_size"]
    assert ours["step_size"] == pytest.approx(chosen[0] * step_size)
    assert effective["step_size"] == pytest.approx(ours["step_size"] * ours["gamma_mean"])
    page = (tmp_path / "compare.md").read_text()
    assert page in capsys.readouterr().out and "| Langevin at AniLA's mean step |" in page
    assert r"\|s\| seldom exceeds it" in page and "times 0.1, 1." in page
    assert "| chains | 32 |  | asked for; the preset has 16 |" in page and "| steps | 4 |  | quick |" in page
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    in_process.clear()
    assert compare.main(command) == 0 and in_process == []  # all of it is there


def test_planes_have_a_panel_each(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda _, figure: figures.append(figure))
    density = registry.load("rings")
    models = {f"form {n}": (lambda z: z.square().sum(1), torch.full((3, 2), float(n))) for n in range(7)}
    comparison.save_planes(tmp_path / "x.png", density, models)
    (figure,) = figures
    named = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert named == ["data", *models] and sum(axis.axison for axis in figure.axes) == 1 + 2 * 7
    (scale,) = {image.get_clim() for axis in figure.axes for image in axis.images}
    cells = quadrature.grid(density.box, 150)
    assert scale == (0.0, pytest.approx(quadrature.data_log_density(density, cells).max().exp().item()))
    places = {axis.get_title(): axis.get_subplotspec() for axis in figure.axes}
    for axis in figure.axes:  # the chains lie under the density of the same form
        if axis.axison and axis.collections and not axis.get_title():
            place = axis.get_subplotspec()
            ((number, _), *_) = axis.collections[0].get_offsets()
            above = places[f"form {number:.0f}"]
            assert (place.rowspan.start, place.colspan) == (above.rowspan.stop, above.colspan)


def test_what_measuring_needs_is_missed_ahead_of_the_trainings(tmp_path, monkeypatch, capsys):
    out = ["--data", "image-folder", "--samplers", "gd", "--out", str(tmp_path / "x")]
    for preset in ([], ["--preset", "flowers"]):
        assert compare.main([*preset, *out, "--data-dir", str(tmp_path / "none")]) == 2
        assert "none" in capsys.readouterr().err

    def missing():
        raise ModuleNotFoundError("pip install fastanila[features]")

    monkeypatch.setattr(extractors, "efficientnet_lite0", missing)
    colour = data.Images("made-up", *(torch.zeros(4, 3, 16, 16, dtype=torch.uint8),) * 2)
    monkeypatch.setattr(build, "load_data", lambda *_: colour)
    for preset in ([], ["--preset", "flowers"]):
        assert compare.main([*preset, *out]) == 2
        assert capsys.readouterr().err == "error: pip install fastanila[features]\n"
    assert not (tmp_path / "x").exists()


def test_images_are_shown_as_grids(tmp_path):
    quiet(Settings(data="digits", iterations=1, steps=1, width=4, batch_size=8, chains=8, fused=False, sample_every=0,
                   out=str(tmp_path / "run")))  # fmt: skip
    runs = [{"form": form, "run": str(tmp_path / "run"), "diverged": form == "hmc"} for form in ("hmc", "anila", "gd")]
    side_by_side.picture(tmp_path / "all.png", {"runs": runs})
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_what_goes_with_a_preset_and_what_does_not(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")]
    for flags, message in (
        (
            "--preset flowers-gpu",
            "preset flowers-gpu has no comparison: python -m fastanila.train --preset flowers-gpu",
        ),
        ("--preset rings --step-size 1", "step_size has no effect with preset, which tunes them"),
        ("--preset completion --samplers hmc", "samplers must be of langevin, .* with preset=completion, got hmc"),
        ("--preset rings --image-size 8", "image_size has no effect with data=rings"),
        ("--preset rings --pilots -1", "pilots must be at least 0, got -1"),
        ("--preset rings --settings norm=chain lr=x", "lr must be a number, got 'x'"),
        ("--preset rings --settings vae_lr=1", "vae_lr has no effect with init=persistent"),
        ("--preset rings --seeds 1 2 1", "seeds must differ from one another, got 1 2 1"),
        ("--samplers mala mala", "samplers must differ from one another, got mala mala"),
        ("--pilots 3", "pilots has no effect without preset, whose forms they tune"),
        ("--samplers anila-channel", "samplers must be of .* without preset, got anila-channel"),
    ):
        assert compare.main([*flags.split(), *out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "x").exists()


def test_forms_are_samplers():
    assert {form.settings["sampler"] for form in presets.FORMS.values()} == set(SAMPLERS)
