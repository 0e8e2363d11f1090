"""Pipeline: the newest window of exposures into a better model, when drift or the schedule asks for it.

The tokenizer's codebooks stay frozen (new items are appended), the weights go on from the bundle ``base``. Nothing
unblessed is published.
"""

from kfp import dsl

from components.base import fresh
from components.data import prepare_data
from components.deployment import publish
from components.evaluation import bless, evaluate
from components.monitoring import detect_drift, should_retrain
from components.tokenizer import tokenize
from components.training import align, pretrain


@dsl.pipeline(name="onerec-retraining", description="Newest exposures to a better served model, gated.")
def retraining(
    run_id: str,
    start: str,
    reference_start: str,
    current_start: str,
    end: str,
    base: str,
    policy: str = "nightly",
    preset: str = "tiny",
    overrides: str = "{}",
) -> None:
    """Window [start, end) gives the contexts; [current_start, end) is new; ``base`` is the version to go on from."""
    data = fresh(prepare_data(run_id=run_id, start=start, end=end, targets_from=reference_start))
    drift = fresh(
        detect_drift(run_id=run_id, data=data.output, reference_start=reference_start, current_start=current_start)
    )
    go = fresh(should_retrain(run_id=run_id, policy=policy)).after(drift)
    with dsl.If(go.output == True, name="retrain"):  # noqa: E712 - kfp builds the condition from the comparison
        tokens = fresh(tokenize(run_id=run_id, data=data.output, preset=preset, overrides=overrides, base=base))
        sids = tokens.outputs["Output"]
        trained = fresh(pretrain(run_id=run_id, tokens=sids, preset=preset, overrides=overrides, base=base))
        aligned = fresh(align(run_id=run_id, pretrained=trained.output, preset=preset, overrides=overrides))
        evaluated = fresh(evaluate(run_id=run_id, aligned=aligned.output, base=base))
        blessed = fresh(bless(run_id=run_id)).after(evaluated)
        with dsl.If(blessed.output == True, name="blessed"):  # noqa: E712 - as above
            fresh(publish(run_id=run_id, alias="production", base=base))
