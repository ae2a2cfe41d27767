#!/usr/bin/env python3
"""What the fixed order of dQ's terms costs: a model of the attention backward's blocks on a GPU's multiprocessors.

Blocks start in the order of tickets, as multiprocessors fall free. A step takes `STEP` microseconds, give or take
`JITTER`; its term of dQ then waits for its turn, leaves shared memory in `DRAIN`, and is visible to the next block after
`VISIBLE`. A block's next term waits until the one before has left. Printed is the time until the last block is done,
over that of the same blocks when terms are added in any order (f32 atomics). Times are guesses for an H100; ratios hold
for a wide range of them, which is what the model is for.

    tools/attention_turns.py [MULTIPROCESSORS]      an H100 SXM's or H200's 132 otherwise
"""

import heapq
import random
import sys

BLOCK_N = 128
STEP, JITTER, DRAIN, VISIBLE, START = 3.5, 0.2, 0.3, 1.5, 3.0
KV_HEADS = 8
MULTIPROCESSORS = int(sys.argv[1]) if len(sys.argv) > 1 else 132


def ceil_div(a, b):
    return -(-a // b)


def key_tiles(prompt, chosen, rejected, tokens, ascending):
    """Of one pair in the order of tickets: per tile of keys, the (tile of queries, turn) that its block walks.

    A tile of queries holds `tokens` tokens, of all heads that share the keys.
    """
    prompt_tiles = ceil_div(prompt, BLOCK_N)
    tiles = [("rejected", n, rejected) for n in reversed(range(ceil_div(rejected, BLOCK_N)))]
    tiles += [("chosen", n, prompt + chosen) for n in reversed(range(ceil_div(prompt + chosen, BLOCK_N)))]
    if ascending:
        tiles.reverse()
    for side, n, rows in tiles:
        walk = []
        for m in range(n * BLOCK_N // tokens, ceil_div(rows, tokens)):
            diagonal = (min((m + 1) * tokens, rows) - 1) // BLOCK_N
            before = prompt_tiles if side == "rejected" else 0
            walk.append(((side, m), before + n if ascending else diagonal - n))
        if side == "chosen" and n < prompt_tiles:
            for m in range(ceil_div(rejected, tokens)):
                own_terms = (min((m + 1) * tokens, rejected) - 1) // BLOCK_N + 1
                walk.append((("rejected", m), n if ascending else own_terms + prompt_tiles - 1 - n))
        yield walk


def makespan(pairs, tokens, order):
    """`order`: "any", "descending" or "ascending"."""
    noise = random.Random(7)
    free = [0.0] * MULTIPROCESSORS
    passed, end = {}, 0.0
    for pair, sizes in sorted(enumerate(pairs), key=lambda item: (-sum(item[1]), item[0])):
        for walk in key_tiles(*sizes, tokens, order == "ascending"):
            for kv_head in range(KV_HEADS):
                now, left = heapq.heappop(free) + START, 0.0
                for tile, turn in walk:
                    now = max(now + STEP * noise.uniform(1 - JITTER, 1 + JITTER), left)
                    key = (pair, kv_head, tile)
                    expected, visible = passed.get(key, (0, 0.0))
                    if order != "any":
                        assert turn == expected, "a block would wait for a later ticket"
                    left = max(now, visible if order != "any" else 0.0) + DRAIN
                    passed[key] = (expected + 1, left + VISIBLE)
                heapq.heappush(free, max(now, left))
                end = max(end, now, left)
    return end


def batch(sizes, tokens):
    """Pairs of about these lengths, up to a number of tokens."""
    noise, pairs = random.Random(1), []
    while sum(map(sum, pairs)) < tokens:
        pairs.append(tuple(max(1, int(noise.gauss(length, 0.3 * length))) for length in sizes))
    return pairs


def main():
    print("| lengths P / C / R | tokens | tokens a step | descending | ascending |\n|---|---|---|---|---|")
    lengths = {"150 / 75 / 75": (150, 75, 75), "190 / 300 / 280": (190, 300, 280), "1800 / 512 / 512": (1800, 512, 512)}
    cases = [(name, tokens, batch(sizes, tokens)) for name, sizes in lengths.items() for tokens in (8192, 32768)]
    cases.append(("8192 / 0 / 0", 8192, [(8192, 0, 0)]))
    for name, tokens, pairs in cases:
        for step_tokens in (16, 42):
            free = makespan(pairs, step_tokens, "any")
            ratios = [makespan(pairs, step_tokens, order) / free for order in ("descending", "ascending")]
            print(f"| {name} | {tokens} | {step_tokens} | {ratios[0]:.3f} | {ratios[1]:.3f} |")


if __name__ == "__main__":
    main()
