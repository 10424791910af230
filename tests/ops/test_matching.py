"""Bipartite matching: who joins whom."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.errors import PlanError
from tokenprune.ops.matching import as_groups, bipartite


def by_hand(keys: Tensor, first: int, count: int) -> tuple[list[int], list[int]]:
    """One round on one image: (places that are left, in order; group of each patch)."""
    length, keys = len(keys), F.normalize(keys, dim=-1)
    even = [p for p in range(length) if (p + first) % 2 == 0]
    odd = [p for p in range(length) if (p + first) % 2 == 1]
    partner = {a: max(odd, key=lambda b: float(keys[a] @ keys[b])) for a in even}
    similar = sorted(even, key=lambda a: -float(keys[a] @ keys[partner[a]]))
    leave = set(similar[:count])
    kept = [a for a in even if a not in leave] + odd
    return kept, [kept.index(partner[p] if p in leave else p) for p in range(length)]


@given(st.integers(0, 2**16), st.integers(2, 11), st.integers(0, 2), st.data())
def test_the_most_similar_pairs_are_joined(
    seed: int, length: int, first: int, data: st.DataObject
) -> None:
    keys = torch.randn(2, length, 5, generator=torch.Generator().manual_seed(seed))
    most = (length + 1 - first % 2) // 2
    count = data.draw(st.integers(0, min(most, length - 1)))
    groups = bipartite(keys, None, first, length - count)
    for image in range(2):
        kept, of = by_hand(keys[image], first, count)
        if count:
            assert groups.kept[image].tolist() == kept
            assert groups.of[image].tolist() == of
        else:
            assert groups.kept[image].tolist() == list(range(length))


@given(st.integers(0, 2**16), st.integers(1, 12), st.data())
def test_any_number_can_be_left(seed: int, length: int, data: st.DataObject) -> None:
    """More rounds where more than half must go."""
    keys = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed))
    left = data.draw(st.integers(1, length))
    groups = bipartite(keys, None, 1, left)
    assert groups.kept.shape == (2, left)
    assert all(len(set(row.tolist())) == left for row in groups.kept)
    for kept, of in zip(groups.kept, groups.of, strict=True):
        assert of[kept].tolist() == list(range(left))  # one that stands for others is among them
        assert set(of.tolist()) == set(range(left))


def test_padding_joins_padding_first() -> None:
    keys = torch.randn(1, 8, 4).repeat(1, 1, 1)
    real = torch.tensor([[True, True, True, True, False, False, False, False]])
    groups = bipartite(keys, real, 0, 6)
    joined = [p for p in range(8) if groups.kept[0, groups.of[0, p]] != p]
    assert joined == [4, 6]
    assert all(int(groups.kept[0, groups.of[0, p]]) in (5, 7) for p in joined)


def test_scores_are_high_for_what_stays() -> None:
    keys = torch.randn(3, 9, 4)
    groups = bipartite(keys, None, 0, 6)
    gone = groups.kept.gather(1, groups.of) != torch.arange(9)
    assert (groups.score[:, 1::2] == torch.inf).all()
    for score, left in zip(groups.score, gone, strict=True):
        assert score[left].max() <= score[~left].min()


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_count_that_cannot_be(count: int) -> None:
    with pytest.raises(PlanError, match="choose a count from 1 to 4"):
        bipartite(torch.randn(1, 4, 2), None, 0, count)


def test_given_groups_are_those_of_the_patches_that_are_there() -> None:
    of = torch.tensor([[0, 0, 2, 2, 0]])
    whole = as_groups(of, None)
    assert whole.kept.tolist() == [[0, 2]]
    assert whole.of.tolist() == [[0, 0, 1, 1, 0]]
    some = as_groups(of, torch.tensor([[4, 2, 0]]))  # 1 had joined 0 or 4, and 3 had joined 2
    assert some.kept.tolist() == [[2, 1]]
    assert some.of.tolist() == [[0, 1, 0]]
