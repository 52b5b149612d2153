"""How the commands of `policy-search` read their flags."""

from __future__ import annotations

import argparse
from typing import NoReturn

from compression.errors import FlexrunError
from offload.tiers import parse_size
from policy_search.errors import PolicyError


class Parser(argparse.ArgumentParser):
    """Reports what it cannot read like every other wrong setting."""

    def error(self, message: str) -> NoReturn:
        raise PolicyError(message, hint=f"see {self.prog} --help")


def size(text: str) -> int:
    """Bytes, such as 16GiB; a speed may say that it is per second."""
    try:
        return parse_size(text.removesuffix("/s"))
    except FlexrunError as error:
        raise argparse.ArgumentTypeError(f"{error.message} ({error.hint})") from None


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
