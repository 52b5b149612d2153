"""The results: a JSONL file that survives being killed, and the sidecar that says whose it is.

A line is written with one call when its request finishes, so a killed job leaves whole lines and
at most one torn one, which the next run cuts off. `<output>.job.json` holds the fingerprint of the
job; only the same job continues a file, any other leaves it untouched.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexrun.errors import FlexrunError, UsageError

if TYPE_CHECKING:
    from flexrun.request import RequestOutput

_SYNC_SECONDS = 1.0


class ResultFile:
    """An output file open for appending, and what earlier runs of the same job left in it."""

    def __init__(self, path: Path, input_path: Path, fingerprint: dict[str, Any]) -> None:
        """Raises `UsageError`, touching nothing, unless the file is new or of the same job."""
        self.path = path
        self.sidecar = sidecar_of(path)
        self.finished: set[int] = set()
        self.failed_before = 0
        try:
            _check_apart(input_path, path, self.sidecar)
            existed = _check_place(path)
            has_results = existed and path.stat().st_size > 0
        except OSError as error:
            raise UsageError(f"cannot write the output {path}: {error.strerror}") from None
        if has_results:
            _check_same_job(path, fingerprint)
        self._fd = self._open()
        self._created = not existed
        self._synced = time.monotonic()
        try:
            self._resume()
            if not self.finished:
                self.record(fingerprint)
        except BaseException:
            self.close()
            raise

    def record(self, fingerprint: dict[str, Any]) -> None:
        """Note whose file this is; only before its first result. Raises `UsageError`."""
        _write_atomically(self.sidecar, json.dumps(fingerprint, indent=2) + "\n")

    def write(self, output: RequestOutput) -> None:
        """Append one finished request. Raises `FlexrunError` if the disk does not take it."""
        line = json.dumps(result_of(output), ensure_ascii=False)
        # ensure_ascii=False keeps text readable; half surrogates become JSON's own \udxxx escapes.
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, data)
            if written < len(data):  # the disk is full: ask again to learn the reason
                written += os.write(self._fd, data[written:])
            if written < len(data):
                raise OSError(28, "No space left on device")
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise self._failure(error) from None
        self.finished.add(output.index)

    def close(self) -> None:
        """Force everything to disk; an output in which nothing was written is removed again."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if os.fstat(fd).st_size == 0 and self._created:
                self.path.unlink(missing_ok=True)
                self.sidecar.unlink(missing_ok=True)
            os.fsync(fd)
        except OSError as error:
            raise self._failure(error) from None
        finally:
            os.close(fd)

    def _open(self) -> int:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"cannot write the output {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"another run is writing the output {self.path}",
                hint="wait for it, or choose another --output",
            ) from None
        except OSError:
            pass  # a file system without locks
        return fd

    def _resume(self) -> None:
        """Note what is finished and cut off a torn last line."""
        with open(self.path, "rb") as file:
            good = 0
            for number, raw in enumerate(file):
                if not raw.endswith(b"\n"):
                    break
                self._note(raw, number)
                good += len(raw)
        if good < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, good)

    def _note(self, raw: bytes, number: int) -> None:
        try:
            result = json.loads(raw)
            self.finished.add(result["index"])
            self.failed_before += "error" in result
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"line {number + 1} of the output {self.path} is not a result",
                hint="repair or delete the file, or choose another --output",
            ) from None

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def _failure(self, error: OSError) -> FlexrunError:
        return FlexrunError(
            f"cannot write the results to {self.path}: {error.strerror}",
            hint="the finished results are safe; once there is space, the same command continues",
        )


def sidecar_of(path: Path) -> Path:
    """The file that says whose results `path` has."""
    return Path(f"{path}.job.json")


def recorded_job(path: Path) -> dict[str, Any] | None:
    """The fingerprint of the job whose results `path` has; None where nothing tells."""
    try:
        found: Any = json.loads(sidecar_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else {}


def result_of(output: RequestOutput) -> dict[str, Any]:
    """The fields of one line of the output, in their order."""
    result: dict[str, Any] = {"id": output.request_id, "index": output.index}
    prompt_tokens = len(output.prompt_token_ids)
    if output.error is not None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        result |= {"text": "", "token_ids": [], "finish_reason": "error", "usage": usage}
        return result | {"error": output.error}
    completions = [
        {
            "index": completion.index,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]
    result |= {name: completions[0][name] for name in ("text", "token_ids", "finish_reason")}
    generated = sum(len(completion.token_ids) for completion in output.outputs)
    result["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": generated}
    return result | ({"completions": completions} if len(completions) > 1 else {})


def _check_apart(input_path: Path, output: Path, sidecar: Path) -> None:
    for path in (output, sidecar):
        if path.exists() and path.samefile(input_path):
            raise UsageError(
                f"the output would overwrite the input {input_path}", hint="choose another --output"
            )


def _check_place(path: Path) -> bool:
    """Whether the output exists. Raises `UsageError` where no file can be written."""
    if path.exists():
        if not path.is_file():
            raise UsageError(f"the output {path} is not a regular file")
        return True
    if not path.parent.is_dir():
        raise UsageError(
            f"the output's directory {path.parent} does not exist", hint="create it first"
        )
    return False


def _check_same_job(path: Path, fingerprint: dict[str, Any]) -> None:
    hint = "choose another --output, or delete the file to start over"
    before = recorded_job(path)
    if before is None:
        raise UsageError(
            f"the output {path} exists and there is no readable {sidecar_of(path).name} to say "
            "that this job wrote it",
            hint,
        )
    names = [k for k in {**fingerprint, **before} if fingerprint.get(k) != before.get(k)]
    if names:
        raise UsageError(
            f"the output {path} belongs to a job with another {', '.join(names)}", hint
        )


def _write_atomically(path: Path, text: str) -> None:
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
