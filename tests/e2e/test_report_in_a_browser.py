"""The report in a real headless browser: wide and narrow, light and dark. Skipped where no Chromium is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from run_directories import write_run

from lora_trainer.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]

# A window is 500 px wide at least, a frame may be narrower. What is measured in it is left in the outer page.
FRAME = """<!DOCTYPE html><html style="color-scheme: {scheme}"><body>
<script>addEventListener("message", event => {{ document.body.dataset.measured = event.data; }});</script>
<iframe src="{source}" style="width: {width}px; height: 900px; border: 0"></iframe></body></html>
"""
PROBE = """
<script>
window.errors = [];
window.addEventListener("error", event => errors.push(String(event.message)));
window.addEventListener("load", () => {
  const numbers = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const luminance = colour => {
    const [r, g, b] = numbers(colour).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + .05) / (low + .05);
  };
  const paper = getComputedStyle(document.body).backgroundColor;
  const panel = getComputedStyle(document.querySelector(".headline")).backgroundColor;
  const texts = [...document.querySelectorAll("p, td, th, li, a, h1, h2, h3, summary, caption, figcaption, svg text")];
  const ground = e => e.classList.contains("headline") ? panel : paper;
  const ink = e => e.tagName === "text" ? getComputedStyle(e).fill : getComputedStyle(e).color;
  const lines = [...document.querySelectorAll(".swatch line")].map(e => getComputedStyle(e).stroke);
  document.querySelector(".skip").focus();
  const skip = document.querySelector(".skip").getBoundingClientRect();
  const plots = [...document.querySelectorAll("svg.plot")].map(e => e.getBoundingClientRect());
  const images = [...document.querySelectorAll("img")];
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    paper: luminance(paper),
    textContrast: Math.min(...texts.map(e => contrast(ink(e), ground(e)))),
    lineContrast: Math.min(...lines.map(c => contrast(c, paper))),
    smallestPlot: Math.min(...plots.map(r => Math.min(r.width, r.height))),
    widestPlot: Math.max(...plots.map(r => r.width)),
    brokenImages: images.filter(i => !i.complete || !i.naturalWidth).length,
    images: images.length,
    skipVisible: skip.left >= 0 && skip.width > 0,
    requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name),
    errors: window.errors,
  }), "*");
});
</script></head>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = [
        write_run(root / f"{name}-{seed}", schedule=name, loss=mean + 1e-3 * seed**2, seed=seed, prompts=["a cat"])
        for name, mean in {"constant_with_warmup": 0.97, "cosine_with_restarts": 0.94, "rex": 0.95}.items()
        for seed in range(3)
    ]
    write_report(runs, root / "report.html")
    measured = root / "measured.html"
    measured.write_text((root / "report.html").read_text().replace("</head>", PROBE, 1))
    return measured


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_and_can_be_read(page: Path, width: int, scheme: str) -> None:
    seen = look(page, width, scheme)
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert (seen["paper"] < 0.05) == (scheme == "dark")
    assert seen["textContrast"] >= 4.5  # WCAG 2.2 AA: text
    assert seen["lineContrast"] >= 3  # and graphics
    assert seen["smallestPlot"] > 100
    assert seen["widestPlot"] <= width
    assert (seen["images"], seen["brokenImages"]) == (3, 0)
    assert seen["skipVisible"]
    assert seen["requests"] == []
    assert seen["errors"] == []


def look(page: Path, width: int, scheme: str) -> dict[str, Any]:
    assert BROWSER is not None
    frame = page.with_name(f"{scheme}-{width}.html")
    frame.write_text(FRAME.format(source=page.as_uri(), width=width, scheme=scheme))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom", "--timeout=100000"]
    flags += ["--window-size=1500,1000", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    flags += [f"--user-data-dir={page.parent / 'profile'}"]
    shown = subprocess.run([BROWSER, *flags, frame.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    measured = re.search(r'data-measured="([^"]*)"', shown.stdout)
    assert measured is not None, shown.stderr[-2000:]
    return json.loads(unescape(measured[1]))
