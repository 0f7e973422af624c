"""A hub on localhost: serves data sets from a folder, the way huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(root: Path, *, gated: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields the address and the list of requests. `root/owner/name/...` are the data sets."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def _missing(self, code: str, status: int = 404) -> None:
            self._answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self._info("/".join(parts[2:4]))
            elif parts[0] == "datasets" and parts[3] == "resolve":
                self._file("/".join(parts[1:3]), "/".join(parts[5:]))
            else:
                self._missing("EntryNotFound")

        do_HEAD = do_GET

        def _info(self, name: str) -> None:
            folder = root / name
            if not folder.is_dir():
                return self._missing("RepoNotFound", 401)
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            facts = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
            return self._answer(200, json.dumps(facts).encode(), Content_Type="application/json")

        def _file(self, name: str, file: str) -> None:
            path = root / name / file
            if name == gated:
                return self._missing("GatedRepo", 403)
            if not path.is_file():
                return self._missing("EntryNotFound")
            body = path.read_bytes()
            tag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self._answer(200, body, ETag=tag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
