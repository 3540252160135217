"""A hub on this machine: the few requests by which huggingface_hub makes a repository and fills it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_of_a_test"


class Hub:
    """`repos`: their files by path; `sent`: names of requests; `refuse`: a status for every commit."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.refuse = 0
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.sent.append(f"{method} {path}")
        if method == "PUT":
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.repos:
                return 409, {"error": "it exists", "url": f"{self.address}/{name}"}
            self.repos[name] = {}
            self.private[name] = asked.get("visibility", asked.get("private")) in ("private", True)
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if "pipeline_tag" in front else [{"message": "no pipeline_tag"}]
            return (400 if wrong else 200), {"errors": wrong, "warnings": []}
        if path.endswith("/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._large(o) for o in json.loads(body)["objects"]],
            }
        repo = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            return 200, {"files": [self._mode(one["path"]) for one in json.loads(body)["files"]]}
        if "/commit/" in path:
            if self.refuse:
                return self.refuse, {"error": "You do not have the rights"}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.repos[repo][value["path"]] = self.large[value["oid"]]
            return 200, {
                "commitUrl": f"{self.address}/{repo}/commit/1",
                "commitOid": "1",
                "pullRequestUrl": None,
            }
        if repo in self.repos:
            return 200, {
                "id": repo,
                "sha": "0",
                "siblings": [{"rfilename": name} for name in self.repos[repo]],
            }
        return 404, {"error": f"nothing at {path}"}

    def _large(self, asked: dict) -> dict:
        shown = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.large:
            return shown
        return shown | {"actions": {"upload": {"href": f"{self.address}/put/{asked['oid']}"}}}

    @staticmethod
    def _mode(path: str) -> dict:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_known = self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, told = hub.answer(self.command, self.path, body) if is_known else (401, {"error": "who?"})
            said = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_POST = do_PUT = do

        def log_message(self, format: str, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
