# SPDX-License-Identifier: MIT
"""The shop's data: computed from numbers alone, so that anybody can say what is right.

The application holds them in memory; customers and inspectors, in processes of their own,
compute what they expect afresh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

PRODUCTS = 60_000
CATEGORIES = 40
LIST_PRODUCTS = 20
PAGE_BYTES = 4096

_MATERIALS = ("oak", "steel", "wool", "glass", "linen", "cork", "brass", "slate")
_THINGS = ("lamp", "chair", "kettle", "blanket", "mirror", "shelf", "clock", "vase", "stool")

Product = dict[str, object]


def product(number: int) -> Product:
    """One of PRODUCTS: a dict as a database driver would hand it out, about 800 bytes of heap."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    material = _MATERIALS[mixed >> 61]
    thing = _THINGS[(mixed >> 40) % len(_THINGS)]
    return {
        "number": number,
        "sku": f"{material[:2]}{thing[:2]}-{mixed:016x}".upper(),
        "name": f"{material} {thing} no. {number}",
        "text": f"A {thing} made of {material}. Lot {mixed >> 20:x}, shelf {mixed % 9973}.",
        "category": mixed % CATEGORIES,
        "price_cents": 500 + mixed % 99_500,
        "stock": 300 + (mixed >> 16) % 5_000,
        "tags": [f"{material}-{mixed % 53}", f"{thing}-{mixed % 59}"],
    }


def product_answer(item: Product) -> bytes:
    """The body of /product/N."""
    return json.dumps(item).encode()


def list_answer(items: Iterable[Product]) -> bytes:
    """The body of /list/N: a page of products, and a digest over all that is known of them."""
    items = list(items)
    return json.dumps({"names": [item["name"] for item in items], "digest": digest(items)}).encode()


def report_answer(items: Sequence[Product]) -> bytes:
    """The body of /report: what the stock is worth, and a digest over every field of it all."""
    worth_cents = 0
    for item in items:
        price, stock = item["price_cents"], item["stock"]
        assert isinstance(price, int)
        assert isinstance(stock, int)
        worth_cents += price * stock
    return json.dumps({"worth_cents": worth_cents, "digest": digest(items)}).encode()


def digest(items: Iterable[Product]) -> str:
    """SHA-256 over every field of the products."""
    state = hashlib.sha256()
    for item in items:
        state.update(repr(item).encode())
    return state.hexdigest()


def page(name: str, number: int) -> bytes:
    """One page of noise that nobody else has, and that everybody can compute."""
    return hashlib.shake_128(f"{name} {number}".encode()).digest(PAGE_BYTES)
