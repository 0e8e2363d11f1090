import pytest
import torch

from models.serving.__main__ import _arguments, _at_once

VERSION = "20260101T000000-ab12cd34"


def test_roles_have_the_models_they_need() -> None:
    assert _arguments([]).model == [("onerec", "production")]
    assert _arguments(["--role", "predictor", "--model", "a=b"]).model == [("a", "b")]
    assert _arguments(["--role", "transformer", "--predictor_host", "h:1"]).model == [("onerec", "")]
    assert _arguments(["--role", "rollout", "--model", f"onerec={VERSION}"]).model == [("onerec", VERSION)]
    kserve = ["--role", "transformer", "--predictor_host=h:1", "--model_name", "mine", "--http_port", "8080"]
    assert _arguments(kserve).model == [("mine", "")]
    assert _arguments(["--http_port", "9", "--buckets", "64,256"]).buckets == (64, 256)


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        (["--threads", "4"], 4),
        (["--threads", "5", "--batch_threads", "2"], 2),
        (["--threads", "2", "--batch_threads", "4"], 1),
        (["--threads", "4", "--device", "cuda"], 1),
    ],
)
def test_a_cpu_runs_a_batch_on_each_share_of_its_threads(given: list[str], batches: int) -> None:
    assert _at_once(_arguments(given)) == batches


def test_without_a_number_the_threads_are_pytorch_s_choice() -> None:
    assert _arguments([]).threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--role", "rollout"], "never follows an alias"),
        (["--role", "rollout", "--model", "onerec=production"], "never follows an alias"),
        (["--model", f"onerec={VERSION}"], "NAME=ALIAS"),
        (["--model", "onerec"], "NAME=ALIAS"),
        (["--model", "ONEREC=production"], "NAME=ALIAS"),
        (["--role", "transformer"], "--predictor_host"),
        (["--predictor_host", "h:1"], "--predictor_host"),
        (["--role", "transformer", "--predictor_host", "h"], "HOST:PORT"),
        (["--role", "transformer", "--predictor_host", "h:1", "--model", "onerec=production"], "NAME alone"),
        (["--buckets", "512,128"], "rising"),
        (["--buckets", "0"], "rising"),
        (["--threads", "-1"], "at least 0"),
        (["--batch_threads", "0"], "at least"),
        (["--model", "a=production", "--model", "a=frozen"], "a name twice: a, a"),
        (["--max_batch", "0"], "--max_batch is 0; it must be at least 1"),
        (["--queue_ms", "-5"], "at least 1"),
        (["--batch_ms", "nan"], "at least 1"),
        (["--timeout_ms", "0"], "at least 1"),
        (["--drain_s", "-1"], "at least 0"),
    ],
)
def test_wrong_combinations_are_explained(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _arguments(given)
    assert said in capsys.readouterr().err
