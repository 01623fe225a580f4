"""A small stand-in of the Hub's HTTP interface: repositories are made, committed to and downloaded from, in memory."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class Server(ThreadingHTTPServer):
    """Attributes: ``files`` by repository and name, ``asked`` the names downloaded."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = {}, set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content, headers=None, status=200):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            self.server.files["me/" + json.loads(sent)["name"]] = {}
            return self.answer({"url": f"{self.server.address}/me/{json.loads(sent)['name']}"})
        if parts == ["api", "validate-yaml"]:  # of a model card
            return self.answer({"errors": [], "warnings": []})
        repository = self.server.files["/".join(parts[2:4])]
        if parts[4] == "preupload":
            named = [file["path"] for file in json.loads(sent)["files"]]
            told = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]
            return self.answer({"files": told})
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.address}/me/x/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        repository = self.server.files.get(name)
        if repository is None:
            return self.answer({"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}, 404)
        if "resolve" in parts:
            self.server.asked.add(parts[-1])
            content = repository[parts[-1]]
            return self.answer(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        if "tree" in parts:
            rows = [{"type": "file", "path": f, "size": len(c), "oid": "b" * 40} for f, c in repository.items()]
            return self.answer(rows)
        return self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in repository]})

    do_HEAD = do_GET
