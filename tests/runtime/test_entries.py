"""Methods of hosts whose blocks are known by no module."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune
from tests.analysis.test_reading import IMAGES, WIDTH, Attention, Pairs, feed_forward
from tokenprune.errors import PlanError, TokenPruneWarning, UnsupportedHostError


class Tied(Pairs):
    """The same attention and feed-forward in every block, as attributes of the host."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.attention, self.feed = Attention(), feed_forward()

    def embed_images(self, x: Tensor) -> Tensor:
        return self.tokens(x)

    def features(self, x: Tensor) -> Tensor:
        x = self.embed_images(x)
        for _ in range(3):
            x = x + self.attention(x)
            x = x + self.feed(x)
        return x[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x))
        return y


class Bare(Tied):
    """Blocks call no module: their weights are parameters of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.2 for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        x = self.embed_images(x)
        q, k, v, feed = self.weights
        for _ in range(3):
            given = (F.linear(x, weight) for weight in (q, k, v))
            x = x + F.scaled_dot_product_attention(*given)
            x = x + F.linear(F.gelu(x), feed)
        return x[:, 0]


def test_a_method_around_the_wrapped_models_own_is_refused() -> None:
    model = tokenprune.wrap(Tied().eval(), "token-norm-k0.7", example_inputs=IMAGES, train=False)
    own = model.eval().features
    model.features = lambda x: own(x) * 2
    with pytest.raises(UnsupportedHostError, match=r"calls features of the wrapped Tied.*unwrap"):
        model(IMAGES)
    host = tokenprune.unwrap(model)
    del host.features
    plain, of_host = model(IMAGES), host.features
    host.features = lambda x: of_host(x) * 2
    torch.testing.assert_close(model(IMAGES) - host.head.bias, 2 * (plain - host.head.bias))


def test_a_method_that_runs_no_block_is_the_hosts_own() -> None:
    for make in (Tied, Bare):
        host = make().eval()
        model = tokenprune.wrap(host, "token-norm-k0.7", example_inputs=IMAGES, train=False).eval()
        assert model._pruning.spec.blocks == ("", "", "")
        assert torch.equal(model.embed_images(IMAGES), host.embed_images(IMAGES))
        pruned = model.features(IMAGES)
        assert torch.equal(host.head(pruned), model(IMAGES))
        assert not torch.allclose(pruned, host.features(IMAGES))


def test_a_method_that_is_added_later_says_that_it_ran_dense_and_then_prunes() -> None:
    class Own(Tied):
        pass

    def again(self: Tied, x: Tensor) -> Tensor:
        x = self.embed_images(x)
        for _ in range(3):
            x = x + self.attention(x)
            x = x + self.feed(x)
        return x[:, 0]

    host = Own().eval()
    model: Any = tokenprune.wrap(host, "token-norm-k0.7", example_inputs=IMAGES, train=False).eval()
    Own.again = again  # type: ignore[attr-defined]
    with pytest.warns(TokenPruneWarning, match=r"added method again: Own got again\(\) after wrap"):
        assert torch.equal(model.again(IMAGES), host.features(IMAGES))
    assert torch.equal(model.again(IMAGES), model.features(IMAGES))
    assert not torch.allclose(model.again(IMAGES), host.features(IMAGES))


@torch.no_grad()
def test_a_method_runs_where_the_blocks_of_stages_are_cut_away() -> None:
    host, images = timm.create_model("test_vit", img_size=128).eval(), torch.randn(1, 3, 128, 128)
    first = host.forward_intermediates(images, indices=[0], intermediates_only=True)
    model = tokenprune.wrap(host, example_inputs=images, train=False)
    model.prune_intermediate_layers([0])
    left = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert all(map(torch.equal, left, first))
    with pytest.raises(PlanError, match="the host has 1 blocks"):
        model(images)
