"""The page in headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from ddlm.lm import DiffusionLM
from serve.running import Running, running

FAR = "far.example"  # a host that is not this machine, as the browser sees it
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    f"--host-resolver-rules=MAP {FAR} 127.0.0.1",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    with sync_playwright() as p:
        if program is None:
            try:
                found = p.chromium.launch(args=ARGUMENTS)
            except Exception:
                pytest.skip(
                    "no Chromium was found: install it, or run `playwright install chromium`"
                )
        else:
            found = p.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield found
        found.close()


class Watched:
    """A page, and everything it complained about or fetched from elsewhere."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.complaints = page, []
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.complaints.append(str(e)))
        page.on("request", lambda r: self._request(r.url, url))

    def _request(self, address: str, url: str) -> None:
        if not address.startswith((url, "data:")):
            self.complaints.append(f"asked {address}")


@pytest.fixture
def page(browser: Browser, served: Running) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    watched = Watched(context.new_page(), served.url)
    watched.page.set_default_timeout(20_000)
    watched.page.goto(served.url)
    expect(watched.page.locator("#model")).to_contain_text("small")
    yield watched.page
    context.close()
    assert watched.complaints == []


def write(page: Page, template: str, steps: int = 30, **fields: str) -> None:
    page.fill("#template", template)
    page.fill("#steps", str(steps))
    for name, value in fields.items():
        page.select_option("#halt", value) if name == "halt" else page.fill(f"#{name}", value)
    page.click("#go")


def finished(page: Page) -> list[str]:
    expect(page.locator("#go")).to_have_text("Write")
    return ["".join(c.locator(".tok").all_text_contents()) for c in page.locator("article").all()]


def test_generate_and_play(page: Page, lm: DiffusionLM) -> None:
    write(page, "{20}", 30, seed="4", samples="2", halt="none")
    alone = lm.generate("{20}", samples=2, seed=4, steps=30)
    assert finished(page) == [g.text for g in alone]
    expect(page.locator(".state").first).to_have_text("30 of 30 steps")
    expect(page.locator("#where")).to_have_text("step 30 / 30")
    page.click("#back")
    assert page.locator("#where").text_content() != "step 30 / 30"
    page.locator("#scrub").fill("0")
    expect(page.locator("article .tok.noise").first).to_be_visible()
    page.click("#play")
    expect(page.locator("#play")).to_contain_text("Pause")
    expect(page.locator("#where")).to_have_text("step 30 / 30")
    expect(page.locator("#play")).to_contain_text("Play")
    page.locator(".copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == alone[0].text
    ink = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(x => x)"
    assert page.locator("canvas").first.evaluate(ink), "the chart is empty"


def test_early_exit_is_told(page: Page, lm: DiffusionLM) -> None:
    write(page, "the {6} sea", 400, samples="1", halt="entropy", threshold="50")
    finished(page)
    alone = lm.generate("the {6} sea", steps=400, halt="entropy:50")[0]
    expect(page.locator(".state")).to_have_text(f"stopped at {alone.steps} of 400: entropy")


def test_infill_and_noise_again(page: Page, lm: DiffusionLM) -> None:
    write(page, "the old {8} in the morning", 20, samples="1", halt="none")
    [first] = finished(page)
    assert first.startswith("the old")
    assert first.endswith(" in the morning")
    tokens = page.locator("article .tok")
    texts = tokens.all_text_contents()
    places = [tokens.nth(i).bounding_box() for i in (0, 2)]
    x, y = places[0]["x"] + 3, places[0]["y"] + 8
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(places[1]["x"] + 3, places[1]["y"] + 8, steps=6)
    page.mouse.up()
    expect(page.locator("#again")).to_contain_text("3 tokens")
    page.click("#renoise")
    expect(page.locator("#template")).to_have_value(
        "{3}" + "".join(texts[3:]).replace("{", "{{").replace("}", "}}")
    )
    [second] = finished(page)
    assert second.endswith(" in the morning")
    expect(page.locator("#again")).to_be_hidden()


def test_a_space_that_is_kept_before_a_gap_stays(page: Page) -> None:
    made = page.evaluate(
        """async () => (await import("/static/template.js"))
            .noiseAgain(["Hello", ".", " ", " world"], new Set([3]))"""
    )
    assert made == "Hello.  {1}"  # the second one is the gap's


def test_the_keyboard_is_enough(page: Page) -> None:
    page.focus("#template")
    page.keyboard.press("Control+A")
    page.keyboard.type("the {{5} sea")
    page.keyboard.press("Control+A")
    page.keyboard.type("the {5} sea")
    page.fill("#samples", "1")
    page.fill("#steps", "10")
    page.keyboard.press("Control+Enter")
    finished(page)
    page.focus(".tok[tabindex='0']")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#again")).to_contain_text("2 tokens")
    page.keyboard.press("Escape")
    expect(page.locator("#again")).to_be_hidden()


def test_cancel(page: Page, served: Running) -> None:
    write(page, "{20}", 2000, samples="1", halt="none")
    expect(page.locator("article .tok").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#go")).to_have_text("Write")
    expect(page.locator("#message")).to_be_hidden()
    served.until(lambda: served.worker.at_work == 0, seconds=5)


def test_links_bring_the_settings_back(page: Page, served: Running) -> None:
    page.fill("#template", "a {7} & b = {{c}}")
    page.fill("#seed", "77")
    page.select_option("#halt", "kl")
    page.click("#share")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link.startswith(served.url)
    other = page.context.new_page()
    other.goto(link)
    expect(other.locator("#template")).to_have_value("a {7} & b = {{c}}")
    expect(other.locator("#seed")).to_have_value("77")
    expect(other.locator("#halt")).to_have_value("kl")


def test_copies_without_the_clipboard_of_secure_pages(page: Page, served: Running) -> None:
    """Browsers have none for a page that came over plain HTTP from another host."""
    far = page.context.new_page()
    far.goto(served.url.replace("127.0.0.1", FAR))
    assert far.evaluate("navigator.clipboard === undefined")
    write(far, "the {6} sea", 5, samples="1")
    (text,) = finished(far)
    for button in ("article .copy", "#share"):
        label = far.locator(button).text_content()
        far.bring_to_front()
        far.click(button)
        expect(far.locator(button)).to_have_text("Copied")
        expect(far.locator(button)).to_be_focused()
        page.bring_to_front()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == (far.url if button == "#share" else text)
        expect(far.locator(button)).to_have_text(label or "")
    assert "#template=" in far.url
    far.evaluate("document.execCommand = () => false")
    far.click("#share")
    expect(far.locator("#share")).to_have_text("Cannot copy")


def test_a_link_says_all_the_settings_there_are(page: Page, served: Running) -> None:
    """What it leaves out is as the page has it at first, the steps the model's; an emptied field stays empty."""
    own = str(httpx.get(f"{served.url}/v1/models").json()["data"][0]["defaults"]["steps"])
    expect(page.locator("#steps")).to_have_value(own)
    for name, value in (("steps", ""), ("samples", ""), ("seed", "5")):
        page.fill(f"#{name}", value)
    page.click("#share")
    full = page.evaluate("navigator.clipboard.readText()")
    page.evaluate("document.querySelector('details').open = true")
    for link, steps, samples, seed in (
        (f"{served.url}/#seed=6", own, "2", "6"),
        (full, "", "", "5"),
    ):
        page.fill("#temperature", "0.5")
        page.check("#freeze")
        page.select_option("#solver", "heun")
        page.select_option("#halt", "entropy")
        page.fill("#steps", "9")
        page.goto(link)  # the same page: nothing is loaded anew
        expect(page.locator("#seed")).to_have_value(seed)
        expect(page.locator("#freeze")).not_to_be_checked()
        for name, value in (("steps", steps), ("samples", samples), ("temperature", ""), ("solver", ""),
                            ("halt", "patience"), ("threshold", "25")):  # fmt: skip
            expect(page.locator(f"#{name}")).to_have_value(value)


def test_phone_and_dark(browser: Browser, served: Running) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True
    )
    page = context.new_page()
    page.goto(served.url)
    write(page, "the {12} sea", 10, samples="2")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    top = page.evaluate("document.querySelector('article .text').getBoundingClientRect().top")
    assert top < 400, "what is written is in sight"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(light) < 60
    page.click("#theme")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert int(light) > 200
    context.close()


def test_errors_are_shown(browser: Browser, served: Running, lm: DiffusionLM) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(served.url)
    write(page, "nothing to do")
    expect(page.locator("#message")).to_contain_text("has nothing to generate")
    write(page, "{3}")
    finished(page)
    expect(page.locator("#message")).to_be_hidden()
    with running(lm, keys=("a-key-of-some-length",)) as here:
        page.goto(f"{here.url}/#grid=karras")
        expect(page.locator("#message")).to_contain_text("needs a key")
        page.fill("#key", "a-key-of-some-length")
        page.keyboard.press("Tab")
        expect(page.locator("#message")).to_be_hidden()
        expect(page.locator("#grid")).to_have_value("karras")
        write(page, "{3}")
        finished(page)
        expect(page.locator("article .tok").first).to_be_visible()
    write(page, "{3}")
    expect(page.locator("#message")).to_contain_text("cannot be reached")
    context.close()


def test_the_description_of_the_api(browser: Browser, served: Running) -> None:
    watched = Watched(browser.new_page(), served.url)
    watched.page.goto(f"{served.url}/docs")
    expect(watched.page.locator("article h2").first).to_contain_text("/v1/generate")
    expect(watched.page.locator("code", has_text="settled_after")).to_be_visible()
    watched.page.close()
    assert watched.complaints == []
