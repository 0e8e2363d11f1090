"""Component: items to semantic IDs, by fitting codebooks or by appending new items to frozen ones."""

from components.base import component


@component
def tokenize(run_id: str, data: str, preset: str, overrides: str, base: str) -> str:
    """Fits the tokenizer when ``base`` is empty, else appends new items to that bundle's; returns the digest.

    ``data`` is the digest of the run's data, ``overrides`` a JSON object of recipe fields.
    """
    from models.stages import tokenize_run

    return tokenize_run(run_id, data=data, preset=preset, overrides=overrides, base=base)
