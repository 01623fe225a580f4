"""The report of a run that is still going on, served to a browser on this machine; nothing is written into the run."""

from __future__ import annotations

import os
import threading
import zlib
from datetime import datetime
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from prunex.callbacks.run_folder import RECORD
from prunex.errors import PrunexError
from prunex.files import DRAFT, is_there
from prunex.recipes.report.page import render, report_page, run_name
from prunex.recipes.runs import SUMMARY, home, slim_folder, versions

LOCAL = "127.0.0.1"
POLL = 1.0  # seconds between two looks at the run
BEAT = 15.0  # seconds after which a silent connection gets a sign of life
CLOSING = 5.0  # seconds in which loggers write their last lines after the summary
PARTS = ("maps", "score", "slim")  # folders in a run that the report reads
SHOWS = ("metrics.csv", RECORD, "maps", "slim", SUMMARY)  # without any of them a run has nothing to show yet


class Look(NamedTuple):
    """A run at one moment: its folder, a name for what it holds, and when that changed last (None: nothing there)."""

    folder: Path
    version: str
    changed: float | None


def look(run: Path) -> Look:
    """What a run's folder holds now; of a folder of versions, its newest one's, as Lightning numbers them."""
    folder = home(_newest(run))
    slim = slim_folder(folder)
    places = {folder, *(folder / part for part in PARTS), *((slim,) if slim else ())}
    held = sorted(file for place in places for file in _files(place))
    is_folder = is_there(folder, Path.is_dir)
    version = zlib.crc32(repr((str(folder), is_folder, held)).encode(errors="replace"))
    return Look(folder, f"{version:08x}", max((changed for _, changed, _ in held), default=0) / 1e9 or None)


def _newest(run: Path) -> Path:
    """The newest ``version_N`` in a folder that is no run itself."""
    if not is_there(run, Path.is_dir) or any((run / name).exists() for name in ("config.yaml", *SHOWS)):
        return run
    return next(iter(versions(run)), run)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Path, time of change and size of a folder's files, but drafts and the report, which is written from the rest."""
    listed = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file() and not entry.name.startswith(DRAFT) and entry.name != "report.html":
                    about = entry.stat()
                    listed.append((entry.path, about.st_mtime_ns, about.st_size))
    except OSError:  # not there, or gone between two looks
        return []
    return listed


def page_of(run: Path, seen: Look) -> bytes:
    """The report of what a run holds, or a page that says what it waits for."""
    live = {"version": seen.version, "state": _state(seen)}
    waits_for = _waits_for(run, seen.folder)
    if not waits_for:
        try:
            return report_page(seen.folder, live)
        except (PrunexError, OSError) as error:  # a file may go, or be half a file, while it is read
            waits_for = f"The run cannot be read at the moment ({error}). This page looks again when it changes."
    return render("waiting.html", title=run_name(seen.folder), waits_for=waits_for, live=live)


def _waits_for(run: Path, folder: Path) -> str:
    if not is_there(folder, Path.is_dir):
        return f"There is no folder {run} yet. The report appears here once a training writes into it."
    if any((folder / name).exists() for name in SHOWS):
        return ""
    begun = f"There is a folder {run}, and nothing of a run in it."
    if (folder / "config.yaml").is_file():
        begun = "Training has begun: config.yaml is there, metrics and maps are not."
    return f"{begun} The report appears here with the first metrics.csv, maps/ or slim/ that is written."


def _state(seen: Look) -> str:
    if seen.changed is None:
        return f"looked at {datetime.now():%H:%M:%S}; looks again every {POLL:.0f} s"
    when = datetime.fromtimestamp(seen.changed)
    last = f"last change {when:%H:%M:%S}" + ("" if when.date() == datetime.now().date() else f" on {when:%d %B %Y}")
    summary = seen.folder / SUMMARY
    # A run that goes on writes metrics behind the summary of the training before it.
    ended = summary.is_file() and _time(summary) >= _time(seen.folder / "metrics.csv") - CLOSING
    if ended:
        return f"training has ended: {SUMMARY} is written; {last}"
    return f"follows the run, {last}; what the page misses may come when training ends"


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


class ReportServer(ThreadingHTTPServer):
    """Serves a run's report at ``/``, and at ``/events`` the name of each version of it, to this machine alone.

    Args:
        run: A run's folder, or one of versions; it need not be there yet.
        port: 0 for a free one.

    Raises:
        PrunexError: Where the port cannot be had.
    """

    daemon_threads = True  # a browser that stays connected must not keep the command from ending

    def __init__(self, run: str | Path, port: int = 0) -> None:
        self.run = Path(run).expanduser()
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._page: tuple[str, bytes] = ("", b"")
        try:
            super().__init__((LOCAL, port), _Handler)
        except OSError as error:
            raise PrunexError(
                f"--port {port} cannot be had ({error.strerror}): give another, or 0 for a free one"
            ) from error

    def server_close(self) -> None:
        """Let go of the port, and of browsers that are still connected."""
        self.ended.set()
        super().server_close()

    @property
    def address(self) -> str:
        """Where the report is."""
        return f"http://{LOCAL}:{self.server_port}/"

    def page(self) -> bytes:
        """The page as the run is now; made once a version, however many ask."""
        with self._lock:
            seen = look(self.run)
            if self._page[0] != seen.version:
                self._page = seen.version, page_of(self.run, seen)
            return self._page[1]

    @cached_property
    def script(self) -> bytes:
        """What keeps a page up to date."""
        return (files("prunex.recipes") / "templates" / "live.js").read_bytes()


class _Handler(BaseHTTPRequestHandler):
    """Answers by a list of three names: no path is ever made of what was asked for."""

    server: ReportServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        # A page elsewhere whose name was made to mean this machine asks under its own name.
        if self.headers.get("Host", "").rpartition(":")[0] not in (LOCAL, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "asked for under another name than this machine's")
        elif self.path == "/":
            self._answer(self.server.page(), "text/html; charset=utf-8")
        elif self.path == "/live.js":
            self._answer(self.server.script, "text/javascript; charset=utf-8")
        elif self.path == "/events" and self.command == "GET":
            self._events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self._headers(kind, {"Content-Length": str(len(content))})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _headers(self, kind: str, more: dict[str, str]) -> None:
        # A page that a browser kept would be shown after the run went on.
        named = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        for name, value in (named | more).items():
            self.send_header(name, value)
        self.end_headers()

    def _events(self) -> None:
        """Send the name of the version, and of each new one, until the browser or the server goes."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self._headers("text/event-stream", {})
        sent, silent = "", 0.0
        # Server-sent events: a line of data each, and a line that begins with a colon is no event.
        try:
            while not self.server.ended.is_set():
                version = look(self.server.run).version
                if version != sent or silent >= BEAT:
                    self.wfile.write(f"data: {version}\n\n".encode() if version != sent else b": \n\n")
                    sent, silent = version, 0.0
                self.server.ended.wait(POLL)
                silent += POLL
        except OSError:  # the browser has gone
            return

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line a request would hide the address."""
