"""Imported by ``smda_callbacks_autostart.pth`` at the start of every interpreter under ``SMDA=1``, and then only."""

from __future__ import annotations

from smda_callbacks.launch.inject import install

install()
