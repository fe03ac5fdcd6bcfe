"""Small trainings on a CPU behind what the README says we learned: one table a name.

    python experiments/trials.py {groups,rates,long,trust,readouts,glyphs,glyphs-untied,glyphs-views} --jobs 2
"""
from runs import main

MNIST = "--device cpu --dataset mnist --train-images 10000 --batch-size 512 --epochs 8 --warmup-epochs 1 --trust-coefficient 0.03"
WIDTHS = {"translation": "--widths 16 32 64 --kernel-size 5", "rotation": "--widths 8 16 32 --kernel-size 5",
          "scale": "--widths 8 16 32 --kernel-size 7"}
SMALL = "--device cpu --dataset mnist --group rotation --train-images 5000 --widths 4 8 16 --kernel-size 5 --warmup-epochs 1 --trust-coefficient 0.03"
LONG = "--device cpu --dataset mnist --train-images 10000 --kernel-size 5 --batch-size 256 --warmup-epochs 2"

TABLES = {
    # Table 1's rows at the paper's temperature, rotation and scale with twice the channels that they have there.
    "groups": {f"{g} {m}": f"{MNIST} --group {g} --method {m} {WIDTHS[g]}" for g in WIDTHS for m in ("h-ssl", "a-ssl")},
    # Over half of the paper's 7,000 steps, with a batch that a CPU can afford: 1.6 is what 0.1 per 256 makes at batch 4096.
    "rates": {f"lr {lr}": f"{LONG} --widths 8 16 32 --epochs 100 --lr {lr}" for lr in (0.1, 1.6)},
    # Why do those fall below the frozen encoder?
    "long": {"temperature 1": f"{LONG} --widths 8 16 32 --epochs 100 --temperature 1",
             "twice the channels, half the epochs": f"{LONG} --widths 16 32 64 --epochs 50"},
    # The same product of the two, so the same steps of the weights; but biases and norms take the bare rate.
    "trust": {f"lr {lr}, trust coefficient {trust}": f"{MNIST} {WIDTHS['translation']} --lr {lr} --trust-coefficient {trust}"
              for lr, trust in ((0.1, 0.03), (3, 0.001))},
    "readouts": {
        **{f"{m} grid {grid}": f"{SMALL} --method {m} --grid {grid} --epochs 10 --batch-size 256"
           for m, grid in (("h-ssl", 0), ("h-ssl", 2), ("h-ssl", 1), ("a-ssl", 1))},
        "h-ssl grid 0, temperature 1": f"{SMALL} --grid 0 --epochs 10 --batch-size 256 --temperature 1",
        "h-ssl grid 1, temperature 1": f"{SMALL} --grid 1 --epochs 10 --batch-size 256 --temperature 1",
        "h-ssl grid 1, 126 negatives": f"{SMALL} --grid 1 --epochs 3 --batch-size 64",
        "h-ssl grid 1, 2046 negatives": f"{SMALL} --grid 1 --epochs 48 --warmup-epochs 4 --batch-size 1024",
        "h-ssl grid 1, twice the channels": f"{SMALL} --grid 1 --epochs 10 --batch-size 256 --widths 8 16 32",
    },
    "glyphs": {name: f"--device cpu {flags}" for name, flags in (
        ("h-ssl", ""), ("a-ssl", "--method a-ssl"), ("h-ssl, temperature 0.1", "--temperature 0.1"), ("h-ssl, grid 1", "--grid 1"))},
    # Experiment 2 where rotation gains much.
    "glyphs-untied": {m: f"--device cpu --structure none --method {m}" for m in ("h-ssl", "a-ssl")},
    # views.py where rotation gains much.
    "glyphs-views": {"4 views": "--device cpu --views 4", "with shifts": "--device cpu --window 5",
                     "with shifts, 4 views": "--device cpu --window 5 --views 4"},
}

if __name__ == "__main__":
    main(__doc__, {name: lambda budget, rows=rows: rows for name, rows in TABLES.items()}, budgets=("cpu",))
