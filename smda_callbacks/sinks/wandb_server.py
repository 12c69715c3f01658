"""Whether W&B's server answers, and how to let go of a run where it does not.

Measured with wandb 0.31 and a server that is gone: a table costs 19 s, and neither ``run.finish()`` nor the end of the
process comes back, whatever ``finish_timeout`` says, once an artifact or an alert is on its way.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from time import monotonic
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

#: Seconds that a server may take to answer, and for which its answer is taken to hold.
ANSWERS_WITHIN, HOLDS_FOR = 3.0, 5.0

CORE = "wandb-core"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class ServerGoneError(ConnectionError):
    """W&B's server does not answer."""


class Pulse:
    """Whether the server of ``url()`` answers, asked at most every five seconds. ``url()`` None: taken to answer."""

    def __init__(self, url: Callable[[], str | None]) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._asked: float | None = None
        self._alive = True

    def beats(self) -> bool:
        """Whether it answers. Waits up to three seconds."""
        with self._lock:
            if self._asked is None or monotonic() - self._asked > HOLDS_FOR:
                url = self._url()
                self._alive = url is None or answers(url)
                self._asked = monotonic()
            return self._alive


def answers(url: str, timeout: float = ANSWERS_WITHIN) -> bool:
    """Whether anything but an error of its own answers at ``url``: a certificate that we cannot check does."""
    # A proxy of the environment is for other machines.
    opener = build_opener(*([ProxyHandler({})] if urlsplit(url).hostname in LOOPBACK else []))
    try:
        with opener.open(f"{url.rstrip('/')}/healthz", timeout=timeout):
            return True
    except HTTPError as error:
        return error.code < 500
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, HTTPException):
        return False


def server_of(run: Any) -> str | None:
    """Address of the server that ``run`` is sent to, of the one that a new run would be where it is None.

    None where there is nothing to ask: the run is offline or disabled, or W&B was given a proxy of its own.
    """
    import wandb

    settings: Any = wandb.setup().settings if run is None else getattr(run, "settings", None)
    if getattr(run, "offline", False) or getattr(settings, "mode", None) not in ("online", "shared"):
        return None
    if settings.http_proxy or settings.https_proxy:
        return None
    return str(settings.base_url)


def let_go(run: Any) -> bool:
    """End W&B's own process, so that nothing waits for a server that is gone; ``run``: ours, None while it starts.

    What was on its way is lost to W&B. False, and nothing is done, where the program has another run open.
    """
    import wandb

    open_runs = (wandb.run, *getattr(_singleton(), "_active_runs", ()))
    if any(each is not None and each is not run for each in open_runs):
        return False
    _end_core()
    with suppress(Exception):  # the process that it would say goodbye to is gone; the next run gets a new one
        wandb.teardown()
    with suppress(ImportError, AttributeError):
        from wandb.sdk.lib import module

        module.unset_globals()  # what run.finish() does: wandb.run is None again
    return True


def _end_core() -> None:
    """End W&B's process, by W&B's own handle, which then knows of it; else by its name among our children."""
    import psutil

    connection = getattr(_singleton(), "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()
        process.wait(1.0)
        return
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # ended in between
            if CORE in child.name():
                child.kill()
                child.wait(1.0)


def _singleton() -> Any:
    """W&B's own state. ``wandb.setup()`` would start a process that is not there."""
    with suppress(ImportError, AttributeError):
        from wandb.sdk import wandb_setup

        return wandb_setup.singleton()
    return None
