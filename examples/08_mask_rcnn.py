"""Take the backbone of a run into torchvision's Mask R-CNN, and train it on boxes and masks in COCO's format.

The downstream task of AugLocal (Ma et al., ICLR 2024, appendix A.7): a ResNet-34 that was trained by local losses on
ImageNet is the backbone of Mask R-CNN, which AdamW trains for 12 epochs (1x) with batches of 16. Backprop's backbone is
another run. With the run of a ResNet-34 and COCO 2017 at hand::

    localize train -r auglocal-resnet34-imagenet --data-dir IMAGENET --output runs/resnet34
    python examples/08_mask_rcnn.py runs/resnet34 --images COCO/train2017 \\
        --annotations COCO/annotations/instances_train2017.json --epochs 12 -b 16 --device cuda -o detector.pt

It prints the number of parameters of the backbone, and the mean loss of each epoch. COCO's average precision needs
pycocotools, and is not computed here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.transforms.functional import to_tensor

import localize

STAGES = ("layer1", "layer2", "layer3", "layer4")


class CocoInstances(Dataset):
    """Images with boxes and masks from a file in COCO's format; masks are polygons, and crowds are left out."""

    def __init__(self, images: str | Path, annotations: str | Path) -> None:
        told = json.loads(Path(annotations).read_text(encoding="utf-8"))
        self.folder = Path(images)
        ids = sorted(category["id"] for category in told["categories"])
        self.labels = {category: number for number, category in enumerate(ids, start=1)}  # 0 is the background
        self.objects: dict[int, list[dict]] = {}
        for one in told["annotations"]:
            if not one.get("iscrowd") and isinstance(one["segmentation"], list) and min(one["bbox"][2:]) > 0:
                self.objects.setdefault(one["image_id"], []).append(one)
        self.images = [image for image in told["images"] if image["id"] in self.objects]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.images[index]
        objects = self.objects[image["id"]]
        with Image.open(self.folder / image["file_name"]) as opened:
            pixels = to_tensor(opened.convert("RGB"))
        corners = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in objects)])
        masks = torch.stack([mask(one["segmentation"], pixels.shape[1:]) for one in objects])
        labels = torch.tensor([self.labels[one["category_id"]] for one in objects])
        return pixels, {"boxes": corners.float(), "labels": labels, "masks": masks}


def mask(polygons: list[list[float]], size: torch.Size) -> Tensor:
    """Return the inside of polygons as uint8 (H, W)."""
    picture = Image.new("L", (size[1], size[0]))
    for polygon in polygons:
        ImageDraw.Draw(picture).polygon(polygon, fill=1)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size)


def detector(model: nn.Module, classes: int, *, mean: tuple[float, ...], std: tuple[float, ...], size: int) -> MaskRCNN:
    """Return Mask R-CNN over the stages of a ResNet of torchvision or timm, which are shared.

    Args:
        model: has the stages layer1 to layer4; what follows them is not used.
        classes: number of classes, the background left out.
        mean: of the pixels of each channel, as the model was trained with.
        std: the same.
        size: length of the shorter side that images are resized to.
    """
    width = [block for block in model.get_submodule(STAGES[-1]).modules() if isinstance(block, nn.BatchNorm2d)][-1]
    channels = [width.num_features >> (len(STAGES) - 1 - i) for i in range(len(STAGES))]
    layers = {name: str(i) for i, name in enumerate(STAGES)}
    backbone = BackboneWithFPN(model, layers, channels, 256)
    return MaskRCNN(backbone, classes + 1, image_mean=mean, image_std=std, min_size=size, max_size=2 * size)


def train_one_epoch(net: MaskRCNN, loader: DataLoader, optimizer: torch.optim.Optimizer, device: str) -> float:
    """Return the mean of the loss: of proposals, classes, boxes and masks together."""
    net.train()
    losses = []
    for images, targets in loader:
        moved = [{name: value.to(device) for name, value in target.items()} for target in targets]
        loss = sum(net([image.to(device) for image in images], moved).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def together(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[tuple, tuple]:
    """Return images and targets: images differ in size, and make no tensor."""
    images, targets = zip(*batch, strict=True)
    return images, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run of a ResNet, as localize train has left it")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--annotations", required=True, help="file in COCO's format")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("-b", "--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=800, help="shorter side of the images")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", default="detector.pt")
    given = parser.parse_args()

    torch.manual_seed(0)
    run = localize.load(given.run)
    parameters = sum(p.numel() for name, p in run.model.named_parameters() if name.split(".")[0] not in ("fc",))
    print(f"backbone: {type(run.model).__name__}, {parameters} parameters, loaded from {given.run}")
    data = CocoInstances(given.images, given.annotations)
    how = run.preprocessing
    net = detector(run.model, len(data.labels), mean=how.mean, std=how.std, size=given.size).to(given.device)
    loader = DataLoader(data, given.batch_size, shuffle=True, num_workers=given.workers, collate_fn=together)
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=given.lr, weight_decay=0.05)
    for epoch in range(1, given.epochs + 1):
        print(f"epoch {epoch}: loss {train_one_epoch(net, loader, optimizer, given.device):.4f}")
    torch.save(net.state_dict(), given.output)


if __name__ == "__main__":
    main()
