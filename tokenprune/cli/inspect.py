"""`tokenprune inspect`: show the blocks, stages, cost and certificate of a model."""

from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any

import typer
from torch import nn

from tokenprune.analysis.blocks import Blocks
from tokenprune.checks.certificate import Certificate
from tokenprune.checks.verify import verify
from tokenprune.cli.console import report, say, working
from tokenprune.cli.opened import open_model
from tokenprune.cli.options import (
    AdapterName,
    HostName,
    HostWeights,
    Json,
    ModelName,
    Options,
    Pretrained,
    Settings,
)
from tokenprune.cost.auto import CHOSEN, RULE
from tokenprune.cost.profile import Profile, profile
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.recipe.methods import AUTO
from tokenprune.report.table import Table
from tokenprune.runtime.model import pruning_of

__all__ = ["certificate_table", "cost_table", "inspect", "sites_of", "sites_table", "stage_table"]


def inspect(
    model: ModelName,
    setting: Settings = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Name or file. Default: auto, what saves most.")
    ] = "",
    adapter: AdapterName = "",
    option: Options = None,
    host: HostName = "",
    pretrained: Pretrained = False,
    host_weights: HostWeights = None,
    proof: Annotated[bool, typer.Option(help="Run the model to verify the pruning.")] = True,
    as_json: Json = False,
) -> None:
    """Show what an adapter finds in a model, what prunes it best, what that saves, and the
    certificate."""
    wrapped = open_model(
        model,
        [*(setting or ()), *(option or ())],
        recipe=recipe,
        otherwise=AUTO,
        adapter=adapter,
        host=host,
        pretrained=pretrained,
        host_weights=host_weights,
        seen=(lambda host, spec: None) if as_json else _show_spec,
    ).model
    pruning = pruning_of(wrapped)
    with working("counting"):
        counted = profile(wrapped)
    kept = pruning.budget.counts(counted.patches_per_stage)
    sites = sites_of(next(iter(pruning.cache)).analysis.blocks)
    tables = [sites_table(sites), stage_table(pruning.recipe, counted, kept), cost_table(counted)]
    data: dict[str, Any] = {"profile": {**asdict(counted), "ratio": counted.ratio}, "kept": kept}
    data |= {"adapter": pruning.spec.adapter, "recipe": pruning.recipe.name, "sites": sites}
    if proof:
        with working("verifying"):
            certificate = verify(wrapped)
        tables.append(certificate_table(certificate))
        data["certificate"] = asdict(certificate)
    report(as_json, data, *tables)


def _show_spec(host: nn.Module, spec: ArchSpec) -> None:
    parameters = sum(p.numel() for p in host.parameters())
    open_ = "looked for in the graph"
    blocks, prefix = open_, spec.num_prefix_tokens
    if spec.blocks:
        first, last = spec.blocks[0], spec.blocks[-1]
        kind = type(host.get_submodule(first)).__name__
        names = f"{first or 'the host itself'} to {last or 'the host itself'}"
        blocks = f"{len(spec.blocks)} of class {kind}, {names}"
    taken = ", ".join(f"{name} {list(e.shape)}" for name, e in spec.inputs.items()) or "unknown"
    rows = [
        ("host", f"{type(host).__name__}, {parameters / 1e6:.1f} M parameters"),
        ("adapter", spec.adapter),
        ("mode", spec.mode),
        ("blocks", blocks),
        ("prefix tokens", open_ if prefix is None else str(prefix)),
        ("final norm", spec.norm or "none"),
        ("input, per image", taken),
        *(("note", note) for note in spec.notes),
    ]
    width = max(len(name) for name, _ in rows)
    say("", *(f"{name:<{width}}  {value}" for name, value in rows), "")


def sites_of(blocks: Blocks) -> list[dict[str, Any]]:
    """For each block where in it a stage can be, whether its attention is known, which merging and
    class attention read, and the shape of its tokens, the batch aside."""
    return [
        {
            "block": number,
            "places": ["entry", *(["middle"] if block.middle is not None else [])],
            "attention": block.attention is not None,
            "tokens": list(block.entry.meta["val"].shape[1:]),
        }
        for number, block in sorted(blocks.items())
    ]


def sites_table(sites: list[dict[str, Any]]) -> Table:
    """The sites, with blocks that are alike in one row."""
    rows = []
    for (places, attention, tokens), alike in groupby(
        sites, lambda site: (site["places"], site["attention"], site["tokens"])
    ):
        first, *rest = (site["block"] for site in alike)
        numbers = f"{first} to {rest[-1]}" if rest else str(first)
        shape = " x ".join(map(str, tokens))
        rows.append((numbers, ", ".join(places), "yes" if attention else "no", shape))
    columns = ("blocks", "a stage can be at", "attention known", "tokens")
    return Table("Sites", columns, tuple(rows), "Merging and class attention need an attention.")


def stage_table(recipe: Recipe, counted: Profile, kept: tuple[int, ...]) -> Table:
    """The stages, and the token counts before and after each."""
    patches = counted.patches_per_stage
    all_there = counted.starts
    before = [patches[s] if s in all_there else kept[s - 1] for s in range(len(patches))]
    rows = tuple(
        (
            str(number),
            f"{block} ({counted.blocks[block]})",
            f"{before[number]} -> {kept[number]}",
            f"{100 * kept[number] / patches[number]:.1f} %",
        )
        for number, block in enumerate(counted.stages)
    )
    title = f"Stages of {recipe.name or 'the default recipe'}"
    note = f"{recipe.description}\n{RULE}" if CHOSEN in recipe.description else recipe.description
    return Table(title, ("stage", "before block", "patch tokens", "of all"), rows, note)


def cost_table(counted: Profile) -> Table:
    """Tokens and multiply-accumulates of each block."""
    dense = dict(enumerate(counted.dense_macs_per_block))
    rows = []
    for block, path in enumerate(counted.blocks):
        macs = counted.macs_per_block[block]
        if block in counted.stages:
            stage = counted.stages.index(block)
            cost = counted.predictor_macs[stage] / 1e9
            rows.append((f"predictor {stage}", "", f"{cost:.4f}", "", ""))
        saved = f"{100 * (macs / dense[block] - 1):+.1f} %" if dense[block] else ""
        tokens = str(counted.tokens_per_block[block])
        rows.append((path, tokens, f"{macs / 1e9:.4f}", f"{dense[block] / 1e9:.4f}", saved))
    other = f"{counted.other_macs / 1e9:.4f}"
    rows.append(("embedding, head", "", other, other, ""))
    saved = f"{100 * (counted.ratio - 1):+.1f} %"
    rows.append(("all", "", f"{counted.gmacs:.4f}", f"{counted.dense_gmacs:.4f}", saved))
    note = f"GMACs of one image with attention. Prefix tokens: {counted.num_prefix_tokens} more."
    columns = ("block", "patch tokens", "GMACs", "dense", "change")
    return Table("Cost", columns, tuple(rows), note)


def certificate_table(certificate: Certificate) -> Table:
    """The checks of `verify`."""
    rows = tuple(
        (check.name, f"{check.error:.1e}", f"{check.bound:.0e}", "yes" if check.passed else "NO")
        for check in certificate.checks
    )
    return Table("Certificate", ("theorem", "difference", "allowed", "holds"), rows)
