"""Records, storage and features: the lowest layer, without torch or kfp."""

import os

# Importing Feast puts a Prometheus client that is not loaded yet, and every child process, into multi-process mode, in
# which metrics go through files of a shared temporary folder. Ours are single processes: load the client first.
os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
import prometheus_client  # noqa: F401
