"""One completion on its way: its tokens, and how the next one is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flexrun.prompt_lookup import PromptLookup
from flexrun.sampler import request_seed, uniform
from flexrun.stop import StopChecker

if TYPE_CHECKING:
    from flexrun.prompt_lookup import Drafter
    from flexrun.request import CompletionOutput, Request
    from flexrun.tokenizer import Tokenizer


@dataclass(slots=True)
class Sequence:
    """Completion `sample_index` of a request."""

    number: int
    """Key of the sequence everywhere in the engine."""
    request: Request
    sample_index: int
    checker: StopChecker
    seed: int
    drafter: Drafter
    tokens: list[int] = field(default_factory=list)
    """Prompt and generated tokens."""

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def random(self, ahead: int = 0) -> float:
        """The random number of the next token, or of one further: the same under any schedule."""
        if self.request.sampling_params.greedy:
            return 0.0
        return uniform(self.seed, self.sample_index, self.generated + ahead)

    def draft(self) -> list[int]:
        """A guess of the tokens that follow; may be empty."""
        return self.drafter.propose(self.tokens)

    def append(self, token: int) -> bool:
        """Take the next token; returns whether the sequence has ended."""
        self.tokens.append(token)
        return self.checker.append(token)

    def output(self) -> CompletionOutput:
        """What the user gets."""
        return self.checker.output(self.sample_index)


def make_sequences(
    request: Request,
    first_number: int,
    tokenizer: Tokenizer | None,
    end_ids: frozenset[int],
    max_tokens: int,
    engine_seed: int,
) -> list[Sequence]:
    """The request's n sequences, numbered from `first_number`."""
    params, prompt = request.sampling_params, request.prompt_token_ids
    seed = request_seed(params, engine_seed, request.index)
    return [
        Sequence(
            number=first_number + index,
            request=request,
            sample_index=index,
            checker=StopChecker(params, end_ids, tokenizer, prompt, max_tokens),
            seed=seed,
            drafter=PromptLookup(),
            tokens=list(prompt),
        )
        for index in range(params.n)
    ]
