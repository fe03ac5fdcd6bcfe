"""The detached classifier: one linear layer on the representation of a frozen encoder.

    python probe.py RUN

reads RUN/config.json and RUN/checkpoint.pt, which train.py wrote, trains the classifier, and writes RUN/probe.json.

Letters: N images, D numbers per representation, C channels, G group axis, H W space.
"""
import argparse
import json
import pickle
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

import data as datasets
from hssl import Rotation, Scale, Translation, readout
from layers import MNISTBackbone


def build(settings, channels, side):
    """Make the encoder, and the group that moves its features, from a run's settings.

    Args:
        settings: the parsed flags of train.py, or a run's config.json, as a dict.
        channels, side: C and H = W of the images.

    Raises:
        ValueError: for settings that fit neither each other nor the images.
    """
    s = settings
    encoder = MNISTBackbone(s["group"], s["elements"], s["widths"], channels, s["kernel_size"], s["effective_size"],
                            s["sigma"], s["scale_step"], s["extent"], s["padding"])
    if side % encoder.stride:
        raise ValueError(f"images are {side}x{side}, but the encoder needs a side divisible by {encoder.stride}")
    if s["group"] == "translation":
        group = Translation(side // encoder.stride, s["base_space"], encoder.stride, circular=s["padding"] == "circular")
    elif s["group"] == "rotation":
        group = Rotation(s["elements"], s["base_space"])
    else:
        group = Scale(s["elements"], s["scale_step"], s["base_space"])
    return encoder, group


def represent(z, grid):
    """The representation that is classified: all elements' maps, averaged to grid x grid: (B, C, G, H, W) -> (B, D)."""
    return readout(z, grid)


@torch.no_grad()
def extract(encoder, data, images, grid, batch_size=1000):
    """Represent images (N, C, H, W) uint8 by an encoder in evaluation mode: (N, D) float32."""
    index = torch.arange(len(images), device=images.device)
    return torch.cat([represent(encoder(data.batch(images, i)), grid).float() for i in index.split(batch_size)])


def probe(encoder, data, grid=2, epochs=100, lr=0.01, batch_size=1000, seed=0):
    """Train the detached classifier on a frozen encoder and measure it on the whole test split.

    The representations are computed once, standardised by the training split's mean and deviation (a linear layer could
    do that itself; it only eases its training), and classified by one linear layer trained with Adam and a cosine
    schedule (paper.md section 3 leaves the classifier's optimizer open). The accuracy is the last epoch's.

    Returns:
        dict: top1 in percent, test_images, train_images, train_top1 in percent, dimensions (D).

    Raises:
        AssertionError: if a parameter or a batch-norm buffer of the encoder moved.
    """
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    was_training = encoder.training
    encoder.eval()
    x, x_test = (extract(encoder, data, images, grid) for images in (data.train_images, data.test_images))
    encoder.train(was_training)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std

    generator = torch.Generator().manual_seed(seed)
    classifier = torch.nn.Linear(x.shape[1], data.classes, device=x.device)
    for parameter in classifier.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            loss = F.cross_entropy(classifier(x[i]), data.train_labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

    after = encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    if moved:
        raise AssertionError(f"the encoder must stay frozen under the probe, but {', '.join(moved)} moved")
    with torch.no_grad():
        top1, train_top1 = (100 * (classifier(a).argmax(1) == labels).double().mean().item()
                            for a, labels in ((x_test, data.test_labels), (x, data.train_labels)))
    return dict(top1=round(top1, 3), test_images=len(x_test), train_images=len(x), train_top1=round(train_top1, 3),
                dimensions=x.shape[1])


def probe_as_set(settings, encoder, data):
    """`probe` with a run's own settings (a dict, see `build`)."""
    return probe(encoder, data, settings["probe_grid"], settings["probe_epochs"], settings["probe_lr"], seed=settings["seed"])


def write_result(run, settings, encoder, data, frozen_top1, epoch):
    """Probe a run's encoder as it is after `epoch` epochs, and write RUN/probe.json; returns what is written, a dict."""
    result = probe_as_set(settings, encoder, data) | dict(frozen_top1=frozen_top1, method=settings["method"], epoch=epoch)
    (Path(run) / "probe.json").write_text(json.dumps(result) + "\n")
    return result


def load_run(run, device="cpu"):
    """Read a run's settings and checkpoint: (dict, dict).

    Raises:
        ValueError: in one line, if the folder holds no run or its files cannot be read.
    """
    config, checkpoint = Path(run) / "config.json", Path(run) / "checkpoint.pt"
    for file in (config, checkpoint):
        if not file.is_file():
            raise ValueError(f"{file} is missing: {run} is not the folder of a run that train.py has saved")
    try:
        settings = json.loads(config.read_text())
        return settings, torch.load(checkpoint, map_location=device, weights_only=True)
    except (ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read the run in {run}: {' '.join(str(error).split())[:200]}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder, the --out of train.py")
    parser.add_argument("--data-dir", help="folder of the data sets; the run's own when not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    try:
        settings, checkpoint = load_run(args.run, args.device)
        data = datasets.load(settings["dataset"], args.data_dir or settings["data_dir"], args.device, settings["train_images"])
        encoder, _ = build(settings, data.train_images.shape[1], data.train_images.shape[-1])
        encoder.load_state_dict(checkpoint["encoder"])
    except (ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, KeyError):
            error = f"{args.run} was not written by train.py: its files hold no {error}"
        print(f"probe.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(write_result(args.run, settings, encoder.to(args.device), data, checkpoint["frozen_top1"], checkpoint["epoch"])))


if __name__ == "__main__":
    main()
