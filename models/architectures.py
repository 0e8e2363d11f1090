"""The architectures by name, so that a stored configuration says which model to build.

``config.json`` of a bundle or of a training stage holds ``{"architecture": name, "model": fields}``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.generator import Generator, GeneratorConfig
from models.naive import NaiveConfig, NaiveDecoder
from models.onerec_session import OneRecSession, SessionConfig
from models.onerec_v1 import OneRecV1, V1Config
from models.onerec_v2 import OneRecV2, V2Config

ARCHITECTURES: dict[str, tuple[type[GeneratorConfig], Callable[[Any], Generator]]] = {
    "onerec_v2": (V2Config, OneRecV2),
    "onerec_v1": (V1Config, OneRecV1),
    "onerec_session": (SessionConfig, OneRecSession),
    "naive": (NaiveConfig, NaiveDecoder),
}


def config_of(architecture: str, config: Mapping[str, Any]) -> GeneratorConfig:
    """The configuration object; raises ValueError for an unknown architecture or field."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[architecture][0]
    unknown = sorted(set(config) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(
            f"{architecture} has no {', '.join(unknown)}; the configuration is of another architecture or code version"
        )
    return kind(**config)


def model_of(config: GeneratorConfig) -> Generator:
    """A new model of the configuration's architecture, on the default device."""
    return ARCHITECTURES[name_of(config)][1](config)


_DRAWN = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _Undrawn(TorchFunctionMode):
    """Leaves out random initial values: they are nearly all of the time that a new model takes."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in _DRAWN else func(*args, **kwargs)  # torch.nn.init hands on by keyword


def restored(config: GeneratorConfig, state: Mapping[str, Tensor]) -> Generator:
    """The model of ``config`` with the weights of ``state``, strictly; raises RuntimeError when they do not fit."""
    with _Undrawn():
        model = model_of(config)
    model.load_state_dict(state)
    return model


def name_of(config: GeneratorConfig) -> str:
    """The architecture that a configuration belongs to."""
    return next(name for name, (kind, _) in ARCHITECTURES.items() if type(config) is kind)


def describe(model: Generator | GeneratorConfig) -> tuple[str, dict[str, Any]]:
    """Architecture and configuration as JSON values."""
    config = model if isinstance(model, GeneratorConfig) else model.config
    return name_of(config), asdict(config)


def read_config(path: Path) -> GeneratorConfig:
    """The configuration in a ``config.json``; raises ValueError or KeyError when it does not hold one."""
    stored = json.loads(path.read_text())
    return config_of(stored["architecture"], stored["model"])


def to_json(model: Generator | GeneratorConfig) -> dict[str, Any]:
    """What a ``config.json`` says of the model; more may stand beside it."""
    name, config = describe(model)
    return {"architecture": name, "model": config}
