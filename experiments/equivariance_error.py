"""How far each layer of a trained encoder is from f(T_g x) = Γ_g f(x), before and after training.

    python experiments/equivariance_error.py RUN [RUN ...] [--images 200]

For every layer l, over images x and random elements g that are not the identity, the other image x' being the next in the batch:

    error(l) = ||f_l(T_g x) - Γ_g f_l(x)|| / ||f_l(T_g x') - Γ_g f_l(x)||

0 where Eq. (1) holds exactly; 1 where T_g x is no nearer to what Γ_g foretells than another image is. Zeros that enter at the
border count. Writes experiments/results/equivariance_error.json and prints a table a run.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data as datasets                                                                              # noqa: E402
from hssl import Product, Translation, crop, on_maps                                                 # noqa: E402
from layers import Untied                                                                            # noqa: E402
from probe import build, load_checkpoint                                                             # noqa: E402
from report import RESULTS                                                                           # noqa: E402


def Γ_at(group, g, z, side):
    """Γ_g on a layer's features (B, C, G, H, W), whose positions may be finer than the last layer's side x side."""
    if isinstance(group, Product):
        return Γ_at(group.shifts, g[:, :2], group.other.Γ(g[:, 2], z), side)
    if isinstance(group, Translation):
        finer = z.shape[-1] // side
        return on_maps(z, lambda maps: crop(maps, -g * finer, maps.shape[-2:], group.reach * finer, group.circular))
    return group.Γ(g, z)


@torch.no_grad()
def errors(encoder, group, x, g):
    """Every layer's error: {layer: float}, from images x (B, C, H, W) and elements g, one an image."""
    network, elements = (encoder.network, encoder.elements) if isinstance(encoder, Untied) else (encoder, None)
    found = {}

    def keep(name):
        return lambda module, inputs, z: found.setdefault(name, []).append(z if elements is None else z.squeeze(2).unflatten(1, (-1, elements)))

    hooks = [layer.register_forward_hook(keep(f"{i + 1} {type(layer).__name__}")) for i, layer in enumerate(network)]
    side = encoder.eval()(x).shape[-1]
    encoder(group.T(g, x))
    for hook in hooks:
        hook.remove()
    layers = {name: (Γ_at(group, g, z, side), moved) for name, (z, moved) in found.items() if z.ndim == 5}
    return {name: ((moved - expected).norm() / (moved.roll(1, 0) - expected).norm()).item() for name, (expected, moved) in layers.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="folders of runs, the --out of train.py")
    parser.add_argument("--images", type=int, default=200, help="test images to measure on")
    parser.add_argument("--data-dir", help="folder of the data sets; the run's own when not given")
    args = parser.parse_args()
    results = {}
    for run in args.run:
        checkpoint = load_checkpoint(Path(run) / "checkpoint.pt")
        settings = checkpoint["settings"]
        data = datasets.load(settings["dataset"], args.data_dir or settings["data_dir"], train_images=1000)
        x = data.batch(data.test_images, torch.arange(args.images))
        torch.manual_seed(settings["seed"])                     # the weights that the training began with
        encoder, group = build(settings, x.shape[1], x.shape[-1])
        update_bn([data.batch(data.train_images, torch.arange(1000))], encoder)
        others = [g for g in group.elements if g.any()]
        g = torch.stack([others[i] for i in torch.randint(len(others), (len(x),))])
        before = errors(encoder, group, x, g)
        encoder.load_state_dict(checkpoint["encoder"])
        after = errors(encoder, group, x, g)
        results[Path(run).name] = dict(before=before, after=after, settings=settings, torch=torch.__version__)
        print(f"\n{Path(run).name}\n\n| layer | before training | after |\n| --- | --- | --- |")
        for name in before:
            print(f"| {name} | {before[name]:.2g} | {after[name]:.2g} |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "equivariance_error.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
