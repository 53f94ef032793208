"""The examples, run as they stand."""

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from classifier_files import save_image

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_loop_trains_weights_that_timm_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    for number in range(6):
        save_image(tmp_path / "images" / "deep" / f"{number}.png", number, (70, 90))
    words = f"pretrain.py {tmp_path}/images --network test_resnet --image-size 64 --epochs 3 --batch-size 3 --workers 0"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--lr", "1e-2", "--out", str(tmp_path / "w.pth")])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / "pretrain.py"), run_name="__main__")
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(losses) == 3 and losses[-1] < losses[0]
    torch.manual_seed(0)
    network = timm.create_model("test_resnet")
    before = network.layer1[0].conv1.weight.clone()
    keys = network.load_state_dict(torch.load(tmp_path / "w.pth", weights_only=True), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) == {"fc.weight", "fc.bias"}
    assert not torch.equal(network.layer1[0].conv1.weight, before)


def test_the_own_network_is_the_readmes() -> None:
    own = (EXAMPLES / "tinynet.py").read_text(encoding="utf-8").partition("\n\n")[2]
    assert f"```python\n# tinynet.py\n{own}```" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
