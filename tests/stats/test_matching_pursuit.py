from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from sae_lens_dfc.stats.matching_pursuit import explained_by_few


def test_a_sum_of_a_few_orthogonal_directions_is_explained_whole() -> None:
    atoms = torch.linalg.qr(torch.randn(12, 12)).Q
    direction = atoms[[1, 4, 7]].sum(dim=0, keepdim=True)
    assert explained_by_few(direction, atoms, n_parts=3).item() == pytest.approx(1.0)
    assert explained_by_few(direction, atoms, n_parts=2).item() == pytest.approx(2 / 3)


def test_one_direction_at_a_time_it_is_never_above_the_best_choice_and_one_alone_is_it() -> None:
    torch.manual_seed(0)
    directions, atoms = torch.randn(6, 5), torch.randn(8, 5)
    cosines = normalize(directions) @ normalize(atoms).T
    torch.testing.assert_close(
        explained_by_few(directions, atoms, n_parts=1), cosines.pow(2).max(dim=1).values
    )
    greedy = explained_by_few(directions, atoms, n_parts=2)
    for i, direction in enumerate(directions):
        best = 0.0
        for pair in combinations(range(8), 2):
            basis = atoms[list(pair)].T
            fit = basis @ torch.linalg.lstsq(basis, direction[:, None]).solution
            best = max(best, (fit.norm() / direction.norm()).item() ** 2)
        assert cosines[i].pow(2).max() - 1e-5 <= greedy[i] <= best + 1e-5


def test_a_direction_that_must_not_use_itself_does_not() -> None:
    atoms = torch.eye(4)
    own = torch.arange(4)
    assert explained_by_few(atoms, atoms, own).abs().max() < 1e-6


def test_a_zero_direction_is_unknown() -> None:
    assert explained_by_few(torch.zeros(1, 3), torch.eye(3)).isnan().all()


def test_chunks_do_not_matter() -> None:
    torch.manual_seed(0)
    directions, atoms = torch.randn(1100, 4), torch.randn(5, 4)
    some = torch.tensor([0, 600, 1099])
    torch.testing.assert_close(
        explained_by_few(directions, atoms)[some], explained_by_few(directions[some], atoms)
    )
