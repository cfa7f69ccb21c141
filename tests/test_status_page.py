"""The status page in a browser, in front of a server that answers with prepared numbers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmkan_deploy.serving.status_page import status_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

SECONDS = [0.001, 0.002, 0.005, 0.01, None]
ROWS = [1, 2, 4, 8, None]

Answer = dict[str, Any] | int | None
"""A status, a status code, or nothing at all."""

Browse = Callable[..., str]


class Server:
    """Gives one answer after another, the last one for ever."""

    def __init__(self) -> None:
        self.answers: Sequence[Answer] = []
        self.script = ""
        self.token: str | None = None
        self.asked = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    page = status_page() + f"<script>{server.script}</script>"
                    self.answer(200, "text/html; charset=utf-8", page)
                elif self.path == "/status.json":
                    self.status()
                else:
                    self.answer(404, "text/plain", "")

            def status(self) -> None:
                if server.token is not None and self.headers["authorization"] != f"Bearer {server.token}":
                    self.answer(401, "application/json", '{"error": "a token is missing"}')
                    return
                answer = server.answers[min(server.asked, len(server.answers) - 1)]
                server.asked += 1
                if isinstance(answer, dict):
                    self.answer(200, "application/json", json.dumps(answer))
                elif answer is not None:
                    self.answer(answer, "application/json", "{}")
                self.close_connection = True

            def answer(self, code: int, kind: str, text: str) -> None:
                body = text.encode()
                self.send_response(code)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def browse(server: Server, tmp_path: Path) -> Browse:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: the status page's script can't run here")

    def run(answers: Sequence[Answer], script: str = "", token: str | None = None) -> str:
        """The page's document after some seconds of its own time."""
        server.answers, server.script, server.token = answers, script, token
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8500", "--dump-dom",
                   f"http://127.0.0.1:{server.http.server_port}/"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def text_of(document: str, identifier: str) -> str:
    """Of an element without elements in it; empty where it is hidden."""
    found = re.search(rf'<(\w+)([^<>]*) id="{identifier}"([^<>]*)>([^<]*)</\1>', document)
    if found is None:
        found = re.search(rf'<(\w+)()[^<>]*id="{identifier}"([^<>]*)>([^<]*)</\1>', document)
    assert found is not None, identifier
    return "" if re.search(r"\bhidden\b", found[2] + found[3]) else unescape(found[4])


def rows_of(document: str) -> list[list[str]]:
    """Texts of the visible cells of the table's rows."""
    body = document[document.index('<tbody id="rows"') : document.index("</tbody>")]
    rows = []
    for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL):
        cells = re.findall(r"<(t[hd])([^<>]*)>(.*?)</\1>", row, re.DOTALL)
        rows.append(
            [
                " ".join(unescape(re.sub(r"<svg.*?</svg>|<[^<>]*>", " ", content)).split())
                for _, attributes, content in cells
                if not re.search(r"\bhidden\b", attributes)
            ]
        )
    return rows


def histogram(bounds: Sequence[float | None], counts: Sequence[int]) -> list[list[float | None]]:
    return [[bound, sum(counts[: i + 1])] for i, bound in enumerate(bounds)]


def model(
    requests: int,
    rows: int,
    latency: Sequence[int] = (0, 0, 0, 0, 0),
    batches: Sequence[int] = (0, 0, 0, 0, 0),
    **more: Any,
) -> dict[str, Any]:
    return {
        "name": "energies", "version": "3", "state": "ready", "problem": None, "file": "model.onnx",
        "requests": requests, "failed": 0, "rows": rows, "queue_rows": 0,
        "request_seconds": histogram(SECONDS, latency), "batch_rows": histogram(ROWS, batches), **more,
    }  # fmt: skip


def status(time: float, *models: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"server": "9.9", "time": 1e9 + time, "ready": True, "draining": False, "models": models, **more}


def test_page_needs_nothing_from_elsewhere() -> None:
    page = status_page()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"<(link|img|iframe|script) [^>]*(src|href)=|@import|url\(", page)
    assert "innerHTML" not in page
    urls = set(re.findall(r"https?://[^\"' ]+", page))
    assert urls == {"http://www.w3.org/2000/svg"}


def test_numbers_come_from_the_last_seconds(browse: Browse) -> None:
    before = model(1000, 50_000, (1000, 0, 0, 0, 0), (0, 0, 0, 0, 9))
    after = model(1097, 62_000, (1000, 50, 40, 7, 3), (0, 0, 3000, 0, 9), failed=3, queue_rows=17)
    document = browse([status(0, before), status(4, after)])
    assert text_of(document, "badge") == "ready"
    assert text_of(document, "version") == "version 9.9"
    assert text_of(document, "total") == "3,000 rows/s over all models"
    (row,) = rows_of(document)
    # 100 new requests: 50 up to 2 ms, 90 up to 5 ms, 97 up to 10 ms.
    assert row == [
        "energies version 3 · model.onnx", "ready", "1,100", "3 (0.27 %)", "3,000",
        "2.00 ms", "8.57 ms", "> 10.0 ms", "mean 4 1 4 > 8", "17",
    ]  # fmt: skip
    assert "3 to 4 rows: 100 % of the runs" in document
    assert "now 3,000 rows/s, peak 3,000 rows/s" in document


def test_window_slides(browse: Browse) -> None:
    """What happened more than ten seconds ago no longer counts, though the chart has it."""
    document = browse(
        [
            status(0, model(0, 0)),
            status(4, model(10, 40_000, (0, 0, 0, 0, 10), (0, 0, 0, 0, 10))),
            status(8, model(20, 44_000, (10, 0, 0, 0, 10), (0, 0, 0, 0, 20))),
            status(14, model(30, 50_000, (20, 0, 0, 0, 10), (0, 0, 0, 0, 30))),
        ]
    )
    (row,) = rows_of(document)
    assert row[4:8] == ["1,000", "500 µs", "950 µs", "990 µs"]
    assert "now 1,000 rows/s, peak 10,000 rows/s" in document


def test_restart_begins_anew(browse: Browse) -> None:
    document = browse([status(0, model(50, 900)), status(1, model(60, 990)), status(2, model(1, 10))])
    (row,) = rows_of(document)
    assert row[2:9] == ["1", "0", "…", "…", "…", "…", "…"]


def test_states_are_words(browse: Browse) -> None:
    models = [
        model(0, 0, problem="found half a file"),
        {"name": "broken", "version": "", "state": "failed", "problem": "found <b>no</b> model"},
        {"name": "old", "version": "", "state": "unloaded", "problem": None},
    ]
    document = browse([status(time, *models, ready=False, draining=True) for time in range(3)])
    assert text_of(document, "badge") == "draining"
    idle, problem, broken, old = rows_of(document)
    assert idle[1:] == ["ready", "0", "0", "0", *["no traffic"] * 4, "0"]
    assert problem == [
        "Its files changed and could not be loaded, so it goes on as it was: found half a file"
    ]
    assert broken == ["broken", "failed", "found <b>no</b> model"]
    assert old == ["old", "unloaded", "answers no requests until it is loaded again"]
    assert "no traffic in the last 5 min" in document


def test_no_models(browse: Browse) -> None:
    document = browse([status(0, ready=False)])
    assert text_of(document, "badge") == "not ready"
    assert text_of(document, "no-models") == "The server has no models."


@pytest.mark.parametrize(
    ("failure", "badge", "words"),
    [
        (None, "no answer", "No answer from the server"),
        (503, "failing", "The server answered with status 503"),
    ],
)
def test_failing_server(browse: Browse, failure: Answer, badge: str, words: str) -> None:
    document = browse([status(0, model(0, 0)), status(1, model(5, 70)), failure])
    assert text_of(document, "badge") == badge
    assert text_of(document, "alert").startswith(words)
    assert rows_of(document)[0][4] == "70"  # what it said last stays


def test_server_comes_back(browse: Browse) -> None:
    document = browse([None, 500, status(0, model(0, 0))])
    assert text_of(document, "badge") == "ready"
    assert text_of(document, "alert") == ""


def test_token(browse: Browse) -> None:
    assert text_of(browse([], token="secret"), "login-text") == "The server asks for a token."


@pytest.mark.parametrize("given", ["secret", "wrong"])
def test_given_token(browse: Browse, given: str) -> None:
    script = f"""
        setTimeout(() => {{
          document.getElementById("token").value = "{given}";
          document.getElementById("login").requestSubmit();
        }}, 1500);
    """
    document = browse([status(0, model(0, 0))], script, token="secret")
    if given == "secret":
        assert text_of(document, "badge") == "ready"
        assert re.search(r'<form id="login"[^<>]* hidden', document)
    else:
        assert text_of(document, "badge") == "token needed"
        assert text_of(document, "login-text") == "The server did not accept this token."


def test_maths(browse: Browse) -> None:
    script = """
        const histogram = [[1, 0], [2, 4], [4, 4], [8, 10], [null, 12]];
        const result = {
          quantiles: [0, 0.1, 0.5, 0.8, 0.99].map((q) => maths.quantile(histogram, q)),
          none: [maths.quantile([], 0.5), maths.quantile([[1, 0], [null, 0]], 0.5)],
          counts: maths.buckets(histogram).map((bucket) => bucket.count),
          tops: [0, 1, 3.2, 10, 11, 99, 260000].map(maths.roundUp),
          seconds: [0, 2e-4, 9.996e-4, 0.0123, 0.2, 3].map(words.seconds),
          amounts: [0, 0.123, 12.34, 1234.5, 12345678, 2e9].map(words.amount),
        };
        const place = document.createElement("pre");
        place.id = "result";
        place.textContent = JSON.stringify(result);
        document.body.append(place);
    """
    result = json.loads(text_of(browse([status(0)], script), "result"))
    assert [(each["value"], each["beyond"]) for each in result["quantiles"]] == [
        (1, False), (pytest.approx(1.3), False), (pytest.approx(4 + 4 * 2 / 6), False),
        (pytest.approx(4 + 4 * 5.6 / 6), False), (8, True),
    ]  # fmt: skip
    assert result["none"] == [None, None]
    assert result["counts"] == [0, 4, 0, 6, 2]
    assert result["tops"] == [1, 1, 4, 10, 15, 100, 300000]
    assert result["seconds"] == ["0.00 µs", "200 µs", "1,000 µs", "12.3 ms", "200 ms", "3.00 s"]
    assert result["amounts"] == ["0", "0.12", "12.3", "1,235", "12.3 M", "2 G"]
