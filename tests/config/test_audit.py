"""Every key of the audit section arrives in the options of an audit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from smda_callbacks.config.audit import audit_options
from smda_callbacks.config.load import ConfigError, check_config
from smda_callbacks.config.schema import AuditConfig, SMDAConfig
from smda_callbacks.training.audit_step import AuditOptions

#: key -> a value that is not the default.
KEYS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "steps": 2,
    "optimizer": "sgd",
    "repeats": 3,
    "rank": 4,
    "alpha": 8.0,
    "target_modules": "q_proj",
    "max_grad_norm": 0.5,
    "max_length": 77,
    "loss_on": "all",
}


def config_with(**audit: Any) -> SMDAConfig:
    return check_config({"sae": {"source": "x"}, "audit": audit, "seed": 3}, "the test's configuration")


def test_the_defaults_of_both_are_the_same() -> None:
    assert KEYS.keys() == AuditConfig.model_fields.keys()
    assert audit_options(check_config({"sae": {"source": "x"}}, "the test's configuration")) == AuditOptions()


@pytest.mark.parametrize("key", KEYS)
def test_a_changed_key_arrives_and_others_stay(key: str) -> None:
    found = asdict(audit_options(config_with(**{key: KEYS[key]})))
    assert found == {**asdict(AuditOptions(seed=3)), key: KEYS[key]}


def test_names_of_modules_may_be_a_list() -> None:
    found = audit_options(config_with(target_modules=["q_proj", "v_proj"])).target_modules
    assert found == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        ({"learning_rate": 0}, r"audit.learning_rate: Input should be greater than 0"),
        ({"optimizer": "lion"}, r"audit.optimizer: Input should be 'adamw_torch' or 'sgd'"),
        ({"learningrate": 1}, r"audit.learningrate: unknown key; did you mean 'learning_rate'\?"),
        ({"repeats": 0}, r"audit.repeats: Input should be greater than or equal to 1"),
    ],
)
def test_faults_are_named(audit: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(**audit)
