"""Which room may import which: only those below it, so that each can be read without those above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastanila

PACKAGE = Path(fastanila.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

#: From the bottom up: a room imports only from floors below its own, and files of a room from one another.
FLOORS = (
    ("noise", "checks", "files"),
    ("graphs", "kernels"),
    ("ops", "data"),
    ("models",),
    ("samplers",),
    ("evaluation",),
    ("training",),
    ("generate", "theory", "cli"),
    ("train", "sample", "evaluate", "compare", "ergodicity"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
COMMANDS = FLOORS[-2]
#: A command may use another's work: compare trains and evaluates.
AMONG_COMMANDS = {("compare", "evaluate")}


def room_of(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imports(path: Path, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of fastanila that a file imports, as paths below it; also within functions, not for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {tuple(name[1:]) for name in names if name[0] == "fastanila"}
        elif isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = (*package[: len(package) - node.level + 1], *base)
            elif base[:1] == ("fastanila",):
                base = base[1:]
            else:
                continue
            found |= {base} if base else {(alias.name,) for alias in node.names}
    return found


def files() -> dict[Path, tuple[str, ...]]:
    """Every file of the library, and the package that it lies in, as a path below fastanila."""
    found = {path: path.relative_to(PACKAGE).parts[:-1] for path in PACKAGE.rglob("*.py")}
    return {path: package for path, package in found.items() if package[:1] != ("kernels",)}


def test_imports_go_downwards():
    upwards = []
    for path, package in files().items():
        room = package[0] if package else path.stem
        if room == "__init__":
            continue
        assert room in FLOOR, f"{room} has no floor: add it to the table"
        for target in imports(path, package):
            below = FLOOR.get(room_of(target))
            same = room_of(target) == room or (room, room_of(target)) in AMONG_COMMANDS
            if (
                room_of(target) not in ("__version__", "__init__")
                and not same
                and (below is None or below >= FLOOR[room])
            ):
                upwards.append(f"{path.relative_to(PACKAGE)} imports {'.'.join(target)}")
    assert not upwards, upwards


def test_an_import_upwards_would_be_found(tmp_path):
    (tmp_path / "x.py").write_text("from ..training import config\ndef f():\n    from .. import generate\n")
    assert imports(tmp_path / "x.py", ("ops",)) == {("training",), ("generate",)}
    assert FLOOR["training"] > FLOOR["ops"] and FLOOR["generate"] > FLOOR["ops"]


def test_kernels_import_triton_alone():
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [] if node.level == 1 else [node.module]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in {"triton", *sys.stdlib_module_names}, f"{path.name} imports {name}"


def test_nothing_but_the_console_imports_a_command():
    for path, package in files().items():
        if path.stem in (*COMMANDS, "__main__") and not package:
            continue
        assert not {room_of(target) for target in imports(path, package)} & set(COMMANDS), path


def test_the_house_stays_small():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} | {"kernels"}
    single = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", *COMMANDS}
    assert len(rooms) <= 9 and len(single) <= 5, (rooms, single)
    for path in [*files(), *KERNELS.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 300, path


@pytest.mark.parametrize("arguments", [["fastanila", "--help"], ["fastanila.train", "--help"]], ids=" ".join)
def test_help_imports_no_torch(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, stdout=subprocess.DEVNULL)
