"""axe-core, which looks for what keeps people out of a page. It is no dependency: `make axe` fetches it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FILE = Path(os.environ.get("PHANTOM_AXE", Path(__file__).parents[1] / ".axe/package/axe.min.js"))
WINDOWS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]
RUN = """const done = arguments[0];
axe.run(document, {resultTypes: ['violations']}).then((found) => done(found.violations.flatMap((rule) =>
  rule.nodes.map((node) => `${rule.id} at ${node.target}: ${node.failureSummary}`))))"""


def violations(browser, width: int, scheme: str, uri: str | None = None) -> list[str]:
    """What axe finds on a page in a window `width` pixels wide, by day or night; on the one that is open without `uri`.

    Skips the test where axe-core is not there.
    """
    if not FILE.is_file():
        pytest.skip(f"needs axe-core at {FILE}: make axe, or set PHANTOM_AXE")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        if uri:
            browser.get(uri)
        browser.set_script_timeout(120)
        browser.execute_script(FILE.read_text(encoding="utf-8"))
        return browser.execute_async_script(RUN)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
