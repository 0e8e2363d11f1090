"""Pipeline: the newest window of exposures into a better model, when drift or the schedule asks for it.

The tokenizer's codebooks stay frozen (new items are appended), the weights go on from the bundle ``base``. Nothing
unblessed is published; with ``canary`` a blessed candidate first meets that share of the users, and the runs after this
one look at how it does before they do anything else (docs/decisions/0011-canary-by-runs.md). Every argument may be left
out: KFP expands no macros in the parameters of recurring runs, so the first step chooses the window itself.
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.data import prepare_window
from components.deployment import publish
from components.evaluation import bless, evaluate
from components.monitoring import detect_drift, record_outcome, should_retrain
from components.tokenizer import tokenize
from components.training import align, pretrain
from pipelines.profiles import LOCAL, Profile
from pipelines.training import JOB


def retraining(on: Profile = LOCAL) -> BaseComponent:
    """The pipeline with its steps placed by profile ``on``."""

    @dsl.pipeline(name="onerec-retraining", description="Newest exposures to a better served model, gated.")
    def pipeline(
        run_id: str = "",
        start: str = "",
        reference_start: str = "",
        current_start: str = "",
        end: str = "",
        base: str = "production",
        policy: str = "nightly",
        preset: str = "tiny",
        overrides: str = "{}",
        canary: str = "",
    ) -> None:
        """Window [start, end) gives the contexts; [current_start, end) is new; it goes on from ``base``."""
        with dsl.ExitHandler(on.light(record_outcome(run_id=run_id, job_id=JOB, pipeline="retraining")), name="run"):
            window = on.reading(
                prepare_window(
                    run_id=run_id,
                    job_id=JOB,
                    start=start,
                    reference_start=reference_start,
                    current_start=current_start,
                    end=end,
                    base=base,
                    targets="new",
                )
            ).outputs
            run, data, old = window["run_id"], window["data"], window["base"]
            reference, current = window["reference_start"], window["current_start"]
            drift = on.reading(detect_drift(run_id=run, data=data, reference_start=reference, current_start=current))
            go = on.light(should_retrain(run_id=run, policy=policy)).after(drift)
            with dsl.If(go.output == True, name="retrain"):  # noqa: E712 - kfp builds the condition from the comparison
                tokens = on.computing(
                    tokenize(run_id=run, data=data, preset=preset, overrides=overrides, base=old, replaces="")
                )
                sids = tokens.outputs["Output"]
                trained = on.training(pretrain(run_id=run, tokens=sids, preset=preset, overrides=overrides, base=old))
                tuned = on.training(align(run_id=run, pretrained=trained.output, preset=preset, overrides=overrides))
                evaluated = on.computing(evaluate(run_id=run, aligned=tuned.output, base=old))
                blessed = on.light(bless(run_id=run)).after(evaluated)
                with dsl.If(blessed.output == True, name="blessed"):  # noqa: E712 - as above
                    on.reading(publish(run_id=run, alias="production", base=old, canary=canary))

    return pipeline
