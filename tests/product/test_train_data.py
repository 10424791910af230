"""Images: the digits, folders with their faults, and augmentation that depends on nothing else."""

import gzip
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tokenprune.errors import PlanError
from tokenprune.recipe.schema import TrainSection
from tokenprune.train import DataBundle, DataError, load_data
from tokenprune.train.images import EpochView

CONFIG = TrainSection(random_erasing=0.5, rand_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)


def folder(root: Path, classes: dict[str, int], size: int = 12) -> Path:
    """A class folder with so many images of each class, each class of one colour."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (size, size + 4), (80 * label, 255, 0)).save(
                root / name / f"{index}.png"
            )
    return root


def pixels(data: DataBundle, part: str = "eval") -> torch.Tensor:
    images: Any = getattr(data, part)
    return torch.stack([images[i]["pixel_values"] for i in range(len(images))])


def test_digits_are_split_the_same_way_every_time() -> None:
    data, again = load_data(None, 16), load_data("digits", 16, in_chans=1, seed=7)
    assert (len(data.train), len(data.eval), data.num_classes) == (1437, 360, 10)  # type: ignore[arg-type]
    assert data.class_names == tuple("0123456789")
    assert data.eval.labels == again.eval.labels  # type: ignore[attr-defined]
    counts = np.bincount(data.eval.labels)  # type: ignore[attr-defined]
    assert counts.min() >= 34
    item = data.eval[0]
    assert item["pixel_values"].shape == (3, 16, 16)
    assert again.eval[0]["pixel_values"].shape == (1, 16, 16)
    assert item["pixel_values"].min() == -1


def test_no_digit_is_in_both_parts() -> None:
    data = load_data(None, 16)
    parts: list[Any] = [data.train, data.eval]
    seen = [{image.tobytes() for image in part.images} for part in parts]
    assert [len(part) for part in seen] == [1437, 360]
    assert not seen[0] & seen[1]


def test_pixels_come_back_from_the_normalised_ones() -> None:
    data = load_data(None, 8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images: Any = data.eval
    expected = np.asarray(images.open(3), dtype=np.float32) / 255
    found = data.to_pixels(images[3]["pixel_values"]).permute(1, 2, 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_folder_with_train_and_val(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"ant": 3, "bee": 4})
    folder(tmp_path / "val", {"bee": 1, "ant": 2})
    data = load_data(tmp_path, 8)
    assert data.class_names == ("ant", "bee")
    assert data.name == tmp_path.name
    assert (len(data.train), len(data.eval)) == (7, 3)  # type: ignore[arg-type]
    assert data.eval.labels == [0, 0, 1]  # type: ignore[attr-defined]
    assert data.train[0]["pixel_values"].shape == (3, 8, 8)


def test_one_folder_is_split_class_by_class(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 10, "bee": 5, "cat": 2})
    data, again = (load_data(str(tmp_path), 8, held_out=0.3, seed=1) for _ in range(2))
    assert np.bincount(data.eval.labels).tolist() == [3, 2, 1]  # type: ignore[attr-defined]
    assert np.bincount(data.train.labels).tolist() == [7, 3, 1]  # type: ignore[attr-defined]
    assert data.eval.images == again.eval.images  # type: ignore[attr-defined]
    other: Any = load_data(tmp_path, 8, held_out=0.3, seed=2).eval
    assert data.eval.images != other.images  # type: ignore[attr-defined]


def test_augmentation_depends_on_seed_epoch_and_image_only(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 6, "bee": 6}, size=24)
    train: Any = load_data(tmp_path, 16, train=CONFIG, seed=3).train
    view = EpochView(train)
    first = [view[key]["pixel_values"] for key in range(2 * len(view))]

    def again(workers: int) -> list[torch.Tensor]:
        keys = list(reversed(range(2 * len(view))))
        loader = DataLoader(view, batch_size=1, sampler=keys, num_workers=workers)
        return [batch["pixel_values"][0] for batch in loader][::-1]

    for workers in (0, 2):
        assert all(map(torch.equal, first, again(workers)))
    assert not torch.equal(first[0], first[len(view)])
    other: Any = load_data(tmp_path, 16, train=CONFIG, seed=4).train
    assert not torch.equal(first[0], other[0]["pixel_values"])


def test_augmentation_leaves_random_states_alone() -> None:
    train: Any = load_data(None, 16, train=CONFIG).train
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    train.at(5, epoch=2)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_data_set_without_looks_is_the_same_in_every_epoch() -> None:
    view = EpochView([10, 20, 30])  # type: ignore[arg-type]
    assert [view[key] for key in range(6)] == [10, 20, 30, 10, 20, 30]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (None, None, r"needs one subfolder for each of at least two classes, found none"),
        ({"ant": 2}, {"ant": 2}, r"at least two classes, found only 'ant'"),
        ({"ant": 2, "bee": 0}, {"ant": 1, "bee": 1}, r"Class 'bee' has no image in .*train"),
        ({"ant": 2, "bee": 2}, {"ant": 1, "bee": 0}, r"Class 'bee' has no image in .*val"),
        ({"ant": 2, "bee": 2}, {"ant": 1, "cat": 1}, r"only one of them has \['bee', 'cat'\]"),
        ({"ant": 2, "bee": 2}, None, r"lacks val/"),
        (None, {"ant": 2, "bee": 2}, r"lacks train/"),
    ],
)
def test_faults_of_a_folder_are_named(
    tmp_path: Path, train: dict[str, int] | None, val: dict[str, int] | None, message: str
) -> None:
    for name, classes in (("train", train), ("val", val)):
        if classes is not None:
            folder(tmp_path / name, classes)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path, 8)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(DataError, match=rf"image folder {re.escape(repr(str(missing)))} does not"):
        load_data(missing, 8)
    missing.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load_data(missing, 8)


def test_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 5, "bee": 1})
    with pytest.raises(DataError, match=r"Class 'bee' has one image"):
        load_data(tmp_path, 8)


def test_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    folder(tmp_path, {"ant": 2, "bee": 2})
    for name in ("0.png", "1.png"):
        (tmp_path / "ant" / name).write_text("no image")
    data = load_data(tmp_path, 8)
    with pytest.raises(DataError, match=r"Cannot read image .*ant.[01]\.png"):
        data.train[0]


def test_arguments_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"held_out must lie in \(0, 1\], got 1\.5"):
        load_data(tmp_path, 8, held_out=1.5)
    with pytest.raises(DataError, match=r"mean has 1 numbers and std 3, .* 3 channels"):
        load_data(None, 8, mean=(0.5,))
    with pytest.raises(PlanError, match="1 or 3 channels, the host takes 4"):
        load_data(None, 8, in_chans=4)


def write_idx(root: Path, part: str, images: Any, labels: Any, zipped: bool = False) -> None:
    """Two files as MNIST's."""
    for name, array in (
        (f"{part}-images-idx3-ubyte", images),
        (f"{part}-labels-idx1-ubyte", labels),
    ):
        array = np.asarray(array, dtype=np.uint8)
        data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        data += array.tobytes()
        path = root / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_in_order(tmp_path: Path, zipped: bool) -> None:
    images = np.arange(3 * 8 * 8).reshape(3, 8, 8) % 256
    write_idx(tmp_path, "train", images, [0, 2, 1], zipped)
    write_idx(tmp_path, "t10k", images[::-1], [1, 2, 0], zipped)
    data = load_data(tmp_path, 8, in_chans=1, mean=(0.0,), std=(1.0,))
    assert data.num_classes == 3
    assert [data.train[i]["labels"] for i in range(3)] == [0, 2, 1]
    assert [data.eval[i]["labels"] for i in range(3)] == [1, 2, 0]
    assert torch.equal(data.eval[2]["pixel_values"][0] * 255, torch.tensor(images[0]).float())


def test_idx_files_that_are_missing_cut_off_or_uneven_are_refused(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8))
    write_idx(tmp_path, "train", images, [0, 1, 1])
    with pytest.raises(DataError, match="lacks t10k-images-idx3-ubyte"):
        load_data(tmp_path, 8, in_chans=1)
    write_idx(tmp_path, "t10k", images, [0, 1])
    with pytest.raises(DataError, match="3 images to evaluate on and 2 labels"):
        load_data(tmp_path, 8, in_chans=1)
    write_idx(tmp_path, "t10k", images, [0, 1, 5])
    with pytest.raises(DataError, match="labels 0 to 1 to train on, but 5 to evaluate on"):
        load_data(tmp_path, 8, in_chans=1)
    short = tmp_path / "t10k-images-idx3-ubyte"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(DataError, match="no idx file of unsigned bytes in 3 dims, or was cut off"):
        load_data(tmp_path, 8, in_chans=1)
    short.unlink()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"Cannot read .*t10k-images-idx3-ubyte.gz"):
        load_data(tmp_path, 8, in_chans=1)


def test_all_of_a_folder_is_to_evaluate_on(tmp_path: Path) -> None:
    data = load_data(folder(tmp_path, {"cat": 3, "dog": 1}), 16, held_out=1)
    assert (len(data.train), len(data.eval)) == (0, 4)
