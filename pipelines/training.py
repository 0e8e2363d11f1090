"""Pipeline: from logs to a served model. Runs in ``kfp.local`` and compiles to YAML for the cluster.

Steps hand each other content digests, not files: a step reads its inputs from the run's folder in object storage
and returns the digest of what it wrote there, so that a change upstream is a new input downstream and a retried
run repeats nothing. Gates return one bool each (the local runner ignores conditions on named outputs).
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.data import prepare_data
from components.deployment import publish
from components.evaluation import bless, evaluate
from components.monitoring import record_outcome
from components.tokenizer import tokenize
from components.training import align, pretrain
from pipelines.profiles import LOCAL, Profile

JOB = dsl.PIPELINE_JOB_ID_PLACEHOLDER


def training(on: Profile = LOCAL) -> BaseComponent:
    """The pipeline with its steps placed by profile ``on``."""

    @dsl.pipeline(name="onerec-training", description="Logs to a served OneRec model, from scratch.")
    def pipeline(
        run_id: str = "",
        start: str = "",
        end: str = "",
        preset: str = "tiny",
        overrides: str = "{}",
        canary: str = "",
    ) -> None:
        """Trains on exposures of [start, end) and publishes what is blessed, also against what is in production."""
        with dsl.ExitHandler(on.light(record_outcome(run_id=run_id, job_id=JOB, pipeline="training")), name="run"):
            data = on.reading(
                prepare_data(run_id=run_id, job_id=JOB, start=start, end=end, against="production")
            ).outputs
            run, old = data["run_id"], data["base"]
            sids = on.computing(
                tokenize(run_id=run, data=data["data"], preset=preset, overrides=overrides, base="", replaces="")
            ).outputs["Output"]
            base = on.training(pretrain(run_id=run, tokens=sids, preset=preset, overrides=overrides, base=""))
            tuned = on.training(align(run_id=run, pretrained=base.output, preset=preset, overrides=overrides))
            evaluated = on.computing(evaluate(run_id=run, aligned=tuned.output, base=old))
            blessed = on.light(bless(run_id=run)).after(evaluated)
            with dsl.If(blessed.output == True, name="blessed"):  # noqa: E712 - kfp builds the condition from the comparison
                on.reading(publish(run_id=run, alias="production", base=old, canary=canary))

    return pipeline
