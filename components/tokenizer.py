"""Component: items to semantic IDs, by fitting codebooks or by appending new items to frozen ones."""

from kfp import dsl

from components.base import component


@component
def tokenize(
    run_id: str,
    data: str,
    preset: str,
    overrides: str,
    base: str,
    replaces: str,
    metrics: dsl.Output[dsl.Metrics],
    card: dsl.Output[dsl.HTML],
) -> str:
    """Fits the tokenizer when ``base`` is empty, else appends new items to that bundle's; returns the digest.

    New codebooks keep the names of codes of the bundle ``replaces``, if one is given, as far as they can.
    ``data`` is the digest of the run's data, ``overrides`` a JSON object of recipe fields; ``card`` shows how good the
    codebooks are.
    """
    from models.stages import tokenize_run

    digest, figures, page = tokenize_run(
        run_id, data=data, preset=preset, overrides=overrides, base=base, replaces=replaces
    )
    for name, value in figures.items():
        metrics.log_metric(name, value)
    with open(card.path, "w", encoding="utf-8") as file:  # noqa: PTH123 - kfp copies this body into a file of its own
        file.write(page)
    return digest
