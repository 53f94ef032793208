"""SparK in a plain PyTorch loop: a folder of images, any convnet of timm, no labels.

    python examples/pretrain.py FOLDER --network resnet26d --epochs 100 --out resnet26d.pth

The trainer (`spark-me pretrain`) adds what long runs need: checkpoints, several GPUs, resuming bit by bit, pictures.
"""

import argparse
from pathlib import Path

import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import spark_me

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--network", default="resnet26d", help="as timm calls it")
parser.add_argument("--image-size", type=int, default=224)
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=2e-4)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--out", type=Path, default=Path("pretrained.pth"))


class Images(Dataset):
    """All images below a folder, cropped and flipped at random: [3, size, size], normalised as for ImageNet."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.transform = v2.Compose([
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(0.67, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def main() -> None:
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = Images(args.folder, args.image_size)
    if not len(images):
        parser.error(f"{args.folder}: no .jpg and no .png in it")
    loader = DataLoader(images, args.batch_size, shuffle=True, num_workers=args.workers)

    network = timm.create_model(args.network)
    model = spark_me.build_model(network, image_size=args.image_size, mask_ratio=0.6, decoder_width=256).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * len(loader), pct_start=0.1)

    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for batch in loader:
            loss = model(batch.to(device))  # draws a mask, encodes visible pixels alone, reconstructs hidden patches
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(loader):.4f} (predicting zero: about 1.0)", flush=True)

    weights = spark_me.export_weights(model, layout="dense")  # timm's own names and shapes, without the classifier
    torch.save(weights, args.out)
    print(f"timm.create_model({args.network!r}).load_state_dict(torch.load({str(args.out)!r}), strict=False)")


if __name__ == "__main__":
    main()
