"""Measure how far each layer of trained encoders is from f(T_g x) = Γ_g f(x), before and after training.

    python experiments/equivariance.py RUN [RUN ...] [--images 200]

For layer l the error is ‖f_l(T_g x) - Γ_g f_l(x)‖ / ‖Γ_g f_l(x)‖ over test images x, averaged over all group elements g
but the identity: 0 where Eq. (1) holds exactly, about 1.4 for unrelated features. Rotation and scale are compared on
the base space, all that the head reads; translation on the whole map, so the zeros that enter at its border count.
Writes experiments/results/equivariance_error.json and prints a table per run.
"""
import argparse
import json
from pathlib import Path

import torch

from runs import load_run, run                                                 # first: it finds the project's modules
from hssl import Crops, Translation, equivariance_error
from layers import Untied
from report import RESULTS


def elements_of(group):
    """The group's elements but the identity; shifts by one position if there are no others, as with whole maps."""
    elements = [g for g in group.elements if g.any()]
    if not elements and not isinstance(group, (Translation, Crops)):
        run.stop("the group has one element, the identity, so nothing moves: take a smaller base space")
    return torch.stack(elements) if elements else torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])


def on_layer(group, image_side, layer_side):
    """The group as it moves a layer's map, and its elements but the identity. Shifts are counted in positions, of which
    an earlier layer has more: there a shift of the same pixels has a larger g."""
    elements = elements_of(group)
    if isinstance(group, (Translation, Crops)):
        shifts, stride = getattr(group, "shifts", group), image_side // layer_side
        # window=1 allows the largest shifts
        return Translation(layer_side, 1, stride, shifts.circular), elements * (shifts.stride // stride)
    return group, elements


@torch.no_grad()
def layer_errors(encoder, group, x):
    """Every layer's errors, {layer: one for each element but the identity}, on images x (B, C, H, W), in evaluation
    mode. Layers without a map are left out; a network that is no nn.Sequential counts as one layer."""
    untied, errors = isinstance(encoder, Untied), {}
    network = encoder.network if untied else encoder
    network = list(network) if isinstance(network, torch.nn.Sequential) else [network]
    for count, layer in enumerate(network, 1):
        first = torch.nn.Sequential(*network[:count]).eval()

        def f(x):
            z = first(x)
            if untied:
                return z.squeeze(2).unflatten(1, (-1, encoder.group_size))
            return z[:, :, None] if z.ndim == 4 and shifts else z              # an ordinary network's map

        shifts = isinstance(group, (Translation, Crops))
        z = f(x[:1])
        if z.ndim == 5:
            moves, elements = on_layer(group, x.shape[-1], z.shape[-1])
            errors[f"{count} {type(layer).__name__}"] = equivariance_error(f, moves, x, elements, on_base=not shifts)
    return errors


def main():
    p = run.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="+", help="folders of runs, the --out of train.py")
    p.add_argument("--images", type=run.number(int, 1), default=200, help="test images, at most (default: %(default)s)")
    p.add_argument("--data-dir", help="folder of the data sets (default: the run's own)")
    p.add_argument("--results", default=str(RESULTS), help="folder of the JSON file (default: experiments/results)")
    args = p.parse_args()
    found = {}
    for folder in map(Path, args.run):
        settings, data, group, *objectives = load_run(folder, args.data_dir)
        x = data.batch(data.test_images, torch.arange(min(args.images, len(data.test_images))))
        before, after = ({layer: errors.mean().item() for layer, errors in layer_errors(o.encoder, group, x).items()}
                         for o in objectives)
        settings = {key: settings[key] for key in settings if key not in ("out", "data_dir")}
        found[folder.name] = dict(before=before, after=after, settings=settings, torch=torch.__version__)
        print(f"\n{folder.name}\n\n| layer | before training | after |\n| --- | --- | --- |")
        for layer in before:
            print(f"| {layer} | {before[layer]:.2g} | {after[layer]:.2g} |")
    Path(args.results).mkdir(parents=True, exist_ok=True)
    (Path(args.results) / "equivariance_error.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
