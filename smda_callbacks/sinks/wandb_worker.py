"""One thread that does what may block, so that training never waits for a server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Task = Callable[[], object]


class Worker:
    """Runs tasks one after another in a daemon thread, which starts with the first task.

    ``on_error(what, error)`` is told of every task that raises; it must not raise itself. At most ``size`` tasks wait;
    a task that finds the queue full is dropped and counted in ``dropped``: the sender never waits.
    """

    def __init__(self, on_error: Callable[[str, Exception], None], size: int = 16) -> None:
        self.dropped = 0
        self._size = size
        self._on_error = on_error
        self._queue: queue.SimpleQueue[tuple[str, Task] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, what: str, task: Task, *, always: bool = False) -> bool:
        """Queue ``task``, called ``what`` in messages, and return at once; False if it was dropped.

        ``always`` queues it even where the queue is full: for the few tasks that end a run.
        """
        if self._queue.qsize() >= self._size and not always:
            self.dropped += 1
            return False
        self._queue.put((what, task))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="smda-wandb", daemon=True)
            self._thread.start()
        return True

    def close(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until all tasks are done; False if some are not. Submit nothing after it.

        What is not done goes on in the background for as long as the process lives.
        """
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            what, task = item
            try:
                task()
            except Exception as error:  # whatever W&B raises, training and the tasks behind it go on
                self._on_error(what, error)
