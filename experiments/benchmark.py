"""Measure the project's times and memory, each beside what it is compared with.

    python experiments/benchmark.py [--parts abcdefghij] [--rounds 7] [--device cpu] [--threads 2]

What is compared runs in one process, in alternating order; medians over the rounds, of the times and of the ratios
within a round. escnn, lightly and timm take part if they are installed; the project does not need them. Images are
random: nothing is downloaded.

"""
import argparse
import contextlib
import functools
import io
import itertools
import statistics
import tempfile
import time
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from runs import machine                                                       # first: it finds the project's modules
import data as datasets
import run
import train
from hssl import Rotation, Translation
from lars import LARS
from layers import GroupConv2d, LiftingConv2d, ResidualBackbone, steerable_basis
from losses import nt_xent
from measure import (FLAGS, compare, flags_of, header, installed, peak_memory, row, seconds, step_memory,
                     training_step)

# ----------------------------------------------------------------------------------------------------------- the parts
def steps(args):
    """training step: A-SSL over H-SSL, for each data set and group"""
    header("(a) training step", "images", "A-SSL, s", "H-SSL, s", "A-SSL / H-SSL")
    for dataset in FLAGS[args.device]:
        for group in train.GROUPS:
            flags = flags_of(dataset, group, args.device)
            h_ssl, a_ssl = (training_step(f"{flags} --method {method}", args.device) for method in ("h-ssl", "a-ssl"))
            times = compare({"h": h_ssl[0], "a": a_ssl[0]}, args.rounds, args.device)
            row(f"{dataset}, {group}", h_ssl[2], f"{times['a'][0]:.3f}", f"{times['h'][0]:.3f}", f"{times['a'][1]:.2f}")


def convolution(group, group_size, extent, c_in, c_out, side, images, device):
    """conv2d with ready filters, our layer and escnn's R2Conv, forward and backward: {name: callable}."""
    lifting = c_in == 1
    channels = c_in if lifting else group_size * c_in                          # that conv2d reads and writes
    groups = group_size if extent == 1 and not lifting else 1
    x, kernel, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in (
        (images, channels, side, side), (group_size * c_out, channels // groups, 7, 7), (group_size * c_out,)))

    def both_ways(f, parameters):
        parameters = list(parameters)

        def both():
            with run.precision(device, "float16" if device == "cuda" else "off"):                    # as train.py does
                y = f(x)
            torch.autograd.grad(y, (x, *parameters), torch.ones_like(y))
        return both

    basis = steerable_basis(group, group_size, 7)
    if lifting:
        layer = ours = LiftingConv2d(c_in, c_out, basis).to(device)
    else:
        layer = GroupConv2d(c_in, c_out, basis, extent, group == "rotation").to(device)
        ours = lambda x: layer(x.unflatten(1, (group_size, c_in)).transpose(1, 2))                   # noqa: E731
    sides = {"conv2d": both_ways(lambda x: F.conv2d(x, kernel, bias, padding=3, groups=groups), (kernel, bias)),
             "layer": both_ways(ours, layer.parameters())}
    escnn = installed("escnn.nn")
    if escnn and group == "rotation" and c_in <= 128:                          # more do not fit in memory
        space = installed("escnn.gspaces").rot2dOnR2(group_size)
        fields = escnn.FieldType(space, c_in * [space.trivial_repr if lifting else space.regular_repr])
        theirs = escnn.R2Conv(fields, escnn.FieldType(space, c_out * [space.regular_repr]), 7, padding=3).to(device)
        sides["escnn"] = both_ways(lambda x: theirs(escnn.GeometricTensor(x, fields)).tensor, theirs.parameters())
    return sides


def convolutions(args):
    """group convolution, and escnn's, over conv2d with ready filters, forward and backward; how long the basis takes"""
    layers = {"MNIST, lifting": (1, 32, 28, 128), "MNIST, second": (32, 63, 14, 128), "MNIST, third": (63, 95, 7, 128),
              "residual, first stage": (128, 128, 32, 8), "residual, second": (256, 256, 16, 16),
              "residual, third": (512, 512, 8, 32)}                            # C, C', side of the maps, images
    header("(b) convolution 7x7", "images", "conv2d, s", "layer / conv2d", "escnn / conv2d")
    for group in (("translation", 1, 1), ("rotation", 4, 4), ("scale", 3, 1)):
        for name, (c_in, c_out, side, images) in layers.items():
            images *= 8 if args.device == "cuda" else 1
            times = compare(convolution(*group, c_in, c_out, side, images, args.device), args.rounds, args.device)
            row(f"{group[0]}, {name} {c_in}-{c_out} at {side}", images, f"{times['conv2d'][0]:.4f}",
                *(f"{times[side][1]:.2f}" if side in times else "" for side in ("layer", "escnn")))
    header("(b) steerable_basis, once at the start", "s")
    for sizes in (("rotation", 8, 7), ("rotation", 8, 15), ("scale", 3, 7)):
        row(", ".join(map(str, sizes)), f"{seconds(lambda: steerable_basis(*sizes), 'cpu'):.3f}")


def optimizers(args):
    """LARS, lightly's and timm's, over SGD(foreach=True): a step on the residual network's weights"""
    shapes = [p.shape for p in ResidualBackbone("scale", 3).parameters()]

    def step_of(optimizer, **options):
        weights = [torch.randn(shape, device=args.device, requires_grad=True) for shape in shapes]
        for w in weights:
            w.grad = torch.randn_like(w)
        return optimizer(weights, lr=0.1, momentum=0.9, weight_decay=1e-4, **options).step

    sides = {"SGD, foreach": step_of(torch.optim.SGD, foreach=True), "our LARS": step_of(LARS),
             "SGD, a loop": step_of(torch.optim.SGD, foreach=False)}
    if lightly := installed("lightly.utils.lars"):
        sides["lightly's LARS"] = step_of(lightly.LARS)
    if timm := installed("timm.optim.lars"):
        sides["timm's LARS"] = step_of(timm.Lars)
    header("(c) optimizer step, residual network", "s", "/ SGD, foreach")
    for name, (median, ratio) in compare(sides, 3 * args.rounds, args.device).items():
        row(name, f"{median:.4f}", f"{ratio:.2f}")


def gradient(I, device):
    views = [torch.randn(4096, 128, device=device, requires_grad=True) for _ in range(2)]
    torch.autograd.grad(I(*views), views)


def losses(args):
    """lightly's NTXentLoss over nt_xent, 2 x 4096 x 128, forward and backward: time and peak memory"""
    sides = {"nt_xent": functools.partial(gradient, nt_xent, args.device)}
    if lightly := installed("lightly.loss"):
        sides["lightly's NTXentLoss"] = functools.partial(gradient, lightly.NTXentLoss(temperature=0.1), args.device)
    header("(d) loss of 2 x 4096 x 128", "s", "/ nt_xent", "peak memory, (2N)² float32")
    for name, (median, ratio) in compare(sides, args.rounds, args.device).items():
        row(name, f"{median:.3f}", f"{ratio:.2f}", f"{peak_memory(sides[name], args.device) / (4 * 8192**2):.2f}")


def collate(transform, pictures):
    return torch.stack([transform(picture) for picture in pictures])


def inputs(args):
    """input: a batch at once on the device, over torchvision's transforms in a DataLoader with 2 workers"""
    from torchvision import transforms
    images = torch.randint(256, (10_000, 1, 28, 28), dtype=torch.uint8)
    pictures = [Image.fromarray(image[0].numpy()) for image in images]
    data = datasets.Dataset(images.to(args.device), None, None, None, 10, 0.0, 0.3)
    plain, bilinear = [transforms.ToTensor(), transforms.Normalize([0.0], [0.3])], transforms.InterpolationMode.BILINEAR
    header("(e) input, MNIST, batch 500", "DataLoader, images/s", "here, images/s", "here / DataLoader")
    for name, group, moves in (
            ("convert and normalise", None, []),
            ("and shift", Translation(7, 4, 4), [transforms.RandomAffine(0, translate=(0.25, 0.25))]),
            ("and turn by 45°, bilinear", Rotation(8), [transforms.RandomRotation(180, bilinear)])):
        loader = DataLoader(pictures, 500, shuffle=True, num_workers=2, persistent_workers=True,
                            collate_fn=functools.partial(collate, transforms.Compose(moves + plain)))

        def here():                                                            # 10 epochs: one is too short to time
            for index in torch.cat([torch.randperm(10_000, device=args.device) for _ in range(10)]).split(500):
                x = data.batch(data.train_images, index)
                if group is not None:
                    elements = group.elements.to(args.device)
                    group.T(elements[torch.randint(len(elements), (500,), device=args.device)], x)

        sides = {"here": here, "loader": lambda: [batch.to(args.device) for batch in loader]}
        times = compare(sides, args.rounds, args.device)
        row(name, f"{10_000 / times['loader'][0]:,.0f}", f"{100_000 / times['here'][0]:,.0f}",
            f"{10 * times['loader'][1]:.0f}")


def epochs(args):
    """an epoch of train.py over as many bare steps on one batch that is in place, and what --eval-every 1 adds"""
    _, bare_step, batch = training_step("", args.device)
    times = []

    class Log(run.Log):
        """Whenever an epoch of train.py ends, note its time, and those of as many bare steps and of a look."""
        began = 0.0

        def step(self, step, *rest, **more):
            super().step(step, *rest, **more)                                  # waits for the GPU
            if step % self.steps == 0:
                whole = time.perf_counter() - self.began
                bare = seconds(lambda: [bare_step() for _ in range(self.steps)], args.device)
                times.append((whole, bare, seconds(self.watch, args.device)))
                self.began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with mock.patch.object(run, "Log", Log):
            train.main(train.parse(["--dataset", "glyphs", "--device", args.device, "--epochs", str(args.rounds + 1),
                                    "--save-every", "2", "--out", f"{folder}/run"]))
    whole, bare, ratio, look = (statistics.median(t) for t in zip(*((a, b, a / b, c / a) for a, b, c in times[1:])))
    images = 10_000 // batch * batch
    header("(f) epoch of glyphs", "train.py, images/s", "bare loop, images/s", "train.py / bare, time", "look / epoch")
    row(f"rotation, batch {batch}, saved every 2 epochs", f"{images / whole:,.0f}", f"{images / bare:,.0f}",
        f"{ratio:.3f}", f"{look:.3f}")


def profiles(args):
    """where an H-SSL step's time goes: the five largest operators (on a GPU: kernels), by their own time"""
    cuda = args.device == "cuda"
    header("(g) H-SSL training step, share of its time", *[""] * 5)
    for dataset in FLAGS[args.device]:
        for group in train.GROUPS:
            step, _, _ = training_step(flags_of(dataset, group, args.device), args.device)
            step()
            with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
                for _ in range(3):
                    step()
            # On a GPU operators are listed with the time of their kernels, which are listed again by themselves.
            kind = DeviceType.CUDA if cuda else DeviceType.CPU
            times = {item.key: item.self_device_time_total if cuda else item.self_cpu_time_total
                     for item in profiler.key_averages() if item.device_type == kind and not item.is_user_annotation}
            total, largest = sum(times.values()), sorted(times, key=times.get, reverse=True)[:5]
            row(f"{dataset}, {group}", *(f"{name.removeprefix('aten::')[:60]} {100 * times[name] / total:.0f} %"
                                         for name in largest))


def objectives(args):
    """training step with 4 views, SimSiam and BYOL, over the usual one"""
    flags = {"H-SSL, 2 views": "", "A-SSL, 2 views": "--method a-ssl", "H-SSL, 4 views": "--views 4",
             "A-SSL, 4 views": "--method a-ssl --views 4", "H-SSL, SimSiam": "--objective simsiam",
             "H-SSL, BYOL": "--objective byol"}
    base = flags_of("mnist", "rotation", args.device)
    sides = {name: training_step(f"{base} {own}", args.device)[0] for name, own in flags.items()}
    header("(h) training step on MNIST, rotation", "own flags", "s", "/ H-SSL, 2 views")
    for name, (median, ratio) in compare(sides, args.rounds, args.device).items():
        row(name, flags[name] and f"`{flags[name]}`", f"{median:.3f}", f"{ratio:.2f}")


def sizes(args):
    """every backbone at full width: parameters, multiply-adds of a forward pass, memory of a step of 512 images"""
    header("(i) backbone", "parameters", "multiply-adds per image", "H-SSL, 512 images a GPU", "A-SSL",
           "H-SSL, --checkpoint-activations", "A-SSL, the same")
    for dataset in FLAGS["cpu"]:
        for group in train.GROUPS:
            channels, side = datasets.SHAPES[dataset]
            encoder, _ = run.build(vars(train.parse(["--dataset", dataset, "--group", group])), channels, side)
            with FakeTensorMode(allow_non_fake_inputs=True):                   # shapes only, nothing is computed
                one, two = (torch.zeros(n, channels, side, side) for n in (1, 2))          # weights cancel in two - one
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    encoder(one)
                    first = counter.get_total_flops()
                    encoder(two)
                multiply_adds = (counter.get_total_flops() - 2 * first) / 2
            memory = []
            for extra, method in itertools.product(("", "--checkpoint-activations"), ("h-ssl", "a-ssl")):
                if extra and dataset == "mnist":                               # no residual blocks
                    memory.append("")
                    continue
                peak, _ = step_memory(f"--dataset {dataset} --group {group} --method {method} {extra}", images=512)
                memory.append(f"{peak / 2**30:.1f} GiB")
            row(f"{dataset}, {group}", f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M",
                f"{multiply_adds / 1e9:.2f} G", *memory)


def forms(args):
    """other forms of convolution: channels-last; for scale, channels filled up to multiples of 8, or a call each"""
    header("(j) conv2d 7x7", "images", "as it is, s", "channels-last / as it is", "filled up", "a call for each scale")
    for group, scales, c_in, c_out, side, images in (
            (group, scales, *layer) for group, scales in (("translation", 1), ("scale", 3))
            for layer in ((32, 63, 14, 128), (63, 95, 7, 128), (128, 128, 32, 8))):
        images *= 8 if args.device == "cuda" else 1
        fill_in, fill_out = -c_in % 8, -c_out % 8

        def side_of(convolve, memory_format=torch.contiguous_format):
            x = torch.randn(images, scales * c_in, side, side, device=args.device)
            kernel = torch.randn(scales * c_out, c_in, 7, 7, device=args.device)
            both = [t.to(memory_format=memory_format).requires_grad_() for t in (x, kernel)]

            def forward_and_backward():
                with run.precision(args.device, "float16" if args.device == "cuda" else "off"):
                    y = convolve(*both)
                torch.autograd.grad(y, both, torch.ones_like(y))
            return forward_and_backward

        def plain(x, kernel):
            return F.conv2d(x, kernel, padding=3, groups=scales)

        def filled(x, kernel):
            x = F.pad(x.unflatten(1, (scales, c_in)), (0, 0, 0, 0, 0, fill_in)).flatten(1, 2)
            kernel = F.pad(kernel.unflatten(0, (scales, c_out)), (0, 0, 0, 0, 0, fill_in, 0, fill_out)).flatten(0, 1)
            return plain(x, kernel).unflatten(1, (scales, -1))[:, :, :c_out]

        def each(x, kernel):
            pieces = zip(x.chunk(scales, 1), kernel.chunk(scales))
            return torch.cat([F.conv2d(piece, own, padding=3) for piece, own in pieces], 1)

        sides = dict(plain=side_of(plain), last=side_of(plain, torch.channels_last), filled=side_of(filled))
        if scales > 1:
            sides["each"] = side_of(each)
        times = compare(sides, args.rounds, args.device)
        row(f"{group}, {c_in}-{c_out} at {side}", images, f"{times['plain'][0]:.4f}",
            *(f"{times[name][1]:.2f}" if name in times else "" for name in ("last", "filled", "each")))


PARTS = dict(zip("abcdefghij", (steps, convolutions, optimizers, losses, inputs, epochs, profiles, objectives, sizes,
                                forms)))


def main():
    about = "\n".join(f"    ({letter}) {part.__doc__}" for letter, part in PARTS.items())
    p = run.Parser(description=__doc__ + about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default="".join(PARTS), help="letters of the parts to run (default: %(default)s)")
    p.add_argument("--rounds", type=run.number(int, 1), default=7, help="that medians are of (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is a GPU)")
    args = p.parse_args()
    if set(args.parts) - PARTS.keys():
        p.error(f"--parts {args.parts} must be letters of {''.join(PARTS)}")
    args.device = run.choose_device(args.device)
    torch.set_num_threads(args.threads)
    where = f"{machine()}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, medians of {args.rounds} rounds; (a), (g), (h): {FLAGS[args.device]}")
    for letter in args.parts:
        PARTS[letter](args)


if __name__ == "__main__":
    main()
