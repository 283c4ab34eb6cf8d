"""List every method: ``python -m tttlab.methods``."""

import ast
import re
from pathlib import Path

from tabulate import tabulate

from tttlab.config.method_settings import METHODS, declared, method_names

BACKBONES = {  # by the head that a method needs
    None: "any",
    "simclr": "any, with a SimCLR head",
    "mae": "ViT, with an MAE head",
    "rotation": "ResNet, RegNet, ConvNeXt, ViT, with a rotation head",
    "simsiam": "any, with SimSiam heads",
    "clust3": "any, with cluster heads",
    "it3": "any, with an IT3 head",
}


def rows() -> list[dict[str, str]]:
    """Tell of every method what its file says: what it does, its paper, and what it needs and supports.

    MT3 is no method of its own: a way to train, for the methods of objectives at test time.
    """
    table = []
    for name in method_names():
        own = declared(name)
        table.append(
            {
                "method": name,
                **summary(METHODS / f"{name}.py"),
                "trains": "yes" if own.trains else "no",
                "protocols": ", ".join(own.protocols),
                "backbones": BACKBONES[own.head],
            }
        )
    mt3 = {
        "trains": "yes",
        "protocols": "episodic, online",
        "backbones": "any, with the head of an objective but simclr",
    }
    return [
        *table,
        {
            "method": "MT3 (finetune.mode: meta)",
            **summary(METHODS.parent / "training" / "meta_training.py"),
            **mt3,
        },
    ]


def summary(file: Path) -> dict[str, str]:
    """Read what a file's docstring says it does, and its paper."""
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    papers = re.findall(r"(?:[A-Z]\w+ \d{4}|arXiv \d{4}\.\d{5})", " ".join(told.split()))
    return {
        "what it does": told.partition("\n")[0].rstrip("."),
        "paper": ", ".join(papers[:2]) or "–",
    }


if __name__ == "__main__":
    print(tabulate(rows(), headers="keys"))
