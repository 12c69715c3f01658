"""YAML -> :class:`SMDAConfig`. Every fault is reported, with the nearest valid key, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from smda_callbacks.config.schema import SMDAConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault."""


def load_config(source: str | Path | Mapping[str, Any] | SMDAConfig) -> SMDAConfig:
    """Read and check a configuration; relative paths in a file are taken from the file's folder.

    Raises:
        ConfigError: missing file, broken YAML, unknown keys, wrong types, values out of range: all at once.
    """
    if isinstance(source, SMDAConfig):
        return source
    if isinstance(source, Mapping):
        return check_config(source, "the given mapping")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"configuration {str(path)!r} does not exist. Next step: check the path.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is no valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path.name} must hold a mapping of sections, got {type(values).__name__}.")
    return _with_paths_from(check_config(values, path.name), path.parent)


def check_config(values: Mapping[str, Any], name: str) -> SMDAConfig:
    """Check a mapping.

    Raises:
        ConfigError: lists every fault.
    """
    try:
        return SMDAConfig.model_validate(dict(values))
    except ValidationError as error:
        faults = [_fault(each["loc"], each["type"], each["msg"], each.get("input")) for each in error.errors()]
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n".join([f"{name} has {count}:", *(f"  - {fault}" for fault in faults)])) from error


def to_yaml(config: SMDAConfig) -> str:
    """The resolved configuration, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _fault(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    where = ".".join(map(str, location))
    if kind == "extra_forbidden":
        allowed = _keys_beside(location)
        near = get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown key; {hint}Allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{where}: missing, and there is no default"
    shown = "" if isinstance(value, Mapping | BaseModel) else f", got {value!r}"
    return f"{where or 'configuration'}: {message.removeprefix('Value error, ')}{shown}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: Any = SMDAConfig
    for key in location[:-1]:
        if isinstance(key, str) and key in getattr(model, "model_fields", {}):
            annotation = model.model_fields[key].annotation
            inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else annotation
    return list(getattr(model, "model_fields", {}))


def _with_paths_from(config: SMDAConfig, folder: Path) -> SMDAConfig:
    def settle(text: str) -> str:
        candidate = folder / text
        return str(candidate) if not Path(text).is_absolute() and candidate.exists() else text

    sources = tuple(each.model_copy(update={"source": settle(each.source)}) for each in config.probes.sources)
    changes: dict[str, Any] = {
        "probes": config.probes.model_copy(update={"sources": sources}),
        "sae": config.sae.model_copy(update={"source": settle(config.sae.source)}),
    }
    if config.policy.path is not None:
        changes["policy"] = config.policy.model_copy(update={"path": settle(config.policy.path)})
    if config.model.id is not None:
        changes["model"] = config.model.model_copy(update={"id": settle(config.model.id)})
    return config.model_copy(update=changes)
