"""Facts about what plans learn from earlier runs."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context

import pytest

from policy_search import model_records
from policy_search.corrections import Corrections, corrected, model_key
from policy_search.model_records import MOST_MODELS
from policy_search.model_shape import ModelShape
from policy_search.whole_file import locked

SHAPE = ModelShape(
    weight_bytes=1000,
    largest_layer_bytes=300,
    head_bytes=100,
    hidden_size=8,
    widest=32,
    vocab_size=64,
    kv_bytes_per_token=(16, 16),
    value_bytes=2,
)


def test_what_was_not_measured_has_no_factor():
    """And what was not predicted has none either."""
    predicted = {"compute": 10.0, "host->device": 10.0, "disk->host": 10.0, "host->disk": 0.0}
    measured = {"compute": 11.4, "host->device": 8.6, "host->disk": 3.0, "device->host": 1.0}
    found = corrected({"compute": 2.0}, predicted, measured)
    assert found == {"compute": pytest.approx(2 * 1.14), "host->device": pytest.approx(0.86)}


def test_the_next_plan_predicts_what_was_measured():
    """The factor is of plain seconds: what was in this prediction counts, too."""
    plain, used = 10.0, {"compute": 2.0}
    predicted = {"compute": plain * used["compute"], "disk->host": 4.0}
    measured = {"compute": 30.0, "disk->host": 2.0}
    factors = corrected(used, predicted, measured)
    assert factors == {"compute": pytest.approx(3.0), "disk->host": pytest.approx(0.5)}
    assert plain * factors["compute"] == pytest.approx(measured["compute"])


def test_factors_have_bounds():
    """From a tenth to ten, whatever a run took."""
    seconds = {"compute": 1.0, "host->device": 1.0}
    found = corrected({"compute": 5.0}, seconds, {"compute": 100.0, "host->device": 0.001})
    assert found == {"compute": 10.0, "host->device": 0.1}


def test_what_is_stored_is_loaded(tmp_path):
    """By machine and model; one resource's factor leaves the others alone."""
    corrections = Corrections(tmp_path / "new")
    assert corrections.load("machine", "model") == {}
    corrections.store("machine", "model", {"compute": 1.5, "disk->host": 2.0})
    corrections.store("machine", "other model", {"compute": 3.0})
    corrections.store("machine", "model", {"compute": 1.25})
    assert Corrections(tmp_path / "new").load("machine", "model") == {
        "compute": 1.375,
        "disk->host": 2.0,
    }
    assert corrections.load("machine", "other model") == {"compute": 3.0}
    assert corrections.load("other machine", "model") == {}


def test_one_run_among_others_changes_nothing(tmp_path):
    """But what changes for good does, after three of five."""
    corrections = Corrections(tmp_path)
    used = []
    for factor in [1.0, 1.1, 0.9, 1.0, 4.0, 1.0, *[2.0] * 3]:
        corrections.store("machine", "model", {"compute": factor})
        used.append(corrections.load("machine", "model")["compute"])
    assert used == pytest.approx([1.0, 1.05, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0])


def test_the_default_is_the_users_cache(monkeypatch, tmp_path):
    """One file for each machine."""
    monkeypatch.setenv("FLEXRUN_CACHE", str(tmp_path))
    Corrections().store("machine", "model", {"compute": 1.5})
    assert (tmp_path / "corrections" / "machine.json").is_file()
    assert Corrections().load("machine", "model") == {"compute": 1.5}


def test_models_that_ran_longest_ago_are_forgotten(tmp_path):
    """A file does not grow without bound; running again counts."""
    corrections = Corrections(tmp_path)
    for number in range(MOST_MODELS):
        corrections.store("machine", str(number), {"compute": 2.0})
    corrections.store("machine", "0", {"compute": 3.0})
    corrections.store("machine", "new", {"compute": 2.0})
    assert corrections.load("machine", "1") == {}
    kept = ["0", *map(str, range(2, MOST_MODELS)), "new"]
    assert all(corrections.load("machine", model) for model in kept)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"models": 1}', '{"models": {"model": 1}}',
     '{"models": {"model": {"compute": "12"}}}', '{"models": {"model": {"compute": [1, NaN]}}}',
     '{"models": {"model": {"compute": 1}}}',
     '{"models": {"model": {"compute": [11]}}}', '{"models": {"model": {"compute": []}}}',
     '{"models": {"model": {"compute": [null]}}}'],
)  # fmt: skip
def test_a_corrupt_file_is_ignored_and_replaced(tmp_path, caplog, text):
    """A warning says so, and no job fails."""
    (tmp_path / "machine.json").write_text(text)
    corrections = Corrections(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert corrections.load("machine", "model") == {}
    assert "only a cache" in caplog.text
    assert "machine.json" in caplog.text
    corrections.store("machine", "model", {"compute": 1.5})
    caplog.clear()
    assert corrections.load("machine", "model") == {"compute": 1.5}
    assert caplog.text == ""


def test_a_directory_that_cannot_be_written_costs_no_job(tmp_path, caplog):
    """It is said in a warning."""
    (tmp_path / "file").touch()
    Corrections(tmp_path / "file").store("machine", "model", {"compute": 1.5})
    assert "cannot be written" in caplog.text


def _store(directory, first):
    for number in range(first, first + 15):
        Corrections(directory).store("machine", str(number), {"compute": 2.0})


def test_two_jobs_at_once_lose_nothing(tmp_path):
    """Both read, change and replace the same file, one after the other."""
    context = get_context("spawn")
    writers = [context.Process(target=_store, args=(tmp_path, first)) for first in (0, 15)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    stored = [Corrections(tmp_path).load("machine", str(number)) for number in range(30)]
    assert stored == [{"compute": 2.0}] * 30


def test_two_jobs_of_one_model_lose_nothing(tmp_path, monkeypatch):
    """What another one has written just before the file is locked is kept."""
    others = [{"disk->host": 3.0}]

    @contextmanager
    def after_another(path):
        if others:
            Corrections(tmp_path).store("machine", "model", others.pop())
        with locked(path):
            yield

    monkeypatch.setattr(model_records, "locked", after_another)
    Corrections(tmp_path).store("machine", "model", {"compute": 2.0})
    assert Corrections(tmp_path).load("machine", "model") == {"disk->host": 3.0, "compute": 2.0}


def test_models_of_the_same_shape_have_one_key():
    """Tensors' names do not count, all that takes time does."""
    same = replace(SHAPE, tensors=("any",))  # type: ignore[arg-type]
    assert model_key(same) == model_key(SHAPE)
    assert model_key(replace(SHAPE, prepared_bytes=9)) == model_key(SHAPE), "they are now"
    assert model_key(replace(SHAPE, kv_bytes_per_token=(16, 8))) != model_key(SHAPE)
    assert model_key(replace(SHAPE, expanded_in_sweep=1)) != model_key(SHAPE)
