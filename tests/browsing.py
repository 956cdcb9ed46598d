"""Reports in a real browser, and everything they do there that they should not: a pytest plugin."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from eyechart.report import Shown

HOSTILE = (
    "</script><img src=x onerror=window.__pwned=1>",
    '<a href="javascript:window.__pwned=2">link</a>',
    "<b>bold</b>",
    "<!--<script>window.__pwned=3</script>",
    "'\"><svg onload=window.__pwned=4>",
    "&lt;i&gt;\u2028{{ 7 * 7 }}%{x}",
)

WATCH = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.__violations.push(event.violatedDirective);
});
window.__drawn = new Set();
const fillText = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
  window.__drawn.add(text);
  return fillText.call(this, text, ...rest);
};
"""

# Read from a copy: reading the page's own canvas makes Chromium warn about it.
WATCH += """
window.__pixels = (source, x = 0, y = 0, width = source.width, height = source.height) => {
  const copy = new OffscreenCanvas(source.width, source.height);
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(source, 0, 0);
  return context.getImageData(x, y, width, height).data;
};
"""

LEAST_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((c) => {
      const v = c / 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  let least = { ratio: 99 };
  const shown = (e) => e.checkVisibility() && !e.closest("svg") && !e.closest(".js-plotly-plot");
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !shown(e) || e.matches("script, style, noscript")) continue;
    const [a, b] = [light(channels(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least.ratio) least = { ratio, text: e.textContent.slice(0, 60), tag: e.tagName };
  }
  return least;
}"""


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a Chromium: the report is only tested in a real browser")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield chromium
        chromium.close()


@dataclasses.dataclass
class Opened:
    """A report in the browser, and everything it did that it should not."""

    page: "Page"
    path: Path
    complaints: list[str]
    requests: list[str]

    def is_clean(self) -> None:
        assert self.complaints == []
        assert self.page.evaluate("window.__violations") == []
        assert self.requests == [self.path.as_uri()]
        assert self.page.evaluate("window.__pwned ?? null") is None


OpenReport = Callable[..., Opened]


@pytest.fixture
def open_report(browser: "Browser", tmp_path: Path) -> Iterator[OpenReport]:
    from eyechart.report import write_report

    contexts = []

    def opened(exam: "Shown | str", **options: Any) -> Opened:
        path = tmp_path / "report.html"
        if isinstance(exam, str):
            path.write_text(exam, encoding="utf-8")
        else:
            write_report(exam, path)
        context = browser.new_context(
            **{"offline": True, "viewport": {"width": 1280, "height": 900}, **options}
        )
        contexts.append(context)
        context.add_init_script(WATCH)
        page = context.new_page()
        report = Opened(page, path, [], [])
        page.on(
            "console",
            lambda message: (
                report.complaints.append(message.text)
                if message.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda problem: report.complaints.append(str(problem)))
        page.on("request", lambda request: report.requests.append(request.url))
        page.goto(path.as_uri())
        return report

    yield opened
    for context in contexts:
        context.close()


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])
