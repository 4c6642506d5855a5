"""A hub on this machine: the API of Hugging Face and of ModelScope over a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class HubServer:
    """The address of a running server, and what it has sent.

    Attributes:
        url: Its address.
        sent: Bytes of file contents sent, by path below the folder.
        max_bytes: Bytes of one answer after which the connection breaks; None for no break.
        hidden: Repositories that the API of Hugging Face does not know.
    """

    url: str
    sent: dict[str, int] = field(default_factory=dict)
    max_bytes: int | None = None
    hidden: set[str] = field(default_factory=set)


@contextmanager
def serve_hub(root: Path) -> Iterator[HubServer]:
    """Serve ``root/ORG/NAME/...`` until the context ends."""
    state = HubServer("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            match parts:
                case ["api", "models", org, name, *rest]:
                    self.answer_api(f"{org}/{name}", rest)
                case ["api", "v1", "models", org, name, "repo", "files"]:
                    assert parse_qs(url.query)["Recursive"] == ["true"]
                    self.answer_modelscope(f"{org}/{name}")
                case ["models", org, name, "resolve", _, *path] | [org, name, "resolve", _, *path]:
                    self.send_file("/".join((org, name, *path)), with_body)
                case _:
                    self.send_json({}, 404)

        def answer_api(self, repo: str, rest: list[str]) -> None:
            if not (root / repo).is_dir() or repo in state.hidden:
                self.send_json({"error": "Repository not found"}, 404, "RepoNotFound")
            elif rest[:1] == ["tree"]:
                self.send_json(
                    [
                        {"type": "file", "path": p, "size": s, "oid": "0"}
                        for p, s in self.list_files(repo)
                    ]
                )
            elif rest[:1] == ["revision"] and rest[1:] not in (["main"], [COMMIT]):
                self.send_json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
            else:
                self.send_json(
                    {
                        "id": repo,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": p} for p, _ in self.list_files(repo)],
                    }
                )

        def answer_modelscope(self, repo: str) -> None:
            if not (root / repo).is_dir():
                return self.send_json({"Code": 404}, 404)
            files = [{"Type": "blob", "Path": p, "Size": s} for p, s in self.list_files(repo)]
            return self.send_json({"Code": 200, "Data": {"Files": files}})

        def list_files(self, repo: str) -> list[tuple[str, int]]:
            return [
                (path.relative_to(root / repo).as_posix(), path.stat().st_size)
                for path in sorted((root / repo).rglob("*"))
                if path.is_file()
            ]

        def send_json(self, data: object, status: int = 200, error_code: str = "") -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            if error_code:
                self.send_header("X-Error-Code", error_code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_file(self, path: str, with_body: bool) -> None:
            if not (root / path).is_file():
                return self.send_json({}, 404, "EntryNotFound")
            data = (root / path).read_bytes()
            begin, end = 0, len(data)
            text = self.headers.get("Range", "").removeprefix("bytes=")
            if text:
                first, last = text.split("-")
                begin, end = int(first), min(int(last) + 1, len(data)) if last else len(data)
            self.send_response(206 if text else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(end - begin))
            if text:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
            self.end_headers()
            if not with_body:
                return None
            body = data[begin:end]
            if state.max_bytes is not None and len(body) > state.max_bytes:
                body = body[: state.max_bytes]
                self.close_connection = True
            self.wfile.write(body)
            state.sent[path] = state.sent.get(path, 0) + len(body)
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
