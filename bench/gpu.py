"""Everything that needs a GPU, in one command held against a clock: `python -m bench.gpu [--out FOLDER]`.

The tests marked gpu, the default rings job by the fused kernel in float32 and shortened in bf16, and the benchmarks.
Writes gpu.json (what was run where, and how it ended) and the tables to the folder; exits with 1 if a test failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to run")
    out.mkdir(parents=True, exist_ok=True)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def run(name: str, *command: str) -> str:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        (out / f"{name}.log").write_text(done.stdout + done.stderr)
        report[name] = {"exit": done.returncode, "seconds": round(time.perf_counter() - began, 1)}
        print(name, report[name], *done.stdout.splitlines()[-1:], flush=True)
        return done.stdout

    run("parity", "pytest", "-q", "-m", "gpu", "tests")
    for name, flags in (("rings", ()), ("rings-bf16", ("--precision", "bf16", "--iterations", "500"))):
        folder = out / name
        run(name, "fastanila.train", "--fused", "--device", "cuda", "--out", str(folder), *flags)
        report[name] |= json.loads(run(f"{name}-evaluated", "fastanila.evaluate", str(folder)) or "{}")
    run("benchmarks", "pytest", "-q", "bench", "--benchmark-only", f"--benchmark-json={out / 'benchmarks.json'}")
    (out / "table.md").write_text(run("table", "bench.report", str(out / "benchmarks.json")))
    (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
    return int(any(entry["exit"] for entry in report.values() if isinstance(entry, dict)))


if __name__ == "__main__":
    sys.exit(main())
