"""The report in a real browser: nothing on its console, no request but its own, readable on a phone and in the dark."""

from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_serve.files import write_json
from leap_serve.report import write_report
from reports import gate_json, make_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine (apt-get install chromium)"),
]
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-extensions", "--enable-logging=stderr",
)  # fmt: skip
FRAME = """<!doctype html><body style="margin:0"><iframe src="/report.html" style="width:{width}px;height:2000px;border:0">
</iframe><script>
addEventListener('load', () => {{
  const page = document.querySelector('iframe').contentDocument;
  const small = [...page.querySelectorAll('.chart text')].map(one => one.getBoundingClientRect().height);
  const paper = getComputedStyle(page.body).backgroundColor;
  document.title = [page.documentElement.scrollWidth, Math.min(...small.filter(height => height > 0)), paper].join(' ');
}});
</script></body>"""


class Recorder(http.server.BaseHTTPRequestHandler):
    """Serves a folder's files and is the proxy for all the rest of the world, which is not there."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        file = self.folder / self.path.rpartition("/")[2]
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if content else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        self.send_error(502)

    def log_message(self, *_: object) -> None:
        pass


class Browser:
    """Chromium whose every request passes by :class:`Recorder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        handler = type("Here", (Recorder,), {"folder": folder, "asked": self.asked})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def open(self, page: str, *flags: str) -> tuple[str, str, list[str]]:
        """Load a page; returns what Chromium prints (--dump-dom), its console, and the requests of this page."""
        self.asked.clear()
        profile = self.folder / "profile"
        done = subprocess.run(
            [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", f"--proxy-server={self.url}",
             "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=2000", *flags, f"{self.url}/{page}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        shutil.rmtree(profile, ignore_errors=True)
        console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
        # Chromium's own errands (updates, safe browsing) go to hosts of its maker.
        requests = [path for path in self.asked if not re.search(r"google|gstatic|gvt1", path)]
        return done.stdout, console, requests


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    out = tmp_path_factory.mktemp("browser")
    make_run(out / "my-run")
    write_json(out / "my-run" / "gate.json", gate_json("<img src=http://example.test/leak.png>"))
    write_report([out / "my-run"], out / "report.html")
    made = Browser(out)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_no_console_message_and_no_request(browser: Browser) -> None:
    dom, console, requests = browser.open("report.html", "--dump-dom")
    assert dom.count("<svg") > 10
    assert console == ""
    assert requests == [f"{browser.url}/report.html"]
    # A page that does both is caught.
    bad = (
        (browser.folder / "report.html").read_text().replace("default-src 'none'; ", "").replace("img-src data:; ", "")
    )
    (browser.folder / "bad.html").write_text(bad.replace("</main>", "<img src=http://example.test/x.png></main>"))
    _, _, requests = browser.open("bad.html", "--dump-dom")
    assert any("example.test" in path for path in requests)
    (browser.folder / "worse.html").write_text(bad.replace("<script>", "<script>nothing();"))
    _, console, _ = browser.open("worse.html", "--dump-dom")
    assert "CONSOLE" in console


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_it_fits_phone_and_desk_by_day_and_night(browser: Browser, width: int, scheme: str) -> None:
    (browser.folder / "frame.html").write_text(FRAME.format(width=width))
    prefer = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    dom, console, _ = browser.open("frame.html", "--dump-dom", "--window-size=1400,2000", prefer)
    assert console == ""
    title = re.search(r"<title>(\d+) ([\d.]+) rgb\((\d+), (\d+), (\d+)\)</title>", dom)
    assert title is not None
    page_width, smallest, *paper = map(float, title.groups())
    assert page_width <= width
    assert smallest >= 9
    assert min(paper) > 240 if scheme == "light" else max(paper) < 40
