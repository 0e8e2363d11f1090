"""The one place for the components' image: a ``dsl.component`` that never installs packages when it starts.

Bodies import and call our own code, which the image carries; the same functions therefore run in a pod and in
``kfp.local``'s subprocess. The image's name holds "python" because the local runner asks for it.
"""

import functools
import os

from kfp import dsl

IMAGE = os.environ.get("ONEREC_IMAGE", "ghcr.io/onerec-platform/onerec-python:0.1.0")

component = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


def fresh(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """``task`` without KFP's cache, which looks at arguments alone: our stages decide by content what to repeat."""
    return task.set_caching_options(False)
