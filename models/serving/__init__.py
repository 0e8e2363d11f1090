"""The model server; see ``python -m models.serving --help``."""

import os

# Importing Feast puts a Prometheus client that is not loaded yet (and every child process) into multi-process mode, in
# which metrics go through files of a shared temporary folder. This server is one process: load the client first.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
import prometheus_client  # noqa: F401
