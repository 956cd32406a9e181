"""Adaptive binary arithmetic coding of small whole numbers, as loops that Numba compiles.

A number is coded as decisions down a binary tree, its highest bit first. Each decision has a pair of counts of its
earlier outcomes; a decision of probability p costs −log₂ p bits. The decisions on a number's first four bits have a
pair of counts for every context; on later bits, all contexts share one pair. The range coder is that of Martin, 1979.
As in LZMA, bytes are kept back until no carry can change them, so a stream's first byte is 0.
"""

# The loops are compiled for numpy arrays, whose types no annotation says.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from scaling.storage.compiled import compiled

PLANES, HULL = range(2)  # kinds of numbers
LOW, RANGE, CACHE, WAITING, PLACE = range(5)  # positions in a coder's state [5], uint64
u64 = np.uint64
TOP, BYTE, ALL = u64(1 << 24), u64(0xFF), u64(0xFFFFFFFF)
LIMIT = 1000  # outcomes of a decision, after which its counts are halved
STEP = 16  # by which an outcome raises its count
SHARED_FROM = 16  # first node of a tree (its fifth bit) whose counts all contexts share


@compiled()
def shift(state, out):
    """Write the bytes that no later carry can change, and move LOW on by one byte."""
    # A carry would run through a byte of 0xFF, so such bytes wait until it is known whether a carry comes.
    if state[LOW] < u64(0xFF000000) or state[LOW] > ALL:
        carry = state[LOW] >> u64(32)
        byte = state[CACHE]
        while state[WAITING] > 0:
            out[state[PLACE]] = (byte + carry) & BYTE
            state[PLACE] += u64(1)
            state[WAITING] -= u64(1)
            byte = BYTE
        state[CACHE] = (state[LOW] >> u64(24)) & BYTE
    state[WAITING] += u64(1)
    state[LOW] = (state[LOW] & u64(0x00FFFFFF)) << u64(8)


@compiled()
def part_of_one(state, counts):
    """The part of the range that stands for a 1, from the counts [2] of a decision."""
    return state[RANGE] // u64(counts[0] + counts[1]) * u64(counts[1])


@compiled()
def count(counts, bit):
    """Add the outcome of a decision to its counts [2]. The older an outcome, the less it counts."""
    counts[bit] += STEP
    if counts[0] + counts[1] > STEP * LIMIT:
        counts[0], counts[1] = (counts[0] + 1) // 2, (counts[1] + 1) // 2


@compiled()
def write_number(number, bits, counts, shared, state, out):
    """Code one number in 0..2^bits − 1. counts [min(2^bits, SHARED_FROM), 2]: of its context; shared [2^bits, 2]: of
    all contexts."""
    node = 1
    for place in range(bits - 1, -1, -1):
        bit = (number >> place) & 1
        own = counts[node] if node < SHARED_FROM else shared[node]
        ones = part_of_one(state, own)
        if bit:
            state[RANGE] = ones
        else:
            state[LOW] += ones
            state[RANGE] -= ones
        while state[RANGE] < TOP:
            state[RANGE] <<= u64(8)
            shift(state, out)
        count(own, bit)
        node = 2 * node + bit


@compiled()
def read_number(bits, counts, shared, state, data):
    """Decode a number that `write_number` coded. state[LOW] holds the code here; beyond the end of `data` zeros are
    read."""
    node = 1
    for _ in range(bits):
        own = counts[node] if node < SHARED_FROM else shared[node]
        ones = part_of_one(state, own)
        bit = 1 if state[LOW] < ones else 0
        if bit:
            state[RANGE] = ones
        else:
            state[LOW] -= ones
            state[RANGE] -= ones
        while state[RANGE] < TOP:
            state[RANGE] <<= u64(8)
            state[LOW] = (state[LOW] << u64(8)) | u64(data[state[PLACE]] if state[PLACE] < len(data) else 0)
            state[PLACE] += u64(1)
        count(own, bit)
        node = 2 * node + bit
    return node - (1 << bits)


@compiled()
def level_context(planes, p, y, x, bits):
    """Context of a number in 0..2^bits − 1, from the numbers above and left of it on its plane: their mean, in at most
    16 steps, and their distance, in 4. Beyond the plane's edge the middle number is taken."""
    middle = 1 << (bits - 1)
    above = np.int64(planes[p, y - 1, x]) if y else middle
    left = np.int64(planes[p, y, x - 1]) if x else middle
    coarser = max(bits - 4, 0)
    return ((above + left) // 2 >> coarser) * 4 + min(abs(above - left) // 2 >> coarser, 3)


@compiled()
def hull_context(cells, p, y, x):
    """Context of a cell, from twelve cells that come before it: nine neighbours, and three that lie two cells away
    along an axis. Beyond the box all cells are empty."""
    side = cells.shape[0]
    number = np.int64(0)
    for k in range(12):
        i, j, h = p + NEAR[k, 0], y + NEAR[k, 1], x + NEAR[k, 2]
        within = i >= 0 and 0 <= j < side and 0 <= h < side
        number = 2 * number + np.int64(cells[i, j, h] if within else 0)
    return number


NEAR = np.array(
    [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-1, 0, 1], [-1, 1, 0], [0, -1, 1], [-1, -1, 0], [-1, 0, -1], [0, -1, -1],
     [0, 0, -2], [-2, 0, 0], [0, -2, 0]]
)  # fmt: skip


@compiled()
def context_of(kind, numbers, p, y, x, bits):
    """Context of a number, by its kind. (A function as an argument would be compiled anew in every process.)"""
    if kind == HULL:
        return hull_context(numbers, p, y, x)
    return level_context(numbers, p, y, x, bits)


@compiled()
def fresh_counts(kind, bits):
    """Counts to start with, of each context and of all contexts together: half an outcome either way per decision."""
    contexts = 4096 if kind == HULL else 64
    counts = np.full((contexts, min(1 << bits, SHARED_FROM), 2), STEP // 2)
    return counts, np.full((1 << bits, 2), STEP // 2)


@compiled()
def encode(numbers, bits, kind, out):
    """Code numbers [P, H, W], uint8, in 0..2^bits − 1, into out; kind: PLANES or HULL. → bytes written to out."""
    state = np.array([0, 0xFFFFFFFF, 0, 1, 0], np.uint64)
    counts, shared = fresh_counts(kind, bits)
    for p in range(numbers.shape[0]):
        for y in range(numbers.shape[1]):
            for x in range(numbers.shape[2]):
                context = context_of(kind, numbers, p, y, x, bits)
                write_number(np.int64(numbers[p, y, x]), bits, counts[context], shared, state, out)
    for _ in range(5):  # the four bytes of LOW, and the one that is kept back
        shift(state, out)
    return state[PLACE]


@compiled()
def decode(data, bits, kind, numbers):
    """Fill numbers [P, H, W] with what `encode` was given. data: at least 5 bytes. → bytes read: more than len(data)
    where the data end too soon; decoding stops then."""
    state = np.array([0, 0xFFFFFFFF, 0, 0, 5], np.uint64)
    for place in range(5):
        state[LOW] = ((state[LOW] << u64(8)) | u64(data[place])) & ALL
    counts, shared = fresh_counts(kind, bits)
    for p in range(numbers.shape[0]):
        for y in range(numbers.shape[1]):
            for x in range(numbers.shape[2]):
                context = context_of(kind, numbers, p, y, x, bits)
                numbers[p, y, x] = read_number(bits, counts[context], shared, state, data)
            if state[PLACE] > len(data):
                return state[PLACE]
    return state[PLACE]
