"""Run all examples, each in a process of its own, and say how long each took: `make examples`.

python examples/run.py                # all; ends with 1 if one fails
python examples/run.py own_loop tour  # some
python examples/run.py --page         # all, and write their times into docs/examples.md
python examples/run.py tour --save    # keep what the notebook shows
"""

import argparse
import ast
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
NOTEBOOK = "tour"
SCRIPTS = {path.stem: path for path in sorted(HERE.glob("[a-z]*.py")) if path.stem != "run"}
SCRIPTS["distributed"] = HERE / "distributed/compare.py"
NAMES = (*SCRIPTS, NOTEBOOK)
LIMIT = 600  # seconds of one example


def describe(name: str) -> str:
    """What an example shows: the first line of its docstring."""
    if name == NOTEBOOK:
        return "A notebook with its outputs: merge, picture, budget, benchmark, training."
    text = ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def run_script(path: Path) -> str | None:
    """What a script printed if it failed, else None."""
    # One thread, so that sums keep their order and the checks hold on any machine.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        [sys.executable, "-u", str(path)], cwd=ROOT, env=environment, timeout=LIMIT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    return done.stdout or f"ended with {done.returncode}, and printed nothing"


def run_notebook(save: bool) -> str | None:
    """What failed in the notebook, else None; `save` keeps its new outputs."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = HERE / f"{NOTEBOOK}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, which finds no widgets
    client = NotebookClient(
        notebook, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": HERE}},
        record_timing=False,
    )  # fmt: skip
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return str(error) or type(error).__name__
    if save:
        nbformat.write(notebook, path)
    return None


PAGE = """\
# Examples

Each runs on data that is there (scikit-learn's digits, Python's own texts), prints what it
measured, and fails if its claim does not hold. `make examples` installs what they need and runs
all of them; `python examples/own_loop.py` runs one.

{table}

Seconds of processor time ({machine}), {minutes:.1f} minutes in all;
on a machine that does nothing else they take as long. The first example that needs the small ViT
trains it and keeps its weights in `runs/examples`; the others read them. This page is written by
`python examples/run.py --page`. Several processes: [many_gpus.md](many_gpus.md). A package with an
adapter and a scorer of its own: `examples/third_party_package`.
"""


def processor_time() -> float:
    """Seconds of all processes that were started here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def page(seconds: dict[str, float]) -> str:
    """docs/examples.md."""
    rows = []
    for name in NAMES:
        file = SCRIPTS.get(name, HERE / f"{NOTEBOOK}.ipynb").relative_to(ROOT)
        rows.append(f"| `{file}` | {describe(name)} | {seconds[name]:.0f} |")
    return PAGE.format(
        table="\n".join(["| example | what it shows | seconds |", "|---|---|---:|", *rows]),
        minutes=sum(seconds.values()) / 60,
        machine=f"{platform.machine()}, one thread, Python {platform.python_version()}",
    )


def main() -> int:
    """Run what was asked for; 1 if anything failed."""
    parser = argparse.ArgumentParser(description="Run the examples.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; all if none")
    parser.add_argument("--page", action="store_true", help="write docs/examples.md")
    parser.add_argument("--save", action="store_true", help="keep the outputs of the notebook")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no example {unknown[0]!r}; there are {', '.join(NAMES)}")
    if options.page and options.names:
        parser.error("--page needs all examples: give no names")
    seconds, failed, total = dict[str, float](), list[str](), 0.0
    for name in options.names or NAMES:
        started, before = time.perf_counter(), processor_time()
        try:
            said = run_notebook(options.save) if name == NOTEBOOK else run_script(SCRIPTS[name])
        except subprocess.TimeoutExpired:
            said = f"took more than {LIMIT} seconds"
        wall, seconds[name] = time.perf_counter() - started, processor_time() - before
        total += wall
        shown = f"{wall:>6.1f} s, {seconds[name]:>5.1f} s of a processor"
        print(f"{'FAILED' if said else 'ok':<7}{name:<24}{shown}", flush=True)
        if said:
            failed.append(name)
            print(said, flush=True)
    print(f"{len(seconds) - len(failed)} of {len(seconds)} in {total / 60:.1f} minutes")
    if options.page and not failed:
        (ROOT / "docs/examples.md").write_text(page(seconds), encoding="utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
