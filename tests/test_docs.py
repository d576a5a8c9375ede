"""README and docs: short, in short sentences, and what they name exists."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
ALL = [*PAGES, "bench/RESULTS.md"]  # which docs/benchmarks.md shows
COMMANDS = ("train", "sample", "evaluate", "compare", "ergodicity")
LONGEST = 30


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(markdown: str) -> Iterator[str]:
    """Paragraphs, list items and cells of tables, without fenced or indented code, headings and pictures. A code span
    counts as one word, and so does a link."""
    markdown = re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S)
    markdown = re.sub(r"^( {4}.*| *!\[.*|#.*|--8<--.*)$", "", markdown, flags=re.M)
    markdown = re.sub(r"`[^`]+`", "code", markdown)
    for block in re.split(r"\n\s*\n|(?:^|\n)\s*(?:[*-]|\d+\.) |\n(?=\|)", markdown):
        yield from block.split("|") if block.lstrip().startswith("|") else [block]


def sentences(markdown: str) -> Iterator[str]:
    for block in prose(markdown):
        yield from re.split(r"(?<=[.?!])\)?\*{0,2}\s+", " ".join(block.split()))


def spans(markdown: str) -> Iterator[str]:
    """Code spans, and the lines of fences: lines that a backslash continues are one, comments are left out."""
    for fence in re.findall(r"^ *```sh\n(.*?)^ *```$", markdown, flags=re.M | re.S):
        for line in re.sub(r"\\\n", " ", fence).splitlines():
            yield re.sub(r"\s#.*", "", line)
    without = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.M | re.S)
    yield from (re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", without))


def anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """By command, the flags that its --help shows."""
    return {}


def flags_of(module: str, known: dict[str, set[str]], capsys) -> set[str]:
    if module not in known:
        with pytest.raises(SystemExit) as ended:
            import_module(module).main(["--help"])
        assert not ended.value.code
        known[module] = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    return known[module]


def test_the_readme_is_two_pages():
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 120
    assert len(readme.split()) <= 900


@pytest.mark.parametrize("page", PAGES)
def test_sentences_are_short(page):
    long = [s for s in sentences(text_of(page)) if len(s.split()) > LONGEST]
    assert not long, long


def test_a_long_sentence_is_seen():
    words = "word " * LONGEST
    for long in (f"One. {words}more.", f"A list:\n\n* short\n* {words}more", f"| a | {words}more |\n"):
        assert max(len(s.split()) for s in sentences(long)) == LONGEST + 1
    short = f"{words.strip()}. Another `{words}` one.\n\n```sh\n{words}{words}\n```\n"
    assert max(len(s.split()) for s in sentences(short)) == LONGEST


@pytest.mark.parametrize("page", ALL)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            where = "bench/RESULTS.md" if file.name == "benchmarks.md" else str(file.relative_to(ROOT))
            assert anchor in anchors(where), target


def test_pictures_are_shown():
    shown = {Path(p).name for page in ALL for p in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(page))}
    assert {p.name for p in (ROOT / "docs" / "images").glob("*.png")} == shown


@pytest.mark.parametrize("page", ALL)
def test_flags_exist(page, flags, capsys):
    named = [span for span in spans(text_of(page)) if "--" in span]
    for span in named:
        for module, arguments in re.findall(r"python -m ((?:fastanila|bench)\.[\w.]+)([^|;&]*)", span):
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", arguments)) - flags_of(module, flags, capsys)
            assert not unknown, f"{module} has no {', '.join(unknown)}: {span}"
    everywhere = set().union(*(flags_of(f"fastanila.{name}", flags, capsys) for name in COMMANDS))
    for span in named:
        if span.startswith("--") and not page.startswith("bench"):
            assert span.split()[0] in everywhere, span


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_names_exist(page):
    for dotted in re.findall(r"`(fastanila(?:\.\w+)+)`", text_of(page)):
        module, name = dotted.rsplit(".", 1)
        try:
            import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(import_module(module), name), dotted
    for module, names in re.findall(r"^from (fastanila[\w.]*) import ([\w, ]+)$", text_of(page), flags=re.M):
        assert all(hasattr(import_module(module), name.strip()) for name in names.split(",")), (module, names)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the run that the pages speak of, made in two updates."""
    from fastanila import train

    place = tmp_path_factory.mktemp("pages")
    flags = f"--no-fused --iterations 2 --steps 1 --sample-every 0 --out {place / 'runs' / 'rings'}"
    assert train.main(flags.split()) == 0
    return place


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_code_runs(page, place, monkeypatch):
    import torch

    monkeypatch.chdir(place)
    names: dict = {}
    torch.compiler.set_stance("force_eager")  # what is tested are the names and arguments
    try:
        for fence in re.findall(r"^```python\n(.*?)^```$", text_of(page), flags=re.M | re.S):
            exec(compile(fence, page, "exec"), names)
    finally:
        torch.compiler.set_stance("default")
    assert torch.isfinite(names["z"]).all()


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    named = re.findall(r"`((?:fastanila|kernels|bench|tests|docs)/[\w./-]*\w/?)`", text_of(page))
    named += re.findall(r"\btests/[\w/]+\.py\b", text_of(page))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing


def test_docstrings_have_no_double_stars():
    """Markdown takes what is between two of them for bold, and the reference loses them: 2^32, not 2**32."""
    for path in sorted((ROOT / "fastanila").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found = re.findall(r".*\w\*\*[\w(-].*", re.sub(r"`[^`]*`", "", text))
                assert not found, f"{path}: {found}"
