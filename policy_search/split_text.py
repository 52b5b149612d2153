"""A search for the best split of machines, as a table or as JSON (no torch)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from policy_search.capacity import HIGHEST

if TYPE_CHECKING:
    from policy_search.split_search import RatedSplit, SplitSearch

_HEAD = "machines  prompts:tokens  prompts alone  tokens alone  slower, per device"


def split_search_report(search: SplitSearch, *, as_json: bool) -> str:
    """Run a search and say what it has found."""
    splits = search.splits()
    best = max(splits, key=lambda split: split.rate_per_device)
    each = search.scenario.kind.devices
    machines = max(1, best.devices // each)
    apart, together = search.rate_apart(best), search.rate_together(machines)
    per_device = {
        "rate_per_device": apart / best.devices,
        "rate_together_per_device": together / (machines * each),
        "rate_alone_per_device": search.rate_together(1) / each,
    }
    if as_json:
        found: dict[str, Any] = {"requests": len(search.lengths), "best": asdict(best)}
        return json.dumps(found | per_device | {"splits": [asdict(each) for each in splits]})
    return "\n".join(
        [
            f"{len(search.lengths)} requests; requests/s within the targets:",
            _HEAD,
            *map(_row, splits),
            f"{best.prompt_machines}:{best.token_machines} as a whole: "
            f"{per_device['rate_per_device']:.3f} per device; {machines} that do everything: "
            f"{per_device['rate_together_per_device']:.3f}; one of them: "
            f"{per_device['rate_alone_per_device']:.3f}",
        ]
    )


def _row(split: RatedSplit) -> str:
    ratio = f"{split.prompt_machines}:{split.token_machines}"
    return (
        f"{split.machines:8}{ratio:>16}{_rate(split.prompt_rate):>15}{_rate(split.token_rate):>14}"
        f"{split.rate_per_device:20.3f}"
    )


def _rate(rate: float) -> str:
    """So few requests that all of them have a place at once can arrive at any rate."""
    return "any" if rate >= HIGHEST else f"{rate:.3f}"
