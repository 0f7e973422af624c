"""The page for people, as paths of the server: its files and the report of a run. Knows no model.

Everything the page needs lies beside this file; its headers forbid it to load or send anything elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qs

from zhibei.serve.gatekeeper import Receive, Scope, Send, send_bytes
from zhibei.serve.hosted import Hosted, find
from zhibei.serve.refusals import Refusal
from zhibei.serve.service import Handler

FOLDER = Path(__file__).parent / "web"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_REPORT_HEADERS = {
    # The report is one file with its style and script inside. In a sandbox it can neither read the key nor ask anyone.
    "Content-Security-Policy": "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def page_files() -> dict[str, Handler]:
    """A path for each file of the page; `/` is the page itself."""
    paths = {f"/{file.name}": file for file in sorted(FOLDER.iterdir()) if file.suffix in _KINDS}
    paths["/"] = paths.pop("/index.html")
    return {path: _file(file) for path, file in paths.items()}


def _file(file: Path) -> Handler:
    body, kind = file.read_bytes(), _KINDS[file.suffix]

    async def give(scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, body, kind=kind, headers=_HEADERS)

    return give


def report_page(hosted: Mapping[str, Hosted]) -> Handler:
    """The report of the run behind `?model=NAME`, as it lies on disk now."""

    async def give(scope: Scope, receive: Receive, send: Send) -> None:
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("model", [""])[0]
        one = find(hosted, asked)
        if one.report is None or not one.report.is_file():
            raise Refusal(404, f"{one.name} has no report: it is no run of zhibei", "model", "no_report")
        await send_bytes(send, one.report.read_bytes(), kind=_KINDS[".html"], headers=_REPORT_HEADERS)

    return give
