"""Attribution by other people's libraries, with the same run and the same question as ours.

Every peer gets what :mod:`recipes.evidence.peers_given` says: the trajectory of the run, its pairs, and the gradient of
every target at the trained model. What comes back is the predicted effect of a pair on a target, with minus without.
How peers are installed, and which settings are not their defaults, is in ``recipes/evidence/README.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from recipes.evidence import peers_bergson, peers_dattri, peers_kronfluence
from recipes.evidence.peers_given import Array, PeerError, given
from recipes.evidence.retrain import Run

Peer = Callable[[Run], Array]

_ALL: dict[str, Peer] = {
    "kronfluence EK-FAC": lambda run: peers_kronfluence.ekfac(given(run)),
    "dattri-LLM EK-FAC": lambda run: peers_dattri.ekfac(given(run)),
    "dattri-LLM EK-FAC, relative damping": lambda run: peers_dattri.ekfac(given(run), relative=0.1),
    "dattri-LLM AdamW-influence": peers_dattri.adamw_influence,
    "Bergson callback": peers_bergson.defaults,
    "Bergson callback, raw gradients": peers_bergson.raw,
}

#: Distributions that the peers are installed as.
DISTRIBUTIONS = ("kronfluence", "dattri-llm", "bergson")


def installed(peer: Peer, run: Run) -> Array:
    """What ``peer`` answers.

    Raises:
        PeerError: it is not installed, with what to do. Whatever else it raises is raised.
    """
    try:
        return peer(run)
    except ModuleNotFoundError as error:
        raise PeerError(f"{error.name} is not installed; see recipes/evidence/README.md for how.") from error


#: Name of a method -> its scores ``[pair, target]``. Other people's code may raise anything.
PEERS: dict[str, Peer] = {name: partial(installed, peer) for name, peer in _ALL.items()}


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
