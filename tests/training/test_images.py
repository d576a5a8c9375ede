"""Runs and their images: a run goes on with those that it began with, and is judged where there are enough."""

import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastanila import evaluate, sample
from fastanila import train as command
from fastanila.training import checkpoint
from fastanila.training.metrics import read_rows
from fastanila.training.settings import Settings
from run_files import final, numbers, quiet

SMALL = dict(
    data="image-folder", image_size=8, channels=1, width=4, steps=2, batch_size=4, chains=4, iterations=2, log_every=1,
    sample_every=0, save_every=1, lr_decay="none", fused=False,
)  # fmt: skip


def images(folder, count: int, first: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def settings(tmp_path) -> Settings:
    """A run in tmp_path/run on tmp_path/images, made in fractions of a second."""
    images(tmp_path / "images" / "a", 12)
    made = Settings(**SMALL, data_dir=str(tmp_path / "images"), out=str(tmp_path / "run"))
    quiet(made)
    return made


def go_on(tmp_path, *flags) -> int:
    return command.main(["--resume", str(tmp_path / "run"), "--iterations", "4", *flags])


def test_resuming_with_another_image_says_so(settings, tmp_path, capsys):
    before = final(tmp_path / "run")
    images(tmp_path / "images" / "b", 1, first=12)
    assert go_on(tmp_path) == 2
    told = capsys.readouterr().err
    assert told == (
        f"error: data are not what {tmp_path / 'run'} was trained on: 10 training images then, 11 now. "
        "Put them back, or go on with these, and other numbers, by --changed-data\n"
    )
    after = final(tmp_path / "run")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert go_on(tmp_path, "--changed-data") == 0
    assert go_on(tmp_path, "--iterations", "5") == 0  # to what it has now it keeps
    assert [row["iteration"] for row in numbers(tmp_path / "run")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name, told", [("000", "as many held-out images"), ("005", "as many training images")])
def test_resuming_with_an_image_that_changed_says_so(settings, tmp_path, capsys, name, told):
    images(tmp_path / "new", 1, first=99)
    os.replace(tmp_path / "new" / "099.png", tmp_path / "images" / "a" / f"{name}.png")
    assert go_on(tmp_path) == 2
    assert f"{told}, but not the same. Put them back" in capsys.readouterr().err


def test_resuming_with_the_same_images_elsewhere_goes_on(settings, tmp_path):
    shutil.copytree(tmp_path / "images", tmp_path / "copies")
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "copies" / "a").rename(tmp_path / "copies" / "z")
    (tmp_path / "copies" / "z" / ".DS_Store").write_text("not an image")
    assert go_on(tmp_path, "--data-dir", str(tmp_path / "copies")) == 0
    twin = tmp_path / "twin"
    quiet(Settings(**SMALL | dict(iterations=4), data_dir=str(tmp_path / "copies"), out=str(twin)))
    assert numbers(tmp_path / "run") == numbers(twin)


def test_a_run_of_before_goes_on(settings, tmp_path):
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        tensors, state = checkpoint.load(path)
        assert state.pop("data")["training"]["shape"] == [10, 1, 8, 8]
        checkpoint.save(path, tensors, state)
    images(tmp_path / "images" / "b", 1, first=12)
    assert go_on(tmp_path) == 0


def test_changed_data_is_for_resuming(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--data", "rings", "--changed-data", "--dry-run"]) == 2
    assert "error: changed_data can be given with resume only" in capsys.readouterr().err


def test_to_judge_a_run_by_other_images_is_told(settings, tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "x.npz")
    inpaint = [run, "--no-fused", "--inpaint", "half", "--count", "2", "--steps", "2", "--out", out]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate.main([run, "--no-fused"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["features"] == "efficientnet-lite0" and found["training"] == 10  # of one class
        assert sample.main(inpaint) == 0
    images(tmp_path / "images" / "b", 1, first=12)
    told = "the images are not those the run was trained on, of which some may be held out now: 10 training"
    with pytest.warns(UserWarning, match=told):
        assert evaluate.main([run, "--no-fused"]) == 0
    with pytest.warns(UserWarning, match=told):
        assert sample.main(inpaint) == 0


@pytest.mark.parametrize(
    "count, told", [(2, "training images, and there is 1"), (3, "held-out images, and there is 1")]
)
def test_to_judge_a_run_by_too_few_images_says_what_is_needed(tmp_path, capsys, count, told):
    images(tmp_path / "images" / "a", count)
    quiet(Settings(**SMALL, data_dir=str(tmp_path / "images"), out=str(tmp_path / "run")))  # which learns from them
    assert evaluate.main([str(tmp_path / "run"), "--no-fused"]) == 2
    assert capsys.readouterr().err == (
        f"error: evaluation needs at least 2 {told} (of a folder without test/ or val/ every tenth image is held out: "
        "11 are the fewest that do)\n"
    )


def test_a_broken_line_of_metrics_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"itera\n{"iteration": 3}\n{"iter')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 2 is no JSON, and left out"):
        assert read_rows(path) == [{"iteration": 1}, {"iteration": 3}]
    path.write_text('{"iteration": 1}\n{"iter')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rows(path) == [{"iteration": 1}]


def test_to_judge_one_chain_says_what_is_needed(tmp_path, capsys):
    images(tmp_path / "images" / "a", 11)
    one = dict(batch_size=1, chains=1, data_dir=str(tmp_path / "images"), out=str(tmp_path / "run"))
    quiet(Settings(**SMALL | one))
    assert evaluate.main([str(tmp_path / "run"), "--no-fused"]) == 2
    assert capsys.readouterr().err == "error: evaluation needs at least 2 chains, and there is 1\n"
