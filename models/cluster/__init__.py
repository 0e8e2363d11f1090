"""Objects of a Kubernetes cluster that the platform drives: RayJobs that train, InferenceServices with a canary.

Through the ``kubernetes`` client alone: nothing here needs torch until a stage runs in its own pod.
"""
