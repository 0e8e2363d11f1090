"""Components: evaluate through the recommender and the server that serve, then bless or refuse."""

from kfp import dsl

from components.base import component, light


@component
def evaluate(
    run_id: str, aligned: str, base: str, metrics: dsl.Output[dsl.Metrics], card: dsl.Output[dsl.HTML]
) -> None:
    """Item-level metrics on the held-out requests, beside popularity, ItemKNN and the blessed model ``base``.

    Then the real server is started on the candidate and asked; what it answers is for ``bless`` to judge.
    """
    from models.release import evaluate_run

    summary, page = evaluate_run(run_id, aligned=aligned, base=base)
    for name, value in summary.items():
        metrics.log_metric(name, value)
    with open(card.path, "w", encoding="utf-8") as file:  # noqa: PTH123 - kfp copies this body into a file of its own
        file.write(page)


@light
def bless(run_id: str) -> bool:
    """Whether the candidate passes every threshold; the decision and its reasons are stored beside the metrics."""
    from monitoring.quality import bless_run

    return bless_run(run_id)
