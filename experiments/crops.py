"""A-SSL whose views are crops of the images, for the paper's sweep of crop sizes.

    python experiments/crops.py --method a-ssl --base-space 2 --max-distance 2 [flags of train.py]

A crop is what H-SSL's window stands on: --base-space positions of the encoder's stride a side, with
corners that are at most --max-distance positions apart. The encoder sees the crop alone.
"""
import report    # comes first: it puts the project's folder on the path
import train
from hssl import Translation


class Crops(Translation):
    """T_g cuts out the pixels that the window of Γ_g z stands on; their features are the view."""

    def T(self, g, x):    # (B, C, stride · base_size, stride · base_size)
        first = self.stride * self.first
        window = slice(first, first + self.stride * self.base_size)
        return super().T(g, x)[:, :, window, window]

    def base(self, z):
        return z


def parse(argv=None):
    """train.py's settings, with a method of its own, by which --resume tells the runs apart."""
    args = train.parse(argv)
    if (args.method, args.group, args.structure) != ("a-ssl", "translation", "group"):
        raise ValueError("crops are for --method a-ssl by translation, with structure")
    args.method = "crops"
    return args


def main(argv=None):
    args = parse(argv)
    train.Translation = Crops    # train.py makes this group
    train.main(args)


if __name__ == "__main__":
    report.run(main)
