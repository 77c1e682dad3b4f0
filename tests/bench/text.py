"""A small BERT from scratch on AG News, then in INT8: accuracy, agreement, file size.

    python -m tests.bench.text                       # trains first: minutes on a GPU or a quiet CPU
    python -m tests.bench.text --model RUN_OR_FOLDER

6,000 articles to train on, 1,600 to report on. Both forms are compiled; agreement is the share of the 1,600 on which they name
the same class.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from workbench import QuantConfig, TrainConfig, compare, load_model, quantize, save_model, train
from workbench.comparison import CompareConfig
from workbench.data import DataConfig, load_batches

CONFIG = TrainConfig(
    data={"name": "ag_news", "batch_size": 64},
    model={"name": "bert_small"},
    optim={"lr": 5e-4, "weight_decay": 0.01},
    clip={"mode": "fixed"},
    schedule={"name": "linear", "warmup": 0.1},
    epochs=4,
    precision="bf16",
    checkpoint={"every_epochs": 0},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a trained one, in place of training")
    parser.add_argument("--folder", type=Path, default=Path("out/text"))
    arguments = parser.parse_args()
    if arguments.model is None:
        with tempfile.TemporaryDirectory() as runs:
            trained = train(CONFIG, root=runs)
            print(f"trained: {trained.metrics}", flush=True)
            save_model(trained.model.cpu(), arguments.folder / "fp32")
    model = load_model(arguments.model or arguments.folder / "fp32")
    variants = {"fp32": model}
    for bits in (32, 8):
        variants[f"INT8, {bits}-bit embeddings"] = quantize(model, QuantConfig(mode="dynamic", embedding_bit=bits))
    articles = load_batches(DataConfig(name="ag_news", eval_batch_size=32))
    torch.manual_seed(0)
    result = compare(variants, articles, CompareConfig(seconds=30))
    print(result)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result.to_html(arguments.folder / "comparison.html")
    result.to_csv(arguments.folder / "comparison.csv")


if __name__ == "__main__":
    main()
