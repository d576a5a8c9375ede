"""A CUDA device without kernels, for a process to run under: see fakecuda/runtime.cpp for what it does.

`environment` is what a process needs to run under it, and builds it on the first call; `unavailable` says why it cannot
be had. `run` gives the results of a script's cases from a process under the device, where the script calls `main` and
a `Device` tells what has been launched, captured and violated.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "fakecuda"
#: Versions of torch on which no function that is called is missing; on others one may be: see `Device.missing`.
TESTED = ((2, 11), (2, 14))
#: The version of CUDA whose interface the device has.
CUDA = 13
#: A function of CUDA's libraries that torch calls: the real ones of cuDNN that only describe tensors need no device.
_CALLED = re.compile(r"(__cuda|cuda[A-Z]|cu[A-Z](?!File)|cublas|cudnn(Convolution|Backend))\w*$")
#: One of cuBLAS that computes, and whose first argument is a handle.
_COMPUTES = re.compile(r"cublas(?!Lt|Create|Destroy|Get|Set)")

#: What has nothing to do on this device.
_SUCCEEDS = """
    cudaFuncSetAttribute cudaSetDevice cudaDeviceEnablePeerAccess cudaProfilerStart cudaProfilerStop
    cudaMemcpyToSymbol cudaStreamDestroy cudaGraphDestroy cudaGraphExecDestroy cudaGraphDebugDotPrint
    cuCtxSetCurrent cuCtxSetLimit cuModuleUnload cuFuncSetAttribute cuFuncSetCacheConfig cublasDestroy_v2
    cublasSetMathMode cublasSetPointerMode_v2 cublasSetSmCountTarget cublasSetWorkspace_v2
    cublasLtMatmulDescDestroy cublasLtMatmulDescSetAttribute cublasLtMatmulPreferenceDestroy
    cublasLtMatmulPreferenceSetAttribute cublasLtMatrixLayoutDestroy cublasLtMatrixLayoutSetAttribute
""".split()


# ------------------------------------------------------------------------------------------------------------- building


@functools.cache
def unavailable() -> str | None:
    """Why the device cannot be built here; None where it can."""
    if sys.platform != "linux":
        return f"the device without kernels needs Linux, and this is {sys.platform}"
    for tool in ("g++", "nm"):
        if shutil.which(tool) is None:
            return f"the device without kernels is built with {tool}, which is not installed"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not (_torch() / "lib/libtorch_cuda.so").exists():
        return f"torch {version('torch')} has no CUDA"
    if _includes() is None:
        return f"the headers of CUDA {CUDA} that the device is built with are not installed beside torch"
    return None


def tested() -> bool:
    """Whether the installed torch is one of `TESTED`."""
    return tuple(map(int, version("torch").split(".")[:2])) in TESTED


@functools.cache
def build() -> Path:
    """The folder of the device's library, built there once for each version of its sources and of torch."""
    content = b"".join(path.read_bytes() for path in sorted(SOURCES.iterdir())) + Path(__file__).read_bytes()
    key = hashlib.sha256(content + version("torch").encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fastanila" / f"fakecuda-{key}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            _build(Path(work))
            try:
                os.rename(work, folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return folder


def _build(folder: Path) -> None:
    compile = ["g++", "-std=c++17", "-O1", "-fPIC", "-c", *(f"-I{path}" for path in _includes())]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        _run(*compile, source, "-o", objects[-1])
    generated = folder / "generated.cpp"
    generated.write_text(_generated(_called() - _symbols("--defined-only", *objects) - set(_SUCCEEDS)))
    (folder / "lib").mkdir()
    # Triton and libcaffe2_nvrtc.so open libcuda by its name
    library = folder / "lib" / "libcuda.so.1"
    _run("g++", "-std=c++17", "-shared", "-fPIC", generated, *objects, "-Wl,-soname,libcuda.so.1", "-o", library)
    shutil.copy(SOURCES / "ptxas", folder)


def _generated(names: set[str]) -> str:
    """Functions that the sources have not, declared without their arguments: those that need do nothing, computations,
    which are one operation each, and ``names``, the rest of what torch calls, which report that they are missing."""
    lines = [
        'extern "C" int fake_computation(const char*, const void*);',
        'extern "C" int fake_missing(const char*);',
        '#define SUCCEEDS(name) extern "C" int name() { return 0; }',
        '#define COMPUTATION(name) extern "C" int name(const void* h) { return fake_computation(#name, h); }',
        '#define MISSING(name) extern "C" int name() { return fake_missing(#name); }',
    ]
    lines += [f"SUCCEEDS({name})" for name in _SUCCEEDS]
    lines += [f"{'COMPUTATION' if _COMPUTES.match(name) else 'MISSING'}({name})" for name in sorted(names)]
    return "\n".join(lines) + "\n"


def _called() -> set[str]:
    """The functions of CUDA's runtime and driver, of cuBLAS and of cuDNN that torch's libraries call."""
    return {name for name in _symbols("--undefined-only", *(_torch() / "lib").glob("*.so")) if _CALLED.match(name)}


def _symbols(which: str, *paths: Path) -> set[str]:
    options = ["-D"] if which == "--undefined-only" else []
    lines = _run("nm", *options, which, *paths).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if len(line.split()) >= 2}


def _run(*command) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} fails to build the device without kernels:\n{result.stderr[-4000:]}")
    return result.stdout


def _torch() -> Path:
    return Path(find_spec("torch").origin).parent


def _includes() -> list[Path] | None:
    packages = _torch().parent
    nvidia = [packages / "nvidia" / name / "include" for name in (f"cu{CUDA}", "cudnn")]
    triton = Path(find_spec("triton").origin).parent / "backends/nvidia/include"  # has what cu13's lacks
    needed = ("cuda.h", "cuda_runtime_api.h"), ("cudnn.h",)
    there = all((folder / name).exists() for folder, names in zip(nvidia, needed, strict=True) for name in names)
    return [*nvidia, triton] if there else None


# -------------------------------------------------------------------------------------------------------------- running


def environment() -> dict[str, str]:
    """This process's environment, and what lets another run under the device."""
    folder = build()
    paths = [str(folder / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {
        "LD_PRELOAD": str(folder / "lib" / "libcuda.so.1"),
        "LD_LIBRARY_PATH": ":".join(paths),
        "TRITON_LIBCUDA_PATH": str(folder / "lib"),
        "TRITON_PTXAS_PATH": str(folder / "ptxas"),
        # of its own, lest a real device be given what was compiled and tuned here
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its workers would not be under the device
        "CUDA_VISIBLE_DEVICES": "0",
        "TRITON_INTERPRET": "0",
    }


def run(script: str | Path, names: Iterable[str], timeout: float = 1800) -> dict[str, dict]:
    """The script's cases of these names, in a process under the device: by name either what `main` wrote of a case,
    {"result": ...}, or {"error": its traceback}."""
    root = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.run(
            [sys.executable, str(script), "--under-the-device", str(out), *names],
            env=environment() | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        found = dict(map(json.loads, out.read_text().splitlines())) if out.exists() else {}
    end = f"the process ended with {process.returncode}\n{process.stderr[-4000:]}"
    return {name: found.get(name, {"error": end}) for name in names}


def is_case(arguments: list[str]) -> bool:
    """Whether a script is called by `run`."""
    return arguments[:1] == ["--under-the-device"]


def main(cases: dict[str, Callable[[], object]], arguments: list[str]) -> None:
    """What a script does with its command line when `run` calls it: each case's result, as JSON, in a file."""
    _, out, *names = arguments
    with open(out, "a") as file:
        for name in names:
            try:
                result = {"result": cases[name](), "missing": Device().missing}
            except Exception:
                result = {"error": traceback.format_exc(), "missing": Device().missing}
            print(json.dumps([name, result]), file=file, flush=True)


class Device:
    """What the device of this process has seen since `clear`. Raises RuntimeError in a process that is not under it."""

    def __init__(self):
        self._library = ctypes.CDLL(None)  # what was preloaded comes first
        if not hasattr(self._library, "fake_log"):
            raise RuntimeError("this process is not under the device without kernels: see fake_device.environment")
        self._library.fake_log.restype = ctypes.c_char_p

    def clear(self) -> None:
        self._library.fake_clear()

    @property
    def operations(self) -> list[str]:
        """Kernels, copies, fills and graphs that were launched outside captures."""
        return self._log("operations")

    @property
    def graphs(self) -> list[list[str]]:
        """The nodes of each captured graph."""
        return [self._log("graph", i) for i in range(len(self._log("graphs")))]

    @property
    def replays(self) -> list[int]:
        """Of each graph that was launched, the number of nodes."""
        return list(map(int, self._log("replays")))

    @property
    def violations(self) -> list[str]:
        """What was done that a capture forbids."""
        return self._log("violations")

    @property
    def missing(self) -> list[str]:
        """Functions that were called and that the device does not have; these `clear` does not forget."""
        return self._log("missing")

    def _log(self, name: str, graph: int = 0) -> list[str]:
        return self._library.fake_log(name.encode(), ctypes.c_long(graph)).decode().splitlines()


@contextlib.contextmanager
def tensor_learning_rates() -> Iterator[None]:
    """Adam takes a learning rate that is a tensor: the comparison by which it checks one is a kernel."""
    import torch

    original = torch.optim.Adam.__init__

    def init(self, params, lr=1e-3, **options):
        original(self, params, lr=1e-3 if isinstance(lr, torch.Tensor) else lr, **options)
        for group in self.param_groups:
            group["lr"] = lr
        self.defaults["lr"] = lr

    torch.optim.Adam.__init__ = init
    try:
        yield
    finally:
        torch.optim.Adam.__init__ = original
