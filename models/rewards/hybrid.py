"""Two independent streams in one step: real exposures with feedback, and roll-outs that a reward model judged.

OneRec-V2 (arXiv 2508.20900) 3.1 finds that user feedback lifts stay time, a reward model lifts interactions, and both
together balance. The share is unpublished and a parameter here. Left out: the streams' sampling (who builds batches
decides which users are in them).
"""


def hybrid_weights(feedback: int, model: int, *, model_share: float = 0.5) -> tuple[float, float]:
    """What the means over ``feedback`` exposures and over ``model`` roll-outs count: ``1 - model_share`` and the rest.

    An empty stream leaves everything to the other. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= model_share <= 1:
        raise ValueError(f"model_share is {model_share}; it must lie in [0, 1]")
    if not feedback or not model:
        return float(feedback > 0), float(model > 0)
    return 1 - model_share, model_share
