# SPDX-License-Identifier: MIT
"""Checksums of pages in user space, strong enough to count equal pages by them.

The dry run has no module that would compare bytes, so its checksum must not take different pages
for equal ones. It is the multilinear hash of Lemire and Kaser, "Strongly Universal String Hashing
is Fast" (The Computer Journal, 2014), twice with independent random weights. A page is 1024 pieces
p of 32 bits; one lane is

    sum over i of w[i] * p[i]    modulo 2**64,    all w[i] uniform over 64 bits.

Two different pages differ in some piece by a d with 0 < |d| < 2**32, so d = 2**k * odd, k <= 31.
Whatever the other pieces are, w * d = c modulo 2**64 has at most 2**k solutions w: a lane is equal
for both pages with a probability of at most 2**(31 - 64) = 2**-33, and both lanes with 2**-66,
**for any two pages**; where some piece differs by an odd number, which is the rule, with 2**-128.
Among 2**24 different pages (64 GiB) there are 2**47 pairs, so the expected number of pairs that
are taken for equal is at most 2**-19, and about 2**-81 for ordinary content. Pieces of 64 bits
would need half the work, but two arrays of numbers that differ in two signs would then collide
every fourth time.

Splitting into pieces costs no conversion: with x[i] the page's 64-bit words and h[i] = x[i] >> 32,

    sum of a[i] * x[i] + b[i] * h[i]  =  sum of a[i] * low[i] + (b[i] + 2**32 * a[i]) * h[i],

and for uniform independent a, b the two weights on the right are uniform and independent too.

The hash is linear: a page of zeros has checksum 0, and every other page has not, with the same
probabilities.
"""

import os

import numpy as np
from numpy.typing import NDArray

PAGE_BYTES = 4096
WORDS_PER_PAGE = PAGE_BYTES // 8

Words = NDArray[np.uint64]


class Checksum:
    """One draw of weights. Checksums of two instances have nothing to do with each other."""

    def __init__(self) -> None:
        """Draw the weights from the system's random source."""
        raw = os.urandom(4 * WORDS_PER_PAGE * 8)
        self._weights = np.frombuffer(raw, dtype=np.uint64).reshape(4, WORDS_PER_PAGE)
        self._high_halves = np.empty((0, WORDS_PER_PAGE), dtype=np.uint64)

    def of(self, pages: Words) -> tuple[Words, Words]:
        """Return both lanes for `pages`, an array of shape (n, 512), as two arrays of shape (n,).

        Takes about 1.2 µs a page, best for batches that fit into a processor's cache.
        """
        if len(self._high_halves) < len(pages):
            self._high_halves = np.empty_like(pages)
        high_halves = self._high_halves[: len(pages)]
        np.right_shift(pages, np.uint64(32), out=high_halves)
        return self._lane(pages, high_halves, 0), self._lane(pages, high_halves, 2)

    def _lane(self, pages: Words, high_halves: Words, first: int) -> Words:
        # einsum, because numpy has no fast matrix product for integers: it takes half the time.
        lane: Words = np.einsum("ij,j->i", pages, self._weights[first])
        lane += np.einsum("ij,j->i", high_halves, self._weights[first + 1])
        return lane
