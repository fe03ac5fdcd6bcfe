"""The detached classifier: one linear layer on the representation of a frozen encoder.

    python probe.py RUN

reads RUN/checkpoint.pt, which train.py wrote, trains the classifier, writes RUN/probe.json and prints the same.

    python probe.py RUN --features FILE.npz

writes what the classifier would read, for use elsewhere: train_features and test_features (N, D), and, if the images
have labels, train_labels and test_labels (N,). D runs over group elements, channels, rows and columns, in this order.

Letters: N images, D numbers per representation, C channels, H W space, Q queries, K classes.
"""
import copy
import dataclasses
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

PENALTIES = [10.0**(e / 2) for e in range(-2, -10, -1)]                        # L2 of the classifier's weights


def processes():
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def data_of(s, device, data_dir=None):
    """The arguments of `data.load` for a run with settings s; data_dir in place of its own."""
    return (s["dataset"], data_dir or s["data_dir"], device, s["train_images"], s["image_size"], s["validate"],
            s["nuisance"], s["seed"])


@torch.no_grad()
def extract(encoder, data, images, grid, amp="off", batch_size=1000):
    """Represent images (N, C, H, W) uint8 by all maps of an encoder, averaged to grid x grid: (N, D) float32.

    amp: the encoder's precision, as for `--amp`; what overflowed in it counts as 0. Several processes take an equal
    share each, and all get the whole.
    """
    n, (rank, world) = len(images), processes()
    share = -(-n // world)                                                     # rounded up: a few images come twice
    index = torch.arange(share, device=images.device) + share * rank
    with run.precision(images.device, amp):
        own = torch.cat([readout(encoder(data.batch(images, i % n)), grid).float() for i in index.split(batch_size)])
    own = own.nan_to_num(0, 0, 0)                                              # or one would spoil every mean
    if world == 1:
        return own
    shares = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(shares, own)
    return torch.cat(shares)[:n]


# ------------------------------------------------------------------------------- what a representation says without it
def effective_rank(x):
    """How many dimensions representations (N, D) really use: 1 to D. The exponential of the entropy of their singular
    values, divided by the sum (Roy and Vetterli, 2007), after centring."""
    x = (x - x.mean(0)).double()
    values = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    return torch.special.entr(values / values.sum().clamp_min(1e-30)).sum().exp().item()


def spread(x):
    """The standard deviation of each dimension of representations (N, D) scaled to length 1, averaged, times √D: 0
    where all are alike, a collapse, up to 1 where they point everywhere alike (Chen and He, 2021, SimSiam)."""
    return F.normalize(x, dim=1).std(0, correction=0).mean().item() * x.shape[1] ** 0.5


def neighbours(x, labels, queries, answers, classes, k=20, temperature=0.1):
    """Top-1 in percent of a vote of the k nearest neighbours, weighted by exp(s/τ), s their cosine similarity after
    centring (as Wu et al., 2018). x (N, D) with labels (N,); queries (Q, D) with labels answers (Q,)."""
    mean, hits = x.mean(0), 0
    x = F.normalize(x - mean, dim=1)
    for query, answer in zip(queries.split(1000), answers.split(1000)):
        s, nearest = (F.normalize(query - mean, dim=1) @ x.T).topk(min(k, len(x)))                     # (1000, k)
        votes = s.new_zeros(len(s), classes).scatter_add(1, labels[nearest], (s / temperature).exp())
        hits += (votes.argmax(1) == answer).sum()
    return 100 * hits.item() / len(queries)


def measures(x, labels, queries, answers, classes):
    """`effective_rank` and `spread` of at most 10,000 representations, and the accuracy of `neighbours` among them if
    there are labels (classes > 0); a dict. Arguments as for `neighbours`."""
    x, labels = x[:10_000], labels[:10_000]
    result = dict(effective_rank=round(effective_rank(x), 1), spread=round(spread(x), 3))
    return dict(neighbours=round(neighbours(x, labels, queries, answers, classes), 2)) | result if classes else result


def held_out(n):
    """For measures on n training images alone: how many of the first serve as neighbours, a fifth or 10,000, and how
    many of the last as queries, a twentieth or 2,000."""
    return min(10_000, -(-n // 5)), min(2000, -(-n // 20))


def few_labels(x, labels, x_test, test_labels, classes, seed=0):
    """Top-1 in percent of a linear classifier that is given few labels: 1, 10 and 100 a class, mean over 10 draws.

    Ridge regression to the one-hot labels, in closed form; of six penalties each draw takes the one that is best on the
    last twentieth of x (N, D), which is not drawn from. Returns {"1": [mean, standard deviation], ...},
    without the numbers that a class has too few images for.
    """
    generator, result, penalties = torch.Generator().manual_seed(seed), {}, [10.0**e for e in range(-1, 5)]
    queries = held_out(len(x))[1]
    x, labels, held, held_labels = x[:-queries], labels[:-queries], x[-queries:], labels[-queries:]
    least = labels.bincount(minlength=classes).min() if len(x) else 0
    for count in (count for count in (1, 10, 100) if count <= least):
        top1 = []
        for _ in range(10):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            drawn = torch.cat([order[labels[order] == k][:count] for k in range(classes)])
            mean = x[drawn].mean(0)
            U, S, V = torch.linalg.svd(x[drawn] - mean, full_matrices=False)
            target = U.T @ F.one_hot(labels[drawn], classes).to(x.dtype)                               # (rank, K)
            weights = [V.T @ (target * (S / (S**2 + penalty))[:, None]) for penalty in penalties]      # (D, K) each
            best = max(weights, key=lambda w: (((held - mean) @ w).argmax(1) == held_labels).sum().item())
            top1.append(100 * (((x_test - mean) @ best).argmax(1) == test_labels).double().mean())
        result[str(count)] = [round(value.item(), 2) for value in (torch.stack(top1).mean(), torch.stack(top1).std())]
    return result


# ------------------------------------------------------------------------------------------------------- the classifier
def standardise(x, *others):
    """x (N, D) with mean 0 and deviation 1 in every dimension, and others (M, D) moved and scaled alike."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    return [(a - mean) / std for a in (x, *others)]


def softmax_regression(x, labels, classes, penalty, start=None, iterations=1000, tolerance=1e-4):
    """The linear classifier that minimises its mean cross-entropy on x (N, D) plus penalty/2 · ‖W‖², by L-BFGS.

    W (D + 1, K) are weights and, in the last row, biases; start is where to begin. The objective curves upwards by at
    least the penalty everywhere, so the minimum is at most ‖∇‖²/(2 · penalty) lower. It ends once this bound,
    the gap, is within the tolerance, in nats, or after so many iterations: with penalties below 1e-4 float32 may not
    get there. Returns W and the gap.
    """
    weights = x.new_zeros(x.shape[1] + 1, classes) if start is None else start.clone()
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=min(10, iterations), tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights[:-1] + weights[-1], labels) + penalty / 2 * weights.square().sum()
        loss.backward()
        return loss

    for _ in range(0, iterations, 10):
        optimizer.step(objective)
        objective()
        gap = weights.grad.square().sum().item() / (2 * penalty)
        if gap <= tolerance:
            break
    return weights.detach(), gap


@torch.no_grad()
def score(weights, x, labels):
    """Top-1 in percent and mean cross-entropy in nats of linear weights (D + 1, K) on x (N, D)."""
    scores = x @ weights[:-1] + weights[-1]
    return 100 * (scores.argmax(1) == labels).double().mean().item(), F.cross_entropy(scores, labels).item()


def assess(x, labels, x_test, test_labels, classes, iterations=1000, seed=0):
    """All that is said of representations x (N, D) and x_test (M, D) with labels (N,) and (M,); a dict of

        top1, train_top1    of the detached classifier, in percent; None if there are no labels (classes = 0)
        train_loss, gap     its cross-entropy in nats, and how far above the minimum it can be (`softmax_regression`)
        penalty             the L2 penalty that was chosen for it
        few_labels          see there
        neighbours, effective_rank, spread      `measures`, with the first 10,000 of x as neighbours
        test_images, train_images, dimensions   M, N, D

    The classifier is one linear layer on x, standardised by its mean and deviation. For each of eight L2 penalties it
    is trained to the end; the one with the least cross-entropy on the last twentieth of x (at most 2,000), which it
    was not trained on, is taken, and trained again on all of x. The paper states none of this.
    """
    queries = held_out(len(x))[1]
    result = dict(top1=None, test_images=len(x_test), train_images=len(x), train_top1=None, dimensions=x.shape[1])
    result |= measures(x, labels, x_test, test_labels, classes)
    if not classes:
        return result
    x, x_test = standardise(x, x_test)
    result["few_labels"] = few_labels(x, labels, x_test, test_labels, classes, seed)

    weights, least = None, math.inf
    for penalty in PENALTIES:                                                  # from strong to weak, each from the last
        weights, _ = softmax_regression(x[:-queries], labels[:-queries], classes, penalty, weights, iterations)
        loss = score(weights, x[-queries:], labels[-queries:])[1]
        if loss < least:
            least, best = loss, (penalty, weights)
    weights, gap = softmax_regression(x, labels, classes, *best, iterations)
    (top1, _), (train_top1, train_loss) = score(weights, x_test, test_labels), score(weights, x, labels)
    return result | dict(top1=round(top1, 3), train_top1=round(train_top1, 3), train_loss=round(train_loss, 5),
                         penalty=best[0], gap=gap)


def probe(encoder, data, grid=2, iterations=1000, amp="off", seed=0):
    """Train the detached classifier on a frozen encoder, and measure it on the whole test split: what `assess` says.

    The representations are computed once, in the precision amp. Several processes share this, and each trains the same
    classifier. Raises an AssertionError if a parameter or a batch-norm buffer of the encoder moved.
    """
    before, was_training = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}, encoder.training
    encoder.eval()
    x, x_test = (extract(encoder, data, images, grid, amp) for images in (data.train_images, data.test_images))
    encoder.train(was_training)
    after = encoder.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    if moved:
        raise AssertionError(f"the encoder must stay frozen under the probe, but {', '.join(moved)} moved")
    return assess(x, data.train_labels, x_test, data.test_labels, data.classes, iterations, seed)


def take_statistics(encoder, data, amp="off"):
    """Let batch norm see all training images once, for trained and frozen encoders alike: its statistics become means
    over chunks of at most 1,000 images. Several processes share the chunks, and end with the same."""
    index = torch.arange(len(data.train_images), device=data.train_images.device)
    chunks = index.tensor_split(math.ceil(len(index) / 1000))                  # no chunk of one image
    rank, world = processes()
    synced = any(isinstance(module, torch.nn.SyncBatchNorm) for module in encoder.modules())
    own = [chunk.tensor_split(world)[rank] for chunk in chunks] if synced else chunks[rank::world]
    with run.precision(index.device, amp):
        update_bn((data.batch(data.train_images, i) for i in own), encoder)    # a mean over chunks
    for name, value in encoder.state_dict().items():
        if world > 1 and "running" in name and not synced:
            dist.all_reduce(value.mul_(len(own) / len(chunks)))


def watch(s, encoder, data):
    """The `measures` of an encoder in training, with a run's settings s, on training images only; see `held_out`. Also
    linear, the top-1 of a classifier with a fixed penalty, trained on the neighbours alone, if there are labels.

    The encoder stays as it is: a copy takes batch norm's statistics from the neighbours.
    """
    few, queries = held_out(len(data.train_images))
    bank, asked = data.train_images[:few], data.train_images[-queries:]
    labels, answers = data.train_labels[:few], data.train_labels[-queries:]
    encoder = copy.deepcopy(encoder)
    take_statistics(encoder, dataclasses.replace(data, train_images=bank), s["amp"])
    x, asked = (extract(encoder.eval(), data, images, s["probe_grid"], s["amp"]) for images in (bank, asked))
    result = measures(x, labels, asked, answers, data.classes)
    if not data.classes:
        return result
    x, asked = standardise(x, asked)
    weights, _ = softmax_regression(x, labels, data.classes, penalty=1e-3)
    return dict(linear=round(score(weights, asked, answers)[0], 2)) | result


def probe_frozen(s, encoder, data):
    """The yardstick, before the first step of a run with settings s: statistics, then what `probe` says; a dict."""
    take_statistics(encoder, data, s["amp"])
    result = probe_as_set(s, encoder, data)
    if processes()[0] == 0:
        print("frozen encoder:", f"top-1 {result['top1']:.2f} %" if data.classes else "no labels", flush=True)
    return result


def in_words(result):
    """A result of `write_result` in a few lines, for people."""
    titles = dict(top1=f"top-1 on {result['test_images']} test images", neighbours="20 nearest neighbours",
                  effective_rank=f"effective rank of {result['dimensions']}", spread="spread")
    lines = [] if result["top1"] is not None else ["no top-1: these images have no labels"]
    for name, title in titles.items():
        if result.get(name) is not None:
            unit = " %" if name in ("top1", "neighbours") else ""
            frozen, trained = (f"{r[name]:.2f}{unit}" for r in (result["frozen"], result))
            lines.append(f"{title}: frozen {frozen}, {result['method']} {trained}")
    return "\n".join(lines)


def probe_as_set(s, encoder, data):
    """`probe` with a run's own settings s, a dict as for `run.build`; and held_out, what `watch` would say."""
    result = probe(encoder, data, s["probe_grid"], s["probe_iterations"], s["amp"], s["seed"])
    return result | dict(held_out=watch(s, encoder, data))


def write_result(out, settings, encoder, data, frozen, epoch):
    """Probe a run's encoder, now at the end of an epoch; returns a dict, which one process writes to OUT/probe.json.
    frozen is the result of `probe_frozen`."""
    result = probe_as_set(settings, encoder, data)
    result |= dict(method=settings["method"], epoch=epoch, frozen_top1=frozen["top1"], frozen=frozen)
    if processes()[0] == 0:
        run.write_whole(Path(out) / "probe.json", json.dumps(result).encode() + b"\n")
    return result


def write_features(path, settings, encoder, data, dtype):
    """Write the features and labels of both splits, see above; returns their shapes, a dict."""
    arrays = {}
    for split in ("train", "test"):
        images, labels = (getattr(data, f"{split}_{what}") for what in ("images", "labels"))
        features = extract(encoder.eval(), data, images, settings["probe_grid"], settings["amp"])
        arrays[f"{split}_features"] = features.cpu().numpy().astype(dtype)
        if data.classes:
            arrays[f"{split}_labels"] = labels.cpu().numpy()
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
            chosen = data_of(s, device, args.data_dir)
        data = datasets.load(*chosen)
    except ValueError as error:
        run.stop(error)
    with run.fitting(path):
        encoder, _ = run.build(s, *data.train_images.shape[1:3])
        encoder.load_state_dict(checkpoint["encoder"])
    encoder.to(device)
    if device != s["device"]:
        s = s | dict(amp="off")                                                # that was chosen for another device
    if s["amp"] == "off":
        torch.backends.fp32_precision = "ieee"                                 # as in training
    take_statistics(encoder, data, s["amp"])                                   # those of training are only running ones
    if args.features:
        return print(json.dumps(write_features(args.features, s, encoder, data, args.dtype)))
    print(json.dumps(write_result(args.run, s, encoder, data, checkpoint["frozen"], checkpoint["epoch"])))


if __name__ == "__main__":
    run.call(main, parse())
