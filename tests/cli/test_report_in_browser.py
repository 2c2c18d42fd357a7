"""The report of a diagnosis in headless Chromium: nothing overflows, nothing is logged, no host is asked."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.cli.test_diagnose import HUB, made_up
from tests.commands import ran

__all__ = ["made_up"]

BROWSER = shutil.which("chromium")
ITS_OWN = {"accounts.google.com", "clients2.google.com", "update.googleapis.com"}
"""Hosts that the browser asks for itself, whatever the page."""

MEASURE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll, svg") && one.getBoundingClientRect().right > innerWidth + 1);
  const scrolls = document.documentElement.scrollWidth > innerWidth;
  document.title = JSON.stringify({width: innerWidth, scrolls, wide: wide.map(one => one.tagName)});
});
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed: apt install chromium"),
]


def shown(page: str, folder: Path, width: int) -> tuple[dict, list[str], set[str]]:
    """Return what a page measures of itself at a width, its lines on the console, and the hosts that it asks."""
    folder.mkdir()
    (folder / "page.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    # Chromium's own window is no narrower than 500 px: a frame of the wanted width has its own.
    frame = f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    tell = "<script>onload = () => { document.title = frames[0].document.title }</script>"
    (folder / "frame.html").write_text(f"<!doctype html><title></title>{frame}{tell}")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--allow-file-access-from-files"),
            *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"),
            *("--enable-logging=stderr", "--window-size=1600,1000", "--virtual-time-budget=5000", "--dump-dom"),
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    asked = {
        urlsplit(event["params"]["url"]).hostname
        for event in json.loads((folder / "net.json").read_text())["events"]
        if event.get("params", {}).get("url", "").startswith(("http", "ws"))
    }
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(title[1]), console, {str(host) for host in asked} - ITS_OWN


@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_overflows_and_no_host_is_asked(folder, made_up, width):
    made_up(HUB)
    assert ran("diagnose", "hub", "--json")[0] == 0
    (path,) = Path("results").glob("*/report.html")
    measured, console, asked = shown(path.read_text(), folder / "browser", width)
    assert measured == {"width": width, "scrolls": False, "wide": []}
    assert console == []
    assert asked == set()


def test_the_checks_can_fail(folder):
    evil = (
        '<!doctype html><title></title><body><p style="width: 900px">wide</p><img src="http://asked.invalid/x.png">'
        "<script>console.error('boom')</script></body>"
    )
    measured, console, asked = shown(evil, folder / "browser", 360)
    assert (measured["scrolls"], measured["wide"]) == (True, ["P"])
    assert any("boom" in line for line in console)
    assert asked == {"asked.invalid"}
