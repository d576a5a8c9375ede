"""Training without a word, and what a run leaves in its directory."""

import json

from fastanila.training import checkpoint
from fastanila.training.loop import train


def quiet(settings, resume=None):
    return train(settings, resume, say=lambda line: None)


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def numbers(directory):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(directory)]


def final(directory):
    return checkpoint.load_latest(directory / "checkpoints")[0]
