"""The stages after training: evaluate the candidate, start the real server on it, publish it when it is blessed.

The gate itself (``monitoring.quality``) needs no torch and stands between them. The pusher trusts nobody: it publishes
only what the stored decision blesses, by content digest, and moves ``production`` only from the version the candidate
was compared with. What decided and what a bundle was made from lies beside it under ``records/``.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from features import catalog
from features.histories.clusters import ItemVectors
from features.histories.windows import Limits
from features.provenance import code_version
from features.runs import Run
from features.settings import settings
from features.storage import Storage, connect
from models import bundle, infra
from models.baselines import ItemKNN, Popularity
from models.bundle import Bundle, read_alias, read_manifest
from models.deltas import catch_up
from models.evaluation import CUTOFFS, card, evaluate
from models.rewards.reward import REWARD
from models.serving.recommender import Recommender
from models.staging import open_bundle, staged
from models.steering import steer_of
from models.tokenizer.tokenizer import Tokenizer
from models.training.data import RunData
from models.training.tokenizer import read_tokens
from monitoring import trial
from monitoring.outcome import keep_records
from monitoring.quality import GATE

TRAINED = ("tokenizer", "pretrain", "reward", "align")
ASKED_USERS = 19
"""Of the newest, whom the infra validation asks for."""


class NotBlessed(RuntimeError):
    """A candidate without a blessing was to be published."""


class ProductionMoved(RuntimeError):
    """Another model went into production since this run began: the candidate was compared with an older one."""


def evaluate_run(run_id: str, *, aligned: str, base: str) -> tuple[dict[str, float], str]:
    """Stages ``evaluate`` and ``infra``: the candidate's bundle folder, its metrics, what the real server answers.

    Returns the candidate's metrics and the HTML card.
    """
    run = Run(connect(), run_id)
    data = run.done("data")
    assert data is not None, "a candidate was trained on data"
    until = datetime.fromisoformat(data["inputs"]["end"])

    def work(source: Path, folder: Path) -> dict[str, Any]:
        candidate = assemble(source, folder / "bundle")
        known = RunData.load(source / "data")
        production = open_bundle(base) if base else None
        result = judge(known, candidate, production)
        result["training"] = {stage: _metrics(source / stage) for stage in TRAINED}
        result["candidate"] |= calibration(result["training"]["reward"])
        if production is not None:
            result["production"] |= calibration(production.metrics.get("training", {}).get("reward", {}))
        (folder / "bundle" / "metrics.json").write_text(json.dumps(result, indent=1, default=str))
        (folder / "card.html").write_text(card(result), encoding="utf-8")
        sealed = bundle.seal(folder / "bundle", data_time=until)
        about = {"version": sealed["version"], "digest": sealed["digest"], "against": base}
        return {**result, "bundle": about, "asked": _newest_users(known)}

    inputs = {"aligned": aligned, "base": base}
    evaluated = staged(run_id, "evaluate", inputs, ["data", *TRAINED], work)
    _validate(run, evaluated, until)
    page = run.storage.get(f"{run.prefix('evaluate')}/card.html").decode()
    return run.summary("evaluate")["candidate"], page


def calibration(reward: Mapping[str, Any]) -> dict[str, float]:
    """``calibration_error``: the reward model's mean gap over objectives, on users held out from its training."""
    errors = [error for error in reward.get("reward/calibration_error", {}).values() if error is not None]
    return {"calibration_error": float(np.mean(errors))} if errors else {}


def _newest_users(data: RunData) -> dict[str, Any]:
    newest = dict.fromkeys(reversed(data.exposures["user_id"].to_pylist()[-100 * ASKED_USERS :]))
    return {"users": list(newest)[:ASKED_USERS], "now_ms": int(data.times_ms.max())}


def _validate(run: Run, evaluated: str, until: datetime) -> None:
    """Stage ``infra``: what the real server answered on the candidate; its report is the stage's summary."""
    about, asked = (run.summary("evaluate")[part] for part in ("bundle", "asked"))

    def work(source: Path, folder: Path) -> dict[str, Any]:
        made = source / "evaluate" / "bundle"
        manifest = bundle.seal(made, data_time=until)
        candidate = infra.Candidate(folder=made, manifest=manifest, users=asked["users"], now_ms=asked["now_ms"])
        report = infra.validate(candidate)
        (folder / "metrics.json").write_text(json.dumps(report, indent=1))
        same = {"version": manifest["version"], "digest": manifest["digest"], "against": about["against"]}
        return {**report, "bundle": same}

    staged(run.run_id, "infra", {"evaluated": evaluated}, ["evaluate"], work)


def assemble(source: Path, folder: Path) -> Bundle:
    """Puts the outcome of the training stages together as a bundle folder and loads it from there."""
    folder.mkdir(parents=True)
    trained = json.loads((source / "align" / "config.json").read_text())
    config = {"architecture": trained["architecture"], "model": trained["model"], "limits": asdict(Limits())}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    (folder / "model.safetensors").write_bytes((source / "align" / "model.safetensors").read_bytes())
    for name in ("tokenizer.safetensors", "sids.parquet", "items.parquet"):
        (folder / name).write_bytes((source / "tokenizer" / name).read_bytes())
    (folder / REWARD).write_bytes((source / "reward" / REWARD).read_bytes())
    (folder / "metrics.json").write_text("{}")
    return Bundle.load(folder)


def judge(data: RunData, candidate: Bundle, production: Bundle | None) -> dict[str, Any]:
    """Evaluates on the requests held out from training; baselines learn from what the candidate may."""
    holdout = data.holdout(candidate.catalogue)
    known = data.exposures.filter(pa.array(~data.held_out))
    counts = Counter(data.before_newest_day()["item_id"].to_pylist())
    now_ms = int(holdout.times_ms.max()) if len(holdout) else 0
    rivals = (
        ("popularity", Popularity.fit(known, data.items, now_ms=now_ms)),
        ("itemknn", ItemKNN.fit(known, data.items, now_ms=now_ms)),
    )
    baselines = {
        name: [
            [item for item, _ in ranked]
            for ranked in rival.recommend(holdout.user_ids, now_ms, max(CUTOFFS), exclude=holdout.seen)
        ]
        for name, rival in rivals
    }
    if production is None:
        return evaluate(Recommender(candidate), None, baselines, holdout, None, counts)
    theirs = data.holdout(production.catalogue)
    return evaluate(Recommender(candidate), Recommender(production), baselines, holdout, theirs, counts)


def publish_run(run_id: str, *, alias: str, base: str, canary: str = "") -> str:
    """Stage ``publish``: uploads the blessed bundle with its records, and gives it users; returns the version.

    With ``canary`` (``trial.config_of``) and a model behind ``alias`` it is tried beside that one, else ``alias`` moves
    to it at once. Raises NotBlessed, ProductionMoved, CanaryUnderWay; then nobody meets it.
    """
    storage = connect()
    run, decision = Run(storage, run_id), storage.get_json(f"runs/{run_id}/{GATE}")
    config = trial.config_of(canary)
    marker = f"runs/{run_id}/released.json"
    if storage.exists(marker):  # what became of it since then is nobody's to undo
        return str(storage.get_json(marker)["version"])
    if not decision["blessed"]:
        raise NotBlessed(f"run {run_id} was not blessed ({'; '.join(decision['failed'])}); it is not published")
    _check_free(storage, str(decision["version"]), alias, base)
    evaluated = run.done("evaluate")
    assert evaluated is not None, "a blessed run was evaluated"
    inputs = {"evaluated": evaluated["digest"], "alias": alias}
    staged(run_id, "publish", inputs, ["evaluate"], lambda source, folder: _upload(run, source, folder, base))
    version = str(run.summary("publish")["version"])
    keep_records(storage, run_id, version)
    cache = settings().home / "bundles"
    catch_up(storage, version, cache)
    tried = _release(storage, version, alias, base, config)
    # Whoever added items meanwhile saw the old version behind the alias.
    catch_up(storage, version, cache)
    storage.put_json(marker, {"version": version, "alias": alias, "tried": tried})
    print(f"published {version} as {'a canary' if tried else alias}")
    return version


def _check_free(storage: Storage, version: str, alias: str, base: str) -> None:
    """Nobody else's model came between the comparison and now."""
    now, trying = read_alias(storage, alias), trial.read(storage)
    if now not in (base or None, version):
        raise _moved(bundle.AliasMoved(alias, now), version, base)
    if trying is not None and trying.version != version:
        raise trial.CanaryUnderWay(
            f"{trying.version} is being tried since {trying.started}; start a new run when it has ended"
        )


def _moved(found: bundle.AliasMoved, version: str, base: str) -> ProductionMoved:
    return ProductionMoved(
        f"{found}, the candidate {version} was compared with {base or 'nothing'}; "
        "start a new run, which compares with what is there"
    )


def _upload(run: Run, source: Path, folder: Path, base: str) -> dict[str, Any]:
    """The bundle under its version, provided that it is what was blessed; raises NotBlessed."""
    made, record = source / "evaluate" / "bundle", run.done("data")
    assert record is not None, "a blessed run has data"
    decision, until = run.storage.get_json(f"runs/{run.run_id}/{GATE}"), datetime.fromisoformat(record["inputs"]["end"])
    digest = bundle.seal(made, data_time=until)["digest"]
    if digest != decision["digest"]:
        raise NotBlessed(
            f"the bundle of run {run.run_id} has content {digest[:12]}, what was blessed had "
            f"{decision['digest'][:12] or 'none'}: it was changed since; evaluate it again"
        )
    version = bundle.publish(
        run.storage,
        made,
        data_time=until,
        parents=[base] if base else [],
        lineage={"run_id": run.run_id, "data": record["digest"], "window": record["inputs"], "code": code_version()},
    )
    (folder / "version.txt").write_text(version)
    write_vectors(run.storage, made, version)
    return {"version": version}


def _release(storage: Storage, version: str, alias: str, base: str, config: trial.TrialConfig | None) -> bool:
    """Starts a canary, or moves the alias; returns whether it is a canary."""
    _check_free(storage, version, alias, base)
    now = read_alias(storage, alias)
    if config is None or now in (None, version):
        try:
            bundle.move_alias(storage, alias, version, only_from=[base or None])
        except bundle.AliasMoved as error:
            raise _moved(error, version, base) from error
        return False
    assert now is not None
    steer = steer_of(storage, settings())
    started = read_manifest(storage, version)["data_time"]
    trial.begin(
        storage, trial.Trial(version=version, stable=now, started=started, unit=steer.unit, config=config), steer
    )
    return True


def write_vectors(storage: Storage, folder: Path, version: str) -> None:
    """Stores the sums of the codes of every item: what clustering a user's past compares items by."""
    catalogue, tokenizer = read_tokens(folder), Tokenizer.load(folder / "tokenizer.safetensors")
    sums = tokenizer.quantizer.reconstruct(catalogue.sids)
    names = np.array(catalogue.item_ids, object)
    catalog.write_vectors(storage, ItemVectors(item_ids=names, vectors=sums, version=version))


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return metrics
