"""`LLM`: the engine as a library, under vLLM's names."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from flexrun.arguments import engine_config
from flexrun.batch_job import ProgressBar
from flexrun.config import EngineConfig
from flexrun.errors import RequestError, UsageError
from flexrun.job_file import checked_messages, checked_token_ids, token_ids_of
from flexrun.model_files import resolve_model
from flexrun.request import Request, RequestOutput, SamplingParams
from flexrun.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from flexrun.batch_job import JobEngine


class LLM:
    """A loaded model that completes lists of prompts; as a context manager it closes itself."""

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """Load `model`: a directory, a hub id or a .gguf file.

        `settings` are the fields of `EngineConfig`, as values or as the command line's texts:
        `LLM("model", device="cuda", weights="device=20,host=80", device_memory="16GiB")`.
        Raises `UsageError` and the other `FlexrunError`s.
        """
        known = {f.name for f in fields(EngineConfig)} - {"model"}
        if unknown := sorted(settings.keys() - known):
            raise UsageError(
                f"unknown setting {unknown[0]!r}", f"known: {', '.join(sorted(known))}"
            )
        config = engine_config({"model": str(model), **settings})
        from flexrun.engine import Engine  # wrong settings are reported before torch is imported

        self._tokenizer = _tokenizer_or_none(resolve_model(config.model))
        self._engine: JobEngine | None = Engine(config, self._tokenizer)
        self._why_closed = "it was closed"

    def generate(
        self,
        prompts: str | dict[str, Any] | Sequence[str | dict[str, Any]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; results are in the order of the prompts.

        A prompt is a text, `{"prompt": text}` or `{"prompt_token_ids": ids}`. Raises `RequestError`
        before anything runs if one of them cannot be served.
        """
        many = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
        return self._run([_read_prompt(prompt) for prompt in many], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template."""
        one = any(isinstance(message, dict) for message in messages)
        conversations: list[Any] = [messages] if one else list(messages)
        checked = [checked_messages(conversation) for conversation in conversations]
        return self._run(checked, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """The model's transformers tokenizer. Raises `UsageError` if it has none."""
        if self._tokenizer is None:
            raise UsageError("the model has no tokenizer")
        return self._tokenizer.hf

    def summary(self) -> dict[str, Any]:
        """What all runs so far took: tokens, seconds, bytes per link, peak bytes per tier."""
        return self._open_engine().summary()

    def close(self) -> None:
        """Free the model; may be called again."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_engine(self) -> JobEngine:
        if self._engine is None:
            raise UsageError(
                f"this LLM cannot be used any more: {self._why_closed}", hint="make a new LLM"
            )
        return self._engine

    def _run(
        self,
        prompts: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        engine = self._open_engine()
        params = _one_each(sampling_params, len(prompts))
        requests = [self._request(engine, *each) for each in enumerate(zip(prompts, params))]
        progress = ProgressBar(len(requests), shown=None if use_tqdm else False)
        outputs: list[RequestOutput] = []
        try:
            for request in requests:
                engine.add_request(request)
            while engine.has_unfinished:
                finished = engine.step()
                outputs += finished
                progress.update(len(finished), engine.progress())
        except BaseException:
            # A sweep was broken off half way: what is in the engine is of no more use.
            self._why_closed = "a run was interrupted or failed"
            self.close()
            raise
        finally:
            progress.close()
        return sorted(outputs, key=lambda output: output.index)

    def _request(
        self, engine: JobEngine, index: int, prompt_and_params: tuple[Any, SamplingParams]
    ) -> Request:
        prompt, params = prompt_and_params
        text = prompt if isinstance(prompt, str) else None
        try:
            token_ids = token_ids_of(prompt, self._tokenizer)
            request = Request(index, str(index), text, token_ids, params)
            engine.check_request(request)
        except RequestError as error:
            raise RequestError(error.code, f"prompt {index}: {error.message}", error.hint) from None
        return request


def _tokenizer_or_none(directory: Path) -> Tokenizer | None:
    try:
        return Tokenizer.load(directory)
    except UsageError:
        return None  # prompt_token_ids still work; a text is refused with "no_tokenizer"


def _read_prompt(prompt: Any) -> str | tuple[int, ...]:
    if isinstance(prompt, dict) and prompt.keys() == {"prompt_token_ids"}:
        return checked_token_ids(prompt["prompt_token_ids"])
    text = prompt["prompt"] if isinstance(prompt, dict) and prompt.keys() == {"prompt"} else prompt
    if not isinstance(text, str):
        raise UsageError(
            f"a prompt of type {type(prompt).__name__} cannot be read",
            hint='give a text, {"prompt": text} or {"prompt_token_ids": [1, 2, 3]}',
        )
    return text


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(
            f"{len(params)} sampling_params for {count} prompts: give one, or one each"
        )
    return list(params)
