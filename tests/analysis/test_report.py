"""The report in a real browser, and the page of the documentation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.conftest import STEPS
from ddlm.analysis.page import BEGIN, END, fill_page, read_findings, render
from ddlm.analysis.trajectories import Trajectories
from ddlm.reproduce.recipes import find

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(params=[("phone", "dark"), ("desk", "light")], ids=lambda p: p[0])
def page(request: pytest.FixtureRequest, browser: Any, studied: Path) -> Iterator[Any]:
    size, scheme = request.param
    context = browser.new_context(
        viewport=PHONE if size == "phone" else DESK, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda m: said.append(m.text))
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto((studied / "report.html").as_uri())
    yield page
    assert said == []
    assert [u for u in asked if not u.startswith("data:")] == [(studied / "report.html").as_uri()]
    context.close()


def test_the_slider_replays_the_recorded_steps(page: Any, studied: Path) -> None:
    index = list((studied / "records").glob("step-30-*-n40-noise1.npz"))
    t = Trajectories.load(index[0])
    slider = page.locator("#step")
    assert slider.get_attribute("max") == str(STEPS)
    for step in (1, STEPS // 2, STEPS):
        slider.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", step)
        shown = page.locator("#tokens span").all_text_contents()
        pieces = [t.header["pieces"][str(i)] for i in t.tokens[0, step - 1].tolist()]
        assert shown == [p.replace("\n", "⏎") for p in pieces]
        switched = page.locator("#tokens span.switched").count()
        assert switched == round(t.switches[0, step - 1] * t.generated[0].sum())
        assert page.locator("#readout").text_content().startswith(f"step {step} of {STEPS}, t = ")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#readout").text_content().startswith(f"step {STEPS - 1} of")
    page.select_option("#sequence", "1")
    assert page.locator("#readout").text_content().startswith("step 1 of")
    page.click("#play")
    for _ in range(100):
        if int(slider.input_value()) >= 3:
            break
        page.wait_for_timeout(50)
    assert int(slider.input_value()) >= 3
    page.click("#play")


@pytest.mark.slow
def test_it_fits_the_screen_and_every_picture_is_there(page: Any) -> None:
    width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    sizes = page.eval_on_selector_all("figure img", "es => es.map(e => e.naturalWidth)")
    assert len(sizes) == 9
    assert min(sizes) > 100
    assert page.locator("mark.r1, mark.r2").count() > 2
    assert page.locator(".given").count() > 10  # the prompts of the continuations
    for name in ("Findings", "Replay", "Samples", "Figures", "Tables", "Configuration"):
        assert page.get_by_role("heading", name=name, exact=True).is_visible()
    # text against its ground: at least 4.5 to 1 in both schemes
    assert min(page.evaluate(_CONTRAST)) >= 4.5


_CONTRAST = """() => {
  const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== 'rgba(0, 0, 0, 0)') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('p, h1, h2, h3, figcaption, td, a, mark, .given')].map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
}"""


def test_nothing_in_the_report_points_outside(studied: Path) -> None:
    text = (studied / "report.html").read_text("utf-8")
    outside = re.findall(r"""(?:src|href|srcset)=["'](?!data:|#)[^"']*""", text)
    assert outside == []
    assert "@import" not in text
    assert "url(" not in text.split("</style>")[0]


def test_a_page_is_filled_from_the_record_and_only_between_its_marks(studied: Path) -> None:
    page = studied.with_name("page.md")
    text = page.read_text("utf-8")
    assert text.startswith(f"# Before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nAfter.\n")
    assert "What stood here." not in text
    record = read_findings(page.parent / "assets" / "page" / "findings.json")
    for finding in record["results"]["findings"]:
        assert finding["answer"] in text
    for link in re.findall(r"\]\((assets/[^)]+)\)", text):
        assert (page.parent / link).is_file()
    again = text
    fill_page(page, studied)
    assert page.read_text("utf-8") == again


def test_a_page_tells_when_it_was_recorded_and_not_when_it_was_drawn(
    studied: Path, tmp_path: Path
) -> None:
    record = read_findings(studied / "findings.json")
    (made,) = record["results"]["recorded"]
    assert made["date"] <= record["date"]
    made |= {"date": "2020-02-03T04:05:06+00:00", "command": "ddlm analyze --first"}
    text = render(record, "assets/x")
    assert "Recorded on 2020-02-03 on " in text
    assert "\nddlm analyze --first\n" in text
    assert record["command"] not in text
    # Parts that were recorded apart are each named; an older record knows when it was drawn only.
    record["results"]["recorded"].append(made | {"command": "ddlm analyze --second"})
    assert render(record, "assets/x").count("Recorded on") == 2
    del record["results"]["recorded"]
    text = render(record, "assets/x")
    assert f"Drawn on {record['date'][:10]} on " in text
    assert "Recorded on" not in text
    assert record["command"] in text


def test_the_findings_cite_the_papers_table_of_noise_scales(root: Path) -> None:
    lines = {line.label: line.paper[1] for line in find("table8").lines}
    record = read_findings(root / "docs" / "assets" / "analyses" / "findings.json")
    (cited,) = [f["paper"] for f in record["results"]["findings"] if f["figure"] == "noise"]
    for scale in ("0.5", "1.2"):
        assert f"{lines[scale]:.2f} at {scale}".removeprefix("0") in cited


def test_the_committed_page_says_what_its_record_says(root: Path) -> None:
    page = root / "docs" / "analyses.md"
    inside = page.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    record = root / "docs" / "assets" / "analyses" / "findings.json"
    assert inside.strip() == render(read_findings(record), "assets/analyses").strip()
    assert json.loads(record.read_text("utf-8"))["results"]["figures"]
