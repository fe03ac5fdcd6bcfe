"""From a frozen encoder to numbers: a linear classifier, the nearest neighbours, effective rank.

    python probe.py RUN

reads RUN/checkpoint.pt, which train.py wrote, measures its encoder and the random one that it
started from, prints the result and writes it to RUN/probe.json. The paper calls the linear
classifier detached: no gradient goes from it into the encoder. How it is trained is not said there.

Letters: N training rows, M test rows, D numbers per row, K classes, C channels, G group elements,
H W space.
"""
import argparse
import json
import math
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

import data as datasets
from hssl import readout
from layers import DenseBackbone, MNISTBackbone, ResidualBackbone, Untied

PENALTIES = (0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)    # L2 of the linear classifier


# ------------------------------------------------------------------------------------ a run's files

def write_whole(path, content):
    """Write bytes to a temporary file beside path and rename it, so that path is never half
    written. Raises an OSError if that fails; then the old content of path still stands."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}, whose old content still stands: {error}") from None


def read_checkpoint(path):
    """Read a checkpoint to the CPU, a dict with at least `encoder`, a state_dict. No code in it is
    run. Raises a ValueError, in one line, if the file is missing, damaged, or something else."""
    try:
        damaged = zipfile.ZipFile(path).testzip()    # torch.load compares no checksums.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or "encoder" not in checkpoint.keys():
            raise ValueError("wrong checksum, or no encoder in it")
    except Exception as error:
        # A damaged file can make the readers fail in any way.
        raise ValueError(f"{path} is missing, damaged or no checkpoint: {error!r:.200}") from None
    return checkpoint


def make_encoder(settings):
    """A new encoder by a run's settings, a dict: the flags of train.py, and image_shape, [C, H].

    Three widths make an `MNISTBackbone`, four a `ResidualBackbone`. With structure "none" it is an
    ordinary network with as many activations: `DenseBackbone` for translation, else `Untied`.
    Raises a ValueError where the settings do not fit each other.
    """
    s = argparse.Namespace(**settings)
    channels, side = s.image_shape
    if len(s.widths) not in (3, 4):
        raise ValueError(f"--widths has {len(s.widths)} numbers, but must have 3 or 4")
    network = MNISTBackbone if len(s.widths) == 3 else ResidualBackbone
    if s.kernel_size > side or side % network.stride:
        raise ValueError(f"images are {side} pixels wide, but the encoder needs a multiple of "
                         f"{network.stride} that is not below the kernel's {s.kernel_size}")
    if s.structure == "none" and s.extent is not None:
        raise ValueError("--extent is for --structure group: without it no filter has one")
    if s.group == "translation" and s.group_size != 1:
        raise ValueError(f"--group-size is {s.group_size}, but must be 1 for translation")
    options = (channels, s.kernel_size, s.scale_step)
    if s.structure == "group":
        return network(s.group, s.group_size, s.widths, *options, s.extent, s.padding)
    if s.group != "translation":
        widths = [s.group_size * width for width in s.widths]
        plain = network("translation", 1, widths, *options, padding_mode=s.padding)
        return Untied(plain, s.group_size)
    if len(s.widths) == 4:
        raise ValueError("--structure none for translation is a dense network, which the residual "
                         "one is too large for: take three --widths")
    return DenseBackbone(side, s.widths, channels)


def load_encoder(folder):
    """The trained encoder of a run's folder, in evaluation mode, and the run's settings, a dict.

    It takes images (B, C, H, W) as `data.Dataset.batch` normalises them, pixels from 0 to 1 minus
    settings["mean"], divided by settings["std"], and gives features (B, C', G, H', W'). Raises a
    ValueError, in one line, for a checkpoint that is missing, damaged or does not fit.
    """
    path = f"{folder}/checkpoint.pt"
    checkpoint = read_checkpoint(path)
    try:
        # Initial weights, which are overwritten, must not advance the caller's random numbers.
        with torch.random.fork_rng(devices=()):
            encoder = make_encoder(checkpoint["settings"])
        encoder.load_state_dict(checkpoint["encoder"])
    except Exception as error:
        # PyTorch's message is several lines, of which the first says little.
        raise ValueError(f"{path} does not hold the encoder that this version makes by the run's "
                         f"settings ({type(error).__name__}): train it again") from None
    return encoder.eval(), checkpoint["settings"]


def load_data(settings, device, data_dir=None, cache_dir=None):
    """The data set of a run's settings; data_dir and cache_dir in place of its own folders."""
    s = argparse.Namespace(**settings)
    if data_dir is None:
        data_dir = s.data_dir
    if cache_dir is None:
        cache_dir = s.cache_dir
    return datasets.load(s.dataset, data_dir, cache_dir, device, s.train_images, s.image_size,
                         s.validate, s.seed)


# ----------------------------------------------------------------------------------------- features

def precision(device, amp):
    """The context of half precision that amp names: "float16", "bfloat16" or "off"."""
    dtype = None if amp == "off" else getattr(torch, amp)
    return torch.autocast(torch.device(device).type, dtype, enabled=amp != "off")


@contextmanager
def kept(owners, *names):
    """A context after which the attributes with these names are as they were before."""
    before = []
    for owner in owners:
        for name in names:
            if hasattr(owner, name):
                before.append((owner, name, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def full_precision(amp):
    """A context in which, if amp is "off", float32 is float32: GPUs would convolve in TF32."""
    # torch.backends.fp32_precision would not do: it does not reach convolutions in every version.
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]
    with kept(backends, "fp32_precision"):
        if amp == "off":
            for backend in backends:
                backend.fp32_precision = "ieee"
        yield


def batches(data, images):
    """Normalised images in batches of at most 500, whose sizes differ by one at most: a last
    batch of one image would give batch norm no variance."""
    index = torch.arange(len(images), device=images.device)
    for chunk in index.tensor_split(math.ceil(len(images) / 500)):
        yield data.batch(images, chunk)


def take_statistics(encoder, data, amp="off"):
    """Let each batch norm take mean and variance, averaged over batches of the training images.
    Modules keep their mode."""
    images = data.train_images
    with kept(encoder.modules(), "training", "momentum"), precision(images.device, amp):
        update_bn(batches(data, images), encoder)


@torch.no_grad()
def extract(encoder, data, images, grid, amp="off"):
    """Features of images (N, C, H, W) uint8, by an encoder in the mode that it is in, under amp.

    Returns its maps averaged to grid x grid, or whole if grid is 0, (N, D), and averaged over all
    positions, (N, C'·G), in float32. Raises a ValueError if it does not give (B, C', G, H', W'), or
    numbers that are not finite.
    """
    features = []
    means = []
    for batch in batches(data, images):
        with precision(images.device, amp):
            maps = encoder(batch)    # (B, C', G, H', W')
        features.append(readout(maps.float(), grid))
        means.append(readout(maps.float(), 1))
    means = torch.cat(means)
    # A mean over positions is finite only where every position is.
    broken = (~means.isfinite()).any(1).sum().item()
    if broken > 0:
        raise ValueError(f"features of {broken} of {len(means)} images are not finite")
    return torch.cat(features), means


def hold_out(count):
    """The indices 0 to count - 1, shuffled the same way in every run, in two parts: a twentieth, at
    most 2,000, to hold out, and the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order.tensor_split([min(2000, math.ceil(count / 20))])


def split_training(data):
    """What --eval-every measures on, training images only, the same for every seed: a twentieth of
    them, at most 2,000, to test the classifier, and a fifth, at most 10,000, to train it. (The
    encoder is trained on all of them.)"""
    test, rest = hold_out(len(data.train_images))
    fifth = math.ceil(len(data.train_images) / 5)
    return data.subset(rest[:min(10_000, fifth)], test)


# ----------------------------------------------------------------------------------------- measures

def effective_rank(x):
    """The number of dimensions that features (N, D) use, 1 to D: the exponential of the entropy of
    their singular values after centring (Roy and Vetterli, 2007)."""
    x = (x - x.mean(0)).cpu().double()    # not every device has float64
    if len(x) < x.shape[1]:
        x = x.T    # of the same singular values, with a smaller Gram matrix
    values = torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt()
    shares = F.normalize(values, p=1, dim=0, eps=1e-300)
    return torch.special.entr(shares).sum().exp().item()


def percent_right(scores, answers):
    """How many rows of scores (M, K) are largest at their answer, of answers (M,), in percent."""
    hits = scores.argmax(1) == answers
    return 100 * hits.sum().item() / len(hits)


def neighbours(x, labels, queries, answers, classes):
    """Top-1 in percent of a vote of the 20 nearest of x (N, D), for queries (M, D).

    Near is a high cosine similarity s after centring; a vote weighs exp(s/τ), as in Wu et al.
    (2018), with τ = 0.1. labels (N,) and answers (M,) are below classes.
    """
    mean = x.mean(0)
    x = F.normalize(x - mean, dim=1)
    queries = F.normalize(queries - mean, dim=1)
    similarity, nearest = (queries @ x.T).topk(min(20, len(x)))    # (M, 20)
    votes = x.new_zeros(len(queries), classes)
    votes.scatter_add_(1, labels[nearest], (similarity / 0.1).exp())
    return percent_right(votes, answers)


def standardise(x, x_test):
    """x (N, D) with mean 0 and deviation 1 in every dimension; x_test moved and scaled alike.

    A dimension becomes 0 if its deviation is rounding error, compared with its mean or with the
    largest deviation.
    """
    mean = x.mean(0)
    deviation = x.std(0, correction=0)
    rounding = 1e-5 * mean.abs() + 1e-7 * deviation.max()
    scale = torch.where(deviation > rounding, 1 / deviation, 0)
    return (x - mean) * scale, (x_test - mean) * scale


@torch.enable_grad()
def softmax_regression(x, labels, penalty, start):
    """Minimise the mean cross-entropy of scores x @ W plus penalty/2 · ‖W‖², from W = start (D, K).

    The objective is strongly convex in W with constant penalty, so its minimum is at most
    ‖∇‖²/(2 · penalty) lower. L-BFGS ends once this bound, the gap, is at most 1e-3 nats (soon, if
    the columns of x are uncorrelated), or after 1,000 iterations. Returns W and the gap.
    """
    # What is trained is V = W / scale, in which the curvature is about 1, however large a column
    # is: ∂/∂W = (∂/∂V) / scale.
    curvature = x.square().mean(0) / start.shape[1] + penalty
    scale = curvature.rsqrt()[:, None]    # (D, 1)
    x = x * scale.T
    v = (start / scale).requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=10, history_size=10, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ v, labels) + penalty / 2 * (scale * v).square().sum()
        loss.backward()
        return loss

    for _ in range(100):
        optimizer.step(objective)    # up to ten iterations
        objective()
        gap = (v.grad / scale).square().sum().item() / (2 * penalty)
        if gap <= 1e-3:
            break
    return scale * v.detach(), gap


def linear_classifier(x, labels, x_test, answers, classes):
    """Top-1 in percent, on x_test (M, D), of a linear classifier trained on x (N, D).

    L2 penalties are tried from strong to weak, until the cross-entropy rises on a twentieth of x,
    at most 2,000 rows, that is held out; with the last one before, it is trained on all of x.
    Biases are penalised as well. labels and answers as for `neighbours`.
    """
    x, x_test = standardise(x, x_test)
    if x.shape[1] <= len(x):
        # On its principal axes the columns of x are uncorrelated; scores and ‖W‖ stay the same.
        _, axes = torch.linalg.eigh(x.T @ x)
        x = x @ axes
        x_test = x_test @ axes
    # A last column of ones stands for the biases.
    x = F.pad(x, (0, 1), value=1)
    x_test = F.pad(x_test, (0, 1), value=1)
    held, fitted = hold_out(len(x))
    weights = x.new_zeros(x.shape[1], classes)
    least = math.inf
    for penalty in PENALTIES:
        # Each starts where the stronger one before it ended.
        fit, _ = softmax_regression(x[fitted], labels[fitted], penalty, weights)
        loss = F.cross_entropy(x[held] @ fit, labels[held])
        if loss > least:
            break
        least = loss
        weights = fit
        best = penalty
    weights, _ = softmax_regression(x, labels, best, weights)
    return percent_right(x_test @ weights, answers)


def score(x, x_test, data):
    """top1, neighbours and effective_rank of the features of data's images; see `evaluate`."""
    labels = data.train_labels
    test = (x_test, data.test_labels, data.classes)
    sample = torch.cat(hold_out(len(x)))[:10_000]    # in an order shuffled alike in every run
    result = dict(top1=None, neighbours=None)
    if labels.min() < labels.max() and data.test_labels.min() >= 0:
        result["top1"] = linear_classifier(x, labels, *test)
        result["neighbours"] = neighbours(x[sample], labels[sample], *test)
    result["effective_rank"] = round(effective_rank(x[sample]), 2)
    return result


def evaluate(encoder, data, grid=2, amp="off", update_statistics=False):
    """Measure a frozen encoder, images (B, C, H, W) -> features (B, C', G, H', W'); a dict of

        top1                `linear_classifier`, in percent; None without labels of two classes
        neighbours          `neighbours`, the same, among 10,000 training images at most
        effective_rank      `effective_rank` of these training images
        mean_top1, mean_neighbours, mean_effective_rank       the same
        dimensions, train_images, test_images                 D, N, M

    The first three read its maps averaged to grid x grid, or all positions if grid is 0, the next
    three the mean over all positions. With update_statistics every batch norm takes those of the
    training images first (`take_statistics`). Modules keep their mode. Errors as for `extract`.
    """
    with kept(encoder.modules(), "training"):
        if update_statistics:
            take_statistics(encoder, data, amp)
        encoder.eval()
        x, means = extract(encoder, data, data.train_images, grid, amp)
        x_test, test_means = extract(encoder, data, data.test_images, grid, amp)
    result = score(x, x_test, data)
    of_means = result if grid == 1 else score(means, test_means, data)
    for name in list(result):
        result[f"mean_{name}"] = of_means[name]
    return result | dict(dimensions=x.shape[1], train_images=len(x), test_images=len(x_test))


# ------------------------------------------------------------------------------------------ results

def write_result(out, settings, result, frozen, epoch):
    """Write `evaluate`'s result, with method, epoch and that of the frozen encoder, to
    OUT/probe.json, unless out is None. Returns it, a dict."""
    result = result | dict(method=settings["method"], epoch=epoch, frozen=frozen)
    if out is not None:
        write_whole(f"{out}/probe.json", json.dumps(result).encode())
    return result


def in_words(result):
    """The first measures of `evaluate` in a line for people; top-1 needs labels."""
    words = []
    for name in ("top1", "neighbours", "effective_rank"):
        if result[name] is not None:
            words.append(f"{name.replace('_', ' ')} {result[name]:.2f}")
    return ", ".join(words)


def probe_run(folder, device, data_dir, cache_dir):
    """What the command does. Raises a ValueError or an OSError, in one line, for bad input."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU: use --device cpu")
    encoder, settings = load_encoder(folder)
    checkpoint = read_checkpoint(f"{folder}/checkpoint.pt")
    data = load_data(settings, device, data_dir, cache_dir)
    torch.manual_seed(settings["seed"])
    untrained = make_encoder(settings)
    amp = settings["amp"]
    if device != settings["device"]:
        amp = "off"    # It was chosen for the run's device.
    grid = settings["probe_grid"]
    with full_precision(amp):
        result = evaluate(encoder.to(device), data, grid, amp, update_statistics=True)
        measured = evaluate(untrained.to(device), data, grid, amp, update_statistics=True)
    # Beside them, the held-out measures of --eval-every stay.
    frozen = checkpoint.get("frozen", {}) | measured
    out = folder
    if data.digest() != settings.get("images_hash"):
        out = None
        print(f"probe.py: {folder}/probe.json is left as it is, since these are not the images "
              "and labels of the run", file=sys.stderr)
    print(json.dumps(write_result(out, settings, result, frozen, checkpoint.get("epoch"))))


def end(message, status):
    """End the program with one line."""
    print(f"{Path(sys.argv[0]).name}:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


def run(program, *arguments):
    """Call a program's function. Bad input, or no room on the disk or in memory, ends the program
    with one line and exit status 2."""
    # What Python, CUDA, its libraries and PyTorch on a CPU say when memory runs out.
    out_of_memory = ("MemoryError", "out of memory", "ALLOC_FAILED", "can't allocate memory",
                     "Storage size calculation overflowed")
    try:
        program(*arguments)
    except (ValueError, OSError, OverflowError) as error:
        end(error, 2)
    except (RuntimeError, MemoryError) as error:
        if not any(words in repr(error) for words in out_of_memory):
            raise
        end("out of memory: take a smaller --batch-size or network, or another --device", 2)


def main(argv=None):
    parser = argparse.ArgumentParser(usage="python probe.py RUN [options]")
    parser.add_argument("folder", metavar="RUN", help="a run's folder, the --out of train.py")
    parser.add_argument("--data-dir", help="where the data set is (default: as in the run)")
    parser.add_argument("--cache-dir", help="where decoded images are (default: as in the run)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=("cpu", "cuda"), help="(cuda if there is a GPU)")
    args = parser.parse_args(argv)
    run(probe_run, args.folder, args.device, args.data_dir, args.cache_dir)


if __name__ == "__main__":
    main()
