"""What trains a wrapped model: accelerate, DDP, Lightning, moving averages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import tokenprune
from tests.product.client_hosts import IMAGES, hf_vit, keeping_all, logits, vit, wrapped
from tokenprune.errors import UnsupportedHostError
from tokenprune.losses import for_model

LABELS = torch.tensor([1, 3])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def test_accelerate_prepares(accelerator: Accelerator) -> None:
    model, like = wrapped(vit()).train(), wrapped(vit()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, stepping = accelerator.prepare(model, optimizer)
    with model.using(generator=seeded()):
        accelerator.backward(prepared(IMAGES).sum())
    with like.using(generator=seeded()):
        like(IMAGES).sum().backward()
    torch.testing.assert_close(gradients(model), gradients(like), rtol=0, atol=0)
    stepping.step()
    torch.optim.SGD(like.parameters(), lr=0.1).step()
    assert torch.equal(logits(prepared.eval()), logits(like.eval()))
    assert accelerator.unwrap_model(prepared) is model
    assert accelerator.get_state_dict(prepared).keys() == model.state_dict().keys()


def test_accelerate_in_mixed_precision(accelerator: Accelerator) -> None:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, like = wrapped(vit()), wrapped(vit())
    prepared = accelerator.prepare(model)
    found = prepared(IMAGES)
    assert found.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(like(IMAGES).float(), found)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(logits(unwrapped), logits(like))


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # parameters of the root
@pytest.mark.parametrize("make", [vit, hf_vit])
def test_accelerate_dispatches(make: Any, tmp_path: Path) -> None:
    model = wrapped(make())
    wanted = logits(model)
    names = [name for name, _ in model.named_children()]
    names += [name for name, _ in model.named_parameters(recurse=False)]
    places = dict.fromkeys(names, "cpu")
    places["blocks" if "blocks" in places else "vit"] = "disk"
    dispatched = dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(logits(dispatched), wanted)


def test_a_host_that_was_dispatched_is_refused(tmp_path: Path) -> None:
    host = dispatch_model(vit(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(UnsupportedHostError, match=r"Wrap first, then prepare what wrap"):
        wrapped(host)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("make", [vit, hf_vit])
def test_distributed_data_parallel(make: Any) -> None:
    model, like = wrapped(make()).train(), wrapped(make()).train()
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        with model.using(generator=seeded()):
            logits(parallel).square().sum().backward()
        with like.using(generator=seeded()):
            logits(like).square().sum().backward()
        assert len(gradients(model)) == len(list(model.parameters()))
        torch.testing.assert_close(gradients(model), gradients(like), rtol=0, atol=0)
        for one in (model, like):
            torch.optim.SGD(one.parameters(), lr=0.1).step()
            one.zero_grad()
    assert torch.equal(logits(parallel.eval()), logits(like.eval()))


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
def test_lightning_fits(tmp_path: Path) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.loss = model, for_model(model)

        def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
            output, trace = self.model(batch[0], return_trace=True)
            total, _ = self.loss(batch[0], output, batch[1], trace)
            return total

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def fitted(model: Any) -> Any:
        trainer = lightning.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        torch.manual_seed(0)
        trainer.fit(Module(model), DataLoader(TensorDataset(IMAGES, LABELS), batch_size=1))
        return model

    model = wrapped(vit()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fitted(model)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # of a fresh predictor the last layer learns first: gradients of the others are tiny
    assert all("token_predictors" in name and "out_proj.4" not in name for name in still)
    like = wrapped(vit()).train()
    loss, optimizer = for_model(like), torch.optim.SGD(like.parameters(), lr=0.1)
    torch.manual_seed(0)
    for images, labels in DataLoader(TensorDataset(IMAGES, LABELS), batch_size=1):
        optimizer.zero_grad()
        output, trace = like(images, return_trace=True)
        loss(images, output, labels, trace)[0].backward()
        optimizer.step()
    torch.testing.assert_close(logits(model.eval()), logits(like.eval()))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_moving_average(use_buffers: bool) -> None:
    model = wrapped(vit())
    logits(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers)
    average.update_parameters(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, first[name] + 0.025)
    anew = wrapped(vit())
    anew.load_state_dict(average.module.state_dict())
    assert torch.equal(logits(average.eval()), logits(anew))
    assert torch.equal(keeping_all(average.module), logits(tokenprune.unwrap(average.module)))
    assert average.module.token_predictors[0] is not model.token_predictors[0]
