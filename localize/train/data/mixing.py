"""Mix the images of a batch, and their labels: mixup and CutMix, as timm does.

H. Zhang, M. Cisse, Y. N. Dauphin, D. Lopez-Paz. mixup: beyond empirical risk minimization. ICLR 2018.
S. Yun, D. Han, S. J. Oh, S. Chun, J. Choe, Y. Yoo. CutMix: regularization strategy to train strong classifiers with
localizable features. ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed: each batch with its own reverse, with one share for all images.

    If both kinds are used, each batch uses one of them with equal probability, as in timm's training script.
    """

    mixup: float
    """alpha of mixup, whose share is drawn from Beta(alpha, alpha); 0 turns mixup off."""
    cutmix: float
    """alpha of CutMix. At least one of the two is not 0."""
    classes: int

    def begun(self, generator: torch.Generator, rank: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return a function that mixes the batches of one pass, in order.

        Args:
            generator: its current state determines the random numbers of the pass, and is not changed.
            rank: rank of the process; each process draws its own numbers.

        Returns:
            A function of images (N, C, H, W), N even, which it overwrites, and class ids (N,). It returns the mixed
            images and soft labels (N, Z), float32.
        """
        twin = torch.Generator()
        twin.set_state(generator.get_state())
        seed = int(torch.randint(2**32, (1,), generator=twin))
        draws = np.random.RandomState([seed, rank])
        mixed = Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=self.classes)

        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            before = np.random.get_state()
            np.random.set_state(draws.get_state())  # timm draws from numpy's global generator
            try:
                return mixed(images, labels)
            finally:
                draws.set_state(np.random.get_state())
                np.random.set_state(before)

        return mix
