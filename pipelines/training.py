"""Pipeline: from logs to a served model. Runs in ``kfp.local`` and compiles to YAML for the cluster.

Steps hand each other content digests, not files: a step reads its inputs from the run's folder in object storage
and returns the digest of what it wrote there, so that a change upstream is a new input downstream and a retried
run repeats nothing. Gates return one bool each (the local runner ignores conditions on named outputs).
"""

from kfp import dsl

from components.base import fresh
from components.data import prepare_data
from components.deployment import publish
from components.evaluation import bless, evaluate
from components.tokenizer import tokenize
from components.training import align, pretrain


@dsl.pipeline(name="onerec-training", description="Logs to a served OneRec model, from scratch.")
def training(run_id: str, start: str, end: str, preset: str = "tiny", overrides: str = "{}") -> None:
    """Trains on exposures of [start, end), evaluates, and publishes to ``production`` what is blessed."""
    data = fresh(prepare_data(run_id=run_id, start=start, end=end, targets_from=start))
    tokens = fresh(tokenize(run_id=run_id, data=data.output, preset=preset, overrides=overrides, base=""))
    base = fresh(pretrain(run_id=run_id, tokens=tokens.outputs["Output"], preset=preset, overrides=overrides, base=""))
    aligned = fresh(align(run_id=run_id, pretrained=base.output, preset=preset, overrides=overrides))
    evaluated = fresh(evaluate(run_id=run_id, aligned=aligned.output, base=""))
    blessed = fresh(bless(run_id=run_id)).after(evaluated)
    with dsl.If(blessed.output == True, name="blessed"):  # noqa: E712 - kfp builds the condition from the comparison
        fresh(publish(run_id=run_id, alias="production", base=""))
