"""The detached classifier: one linear layer on the representation of a frozen encoder.

    python probe.py RUN

reads RUN/checkpoint.pt, which train.py wrote, trains the classifier, writes RUN/probe.json and prints the same.

    python probe.py RUN --features FILE.npz

writes what the classifier would read, for use elsewhere: train_features and test_features (N, D), train_labels and
test_labels (N,). D runs over group elements, channels, rows and columns, in this order.

Letters: N images, D numbers per representation, C channels, H W space.
"""
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import data as datasets
import run
from hssl import readout


def processes():
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def extract(encoder, data, images, grid, amp="off", batch_size=1000):
    """Represent images (N, C, H, W) uint8 by all maps of an encoder, averaged to grid x grid: (N, D) float32.

    amp: the encoder's precision, as for `--amp`. Several processes take an equal share each, and all get the whole.
    """
    n, (rank, world) = len(images), processes()
    share = -(-n // world)                                                     # rounded up: a few images come twice
    index = torch.arange(share, device=images.device) + share * rank
    with run.precision(images.device, amp):
        own = torch.cat([readout(encoder(data.batch(images, i % n)), grid).float() for i in index.split(batch_size)])
    if world == 1:
        return own
    shares = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(shares, own)
    return torch.cat(shares)[:n]


def probe(encoder, data, grid=2, epochs=100, lr=0.01, amp="off", batch_size=1000, seed=0):
    """Train the detached classifier on a frozen encoder and measure it, as it is in the end, on the whole test split.

    The representations are computed once, in the precision amp, standardised by the training split's mean and deviation
    (which only eases the training), and classified by one float32 linear layer, by Adam with a cosine schedule: the
    paper states no optimizer. Several processes share the representations, and each trains the same classifier.

    Returns a dict: top1 and train_top1 in percent, test_images, train_images, dimensions (D). Raises an AssertionError
    if a parameter or a batch-norm buffer of the encoder moved.
    """
    before, was_training = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}, encoder.training
    encoder.eval()
    x, x_test = (extract(encoder, data, images, grid, amp) for images in (data.train_images, data.test_images))
    encoder.train(was_training)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)                                                    # x is (N, D)
    x, x_test = (x - mean) / std, (x_test - mean) / std

    generator = torch.Generator().manual_seed(seed)
    classifier = torch.nn.Linear(x.shape[1], data.classes, device=x.device)
    torch.nn.init.zeros_(classifier.weight), torch.nn.init.zeros_(classifier.bias)
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


def take_statistics(encoder, data, amp="off"):
    """Let batch norm see the training images once. Several processes share them, and then have the same statistics."""
    index = torch.arange(len(data.train_images), device=data.train_images.device)
    chunks = index.tensor_split(math.ceil(len(index) / 1000))                  # no chunk of one image
    rank, world = processes()
    own = chunks[rank::world]
    with run.precision(index.device, amp):
        update_bn((data.batch(data.train_images, i) for i in own), encoder)    # a mean over chunks
    for name, value in encoder.state_dict().items():
        if world > 1 and "running" in name:
            dist.all_reduce(value.mul_(len(own) / len(chunks)))


def frozen_accuracy(s, encoder, data):
    """The yardstick, before the first step of a run with settings s: statistics, then the classifier; top-1."""
    take_statistics(encoder, data, s["amp"])
    top1 = probe_as_set(s, encoder, data)["top1"]
    if processes()[0] == 0:
        print(f"frozen encoder: top-1 {top1:.2f} %", flush=True)
    return top1


def probe_as_set(s, encoder, data):
    """`probe` with a run's own settings s, a dict as for `run.build`."""
    return probe(encoder, data, s["probe_grid"], s["probe_epochs"], s["probe_lr"], s["amp"], seed=s["seed"])


def write_result(out, settings, encoder, data, frozen_top1, epoch):
    """Probe a run's encoder, now at the end of an epoch; returns a dict, which one process writes to OUT/probe.json."""
    result = probe_as_set(settings, encoder, data)
    result |= dict(frozen_top1=frozen_top1, method=settings["method"], epoch=epoch)
    if processes()[0] == 0:
        run.write_whole(Path(out) / "probe.json", json.dumps(result).encode() + b"\n")
    return result


def write_features(path, settings, encoder, data, dtype):
    """Write the features and labels of both splits, see above; returns their shapes, a dict."""
    arrays = {}
    for split in ("train", "test"):
        images, labels = (getattr(data, f"{split}_{what}") for what in ("images", "labels"))
        features = extract(encoder.eval(), data, images, settings["probe_grid"], settings["amp"])
        arrays |= {f"{split}_features": features.cpu().numpy().astype(dtype), f"{split}_labels": labels.cpu().numpy()}
    content = io.BytesIO()
    np.savez(content, **arrays)
    run.write_whole(path, content.getbuffer())
    return {name: list(array.shape) for name, array in arrays.items()}


def parse(argv=None):
    parser = run.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", help="a run's folder, the --out of train.py")
    parser.add_argument("--data-dir", help="folder of the data sets (default: the run's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is a GPU)")
    parser.add_argument("--features", metavar="FILE.npz", help="write features and labels there, and do nothing else")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the features written")
    return parser.parse_args(argv)


def main(args):
    path, device = Path(args.run) / "checkpoint.pt", run.choose_device(args.device)
    try:
        checkpoint = run.load_checkpoint(path)
        with run.fitting(path):
            s = checkpoint["settings"]
            chosen = s["dataset"], args.data_dir or s["data_dir"], device, s["train_images"]
        data = datasets.load(*chosen)
    except ValueError as error:
        run.stop(error)
    with run.fitting(path):
        encoder, _ = run.build(s, *data.train_images.shape[1:3])
        encoder.load_state_dict(checkpoint["encoder"])
    encoder.to(device)
    if device != s["device"]:
        s = s | dict(amp="off")                                                # that was chosen for another device
    if args.features:
        return print(json.dumps(write_features(args.features, s, encoder, data, args.dtype)))
    print(json.dumps(write_result(args.run, s, encoder, data, checkpoint["frozen_top1"], checkpoint["epoch"])))


if __name__ == "__main__":
    run.call(main, parse())
