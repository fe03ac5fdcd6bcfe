"""From a frozen encoder to numbers: a linear classifier, the nearest neighbours, the effective
rank.

    python probe.py RUN

reads RUN/checkpoint.pt, which train.py wrote, measures its encoder, adds the measures of the
random encoder that it started from, writes RUN/probe.json, and prints it. The paper calls the
linear classifier detached: it sends no gradient into the encoder. How it is trained the paper
does not say.

    python probe.py RUN --features FILE.npz

writes what the classifier reads and does nothing else: train_features (N, D), train_labels (N,),
train_files (N,), the same for test, and class_names. D runs over group elements, channels, rows and
columns, in this order.

Letters: N images or rows, M rows of the test split, D numbers per row, K classes, C channels,
G group elements, H W space.
"""
import argparse
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import data as datasets
import layers
from hssl import readout

PENALTIES = np.logspace(-1, -4, 7).tolist()    # L2 of the linear classifier, strong to weak
ENCODER_SETTINGS = """backbone group group_size widths image_shape kernel_size structure
                      scale_step extent padding""".split()


# ------------------------------------------------------------------------------------ a run's files

def write_whole(path, content):
    """Write bytes to a temporary file beside path and rename it: path is never half written, if
    one program at a time writes it.

    Raises an OSError if that fails; then the old content of path still stands.
    """
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, whose old content still stands: {error}") from None


def write_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values by `write_whole`."""
    content = io.BytesIO()    # torch.save to a file would hide a full disk.
    torch.save(checkpoint, content)
    write_whole(path, content.getvalue())


def read_checkpoint(path):
    """Read a checkpoint to the CPU: a dict that holds at least `encoder`, a state_dict.

    Only tensors and plain values are read, so that no file can run code. Raises a ValueError, in
    one line, if the file is missing, damaged, or not such a checkpoint.
    """
    try:
        # torch.load compares no checksums.
        damaged = zipfile.ZipFile(path).testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or "encoder" not in checkpoint.keys():
            raise ValueError("wrong checksum, or no encoder in it")
    except Exception as error:
        # A damaged file can make the readers fail in any way.
        raise ValueError(f"{path} is missing, damaged, or holds more than tensors and plain "
                         f"values: {error!r:.200}") from None
    return checkpoint


def make_encoder(settings):
    """A new encoder by a run's settings: the flags of train.py, and image_shape, [C, H]."""
    return layers.make_encoder(**{name: settings[name] for name in ENCODER_SETTINGS})


def load_run(folder):
    """The trained encoder of a run's folder, in evaluation mode, and the checkpoint that holds it.

    Raises a ValueError, in one line, for a checkpoint that is missing, damaged or does not fit.
    """
    path = f"{folder}/checkpoint.pt"
    checkpoint = read_checkpoint(path)
    try:
        # The initial weights are overwritten, so drawing them must not advance the caller's
        # random numbers.
        with torch.random.fork_rng(devices=()):
            encoder = make_encoder(checkpoint["settings"])
        encoder.load_state_dict(checkpoint["encoder"])
    except Exception as error:
        raise ValueError(f"{path} does not fit this program: {error!r:.200}") from None
    return encoder.eval(), checkpoint


def load_encoder(folder):
    """The trained encoder of a run's folder, in evaluation mode, and the run's settings, a dict.

    It takes images (B, C, H, W) as `data.Dataset.batch` normalises them, pixels from 0 to 1 minus
    settings["mean"], divided by settings["std"], and gives features (B, C', G, H', W'). Errors as
    for `load_run`.
    """
    encoder, checkpoint = load_run(folder)
    return encoder, checkpoint["settings"]


def load_data(settings, device, data_dir=None, cache_dir=None):
    """The data set of a run's settings; data_dir and cache_dir in place of its own folders."""
    return datasets.load(
        settings["dataset"],
        data_dir or settings["data_dir"],
        cache_dir or settings["cache_dir"],
        device,
        train_images=settings["train_images"],
        image_size=settings["image_size"],
        validate=settings["validate"],
        seed=settings["seed"],
    )


# ----------------------------------------------------------------------------------------- features

def precision(device, amp):
    """The context of half precision that amp names: "float16", "bfloat16" or "off". Raises a
    ValueError for another name."""
    if amp not in ("float16", "bfloat16", "off"):
        raise ValueError(f"amp is {amp!r}, but must be float16, bfloat16 or off")
    dtype = getattr(torch, amp, None)
    return torch.autocast(torch.device(device).type, dtype, enabled=amp != "off")


def batches(encoder, data, images):
    """Normalised images, in the encoder's own type, in batches of at most 1,000.

    Their sizes differ by one at most: a last batch of one image would give batch norm no variance.
    """
    like = next(encoder.parameters(), torch.empty(0))
    index = torch.arange(len(images), device=images.device)
    for chunk in index.tensor_split(math.ceil(len(images) / 1000)):
        yield data.batch(images, chunk).to(like.dtype)


def take_statistics(encoder, data, amp="off"):
    """Let each batch norm take mean and variance, averaged over chunks of the training images."""
    images = data.train_images
    with precision(images.device, amp):
        update_bn(batches(encoder, data, images), encoder)


@torch.no_grad()
def extract(encoder, data, images, grid, amp="off"):
    """Features of images (N, C, H, W) uint8, by an encoder as it is, in the precision amp.

    Returns its maps averaged to grid x grid, or whole if grid is 0, (N, D), and averaged over all
    positions, (N, C'·G), in float32. Raises a ValueError if it does not give (B, C', G, H', W').
    """
    features = []
    means = []
    for batch in batches(encoder, data, images):
        with precision(images.device, amp):
            maps = encoder(batch)    # (B, C', G, H', W')
        features.append(readout(maps.float(), grid))
        means.append(readout(maps.float(), 1))
    return torch.cat(features), torch.cat(means)


def fixed_order(count):
    """The indices 0 to count - 1 in an order that is the same in every run."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def hold_out(count):
    """These in two parts: a twentieth, at most 2,000, to hold out, and the rest."""
    return fixed_order(count).tensor_split([min(2000, math.ceil(count / 20))])


def split_training(data):
    """A Dataset to look at during a training, of training images only, the same for every seed.

    A fifth of them, at most 10,000, is its training part, a twentieth, at most 2,000, its test.
    """
    total = len(data.train_images)
    test, rest = hold_out(total)
    fifth = math.ceil(total / 5)
    return data.subset(rest[:min(10_000, fifth)], test)


# ----------------------------------------------------------------------------------------- measures

def effective_rank(x):
    """How many dimensions features (N, D) really use: 1 to D.

    The exponential of the entropy of their singular values after centring (Roy and Vetterli, 2007).
    """
    x = (x - x.mean(0)).double()
    values = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(1e-300)
    return torch.special.entr(shares).sum().exp().item()


def percent_right(scores, answers):
    """How many rows of scores (M, K) are largest at their answer, of answers (M,), in percent."""
    hits = scores.argmax(1) == answers
    return 100 * hits.sum().item() / len(hits)


def neighbours(x, labels, queries, answers, classes, temperature=0.1):
    """Top-1 in percent of a vote of the 20 nearest of x (N, D), for queries (M, D).

    Near is a high cosine similarity s after centring; a vote weighs exp(s/τ) (Wu et al., 2018).
    labels (N,) are below classes; answers (M,) may hold -1, which nothing matches.
    """
    mean = x.mean(0)
    x = F.normalize(x - mean, dim=1)
    queries = F.normalize(queries - mean, dim=1)
    similarity, nearest = (queries @ x.T).topk(min(20, len(x)))    # (M, 20)
    # The nearest comes first. Without it the exponential overflows for a small temperature.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(queries), classes)
    votes.scatter_add_(1, labels[nearest], weights)
    return percent_right(votes, answers)


def standardise(x, *others):
    """x (N, D) with mean 0 and deviation 1 in every dimension; others moved and scaled alike.

    A dimension that carries nothing becomes 0: one that varies by no more than rounding does,
    beside its own size, or beside the dimension that varies most.
    """
    mean = x.mean(0)
    deviation = x.std(0, correction=0)
    rounding = 1e-5 * mean.abs() + 1e-7 * deviation.max()
    scale = torch.where(deviation > rounding, 1 / deviation, 0)
    return [(array - mean) * scale for array in (x, *others)]


@torch.enable_grad()
def softmax_regression(x, labels, penalty, start, iterations=1000, tolerance=1e-3):
    """Minimise the mean cross-entropy of scores x @ W plus penalty/2 · ‖W‖², from W = start (D, K).

    The objective is strongly convex with constant penalty, so its minimum is at most
    ‖∇‖²/(2 · penalty) lower. L-BFGS ends once this bound, the gap, is within the tolerance, in
    nats, or after so many iterations. Returns W and the gap.
    """
    weights = start.clone().requires_grad_()
    # A long history would be a few hundred small kernels per iteration on a GPU.
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=10, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        cross_entropy = F.cross_entropy(x @ weights, labels)
        loss = cross_entropy + penalty / 2 * weights.square().sum()
        loss.backward()
        return loss

    for _ in range(0, iterations, 10):
        # A step is ten iterations; then comes the gradient at its end.
        optimizer.step(objective)
        objective()
        gap = weights.grad.square().sum().item() / (2 * penalty)
        if gap <= tolerance:
            break
    return weights.detach(), gap


def linear_classifier(x, labels, x_test, answers, classes):
    """Top-1 in percent, on x_test (M, D), of a linear classifier trained on x (N, D).

    L2 penalties are tried from strong to weak, until the cross-entropy rises on a twentieth of x,
    at most 2,000 rows, that is held out; with the last one before, it is trained on all of x.
    Biases are penalised as well. labels and answers as for `neighbours`.
    """
    # A last dimension of ones stands for the biases.
    x, x_test = [F.pad(rows, (0, 1), value=1) for rows in standardise(x, x_test)]
    held, fitted = hold_out(len(x))
    weights = x.new_zeros(x.shape[1], classes)
    least = math.inf
    for penalty in PENALTIES:
        # Each starts where the stronger one before it ended.
        fit, _ = softmax_regression(x[fitted], labels[fitted], penalty, weights)
        loss = F.cross_entropy(x[held] @ fit, labels[held]).item()
        if loss > least:
            break
        least = loss
        weights = fit
        best = penalty
    weights, _ = softmax_regression(x, labels, best, weights)
    return percent_right(x_test @ weights, answers)


def measure(x, labels, x_test, answers, classes):
    """top1, neighbours and effective_rank of features, a dict; see `evaluate`."""
    sample = fixed_order(len(x))[:10_000]
    result = dict(top1=None, neighbours=None)
    if classes:
        result["top1"] = linear_classifier(x, labels, x_test, answers, classes)
        result["neighbours"] = neighbours(x[sample], labels[sample], x_test, answers, classes)
    result["effective_rank"] = round(effective_rank(x[sample]), 2)
    return result


def evaluate(encoder, data, grid=2, amp="off", update_statistics=False):
    """Measure a frozen encoder, images (B, C, H, W) -> features (B, C', G, H', W'); a dict of

        top1                `linear_classifier`, in percent; None without two classes to tell apart
        neighbours          `neighbours`, the same, among 10,000 training images at most
        effective_rank      `effective_rank` of these training images
        mean_top1, mean_neighbours, mean_effective_rank       the same
        dimensions, train_images, test_images                 D, N, M
        not_finite          how many rows were not finite, if any

    The first three read its maps averaged to grid x grid, or all positions if grid is 0, the next
    three the mean over all positions. With update_statistics every batch norm takes those of the
    training images first (`take_statistics`). Training rows that are not finite are dropped, test
    rows count as wrong. Modules keep their mode. Raises a ValueError for features of another shape,
    and if no training row is finite.
    """
    modes = {module: module.training for module in encoder.modules()}
    try:
        if update_statistics:
            take_statistics(encoder, data, amp)
        encoder.eval()
        train, train_means = extract(encoder, data, data.train_images, grid, amp)
        test, test_means = extract(encoder, data, data.test_images, grid, amp)
    finally:
        for module, mode in modes.items():
            module.training = mode

    # A mean over positions is finite only where every position is.
    finite = train_means.isfinite().all(1)
    test_finite = test_means.isfinite().all(1)
    labels = data.train_labels[finite]
    answers = data.test_labels.where(test_finite, -1)
    dropped = len(train) - len(labels)
    wrong = len(test) - test_finite.sum().item()
    result = dict(dimensions=train.shape[1], train_images=len(train), test_images=len(test))
    if dropped or wrong:
        result["not_finite"] = dropped + wrong
        print(f"features that are not finite: {dropped} training images are left out, "
              f"{wrong} test images count as wrong", flush=True)
    if len(labels) == 0:
        raise ValueError("no training image has finite features: there is nothing to measure")

    classes = labels.max().item() + 1    # 0 where all labels are -1
    if classes and labels.min() == labels.max():
        print("all training images are of one class: there is nothing to classify", flush=True)
        classes = 0

    measures = measure(train[finite], labels, test, answers, classes)
    of_means = measures
    if grid != 1:
        of_means = measure(train_means[finite], labels, test_means, answers, classes)
    for name, value in of_means.items():
        result[f"mean_{name}"] = value
    return measures | result


# ------------------------------------------------------------------------------------------ results

def write_result(out, settings, result, frozen, epoch):
    """Write OUT/probe.json: `evaluate`'s result with method, epoch and that of the frozen encoder.

    Returns what was written, a dict.
    """
    result = result | dict(method=settings["method"], epoch=epoch, frozen=frozen)
    write_whole(f"{out}/probe.json", json.dumps(result).encode())
    return result


def in_words(result):
    """The first measures of `evaluate` in a line for people; top-1 needs labels."""
    words = []
    for name in ("top1", "neighbours", "effective_rank"):
        if result[name] is not None:
            words.append(f"{name.replace('_', ' ')} {result[name]:.2f}")
    return ", ".join(words)


def write_features(path, encoder, data, grid, amp):
    """Write the features, labels and files of both splits, as the head of this file says."""
    arrays = dict(class_names=np.array(data.class_names, dtype=str))
    for split in ("train", "test"):
        images = getattr(data, f"{split}_images")
        features, _ = extract(encoder, data, images, grid, amp)
        arrays[f"{split}_features"] = features.cpu()
        arrays[f"{split}_labels"] = getattr(data, f"{split}_labels").cpu()
        arrays[f"{split}_files"] = getattr(data, f"{split}_files")
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, content.getvalue())


def probe_run(folder, device, data_dir, cache_dir, features):
    """What the command does. Raises a ValueError or an OSError, in one line, for bad input."""
    encoder, checkpoint = load_run(folder)
    settings = checkpoint["settings"]
    amp = settings["amp"]
    if device != settings["device"]:
        amp = "off"    # It was chosen for the run's device.
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU: use --device cpu")
    torch.backends.fp32_precision = "ieee"    # GPUs would convolve in TF32.
    encoder.to(device)
    data = load_data(settings, device, data_dir, cache_dir)
    grid = settings["probe_grid"]
    if features:
        take_statistics(encoder, data, amp)
        write_features(features, encoder, data, grid, amp)
        return

    result = evaluate(encoder, data, grid, amp, update_statistics=True)
    torch.manual_seed(settings["seed"])
    untrained = make_encoder(settings).to(device)
    measured = evaluate(untrained, data, grid, amp, update_statistics=True)
    # The rest is what --eval-every saw before the training.
    frozen = checkpoint.get("frozen", {}) | measured
    result = write_result(folder, settings, result, frozen, checkpoint.get("epoch"))
    print(json.dumps(result))


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python probe.py RUN [options]")
    parser.add_argument("folder", metavar="RUN", help="a run's folder, the --out of train.py")
    parser.add_argument("--data-dir", help="where the data set is (default: as in the run)")
    parser.add_argument("--cache-dir", help="where decoded images are (default: as in the run)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda if there is a GPU)",
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--features", metavar="FILE.npz", help="write the features there, no more")
    args = parser.parse_args(argv)
    try:
        probe_run(**vars(args))
    except KeyError as error:
        parser.exit(2, f"probe.py: the settings of {args.folder} lack {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"probe.py: {error}\n")


if __name__ == "__main__":
    main()
