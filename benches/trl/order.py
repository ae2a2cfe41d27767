"""The order in which `mmpo-fast train` takes the pairs of its first epoch, so that a peer can take them in the same one.

The same as `permutation` in src/data/order.rs: Fisher-Yates over ChaCha20, keyed by seed and epoch.
"""

MASK = 0xFFFFFFFF


def quarter_round(state, a, b, c, d):
    for first, second, third, shift in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        state[first] = (state[first] + state[second]) & MASK
        mixed = state[third] ^ state[first]
        state[third] = ((mixed << shift) | (mixed >> (32 - shift))) & MASK


def block(key, counter):
    """The 16 words of one ChaCha20 block with a nonce of zeros."""
    start = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key, counter & MASK, counter >> 32, 0, 0]
    state = list(start)
    for _ in range(10):
        for column in range(4):
            quarter_round(state, column, 4 + column, 8 + column, 12 + column)
        for column in range(4):
            quarter_round(state, column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
    return [(word + first) & MASK for word, first in zip(state, start)]


def numbers(seed, epoch):
    """64-bit numbers, low word first."""
    key = [seed & MASK, seed >> 32, epoch & MASK, epoch >> 32, 0, 0, 0, 0]
    counter = 0
    while True:
        words = block(key, counter)
        yield from (words[at] | words[at + 1] << 32 for at in range(0, 16, 2))
        counter += 1


def below(stream, bound):
    """A uniform number below `bound`."""
    biased = (1 << 64) % bound
    while True:
        product = next(stream) * bound
        if product & ((1 << 64) - 1) >= biased:
            return product >> 64


def permutation(length, seed, epoch):
    """Indices of the pairs in training order."""
    stream = numbers(seed, epoch)
    order = list(range(length))
    for last in range(length - 1, 0, -1):
        other = below(stream, last + 1)
        order[last], order[other] = order[other], order[last]
    return order


# As `the_permutation_is_pinned` in src/data/order.rs has them.
assert permutation(8, 42, 0) == [2, 5, 1, 7, 0, 6, 4, 3]
assert permutation(8, 42, 1) == [0, 3, 6, 7, 5, 1, 4, 2]
