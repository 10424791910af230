"""Speed on a GPU: dense, wrapped, and the host's blocks on as many tokens. Writes docs/gpu.md.

    python -m benchmarks.gpu                       all of it
    python -m benchmarks.gpu --only DeiT-S --how eager --batch 1 256
    python -m benchmarks.gpu --render-only         write the page only

Rows are saved in docs/gpu.json one by one; a new measurement replaces the old row, and one on
another machine replaces all. Runs on a CPU too, so that it can be tried there.
"""

import argparse
import copy
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import tokenprune
from benchmarks.markdown import table
from benchmarks.speed_parts.hosts import HOSTS, SpeedHost
from tokenprune.cost.timing import interleaved
from tokenprune.errors import TokenPruneError

__all__ = ["GpuRow", "main", "replay"]

ROOT = Path(__file__).parents[1]
HOWS = ("eager", "graph", "compile", "train", "jagged")
HEAD = """# Speed on a GPU

{machine}. Eval in bfloat16, training steps (forward and backward) in float32 weights under bfloat16
autocast; base keep ratio 0.7. All columns of a row were measured in turns in one process; the
numbers are medians of {rounds} rounds. Made by `python -m benchmarks.gpu`.

*Replay* is the host itself on as many tokens, cut off in front of the blocks where stages sit: the
best that is possible without any selection; it is not there for bypass, and for hosts with tables
of positions inside their blocks. *Frozen* is the wrapped model after `freeze_guards`; *of the
replay* is the replay's time over that of *wrapped* or *frozen*, whichever is faster.
In mode *jagged* images keep from 0.6 to 1.4 times as many tokens as the recipe says,
forced from outside, and *replay* is the wrapped model with the recipe's counts.
*Memory* is the peak of a training step, relative to dense. *Bound* is dense MACs / pruned MACs.
"""


@dataclass(frozen=True)
class GpuRow:
    """One host in one mode at one batch size; times in seconds a call, None if not measured.

    Attributes:
        host: Its name.
        how: One of `HOWS`.
        batch: Images.
        dense: The host.
        pruned: The wrapped one.
        frozen: The same without looking at guards.
        replay: The host on as many tokens.
        bound: Dense MACs / pruned MACs.
        memory: Peak of the wrapped one / peak of the dense one.
    """

    host: str
    how: str
    batch: int
    dense: float
    pruned: float
    frozen: float | None
    replay: float | None
    bound: float
    memory: float | None


def measure(
    host: SpeedHost, how: str, batches: Sequence[int], rounds: int, device: torch.device
) -> Iterator[GpuRow]:
    """The rows of one host in one mode."""
    torch.manual_seed(0)
    train = how == "train"
    dense = host.build().to(device, torch.float32 if train else torch.bfloat16).train(train)
    wrapped = tokenprune.wrap(copy.deepcopy(dense), host.recipe, verify=False, train=train)
    wrapped.train(train)
    counted = tokenprune.profile(wrapped)
    for batch in batches:
        images = torch.randn(batch, 3, host.size, host.size, device=device)
        images = images if train else images.bfloat16()
        sides: dict[str, Callable[[], Any]] = {"dense": partial(dense, images)}
        sides["pruned"] = partial(wrapped, images)
        if train:
            sides = {n: partial(_step, call.func, images) for n, call in sides.items()}  # type: ignore[attr-defined]
        with nullcontext() if train else torch.inference_mode():
            plain = host.plain and how not in ("train", "jagged")
            cut_off = replay(dense, wrapped, images) if plain else None
            if how == "jagged":
                sides |= {"pruned": _Jagged(wrapped, images), "replay": partial(wrapped, images)}
            if cut_off is not None:
                sides["replay"] = partial(cut_off, images)
            if how == "compile":
                torch.compiler.reset()
                sides = {n: partial(torch.compile(c.func), images) for n, c in sides.items()}  # type: ignore[attr-defined]
            if how == "graph":
                sides = {name: _captured(call) for name, call in sides.items()}
            if how == "eager":
                sides["frozen"] = _Frozen(wrapped, images)
            found = interleaved(sides, rounds=rounds, turn_seconds=0.1, device=device)
        seconds = {name: timing.seconds for name, timing in found.items()}
        yield GpuRow(
            host=host.name,
            how=how,
            batch=batch,
            dense=seconds["dense"],
            pruned=seconds["pruned"],
            frozen=seconds.get("frozen"),
            replay=seconds.get("replay"),
            bound=counted.dense_macs / counted.macs,
            memory=_memory(sides) if train and device.type == "cuda" else None,
        )


class _Frozen:
    """Calls of a wrapped model with its guards frozen."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images

    def __call__(self) -> None:
        tokenprune.freeze_guards(self.model)
        try:
            self.model(self.images)
        finally:
            tokenprune.freeze_guards(self.model, False)


class _Jagged:
    """Calls in which image i keeps from 0.6 to 1.4 times as many tokens."""

    def __init__(self, model: Any, images: Tensor) -> None:
        self.model, self.images = model, images
        _, trace = model(images, return_trace=True)
        batch, device = len(images), images.device
        share = torch.linspace(0.6, 1.4, batch, device=device) if batch > 1 else torch.ones(1)
        drawn = torch.rand_like(trace.stages[0].decision.float()).argsort(dim=1)
        self.sets = []
        for stage in trace.stages:
            counts = (share.to(device) * stage.num_tokens).long()[:, None]
            row = torch.arange(int(counts.max()), device=device)
            kept = drawn[:, : len(row)].masked_fill(row >= counts, drawn.shape[1])
            self.sets.append(kept.sort(dim=1).values.masked_fill(row >= counts, -1))

    def __call__(self) -> None:
        self.model.set_threshold(0.5)
        try:
            with self.model.using(keep_indices=self.sets):
                self.model(self.images)
        finally:
            self.model.set_threshold(None)


def _step(model: nn.Module, images: Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16):
        output = model(images)
    logits = getattr(output, "logits", output)
    logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def replay(dense: nn.Module, wrapped: Any, images: Tensor) -> nn.Module | None:
    """A copy of the host whose blocks at the stages get only as many tokens as a stage leaves; None
    for hosts with tables of positions inside the blocks, which do not take that."""
    _, trace = wrapped(images, return_trace=True)
    pruning = wrapped._pruning
    replay, prefix = copy.deepcopy(dense), pruning.plan.num_prefix

    def cut(length: int, _module: nn.Module, args: Any) -> Any:
        return args[0][:, :length].contiguous(), *args[1:]

    for block, stage in zip(pruning.plan.blocks, trace.stages, strict=True):
        module = replay.get_submodule(pruning.spec.blocks[block])
        module.register_forward_pre_hook(partial(cut, prefix + stage.num_tokens))
    try:
        replay(images)
    except RuntimeError as error:
        if "must match the size" not in str(error):
            raise
        return None
    return replay


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _memory(sides: dict[str, Callable[[], Any]]) -> float:
    peaks = {}
    for name in ("dense", "pruned"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        sides[name]()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()
    return peaks["pruned"] / peaks["dense"]


def as_page(rows: Sequence[GpuRow], machine: str, rounds: int) -> str:
    """The document."""
    head = ["host", "mode", "batch", "dense, ms", "wrapped, x dense", "frozen, x dense"]
    head += ["replay, x dense", "of the replay", "bound", "memory"]
    lines = []
    for r in sorted(rows, key=lambda r: (HOWS.index(r.how), r.host, r.batch)):
        ratios = [None if s is None else r.dense / s for s in (r.pruned, r.frozen, r.replay)]
        best = r.frozen or r.pruned
        of_replay = None if r.replay is None else r.replay / min(best, r.pruned)
        bound = None if r.how == "train" else r.bound
        cells = ["-" if v is None else f"{v:.2f}" for v in (*ratios, of_replay, bound, r.memory)]
        lines.append([r.host, r.how, str(r.batch), f"{r.dense * 1e3:.2f}", *cells])
    missing = ", ".join(how for how in HOWS if how not in {row.how for row in rows})
    end = f"\nNot measured: {missing}.\n" if missing else ""
    return HEAD.format(machine=machine, rounds=rounds) + "\n" + table(head, lines) + "\n" + end


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only matching hosts")
    parser.add_argument("--how", nargs="+", choices=HOWS, default=list(HOWS), help="modes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="sizes")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    echo, kept = Console(width=120).print, options.docs / "gpu.json"
    known = json.loads(kept.read_text()) if kept.exists() else {"rows": []}
    rows = {(r.host, r.how, r.batch): r for r in (GpuRow(**entry) for entry in known["rows"])}
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not options.render_only and known.get("machine") != _machine(device):
        rows.clear()  # one page is about one machine
    for how in () if options.render_only else options.how:
        for host in (host for host in HOSTS if fnmatch(host.name, options.only)):
            try:
                for row in measure(host, how, options.batch, options.rounds, device):
                    rows[row.host, row.how, row.batch] = row
                    echo(row)
                    known = {"machine": _machine(device), "rounds": options.rounds}
                    known["rows"] = [asdict(row) for row in rows.values()]
                    kept.write_text(json.dumps(known, indent=1) + "\n")
            except (RuntimeError, TokenPruneError) as error:
                echo(f"{host.name}, {how}: not measured: {type(error).__name__}: {error}"[:600])
    page = as_page(list(rows.values()), known["machine"], known["rounds"])
    (options.docs / "gpu.md").write_text(page)
    echo(f"wrote {options.docs}/gpu.md and .json")


def _machine(device: torch.device) -> str:
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
