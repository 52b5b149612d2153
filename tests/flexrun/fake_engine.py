"""An engine without a model: it needs one sweep per token and can break off where a test says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from flexrun.errors import RequestError
from flexrun.request import CompletionOutput, Request, RequestOutput

CONTEXT = 60


@dataclass
class FakeProgress:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    sweeps: int = 0


class FakeEngine:
    """Serves two requests at a time, in order; a prompt's tokens decide what it generates."""

    max_sequences = 2

    def __init__(
        self, break_at_sweep: int | None = None, error: BaseException | None = None
    ) -> None:
        self.break_at_sweep = break_at_sweep
        """The sweep that raises `error`, or kills the process if there is none."""
        self.error = error
        self.waiting: list[Request] = []
        self.most_waiting = 0
        self.closed = False
        self._generated: dict[int, int] = {}
        self._progress = FakeProgress()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting)

    def check_request(self, request: Request) -> None:
        if len(request.prompt_token_ids) >= CONTEXT:
            raise RequestError("prompt_too_long", f"more than {CONTEXT} tokens", "shorten it")

    def add_request(self, request: Request) -> None:
        self.check_request(request)
        self.waiting.append(request)
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def step(self) -> list[RequestOutput]:
        if self._progress.sweeps == self.break_at_sweep:
            if self.error is None:
                os._exit(9)
            raise self.error
        self._progress.sweeps += 1
        finished = []
        for request in self.waiting[: self.max_sequences]:
            count = self._generated.get(request.index, 0) + 1
            self._generated[request.index] = count
            self._progress.generated_tokens += 1
            if count >= request.sampling_params.max_tokens:
                self.waiting.remove(request)
                self._progress.prompt_tokens += len(request.prompt_token_ids)
                finished.append(self._output(request, count))
        return finished

    def _output(self, request: Request, count: int) -> RequestOutput:
        output = RequestOutput(
            request.request_id, request.prompt, request.prompt_token_ids, index=request.index
        )
        if request.prompt == "nan":
            output.error = {"code": "nan_logits", "message": "the logits are NaN"}
            return output
        start = sum(request.prompt_token_ids)
        tokens = tuple(97 + (start + i) % 26 for i in range(count))
        output.outputs = [
            CompletionOutput(i, bytes(tokens).decode(), tokens, "length")
            for i in range(request.sampling_params.n)
        ]
        return output

    def progress(self) -> FakeProgress:
        return self._progress

    def summary(self) -> dict[str, Any]:
        return {"generated_tokens": self._progress.generated_tokens}

    def write_trace(self) -> None:
        """There is nothing to trace."""

    def describe(self) -> str:
        return "a fake engine"

    def close(self) -> None:
        self.closed = True
