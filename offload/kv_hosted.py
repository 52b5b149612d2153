"""Rows that attend to their pages on HOST where these lie, beside a device with its own memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from offload.kv_layout import KVGroup, build_group
from offload.tiers import Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from offload.kv_moves import SpanPages

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class HostedRows:
    """The n rows of a micro-batch that do."""

    rows: torch.Tensor
    """[n] of the micro-batch, on the device."""
    group: KVGroup
    """What they do with pages of the HOST pool; its rows are 0 to n - 1, its tensors in RAM."""
    pages: int
    """That they read in each layer."""


def can_be_hosted(span: SpanPages) -> bool:
    """Single rows read much and compute little; rows of a prompt are for the device."""
    return span.count == 1


def split_spans(
    spans: Sequence[SpanPages], share: float, room: int
) -> tuple[list[SpanPages], list[SpanPages]]:
    """Spans that HOST attends to, with about `share` of the single rows' pages, and the others.

    Those that move to the device have at most `room` pages, if HOST can attend to the rest. Both
    are in the order of their rows, which the KV cache relies on.
    """
    hosted: list[SpanPages] = []
    moved: list[SpanPages] = []
    room -= sum(len(span.pages) for span in spans if not can_be_hosted(span))
    wanted = chosen = 0.0
    for span in spans:
        if not can_be_hosted(span):
            moved.append(span)
            continue
        pages = len(span.pages)
        wanted += pages * share
        # As in error diffusion: each choice makes up for what the ones before were off.
        if wanted - chosen >= pages / 2 or pages > room:
            hosted.append(span)
            chosen += pages
        else:
            moved.append(span)
            room -= pages
    return hosted, moved


def hosted_rows(
    spans: Sequence[SpanPages], page_tokens: int, device: torch.device
) -> HostedRows | None:
    """What HOST does for `spans`, by their numbers in its pool; None if there are none."""
    if not spans:
        return None
    numbered = [replace(span, row=row) for row, span in enumerate(spans)]
    return HostedRows(
        torch.tensor([span.row for span in spans], device=device),
        build_group(numbered, page_tokens, _CPU, Tier.HOST, staged=False),
        sum(len(span.pages) for span in spans),
    )
