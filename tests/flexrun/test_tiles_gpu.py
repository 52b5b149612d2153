"""Facts about how attention on a GPU is cut into programs: nothing is left out, nothing idles."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from flexrun.attention.tiles_gpu import Heads, plan_tiles

SHAPES = [Heads(32, 8, 128, 128, 2), Heads(9, 3, 64, 64, 2), Heads(71, 1, 64, 64, 2)]
SHAPES += [Heads(16, 8, 256, 256, 4), Heads(128, 128, 192, 128, 2), Heads(4, 4, 24, 8, 4)]
PROCESSORS = 108


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("hopper", [False, True])
def test_each_span_has_its_tiles(heads, hopper):
    """Each span belongs to one launch, which has a tile for each of its rows."""
    draw = random.Random(0)
    for _ in range(300):
        rows = [draw.choice([1, 1, 2, 3, 40, 300]) for _ in range(draw.randint(1, 12))]
        launches = plan_tiles(heads, sum(rows), len(rows), max(rows), hopper)
        needed = [0] * len(launches)
        for count in rows:
            takers = [
                i
                for i, tiles in enumerate(launches)
                if count >= tiles.least_rows and (tiles.flat or count <= tiles.rows)
            ]
            assert len(takers) == 1
            needed[takers[0]] += -(-count // launches[takers[0]].rows)
        for tiles, count in zip(launches, needed):
            assert tiles.count >= (count if tiles.flat else len(rows))
            assert tiles.rows * heads.group <= tiles.blocks.rows


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("hopper", [False, True])
def test_blocks_are_what_tensor_cores_take(heads, hopper):
    """All sizes are powers of two of 16 or more, and tiles of keys fit into shared memory."""
    for most_rows in (1, 2, 9, 5000):
        for tiles in plan_tiles(heads, 2 * most_rows, 2, most_rows, hopper):
            sizes = (tiles.blocks.rows, tiles.blocks.keys, heads.block_d, heads.block_v)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
            keys = tiles.blocks.keys * (heads.block_d + heads.block_v) * heads.element_size
            assert keys * 2 <= (192 if hopper else 98) * 1024


def decode(num_spans: int, kv_heads: int, length: int, total: int | None = None) -> tuple[int, int]:
    heads = Heads(4 * kv_heads, kv_heads, 128, 128, 2)
    (tiles,) = plan_tiles(heads, num_spans, num_spans, 1, False)
    return tiles.split(kv_heads, PROCESSORS, length, total or num_spans * length)


def test_many_sequences_are_not_split():
    """Where spans of one length fill the GPU, each stays whole."""
    assert decode(64, 8, 2048)[0] == 1
    assert decode(500, 8, 5)[0] == 1


def test_few_sequences_fill_the_gpu():
    """Where there are few programs, pieces make more, but none of just a few keys."""
    for num_spans, kv_heads, length in [(1, 8, 32768), (4, 8, 8192), (16, 3, 4096), (1, 1, 90000)]:
        splits, piece = decode(num_spans, kv_heads, length)
        assert 2 * PROCESSORS <= num_spans * kv_heads * splits <= 8 * PROCESSORS
        assert piece >= 256
    assert decode(1, 8, 600)[0] <= 2


def test_a_long_sequence_among_short_ones_is_split():
    """One span of 32k tokens among 63 of 128 is spread over many programs."""
    splits, _ = decode(64, 8, 32768, 32768 + 63 * 128)
    assert splits >= 6
    assert splits * 64 * 8 <= 8 * 4 * PROCESSORS


def test_pieces_cover_all_keys():
    """Pieces are whole tiles of keys, reach to the last key, and none is behind it."""
    heads = Heads(8, 8, 64, 64, 2)
    draw = random.Random(1)
    for _ in range(1000):
        (tiles,) = plan_tiles(heads, 1, 1, 1, False)
        reach, forced = draw.randint(1, 5000), draw.choice([None, 1, 2, 3, 100])
        splits, piece = tiles.split(8, draw.choice([1, 108]), reach, reach, forced)
        assert piece % tiles.blocks.keys == 0
        assert (splits - 1) * piece < reach <= splits * piece


def test_a_chunk_over_a_long_context_is_split():
    """A few rows over many keys give about as many programs as the GPU has processors."""
    heads = Heads(32, 8, 128, 128, 2)
    (tiles,) = plan_tiles(heads, 32, 1, 32, False)
    splits, _ = tiles.split(8, PROCESSORS, 30000, tiles.count * 30000)
    assert 0.9 * PROCESSORS <= tiles.count * 8 * splits <= 1.5 * PROCESSORS


def test_asking_for_triton_does_not_import_it():
    """The module that launches the kernels loads without Triton."""
    code = (
        "import sys\nfrom flexrun.attention.gpu import triton_available\n"
        "assert triton_available() in (True, False)\nsys.exit('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
