"""List every method: ``python -m tttlab.methods``."""

import ast
import re
from pathlib import Path

from tabulate import tabulate

from tttlab.config.method_settings import METHODS, declared, method_names
from tttlab.config.objective_settings import of_one_image

# By the head that a method needs.
BACKBONES = {
    None: "any",
    "simclr": "any, with a SimCLR head",
    "mae": "ViT, with an MAE head",
    "rotation": "ResNet, RegNet, ConvNeXt, ViT, with a rotation head",
    "simsiam": "any, with SimSiam heads",
    "clust3": "any, with cluster heads",
    "it3": "any, with an IT3 head",
    "learned": "any with stages, with a learned task's head",
}


def rows() -> list[dict[str, str]]:
    """List every method with what it does, its paper, what it needs and what it supports.

    The last row is MT3. It is not a method but a way to train for the methods of objectives.
    """
    table = []
    for name in method_names():
        declaration = declared(name)
        own_head = f"any, with the head of {declaration.head}"
        table.append(
            {
                "method": name,
                **summary(METHODS / f"{name}.py"),
                "trains": "yes" if declaration.trains else "no",
                "protocols": ", ".join(declaration.protocols),
                "backbones": BACKBONES.get(declaration.head, own_head),
            }
        )
    table.append(
        {
            "method": "MT3 (finetune.mode: meta)",
            **summary(METHODS.parent / "training" / "meta_training.py"),
            "trains": "yes",
            "protocols": "episodic, online",
            "backbones": f"any, with the head of {of_one_image()}",
        }
    )
    return table


def summary(file: Path) -> dict[str, str]:
    """Read from a file's docstring what the method does, and its paper."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    papers = re.findall(r"(?:[A-Z]\w+ \d{4}|arXiv \d{4}\.\d{5})", " ".join(docstring.split()))
    return {
        "what it does": docstring.partition("\n")[0].rstrip("."),
        "paper": ", ".join(papers[:2]) or "–",
    }


if __name__ == "__main__":
    print(tabulate(rows(), headers="keys"))
