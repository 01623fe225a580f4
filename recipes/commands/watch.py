"""``prunex watch``: the report follows a running training in the browser."""

from __future__ import annotations

import sys
import webbrowser
from contextlib import suppress
from typing import Any

from prunex.recipes.report.live import ReportServer


def watch(args: Any) -> int:
    """Serve until Ctrl-C."""
    with ReportServer(args.run, args.port) as server:
        print(server.address, flush=True)
        print(f"the report of {args.run}, on this machine alone; Ctrl-C ends it", file=sys.stderr, flush=True)
        if args.open and not webbrowser.open(server.address):
            print("no browser could be opened: give the address to one", file=sys.stderr)
        with suppress(KeyboardInterrupt):  # the way in which it ends
            server.serve_forever()
    return 0
