"""A network of one's own in every command: see the README, section Encoders."""

from torch import nn

import spark_me
from spark_me import cli


def tinynet(in_channels):
    def stage(inputs, outputs, step):
        convolution = nn.Conv2d(outputs, outputs, 3, padding=1, groups=4)
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, step, step), nn.GroupNorm(8, outputs), nn.GELU(), convolution, nn.SiLU()
        )

    return nn.Sequential(stage(in_channels, 32, 4), stage(32, 64, 2), stage(64, 128, 2))


spark_me.register_encoder("tinynet", tinynet)
if __name__ == "__main__":
    raise SystemExit(cli.main())
