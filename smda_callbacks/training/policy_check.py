"""Is a saved policy one of this run?"""

from __future__ import annotations

from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.records import PolicyRecord


def check_policy(policy: PolicyRecord, instrument: Instrument) -> None:
    """Refuse a saved policy of other probes, another SAE, or other behaviours.

    Raises:
        ValueError: says what differs.
    """
    handle = instrument.handle
    advice = "Next step: distil one for this run (leave policy.path out), or use what the policy was made with."
    if policy.probe_hash != instrument.probes.hash:
        raise ValueError(
            f"the policy was distilled on other probes (hash {policy.probe_hash[:12]}) than this run's "
            f"({instrument.probes.hash[:12]}). {advice}"
        )
    if policy.sae_id != handle.id:
        raise ValueError(
            f"the policy was distilled with SAE {policy.sae_id!r}, but this run reads {handle.id!r}. {advice}"
        )
    if policy.features.max() >= handle.d_sae:
        raise ValueError(
            f"the policy names feature {policy.features.max()}, but the SAE has features 0 to {handle.d_sae - 1}. "
            f"{advice}"
        )
    if (policy.behaviours, policy.target) != (instrument.behaviours, instrument.target):
        raise ValueError(
            f"the policy predicts the {policy.target} of {policy.behaviours}, but this run scores the "
            f"{instrument.target} of {instrument.behaviours}. {advice}"
        )
