"""The README tells the truth: its map names every file that exists and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PAGES = sorted((ROOT / "docs" / "layers").glob("*.md"))
MAP = re.search(r"^## File map\n.*?^```text\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def mapped_files() -> set[str]:
    """The paths of the map: a name's folder is the last one before it that is indented less."""
    assert MAP is not None, "the README has no section `## File map` with a block of text"
    found, folders = set(), {}
    for line in MAP.group(1).splitlines():
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        parents = "".join(folder for level, folder in sorted(folders.items()) if level < depth)
        if name.endswith("/"):
            folders = {level: folder for level, folder in folders.items() if level < depth} | {depth: name}
        found.add(parents + name)
    return found


def test_map_names_every_module():
    named = mapped_files()
    files = [p for folder in ("src", "benchmarks") for p in (ROOT / folder).rglob("*.py") if p.name != "__init__.py"]
    missing = sorted(str(p.relative_to(ROOT)) for p in files if p.relative_to(ROOT).as_posix() not in named)
    assert not missing, f"not in the README's map: {missing}"


def test_map_names_nothing_else():
    missing = sorted(name for name in mapped_files() if not (ROOT / name).exists())
    assert not missing, f"in the README's map, but not there: {missing}"


def test_map_says_something_about_each_file():
    assert MAP is not None
    lines = [line.split() for line in MAP.group(1).splitlines()]
    bare = [words[0] for words in lines if len(words) < 2 and not words[0].endswith("/")]
    assert not bare, f"without a word: {bare}"


def test_there_are_examples():
    assert len(PYTHON_BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_examples_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "anymamba.compat" in PYTHON_BLOCKS[number]:  # it changes what other tests import
        subprocess.run([sys.executable, "-c", PYTHON_BLOCKS[number]], check=True, timeout=300)
        return
    namespace: dict[str, object] = {}
    exec(compile(PYTHON_BLOCKS[number], f"README.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_of_the_layers_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, f"{page.name} shows no Python"
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})


def test_every_mixer_is_on_a_page():
    from anymamba.models.mixers import MIXERS

    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in MIXERS if f'"{name}"' not in text] == []


def test_the_table_of_layers_is_what_the_code_counts():
    from benchmarks.layer_costs import run

    assert run() in README


def test_command_line_examples_name_real_flags():
    from anymamba.cli import app

    for line in re.findall(r"^\s*(?:\.venv/bin/)?anymamba (.*)$", README, re.MULTILINE):
        verb, *words = line.split("#")[0].split()
        assert verb in app.VERBS, line
        module = __import__(app.MODULES[verb], fromlist=["command"])
        help_text = help_of(module)
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", help_text), f"{flag} of `anymamba {line}` does not exist"


def help_of(module) -> str:
    """What a verb prints for --help."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        module.command(["--help"])
    return out.getvalue()
