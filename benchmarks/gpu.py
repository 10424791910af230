"""Speed on a GPU: dense, wrapped, and the host's blocks on as many tokens. Writes docs/gpu.md.

    python -m benchmarks.gpu                       all of it
    python -m benchmarks.gpu --only DeiT-S --how eager --batch 1 256
    python -m benchmarks.gpu --minutes 5           the rows of `PLAN` in its order, as time permits
    python -m benchmarks.gpu --render-only         write the page only

Rows are saved in docs/gpu.json one by one; a new measurement replaces the old row, and one on
another machine replaces all. Runs on a CPU too, so that it can be tried there.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import tokenprune
from benchmarks.markdown import table
from benchmarks.speed_parts.hosts import HOSTS, SpeedHost
from tokenprune.cost.replay import replay_of
from tokenprune.cost.timing import interleaved
from tokenprune.errors import TokenPruneError
from tokenprune.runtime.model import pruning_of

__all__ = ["GpuRow", "main"]

ROOT = Path(__file__).parents[1]
RESIZED = [
    SpeedHost(
        f"DeiT-S, {size} px",
        partial(timm.create_model, "deit_small_patch16_224", img_size=size),
        "dynamicvit-deit-small-k0.7",
        size=size,
    )
    for size in (512, 1024)
]
MERGED = [
    SpeedHost("DeiT-S, merge-k0.7", HOSTS[0].build, "merge-k0.7"),
    SpeedHost("DeiT-S, tome-r13", HOSTS[0].build, "tome-r13"),
]
ALL = {host.name: host for host in (*HOSTS, *RESIZED, *MERGED)}
LARGE_ONLY = ("ViT-L", "EVA-02-S", "LV-ViT-S", "Swin-T")
PLAN: dict[str, dict[str, Sequence[int]]] = {
    "graph": {"DeiT-S": (1, 8, 64, 256), "DeiT-S, merge-k0.7": (1, 64)},
    "eager": {
        "DeiT-S": (1, 8, 64, 256),
        "DeiT-B": (1, 64, 256),
        "ViT-B, transformers": (1, 64, 256),
        **dict.fromkeys(LARGE_ONLY, (64,)),
        "DeiT-S, merge-k0.7": (1, 64, 256),
        "DeiT-S, tome-r13": (1, 256),
        "DeiT-S, 512 px": (1, 32),
        "DeiT-S, 1024 px": (1, 8),
    },
    "train": {"DeiT-S": (256,), "DeiT-S, 512 px": (48,), "DeiT-S, merge-k0.7": (256,)},
    "jagged": {"DeiT-S": (8, 64, 256), "DeiT-B": (64, 256)},
    "compile": {"DeiT-S": (256, 1)},
    "compiled training": {"DeiT-S": (256,)},
}
HOWS = tuple(PLAN)
HEAD = """# Speed on a GPU

{machine}. Eval in bfloat16, training steps (forward and backward) in float32 weights under bfloat16
autocast; base keep ratio 0.7. All columns of a row were measured in turns in one process; the
numbers are medians of {rounds} rounds. Made by `python -m benchmarks.gpu`.

*Replay* is the host itself on as many tokens, cut off in front of the blocks where stages sit: the
best that is possible without any selection; it is not there for bypass, and for hosts with tables
of positions inside their blocks. *Frozen* is the wrapped model after `freeze_guards`; *of the
replay* is the replay's time over that of *wrapped* or *frozen*, whichever is faster.
In mode *jagged* a threshold decides how many tokens each image keeps, on average as many as the
recipe says, and *replay* is the wrapped model with the recipe's counts.
*Memory* is the peak of a training step, relative to dense. *Bound* is dense MACs / pruned MACs.
The processor counts where the card has little to do: a dense DeiT-S at batch 1 took 2.9 ms in one
hour and 6.2 ms in another on machines of this name, so compare columns of a row, not rows.
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
    host: SpeedHost,
    how: str,
    batches: Sequence[int],
    rounds: int,
    turn: float,
    device: torch.device,
) -> Iterator[GpuRow]:
    """The rows of one host in one mode."""
    torch.manual_seed(0)
    train = how in ("train", "compiled training")
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
            torch.compiler.reset()
            made: Callable[[Any], Any] = _as_is if how == "train" else _compiled
            sides = {n: partial(_step, made(call.func), images) for n, call in sides.items()}  # type: ignore[attr-defined]
        with nullcontext() if train else torch.inference_mode():
            plain = host.plain and not train and how != "jagged"
            cut_off = replay_of(wrapped, pruning_of(wrapped).inputs((images,))) if plain else None
            if how == "jagged":
                sides["pruned"] = partial(_jagged(wrapped, images), images)
                sides["replay"] = partial(wrapped, images)
            if cut_off is not None:
                sides["replay"] = partial(cut_off, images)
            if how == "compile":
                frozen = copy.deepcopy(wrapped)
                tokenprune.freeze_guards(frozen)
                sides["frozen"] = partial(frozen, images)
                torch.compiler.reset()
                mode = "reduce-overhead" if batch == 1 else None
                sides = {n: partial(_compiled(c.func, mode), images) for n, c in sides.items()}  # type: ignore[attr-defined]
            if how == "graph":
                sides = {name: _captured(call) for name, call in sides.items()}
            if how == "eager":
                sides["frozen"] = _Frozen(wrapped, images)
            found = interleaved(sides, rounds=rounds, turn_seconds=turn, device=device)
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


def _jagged(wrapped: Any, images: Tensor) -> nn.Module:
    """A copy of the wrapped model whose predictors prefer something, with a threshold at which
    these images cost on average what the recipe's counts cost."""
    model = copy.deepcopy(wrapped)
    for predictor in model.token_predictors:
        nn.init.normal_(predictor.out_proj[-1].weight)
    model.set_budget(macs=tokenprune.profile(wrapped).ratio, images=images[:64])
    return model  # type: ignore[no-any-return]


def _as_is(model: nn.Module) -> nn.Module:
    return model


def _compiled(model: nn.Module, mode: str | None = None) -> Any:
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


def _step(model: nn.Module, images: Tensor) -> None:
    with torch.autocast(images.device.type, torch.bfloat16):
        output = model(images)
    logits = getattr(output, "logits", output)
    logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


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
        bound = None if "train" in r.how else r.bound
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
    parser.add_argument("--batch", type=int, nargs="+", help="sizes, in place of the plan's")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of a turn")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after these")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--render-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    echo, kept = Console(width=120).print, options.docs / "gpu.json"
    known = json.loads(kept.read_text()) if kept.exists() else {"rows": []}
    rows = {(r.host, r.how, r.batch): r for r in (GpuRow(**entry) for entry in known["rows"])}
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not options.render_only and known.get("machine") != _machine(device):
        rows.clear()  # one page is about one machine
    started = time.monotonic()
    planned = [(how, ALL[name]) for how in options.how for name in PLAN[how]]
    for how, host in [] if options.render_only else planned:
        late = time.monotonic() - started > 60 * options.minutes
        if late or not fnmatch(host.name, options.only):
            continue
        try:
            batches = options.batch or PLAN[how][host.name]
            for row in measure(host, how, batches, options.rounds, options.turn, device):
                rows[row.host, row.how, row.batch] = row
                echo(f"{time.monotonic() - started:.0f} s", row)
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
