"""The rival of ``benchmarks.serving``: transformers' ``generate`` with a prefix constraint behind a KServe model.

``python -m benchmarks.serving_hf --port 8080``. A T5 with as many parameters as preset ``small`` (``benchmarks.t5``),
in bf16, ``prefix_allowed_tokens_fn`` over the same catalogue, on kserve.ModelServer with an async ``predict``. It is
spared what ours does beside: it looks no features up (the context comes from a seed), filters nothing and logs no
events. What waits while it generates is generated together, up to ``--batch`` requests, which helps it by a fifth at
beam 16 and not at 128. Random weights: only speed is compared.
"""

import argparse
import asyncio
import logging
import uuid

import kserve
import numpy as np
import torch
from kserve import InferOutput, InferRequest, InferResponse

from benchmarks import t5
from benchmarks.random_catalogue import CODES, LENGTHS, LEVELS, random_sids
from models.decoding.trie import Trie
from models.sizes import small


class Rival(kserve.Model):
    """Answers the v2 requests of ``benchmarks.serving_load``."""

    def __init__(self, items: int, batch: int) -> None:
        super().__init__("onerec")
        config = small(CODES, LEVELS)
        sids = random_sids(items)
        self.trie = Trie.from_sids(sids)
        self.callback = t5.prefix_callback(sids, CODES)
        self.model = t5.build(CODES, LEVELS, config.d_model, config.heads, config.layers).to(torch.bfloat16)
        self.batch = batch
        self.waiting: list[tuple[int, asyncio.Future[np.ndarray]]] = []
        self.working = False
        self.task: asyncio.Future[None] | None = None
        self.ready = True

    async def predict(self, payload: InferRequest, headers: dict[str, str] | None = None) -> InferResponse:
        """The best SIDs of one user."""
        assert payload.parameters
        beam = int(payload.parameters["beam_width"])
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self.waiting.append((beam, answer))
        if not self.working:
            self.working = True
            self.task = asyncio.ensure_future(self._work())
        sids = (await answer)[: int(payload.parameters["num_items"])]
        return InferResponse(
            response_id=uuid.uuid4().hex,
            model_name=self.name,
            infer_outputs=[InferOutput("sids", list(sids.shape), "INT32", sids.astype(np.int32))],
        )

    async def _work(self) -> None:
        while self.waiting:
            beam = self.waiting[0][0]
            batch, self.waiting = self.waiting[: self.batch], self.waiting[self.batch :]
            found = await asyncio.to_thread(self.generate, beam, len(batch))
            for (_, answer), sids in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(sids)
        self.working = False

    def generate(self, beam: int, requests: int) -> np.ndarray:
        """[requests, beam, levels] codes."""
        history = torch.randint(1, self.model.config.vocab_size, (requests, sum(LENGTHS)))
        with torch.inference_mode():
            return t5.recommend(self.model, history, self.trie, beam, self.callback).numpy()


def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)
    kserve.ModelServer(http_port=arguments.port, enable_grpc=False).start([Rival(arguments.items, arguments.batch)])


if __name__ == "__main__":
    main()
