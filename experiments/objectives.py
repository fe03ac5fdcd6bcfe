"""Objectives without negatives: SimSiam and BYOL in feature space (H-SSL) beside input space (A-SSL), on MNIST's translation.

    python experiments/objectives.py --budget cpu --jobs 2
"""
from runs import main
from table1 import flags


def rows(budget):
    return {f"{objective} {method}": f"{flags('mnist', 'translation', budget)} --objective {objective} --method {method}"
            for objective in ("simsiam", "byol") for method in ("a-ssl", "h-ssl")}


if __name__ == "__main__":
    main(__doc__, {"objectives": rows})
