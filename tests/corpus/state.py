"""Nets whose forward writes into what they own: counters, statistics by hand, queues, centres."""

from __future__ import annotations

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


class Counter(nn.Module):
    """Counts its forwards in train mode, in one of several ways."""

    def __init__(self, way: str = "add") -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("many", torch.zeros(4, dtype=torch.long))
        self.way = way

    def count(self) -> None:
        """Count a forward."""
        if self.way == "add":
            self.n += 1
        elif self.way == "data":
            self.n.data.add_(1)
        elif self.way == "copy":
            self.n.copy_(self.n + 1)
        elif self.way == "no_grad":
            with torch.no_grad():
                self.n.add_(1)
        elif self.way == "item":
            self.many[2] += 1
        elif self.way == "slice":
            self.many[1:3].add_(1)
        elif self.way == "out":
            torch.add(self.n, 1, out=self.n)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count()
        return self.fc(self.d(self.c(self.b(self.a(x)))).mean((2, 3)))


class InEval(Counter):
    """Counts in eval mode as well, and scales by the count."""

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.fc(self.d(self.c(self.b(self.a(x)))).mean((2, 3)) / (1 + self.n))


class HandWritten(nn.Module):
    """BatchNorm by hand, as in tutorials."""

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5, *, data: bool = False) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, width, 1, 1)), nn.Parameter(torch.zeros(1, width, 1, 1))
        self.register_buffer("moving_mean", torch.zeros(1, width, 1, 1))
        self.register_buffer("moving_var", torch.ones(1, width, 1, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.momentum, self.eps, self.data = momentum, eps, data

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.gamma * (x - self.moving_mean) / torch.sqrt(self.moving_var + self.eps) + self.beta
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        var = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        n = x.numel() / x.shape[1]
        if self.data:
            self.moving_mean.data.mul_(1 - self.momentum).add_(mean.data * self.momentum)
            self.moving_var.data.mul_(1 - self.momentum).add_(var.data * self.momentum * n / (n - 1))
        else:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.moving_mean.copy_((1 - self.momentum) * self.moving_mean + self.momentum * mean)
                self.moving_var.lerp_(var * n / (n - 1), self.momentum)
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta


class ByHand(nn.Module):
    """Convolutions with a norm of one's own."""

    def __init__(self, norm: type[nn.Module] | partial) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()) for i in (3, 8, 8, 8)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class Renorm(nn.Module):
    """Statistics that correct those of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_std", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, std = x.mean([0, 2, 3]), x.std([0, 2, 3], unbiased=False) + 1e-3
            r = (std.detach() / self.running_std).clamp(0.5, 2.0)
            d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-0.5, 0.5)
            x = (x - mean[:, None, None]) / std[:, None, None] * r[:, None, None] + d[:, None, None]
            self.running_mean += 0.1 * (mean.detach() - self.running_mean)
            self.running_std += 0.1 * (std.detach() - self.running_std)
        else:
            x = (x - self.running_mean[:, None, None]) / self.running_std[:, None, None]
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Centred(nn.Module):
    """Features are centred by an average that is kept, read before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.register_buffer("center", torch.zeros(4, 1, 8))
        self.fc = nn.Linear(8, CLASSES)

    @torch.no_grad()
    def update_center(self, i: int, mean: Tensor) -> None:
        """Move the centre of layer i towards a mean."""
        self.center[i].mul_(0.9).add_(mean * (1 - 0.9))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            x = x - self.center[i].unsqueeze(-1).unsqueeze(-1)
            if self.training:
                self.update_center(i, x.mean((0, 2, 3)).unsqueeze(0))
        return self.fc(x.mean((2, 3)))


class Queue(nn.Module):
    """A queue of features of earlier batches, to which images are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(layer for i in (3, 8, 8, 8) for layer in (nn.Conv2d(i, 8, 3, 1, 1), nn.ReLU())))
        self.register_buffer("queue", F.normalize(torch.randn(8, 16), dim=0))
        self.fc = nn.Linear(8 + 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x).mean((2, 3))
        out = self.fc(torch.cat([h, h @ self.queue.clone()], 1))
        if self.training:
            with torch.no_grad():
                keys = F.normalize(h, dim=1).mean(0)
                self.queue.copy_(torch.cat([self.queue[:, 1:], keys.unsqueeze(1)], 1))
        return out


class Logged(nn.Module):
    """How many units are active, kept in a buffer of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.register_buffer("active", torch.zeros(4, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            self.active[i] = (x > 0).float().mean((0, 2, 3)).detach()
        return self.fc(x.mean((2, 3)))


class Averaged(nn.Module):
    """A copy of a layer that follows it, written without gradients in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        self.follower = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = F.relu(layer(x))
        if self.training:
            with torch.no_grad():
                for mine, other in zip(self.follower.parameters(), self.layers[1].parameters(), strict=True):
                    mine.data.mul_(0.99).add_(other.data, alpha=0.01)
        x = x + 0.1 * self.follower(x)
        for layer in self.layers[2:]:
            x = F.relu(layer(x))
        return self.fc(x.mean((2, 3)))


class Written(nn.Module):
    """Writes into what it owns, in one of many ways, with what leaves its second layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("peak", torch.zeros(8))
        self.register_buffer("queue", torch.zeros(4, 8))
        self.forwards = 0
        self.way = way

    def write(self, x: Tensor) -> None:
        """Write once."""
        mean, peak = x.detach().mean((0, 2, 3)), x.detach().amax((0, 2, 3))
        if self.way == "lerp":
            self.mean.lerp_(mean, 0.1)
        elif self.way == "data":
            self.mean.data = 0.9 * self.mean + 0.1 * mean
        elif self.way == "assigned":
            self.mean = 0.9 * self.mean + 0.1 * mean
        elif self.way == "registered":
            self.register_buffer("mean", 0.9 * self.mean + 0.1 * mean)
        elif self.way == "out":
            torch.maximum(self.peak, peak, out=self.peak)
        elif self.way == "foreach":
            torch._foreach_lerp_([self.mean, self.peak], [mean, peak], 0.1)
        elif self.way == "rolled":
            self.queue.copy_(torch.roll(self.queue, 1, 0))
            self.queue[0] = mean
        elif self.way == "counted":
            self.mean.index_add_(0, x.detach().mean((2, 3)).argmax(1), x.new_ones(len(x)))
        elif self.way == "clipped":
            self.fc.weight.data.clamp_(-0.2, 0.2)
        elif self.way == "replaced":
            self.fc.weight.data = F.normalize(self.fc.weight.data, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if i == 1 and self.training:
                self.write(x)
        return self.fc((x - self.mean[:, None, None]).mean((2, 3)))


class InDict(Written):
    """Its counter is a tensor of a dict, which belongs to nothing."""

    def __init__(self) -> None:
        super().__init__("")
        self.counters = {"n": torch.zeros(1)}

    def write(self, x: Tensor) -> None:
        """Count a forward."""
        self.counters["n"] += 1


class MadeLate(Written):
    """Makes a buffer of its state in the first forward."""

    def write(self, x: Tensor) -> None:
        """Keep what leaves the layer."""
        self.register_buffer("late", x.detach().mean((0, 2, 3)))


class Cumulative(HandWritten):
    """BatchNorm by hand whose statistics are those of all batches, as with ``momentum=None``."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1.0 / self.num_batches_tracked.float()
                self.moving_mean.mul_(1 - share).add_(share * x.mean((0, 2, 3), keepdim=True))
                self.moving_var.mul_(1 - share).add_(share * x.var((0, 2, 3), keepdim=True))
        return F.batch_norm(x, None, None, self.gamma.flatten(), self.beta.flatten(), training=True)


class SpectrallyNormed(nn.Module):
    """The old spectral norm, which writes its vectors in every forward, or that of today."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(norm(nn.Conv2d(i, 8, 3, padding=1)) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
        return self.fc(x.mean((2, 3)))


class StandardisedConv(nn.Conv2d):
    """Weights without mean and of one variance."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std(dim=(1, 2, 3), keepdim=True) + 1e-5), self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    """Standardised convolutions with group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(StandardisedConv(i, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for i in (3, 8, 8, 8))
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def old_weight_norm(module: nn.Module) -> nn.Module:
    """Return a module whose weight a hook makes of size and direction before every forward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is deprecated
        return nn.utils.weight_norm(module)


WAYS = ("lerp", "data", "out", "foreach", "rolled", "counted", "clipped", "replaced")

STATE = (
    Entry("counter_add", partial(Counter, "add")),
    Entry("counter_data", partial(Counter, "data")),
    Entry("counter_copy", partial(Counter, "copy")),
    Entry("counter_no_grad", partial(Counter, "no_grad")),
    Entry("counter_item", partial(Counter, "item")),
    Entry("counter_slice", partial(Counter, "slice")),
    Entry("counter_out", partial(Counter, "out")),
    Entry("counter_in_eval", partial(InEval, "no_grad")),
    Entry("batch_norm_by_hand", partial(ByHand, HandWritten)),
    Entry("batch_norm_by_hand_data", partial(ByHand, partial(HandWritten, data=True))),
    Entry("batch_renorm", partial(ByHand, Renorm)),
    Entry("centred", Centred),
    Entry("queue", Queue),
    Entry("logged_activity", Logged),
    Entry("follower", Averaged),
    *(Entry(f"written_{way}", partial(Written, way)) for way in WAYS),
    *(Entry(f"written_{way}", partial(Written, way), layers=3) for way in ("assigned", "registered")),  # read later
    Entry("counter_in_a_dict", InDict, refused="(?s)neither a buffer nor a parameter.*self.register_buffer"),
    Entry("buffer_made_late", partial(MadeLate, ""), refused="(?s)makes buffer 'late'.*make it in __init__"),
    Entry("batch_norm_cumulative", partial(ByHand, Cumulative)),
    Entry("old_weight_norm", partial(SpectrallyNormed, old_weight_norm)),
    Entry("old_spectral_norm", partial(SpectrallyNormed, nn.utils.spectral_norm)),
    Entry("spectral_norm", partial(SpectrallyNormed, nn.utils.parametrizations.spectral_norm)),
    Entry("weight_norm", partial(SpectrallyNormed, nn.utils.parametrizations.weight_norm)),
    Entry("standardised_weights", Standardised),
)
