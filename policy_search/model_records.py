"""Small records about models on machines: a file for each machine, a record for each model.

They are only caches: one that cannot be read or written costs a worse plan, and no job.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from policy_search.machine import cache_dir
from policy_search.whole_file import locked, write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

MOST_MODELS = 64
"""Of a machine; those whose records were written longest ago are forgotten."""


_WAITING = "another job is measuring its model: waiting for it, about half a minute"

_NO_RECORD = (ValueError, TypeError, KeyError, AttributeError, OverflowError)
"""What is raised for files and records that are something else."""


class ModelRecords:
    """Records of one kind, each a JSON object."""

    def __init__(
        self, kind: str, read: Callable[[Any], Any], directory: Path | None = None
    ) -> None:
        """`read` makes something of a JSON object; it raises `TypeError`, `ValueError`, `KeyError`,
        `AttributeError` or `OverflowError` if it is none of its kind. `directory`: of the files;
        None: one that is called `kind` in the user's cache.
        """
        self._directory = directory or cache_dir() / kind
        self._read = read

    def load(self, machine_key: str, model_key: str) -> Any:
        """What is made of the record; None if there is none, or one that cannot be read."""
        return self._made(machine_key, self._models(machine_key).get(model_key))

    def store(self, machine_key: str, model_key: str, change: Callable[[Any], Any]) -> None:
        """Replace a record by the JSON object that `change` makes of what `load` gives, while no
        other process changes it. Says in a warning if it cannot.
        """
        path = self._path(machine_key)
        try:
            with locked(path.with_suffix(".lock")):
                models = self._models(machine_key)
                known = self._made(machine_key, models.pop(model_key, None))
                models[model_key] = change(known)  # the newest is the last
                kept = dict(list(models.items())[-MOST_MODELS:])
                write_whole(path, json.dumps({"models": kept}, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next plan is no better", path, error)

    @contextmanager
    def measuring(self, machine_key: str) -> Iterator[None]:
        """While no other process does the same; if the lock cannot be had, all the same."""
        path = self._path(machine_key).with_suffix(".measuring")
        with ExitStack() as held:
            try:
                held.enter_context(locked(path, lambda: logger.warning(_WAITING)))
            except OSError as error:
                logger.warning("another job may measure at the same time: %s", error)
            yield

    def _made(self, machine_key: str, data: Any) -> Any:
        """Of a record; None of none, and of one that cannot be read."""
        if data is None:
            return None
        try:
            return self._read(data)
        except _NO_RECORD as error:
            self._warn(machine_key, error)
            return None

    def _path(self, machine_key: str) -> Path:
        return self._directory / f"{machine_key}.json"

    def _models(self, machine_key: str) -> dict[str, Any]:
        """By model key, the one that was written longest ago first."""
        try:
            data = json.loads(self._path(machine_key).read_text(encoding="utf-8"))
            return dict(data["models"])
        except FileNotFoundError:
            return {}
        except (OSError, *_NO_RECORD) as error:
            self._warn(machine_key, error)
            return {}

    def _warn(self, machine_key: str, error: Exception) -> None:
        logger.warning(
            "%s is only a cache and cannot be read (%r): it is ignored, and replaced after the "
            "next run",
            self._path(machine_key),
            error,
        )
