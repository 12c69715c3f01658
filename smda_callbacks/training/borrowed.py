"""The caller's own model, given back as it was lent: without an adapter, its flags and its configuration as before."""

from __future__ import annotations

from typing import Any

from torch import nn


class Borrowed:
    """Notes what ``model`` is like, and makes it so again.

    Noted: every module's children and plain attributes, whether it trains, which weights require a gradient, the
    configuration, and the device. Weights are not copied: whoever borrows a model leaves those be.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [(each, dict(each._modules), _plain(each)) for each in model.modules()]
        self._wanted = [(each, each.requires_grad) for each in model.parameters()]
        configs = (getattr(model, name, None) for name in ("config", "generation_config"))
        self._configs = [(each, dict(vars(each))) for each in configs if each is not None]
        self._device = next((each.device for each in model.parameters()), None)

    def give_back(self) -> None:
        """Make the model what it was."""
        for module, children, plain in self._modules:
            module._modules.clear()
            module._modules.update(children)
            for name in _plain(module).keys() - plain.keys():
                delattr(module, name)
            vars(module).update(plain)
        for parameter, wanted in self._wanted:
            parameter.requires_grad_(wanted)
        for config, values in self._configs:
            vars(config).clear()
            vars(config).update(values)
        moved = next((each.device for each in self._model.parameters()), None)
        if moved != self._device and self._device is not None:
            self._model.to(self._device)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}
