"""The README and the site are correct: their Python and shell blocks run, and the file map matches the tree.

The blocks of a page run in order in one folder; each Python block has separate variables. Shell lines run with few
steps and small models; if a line names a model of the Hugging Face hub, only its options are checked.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import importlib.util
import io
import random
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from anymamba.cli import app
from anymamba.cli.completion import FULL_HELP

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if p.relative_to(DOCS).parts[0] != "experiments")]
MAP_PAGE = DOCS / "inside" / "index.md"

FENCE = re.compile(r"^(`{3,})(\w+)([^\n]*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'title="([^"]+)"')
QUICK = {
    "train": ["--preset", "nano", "--steps", "2", "--batch-size", "2", "--context", "32"],
    "generate": ["--max-new-tokens", "4"],
}
"""Options that are added to a verb of the pages, so that it takes about a second."""
ONLY_CHECKED = ("demo", "lm-eval", "serve")
"""Verbs that take minutes, do not end, or need missing data. Experiments are also only checked."""
OTHER_COMMANDS = ("git clone", "cd anymamba", "curl ", "python3 -m venv", "python -m venv", "source ")


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str | None
    """The file that the block creates or changes, on pages about changing the package."""
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(language, (TITLE.search(rest) or [None, None])[1], text) for _, language, rest, text in found]


def runnable(page: Path) -> list[Block]:
    """The blocks that a reader would run."""
    return [b for b in blocks(page) if b.language in ("python", "sh") and b.title is None]


def instructions(page: Path) -> list[Block]:
    """The blocks that create or change files of the package."""
    return [b for b in blocks(page) if b.title is not None]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Run with one thread: the models of the pages are too small for more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- snippets


@pytest.mark.parametrize("page", [p for p in PAGES if runnable(p) and not instructions(p)], ids=name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys, model_of_bytes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare(tmp_path, model_of_bytes, page.read_text(encoding="utf-8"))
    for number, block in enumerate(runnable(page)):
        run_python(block.text, f"{name(page)}, block {number}") if block.language == "python" else run_shell(block)


def run_python(text: str, where: str) -> None:
    """Run a block with separate variables; in another process if it changes what later imports give."""
    if "anymamba.compat" in text:
        subprocess.run([sys.executable, "-c", text], check=True, timeout=300)
    else:
        exec(compile(text, where, "exec"), {"__name__": "__main__"})


def run_shell(block: Block) -> None:
    """Run the `anymamba` lines of a block and check its other lines."""
    for line in block.text.splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            if words and Path(words[0]).name == "anymamba":
                run_verb(words[1:])
            elif words:
                check_command(words)


def run_verb(words: list[str]) -> None:
    """Run an `anymamba` command with few steps, or only check its options if it needs something that is missing."""
    verb, stdin = words[0], b""
    if "<" in words:
        words, stdin = words[: words.index("<")], Path(words[-1]).read_bytes()
    if verb.startswith("-"):
        assert app.main(words) == 0, words
        return
    check_options(verb, words[1:])
    foreign = any(word.startswith(("state-spaces/", "pretrained=state-spaces")) for word in words)
    too_long = "--length-warmup" in words
    if foreign or too_long or verb in ONLY_CHECKED or (verb == "experiment" and "list" not in words):
        return
    quick = [] if {"--help", "--resume"} & {*words} else QUICK.get(verb, [])
    quick = quick[2:] if "--from" in words else quick  # --from takes the sizes of the other model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert app.main([*words, *quick]) == 0, words


def check_options(verb: str, words: list[str]) -> None:
    """Every option of a command exists."""
    assert verb in app.VERBS, verb
    help_text = help_of(verb)
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", help_text), f"{option} of `anymamba {verb}` does not exist"


def help_of(verb: str) -> str:
    """The help text of a verb."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert app.main([verb, FULL_HELP.get(verb, "--help")]) == 0
    return out.getvalue()


def check_command(words: list[str]) -> None:
    """Other commands are in the list of known ones, and the files and targets that they name exist."""
    line = " ".join(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert [t for t in words[1:] if "=" not in t and t not in targets] == [], line
    elif "pip" in line and "install" in words:
        check_installation(words[words.index("install") + 1 :])
    elif "pip" in line and "wheel" in words:
        return
    elif words[1:2] == ["-m"] and words[2].startswith("benchmarks"):
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] == "benchmarks", line
    elif words[1:3] == ["-m", "pytest"]:
        assert [w for w in words[3:] if w.startswith("tests/") and not (ROOT / w).exists()] == [], line
    else:
        assert line.startswith(OTHER_COMMANDS), f"`{line}` is not in the list of known commands"


def check_installation(words: list[str]) -> None:
    """The files, folders and extras that pip installs exist in the repository."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        place, _, names = word.partition("[")
        if place.startswith(".") or place.endswith(".txt"):
            assert (ROOT / place).exists(), word
        unknown = set(filter(None, names.rstrip("]").split(","))) - set(extras)
        assert not unknown, f"extras that do not exist: {unknown}"


@pytest.fixture(scope="session")
def model_of_bytes(tmp_path_factory) -> Path:
    """An untrained byte model with its tokenizer."""
    from anymamba import LanguageModel, ModelConfig
    from anymamba.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("model") / "nano"
    LanguageModel(ModelConfig(d_model=32, n_layers=1, vocab_size=257)).save_pretrained(folder, load_tokenizer(None))
    return folder


def prepare(folder: Path, model: Path, text: str) -> None:
    """Make the files that the commands of a page name, except those that the page makes itself."""
    for place in ("texts", "notes", "held-out"):
        (folder / place).mkdir()
        for i in range(3):
            (folder / place / f"{i}.md").write_text(f"line {i} of a text\n" * 60)
    bases = random.Random(0).choices("ACGT", k=20_000)
    (folder / "genome.fa.gz").write_bytes(gzip.compress(f">chr1\n{''.join(bases)}\n".encode()))
    (folder / "regions.bed").write_text("chr1\t0\t9000\nchr1\t9500\t20000\n")
    (folder / "more.jsonl").write_text('{"body": "a text of a row"}\n' * 200)
    (folder / "prompt.txt").write_text("def ")
    if "anymamba dna" in text:
        prepare_dna(folder, "".join(bases))
    for place in ("runs/demo", "runs/x", "mamba-130m"):
        if f"--out {place}" not in text:
            shutil.copytree(model, folder / place)


def prepare_dna(folder: Path, bases: str) -> None:
    """A model of DNA, a variant of the genome, and labelled and other sequences."""
    from anymamba import LanguageModel, ModelConfig
    from anymamba.data.dna import DnaTokenizer

    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=12, pad_vocab_multiple=16))
    model.save_pretrained(folder / "runs" / "dna", DnaTokenizer())
    alt = "A" if bases[99] != "A" else "C"
    (folder / "variants.vcf").write_text(f"##fileformat=VCFv4.2\nchr1\t100\t.\t{bases[99]}\t{alt}\t.\t.\t.\n")
    rows = [f"{bases[20 * i : 20 * i + 20]},{i % 2}" for i in range(40)]
    (folder / "promoters.csv").write_text("\n".join(["seq,label", *rows]) + "\n")
    (folder / "new.fa").write_text(">one\nACGT\n")


def test_a_block_that_fails_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run_python("1 / 0", "here")
    for line in ("anymamba eval --no-such-option", "make no-such-target", 'pip install ".[no-such-extra]"', "rm -r x"):
        with pytest.raises(AssertionError):
            run_shell(Block("sh", None, line))


# ------------------------------------------------------------------------------------------------- how to add something

IN_THIS_FOLDER = """
import shlex, sys
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]  # the editable install's finder
sys.path.insert(0, "src")
import anymamba, pytest
assert anymamba.__file__.startswith(sys.argv[1]), anymamba.__file__
anymamba.__path__.append(sys.argv[2])
for line in sys.argv[3:]:
    code = pytest.main([*shlex.split(line), "-q", "-x"])
    if code:
        sys.exit(f"{line}: {code}")
"""
"""Runs pytest with several lines of arguments on the package in the current folder instead of the installed one."""


@pytest.mark.parametrize("page", [p for p in PAGES if instructions(p)], ids=name)
def test_a_page_on_how_to_add_something_can_be_followed(page, tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "site", "runs", "build", "*.svg", "*.pyc"))
    for block in instructions(page):
        follow(block, clone)
    shell = "".join(block.text for block in runnable(page) if block.language == "sh")
    tests = re.findall(r"^python -m pytest (.*)$", shell, re.MULTILINE)
    assert tests, "the page runs no tests"
    built = importlib.util.find_spec("anymamba._build_info")  # in the folder of the compiled module
    compiled = "" if built is None or built.origin is None else str(Path(built.origin).parent)
    command = [sys.executable, "-c", IN_THIS_FOLDER, str(clone), compiled, *tests]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}"


def follow(block: Block, clone: Path) -> None:
    """Follow a block with a title: write a new file, or change an existing one."""
    assert block.title is not None
    path = clone / block.title
    if block.language != "diff":
        assert not path.exists(), f"{block.title} exists already"
        path.write_text(block.text, encoding="utf-8")
        return
    lines, text = block.text.splitlines(), path.read_text(encoding="utf-8")
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in signs) for signs in (" -", " +"))
    assert text.count(before) == 1, f"{block.title} has these lines {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


# ------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("page", sorted((DOCS / "layers").glob("*.md")), ids=name)
def test_every_page_of_a_layer_shows_python(page):
    assert any(b.language == "python" for b in blocks(page))


def test_every_mixer_is_on_a_page_and_in_the_overview():
    from anymamba.models.mixers import MIXERS

    pages = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "layers").glob("*.md") if p.stem != "index")
    overview = (DOCS / "layers" / "index.md").read_text(encoding="utf-8")
    assert [m for m in MIXERS if f'"{m}"' not in pages or f"`{m}`" not in overview] == []


def test_the_table_of_costs_is_what_the_code_counts():
    from benchmarks.layer_costs import run

    assert run() in (DOCS / "layers" / "index.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- file map


def file_map() -> list[tuple[str, str]]:
    """The path and description of each line of the map; an entry's folder is the last one above it with less indent."""
    block = next(b for b in blocks(MAP_PAGE) if b.language == "text")
    found, folders = [], {}
    for line in block.text.splitlines():
        entry, depth = line.split()[0], len(line) - len(line.lstrip())
        folders = {level: folder for level, folder in folders.items() if level < depth}
        found.append(("".join(folders.values()) + entry, line.strip().removeprefix(entry).strip()))
        if entry.endswith("/"):
            folders[depth] = entry
    return found


def test_the_map_has_every_folder_of_the_package_and_at_most_seventy_lines():
    lines = file_map()
    named = {path.rstrip("/") for path, _ in lines}
    named |= {parent.as_posix() for path in named for parent in Path(path).parents}
    folders = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "src").rglob("*.py")}
    folders |= {p.parent.name for p in ROOT.glob("[!.]*/*") if p.suffix in (".py", ".cpp")}
    unlisted = folders - named
    assert sorted(f for f in unlisted if not f.startswith("src/anymamba/experiments/")) == []
    assert len(lines) <= 70


def test_the_map_names_what_exists_and_describes_it():
    assert [path for path, _ in file_map() if not (ROOT / path).exists()] == []
    assert [path for path, words in file_map() if not words] == []


# ------------------------------------------------------------------------------------------------- numbers


def numbers(text: str) -> list[str]:
    """The numbers with a decimal point in the tables of a text."""
    return [n for line in text.splitlines() if line.startswith("|") for n in re.findall(r"(?<![\w.^])\d+\.\d+", line)]


def without_source(page: Path, sources: list[Path]) -> list[str]:
    """The numbers in a page's tables that no number of the sources rounds to."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    measured = {float(number) for number in re.findall(r"\d+\.\d+|\d+", text)}
    return [n for n in numbers(page.read_text(encoding="utf-8")) if not any(rounds_to(value, n) for value in measured)]


def rounds_to(value: float, number: str) -> bool:
    return f"{value:.{len(number.partition('.')[2])}f}" == number


@pytest.mark.parametrize("page", ["README.md", "docs/experiments.md", "docs/drop-in.md"])
def test_numbers_are_those_of_the_results(page):
    sources = [ROOT / "benchmarks" / "RESULTS.md", *sorted((DOCS / "experiments").glob("*/report.md"))]
    assert len(numbers((ROOT / page).read_text(encoding="utf-8"))) >= 3
    assert without_source(ROOT / page, sources) == []


def test_a_number_without_a_source_is_found(tmp_path):
    (tmp_path / "page.md").write_text("| a | 1.25 | 3.4 |\n9.9 in a sentence\n")
    (tmp_path / "results.md").write_text("took 1.249 s, ratio 3.36")
    assert without_source(tmp_path / "page.md", [tmp_path / "results.md"]) == []
    (tmp_path / "results.md").write_text("took 1.259 s, ratio 3.36")
    assert without_source(tmp_path / "page.md", [tmp_path / "results.md"]) == ["1.25"]


# ------------------------------------------------------------------------------------------------- names and links


@pytest.fixture(scope="session")
def names():
    """The functions of docs/hooks/names.py, which the build of the site calls."""
    return runpy.run_path(str(DOCS / "hooks" / "names.py"))


def test_every_public_name_has_a_page(names):
    assert names["without_page"](ROOT / "src", DOCS) == []


def test_a_name_without_a_page_is_found(names, tmp_path):
    package = tmp_path / "src" / "anymamba"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import not_installed\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from anymamba.layers.a import A\n__all__ = ['A']\n"
    )
    (package / "layers" / "__init__.py").write_text("")
    (package / "layers" / "a.py").write_text("class A: ...\ndef b(): ...\ndef _c(): ...\n")
    (package / "layers" / "d.py").write_text("def e(): ...\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    for text, missing in (
        ("", ["layers.a.A", "layers.a.b", "layers.d.e"]),
        ("::: anymamba.A\n", ["layers.a.b", "layers.d.e"]),
        ("::: anymamba.layers.a\n", ["layers.d.e"]),
        ("::: anymamba.layers.a\n\n::: anymamba.layers.d.e\n", []),
        ("::: anymamba.layers\n", []),
    ):
        (docs / "page.md").write_text(text)
        assert names["without_page"](tmp_path / "src", docs) == [f"anymamba.{m}" for m in missing]


def test_the_overview_of_the_reference_lists_what_the_package_exports():
    import anymamba

    page = (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\[anymamba\.\1\]", page, re.MULTILINE)
    assert sorted(listed) == sorted(n for n in anymamba.__all__ if not n.startswith("__"))


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = {t.split("#")[0] for t in re.findall(r"\]\((?!https?:)([^)]+)\)", text)} - {""}
    assert [t for t in sorted(targets) if not (ROOT / t).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_contributing_tells_how_long_functions_and_files_are():
    """To within 20 %, so that the numbers do not have to change with every commit."""
    files = sorted((ROOT / "src").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    definitions = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)]
    functions = sorted(node.end_lineno - node.lineno + 1 for node in definitions)
    lengths = sorted(len(text.splitlines()) for text in texts)
    counted = [sizes[int(share * len(sizes))] for sizes in (functions, lengths) for share in (0.5, 0.9)]
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"median function has (\d+) lines, and one in ten has more than (\d+)\. "
        r"The median file has (\d+) lines, and one in ten has more than (\d+)\.",
        text,
    )
    assert said is not None
    assert [int(number) for number in said.groups()] == pytest.approx(counted, rel=0.2), counted
