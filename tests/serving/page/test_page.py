"""The page in a real browser: what a user can do with a mouse, with the keyboard and on a phone."""

from __future__ import annotations

import json
import re

import pytest
from live_server import live

from anymamba.serving.security import Guard

SEND = "#composer .main"


def expect(thing):
    """playwright's `expect`; imported late, because the package may be missing."""
    from playwright.sync_api import expect as expected

    return expected(thing)


def settle(page, label: str = "Send") -> None:
    """Wait until no answer is being written."""
    expect(page.locator(SEND)).to_have_text(label)


def setting(page, name: str, value: object) -> None:
    """Change a setting."""
    if not page.locator("#settings").is_visible():
        page.click("#open-settings")
    page.fill(f"#set-{name}", str(value))


def ask(page, text: str) -> None:
    """Send a chat message and wait for the answer."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    expect(page.locator(".assistant").last.locator(".cost")).to_contain_text("remembered")
    settle(page)


def complete(page, text: str) -> None:
    """Type at the cursor and let the model go on."""
    page.locator("#input").press_sequentially(text)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#composer .cost")).to_contain_text("remembered")
    settle(page, "Continue")


def sent(page, act) -> dict:
    """What the page asks the server for when `act` is called."""
    with page.expect_request(lambda request: request.method == "POST") as caught:
        act()
    return json.loads(caught.value.post_data)


@pytest.fixture
def chat(open_page, server):
    page = open_page(server)
    expect(page.locator("#model")).to_have_text("nano")
    setting(page, "max_tokens", 12)
    return page


@pytest.fixture
def text(chat):
    chat.click("#mode-complete")
    return chat


# ------------------------------------------------------------------------------------------------------------ chat


def test_a_chat_goes_on_turn_by_turn(chat):
    ask(chat, "Hello")
    body = sent(chat, lambda: ask(chat, "And?"))
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user"] and body["messages"][0]["content"] == "Hello"
    assert body["stream"] and body["max_completion_tokens"] == 12 and body["temperature"] == 0.8
    assert len(body["session"]) == 32, "the state is kept under the session's name"
    expect(chat.locator(".message")).to_have_count(4)
    expect(chat.locator("#session-list .current")).to_contain_text("Hello")
    cost = chat.locator(".assistant .cost").last.text_content()
    rate = r"( · [\d,]+ tokens/s)?"  # there is none where all tokens arrive at once
    assert re.search(rf"12 tokens{rate} · first after .* s · [1-9]\d* of \d+ prompt tokens remembered", cost), cost
    expect(chat.locator("#session-list .current")).to_contain_text("tokens kept")


def test_stop_keeps_what_there_is(chat, server):
    setting(chat, "max_tokens", 5000)
    chat.fill("#input", "Hello")
    chat.click(SEND)
    expect(chat.locator(SEND)).to_have_text("Stop")
    expect(chat.locator(".assistant .token").nth(20)).to_be_attached()
    chat.keyboard.press("Escape")
    settle(chat)
    expect(chat.locator(".assistant .cost")).to_contain_text("stopped by you")
    assert chat.locator(".assistant .token").count() < 4900
    for _ in range(100):
        if server.application.served.worker.n_rows == 0:
            return
        chat.wait_for_timeout(50)
    raise AssertionError("the server still writes the answer")


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_another_session_is_opened_while_an_answer_is_written(chat, mode):
    chat.click(f"#mode-{mode}")
    setting(chat, "max_tokens", 5000)
    chat.locator("#input").press_sequentially("Long")
    chat.keyboard.press("Control+Enter")
    expect(chat.locator("#view .token").nth(20)).to_be_attached()
    chat.click("#new")
    expect(chat.locator("#view .token")).to_have_count(0)
    settle(chat, "Send" if mode == "chat" else "Continue")
    setting(chat, "max_tokens", 4)
    ask(chat, "Short") if mode == "chat" else complete(chat, "Short")
    chat.get_by_role("button", name="Long").first.click()
    expect(chat.locator(".cost").last).to_contain_text("stopped by you")
    assert chat.locator("#view .token").count() > 20
    chat.get_by_title("Delete Long").click()
    expect(chat.locator("#session-list li")).to_have_count(1)
    chat.reload()
    expect(chat.locator("#model")).to_have_text("nano")
    expect(chat.locator("#session-list li")).to_have_count(1)


def test_an_earlier_message_is_edited_and_the_answer_goes_on_from_there(chat):
    ask(chat, "One")
    ask(chat, "Two")
    chat.locator(".user").first.hover()
    chat.locator(".user").first.get_by_title("Edit and send from here").click()
    chat.fill(".edit", "Changed")
    body = sent(chat, lambda: chat.keyboard.press("Control+Enter"))
    assert [message["content"] for message in body["messages"]] == ["Changed"]
    settle(chat)
    expect(chat.locator(".message")).to_have_count(2)
    expect(chat.locator(".user .version")).to_have_text("2/2")
    chat.locator(".user").get_by_title("Earlier version").click()
    assert chat.evaluate("document.querySelector('#view').scrollTop") == 0, "the view stays at the message"
    expect(chat.locator(".message")).to_have_count(4), "the first version still has all that came after it"
    expect(chat.locator(".user .text").first).to_have_text("One")


def test_an_answer_is_branched_and_compared(chat):
    ask(chat, "Hello")
    chat.get_by_title("Try again").click()
    expect(chat.locator(".assistant .version")).to_have_text("2/2")
    settle(chat)
    chat.keyboard.press("Alt+KeyC")
    expect(chat.locator(".column")).to_have_count(2)
    first = chat.locator(".column .text").first.text_content()
    chat.get_by_role("button", name="Go on with this one").first.click()
    expect(chat.locator(".column")).to_have_count(0)
    assert chat.locator(".assistant .text").text_content() == first
    ask(chat, "More")
    expect(chat.locator(".message")).to_have_count(4)


def test_several_answers_at_once(chat):
    setting(chat, "answers", 3)
    setting(chat, "seed", 7)
    chat.fill("#input", "Hello")
    chat.click(SEND)
    expect(chat.locator(".column")).to_have_count(3)
    settle(chat)
    texts = [chat.locator(".column .text").nth(i).text_content() for i in range(3)]
    assert len(set(texts)) == 3, "each has a seed of its own"


def test_each_version_has_a_seed_of_its_own(chat):
    setting(chat, "seed", 7)
    assert sent(chat, lambda: ask(chat, "Hello"))["seed"] == 7
    assert sent(chat, chat.get_by_title("Try again").click)["seed"] == 8
    settle(chat)
    chat.click("#mode-complete")
    assert sent(chat, lambda: complete(chat, "abc"))["seed"] == 7
    assert sent(chat, chat.get_by_title("Another version").click)["seed"] == 8
    settle(chat, "Continue")


def test_an_answer_can_be_rewritten(chat):
    ask(chat, "Hello")
    chat.get_by_title("Edit this answer").click()
    chat.fill(".edit", "My own words")
    chat.get_by_role("button", name="Keep").click()
    body = sent(chat, lambda: ask(chat, "Go on"))
    assert body["messages"][1] == {"role": "assistant", "content": "My own words"}


def test_a_system_message_is_sent(chat):
    chat.locator(".system summary").click()
    chat.fill("#system", "Be brief")
    chat.locator("#system").blur()
    body = sent(chat, lambda: ask(chat, "Hello"))
    assert body["messages"][0] == {"role": "system", "content": "Be brief"}


# ------------------------------------------------------------------------------------------------------- probabilities


def test_probabilities_on_hover_and_with_the_arrow_keys(chat):
    ask(chat, "Hello")
    chat.locator(".assistant .text").focus()
    chat.keyboard.press("ArrowRight")
    card = chat.locator("#token-card")
    expect(card.locator(".chosen")).to_have_count(1)
    first = card.text_content()
    assert card.locator(".line").count() >= 5 and re.search(r"\d %.*Log-probability -?\d+\.\d\d", first)
    chat.keyboard.press("ArrowRight")
    assert card.text_content() != first
    chat.keyboard.press("Escape")
    expect(card).to_be_hidden()
    for place in range(12):
        token = chat.locator(".assistant .token").nth(place)
        if token.text_content().isprintable() and token.is_visible():
            token.hover()
            break
    expect(card).to_be_visible()
    chat.check("#set-colour")
    assert chat.locator("body.coloured .assistant .token").count() > 0


def test_another_token_goes_on_from_its_place(text):
    complete(text, "abc")
    before = text.locator("#input").text_content()
    tokens = text.locator("#input .token")
    place = next(i for i in range(3, 12) if tokens.nth(i).text_content().isalnum())
    start = text.evaluate(
        "i => { const t = document.querySelectorAll('#input .token')[i]; let n = 0;"
        " for (let e = t.previousSibling; e; e = e.previousSibling) n += e.textContent.length; return n; }",
        place,
    )
    tokens.nth(place).hover()
    other = text.locator("#token-card button.line").first
    token = other.locator("code").text_content()
    body = sent(text, other.click)
    assert body["prompt"][:start] == before[:start]
    assert len(body["prompt"]) > start and token in ("␣", "⏎", "⇥", body["prompt"][start:])
    settle(text, "Continue")
    expect(text.locator(".bar .version")).to_have_text("2/2")


def test_an_answer_goes_on_from_another_token(chat):
    ask(chat, "Hello")
    before = chat.locator(".assistant .text").text_content()
    tokens = chat.locator(".assistant .token")
    place = next(i for i in range(3, 12) if tokens.nth(i).text_content().isalnum())
    start = before[: sum(len(tokens.nth(i).text_content()) for i in range(place))]
    tokens.nth(place).hover()
    other = chat.locator("#token-card button.line").first
    token = other.locator("code").text_content()
    body = sent(chat, other.click)
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    last = body["messages"][-1]
    assert last["role"] == "assistant" and last["content"][:-1] == start and token in ("␣", last["content"][-1])
    settle(chat)
    expect(chat.locator(".assistant .version")).to_have_text("2/2")
    expect(chat.locator(".assistant .cost")).to_contain_text("remembered")
    text = chat.locator(".assistant .text").text_content()
    assert text.startswith(last["content"]) and len(text) == len(last["content"]) + 12
    chat.locator(".assistant").get_by_title("Earlier version").click()
    expect(chat.locator(".assistant .text")).to_have_text(before)
    chat.locator(".assistant .text").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        chat.keyboard.press(key)
    expect(chat.locator("#token-card button").first).to_be_focused()
    assert sent(chat, lambda: chat.keyboard.press("Enter"))["continue_final_message"] is True
    settle(chat)


def test_another_token_by_keyboard(text):
    complete(text, "abc")
    for _ in range(6):
        text.keyboard.press("ArrowLeft")
    text.keyboard.press("Alt+KeyP")
    expect(text.locator("#token-card button").first).to_be_focused()
    assert sent(text, lambda: text.keyboard.press("Enter"))["prompt"].startswith("abc")
    settle(text, "Continue")
    expect(text.locator("#token-card")).to_be_hidden()


def test_without_a_database_the_page_still_works(open_page, server, browser):
    page = open_page(server)
    page.add_init_script(
        "Object.defineProperty(window, 'indexedDB', { value: { open() { throw new Error('denied'); } } })"
    )
    page.reload()
    expect(page.locator("#notice")).to_contain_text("This browser keeps no conversations: denied")
    setting(page, "max_tokens", 4)
    ask(page, "Hello")


# ------------------------------------------------------------------------------------------------------------- a text


def test_a_text_is_edited_in_the_middle_and_goes_on_from_the_cursor(text):
    complete(text, "The quick brown fox")
    whole = text.locator("#input").text_content()
    assert whole.startswith("The quick brown fox") and len(whole) > 20
    text.keyboard.press("Control+Home")
    for _ in "The quick":
        text.keyboard.press("ArrowRight")
    text.keyboard.type(" red")
    expect(text.locator(SEND)).to_have_text("Continue from the cursor")
    body = sent(text, lambda: text.keyboard.press("Control+Enter"))
    assert body["prompt"] == "The quick red" and body["logprobs"] == 5
    settle(text, "Continue")
    assert text.locator("#input").text_content().startswith("The quick red")
    expect(text.locator(".bar .version")).to_have_text("3/3"), "the edited text is a version, too"
    text.keyboard.press("Alt+KeyK")
    expect(text.locator("#input")).to_have_text(whole.replace("quick", "quick red"), use_inner_text=False)
    text.keyboard.press("Alt+KeyK")
    assert text.locator("#input").text_content() == whole


def test_versions_of_a_text_are_compared(text):
    complete(text, "Begin")
    text.get_by_title("Another version").click()
    expect(text.locator(".bar .version")).to_have_text("2/2")
    settle(text, "Continue")
    text.get_by_title("Compare versions").click()
    expect(text.locator(".column")).to_have_count(2)
    assert text.locator(".common").text_content().startswith("Begin")
    text.get_by_role("button", name="Go on with this one").first.click()
    expect(text.locator(".bar .version")).to_have_text("1/2")


def test_edits_keep_the_probabilities_of_what_did_not_change(text):
    cases = text.evaluate(
        """async () => {
          const { edited, textOf, grow, cut } = await import("/js/pieces.js");
          const m = (text) => ({ text, scores: [{ token: text, p: 1, top: [] }] });
          const pieces = [{ text: "ab" }, m("cd"), m("ef"), m("gh")];
          const shown = (pieces) => pieces.map((piece) => (piece.scores ? `[${piece.text}]` : piece.text)).join("|");
          const grown = [];
          for (const piece of [{ text: "", scores: [1] }, { text: "é", scores: [2] }, m("x")]) grow(grown, piece);
          return [
            ...["abcdefgh", "abcdXefgh", "abcefgh", "Xabcdefgh", "abcdefghX", "", "abcdYh"]
              .map((t) => shown(edited(pieces, t))),
            textOf(edited(pieces, "abcdYh")), shown(cut(pieces, 5)), JSON.stringify(grown[0]), grown.length,
          ];
        }"""
    )
    assert cases == [
        *("ab|[cd]|[ef]|[gh]", "ab|[cd]|X|[ef]|[gh]", "abc|[ef]|[gh]", "Xab|[cd]|[ef]|[gh]", "ab|[cd]|[ef]|[gh]|X"),
        *("", "ab|[cd]|Yh", "abcdYh", "ab|[cd]|e", '{"text":"é","scores":[1,2]}', 2),
    ]


def test_text_is_never_read_as_html(chat):
    trap = "<img src=x onerror=\"document.title='caught'\"><b>bold</b>"
    ask(chat, trap)
    assert chat.locator(".user .text").text_content() == trap
    chat.click("#mode-complete")
    complete(chat, trap)
    assert chat.locator("main img, main b, nav img, nav b").count() == 0 and chat.title() == "anymamba"


# ----------------------------------------------------------------------------------------------------------- sessions


def test_sessions_are_there_after_a_restart(open_page, writer, tmp_path):
    with live(writer, sessions=tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        page = open_page(server)
        expect(page.locator("#model")).to_have_text("nano")
        setting(page, "max_tokens", 8)
        setting(page, "temperature", 0)  # a random byte that is no letter would not come back as it was
        ask(page, "Remember me")
        page.click("#new")
        ask(page, "Another")
    page.fill("#input", "Is anybody there?")
    page.keyboard.press("Enter")
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached")
    with live(writer, sessions=tmp_path, port=port) as server:
        page.reload()
        expect(page.locator("#session-list li")).to_have_count(2)
        page.get_by_role("button", name="Remember me").first.click()
        expect(page.locator(".message")).to_have_count(2)
        ask(page, "What now?")
        cost = page.locator(".assistant .cost").last.text_content()
        remembered, prompt = map(int, re.search(r"(\d+) of (\d+) prompt tokens", cost).groups())
        assert 40 < remembered < prompt, "only what is new was read"
        page.get_by_title("Delete Remember me").click()
        expect(page.locator("#session-list li")).to_have_count(1)
        assert len(server.client.get("/v1/sessions").json()["data"]) == 1


@pytest.mark.parametrize("mode", ["chat", "complete"])
def test_a_message_waits_until_the_page_knows_the_model(open_page, server, mode):
    page = open_page(server)
    expect(page.locator("#model")).to_have_text("nano")
    setting(page, "max_tokens", 4)
    held = []
    page.route("**/v1/models", lambda route: held.append(route))
    page.reload()
    page.click(f"#mode-{mode}")

    def ask_early():
        page.fill("#input", "Quick")
        page.keyboard.press("Control+Enter")
        expect(page.locator(SEND)).to_have_text("Stop")
        held[0].continue_()

    body = sent(page, ask_early)
    assert len(body["session"]) == 32 and body["model"] == "nano", "else the state would not be kept"


def test_a_message_names_its_session_when_the_server_comes_back(open_page, writer, tmp_path):
    with live(writer, sessions=tmp_path) as server:
        page = open_page(server)
        expect(page.locator("#model")).to_have_text("nano")
        setting(page, "max_tokens", 4)
        page.route("**/v1/models", lambda route: route.abort())
        page.reload()
        expect(page.locator("#notice")).to_contain_text("The server cannot be reached")
        page.unroute("**/v1/models")
        assert len(sent(page, lambda: ask(page, "Back again"))["session"]) == 32


def test_sessions_of_other_clients_can_be_opened(open_page, writer, tmp_path):
    with live(writer, sessions=tmp_path) as server:
        server.good("/v1/completions", {"prompt": "Elsewhere", "max_tokens": 4, "session": "a/b <i>"})
        page = open_page(server)
        page.click("#others summary")
        page.get_by_title("Open as a text").click()
        expect(page.locator("#input")).to_contain_text("Elsewhere")
        body = sent(page, lambda: page.click(SEND))
        assert body["session"] == "a/b <i>"


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_key_is_asked_for(open_page, writer):
    with live(writer, guard=Guard(["secret"])) as server:
        page = open_page(server)
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key-input", "secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("nano")
        setting(page, "max_tokens", 4)
        ask(page, "Hello")
        assert page.evaluate("localStorage.getItem('anymamba-key')") is None, "the key is not kept for long"


def test_a_model_without_a_template_begins_with_a_text(open_page, writer):
    with live(writer, template=None) as server:
        page = open_page(server)
        expect(page.locator("#mode-complete")).to_have_attribute("aria-pressed", "true")
        page.click("#mode-chat")
        page.fill("#input", "Hello")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_contain_text("--chat-template")
        page.get_by_role("button", name="Complete instead").click()
        expect(page.locator("#mode-complete")).to_have_attribute("aria-pressed", "true")


def test_the_server_s_own_words_for_a_wrong_setting(chat):
    setting(chat, "temperature", 1)
    chat.evaluate("document.querySelector('#set-top_p').min = -1")
    setting(chat, "top_p", -1)
    chat.fill("#input", "Hello")
    chat.click(SEND)
    expect(chat.locator("#notice")).to_contain_text("top_p")
    setting(chat, "top_p", 1)
    chat.get_by_title("Send again").click()
    expect(chat.locator(".assistant .cost")).to_contain_text("remembered")


# ------------------------------------------------------------------------------------------------- keyboard and phone


def test_everything_can_be_reached_by_keyboard(chat):
    ask(chat, "First")
    chat.keyboard.press("Alt+KeyN")
    expect(chat.locator(".message")).to_have_count(0)
    ask(chat, "Second")
    chat.keyboard.press("Alt+ArrowDown")
    expect(chat.locator(".user .text")).to_have_text("First")
    chat.keyboard.press("Alt+ArrowUp")
    expect(chat.locator(".user .text")).to_have_text("Second")
    seen = set()
    for _ in range(60):
        chat.keyboard.press("Tab")
        seen.add(
            chat.evaluate(
                "document.activeElement.title || document.activeElement.id || document.activeElement.textContent"
            )
        )
    assert {"Settings", "Try again", "Edit this answer", "input", "set-temperature", "New session"} - seen <= {
        "New session"
    }
    names = chat.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role=textbox]")]
          .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).length"""
    )
    assert names == 0, "each control has a name for screen readers"


def test_a_phone(open_page, server):
    page = open_page(server, viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True)
    expect(page.locator("#new")).to_be_hidden()
    page.locator("#open-settings").tap()
    page.fill("#set-max_tokens", "12")
    page.locator("#open-settings").tap()
    page.fill("#input", "Hello, this is a message with averyveryveryveryveryveryveryveryveryverylongword in it")
    page.locator(SEND).tap()
    settle(page)
    expect(page.locator(".assistant .cost")).to_contain_text("remembered")
    page.locator("#open-sessions").tap()
    expect(page.locator("#session-list")).to_contain_text("Hello")
    page.locator("#new").tap()
    expect(page.locator("#new")).to_be_hidden()
    outside = """() => [...document.querySelectorAll("button, textarea, .message")]
      .map((e) => e.getBoundingClientRect())
      .filter((box) => box.width && (box.left < 0 || box.right > innerWidth + 1)).length"""
    assert page.evaluate(outside) == 0 and page.evaluate("document.documentElement.scrollWidth") <= 360


def test_light_and_dark(chat):
    ground = "getComputedStyle(document.body).backgroundColor"
    before = chat.evaluate(ground)
    chat.click("#theme")
    after = chat.evaluate(ground)
    chat.reload()
    assert before != after == chat.evaluate(ground), "the choice is kept"
    chat.emulate_media(color_scheme="dark")
    assert chat.evaluate(ground) == after
