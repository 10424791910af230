"""`all_or_nothing`: a folder with all of its files, or the one that was there before."""

from pathlib import Path

import pytest

from tokenprune.files import all_or_nothing


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("there", [False, True])
def test_files_are_moved_if_the_block_succeeds(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er"
    if there:
        target.mkdir(parents=True)
        (target / "a").write_text("old")
        (target / "other").write_text("mine")
    with all_or_nothing(target, last="b") as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        assert (target / "a").exists() == there
    expected = {"a": "new", "b": "new", **({"other": "mine"} if there else {})}
    assert contents(target) == expected
    assert list(target.parent.iterdir()) == [target]


def write_newer(target: Path, name: str) -> None:
    with all_or_nothing(target, last="c") as folder:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("newer")
        (folder / "weights").write_text("newer")


def test_folders_are_merged(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with all_or_nothing(tmp_path, last="b") as folder:
            (folder / "deep" / "er").mkdir(parents=True)
            for name in ("b", "weights", f"deep/{text}", "deep/er/a"):
                (folder / name).write_text(text)
    found = {file.name: file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    assert found == {"b": "new", "weights": "new", "old": "old", "new": "new", "a": "new"}
    for wrong, error in (("b/a", FileExistsError), ("deep", IsADirectoryError)):
        with pytest.raises(error):
            write_newer(tmp_path, wrong)
    assert (tmp_path / "weights").read_text() == "new"


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_moved_if_it_fails(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    if there:
        target.mkdir()
        (target / "a").write_text("old")

    def fail() -> None:
        with all_or_nothing(target, last="a") as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == ([target] if there else [])
    assert not there or contents(target) == {"a": "old"}


def test_the_last_file_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = Path.replace

    def note(source: Path, target: Path) -> Path:
        moved.append(source.name)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", note)
    with all_or_nothing(tmp_path, last="b") as folder:
        for name in "abc":
            (folder / name).write_text(name)
    assert sorted(moved) == ["a", "b", "c"]
    assert moved[-1] == "b"
