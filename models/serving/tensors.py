"""Checked reading of v2 input tensors.

KServe checks no shapes or types and answers 500 to wrong ones, so everything is checked here, with InvalidInput (HTTP
400, gRPC INVALID_ARGUMENT) that says what was given and what is expected.
"""

import math
import struct
from collections.abc import Collection

import numpy as np
from kserve import InferInput, InferRequest
from kserve.errors import InferenceError, InvalidInput

MAX_VALUES = 1_280_000
"""More values than any request of ours needs; a larger shape is refused before anything is allocated."""
INTEGERS = {"INT64": np.int64, "INT32": np.int32}


def named(request: InferRequest, required: Collection[str], optional: Collection[str] = ()) -> dict[str, InferInput]:
    """The request's inputs by name; raises InvalidInput when one is missing, repeated or unknown."""
    inputs: dict[str, InferInput] = {}
    for each in request.inputs:
        if not isinstance(each.name, str) or each.name in inputs:
            raise InvalidInput(f"input {each.name!r} is given twice, or is no name")
        inputs[each.name] = each
    if set(inputs) - set(required) - set(optional) or set(required) - set(inputs):
        also = f" and optionally {', '.join(optional)}" if optional else ""
        raise InvalidInput(f"inputs are {sorted(inputs)}; expected {', '.join(required)}{also}")
    return inputs


def values(tensor: InferInput, dimensions: int) -> np.ndarray:
    """The tensor's values in its shape; JSON data may be flat or nested."""
    shape = tensor.shape if isinstance(tensor.shape, list) else []
    if len(shape) != dimensions or any(type(size) is not int or size < 0 for size in shape):
        raise InvalidInput(
            f"input {tensor.name} has shape {tensor.shape}; expected {dimensions} dimension(s), users first"
        )
    if math.prod(shape) > MAX_VALUES:
        raise InvalidInput(f"input {tensor.name} of shape {shape} is too large")
    # Counted before an array is made of them, which nothing else can interrupt; raw tensors have no list of values.
    given = len(flattened(tensor.data)) if isinstance(tensor.data, list) else 0
    if given not in (0, math.prod(shape)):
        raise InvalidInput(f"input {tensor.name} has {given} values; its shape {shape} is of {math.prod(shape)}")
    try:
        return np.asarray(tensor.as_numpy()).reshape(shape)
    except (ValueError, TypeError, OverflowError, struct.error, InferenceError, InvalidInput) as error:
        raise InvalidInput(f"input {tensor.name}: its data do not make a {tensor.datatype} of shape {shape}") from error


def strings(tensor: InferInput, dimensions: int) -> np.ndarray:
    """The tensor's values as an object array of str."""
    if tensor.datatype != "BYTES":
        raise InvalidInput(f"input {tensor.name} has datatype {tensor.datatype}; expected BYTES")
    raw = values(tensor, dimensions)
    try:
        decoded = [each.decode() if isinstance(each, bytes) else each for each in raw.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"input {tensor.name} holds bytes that are not UTF-8") from error
    for each in decoded:
        if not isinstance(each, str):
            raise InvalidInput(f"input {tensor.name} holds {each!r}; expected strings")
    found = np.empty(len(decoded), object)
    found[:] = decoded
    return found.reshape(raw.shape)


def integers(tensor: InferInput, dimensions: int, datatype: str = "INT64") -> np.ndarray:
    """The tensor's values as integers of ``datatype``."""
    if tensor.datatype != datatype:
        raise InvalidInput(f"input {tensor.name} has datatype {tensor.datatype}; expected {datatype}")
    if isinstance(tensor.data, list) and not all(type(value) is int for value in flattened(tensor.data)):
        raise InvalidInput(f"input {tensor.name} holds values that are not integers")
    found: np.ndarray = values(tensor, dimensions).astype(INTEGERS[datatype], copy=False)
    return found


def flattened(data: list[object]) -> list[object]:
    """The values of lists in lists of at most four dimensions."""
    for _ in range(3):
        if not any(isinstance(each, list) for each in data):
            break
        data = [value for each in data for value in (each if isinstance(each, list) else [each])]
    return data
