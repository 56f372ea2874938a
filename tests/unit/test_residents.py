"""Sets that share one stack at fixed addresses give the same deltas as sets that are alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sipo.decoding.request import Entry
from sipo.decoding.vllm.residents import Delta, FixedResidents, Residents, ResidentSet
from sipo.errors import IncompatiblePolicy, Unavailable

CPU = torch.device("cpu")
INPUTS = 6
SHAPES = {"qkv_proj": (INPUTS, 9, 3), "o_proj": (INPUTS, 4, 1)}
COLUMNS = 7
ROWS = 8


def resident(*ranks: int, layers: tuple[str, ...] = tuple(SHAPES), has_reference: bool = False) -> ResidentSet:
    total = sum(ranks)
    deltas = {}
    for name in layers:
        inputs, outputs, parts = SHAPES[name]
        blocks = [torch.randn(total, outputs // parts) for _ in range(parts)]
        deltas[name] = Delta(torch.randn(parts * total, inputs), torch.block_diag(*blocks), parts)
    return ResidentSet(ranks, deltas, has_reference)


def fixed() -> FixedResidents:
    return FixedResidents(CPU, torch.float32, SHAPES, columns=COLUMNS, rows=ROWS)


def outputs(residents: Residents, entries: list[Entry], x: Tensor) -> dict[str, Tensor]:
    """By layer: what is added to each row."""
    added = {name: torch.zeros(len(x), shape[1]) for name, shape in SHAPES.items()}
    for chosen, coefficients in residents.place(residents.coefficients(entries)):
        for name, delta in chosen.deltas.items():
            delta.add(added[name], x, coefficients)
    return added


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name])


def test_a_delta_is_each_parts_weighted_sum_of_adapters() -> None:
    torch.manual_seed(0)
    chosen = resident(2, 1)
    residents = Residents(CPU, torch.float32)
    residents.add("x", chosen)
    x = torch.randn(2, INPUTS)

    added = outputs(residents, [Entry(policy_set="x", coefficients=(0.5, -2.0), weight=1), Entry(weight=0)], x)

    delta = chosen.deltas["qkv_proj"]
    for part in range(3):
        a, b = delta.a[3 * part : 3 * part + 3], delta.b[3 * part : 3 * part + 3, 3 * part : 3 * part + 3]
        expected = 0.5 * (x[0] @ a[:2].T @ b[:2]) - 2.0 * (x[0] @ a[2:].T @ b[2:])
        torch.testing.assert_close(added["qkv_proj"][0, 3 * part : 3 * part + 3], expected)
    assert not added["qkv_proj"][1].any()


def test_sets_side_by_side_give_what_each_gives_alone() -> None:
    torch.manual_seed(0)
    alone, together = Residents(CPU, torch.float32), fixed()
    for key, chosen in {"x": resident(2, 1), "y": resident(3, layers=("o_proj",))}.items():
        alone.add(key, chosen)
        together.add(key, chosen)
    entries = [
        Entry(policy_set="x", coefficients=(1.0, 0.0), weight=0.5),
        Entry(policy_set="y", coefficients=(1.5,), weight=0.5),
        Entry(weight=0.0),
        Entry(policy_set="x", coefficients=(0.3, 0.7), weight=1.0),
    ]
    x = torch.randn(len(entries), INPUTS)

    assert_equal(outputs(together, entries, x), outputs(alone, entries, x))


@pytest.mark.parametrize("residents", [Residents(CPU, torch.float32), fixed()], ids=["apart", "side by side"])
def test_every_row_of_a_set_with_a_reference_has_it_and_no_other_row(residents: Residents) -> None:
    """A set without one and with the reference as a third policy says the same with all three coefficients."""
    torch.manual_seed(0)
    on_it, other = resident(1, 1, 2, has_reference=True), resident(3)
    residents.add("on it", on_it)
    residents.add("other", other)
    entries = [
        Entry(policy_set="on it", coefficients=(0.3, 0.7), weight=1.0),
        Entry(policy_set="on it", coefficients=(0.0, 0.0), weight=0.0),
        Entry(policy_set="other", coefficients=(1.0,), weight=1.0),
        Entry(weight=0.0),
    ]
    spelled_out = Residents(CPU, torch.float32)
    spelled_out.add("on it", ResidentSet(on_it.ranks, on_it.deltas))
    spelled_out.add("other", other)
    spelled = [
        Entry(policy_set="on it", coefficients=(0.3, 0.7, 1.0), weight=1.0),
        Entry(policy_set="on it", coefficients=(0.0, 0.0, 1.0), weight=0.0),
        *entries[2:],
    ]
    x = torch.randn(len(entries), INPUTS)

    added = outputs(residents, entries, x)

    assert_equal(added, outputs(spelled_out, spelled, x))
    assert added["o_proj"][1].any() and not added["o_proj"][3].any()
    with pytest.raises(RuntimeError, match="4 coefficients for the 3 adapters of 'on it'"):
        residents.coefficients([Entry(policy_set="on it", coefficients=(0.0, 0.0, 1.0), weight=1.0)])


@pytest.mark.parametrize("residents", [Residents(CPU, torch.float32), fixed()], ids=["apart", "side by side"])
def test_a_reference_needs_no_policies_and_a_set_may_have_neither(residents: Residents) -> None:
    torch.manual_seed(0)
    alone = resident(2, has_reference=True)
    residents.add("alone", alone)
    residents.add("empty", ResidentSet((), {}))
    x = torch.randn(2, INPUTS)

    added = outputs(residents, [Entry(policy_set="alone", weight=1.0), Entry(policy_set="empty", weight=1.0)], x)

    delta = alone.deltas["o_proj"]
    torch.testing.assert_close(added["o_proj"][0], x[0] @ delta.a.T @ delta.b)
    assert not added["o_proj"][1].any()


def test_a_later_set_takes_the_place_of_one_that_left_and_nothing_of_it_stays() -> None:
    torch.manual_seed(0)
    residents = fixed()
    for key, chosen in {"x": resident(2, 1), "y": resident(3)}.items():
        residents.add(key, chosen)
    before = {name: delta.a.data_ptr() for name, delta in residents.coefficients([])[0][0].deltas.items()}
    residents.remove("x")
    later = resident(2, layers=("o_proj",))
    residents.add("z", later)
    alone = Residents(CPU, torch.float32)
    alone.add("z", later)
    entries = [Entry(policy_set="z", coefficients=(1.0,), weight=1.0)]
    x = torch.randn(1, INPUTS)

    assert_equal(outputs(residents, entries, x), outputs(alone, entries, x))
    assert {name: delta.a.data_ptr() for name, delta in residents.coefficients([])[0][0].deltas.items()} == before


def test_a_set_without_room_is_refused_and_the_others_stay() -> None:
    residents = fixed()
    residents.add("x", resident(2, 1))
    residents.add("y", resident(3))

    with pytest.raises(Unavailable, match=r"ranks of 2 together.*SIPO_DECODER_RANKS"):
        residents.add("z", resident(2))
    with pytest.raises(IncompatiblePolicy, match=r"ranks of 8 together.*7 columns.*SIPO_DECODER_RANKS=16"):
        residents.add("z", resident(5, 3))

    assert set(residents.sets) == {"x", "y"}
    residents.add("small", resident(1))


def test_a_row_that_names_a_missing_set_or_too_few_coefficients_stops_the_engine() -> None:
    residents = Residents(CPU, torch.float32)
    residents.add("x", resident(2, 1))

    with pytest.raises(RuntimeError, match="'gone', which is not loaded"):
        residents.coefficients([Entry(policy_set="gone", coefficients=(1.0,), weight=1.0)])
    with pytest.raises(RuntimeError, match="1 coefficients for the 2 adapters of 'x'"):
        residents.coefficients([Entry(policy_set="x", coefficients=(1.0,), weight=1.0)])
