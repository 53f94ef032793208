"""The damage that hostile tests do: repeatable, of many kinds, on any content."""

import os

from mutations import mutate


def test_a_seed_gives_the_same_copy_again_and_another_seed_another() -> None:
    content = b"shape: (12, 16)\n" + os.urandom(2000)
    copies = [mutate(content, seed) for seed in range(500)]
    assert copies == [mutate(content, seed) for seed in range(500)]
    assert len(set(copies)) > 480 and copies.count(content) < 10


def test_copies_are_longer_shorter_and_as_long() -> None:
    content = bytes(range(256)) * 4
    lengths = [len(mutate(content, seed)) - len(content) for seed in range(500)]
    assert min(lengths) < -900 and max(lengths) > 500 and 100 < lengths.count(0) < 400
    flips = [
        [place for place in range(1024) if copy[place] != content[place]]
        for seed in range(500)
        if len(copy := mutate(content, seed)) == 1024
    ]
    assert any(len(places) == 1 for places in flips)  # one damaged bit or byte


def test_any_content_is_taken() -> None:
    for content in (b"", b"x", b"7", b"\0" * 3):
        for seed in range(300):
            assert isinstance(mutate(content, seed), bytes)
            mutate(content, seed, b"")
            mutate(content, seed, b"other")


def test_another_file_s_end_and_parts_are_spliced_in() -> None:
    copies = [mutate(b"a" * 1000, seed, b"b" * 1000) for seed in range(300)]
    assert 20 < sum(b"b" * 20 in copy for copy in copies) < 200
