import asyncio
import gc
import hashlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kserve.errors import InvalidInput
from safetensors.torch import load_file, save_file

from features.histories.context import cold_context
from features.histories.windows import Limits
from features.storage import Storage
from models.bundle import Bundle, publish, save
from models.onerec_v2 import OneRecV2, V2Config
from models.pathways import to_tensors
from models.serving.contexts import Contexts
from models.serving.predictor import Predictor
from models.serving.protocol import Options, Prediction
from models.serving.rollout import Pinned

GROUP = Options(mode="sample", num_samples=40, seed=0)


@pytest.fixture
def pinned(s3: Storage, write_bundle: Callable[..., Path], tmp_path: Path) -> Pinned:
    version = publish(s3, write_bundle(tmp_path / "bundle"), data_time=datetime(2026, 1, 1, tzinfo=UTC))
    made = Pinned("onerec", version, s3, tmp_path / "cache")
    made.start()
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rollouts(pinned: Pinned, options: Options = GROUP) -> Prediction:
    nobody = Contexts.of([None, None], np.full(2, 1_767_312_000_000), [frozenset()] * 2, options)
    predictor = Predictor(pinned, ThreadPoolExecutor(1))
    return asyncio.run(predictor.predict(nobody, "r", float("inf")))


def test_every_sample_comes_back_with_the_model_s_own_log_probabilities(pinned: Pinned) -> None:
    bundle = pinned.recommender.bundle
    for options in (GROUP, Options(mode="sample", num_samples=40, seed=0, constrained=False)):
        found = rollouts(pinned, options)
        assert (found.push, found.model_version) == (0, bundle.version)
        for each in found.recommendations:
            assert len(each) == 40
            with torch.inference_mode():
                context = to_tensors(cold_context(1, bundle.limits), bundle.catalogue)
                targets = torch.from_numpy(each.sids).long()[None]
                logits = bundle.model(context, targets).log_softmax(-1)
            expected = logits.gather(-1, targets[..., None])[0, ..., 0].numpy()
            np.testing.assert_allclose(each.log_probs, expected, atol=1e-4)
            for item, sid in zip(each.item_ids, each.sids, strict=True):
                named = bundle.catalogue.items_of(sid)
                assert item in named if item else not named
            assert ("" in each.item_ids) == (not options.constrained)
    sids = {tuple(sid) for sid in rollouts(pinned).recommendations[0].sids.tolist()}
    assert len(sids) < 40  # independent draws repeat themselves


def test_a_push_changes_the_answers_and_frees_the_old_weights(
    pinned: Pinned, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    before = rollouts(pinned)
    old = weakref.ref(pinned.recommender.bundle.model)
    other = write_bundle(tmp_path / "other", seed=5)
    path = other / "model.safetensors"
    assert pinned.push(path, digest(path), "step-7") == 1
    assert pinned.push(path, digest(path), "step-8") == 2
    after = rollouts(pinned)
    assert (after.model_version, after.push) == ("step-8", 2)
    expected = Bundle.load(other)
    loaded = pinned.recommender.bundle.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.model.state_dict().items())
    assert not np.array_equal(before.recommendations[0].log_probs, after.recommendations[0].log_probs)
    gc.collect()
    assert old() is None
    assert pinned.about()["push"] == 2


def test_keys_of_a_memory_come_as_they_were_sent(s3: Storage, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer, catalogue = tiny_tokenizer
    sizes = V2Config(codes=8, levels=3, d_model=16, layers=1, heads=2, kv_groups=1, embed=8, head="tied", memory=True)
    model = OneRecV2(sizes)
    model.remember(torch.from_numpy(catalogue.sids.astype(np.int64)))
    parts = {"tokenizer": tokenizer, "catalogue": catalogue, "limits": Limits(short=5, positive=6, lifelong=7)}
    folder = save(tmp_path / "bundle", model=model, metrics={}, **parts)
    version = publish(s3, folder, data_time=datetime(2026, 1, 1, tzinfo=UTC))
    pinned = Pinned("onerec", version, s3, tmp_path / "cache")
    pinned.start()
    path = folder / "model.safetensors"
    assert pinned.push(path, digest(path), "step-1") == 1
    loaded, sent = pinned.recommender.bundle.model.state_dict(), load_file(path)
    assert {str(tensor.dtype) for tensor in sent.values()} == {"torch.float32", "torch.int64"}
    for name, tensor in sent.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert path.stat().st_size <= pinned.limit


def test_wrong_pushes_are_refused_and_the_weights_stay(
    pinned: Pinned, write_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    good = write_bundle(tmp_path / "good", seed=5) / "model.safetensors"
    state = load_file(good)
    bad: dict[str, Any] = {
        "tensors are not of this architecture": dict(list(state.items())[1:]),
        "expected": {**state, "bos": torch.zeros(99)},
        "not servable": {name: value * float("nan") for name, value in state.items()},
    }
    with pytest.raises(InvalidInput, match="sha256"):
        pinned.push(good, "0" * 64, "v")
    junk = tmp_path / "junk"
    junk.write_bytes(b"not safetensors")
    with pytest.raises(InvalidInput, match="safetensors"):
        pinned.push(junk, digest(junk), "v")
    for said, tensors in bad.items():
        path = tmp_path / "bad.safetensors"
        save_file(tensors, path)
        with pytest.raises(InvalidInput, match=said):
            pinned.push(path, digest(path), "v")
    assert (rollouts(pinned).push, pinned.recommender.bundle.version) == (0, pinned._version)


def test_it_never_follows_an_alias(pinned: Pinned) -> None:
    with pytest.raises(InvalidInput, match="follows no alias"):
        pinned.check()
