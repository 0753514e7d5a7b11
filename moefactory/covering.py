"""Few rows that still hold every pair, or triple, of settings: a greedy covering array. Standard library only.

Background: D. R. Kuhn, R. N. Kacker and Y. Lei, "Practical Combinatorial Testing", NIST SP 800-142 (2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, product
from typing import Any

Overrides = tuple[str, ...]
Axes = Mapping[str, tuple[Overrides, ...]]  # each axis's settings; the first is one that no rule minds


def covering_array(axes: Axes, strength: int, legal: Callable[[Overrides], bool]) -> list[Overrides]:
    """Few rows that together hold every feasible combination of `strength` settings: greedy, and always the same.

    A combination is feasible if it is legal with the first setting of every other axis. Each row starts from the first
    combination still missing and takes, axis by axis, the legal setting that brings most missing ones. Rows that later
    ones made superfluous are dropped, so that every row left is needed.
    """
    names, first = list(axes), dict.fromkeys(axes, 0)

    def overrides(row: Mapping[str, int]) -> Overrides:
        return sum((axes[name][index] for name, index in row.items()), ())

    def held(row: Mapping[str, int], name: str | None = None) -> Iterator[tuple[tuple[str, int], ...]]:
        """The combinations in a row, or those with `name` in them."""
        others = [item for item in row.items() if item[0] != name]
        for chosen in combinations(others, strength - (name is not None)):
            yield tuple(sorted(chosen if name is None else (*chosen, (name, row[name]))))

    every = (
        tuple(sorted(zip(chosen, indices, strict=True)))
        for chosen in combinations(names, strength)
        for indices in product(*(range(len(axes[name])) for name in chosen))
    )
    missing = dict.fromkeys(c for c in every if legal(overrides({**first, **dict(c)})))
    table: list[dict[str, int]] = []
    while missing:
        row = dict(next(iter(missing)))
        for name in (n for n in names if n not in row):
            legal_rows = [r for i in range(len(axes[name])) if legal(overrides({**first, **(r := {**row, name: i})}))]
            row = max(legal_rows, key=lambda r: sum(c in missing for c in held(r, name)))
        table.append(row)
        for combination in held(row):
            missing.pop(combination, None)
    return [overrides(row) for row in _needed(table, held)]


def _needed(table: list[dict[str, int]], held: Callable[[dict[str, int]], Iterable[Any]]) -> list[dict[str, int]]:
    """The rows without those whose every combination is also in another row that stays."""
    count: dict[Any, int] = {}
    for row in table:
        for combination in held(row):
            count[combination] = count.get(combination, 0) + 1
    kept = []
    for row in table:
        if all(count[combination] > 1 for combination in held(row)):
            for combination in held(row):
                count[combination] -= 1
        else:
            kept.append(row)
    return kept
