"""A recipe's overrides as text, read without torch: whoever only hands them on can refuse what is no JSON object."""

import json
from typing import Any


def read_overrides(text: str) -> dict[str, Any]:
    """The fields of a JSON object such as {"pretrain.epochs": 2, "dropout": 0}; raises ValueError for anything else."""
    try:
        given: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"overrides {text!r} are not a JSON object ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f'overrides are {text!r}; expected a JSON object such as {{"pretrain.epochs": 2}}')
    return given
