"""The policy sets in the engine's memory, and what a batch needs of them: for each row one coefficient per column of the stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from sipo.decoding.request import Entry
from sipo.errors import IncompatiblePolicy, Unavailable


@dataclass(frozen=True)
class Delta:
    """All adapters of one set on one linear layer (vLLM's fused one).

    `a` [parts · R, in] and `b` [parts · R, out], where a fused layer's parts (q, k and v) are blocks of `b`'s diagonal.
    """

    a: Tensor
    b: Tensor
    parts: int

    def add(self, output: Tensor, x: Tensor, coefficients: Tensor) -> None:
        """output [rows, out] += (x [rows, in] · a^T * coefficients [rows or more, R], the same for each part) · b."""
        inner = linear(x, self.a)
        inner.view(len(x), self.parts, -1).mul_(coefficients[: len(x)].unsqueeze(1))
        output.addmm_(inner, self.b)


@dataclass(frozen=True)
class ResidentSet:
    """A loaded policy set: `ranks` per adapter (sum R) and its deltas by the fused layer's name. The last adapter may be its
    reference's, which every row of the set has."""

    ranks: tuple[int, ...]
    deltas: Mapping[str, Delta]
    has_reference: bool = False

    def row(self, coefficients: Sequence[float]) -> tuple[float, ...]:
        """One coefficient per adapter, from those of the policies."""
        return (*coefficients, 1.0) if self.has_reference else tuple(coefficients)


class Residents:
    """Each set in tensors of its own: only those that a batch uses are computed."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.sets: dict[str, ResidentSet] = {}

    def add(self, key: str, resident: ResidentSet) -> None:
        self.sets[key] = resident

    def remove(self, key: str) -> None:
        del self.sets[key]

    def coefficients(self, entries: Sequence[Entry]) -> list[tuple[ResidentSet, Tensor]]:
        """The sets that the rows use, with every row's coefficients [entries, R]: 0 in rows that use another set, or none."""
        return [(self.sets[key], table) for key, table in self._tables(entries).items()]

    def place(self, coefficients: list[tuple[ResidentSet, Tensor]]) -> list[tuple[ResidentSet, Tensor]]:
        """`coefficients` where the layers read them."""
        return coefficients

    def _tables(self, entries: Sequence[Entry]) -> dict[str, Tensor]:
        return {key: self._table(key, entries) for key in {entry.policy_set for entry in entries} - {""}}

    def _table(self, key: str, entries: Sequence[Entry]) -> Tensor:
        if key not in self.sets:
            raise RuntimeError(f"a request names the policy set {key!r}, which is not loaded")
        chosen = self.sets[key]
        adapters = len(chosen.ranks)
        rows = [chosen.row(entry.coefficients) if entry.policy_set == key else (0.0,) * adapters for entry in entries]
        if wrong := next((row for row in rows if len(row) != adapters), None):
            raise RuntimeError(f"{len(wrong)} coefficients for the {adapters} adapters of {key!r}")
        ranks = torch.tensor(chosen.ranks, dtype=torch.int)  # of no adapter, too
        return torch.tensor(rows).repeat_interleave(ranks, dim=1).to(self.device, self.dtype)


class FixedResidents(Residents):
    """All sets side by side in one stack that never moves, as compiled and captured graphs need it: each set has columns of it.

    Whatever a batch uses, the whole stack is computed, so its `columns` are a price that every step pays.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shapes: Mapping[str, tuple[int, int, int]], columns: int, rows: int
    ) -> None:
        """`shapes` (in, out, parts) by the fused layer's name; `rows` the most that a forward pass has."""
        super().__init__(device, dtype)
        self._columns: dict[str, slice] = {}
        self._whole = ResidentSet(
            (1,) * columns,
            {
                name: Delta(self._zeros(parts * columns, inputs), self._zeros(parts * columns, outputs), parts)
                for name, (inputs, outputs, parts) in shapes.items()
            },
        )
        self._placed = self._zeros(rows, columns)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def add(self, key: str, resident: ResidentSet) -> None:
        """Raises IncompatiblePolicy for a set that is wider than all columns, Unavailable where others leave no room for it."""
        columns = self._room(sum(resident.ranks))
        for name, whole in self._whole.deltas.items():
            for target, source in ((whole.a, "a"), (whole.b, "b")):
                part = target.view(whole.parts, len(self._whole.ranks), -1)[:, columns]
                if delta := resident.deltas.get(name):
                    part.copy_(getattr(delta, source).view(part.shape))
                else:
                    part.zero_()
        self._columns[key] = columns
        super().add(key, replace(resident, deltas={}))

    def remove(self, key: str) -> None:
        super().remove(key)
        del self._columns[key]

    def coefficients(self, entries: Sequence[Entry]) -> list[tuple[ResidentSet, Tensor]]:
        table = self._zeros(len(entries), len(self._whole.ranks))
        for key, columns in self._tables(entries).items():
            table[:, self._columns[key]] = columns
        return [(self._whole, table)]

    def place(self, coefficients: list[tuple[ResidentSet, Tensor]]) -> list[tuple[ResidentSet, Tensor]]:
        for _, table in coefficients:
            self._placed[: len(table)] = table
        return [(self._whole, self._placed)]

    def _room(self, wanted: int) -> slice:
        """The first gap that is wide enough."""
        columns = len(self._whole.ranks)
        if wanted > columns:
            raise IncompatiblePolicy(
                f"the set's adapters have ranks of {wanted} together, this decoder has {columns} columns for all sets in memory: "
                f"start it with SIPO_DECODER_RANKS={2 * wanted} or more"
            )
        start = 0
        for taken in sorted(self._columns.values(), key=lambda columns: columns.start):
            if taken.start - start >= wanted:
                break
            start = taken.stop
        if start + wanted > columns:
            raise Unavailable(
                f"the set's adapters have ranks of {wanted} together, and sets in use leave not as many of the {columns} columns "
                "free side by side: try again soon, or start the decoder with more SIPO_DECODER_RANKS"
            )
        return slice(start, start + wanted)
