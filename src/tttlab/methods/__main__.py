"""List every method: ``python -m tttlab.methods``."""

import ast
import re

from tabulate import tabulate

from tttlab.method_settings import METHODS, declared, method_names

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
    """Tell of every method what its file says: what it does, its paper, and what it needs and supports."""
    table = []
    for name in method_names():
        told, own = ast.get_docstring(ast.parse((METHODS / f"{name}.py").read_text(encoding="utf-8"))), declared(name)
        table.append({
            "method": name,
            "what it does": told.partition("\n")[0].rstrip("."),
            "paper": ", ".join(re.findall(r"(?:[A-Z]\w+ \d{4}|arXiv \d{4}\.\d{5})", " ".join(told.split()))[:2]) or "–",
            "trains": "yes" if own.trains else "no",
            "protocols": ", ".join(own.protocols),
            "backbones": BACKBONES[own.head],
        })  # fmt: skip
    return table


if __name__ == "__main__":
    print(tabulate(rows(), headers="keys"))
