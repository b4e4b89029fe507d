"""The build of the site stops at what must not be published; needs the tools of the extra `docs`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for tool in ("material", "mkdocstrings", "mkdocstrings_handlers.python"):
    pytest.importorskip(tool, reason="needs the extra docs; make docs installs it")
yaml = pytest.importorskip("yaml", reason="needs the extra docs; make docs installs it")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = '''"""A package."""

__all__ = ["f"]


def f(x: int) -> int:
    """x.

    Returns x.
    """
    return x
'''


@pytest.fixture
def site(tmp_path) -> Path:
    """A project with our settings and hooks, one page and one public name."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings["nav"] = [{"Home": "index.md"}]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    shutil.copytree(ROOT / "docs" / "hooks", tmp_path / "docs" / "hooks")
    (tmp_path / "src" / "anymamba").mkdir(parents=True)
    (tmp_path / "src" / "anymamba" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n## Part\n\n[here](#part)\n\n::: anymamba.f\n")
    return tmp_path


def build(site: Path) -> tuple[int, str]:
    """Build as `make docs` does; returns the exit code and the output."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=site,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_good_site_is_built_with_our_docstrings(site):
    code, said = build(site)
    assert code == 0, said
    page = (site / "site" / "index.html").read_text(encoding="utf-8")
    assert 'id="anymamba.f"' in page and "<strong>Returns</strong> x." in page
    assert not (site / "site" / "hooks").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](index.md#nowhere)", "nowhere"),
        ("[f][anymamba.nothing]", "anymamba.nothing"),
        ("::: anymamba.nothing", "anymamba.nothing"),
        ('<img src="https://example.org/x.png">', "https://example.org/x.png; put the file into docs/"),
    ],
)
def test_what_leads_nowhere_or_elsewhere_is_refused(site, text, complaint):
    page = site / "docs" / "index.md"
    page.write_text(f"{page.read_text()}\n{text}\n")
    code, said = build(site)
    assert code != 0 and complaint in said


def test_a_public_name_without_a_page_is_refused(site):
    module = site / "src" / "anymamba" / "layers"
    module.mkdir()
    (module / "new.py").write_text('def g() -> None:\n    """Nothing."""\n')
    code, said = build(site)
    assert code != 0 and "1 public names have no page: anymamba.layers.new.g; add `::: NAME`" in said


def test_a_page_that_is_not_in_the_menu_is_refused(site):
    (site / "docs" / "lost.md").write_text("# Lost\n")
    code, said = build(site)
    assert code != 0 and "lost.md" in said


def test_an_included_file_has_links_of_the_site(site):
    (site / "GUIDE.md").write_text("# Guide\n\n[home](docs/index.md) [again](GUIDE.md) [out](https://example.org)\n")
    (site / "docs" / "guide.md").write_text("---\ninclude: GUIDE.md\n---\n")
    (site / "docs" / "more.md").write_text("---\ninclude: GUIDE.md\n---\n# More\n")
    settings = yaml.safe_load((site / "mkdocs.yml").read_text())
    settings["nav"] += [{"Guide": "guide.md"}, {"More": "more.md"}]
    (site / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    code, said = build(site)
    assert code == 0, said
    page = (site / "site" / "guide.html").read_text(encoding="utf-8")
    assert all(f'href="{target}"' in page for target in ("index.html", "guide.html", "https://example.org"))
    more = (site / "site" / "more.html").read_text(encoding="utf-8")
    assert 'id="guide"' in page and 'id="more"' in more and 'id="guide"' not in more
