"""The kernels that merge tokens compute what the plain versions do."""

import math

import pytest
import torch

from tokenprune.ops import kernels, matching, merging
from tokenprune.ops.kernels.joining import can_join
from tokenprune.ops.matching import Groups, Pairs, bipartite
from tokenprune.ops.merging import Merged, merge_groups


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matching, merging):
        monkeypatch.setattr(module, "can_join", lambda x: False)


def in_order(groups: Groups | Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves, ascending, and whom it joins."""
    everyone, joined = groups.moves()
    gone = everyone[:, groups.kept.shape[1] :]
    order = gone.argsort(1)
    return gone.gather(1, order), joined.gather(1, order)


@pytest.mark.parametrize(
    ("batch", "patches", "first", "left"),
    [(2, 7, 1, 5), (1, 40, 0, 27), (3, 33, 2, 17), (2, 16, 1, 3), (1, 2, 1, 1), (1, 1, 0, 1)],
)
def test_the_pairs_are_those_of_the_plain_version(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    patches: int,
    first: int,
    left: int,
) -> None:
    torch.manual_seed(0)
    keys = torch.randn(batch, patches, 3, device=device).round()  # many are equal
    keys[0, 0] = math.nan
    for real in (None, torch.rand(batch, patches, device=device) > 0.3):
        found = bipartite(keys, real, first, left)
        with monkeypatch.context() as patched:
            plain(patched)
            expected = bipartite(keys, real, first, left)
        assert torch.equal(found.kept, expected.kept)
        assert torch.equal(found.of, expected.of)
        assert torch.equal(found.score.nan_to_num(7.0), expected.score.nan_to_num(7.0))
        assert all(map(torch.equal, in_order(found), in_order(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_means_are_those_of_the_plain_version(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, prefix: int
) -> None:
    torch.manual_seed(0)
    before: Merged | None = None
    tokens = torch.randn(2, prefix + 21, 10, device=device, dtype=dtype)[..., 1:]
    for left in (15, 4):
        keys = torch.randn(2, tokens.shape[1] - prefix, 4, device=device)
        groups = bipartite(keys, None, prefix, left)
        assert can_join(tokens)
        found, after = merge_groups(tokens, groups, before, prefix)
        with monkeypatch.context() as patched:
            plain(patched)
            expected, other = merge_groups(tokens, groups, before, prefix)
        assert found.dtype == dtype
        close = {"rtol": 0.0, "atol": 1e-6 if dtype == torch.float32 else 2e-2}
        assert torch.allclose(found.float(), expected.float(), **close)
        assert torch.equal(after.numbers, other.numbers)
        assert torch.equal(after.sizes, other.sizes)
        assert torch.equal(after.rows, other.rows)
        tokens, before = found, after
    assert float(after.sizes[:, prefix:].sum()) == 2 * 21


def test_what_needs_a_gradient_runs_plain(device: torch.device) -> None:
    tokens = torch.randn(1, 4, 2, device=device)
    assert can_join(tokens)
    assert not can_join(tokens.double())
    assert not can_join(tokens.requires_grad_())
    with torch.no_grad():
        assert can_join(tokens)


def test_no_kernel_runs_where_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert not can_join(torch.randn(1, 4))
