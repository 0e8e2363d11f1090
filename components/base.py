"""The one place for the images: ``dsl.component`` decorators that never install packages when a pod starts.

Bodies import and call our own code, which the images carry; the same functions therefore run in a pod and in
``kfp.local``'s subprocess. ``component`` is for steps that need the training libraries, ``light`` for gates, records
and whatever only talks to an API.
"""

import functools
import os

from kfp import dsl

REGISTRY = os.environ.get("ONEREC_IMAGE", "ghcr.io/onerec-platform")
TAG = os.environ.get("ONEREC_IMAGE_TAG", "0.1.0")
TRAIN_TAG = os.environ.get("ONEREC_TRAIN_TAG", TAG)
"""CUDA builds have a tag of their own; what runs no torch has none."""
TRAIN_IMAGE = f"{REGISTRY}/onerec-train:{TRAIN_TAG}"
LIGHT_IMAGE = f"{REGISTRY}/onerec-pipelines:{TAG}"

component = functools.partial(dsl.component, base_image=TRAIN_IMAGE, install_kfp_package=False)
light = functools.partial(dsl.component, base_image=LIGHT_IMAGE, install_kfp_package=False)
