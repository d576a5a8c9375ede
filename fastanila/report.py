"""What a run reports while it goes: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import checkpoint


class Metrics:
    """metrics.jsonl, and TensorBoard's event files where wanted; rows after the resumed update are dropped."""

    def __init__(self, directory: Path, iteration: int, tensorboard: bool):
        self.path = directory / "metrics.jsonl"
        rows = read_rows(self.path) if iteration else []
        kept = [row for row in rows if row["iteration"] <= iteration]
        checkpoint.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.board = None
        if tensorboard:
            self.board = tensorboard_writer()(str(directory / "tensorboard"), purge_step=iteration + 1)

    def __enter__(self):
        self.file = open(self.path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_):
        self.file.close()
        if self.board is not None:
            self.board.close()

    def write(self, row: dict) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN or infinity
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        if self.board is not None:
            for name in row.keys() - {"iteration"}:
                self.board.add_scalar(name, row[name], row["iteration"])


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that a killed writer left unfinished is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def tensorboard_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard is not installed: pip install fastanila[tensorboard]") from None
    return SummaryWriter


class Progress:
    """A bar on a terminal; about twenty plain lines elsewhere."""

    def __init__(self, first: int, iterations: int, say: Callable[[str], None]):
        self.first, self.iterations, self.say, self.bar = first, iterations, say, None
        self.every = max(1, (iterations - first) // 20)
        self.next = first + 1

    def __enter__(self):
        self.began = time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.iterations, initial=self.first, unit="update", dynamic_ncols=True)
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def show(self, row: dict) -> None:
        shown = (
            f"energy data {row['energy_data']:.3f} chains {row['energy_chains']:.3f} gap {row['energy_gap']:+.3f} "
            f"clipped {row['clip_fraction']:.1%}"
            + (f" accepted {row['acceptance']:.1%}" if row["acceptance"] < 1 else "")
            + (f" nll {row['nll']:.3f}" if "nll" in row else "")
        )
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self.bar.update(row["iteration"] - self.bar.n)
        elif row["iteration"] >= self.next or "nll" in row:
            rate = (row["iteration"] - self.first) / (time.perf_counter() - self.began)
            self.say(f"update {row['iteration']:>6}  {shown}  {rate:.1f} updates/s")
            self.next = row["iteration"] + self.every
