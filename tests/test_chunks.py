"""The chunk size follows the times that it is told."""

import pytest

from hesse.runtime.chunks import ChunkSize, Sizes
from hesse.runtime.room import Room


def room_for(limit):
    """Room for so many columns, however much they take."""
    room = Room(limit << 21, 2 << 20, lambda: 0)
    room.lower(limit)
    return room


def run(seconds_per_column, limit=10_000, columns=20_000, regimes=1, expected=0.0):
    """The sizes that are taken when a chunk of n columns takes n * seconds_per_column(n)."""
    chunks, sizes, left = ChunkSize(room_for(limit), columns, expected), [], columns
    while left:
        size = min(chunks.size, left)
        sizes.append(size)
        left -= size
        chunks.report(size, size * seconds_per_column(size), regime=len(sizes) * regimes // 1000)
    return sizes


def test_grows_while_it_pays():
    sizes = run(lambda n: 5e-5 + 5e-3 / n + (1e-3 if n > 600 else 0))
    assert sizes[:6] == [32, 64, 128, 256, 512, 1024]
    assert set(sizes[6:-1]) == {512}


def test_does_not_try_a_new_size_on_most_of_what_is_left():
    assert run(lambda n: 1e-6 + 1e-4 / n, columns=1500) == [32, 64, 128, 256, 256, 256, 256, 252]


def test_stays_where_it_is_best():
    assert set(run(lambda n: 5e-5 * (1 + abs(n - 128) / 128))[4:-1]) == {128}


def test_plain_products_where_batching_does_not_pay():
    sizes = run(lambda n: 1e-3 if n == 1 else 2e-3, columns=500)
    assert sizes[:6] == [32, 64, 1, 32, 1, 32]
    assert set(sizes[6:]) == {1}


def test_smaller_batches_where_those_are_best():
    assert set(run(lambda n: 1e-3 * (1 + abs(n - 32) / 32))[5:-1]) == {32}


def test_batches_where_plain_products_are_slower():
    sizes = run(lambda n: 5e-3 if n == 1 else 1e-3 / n**0.1)
    assert sizes.count(1) <= 2
    assert max(sizes) > 1000


def test_one_noisy_time_does_not_decide():
    times = iter([3.0, 50.0, *[1.0] * 1000])  # a start-up, then a hiccup
    sizes = run(lambda n: next(times) * (1e-3 if n > 1 else 2e-3))
    assert sizes.count(1) <= 2


def test_heavy_columns_begin_with_plain_products():
    """Batches of eight are tried, and stay only where they take a twentieth less."""
    heavy = lambda gain: run(lambda n: 0.06 if n < 8 else 0.06 * gain, columns=150, expected=0.02)
    assert heavy(0.97)[:4] == [1, 8, 1, 8]
    assert set(heavy(0.97)[4:]) == {1}
    assert heavy(0.9)[:5] == [1, 8, 1, 8, 16]
    assert set(heavy(0.9)[5:-1]) == {8}


def test_settles_over_many_small_tensors():
    """A new tensor begins no new search for whether batches pay."""
    chunks, sizes = ChunkSize(room_for(100), 240), []
    for tensor in range(60):
        left = 4
        while left:
            size = min(chunks.size, left)
            sizes.append(size)
            left -= size
            chunks.report(size, size * 1e-3, regime=tensor)
    assert len(sizes) <= 61


def test_slow_columns_of_little_memory_are_batched_at_once():
    room = Room(1000, 1, lambda: 0)
    assert ChunkSize(room, 1000, expected=0.02).size == 32


def test_a_search_begins_where_the_last_one_ended():
    """Layers of one network: what pays for one pays for the next."""
    sizes = Sizes()
    for _ in range(3):
        search = sizes.search(room_for(1000), 1000, expected=0.02)
        for _ in range(12):
            search.report(search.size, search.size * (1e-3 + 1e-2 / search.size), regime=None)
    first, *others = sizes.found
    assert first >= 64
    assert all(other >= first for other in others)
    again = Sizes(sizes.found)
    assert [again.search(room_for(1000), 1000).size for _ in range(3)] == list(sizes.found)


@pytest.mark.parametrize("limit", [1, 7, 40])
def test_never_beyond_the_limit(limit):
    assert max(run(lambda n: 1 / n, limit, columns=500)) == limit


def test_halving_and_forbidding():
    chunks = ChunkSize(room_for(100), 1000)
    assert chunks.halve()
    assert chunks.size == 16
    chunks.forbid()
    assert chunks.size == 1
    assert not chunks.halve()
