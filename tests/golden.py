"""Scaffolding of the restructuring: program texts and output bits of every host, in one file.

    python -m tests.golden --write      # before anything moves
    python -m tests.golden [NAME ...]   # afterwards; lists what is no longer the same

Texts are compared without the names of our own functions, outputs and gradients bit for bit.
"""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tokenprune
from tests.toys.table import TOYS
from tests.zoo.hosts import ZOO
from tests.zoo.hosts_grid import GRID
from tokenprune.runtime.model import pruning_of

FILE = Path(__file__).with_name("golden.json")
PATHS = ("dense", "mask", "gather", "ragged")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def bits(values: Any) -> str:
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    parts = [repr(tuple(t.shape)).encode() + t.detach().double().numpy().tobytes() for t in tensors]
    return sha(b"".join(parts))


def texts(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    programs = pruning_of(model).programs(inputs)
    for path in PATHS:
        try:
            program = programs.get(pruning_of(model).host, path.replace("ragged", "jagged"))
        except tokenprune.errors.TokenPruneError as error:
            yield path, f"{type(error).__name__}"
            continue
        source = program.rewrite.graph.python_code(root_module="self").src
        yield path, sha(re.sub(r"tokenprune_\w+", "tokenprune", source).encode())


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    def traced(**using: Any) -> Any:
        with model.using(**using):
            output, trace = model(**inputs, return_trace=True)
        fields = [vars(stage) for stage in trace.stages]
        values = dict(output) if isinstance(output, dict) else output
        return [values, fields, trace.patch_tokens]

    model.eval()
    with torch.no_grad():
        yield "eval", bits(traced())
        yield "mask in eval", bits(traced(path="mask"))
        yield "dense", bits(traced(path="dense"))
        try:
            model.set_threshold(0.5)
            yield "threshold", bits(traced())
        except tokenprune.errors.TokenPruneError as error:
            yield "threshold", type(error).__name__
        model.set_threshold(None)
    model.train()
    torch.manual_seed(3)
    result = traced(generator=torch.Generator().manual_seed(0))
    yield "train", bits(result)
    loss = sum(t.double().square().mean() for t in tree_leaves(result) if t is not None
               and isinstance(t, Tensor) and t.requires_grad and bool(t.isfinite().all()))  # fmt: skip # noqa: E501
    loss.backward()
    yield "gradients", bits([p.grad for p in model.parameters()])


def hosts() -> Iterator[tuple[str, Any]]:
    for toy in TOYS.values():
        yield f"toy/{toy.name}", lambda toy=toy: (toy.wrap(verify=False), toy.inputs(3))
    for row in ZOO:
        if not row.refused:
            yield f"zoo/{row.name}", lambda row=row: (
                tokenprune.wrap(row.build(5.0), row.recipe, example_inputs=row.inputs(), verify=False),  # noqa: E501
                row.inputs(3),
            )  # fmt: skip
    for row in GRID:
        yield (
            f"grid/{row.name}",
            lambda row=row: (
                tokenprune.wrap(row.build(5.0), example_inputs=row.inputs(), verify=False),
                row.inputs(3),
            ),
        )


def record(make: Any) -> dict[str, str]:
    torch.manual_seed(0)
    try:
        model, inputs = make()
        found = {f"text {path}": value for path, value in texts(model, inputs)}
        return found | dict(outputs(model, inputs))
    except Exception as error:  # some hosts cannot train: that too has to stay as it is
        return {"error": f"{type(error).__name__}"}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    asked = [a for a in sys.argv[1:] if not a.startswith("--")]
    found = {}
    for name, make in hosts():
        if asked and not any(a in name for a in asked):
            continue
        found[name] = record(make)
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(found, indent=0) + "\n")
        return
    known = json.loads(FILE.read_text())
    bad = 0
    for name, values in found.items():
        other = [k for k in known[name] | values if known[name].get(k) != values.get(k)]
        outs = [k for k in other if not k.startswith("text")]
        bad += bool(outs)
        if other:
            print(name, "differs:", ", ".join(other))
    print(f"{len(found)} hosts, outputs differ in {bad}")


if __name__ == "__main__":
    main()
