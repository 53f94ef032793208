"""What a classifier learns: soft targets, mixed over images, under cross-entropy or its binary form."""

from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from spark_me.config_finetune import FinetuneTrainConfig


class SoftTargets:
    """The loss of `train.loss`, with label smoothing, MixUp (arXiv 1710.09412) and CutMix (1905.04899)."""

    def __init__(self, train: FinetuneTrainConfig, classes: int) -> None:
        """
        Args:
            train: with the loss, the smoothing and both alphas.
            classes: K.
        """
        self.classes = classes
        self.binary = train.loss == "bce"
        self.smoothing = train.label_smoothing
        mixings = [
            kind(alpha=alpha, num_classes=classes)
            for kind, alpha in ((v2.MixUp, train.mixup), (v2.CutMix, train.cutmix))
            if alpha
        ]
        self.mixing = v2.RandomChoice(mixings) if mixings else None

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and targets float32 [B, K] of a batch; draws from torch's default generator."""
        if self.mixing is None:
            return images, functional.one_hot(labels, self.classes).float()
        mixed, targets = self.mixing(images, labels)
        return mixed, targets.float()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over images of logits [B, K]; in the binary form, of the sum over classes, as in mmpretrain."""
        smooth = targets * (1 - self.smoothing) + self.smoothing / self.classes
        if self.binary:
            each = functional.binary_cross_entropy_with_logits(logits.float(), smooth, reduction="none")
            return each.sum(dim=1).mean()
        return functional.cross_entropy(logits.float(), smooth)
