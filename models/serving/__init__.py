"""The model server; see ``python -m models.serving --help``."""

# Before Feast, whose import puts a Prometheus client that is not loaded yet into multi-process mode: metrics would go
# through files in a temporary folder, and labels could not be removed.
import prometheus_client  # noqa: F401
