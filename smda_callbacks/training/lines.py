"""What the log says of a run: one line at its start, at every window and at its end."""

from __future__ import annotations

import logging
import sys

from smda_callbacks.records import WindowRecord
from smda_callbacks.training.monitor import Monitor

logger = logging.getLogger("smda_callbacks")


def show_log() -> None:
    """Show the library's messages where the program has not set up logging itself, without breaking progress bars."""
    if logger.hasHandlers():
        return
    from tqdm.auto import tqdm

    class BarFriendly(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tqdm.write(f"[smda] {record.getMessage()}", file=sys.stderr)

    logger.addHandler(BarFriendly())
    logger.setLevel(logging.INFO)


def opening_line(monitor: Monitor) -> str:
    """One line on what is watched and how far it may be believed."""
    policy, quality = monitor.policy, monitor.policy.quality[0]
    gaps = [row["category"] for row in monitor.start.gaps if row["is_gap"]]
    preferred = ", as this reward model prefers it," if monitor.instrument.by_preference else ""
    return (
        f"watching {', '.join(policy.behaviours)}{preferred} on {len(monitor.plan.probes)} probes through "
        f"{len(policy.features)} features of {policy.sae_id}: R² {quality.r2:.2f}, leave-one-out "
        f"{quality.r2_loo:.2f}, λ {policy.lam:.3g}; "
        f"gaps: {', '.join(gaps) or 'none'}"
    )


def attribution_line(monitor: Monitor) -> str:
    """One line on whether and how pairs are attributed."""
    found = monitor.attribution
    if found.attributor is None:
        return f"training pairs are not attributed: {found.choice.why}"
    notes = "".join(f"; {note}" for note in found.manifest["notes"])
    units = str(found.manifest["level"]).removesuffix("s") + "s"
    what = f"attributing {units} of the data set by engine {found.choice.engine}"
    return f"{what}: {found.choice.why}{notes}"


def group_means(monitor: Monitor) -> tuple[float, float]:
    """Mean of the first behaviour over the probes to refuse and over those to comply with, at the last snapshot."""
    y = monitor.snapshot.y[:, 0]
    refuse = [probe.expected == "refuse" for probe in monitor.plan.probes.probes]
    inverse = [not flag for flag in refuse]
    return float(y[refuse].mean()), float(y[inverse].mean())


def window_line(monitor: Monitor, record: WindowRecord) -> str:
    """One line on a window."""
    if record.status != "ok":
        return f"step {record.step}: {record.status}"
    harmful, benign = group_means(monitor)
    name = monitor.policy.behaviours[0]
    return f"step {record.step}: {name} {harmful:.3f} on probes to refuse, {benign:.3f} on the others"


def closing_line(monitor: Monitor, train_seconds: float) -> str:
    """One line on what the run did and what watching it cost."""
    share = monitor.seconds / train_seconds if train_seconds else 0.0
    harmful, benign = group_means(monitor)
    name = monitor.policy.behaviours[0]
    return (
        f"done: {name} {harmful:.3f} on probes to refuse, {benign:.3f} on the others; "
        f"measuring took {monitor.seconds:.1f} s, {share:.0%} of the training time"
    )
