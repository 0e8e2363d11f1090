"""What only the administrator may do: load now, and push a trainer's weights to a roll-out server."""

import asyncio
import hmac
import re
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fastapi
from kserve.errors import InvalidInput

from models.serving.errors import Forbidden, TooLarge
from models.serving.predictor import Predictor
from models.serving.rollout import Pinned

SHA256, VERSION = "x-onerec-sha256", "x-onerec-version"


class Administrator:
    """Knows the administrator's bearer token; an empty one belongs to nobody."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def check(self, authorization: str) -> None:
        """Raises Forbidden unless the header is ``Bearer <token>``; takes the same time for every wrong token."""
        if not self._token:
            raise Forbidden("nobody may do this here: no administrator's token is set", HTTPStatus.FORBIDDEN)
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise Forbidden("the administrator's token is missing; send it as a bearer token", HTTPStatus.UNAUTHORIZED)
        if not hmac.compare_digest(given.strip().encode(), self._token):
            raise Forbidden("this is not the administrator's token", HTTPStatus.FORBIDDEN)


async def receive_weights(request: fastapi.Request, model: Any, folder: Path) -> dict[str, Any]:
    """Writes the body to disk as it comes, then serves it; raises InvalidInput for whatever is wrong with it."""
    source = getattr(getattr(model, "predictor", None), "source", None)
    if not isinstance(source, Pinned):
        raise InvalidInput("weights are pushed to roll-out servers only (--role rollout)")
    sha256, version = request.headers.get(SHA256, ""), request.headers.get(VERSION, "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not re.fullmatch(r"[\w.:-]{1,128}", version, re.ASCII):
        raise InvalidInput(
            f"headers {SHA256} and {VERSION} are {sha256[:80]!r} and {version[:140]!r}; expected 64 hexadecimal "
            "digits and a name of letters, digits, '.', ':', '_' and '-'"
        )
    if source.recommender is None:
        raise InvalidInput(f"model {source.name} has no weights yet: {source.reason}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors") as file:
        size, limit = 0, source.limit
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"the weights are larger than {limit} bytes, which this model's cannot be")
            file.write(part)
        file.flush()
        number = await asyncio.to_thread(source.push, Path(file.name), sha256, version)
    return {"name": source.name, "version": version, "push": number}


def source_of(model: Any) -> Any:
    """Where the model finds its versions when that is this process's business, else None."""
    predictor = getattr(model, "predictor", None)
    return predictor.source if isinstance(predictor, Predictor) else None
