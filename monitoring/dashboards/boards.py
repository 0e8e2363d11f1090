"""The four dashboards: serving, training, loop and drift. Every expression uses metrics of monitoring.metrics only."""

from typing import Any

from monitoring.dashboards.panels import Panel, board, number

RATE = "$__rate_interval"


def rate(metric: str, by: str) -> str:
    """Per second, summed over replicas."""
    return f"sum by ({by}) (rate({metric}[{RATE}]))"


def quantile(q: float, histogram: str, by: str) -> str:
    """Quantile of a histogram over all replicas."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', f'le, {by}')})"


def quantiles(histogram: str, by: str, legend: str) -> list[tuple[str, str]]:
    """Median and tail."""
    return [(quantile(q, histogram, by), f"{legend} p{100 * q:g}") for q in (0.5, 0.95, 0.99)]


def over_threshold(decides: str) -> str:
    """Scores of drift by their threshold."""
    thresholds = f'onerec_drift_threshold{{decides="{decides}"}}'
    return f"max by (column) (onerec_drift_score) / max by (column) ({thresholds})"


def age(metric: str) -> str:
    """Seconds since the time that a gauge holds."""
    return f"time() - {metric}"


def serving() -> Any:
    """Model servers and what they deliver."""
    return board(
        "serving",
        "OneRec serving",
        "Model servers: answers, latency by stage, versions.",
        [
            ("Answers", _answers()),
            ("Versions and catalogue", _bundles()),
            ("Health", [*_health(), _served_events()]),
        ],
    )


def _answers() -> list[Panel]:
    return [
        Panel(
            title="Requests by outcome",
            about="HTTP status; 429 is a full queue, 499 a client that went away.",
            queries=[(rate("onerec_requests_total", "model, status"), "{{model}} {{status}}")],
            unit="reqps",
            stacked=True,
        ),
        Panel(
            title="Time to answer",
            about="Answered requests, from the body to the answer.",
            queries=quantiles("onerec_request_seconds", "model", "{{model}}"),
            unit="s",
        ),
        Panel(
            title="p95 by stage",
            about="parse, queue, features, model, respond: where the time goes.",
            queries=[(quantile(0.95, "onerec_stage_seconds", "model, stage"), "{{model}} {{stage}}")],
            unit="s",
        ),
        Panel(
            title="Users by flag",
            about="cold_user: no history. degraded, features_unavailable, cached_context: the on-line store.",
            queries=[(rate("onerec_recommended_users_total", "model, flag"), "{{model}} {{flag}}")],
            stacked=True,
        ),
        Panel(
            title="Waiting and in flight",
            about="Users waiting for a batch; requests accepted and not yet answered.",
            queries=[
                ("sum by (model) (onerec_waiting_rows)", "{{model}} waiting"),
                ("sum by (model) (onerec_in_flight_requests)", "{{model}} in flight"),
            ],
        ),
        Panel(
            title="Work",
            about="Users per run of the model, and beams that requests ask for: medians.",
            queries=[
                (quantile(0.5, "onerec_batch_rows", "model"), "{{model}} users a batch"),
                (quantile(0.5, "onerec_beam_width", "model"), "{{model}} beams"),
            ],
        ),
    ]


def _bundles() -> list[Panel]:
    return [
        Panel(
            title="Replicas by version",
            about="How many servers have a version in service; two lines cross during a roll-out.",
            queries=[("sum by (model, version) (onerec_bundle_serving) > 0", "{{model}} {{version}}")],
        ),
        Panel(
            title="Bundles loaded and refused",
            about="A refused bundle leaves the version before in service.",
            queries=[
                ("sum by (model) (onerec_bundle_loaded_total)", "{{model}} loaded"),
                ("sum by (model, version) (onerec_bundle_refused_total)", "{{model}} refused {{version}}"),
            ],
        ),
        Panel(
            title="Catalogue",
            about="Items that can be named now, those appended or blocked since publication, unreadable deltas.",
            queries=[
                ("max by (model, kind) (onerec_catalogue_items)", "{{model}} {{kind}}"),
                ("max by (model) (onerec_catalogue_deltas_refused)", "{{model}} unreadable deltas"),
            ],
        ),
    ]


def _health() -> list[Panel]:
    return [
        Panel(
            title="Illegal share",
            about="Of samples without the trie; what is served is always legal.",
            queries=[("max by (model) (onerec_illegal_share)", "{{model}}")],
            unit="percentunit",
        ),
        Panel(
            title="Context cache",
            about="Share of contexts that were taken from the cache.",
            queries=[
                (
                    f'sum by (model) (rate(onerec_feature_cache_total{{outcome="hit"}}[{RATE}])) / '
                    + rate("onerec_feature_cache_total", "model"),
                    "{{model}}",
                )
            ],
            unit="percentunit",
        ),
    ]


def _served_events() -> Panel:
    return Panel(
        title="Served events",
        about="On their way to the collector: in memory, spooled on disk, lost for good.",
        queries=[
            ("sum(onerec_served_queue)", "in memory"),
            ("sum(onerec_served_spooled)", "on disk"),
            ("sum by (reason) (onerec_served_lost_total)", "lost: {{reason}}"),
        ],
    )


def training() -> Any:
    """What the newest runs learned, and how the candidate compares."""
    metrics = "recall@50|ndcg@10|legality|coverage|cold_start_share|density"
    runs = [
        Panel(
            title="Loss",
            about="Of each newest finished training.",
            queries=[("onerec_training_loss", "{{stage}} {{split}}")],
        ),
        Panel(title="Duration", about="", queries=[("onerec_training_seconds", "{{stage}}")], unit="s"),
        Panel(
            title="Model FLOP utilisation",
            about="Six times parameters and tokens over the peak of the hardware.",
            queries=[("onerec_training_mfu", "{{stage}}")],
            unit="percentunit",
        ),
        Panel(
            title="Exposures a second",
            about="",
            queries=[("onerec_training_examples_per_second", "{{stage}}")],
        ),
        Panel(
            title="Candidate and production",
            about="On the same held-out requests.",
            queries=[(f'onerec_evaluation{{metric=~"{metrics}"}}', "{{model}} {{metric}}")],
            width=16,
        ),
    ]
    gate = [
        number("Blessed", "1: the newest candidate passed the gate.", "onerec_gate_blessed"),
        number(
            "Recall@50 over production",
            "Candidate by production.",
            'max(onerec_evaluation{model="candidate", metric="recall@50"}) / '
            'max(onerec_evaluation{model="production", metric="recall@50"})',
        ),
        number(
            "Age of the newest pre-training", "", age('onerec_stage_finished_timestamp_seconds{stage="pretrain"}'), "s"
        ),
        number("Age of production's data", "", age('onerec_bundle_data_timestamp_seconds{alias="production"}'), "s"),
    ]
    about = "Training, evaluation and the gate."
    return board("training", "OneRec training", about, [("Gate", gate), ("Trainings", runs)], "now-7d")


def loop() -> Any:
    """From feedback to the next model: intake, features, runs."""
    about = "Intake, on-line features and pipeline runs."
    rows = [("Runs", _runs()), ("Intake", _intake()), ("On-line features", _features())]
    return board("loop", "OneRec loop", about, rows, "now-24h")


def _runs() -> list[Panel]:
    return [
        number("Run open", "1 while the newest run has not ended.", "onerec_run_open"),
        number("Since a run moved", "", age("onerec_run_progress_timestamp_seconds"), "s"),
        number(
            "Since a model was published", "", age('onerec_run_finished_timestamp_seconds{outcome="published"}'), "s"
        ),
        number("Since the newest impression", "", age("onerec_impressions_newest_timestamp_seconds"), "s"),
        Panel(
            title="Since a stage finished",
            about="By stage, over all runs.",
            queries=[(age("onerec_stage_finished_timestamp_seconds"), "{{stage}}")],
            unit="s",
            width=12,
        ),
        Panel(
            title="Since an alias was set",
            about="",
            queries=[(age("onerec_alias_set_timestamp_seconds"), "{{alias}} {{version}}")],
            unit="s",
            width=12,
        ),
    ]


def _intake() -> list[Panel]:
    return [
        Panel(
            title="Events accepted",
            about="On disk and acknowledged.",
            queries=[(rate("onerec_collector_events_accepted_total", "kind"), "{{kind}}")],
            unit="eps",
        ),
        Panel(
            title="Events refused and rejected",
            about="Refused: answered with an error. Rejected: logged, but no longer valid.",
            queries=[
                (rate("onerec_collector_requests_refused_total", "reason"), "refused: {{reason}}"),
                (f"sum(rate(onerec_collector_events_rejected_total[{RATE}]))", "rejected"),
                (f"sum(rate(onerec_collector_events_skewed_total[{RATE}]))", "clock far off"),
            ],
        ),
        Panel(
            title="Time to acknowledge",
            about="From the request to its batch being on disk.",
            queries=[
                (
                    f"histogram_quantile({q}, sum by (le) (rate(onerec_collector_ack_seconds_bucket[{RATE}])))",
                    f"p{100 * q:g}",
                )
                for q in (0.5, 0.99)
            ],
            unit="s",
        ),
        Panel(
            title="Behind",
            about="Age of the oldest event that is not in S3, and of the oldest the on-line features miss.",
            queries=[
                ("max(onerec_collector_oldest_unuploaded_seconds)", "S3"),
                ("max(onerec_collector_updater_lag_seconds)", "features"),
            ],
            unit="s",
        ),
        Panel(
            title="Log on disk",
            about="Bytes a step still needs; at the budget new events are refused.",
            queries=[
                ("sum by (step) (onerec_collector_wal_bytes)", "{{step}}"),
                ("sum(onerec_collector_wal_budget_bytes)", "budget"),
            ],
            unit="bytes",
        ),
        Panel(
            title="Failed tries",
            about="",
            queries=[
                (f"sum(rate(onerec_collector_upload_failures_total[{RATE}]))", "upload"),
                (f"sum(rate(onerec_collector_updater_failures_total[{RATE}]))", "features"),
            ],
        ),
    ]


def _features() -> list[Panel]:
    return [
        Panel(
            title="Updater",
            about="Events folded into windows, users pushed, feedback without an impression.",
            queries=[
                (rate("onerec_updater_events_total", "kind"), "{{kind}}"),
                (f"sum(rate(onerec_updater_pushed_users_total[{RATE}]))", "users pushed"),
                (f"sum(rate(onerec_updater_unpaired_feedback_total[{RATE}]))", "unpaired feedback"),
            ],
        ),
        Panel(
            title="From acknowledgement to features",
            about="Oldest event of each batch.",
            queries=[
                (
                    f"histogram_quantile({q}, sum by (le) (rate(onerec_updater_lag_seconds_bucket[{RATE}])))",
                    f"p{100 * q:g}",
                )
                for q in (0.5, 0.99)
            ],
            unit="s",
        ),
        Panel(
            title="Given up for the features",
            about="Events beyond the updater's budget; the store of exposures has them.",
            queries=[("sum(onerec_collector_updater_skipped_events_total)", "events")],
        ),
    ]


def drift() -> Any:
    """The newest comparison of exposures with the window before."""
    now = [
        number("Drift", "1: a deciding column is over its threshold.", 'onerec_drift_verdict{verdict="drift"}'),
        number("Not enough data", "1: no verdict was possible.", 'onerec_drift_verdict{verdict="insufficient data"}'),
        number("Data gate", "1: the newest window may be trained on.", "onerec_data_gate_passed"),
        number("Exposures compared", "", 'onerec_drift_rows{window="current"}'),
        number("Age of the verdict", "", age('onerec_stage_finished_timestamp_seconds{stage="drift"}'), "s"),
    ]
    columns = [
        Panel(
            title="Score over threshold",
            about="A deciding column at 1 or above makes the verdict drift.",
            queries=[
                (over_threshold("yes"), "{{column}}"),
            ],
            width=12,
        ),
        Panel(
            title="Predictions, over threshold",
            about="They move whenever the model does: shown, and not deciding.",
            queries=[(over_threshold("no"), "{{column}}")],
            width=12,
        ),
        Panel(title="Scores", about="Distances as measured.", queries=[("onerec_drift_score", "{{column}}")], width=12),
        Panel(title="Rows", about="Exposures in each window.", queries=[("onerec_drift_rows", "{{window}}")], width=12),
    ]
    about = "Evidently's distances between the newest window and the one before."
    return board("drift", "OneRec drift", about, [("Verdict", now), ("Columns", columns)], "now-30d")


BOARDS = {"serving": serving, "training": training, "loop": loop, "drift": drift}
