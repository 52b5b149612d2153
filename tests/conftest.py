"""What all tests share: the markers' rules, the tiny checkpoints and the real demo model."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may ask the hub

ROOT = Path(__file__).resolve().parent.parent
LONG = ("test_readme.py", "test_bench_overlap.py", "test_bench_links.py")


@pytest.fixture(autouse=True, scope="session")
def _offload_dir(tmp_path_factory: pytest.TempPathFactory):
    """What tests prepare does not stay in the user's cache."""
    os.environ["FLEXRUN_OFFLOAD_DIR"] = str(tmp_path_factory.mktemp("offload"))


@pytest.fixture(autouse=True, scope="session")
def _short_measurements():
    """Engines measure links for half a second each, and attention over 256 MiB that are written.

    For these tests a few copies and a few pages will do.
    """
    from flexrun import host_attention
    from offload import raw_speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_speed, "SECONDS", 0.0)
        patch.setattr(raw_speed, "_WARM_UP", 0.0)
        patch.setattr(host_attention, "MEASURED_BYTES", 4 << 20)
        yield


@pytest.fixture(autouse=True, scope="session")
def _known_speeds(tmp_path_factory: pytest.TempPathFactory):
    """No machine is measured for plans: they are made for one of these speeds.

    And no job teaches another one, or the user's own, what to expect.
    """
    from flexrun import foresight
    from flexrun.planning_speeds import PlanningSpeeds
    from policy_search import model_records
    from tests.speeds import SPEEDS

    own = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlanningSpeeds, "_load", lambda _: SPEEDS)
        patch.setattr(PlanningSpeeds, "_profile", lambda *_, **__: None)
        patch.setattr(foresight, "LEAST_SECONDS", math.inf)
        patch.setattr(
            model_records, "cache_dir", lambda: Path(os.environ.get("FLEXRUN_CACHE", own))
        )
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest tests are first: at the end a process would do one alone, and others nothing.
    items.sort(key=lambda item: item.path.name not in LONG)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_cuda():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--runslow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --runslow"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _free_gpu_memory(request: pytest.FixtureRequest):
    """Leaves the GPU empty after a test that used it."""
    yield
    if request.node.get_closest_marker("gpu"):
        import torch

        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer Llama in float32 with a byte tokenizer."""
    from tests.tiny_models import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_tied_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `tiny_llama_dir`, with one matrix for the embedding and the output head."""
    from tests.tiny_models import write_tiny_llama

    directory = tmp_path_factory.mktemp("tiny_tied_llama")
    return write_tiny_llama(directory, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The demo's model, SmolLM2-135M-Instruct, converted once into the user's cache."""
    from tests.scripts.in_process import run_here

    done = run_here(ROOT / "scripts" / "get_demo_model.py")
    if done.returncode != 0:
        pytest.fail(f"the demo's model is not at hand:\n{done.stderr}", pytrace=False)
    return Path(done.stdout.splitlines()[-1])
