"""The page, driven in a real browser: talking, comparing, going back, files, languages; and nothing leaves the host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.serve.live import serving
from tests.serve.test_api import opened
from tests.tiny import tiny_model_folder
from zhibei.serve.conversation import load_conversation
from zhibei.serve.opening import Wanted
from zhibei.serve.pages import FOLDER, page_files

pytest.importorskip("uvicorn")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
KEY = "the-key-of-this-test"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    run = folder / "run"
    tiny_model_folder(run, seed=3, name="model")
    (run / "manifest.json").write_text(json.dumps({"format": 1, "template": "vicuna_v1.1"}))
    (run / "report.html").write_text(
        "<!doctype html><title>report of the run</title><script>document.title += '!'</script>"
    )
    other = tiny_model_folder(folder, seed=4, name="other")
    hosted = opened(Wanted("run", str(run)), Wanted("other", str(other)))
    with serving(hosted, has_page=True, api_keys=(KEY,)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("no chromium or chrome on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(live, browser):
    """A page of its own, which fails the test for errors of scripts and for requests that leave the host."""
    context = browser.new_context(locale="en-US", accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    outside, errors = [], []
    context.on("request", lambda asked: outside.append(asked.url) if not is_inside(live, asked.url) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{live.url}/#key={KEY}")
    page.wait_for_selector("#model-a option", state="attached")
    yield page
    context.close()
    assert (outside, errors) == ([], [])


def is_inside(live, url: str) -> bool:
    return url.startswith((live.url, "data:", "blob:" + live.url))


def ask(page, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")
    settled(page)


def settled(page) -> None:
    """Until nothing is being written."""
    page.wait_for_selector("#send:not([hidden])")


def short_and_greedy(page) -> None:
    page.fill("#max_tokens", "12")
    page.fill("#temperature", "0")


def texts(page) -> list[str]:
    return page.locator(".answer .text").all_inner_texts()


def test_an_answer_is_that_of_the_api_and_the_key_is_hidden(page, live):
    short_and_greedy(page)
    ask(page, "Hello")
    body = {"model": "run", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    said = live.post("/v1/chat/completions", body, headers={"Authorization": f"Bearer {KEY}"}).json()
    plain = said["choices"][0]["message"]["content"]
    assert "".join(texts(page)[0].split()) == "".join(plain.split()) or "*" in plain or "#" in plain
    assert "tokens/s" in page.inner_text(".figures")
    assert "of 256 tokens of context" in page.inner_text("#room")
    assert KEY not in page.url
    page.reload()
    page.wait_for_selector("#model-a option", state="attached")


def test_without_the_key_the_page_says_what_is_missing(live, browser):
    page = browser.new_context(locale="en-US").new_page()
    page.goto(live.url + "/")
    page.wait_for_selector("#notice:not([hidden])")
    assert "its key" in page.inner_text("#notice")


def test_what_was_said_is_remembered_and_another_answer_can_be_asked_for(page, live):
    short_and_greedy(page)
    ask(page, "Hello")
    ask(page, "And again")
    first, second = texts(page)
    page.click("text=Answer again")
    settled(page)
    assert texts(page) == [first, second], "greedy answers come again"
    page.fill("#temperature", "1.5")
    page.click("text=Answer again")
    settled(page)
    assert texts(page)[0] == first


def test_a_message_can_be_edited_and_what_followed_is_forgotten(page):
    short_and_greedy(page)
    ask(page, "Hello")
    ask(page, "And again")
    page.locator(".question").first.hover()
    page.locator(".edit").first.click()
    page.fill(".rewrite", "Another question")
    page.keyboard.press("Enter")
    settled(page)
    assert page.locator(".question .text").all_inner_texts() == ["Another question"]
    page.focus("#message")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Escape")
    assert page.locator(".question .text").all_inner_texts() == ["Another question"]


def test_two_models_answer_the_same_question_and_both_are_exported(page, tmp_path):
    short_and_greedy(page)
    page.click("#compare")
    ask(page, "Hello")
    left, right = texts(page)
    assert left != right
    assert page.locator(".answer .who").all_inner_texts() == ["run", "other"]
    with page.expect_download() as saved:
        page.click("#export-messages")
    rows = [json.loads(line) for line in Path(saved.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 2]
    assert rows[0] != rows[1]


def test_what_is_exported_is_training_data_and_comes_back(page, tmp_path):
    from zhibei.data.readers import read_file
    from zhibei.data.records import Conversation

    short_and_greedy(page)
    page.fill("#system", "Be brief.")
    ask(page, "Hello 你好")
    answer = texts(page)[0]
    files = {}
    for name, button in (("a.jsonl", "#export-messages"), ("b.json", "#export-sharegpt")):
        with page.expect_download() as saved:
            page.click(button)
        files[name] = tmp_path / name
        saved.value.save_as(files[name])
        (record,) = read_file(files[name])
        assert isinstance(record, Conversation)
        assert [message.role for message in record.messages] == ["system", "user", "assistant"]
        assert record.messages[1].content == "Hello 你好"
    assert load_conversation(files["a.jsonl"]).turns[0][0] == "Hello 你好", "zhibei chat reads it with /load"
    for file in files.values():
        page.click("#fresh")
        page.fill("#system", "")
        page.set_input_files("#import-file", file)
        page.wait_for_selector(".question")
        assert page.input_value("#system") == "Be brief."
        assert texts(page) == [answer]
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b'{"a": 1}'})
    page.wait_for_selector("#notice:not([hidden])")
    assert texts(page) == [answer], "a file that is none changes nothing"


def test_what_looks_like_markup_is_text_and_markdown_is_shown(page, tmp_path):
    attack = '<img src=x onerror="document.title=1"><script>document.title=2</script> **bold** `<b>code</b>`'
    attack += "\n- [a](javascript:1)"
    rows = [{"from": "human", "value": attack}, {"from": "gpt", "value": attack}]
    file = tmp_path / "attack.json"
    file.write_text(json.dumps([{"id": "1", "conversations": rows}]), encoding="utf-8")
    page.set_input_files("#import-file", file)
    page.wait_for_selector(".question")
    assert page.title() == "zhibei"
    assert page.locator("#talk img, #talk script, #talk a").count() == 0
    assert page.locator(".answer strong").inner_text() == "bold"
    assert page.locator(".answer code").inner_text() == "<b>code</b>"
    assert page.locator(".answer li").inner_text() == "[a](javascript:1)"
    assert page.locator(".question .text").inner_text() == attack


def test_stop_keeps_what_came(page):
    page.fill("#max_tokens", "")
    page.fill("#temperature", "1")
    page.fill("#message", "Hello")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    settled(page)
    assert "stopped" in page.inner_text(".figures") or "ended" in page.inner_text(".figures")


def test_a_conversation_beyond_the_context_is_said_and_can_go_on(page):
    short_and_greedy(page)
    for _ in range(10):
        ask(page, "Hello " * 10)
        if page.locator(".error").count():
            break
    assert "no longer fits" in page.inner_text(".error")
    num_turns = page.locator(".turn").count()
    page.click("text=Leave out the oldest turn")
    settled(page)
    assert page.locator(".left-out").count() == 1
    assert page.locator(".turn").count() == num_turns
    assert "tokens/s" in page.locator(".turn").last.inner_text()


def test_both_languages_themes_and_a_phone(page):
    assert page.inner_text("#send") == "Send"
    page.click("#language")
    assert page.inner_text("#send") == "发送"
    assert page.get_attribute("html", "lang") == "zh"
    page.click("#theme")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.set_viewport_size({"width": 360, "height": 640})
    page.reload()
    page.wait_for_selector("#model-a option", state="attached")
    assert page.inner_text("#send") == "发送", "it is remembered"
    width = page.locator("body").bounding_box()["width"]
    for part in ("header", "#talk", "#send", "#message"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1, f"{part} is cut off"


def test_every_word_is_there_in_both_languages(page):
    names = page.locator("[data-word]").evaluate_all("nodes => nodes.map(node => node.dataset.word)")
    for _ in range(2):
        page.click("#language")
        shown = page.locator("[data-word]").all_text_contents()
        assert all(text and text != name for text, name in zip(shown, names, strict=True) if name[0].islower())


def test_the_report_is_one_click_away_and_cannot_reach_the_key(page, live):
    with page.context.expect_page() as opened_page:
        page.click("#report")
    report = opened_page.value
    report.wait_for_load_state()
    assert report.title() == "report of the run!"
    assert live.get("/report?model=run").status_code == 401
    headers = {"Cookie": f"zhibei_key={KEY}"}
    assert "sandbox" in live.get("/report?model=run", headers=headers).headers["content-security-policy"]
    assert live.get("/report?model=other", headers=headers).status_code == 404
    assert live.get("/v1/models", headers=headers).status_code == 401, "the cookie opens the report and nothing else"


def test_the_page_names_nothing_outside(live):
    """Neither its files nor its headers allow a request elsewhere, and every file of the folder is served."""
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "http:" not in text.replace("http://www.w3.org", "")
        assert "https:" not in text
        assert text.count("\n") <= 400
    assert len(page_files()) == len(list(FOLDER.iterdir()))
    policy = live.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
