"""Experiment 3: H-SSL's base space and topographic distance, beside A-SSL's crop size and displacement, on MNIST's translation.

    python experiments/sweeps.py {base-space,distance} --budget cpu --jobs 2

H-SSL's window of s positions stands over A-SSL's crop of 4 s pixels, and a distance of d positions over a displacement of
4 d pixels. The other of the two is held: the distance at 2 at most, the window at 2 x 2.
"""
from runs import main
from table1 import flags

METHODS = {"h-ssl": "--method h-ssl", "a-ssl": "--method a-ssl --crop"}
# On a CPU half the images, as many steps; classified from the mean over positions, which tells these trainings apart better than 2x2 means.
SMALLER = "--train-images 5000 --batch-size 256 --probe-grid 1"


def sweep(budget, points):
    base = flags("mnist", "translation", budget) + (f" {SMALLER}" if budget == "cpu" else "")
    return {f"{method} {name}": f"{base} {options} {setting}" for name, setting in points.items() for method, options in METHODS.items()}


if __name__ == "__main__":
    main(__doc__, {
        "base-space": lambda budget: sweep(budget, {f"{s}": f"--base-space {s} --max-distance 2" for s in (1, 2, 3, 4, 5)}),
        "distance": lambda budget: sweep(budget, {f"{d}": f"--base-space 2 --max-distance {d}" for d in (1, 2, 3, 4, 5)}),
    })
