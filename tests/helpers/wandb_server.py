"""A stand-in for W&B's server on this machine, in a process of its own that can be killed, halted and come back.

It knows what the client of wandb 0.31 needs to carry a run with tables, artifacts and alerts, and to ask what a run
has. What it was sent lies in a file, so that a server that comes back knows it. It says nothing about W&B's own rules.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.sinks.wandb_server import let_go as wandb_let_go

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
STATE, TROUBLE = "state.json", "trouble"

Values = dict[str, Any]


class Books:
    """What the server was sent. ``runs``: by ``project/id``; ``artifacts``: in order of their creation, like
    ``views``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.RLock()
        path = folder / STATE
        found: Values = json.loads(path.read_bytes()) if path.exists() else {}
        self.runs: dict[str, Values] = found.get("runs", {})
        self.artifacts: list[Values] = found.get("artifacts", [])
        self.alerts: list[str] = found.get("alerts", [])
        self.views: list[Values] = found.get("views", [])

    def keep(self) -> None:
        part = self.folder / f"{STATE}.part"
        names = ("runs", "artifacts", "alerts", "views")
        part.write_text(json.dumps({name: getattr(self, name) for name in names}))
        part.replace(self.folder / STATE)

    @property
    def trouble(self) -> str:
        """Empty, ``error`` (every answer is 503), ``deleted`` (the runs were, and their ids are not taken again)."""
        path = self.folder / TROUBLE
        return path.read_text() if path.exists() else ""


def op_viewer(books: Books, given: Values) -> Values:
    return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "admin": False,
                       "name": "me", "teams": {"edges": []}}}  # fmt: skip


def op_upsert(books: Books, given: Values) -> Values:
    key = f"{given.get('project') or 'uncategorized'}/{given['name']}"
    inserted = key not in books.runs
    run = books.runs.setdefault(
        key, {"name": given["name"], "files": {}, "config": {}, "summary": {}, "state": "running"}
    )
    if given.get("config"):
        run["config"] = json.loads(given["config"])
    project = {"id": "p", "name": key.split("/")[0], "entity": {"id": "e", "name": "me"}}
    lines = len(run["files"].get(HISTORY, ()))
    bucket = {"id": run["name"], "name": run["name"], "displayName": run["name"], "description": None,
              "config": json.dumps(run["config"]), "sweepName": None, "project": project,
              "historyLineCount": lines}  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def op_resume_status(books: Books, given: Values) -> Values:
    run, bucket = books.runs.get(f"{given['project']}/{given['name']}"), None
    if run is not None:
        lines = run["files"].get(HISTORY, [])
        bucket = {"id": run["name"], "name": run["name"], "displayName": run["name"], "tags": [], "notes": None,
                  "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]),
                  "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0,
                  "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "wandbConfig": '{"t": 1}'}  # fmt: skip
    return {"model": {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}


def op_run(books: Books, given: Values) -> Values:
    run = _run(books, given)
    if run is None:
        return {"project": {"run": None}}
    found = {"id": run["name"], "projectId": "1", "tags": [], "name": run["name"], "displayName": run["name"],
             "sweepName": None, "state": run["state"], "group": None, "jobType": None, "commit": None,
             "readOnly": False, "createdAt": "2026-01-01T00:00:00Z", "heartbeatAt": "2026-01-01T00:00:00Z",
             "description": None, "notes": None, "user": {"name": "me", "username": "me"}, "systemMetrics": "{}",
             "config": json.dumps(run["config"]), "summaryMetrics": json.dumps(run["summary"]),
             "historyLineCount": len(_history(run)), "historyKeys": _keys(run)}  # fmt: skip
    return {"project": {"run": found}}


def op_history_keys(books: Books, given: Values) -> Values:
    run = _run(books, given)
    return {"project": {"run": {"historyKeys": _keys(run or {"files": {}})}}}


def op_parquet(books: Books, given: Values) -> Values:
    return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": _history(_run(books, given))}}}}


def op_sampled(books: Books, given: Values) -> Values:
    wanted = json.loads(given["spec"])
    rows = [row for row in _history(_run(books, given)) if all(key in row for key in wanted["keys"])]
    rows = [row for row in rows if wanted.get("minStep", 0) <= row["_step"] < wanted.get("maxStep", 1 << 60)]
    found = [{key: row[key] for key in wanted["keys"]} for row in rows]
    return {"project": {"run": {"sampledHistory": [found]}}}


def op_run_files(books: Books, given: Values) -> Values:
    found = [{"name": name, "uploadUrl": f"BASE/storage/{given['run']}/{name}"} for name in given["files"]]
    return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": found}}


def op_artifact(books: Books, given: Values) -> Values:
    wanted = given["input"]
    number = str(len(books.artifacts))
    books.artifacts.append(
        {"id": number, "type": wanted["artifactTypeName"], "name": wanted["artifactCollectionName"],
         "run": wanted.get("runName"), "digest": wanted["digest"], "state": "PENDING"}
    )  # fmt: skip
    answer = {"id": number, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
    return {"createArtifact": {"artifact": answer}}


def op_manifest(books: Books, given: Values) -> Values:
    number = given.get("artifactID") or given["artifactManifestID"]
    file = {"id": "f", "uploadUrl": f"BASE/storage/manifest/{number}", "uploadHeaders": []}
    return {"createArtifactManifest": {"artifactManifest": {"id": number, "file": file}},
            "updateArtifactManifest": {"artifactManifest": {"id": number, "file": file}}}  # fmt: skip


def op_artifact_files(books: Books, given: Values) -> Values:
    edges = []
    for file in (given.get("input") or given)["artifactFiles"]:
        path = f"artifact/{file['artifactID']}/{file['name']}"
        edges.append({"node": {"id": "x", "name": file["name"], "displayName": file["name"], "storagePath": path,
                               "uploadUrl": f"BASE/storage/{path}", "uploadHeaders": [], "uploadMultipartUrls": None,
                               "artifact": {"id": file["artifactID"]}, "birthArtifact": None}})  # fmt: skip
    return {"createArtifactFiles": {"files": {"edges": edges}}}


def op_commit(books: Books, given: Values) -> Values:
    artifact = books.artifacts[int(given["artifactID"])]
    artifact["state"] = "COMMITTED"
    return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}


def op_artifact_type(books: Books, given: Values) -> Values:
    name = given["name"].split("/")[-1].split(":")[0]
    found = [{"artifactType": {"name": each["type"]}} for each in books.artifacts if each["name"] == name]
    return {"project": {"artifact": found[0] if found else None}}


def op_output_artifacts(books: Books, given: Values) -> Values:
    found = [each for each in books.artifacts if each["run"] == given["run"] and each["state"] == "COMMITTED"]
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    edges = [{"node": _artifact(each), "cursor": each["id"]} for each in found]
    return {"project": {"run": {"artifacts": {"totalCount": len(edges), "pageInfo": page, "edges": edges}}}}


def op_view(books: Books, given: Values) -> Values:
    books.views.append(given)
    project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
    kept = {key: given.get(key) for key in ("type", "displayName", "description", "spec")}
    view = {**kept, "id": f"v{len(books.views)}", "name": f"n{len(books.views)}", "project": project, "updatedAt": None}
    return {"upsertView": {"view": view, "inserted": True}}


def op_projects(books: Books, given: Values) -> Values:
    node = {"__typename": "Project", "id": "p", "name": "p", "entityName": "me", "createdAt": "2026-01-01T00:00:00",
            "isBenchmark": False, "user": None, "internalId": "1", "entity": {"name": "me"}}  # fmt: skip
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"models": {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page, "totalCount": 1}}


def op_alert(books: Books, given: Values) -> Values:
    books.alerts.append(str(given.get("title")))
    return {"notifyScriptableRunAlert": {"success": True}}


OPS: dict[str, Callable[[Books, Values], Values]] = {
    "Viewer": op_viewer,
    "GetDefaultEntity": op_viewer,
    "ServerFeaturesQuery": lambda books, given: {"serverInfo": {"features": []}},
    "UpsertBucket": op_upsert,
    "RunResumeStatus": op_resume_status,
    "RunStoppedStatus": lambda books, given: {"project": {"run": {"stopped": False}}},
    "Run": op_run,
    "LightweightRun": op_run,
    "RunHistoryKeys": op_history_keys,
    "RunParquetHistory": op_parquet,
    "SampledHistoryPage": op_sampled,
    "CreateRunFiles": op_run_files,
    "CreateArtifact": op_artifact,
    "CreateArtifactManifest": op_manifest,
    "UpdateArtifactManifest": op_manifest,
    "CreateArtifactFiles": op_artifact_files,
    "CommitArtifact": op_commit,
    "ArtifactType": op_artifact_type,
    "RunOutputArtifacts": op_output_artifacts,
    "NotifyScriptableRunAlert": op_alert,
    "ProjectInternalId": lambda books, given: {"project": {"id": "p", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}},
    "GetProjects": op_projects,
    "upsertView": op_view,
    "UpsertView2": op_view,
}


def _run(books: Books, given: Values) -> Values | None:
    name = given.get("name") or given.get("run") or given.get("runName") or given.get("runId")
    return books.runs.get(f"{given['project']}/{name}")


def _history(run: Values | None) -> list[Values]:
    return [json.loads(line) for line in (run or {"files": {}})["files"].get(HISTORY, ())]


def _keys(run: Values) -> Values:
    rows = _history(run)
    keys = {key: {"typeCounts": [{"type": "number"}]} for row in rows for key in row}
    return {"sets": [], "keys": keys, "lastStep": rows[-1]["_step"] + 1 if rows else -1}


def _artifact(found: Values) -> Values:
    project = {"__typename": "Project", "id": "p", "internalId": "1", "name": "p", "entity": {"name": "me"}}
    sequence = {"__typename": "ArtifactSequence", "id": "s", "name": found["name"], "project": project}
    return {"__typename": "Artifact", "id": found["id"], "artifactSequence": sequence, "versionIndex": 0,
            "artifactType": {"name": found["type"]}, "description": None, "metadata": None, "ttlDurationSeconds": -2,
            "ttlIsInherited": True, "tags": [], "historyStep": None, "state": found["state"], "size": 1,
            "digest": found["digest"], "commitHash": "c", "fileCount": 1, "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None, "aliases": []}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One connection of the client."""

    protocol_version = "HTTP/1.1"
    books: Books

    def log_message(self, *given: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        given = json.loads(body) if body else {}
        if self.books.trouble == "error":
            return self._answer({}, 503)
        with self.books.lock:
            found, code = self._graphql(given) if self.path.startswith("/graphql") else self._stream(given)
            self.books.keep()
        return self._answer(found, code)

    def _graphql(self, given: Values) -> tuple[Values, int]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", given["query"])
        name = given.get("operationName") or (found[1] if found else "")
        if self.books.trouble == "deleted" and name == "UpsertBucket":
            return {"errors": [{"message": "run was previously created and deleted; try a new run name"}]}, 409
        if name not in OPS:
            return {"errors": [{"message": f"unknown operation {name}"}], "data": None}, 200
        data = OPS[name](self.books, given.get("variables") or {})
        return json.loads(json.dumps({"data": data}).replace('"BASE/', f'"http://{self.headers["Host"]}/')), 200

    def _stream(self, given: Values) -> tuple[Values, int]:
        """Rows and summary of a run, ``/files/ENTITY/PROJECT/RUN/file_stream``."""
        parts = self.path.strip("/").split("/")
        if len(parts) != 5 or parts[-1] != "file_stream":
            return {}, 404
        if self.books.trouble == "deleted":
            return {"error": "run not found"}, 404
        run = self.books.runs[f"{parts[2]}/{parts[3]}"]
        for name, change in (given.get("files") or {}).items():
            if name == SUMMARY:
                run["summary"] = json.loads(change["content"][-1])
            else:
                kept = run["files"].get(name, [])[: change["offset"]]
                run["files"][name] = kept + change["content"]
        if "complete" in given:
            run["state"] = "finished" if not given.get("exitcode") else "crashed"
        return {"exitcode": None, "limits": {}}, 200

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            found = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(found) if self.headers.get("Content-Encoding") == "gzip" else found

    def _answer(self, found: Values, code: int = 200) -> None:
        body = json.dumps(found).encode()
        with suppress(OSError):  # a client that was killed
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


class Server:
    """The stand-in, from the side of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """At the port that it had before, if it had one."""
        command = [sys.executable, "-m", "tests.helpers.wandb_server", str(self.folder), str(self.port)]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def halt(self) -> None:
        """Takes connections and never answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def has_trouble(self, kind: str) -> None:
        (self.folder / TROUBLE).write_text(kind)

    @property
    def books(self) -> Books:
        return Books(self.folder)

    def rows(self, run: str) -> list[Values]:
        """The history of the run ``project/id``."""
        return _history(self.books.runs.get(run))

    def wait_for(self, true: Callable[[Books], bool], seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while not true(self.books):
            assert time.monotonic() < until, self.books.runs
            time.sleep(0.05)


@contextmanager
def wandb_server(folder: Path) -> Iterator[Server]:
    """A running server, and W&B's client, online, made to use it and nothing else."""
    import wandb

    (folder / "server").mkdir()
    server = Server(folder / "server")
    server.start()
    wandb.teardown()  # an earlier test's process, which the environment names
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        settings = {"BASE_URL": server.url, "API_KEY": "a" * 40, "ERROR_REPORTING": "false", "SILENT": "true"}
        for name, value in settings.items():
            patch.setenv(f"WANDB_{name}", value)
        try:
            yield server
        finally:
            if wandb.run is not None:  # a test that failed
                wandb_let_go(wandb.run)
            server.kill()
            wandb.teardown()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *given: Any) -> None: ...


if __name__ == "__main__":
    Handler.books = Books(Path(sys.argv[1]))
    with _Quiet(("127.0.0.1", int(sys.argv[2])), Handler) as listening:
        print(listening.server_port, flush=True)
        listening.serve_forever()
