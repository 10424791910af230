"""How time, memory and `wrap` grow with the number of tokens: a part of docs/speed.md.

    OMP_NUM_THREADS=1 python -m benchmarks.growth

DeiT-S and EVA-02-S with patches of 16 pixels, batch 1, from 224 to 1,024 pixels. Time is of
interleaved rounds of the dense host, the pruned one and the replay (as many tokens, no selection).
Memory is what each has at most beside the weights, by torch's own count of what it allocates.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import tokenprune
from benchmarks.markdown import put, table
from tokenprune.cost.replay import replay_of
from tokenprune.cost.timing import interleaved
from tokenprune.hosts.inputs import CallSignature
from tokenprune.ops.moving import gather_tokens
from tokenprune.ops.selection import select_topk

__all__ = ["main"]

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
HOSTS = {"DeiT-S": "deit_small_patch16_224", "EVA-02-S": "eva02_small_patch14_224"}
LARGE = "vit_giant_patch14_224"
SIDES = (224, 512, 1024)
PATCH, WIDTH, KEPT = 16, 384, 0.7


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--large", action="store_true", help=f"only wrap {LARGE}")
    options = parser.parse_args(arguments)
    if options.large:
        put(PAGE, "large", f"{_large()}\n")
        return
    rows = [_row(name, side, options.rounds) for name in HOSTS for side in options.sides]
    head = ["host", "tokens", "dense, s", "pruned, s", "replay, s", "speed-up", "of the replay",
            "memory, MiB: dense", "pruned", "replay", "wrap, s"]  # fmt: skip
    threads, version = torch.get_num_threads(), torch.__version__.partition("+")[0]
    text = (
        f"`learned-k0.7`, batch 1: {platform.machine()}, {threads} threads, float32, torch "
        f"{version}, medians of {options.rounds} interleaved rounds, other work on the machine; "
        f"made by `OMP_NUM_THREADS={threads} python -m benchmarks.growth`. *Replay* is the host on "
        "as many tokens, without any selection. *Memory* is the most that a forward has allocated "
        "at once beside the weights. *Wrap* traces, rewrites and proves (`train=False`); proofs "
        "are forwards, so it grows as they do.\n"
    )
    alone = (
        f"Selection and gather alone ({KEPT} of the tokens stay, {WIDTH} channels, batch 8): while "
        "tokens grow 21 times, the time for one of them stays within 1.5 times, so both are linear."
    )
    found = "\n\n".join([text.rstrip(), table(head, rows), alone, _selection(options)])
    put(PAGE, "growth", f"{found}\n")


def _row(name: str, side: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    host = timm.create_model(HOSTS[name], img_size=side, patch_size=PATCH).eval()
    images = torch.randn(1, 3, side, side)
    start = time.perf_counter()
    model = tokenprune.wrap(host, "learned-k0.7", train=False)
    wrapping = time.perf_counter() - start
    replay: Any = replay_of(model, CallSignature.now(type(host)).bind((images,), {}))
    ways = {"dense": host, "pruned": model, "replay": replay}
    calls = {way: _call(of, images) for way, of in ways.items() if of is not None}
    found = interleaved(calls, rounds=rounds, turn_seconds=0.0)
    memory = {way: _most_bytes(call) / 2**20 for way, call in calls.items()}

    def ratio(slow: str, fast: str) -> str:
        if slow not in found or fast not in found:
            return "-"
        pairs = zip(found[slow].rounds, found[fast].rounds, strict=True)
        return f"{median(a / b for a, b in pairs):.2f}x"

    seconds = [f"{found[way].seconds:.3g}" if way in found else "-" for way in ways]
    mib = [f"{memory[way]:.0f}" if way in memory else "-" for way in ways]
    tokens = (side // PATCH) ** 2
    row = [name, f"{tokens:,}", *seconds, ratio("dense", "pruned"), ratio("replay", "pruned")]
    print(row := [*row, *mib, f"{wrapping:.1f}"], flush=True)
    return row


def _large() -> str:
    """What `wrap` takes for a host of a billion parameters."""
    with torch.device("meta"):
        host = timm.create_model(LARGE)
    host = host.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-0.04, 0.04)
            else:
                parameter.fill_(float(name.endswith("weight")))
    billions = sum(parameter.numel() for parameter in host.parameters()) / 1e9
    held, wall, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    tokenprune.wrap(host, "learned-k0.7")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    threads, version = torch.get_num_threads(), torch.__version__.partition("+")[0]
    return (
        f"`wrap` of `{LARGE}` ({billions:.2f} B parameters, float32, training traced too): "
        f"{cpu:.1f} s of CPU time with {threads} threads, {wall:.0f} s by the clock; "
        f"{held:.2f} GiB were held before, {_memory('VmHWM'):.2f} GiB at most (torch {version}, "
        f"`OMP_NUM_THREADS={threads} python -m benchmarks.growth --large`)."
    )


def _memory(kind: str) -> float:
    """GiB of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(kind))


def _selection(options: argparse.Namespace) -> str:
    rows = []
    for side in options.sides:
        tokens = (side // PATCH) ** 2
        x, logits = torch.randn(8, 1 + tokens, WIDTH), torch.randn(8, tokens, 2).log_softmax(-1)
        count = int(KEPT * tokens)
        chosen = select_topk(logits, count)
        parts: dict[str, Callable[[], Any]] = {
            "select": lambda logits=logits, count=count: select_topk(logits, count),
            "gather": lambda x=x, chosen=chosen: gather_tokens(x, chosen, 1),
        }
        found = interleaved(parts, rounds=15, turn_seconds=0.05)
        times = [found[name].seconds * 1e9 / (8 * tokens) for name in parts]
        rows.append([f"{tokens:,}", *(f"{t:.0f}" for t in times)])
    return table(["tokens", "selection, ns a token", "gather, ns a token"], rows)


def _most_bytes(call: Callable[[], Any]) -> int:
    """The most that a call has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _call(model: Any, images: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(images)

    return call


if __name__ == "__main__":
    main()
