"""Lists of labels: handed on to the module that reads them, which runs for real."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.tracing.test_functions import RECIPE, Block
from tokenprune.errors import ExportError, TraceError, UnsupportedHostError

Labels = list[dict[str, Tensor]]


class Matcher(nn.Module):
    """The query nearest to each label, by NumPy."""

    @torch.no_grad()
    def forward(self, values: Tensor, labels: Labels) -> list[Tensor]:
        pairs = zip(values, labels, strict=True)
        apart = [(v[:, None] - each["values"]).abs().cpu().numpy() for v, each in pairs]
        return [torch.as_tensor(a.argmin(0)) for a in apart]


class Criterion(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.matcher, self.scale = Matcher(), scale
        self.weight = nn.Buffer(torch.ones(1))

    def forward(self, outputs: dict[str, Tensor], labels: Labels) -> dict[str, Any]:
        found = self.matcher(outputs["values"], labels)
        count = max(sum(len(each["values"]) for each in labels), 1)
        near = [v[i] for v, i in zip(outputs["values"], found, strict=True)]
        apart = torch.cat(near) - torch.cat([each["values"] for each in labels])
        self.extra = {"count": count}
        return {"near": (self.weight * apart.abs()).sum() / count, "all": outputs["values"].mean()}


class Detector(nn.Module):
    """Makes its criterion in each call, as DETR does, or holds it, as Mask2Former does."""

    def __init__(self, held: bool = False, reads: str = "values") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.scale, self.reads = nn.Linear(8, 4), 2.0, reads
        self.criterion = Criterion(1.0) if held else None

    def forward(self, x: Tensor, labels: Labels | None = None) -> dict[str, Any]:
        for block in self.blocks:
            x = block(x)
        values = self.head(x.mean(1))
        if labels is None:
            return {"values": values}
        if self.reads == "labels":
            x = x + labels[0]["values"].sum().item()
        criterion = self.criterion or Criterion(self.scale)
        given = values if self.reads == "values" else x[..., 0]
        parts = criterion({"values": given}, labels)
        loss = self.scale * parts["near"] + sum(part for part in parts.values())
        return {"loss": loss, "values": values, "parts": parts}


SPEC = tokenprune.ArchSpec(
    adapter="test", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=0
)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch))


def labels(*counts: int) -> Labels:
    generator = torch.Generator().manual_seed(sum(counts))
    return [{"values": torch.rand(count, generator=generator)} for count in counts]


def wrapped(example: dict[str, Any] | None = None, **kind: Any) -> tuple[Detector, Any]:
    torch.manual_seed(0)
    host = Detector(**kind).eval()
    dense = copy.deepcopy(host)
    example = example or {"x": images()}
    return dense, tokenprune.wrap(host, RECIPE, example_inputs=example, adapter=SPEC)


@pytest.mark.parametrize("held", [False, True])
def test_the_loss_is_the_hosts_for_any_number_of_labels(held: bool) -> None:
    dense, model = wrapped(held=held)
    model.set_keep_ratio(1.0)
    for counts in ((1, 2), (3, 1), (0, 2), (0, 0), (2, 2, 5)):
        given = images(len(counts)), labels(*counts)
        expected, (output, _) = dense(*given), model(*given, return_trace=True)
        assert torch.equal(output["loss"], expected["loss"])
        assert output["parts"].keys() == expected["parts"].keys()
        model.zero_grad()
        dense.zero_grad()
        output["loss"].backward()
        expected["loss"].backward()
        assert torch.equal(model.head.weight.grad, dense.head.weight.grad)
    made = model._pruning.cache.info().traced
    model(images(), labels=labels(4, 4))
    assert model._pruning.cache.info().traced == made == 3  # eval, training, eval with labels


def test_what_makes_the_loss_is_watched() -> None:
    dense, model = wrapped()
    model.set_keep_ratio(1.0)
    for scale in (2.0, 3.0):
        model.scale = dense.scale = scale
        output, _ = model(images(), labels(1, 2), return_trace=True)
        assert torch.equal(output["loss"], dense(images(), labels(1, 2))["loss"])


def test_it_is_wrapped_with_labels_proven_trained_and_counted() -> None:
    _, model = wrapped({"x": images(), "labels": labels(1, 3)})
    assert tokenprune.verify(model, gradients=True).mask_vs_gather < 1e-4
    assert tokenprune.verify(model, {"x": images(1), "labels": labels(4)}).mask_vs_gather < 1e-4
    assert tokenprune.profile(model).macs > 0
    with pytest.raises(ExportError, match="hands labels on as a list"):
        tokenprune.export(model, "model.pt2")
    model.train()
    model(images(), labels(2, 0))["loss"].backward()
    assert model.blocks[0].qkv.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.token_predictors.parameters())


def test_compiled_it_is_the_same() -> None:
    _, model = wrapped()
    compiled = torch.compile(model, backend="eager")
    for counts in ((1, 2), (3, 3)):
        found = compiled(images(), labels=labels(*counts))["loss"]
        assert torch.equal(found, model(images(), labels(*counts))["loss"])
    model.train()
    compiled(images(), labels(1, 2))["loss"].backward()


def test_what_else_reads_them_or_tokens_is_refused_by_name() -> None:
    _, model = wrapped(reads="labels")
    with pytest.raises(TraceError, match="leave the labels out and compute it"):
        model(images(), labels(1, 2))
    assert model(images())["values"].shape == (2, 4)  # the remedy
    _, model = wrapped(reads="tokens")
    with pytest.raises(UnsupportedHostError, match=r"leave out what it is for \(labels"):
        model(images(), labels(1, 2))
