"""prunex watch: the report of a run that grows, over HTTP, as a browser asks for it."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from prunex import PrunexError
from prunex.recipes.commands import cli
from prunex.recipes.report import live
from prunex.recipes.report.live import ReportServer, look
from prunex.recipes.report.page import write_report
from tests.recipes.report.test_page import draw_scenes, write_run


@pytest.fixture
def serve(monkeypatch):
    """Servers of runs, ended with the test."""
    monkeypatch.setattr(live, "POLL", 0.05)
    servers = []

    def start(run):
        servers.append(ReportServer(run))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server, path="/", method="GET", host=None):
    """Status, headers and text of an answer; the path goes out as it is, which urllib would tidy up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    try:
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


def grow(run):
    """A run as training leaves it."""
    write_run(run, *draw_scenes(count=3), epochs=1)


def state(text):
    return text.partition('role="status">')[2].partition("<")[0]


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_the_page_follows_a_run_from_before_it_is_there_to_its_end(tmp_path, serve):
    run = tmp_path / "runs" / "version_0"
    server = serve(run)
    assert f"There is no folder {run} yet" in get(server)[2]
    run.mkdir(parents=True)
    assert "nothing of a run in it" in get(server)[2]
    (run / "config.yaml").write_text("model: 1\n")
    assert "Training has begun" in get(server)[2]
    (run / "config.yaml").unlink()
    grow(run)
    (run / "summary.json").rename(tmp_path / "summary.json")
    status, headers, page = get(server)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<h2>Curves</h2>" in page
    assert state(page).startswith("follows the run, last change ")
    # What is written later is on the page: a number, and the end.
    with open(run / "metrics.csv", "a") as file:
        columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
        file.write(",".join("7531" if name == "step" else "0.25" for name in columns) + "\n")
    assert get(server)[2] != page
    (tmp_path / "summary.json").rename(run / "summary.json")
    os.utime(run / "summary.json")
    assert state(get(server)[2]).startswith("training has ended")
    # A training that goes on leaves the summary of the one before behind.
    late = (run / "summary.json").stat().st_mtime + 60
    os.utime(run / "metrics.csv", (late, late))
    assert state(get(server)[2]).startswith("follows the run")


def test_nothing_is_written_into_the_run(tmp_path, serve):
    run = tmp_path / "version_0"
    grow(run)
    before = contents(run)
    server = serve(run)
    assert get(server)[0] == 200
    assert contents(run) == before
    # Nor does the page of a report that is written show anything of watching.
    written = write_report(run).read_text()
    assert not any(part in written for part in ("<script", "script-src", 'class="live"', "data-version"))
    assert look(run).version == look(run).version


def test_events_name_each_version_once(tmp_path, serve):
    run = tmp_path / "version_0"
    server = serve(run)
    with urllib.request.urlopen(f"{server.address}events", timeout=20) as events:
        assert events.headers["Content-Type"] == "text/event-stream"
        first = events.readline().decode()
        assert first == f"data: {look(run).version}\n"
        assert f'data-version="{look(run).version}"' in get(server)[2]
        events.readline()
        grow(run)
        # Files come one after another, so that there may be several versions before the last one.
        while f"data: {look(run).version}\n" != (line := events.readline().decode()):
            assert line == "\n" or line.startswith("data: ")
        assert f'data-version="{look(run).version}"' in get(server)[2]


def test_the_page_needs_nothing_from_elsewhere(tmp_path, serve):
    run = tmp_path / "version_0"
    grow(run)
    server = serve(run)
    page = get(server)[2]
    assert "script-src &#39;self&#39;" in page or "script-src 'self'" in page
    assert page.count("<script") == 1
    assert '<script src="/live.js" defer></script>' in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    status, headers, script = get(server, "/live.js")
    assert (status, headers["Content-Type"]) == (200, "text/javascript; charset=utf-8")
    assert "EventSource" in script
    assert "http" not in script


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml", "/../secret", "/%2e%2e/secret", "/..%2fsecret", "/maps/../../secret", "//etc/passwd",
        "/static/../../secret", "/events/../secret", "/?file=../secret", "../secret", "http://elsewhere/",
    ],
)  # fmt: skip
def test_nothing_else_is_served(tmp_path, serve, path):
    (tmp_path / "secret").write_text("a secret")
    run = tmp_path / "version_0"
    grow(run)
    status, _, text = get(serve(run), path)
    assert status == 404
    assert "a secret" not in text


def test_only_reading_and_only_this_machine(tmp_path, serve):
    server = serve(tmp_path)
    assert server.server_address[0] == "127.0.0.1"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert get(server, method=method)[0] == 501
    status, headers, text = get(server, method="HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 0
    # A name that somebody made to mean this machine is none of its own.
    assert get(server, host=f"evil.example:{server.server_port}")[0] == 403
    assert get(server, host=f"localhost:{server.server_port}")[0] == 200


def test_of_versions_the_newest_is_followed(tmp_path, serve):
    server = serve(tmp_path)
    for number in (2, 10):
        grow(tmp_path / f"version_{number}")
    (tmp_path / "version_x").mkdir()
    assert f"<h1>{tmp_path.name}/version_10</h1>" in get(server)[2]


def test_what_cannot_be_read_at_the_moment_is_said(tmp_path, serve, monkeypatch):
    run = tmp_path / "version_0"
    grow(run)
    server = serve(run)

    def gone(*arguments):
        raise FileNotFoundError("maps/epoch=000.npz is <gone>")

    monkeypatch.setattr(live, "report_page", gone)
    assert "cannot be read at the moment (maps/epoch=000.npz is &lt;gone&gt;)" in get(server)[2]
    monkeypatch.undo()
    (run / "metrics.csv").write_text("step,loss\n1,0.5\n")
    assert "<h2>Curves</h2>" in get(server)[2]


def test_a_port_that_is_taken_or_none(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PrunexError, match=f"--port {port} cannot be had .* give another, or 0"):
            cli.run(["watch", str(tmp_path), "--port", str(port)])
    for typed, message in (
        (["--port", "65536"], "--port 65536 is not allowed: give a whole number from 0"),
        (["--port", "-1"], "--port -1 is not allowed"),
    ):
        with pytest.raises(PrunexError, match=message):
            cli.run(["watch", str(tmp_path), *typed])
    with pytest.raises(PrunexError, match="is a file: give a run folder"):
        cli.run(["watch", __file__])


def test_the_browser_is_opened_when_asked(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or len(opened) > 1)
    monkeypatch.setattr(ReportServer, "serve_forever", lambda self: None)
    for typed, said in ((["--open"], True), (["--open"], False), ([], False)):
        assert cli.run(["watch", str(tmp_path), *typed]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith("http://127.0.0.1:")
        assert ("no browser could be opened" in printed.err) == said
    assert len(opened) == 2


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_ctrl_c_ends_it_and_nothing_stays(tmp_path):
    # What a shell starts in the background ignores Ctrl-C, and so do the tests and what they start.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{heeds}; from prunex.recipes.commands.cli import main; main()"
    command = [sys.executable, "-c", script, "watch", str(tmp_path / "gone")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{address}events", timeout=20) as events:  # a browser that stays connected
            assert events.readline().startswith(b"data: ")
            process.send_signal(signal.SIGINT)
            assert events.read() == b"\n"  # it is told at once, however long the process takes to end
            _, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Traceback" not in errors
    port = int(address.rpartition(":")[2].strip("/"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert not list(Path(tmp_path).iterdir())
