"""The way to a W&B run, with a run that opens, fails and hangs when the test says so; no client, no server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from smda_callbacks.sinks import wandb_channel, wandb_server
from smda_callbacks.sinks.wandb_channel import Channel, Opening


class Desk:
    """Opens a run when ``gate`` is set; ``done`` is what reached it, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alive: bool = True, here: Any = None) -> None:
        self.gate, self.done = threading.Event(), list[str]()
        self.errors: list[str] = []
        self.let_go: list[Any] = []
        self.asked = 0
        self.fails: Exception | None = None
        self.run = SimpleNamespace(finish=lambda exit_code: self.done.append(f"finish {exit_code}"))
        opening = Opening(lambda: here, self._start, lambda run, own: self.done.append(f"introduce {own}"))
        self.channel = Channel(opening, lambda what, error: self.errors.append(f"{what}: {error}"), 4)
        monkeypatch.setattr(wandb_server, "server_of", lambda run: "http://server")
        monkeypatch.setattr(wandb_server, "answers", lambda url: self._answers(alive))
        monkeypatch.setattr(wandb_server, "let_go", self._let_go)
        monkeypatch.setattr(wandb_channel, "QUICK", 0.05)

    def _let_go(self, run: Any) -> bool:
        self.let_go.append(run)
        return True

    def _answers(self, alive: bool) -> bool:
        self.asked += 1
        return alive

    def _start(self) -> Any:
        assert self.gate.wait(10)
        if self.fails is not None:
            raise self.fails
        return self.run

    def write(self, name: str) -> Callable[[], None]:
        return lambda: self.done.append(name)


def test_rows_wait_for_the_run_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    for number in range(5):
        desk.channel.direct("row", desk.write(f"row {number}"))
    assert desk.channel.submit("table", desk.write("table"))
    assert desk.done == []
    desk.gate.set()
    assert desk.channel.close(0, 5.0)
    assert desk.done == ["introduce True", *(f"row {number}" for number in range(5)), "table", "finish 0"]
    assert desk.errors == desk.let_go == []
    assert desk.channel.dropped == 0


def test_rows_beyond_the_bound_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_channel, "MOST_KEPT", 3)
    desk = Desk(monkeypatch)
    for number in range(5):
        desk.channel.direct("row", desk.write(f"row {number}"))
    desk.gate.set()
    assert desk.channel.close(1, 5.0)
    assert desk.done == ["introduce True", "row 0", "row 1", "row 2", "finish 1"]
    assert desk.channel.dropped == 2


def test_a_run_that_is_open_is_used_at_once_and_never_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, here=SimpleNamespace())
    desk.channel.direct("row", desk.write("row"))
    assert desk.done == ["introduce False", "row"]
    assert desk.channel.close(0, 5.0)
    assert desk.done == ["introduce False", "row"]


def test_a_run_that_cannot_be_started_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch)
    desk.fails = OSError("no route")
    desk.channel.direct("row", desk.write("row"))
    desk.channel.submit("table", desk.write("table"))
    desk.gate.set()
    assert desk.channel.close(0, 5.0)
    assert desk.channel.failed
    assert (desk.done, desk.errors, desk.let_go) == ([], ["starting the run: no route"], [])


@pytest.mark.parametrize("alive", [True, False])
def test_closing_is_bounded_and_lets_go_of_a_dead_server_only(alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, alive=alive)
    monkeypatch.setattr(wandb_channel, "RESERVE", 0.1)
    desk.channel.direct("row", desk.write("row"))
    began = time.monotonic()
    assert not desk.channel.close(0, 0.5)
    took = time.monotonic() - began
    assert (desk.let_go == [None]) is not alive
    assert took < 1.0
    assert took > 0.4 or not alive  # a server that answers is waited for, a dead one is not
    desk.gate.set()


def test_what_may_wait_is_not_tried_while_the_server_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, alive=False, here=SimpleNamespace())
    for number in range(3):
        desk.channel.submit(f"table {number}", desk.write("table"))
    desk.channel.direct("row", desk.write("row"))
    assert desk.channel.close(0, 5.0)
    assert desk.done == ["introduce False", "row"]
    assert desk.errors == [f"table {number}: the W&B server does not answer" for number in range(3)]
    assert desk.asked == 1  # its silence holds for a while
    assert desk.let_go == []  # somebody else's run


def test_an_answer_of_any_kind_is_one_but_for_the_servers_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        code = 404

        def do_GET(self) -> None:
            self.send_response(self.code)
            self.end_headers()

        def log_message(self, *given: Any) -> None: ...

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # for other machines
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        found = {}
        for code in (200, 404, 401, 500, 503):
            Handler.code = code
            found[code] = wandb_server.answers(url)
        server.shutdown()
    assert found == {200: True, 404: True, 401: True, 500: False, 503: False}
    assert not wandb_server.answers(url, timeout=1.0)
