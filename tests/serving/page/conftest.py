from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from live_server import Live, live

from anymamba.data.tokenizer import load_tokenizer
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, while a module runs: playwright's event loop would be in the way of other tests."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs the package playwright (pip install playwright)"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        sync_api.expect.set_options(timeout=20_000)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def writer(tmp_path_factory) -> Path:
    """A byte-level model that writes random lower-case words and never ends, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "writer"
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(d_model=16, n_layers=1, vocab_size=257, tie_embeddings=False))
    with torch.no_grad():
        model.embedding.weight.normal_()
        model.embedding.weight[:, 0] = 5.0  # the first channel is nearly constant, so its weights are biases
        model.head.weight.normal_()
        model.head.weight[:, 0] = -4.0
        model.head.weight[[32, *range(97, 123)], 0] = 4.0
    model.save_pretrained(folder, load_tokenizer(None))
    return folder


@pytest.fixture(scope="session")
def server(writer, tmp_path_factory) -> Iterator[Live]:
    """A server that tests share."""
    with live(writer, sessions=tmp_path_factory.mktemp("sessions")) as running:
        yield running


@pytest.fixture
def open_page(browser) -> Iterator:
    """Open the page of a server in a window of its own. At the end: no errors, and nothing was asked for elsewhere."""
    contexts, problems, foreign = [], [], []

    def open(server: Live, **options):
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        own = urlsplit(server.url).netloc
        page.on("request", lambda request: urlsplit(request.url).netloc != own and foreign.append(request.url))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(server.url)
        return page

    yield open
    for context in contexts:
        context.close()
    problems = [problem for problem in problems if "Failed to load resource" not in problem]  # answers such as 401
    assert not problems and not foreign
