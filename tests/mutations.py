"""Damaged copies of any file, the same for the same seed: what disks, networks and ill will make of it.

mutate(content, seed)           for every seed another copy, nearly always different from `content`
mutate(content, seed, other)    may go on as another file of the kind does
"""

import random
import re
import struct

HEAD = 512
"""Bytes at the beginning that half of the damage is aimed at: headers are short, and what readers trust."""
NUMBERS = (0, 1, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)
"""What sizes, offsets and counts are replaced by."""
WRITTEN = (b"0", b"-1", b"00", b"2147483648", b"99999999999999999999", b"1e400", b"0.5", b"nan")
"""The same where numbers are written as text."""


def mutate(content: bytes, seed: int, other: bytes | None = None) -> bytes:
    """A damaged copy.

    Args:
        content: a valid file.
        seed: decides on the damage: one kind of it in every other copy, two or three at once in the others.
        other: another valid file that a splice takes its end from; `content` itself when None.
    """
    draws = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 3))):
        if not damaged:
            break
        draws.choice(KINDS)(damaged, draws, content if other is None else other)
    return bytes(damaged)


def _place(damaged: bytearray, draws: random.Random) -> int:
    end = len(damaged) if draws.random() < 0.5 else min(len(damaged), HEAD)
    return draws.randrange(max(end, 1))


def _block(content: bytes | bytearray, draws: random.Random) -> bytes:
    """A short part, or one of any length."""
    start = draws.randrange(max(len(content), 1))
    length = draws.randint(1, 64) if draws.random() < 0.5 else draws.randint(1, len(content) + 1)
    return bytes(content[start : start + length])


def _flip_bits(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    for _ in range(draws.choice((1, 1, 2, 8))):
        damaged[_place(damaged, draws)] ^= 1 << draws.randrange(8)


def _overwrite(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    for _ in range(draws.randint(1, 8)):
        damaged[_place(damaged, draws)] = draws.choice((0, 255, draws.randrange(256)))


def _overwrite_number(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    """Two, four or eight bytes, in either order, as something huge or a limit."""
    width, code = draws.choice(((2, "H"), (4, "I"), (8, "Q")))
    number = draws.choice(NUMBERS) % 256**width
    place = _place(damaged, draws)
    damaged[place : place + width] = struct.pack(draws.choice("<>") + code, number)


def _overwrite_written_number(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    numbers = list(re.finditer(rb"\d+", damaged))
    if not numbers:
        return _overwrite_number(damaged, draws, other)
    number = draws.choice(numbers)
    damaged[number.start() : number.end()] = draws.choice(WRITTEN)


def _cut_off(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    del damaged[_place(damaged, draws) :]


def _cut_out(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    place = _place(damaged, draws)
    del damaged[place : place + len(_block(damaged, draws))]


def _repeat(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    """A block once more or many times, right behind itself or elsewhere."""
    block = _block(damaged, draws)
    place = _place(damaged, draws)
    damaged[place:place] = block * (draws.choice((1, 1, 2, 50)) if len(block) <= 64 else 1)


def _insert(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    place = _place(damaged, draws)
    length = draws.choice((1, 2, 4, 511, 512, 4096))
    damaged[place:place] = draws.choice((bytes(length), b"\xff" * length, draws.randbytes(length)))


def _move(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    """Part of the other file in place of as many bytes."""
    block = _block(other, draws)
    place = _place(damaged, draws)
    damaged[place : place + len(block)] = block


def _splice(damaged: bytearray, draws: random.Random, other: bytes) -> None:
    """Its beginning, and the end of the other file from elsewhere on."""
    damaged[_place(damaged, draws) :] = other[draws.randrange(max(len(other), 1)) :]


KINDS = (
    _flip_bits,
    _flip_bits,  # what happens by itself
    _overwrite,
    _overwrite_number,
    _overwrite_written_number,
    _cut_off,
    _cut_out,
    _repeat,
    _insert,
    _move,
    _splice,
)
