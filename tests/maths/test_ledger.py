"""Books that close, and books that do not: sums in exact rational arithmetic are the judge."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.ledger import balance_error, close_books

Array = NDArray[np.float64]
LINES = ("momentum", "decay", "unexplained", "measured")


def make_parts(
    pairs: int = 5, later: int = 3, functionals: int = 4, *, seed: int = 0, spread: float = 0.0
) -> tuple[Array, Array, Array, Array, Array]:
    """measured, share, later_share, momentum, decay; sizes over ``spread`` orders of magnitude."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return np.asarray(rng.normal(size=shape) * 10.0 ** rng.uniform(-spread, spread, size=shape))

    return draw(functionals), draw(pairs, functionals), draw(later, functionals), draw(functionals), draw(functionals)


def close(parts: tuple[Array, Array, Array, Array, Array]) -> dict[str, Array]:
    measured, share, later, momentum, decay = parts
    return close_books(measured, share, later, momentum=momentum, decay=decay)


def test_by_hand() -> None:
    share, later = np.array([[1.0, 2.0], [0.5, -4.0]]), np.array([[0.25, 0.0]])
    lines = close_books([3.0, -1.0], share, later, momentum=[0.125, 1.0], decay=[-0.125, 0.5])
    assert tuple(lines) == LINES
    np.testing.assert_array_equal(lines["unexplained"], [1.25, -0.5])
    np.testing.assert_array_equal(lines["measured"], [3.0, -1.0])
    np.testing.assert_array_equal(lines["momentum"], [0.125, 1.0])
    np.testing.assert_array_equal(lines["decay"], [-0.125, 0.5])
    assert all(line.dtype == np.float64 for line in lines.values())
    assert balance_error(lines, share, later) == 0.0


@pytest.mark.parametrize("spread", [0.0, 6.0, 15.0])
@pytest.mark.parametrize(("pairs", "later"), [(0, 0), (1, 0), (0, 4), (64, 300)])
def test_unexplained_is_the_exact_remainder_rounded_once(pairs: int, later: int, spread: float) -> None:
    parts = make_parts(pairs, later, spread=spread)
    lines = close(parts)
    for k in range(4):
        others = [*parts[1][:, k], *parts[2][:, k], parts[3][k], parts[4][k]]
        exact = Fraction(parts[0][k]) - sum((Fraction(each) for each in others), Fraction(0))
        assert lines["unexplained"][k] == float(exact)
    assert balance_error(lines, parts[1], parts[2]) < 1e-15


def test_terms_that_cancel_leave_the_small_one() -> None:
    share = np.array([[1e16], [-1e16], [1.0]])
    lines = close_books([1.5], share, np.zeros((0, 1)), momentum=[0.0], decay=[0.0])
    np.testing.assert_array_equal(lines["unexplained"], [0.5])


def test_order_and_merging_of_pairs_do_not_matter() -> None:
    measured, share, later, momentum, decay = make_parts(8, 3)
    order = np.random.default_rng(1).permutation(8)
    lines = close_books(measured, share, later, momentum=momentum, decay=decay)
    for own, older in (
        (share[order], later),
        (np.vstack([share, later]), later[:0]),
        (share[:0], np.vstack([share, later])),
    ):
        again = close_books(measured, own, older, momentum=momentum, decay=decay)
        np.testing.assert_array_equal(again["unexplained"], lines["unexplained"])


@pytest.mark.parametrize("place", ["share", "later", *LINES])
def test_a_changed_number_shows_relative_to_the_size_of_the_terms(place: str) -> None:
    parts = make_parts()
    lines, share, later = close(parts), parts[1].copy(), parts[2].copy()
    changed = {"share": share[2:3], "later": later[1:2], **{name: line[None] for name, line in lines.items()}}[place]
    changed[0, 3] += 1e-6
    size = np.abs(np.vstack([share, later, *lines.values()]))[:, 3].sum()
    assert balance_error(lines, share, later) == pytest.approx(1e-6 / size, rel=1e-6)


def test_the_worst_functional_counts_and_units_do_not() -> None:
    parts = make_parts()
    lines = close(parts)
    lines["decay"] = lines["decay"] + [0.0, 1e-3, 1e-5, 0.0]
    alone = [
        balance_error(
            {name: line[k : k + 1] for name, line in lines.items()}, parts[1][:, k : k + 1], parts[2][:, k : k + 1]
        )
        for k in range(4)
    ]
    error = balance_error(lines, parts[1], parts[2])
    assert error == max(alone) == alone[1] > alone[2] > 1e-7
    units = 2.0 ** np.array([-40, 30, -20, 10])
    scaled = {name: line * units for name, line in lines.items()}
    assert balance_error(scaled, parts[1] * units, parts[2] * units) == error


def test_nothing_moved_is_no_error() -> None:
    zero, none = np.zeros(3), np.zeros((0, 3))
    lines = close_books(zero, none, none, momentum=zero, decay=zero)
    assert balance_error(lines, none, none) == 0.0
    assert balance_error({name: line[:0] for name, line in lines.items()}, none[:, :0], none[:, :0]) == 0.0


def test_a_run_adds_up_to_its_change() -> None:
    # States along a path; each window's ledger is closed on its own, and their totals telescope.
    rng = np.random.default_rng(3)
    path = rng.normal(size=(21, 4)).cumsum(axis=0)
    total = np.zeros(4)
    for before, after in pairwise(path):
        _, share, later, momentum, decay = make_parts(seed=int(rng.integers(1000)))
        lines = close_books(after - before, share, later, momentum=momentum, decay=decay)
        total += share.sum(axis=0) + later.sum(axis=0) + lines["momentum"] + lines["decay"] + lines["unexplained"]
    np.testing.assert_allclose(total, path[-1] - path[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(("place", "name"), list(enumerate(["measured", "share", "later_share", "momentum", "decay"])))
def test_a_number_that_is_not_finite_is_never_booked(place: int, name: str, bad: float) -> None:
    parts = make_parts()
    parts[place][..., 1] = bad
    with pytest.raises(ValueError, match=f"^{name} holds .* NaN or infinite"):
        close(parts)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_ledger_with_such_a_number_does_not_close(bad: float) -> None:
    parts = make_parts()
    lines = close(parts)
    lines["unexplained"][2] = lines["measured"][2] = bad
    assert balance_error(lines, parts[1], parts[2]) == math.inf


def test_shapes_that_do_not_match_are_refused() -> None:
    parts = make_parts()
    lines = close(parts)
    with pytest.raises(ValueError, match=r"different lengths: .*'share': 3"):
        close((parts[0], parts[1][:, :3], *parts[2:]))
    with pytest.raises(ValueError, match=r"different lengths: .*'later_share': 3"):
        balance_error(lines, parts[1], parts[2][:, :3])
    with pytest.raises(ValueError, match=r"share has shape \(4,\); it needs \[pair, functional\]"):
        balance_error(lines, parts[1][0], parts[2])
    with pytest.raises(ValueError, match=r"measured has shape \(1, 4\); it needs \[functional\]"):
        close((parts[0][None], *parts[1:]))


@pytest.mark.parametrize("name", LINES)
def test_a_missing_line_is_named(name: str) -> None:
    parts = make_parts()
    lines = close(parts)
    del lines[name]
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        balance_error(lines, parts[1], parts[2])
