"""Pipeline: new codebooks for a catalogue that has outgrown the old ones, and the model that speaks them.

New codebooks give every item a new SID, so the model is trained from scratch on the newest window; codes keep the names
of those they share most items with, and the run stores what every old SID became. Both are judged against the model in
production on the same requests and replace it together, or not at all.
"""

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.data import prepare_window
from components.deployment import publish
from components.evaluation import bless, evaluate
from components.monitoring import record_outcome
from components.tokenizer import tokenize
from components.training import align, pretrain
from pipelines.profiles import LOCAL, Profile
from pipelines.training import JOB


def tokenizer_refresh(on: Profile = LOCAL) -> BaseComponent:
    """The pipeline with its steps placed by profile ``on``."""

    @dsl.pipeline(name="onerec-tokenizer-refresh", description="New semantic IDs, and a model trained on them, gated.")
    def pipeline(
        run_id: str = "",
        start: str = "",
        end: str = "",
        base: str = "production",
        preset: str = "tiny",
        overrides: str = "{}",
        canary: str = "",
    ) -> None:
        """Trains tokenizer and model on [start, end); ``base`` is only what the outcome is compared with."""
        job = {"run_id": run_id, "job_id": JOB}
        recipe = {"preset": preset, "overrides": overrides}
        with dsl.ExitHandler(on.light(record_outcome(**job, pipeline="tokenizer_refresh")), name="run"):
            window = on.reading(
                prepare_window(
                    **job, start=start, reference_start="", current_start="", end=end, base=base, targets="all"
                )
            ).outputs
            run, old = window["run_id"], window["base"]
            tokens = on.computing(tokenize(run_id=run, data=window["data"], base="", replaces=old, **recipe))
            trained = on.training(pretrain(run_id=run, tokens=tokens.outputs["Output"], base="", **recipe))
            tuned = on.training(align(run_id=run, pretrained=trained.output, **recipe))
            evaluated = on.computing(evaluate(run_id=run, aligned=tuned.output, base=old))
            blessed = on.light(bless(run_id=run)).after(evaluated)
            with dsl.If(blessed.output == True, name="blessed"):  # noqa: E712 - kfp builds the condition from the comparison
                on.reading(publish(run_id=run, alias="production", base=old, canary=canary))

    return pipeline
