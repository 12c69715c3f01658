"""YAML -> :class:`SMDAConfig`. Every fault is reported, with the nearest valid key, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from smda_callbacks.config.schema import SMDAConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault."""


class _Loader(yaml.SafeLoader):
    """Safe, and no key twice: YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(source: str | Path | Mapping[str, Any] | SMDAConfig) -> SMDAConfig:
    """Read and check a configuration.

    A relative path in a file that starts with ``./`` or ``../`` is taken from the file's folder; any other, if it
    exists there. What does not is left as it is: a data set id, a release, or a path from the working directory.

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
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        faults = _faults(error)
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError("\n".join([f"{name} has {count}:", *(f"  - {fault}" for fault in faults)])) from error


def to_yaml(config: SMDAConfig) -> str:
    """The resolved configuration, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _faults(error: ValidationError) -> list[str]:
    """One line per key. A key that may be of several types is reported by pydantic once per type."""
    found: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for each in error.errors():
        unknown = each["type"] == "extra_forbidden"
        location = each["loc"] if unknown else _known_part(each["loc"])
        where = ".".join(map(str, location)) or "configuration"
        text = _unknown_key(location) if unknown else each["msg"].removeprefix("Value error, ")
        found.setdefault(where, []).append("missing, and there is no default" if each["type"] == "missing" else text)
        said = unknown or each["type"] == "missing" or isinstance(each.get("input"), Mapping | BaseModel)
        values[where] = "" if said else f", got {each.get('input')!r}"
    return [f"{where}: {_either(texts)}{values[where]}" for where, texts in found.items()]


def _either(texts: list[str]) -> str:
    head = "Input should be "
    return " or ".join([texts[0], *(text.removeprefix(head) for text in texts[1:])])


def _unknown_key(location: tuple[int | str, ...]) -> str:
    allowed = _keys_beside(location)
    near = get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {hint}Allowed here: {', '.join(allowed)}"


def _known_part(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The location up to its last key; what pydantic adds to it is the name of the type that it tried."""
    for end, key in enumerate(location):
        if isinstance(key, str) and key not in _keys_beside(location[: end + 1]):
            return location[:end]
    return location


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: Any = SMDAConfig
    for key in location[:-1]:
        if isinstance(key, str) and key in getattr(model, "model_fields", {}):
            annotation = model.model_fields[key].annotation
            inner = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else annotation
    return list(getattr(model, "model_fields", {}))


def _with_paths_from(config: SMDAConfig, folder: Path) -> SMDAConfig:
    sources = tuple(each.model_copy(update={"source": _beside(folder, each.source)}) for each in config.probes.sources)
    changes: dict[str, Any] = {
        "probes": config.probes.model_copy(update={"sources": sources}),
        "sae": config.sae.model_copy(update={"source": _beside(folder, config.sae.source)}),
    }
    if config.policy.path is not None:
        changes["policy"] = config.policy.model_copy(update={"path": _beside(folder, config.policy.path)})
    if config.model.id is not None:
        changes["model"] = config.model.model_copy(update={"id": _beside(folder, config.model.id)})
    return config.model_copy(update=changes)


def _beside(folder: Path, text: str) -> str:
    found = Path(os.path.normpath(folder / text))
    if Path(text).is_absolute() or not (text.startswith(("./", "../")) or found.exists()):
        return text
    return str(found.resolve() if ".." in found.parts else found)  # a path that leaves the folder again means another
