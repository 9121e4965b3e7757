"""`octavo top` over metrics as a server writes them."""

import io
import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from octavo import top

METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="org/tiny"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="org/tiny"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="org/tiny"} 0.25
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{model_name="org/tiny"} %d
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{model_name="org/tiny"} 200.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{model_name="org/tiny"} 50.0
# TYPE octavo:key_calls gauge
octavo:key_calls{key="app",model_name="org/tiny"} 1.0
octavo:key_calls{key="a-name-that-is-long-indeed",model_name="org/tiny"} 4.0
# TYPE octavo:key_tokens counter
octavo:key_tokens_total{key="app",model_name="org/tiny"} %d
"""


def looks() -> tuple[top.Look, top.Look]:
    return top.parse(METRICS % (100, 10), 10.0), top.parse(METRICS % (400, 30), 12.0)


def test_rates_are_since_the_look_before() -> None:
    before, now = looks()
    said = top.summary(now, before)
    assert (said["running"], said["waiting"], said["output tok/s"]) == ("3", "2", "150.0")
    assert (said["kv used"], said["cache hits"]) == ("25.0 %", "-"), "nothing was looked up meanwhile"
    first = top.summary(now, None)
    assert (first["output tok/s"], first["cache hits"]) == ("-", "25.0 %")
    assert "app=10.0" in top.line(now, before)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (34, 24), (20, 8), (1, 1)])
def test_the_view_keeps_to_the_terminal(width: int, height: int) -> None:
    before, now = looks()
    rows = top.view(now, before, width, height).split("\n")
    assert len(rows) <= height and all(len(row) <= width for row in rows)
    if width == 80:
        text = "\n".join(rows)
        assert "#####..............." in text and "org/tiny" in text
        assert text.index("a-name-that") < text.index("app "), "the busiest key is first"


def test_what_is_no_server_is_said() -> None:
    with pytest.raises(ValueError, match="no metrics"):
        top.parse("# nothing\n", 0.0)
    for url in ("ftp://x", "http://127.0.0.1:1", "nonsense"):
        with pytest.raises(ValueError, match="--url"):
            top.read(url)


@pytest.fixture
def url() -> "pytest.FixtureRequest":
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (METRICS % (100, 10)).encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"  # type: ignore[misc]
    server.shutdown()
    server.server_close()


COMMAND = [sys.executable, "-m", "octavo", "top", "--interval", "0.05", "--count", "2", "--url"]


def test_piped_it_is_a_line_a_look(url: str) -> None:
    done = subprocess.run([*COMMAND, url], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("running=3" in line and "\x1b" not in line for line in lines)


def test_on_a_terminal_it_is_drawn_over_itself(url: str) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen([*COMMAND, url], stdout=slave, env={**os.environ, "COLUMNS": "30", "LINES": "10"})
    os.close(slave)
    output = io.BytesIO()
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        output.write(data)
    assert process.wait(60) == 0
    pages = output.getvalue().decode().split("\x1b[H\x1b[J")[1:]
    assert len(pages) == 2
    assert all(len(row) <= 30 for page in pages for row in page.replace("\r", "").split("\n"))
