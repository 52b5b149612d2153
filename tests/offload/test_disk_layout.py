"""Facts about the segments in which weights are read from disk."""

from __future__ import annotations

import random

import pytest

from offload.disk_layout import GAP, DiskPlace, lay_out


@pytest.mark.parametrize("seed", range(50))
def test_every_byte_lands_where_the_layout_says(seed):
    """Reading the segments into a buffer puts each weight at its offset; blocks stay aligned."""
    draw = random.Random(seed)
    files = {name: draw.randbytes(600_000) for name in ("a", "b")}
    places = []
    for name in files:
        end = draw.randint(0, 5000)
        for _ in range(draw.randint(0, 12)):
            nbytes = draw.choice([1, 64, 3000, 40_000])
            places.append(DiskPlace(name, end, nbytes, 4096))
            end += nbytes + draw.choice([0, 0, 64, 5000, GAP + 1])
            if end > 500_000:
                break
    draw.shuffle(places)
    layout = lay_out(places)
    slab = bytearray(layout.nbytes)
    for segment in layout.segments:
        assert segment.offset % 4096 == segment.nbytes % 4096 == segment.at % 4096 == 0
        data = files[segment.file][segment.offset : segment.offset + segment.nbytes]
        slab[segment.at : segment.at + len(data)] = data
    for place, offset in zip(places, layout.offsets):
        wanted = files[place.file][place.offset : place.offset + place.nbytes]
        assert slab[offset : offset + place.nbytes] == wanted
    assert sum(s.nbytes for s in layout.segments) == layout.nbytes
    padding = sum(segment.padding for segment in layout.segments)
    assert layout.nbytes - padding == sum(place.nbytes for place in places)


def test_neighbours_are_one_read():
    """A layer whose weights follow each other in the file is read at once, a far one apart."""
    places = [DiskPlace("f", start, 1_000_000, 4096) for start in (100, 1_000_100, 2_000_110)]
    layout = lay_out(places)
    assert len(layout.segments) == 1
    assert layout.segments[0].padding == layout.nbytes - 3_000_000 < 2 * 4096 + 10
    far = [*places, DiskPlace("f", 3_000_110 + GAP + 1, 10, 4096)]
    assert len(lay_out(far).segments) == 2
    assert lay_out([]).nbytes == 0
