"""More from the same forward pass: several views of an image, and shifts together with turns or enlargements, on MNIST.

    python experiments/views.py --budget cpu --jobs 2

The runs with two views and one group, to compare with, are H-SSL's of table1.py.
"""
from runs import main
from table1 import flags


def rows(budget):
    translation, rotation, scale = (f"{flags('mnist', group, budget)} --method h-ssl" for group in ("translation", "rotation", "scale"))
    return {
        "translation, 4 views": f"{translation} --views 4",
        "rotation, 4 views": f"{rotation} --views 4",
        "rotation and translation": f"{rotation} --window 4",
        "rotation and translation, 4 views": f"{rotation} --window 4 --views 4",
        "scale, 3 views": f"{scale} --views 3",
        "scale and translation": f"{scale} --window 4",
    }


if __name__ == "__main__":
    main(__doc__, {"views": rows})
