"""`onerec`, also as ``python -m pipelines``: every module of commands is imported here, in the order of the help."""

from pipelines import (
    cli_bundles,
    cli_canary,
    cli_explain,
    cli_ingest,
    cli_items,
    cli_kubeflow,
    cli_loop,
    cli_models,
    cli_prune,
    cli_report,
    cli_runs,
    cli_schedule,
    cli_services,
)
from pipelines.cli import app

__all__ = [
    "app",
    "cli_bundles",
    "cli_canary",
    "cli_explain",
    "cli_ingest",
    "cli_items",
    "cli_kubeflow",
    "cli_loop",
    "cli_models",
    "cli_prune",
    "cli_report",
    "cli_runs",
    "cli_schedule",
    "cli_services",
]

if __name__ == "__main__":
    app(prog_name="onerec")
