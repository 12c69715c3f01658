"""When to stop trying: attribution that fails again and again for one reason only costs."""

from __future__ import annotations

import re

#: Windows in a row that fail for the same reason, after which attribution is switched off.
GIVE_UP = 3


class Attempts:
    """Counts windows in a row that could not be attributed for the same reason."""

    def __init__(self) -> None:
        self._reason, self._count = "", 0

    def succeeded(self) -> None:
        """A window was attributed."""
        self._reason, self._count = "", 0

    def failed(self, why: str) -> bool:
        """A window was not; returns whether it is time to give up. Reasons that differ in numbers only are the same."""
        reason = re.sub(r"[\d.,%]+", "#", why)
        self._count = self._count + 1 if reason == self._reason else 1
        self._reason = reason
        return self._count >= GIVE_UP
