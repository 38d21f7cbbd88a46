"""What a training run can be asked to do."""

from __future__ import annotations

import pytest

from localize.errors import OptionError
from localize.recipes.settings import TrainConfig, check_names, settings


def test_the_defaults_are_a_valid_configuration() -> None:
    assert TrainConfig("cifar/resnet20").training()["data"] == "digits"


def test_every_setting_says_what_it_is() -> None:
    assert len(settings()) >= 15
    for item in settings():
        assert item.metadata["help"], item.name
        assert item.metadata["type"] in (int, float, str, bool, tuple), item.name
        assert item.default is None or isinstance(item.default, item.metadata["type"]), item.name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs cannot be 0.\n  --epochs: passes over the training images; it must be at least 1"),
        ("epochs", 2.5, "epochs cannot be 2.5.\n  --epochs: .*; it must be a whole number."),
        ("epochs", True, "epochs cannot be True"),
        ("max_steps", 0, "max_steps cannot be 0"),
        ("batch_size", -1, "batch_size cannot be -1"),
        ("lr", 0.0, "lr cannot be 0.0.\n  --lr: learning rate after warm-up; it must be above 0"),
        ("lr", float("nan"), "lr cannot be nan"),
        ("lr", float("inf"), "lr cannot be inf"),
        ("lr", "0.1", "lr cannot be '0.1'.\n  .* must be a number"),
        ("weight_decay", -1e-4, "weight_decay cannot be -0.0001"),
        ("seed", -1, "seed cannot be -1"),
        ("workers", -1, "workers cannot be -1"),
        ("data", 3, "data cannot be 3"),
        ("pretrained", 1, "pretrained cannot be 1.\n  .* must be true or false.\n  help: leave out --pretrained"),
        ("output", 3, "output cannot be 3.\n  --output: run folder; .*; it must be text.\n  help: leave out --output"),
        ("sched", "cosin", "sched cannot be 'cosin'.\n  its values are cosine.*\n  help: did you mean 'cosine'"),
        ("gamma", 0.0, "gamma cannot be 0.0.\n  .* must be above 0"),
        ("warmup_lr", -0.1, "warmup_lr cannot be -0.1"),
        ("milestones", "2,x", "milestones cannot be '2,x'.\n  .* must be a list of whole numbers"),
        ("milestones", [], "milestones cannot be empty.\n  they are numbers of epochs"),
        ("milestones", [3, 2], "milestones cannot be 3,2.\n  they are numbers of epochs, from 1, each larger"),
        ("milestones", [2, 2], "milestones cannot be 2,2."),
        ("milestones", [0, 2], "milestones cannot be 0,2."),
        ("milestones", [1.5], "milestones cannot be 1.5."),
        ("milestones", [True], "milestones cannot be True."),
        ("download", "yes", "download cannot be 'yes'.\n  .* must be true or false.\n  help: leave out --download"),
        ("download", 1, "download cannot be 1."),
        ("augment", "crop", "augment cannot be 'crop'.\n  its values are none, .*\n  help: did you mean 'crop"),
        ("pixel_mean", 0.5, "pixel_mean cannot be 0.5.\n  .* must be a list of numbers"),
        ("pixel_mean", [0.5, "x"], "pixel_mean cannot be 0.5,x.\n  .* must be a list of numbers"),
        ("pixel_mean", [True], "pixel_mean cannot be True."),
        ("pixel_std", [0.5, 0.0], "pixel_std cannot be 0.5,0.0.\n  --pixel-std: standard deviation.* must be above 0"),
        ("pixel_std", [float("inf")], "pixel_std cannot be inf."),
        ("amp", 1, "amp cannot be 1.\n  .* must be true or false.\n  help: leave out --amp"),
        ("clip_grad", 0, "clip_grad cannot be 0.\n  --clip-grad: scale gradients .*; it must be above 0."),
        ("grad_accum_steps", True, "grad_accum_steps cannot be True.\n  .* must be a whole number"),
        ("model_ema_decay", 1, "model_ema_decay cannot be 1.\n  .* must be below 1"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name: str, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrainConfig("cifar/resnet20", **{name: value})


def test_warm_up_must_leave_something_of_the_epochs() -> None:
    TrainConfig("cifar/resnet20", epochs=3, warmup_epochs=2)
    with pytest.raises(OptionError, match="3 epochs of warm-up leave nothing of 3 epochs.*\n.*\n  help: .* 0 to 2"):
        TrainConfig("cifar/resnet20", epochs=3, warmup_epochs=3)


def test_warm_up_without_a_schedule_is_refused() -> None:
    with pytest.raises(OptionError, match="--sched constant"):
        TrainConfig("cifar/resnet20", sched="none", warmup_epochs=1)


def test_weights_come_from_one_place() -> None:
    with pytest.raises(OptionError, match="--pretrained and --initial-checkpoint were both given"):
        TrainConfig("cifar/resnet20", pretrained=True, initial_checkpoint="weights.pt")


def test_float16_is_a_type_of_autocast() -> None:
    assert TrainConfig("cifar/resnet20", amp=True, amp_dtype="float16").scales
    assert not TrainConfig("cifar/resnet20", amp=True).scales
    with pytest.raises(OptionError, match="which is off.\n  help: --amp --amp-dtype float16"):
        TrainConfig("cifar/resnet20", amp_dtype="float16")


def test_steps_need_milestones() -> None:
    with pytest.raises(OptionError, match="needs milestones.*\n.*\n  help: --milestones 200,300"):
        TrainConfig("cifar/resnet20", sched="multistep")
    assert TrainConfig("cifar/resnet20", sched="multistep", milestones=[2, 3]).milestones == (2, 3)


def test_a_single_epoch_is_not_trained_with_learning_rate_0() -> None:
    TrainConfig("cifar/resnet20", sched="full-cosine", epochs=2)
    with pytest.raises(OptionError, match="learning rate 0.*\n  help: --epochs 2"):
        TrainConfig("cifar/resnet20", sched="full-cosine", epochs=1)


def test_lists_become_tuples() -> None:
    config = TrainConfig("cifar/resnet20", pixel_mean=[0.5], pixel_std=[0.2, 1, 0.3], download=True)
    assert (config.pixel_mean, config.pixel_std, config.download) == ((0.5,), (0.2, 1, 0.3), True)


def test_a_setting_that_does_not_exist_is_answered_with_the_nearest() -> None:
    check_names(["lr", "epochs"])
    with pytest.raises(OptionError, match="no training setting 'batchsize'.*\n.*\n  help: did you mean 'batch_size'"):
        check_names(["lr", "batchsize"])
