"""The libraries' own tests of their models, run over wrapped ones.

    pip install --no-deps parameterized
    python -m benchmarks.upstream                   both libraries, about half an hour on one core
    python -m benchmarks.upstream --library timm --only vit_tiny_patch16_224
    python -m benchmarks.upstream --render-only     write the page from the results so far

timm's `tests/test_models.py` and transformers' `tests/test_modeling_common.py` come from their
sdists, of the versions that are installed. Each test runs twice: on the dense host, and where the
host's constructor returns the wrapped model. A test that fails on the dense host too (it wants the
network, say, or a class that this selection has not) says nothing, and is left out.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.markdown import table
from benchmarks.upstream_parts.hosts import LEFT_OUT, TIMM, TRANSFORMERS, reason

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
FILES = {"timm": "tests/test_models.py", "transformers": "tests/test_modeling_common.py"}
HOSTS = {"timm": TIMM, "transformers": TRANSFORMERS}
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
Results = Mapping[str, tuple[str, str]]
"""Test -> how it ended, and what it said."""


def fetched(library: str, work: Path) -> Path:
    """The file of tests, out of the library's sdist."""
    name = f"{library}-{version(library)}"
    archive, file = work / f"{name}.tar.gz", work / name / FILES[library]
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:"]
        named = f"{library}=={version(library)}"
        subprocess.run([*command, "--no-deps", "--dest", str(work), named], check=True)
    if not file.exists():
        with tarfile.open(archive) as opened:
            opened.extractall(work, filter="data")
    return file


def ran(library: str, host: str, file: Path, *, wrapped: bool, work: Path) -> Path:
    """Run the tests of one host in a process of its own; the file of its results."""
    results = work / f"{library}-{host}-{'wrapped' if wrapped else 'dense'}.xml"
    ours = ROOT / "benchmarks" / "upstream_parts" / "common_models.py"
    around = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "UPSTREAM_HOST": host,
        "UPSTREAM_FILE": str(file),
        "UPSTREAM_WRAPPED": str(int(wrapped)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    which = f"-k=-{host}] or [{host}] or -{host}." if library == "timm" else "-k=test_"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(work)]
    command += ["-p", "benchmarks.upstream_parts.plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command += [f"--junitxml={results}", which]
    command += [str(file if library == "timm" else ours)]
    for name in LEFT_OUT[library]:
        command += [f"--deselect-named={name}"]
    done = subprocess.run(command, env=os.environ | around, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
    return results


def read(results: Path) -> Results:
    """The results of one run; a test by its name, without the host's."""
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        faults = [*case.findall("failure"), *case.findall("error")]
        how = FAILED if faults else SKIPPED if case.find("skipped") is not None else PASSED
        said = (faults[0].get("message") or "") if faults else ""
        name = case.get("name", "").partition("[")[0]
        if found.get(name, ("",))[0] != FAILED:  # of a host with several weights, each is a case
            found[name] = how, " ".join(said.split())
    return found


def rows(library: str, work: Path) -> Iterator[tuple[str, Results, Results]]:
    """Host, its results dense, its results wrapped."""
    for host in HOSTS[library]:
        files = [work / f"{library}-{host}-{how}.xml" for how in ("dense", "wrapped")]
        if all(file.exists() for file in files):
            yield host, *map(read, files)


def as_page(work: Path) -> Iterator[str]:
    """docs/upstream.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    yield "# The libraries' own tests, over wrapped models\n"
    yield (
        "timm's `tests/test_models.py` and transformers' `tests/test_modeling_common.py`, run "
        "twice: on the dense host, and where its constructor returns the wrapped model. *Tests* "
        "are those that pass on the dense host: others want the network or a part that this "
        f"selection has not. Made by `python -m benchmarks.upstream` ({versions}; one thread of a "
        "shared CPU).\n"
    )
    head = ["library", "host", "recipe", "tests", "pass wrapped too", "by design otherwise", "fail"]
    lines, notes = list[list[str]](), dict[tuple[str, str], list[str]]()
    for library in HOSTS:
        for host, dense, wrapped in rows(library, work):
            good = [name for name, (how, _) in dense.items() if how == PASSED]
            failed = {n: wrapped.get(n, (FAILED, "did not run")) for n in good}
            failed = {n: (how, said) for n, (how, said) in failed.items() if how == FAILED}
            count = Counter("design" if reason(host, n) else "fail" for n in failed)
            numbers = (len(good), len(good) - len(failed), count["design"], count["fail"])
            recipe = HOSTS[library][host] or "default"
            lines.append([library, f"`{host}`", f"`{recipe}`", *map(str, numbers)])
            for name, (_, said) in failed.items():
                why = reason(host, name) or f"not explained: {said[:200]}"
                notes.setdefault((name, why), []).append(host)
    yield table(head, lines)
    yield "\n## Tests that end otherwise\n"
    if not notes:
        yield "None."
    else:
        cells = [[f"`{n}`", ", ".join(h), why.replace("|", "\\|")] for (n, why), h in notes.items()]
        yield table(["test", "hosts", "why"], cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for, then write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", choices=tuple(FILES), help="only this one")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only matching hosts")
    parser.add_argument("--render-only", action="store_true", help="run nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "upstream")
    asked = parser.parse_args(arguments)
    asked.work.mkdir(parents=True, exist_ok=True)
    work = asked.work.resolve()
    for library in FILES if not asked.render_only else ():
        if asked.library in (None, library):
            file = fetched(library, work)
            for host in filter(lambda name: fnmatch(name, asked.only), HOSTS[library]):
                for wrapped in (False, True):
                    results = read(ran(library, host, file, wrapped=wrapped, work=work))
                    count = Counter(how for how, _ in results.values())
                    print(library, host, "wrapped" if wrapped else "dense", dict(count), flush=True)
    (ROOT / "docs" / "upstream.md").write_text("\n".join(as_page(work)) + "\n")


if __name__ == "__main__":
    main()
