"""The report in a real browser, where there is one: playwright and a Chromium, which no extra installs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from layerwise.memory import Samples
from layerwise.memory.timeline import timeline
from layerwise.render.comparison import comparison
from layerwise.render.report import write_report
from tests.conftest import TINY
from tests.render.test_report import results

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="a Chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    one = timeline(TINY, [1], Samples((1, 16, 16), {"class": 10})).as_json()
    found = results(memory={"title": "module 1", "stage": one, "end_to_end": one}, defaults=results()["recipe"])
    (folder / "both.html").write_text(comparison({"one": found, "another, with a long name": results(depth=2)}))
    return [write_report(found, folder), folder / "both.html"]


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_tell_values_without_an_error(pages: list[Path], width: int, scheme: Any) -> None:
    with sync_api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        for path in pages:
            page, told = context.new_page(), []
            page.on("console", lambda message, told=told: told.append(message.text))
            page.on("pageerror", lambda error, told=told: told.append(str(error)))
            page.on("request", lambda request, told=told: told.append(request.url))
            page.goto(path.as_uri())
            assert told == [path.as_uri()], "nothing is loaded but the page, and nothing goes wrong"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            charts = page.query_selector_all("svg[data-hover]")
            assert charts
            for chart in charts:
                chart.scroll_into_view_if_needed()
                box = chart.bounding_box()
                page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
                assert page.inner_text("#told")
                chart_words = page.evaluate("document.getElementById('told').getBoundingClientRect().right")
                assert chart_words <= width
            for button in page.query_selector_all("button[data-toggle]")[:1]:
                button.click()
                assert not page.is_visible('figure[data-module="1"]')
                button.click()
                assert page.is_visible('figure[data-module="1"]')
        browser.close()
