"""Two independent streams in one batch: real exposures with feedback, and roll-outs that a reward model judged.

OneRec-V2 (arXiv 2508.20900) 3.1 finds that user feedback lifts stay time, a reward model lifts interactions, and both
together balance. The share is unpublished and a parameter here. Left out: the streams' sampling (who builds batches
decides which users are in them).

Shapes: N exposures, M roll-out samples.
"""

import numpy as np


def hybrid_advantages(
    feedback_N: np.ndarray, model_M: np.ndarray, *, model_share: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Both streams' advantages, float32, scaled so that a mean over all N + M samples is the wished mix of their means.

    ``mean(concat(a, b)) = (1 - model_share) mean(feedback) + model_share mean(model)``. An empty stream leaves
    everything to the other. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= model_share <= 1:
        raise ValueError(f"model_share is {model_share}; it must lie in [0, 1]")
    n, m = feedback_N.size, model_M.size
    if not n or not m:
        return feedback_N.astype(np.float32), model_M.astype(np.float32)
    of_feedback, of_model = (1 - model_share) * (n + m) / n, model_share * (n + m) / m
    return (feedback_N * of_feedback).astype(np.float32), (model_M * of_model).astype(np.float32)
