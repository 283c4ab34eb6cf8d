"""Write the pins of requirements.txt into pyproject.toml, where uv reads them; see `make pins`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_pins(text: str) -> list[str]:
    """List the requirements of a compiled requirements file."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def main() -> None:
    """Replace the list of constraints."""
    pins = read_pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    lines = "".join(f"    {json.dumps(pin)},\n" for pin in pins)
    block = f"constraint-dependencies = [\n{lines}]\n"
    path = ROOT / "pyproject.toml"
    pattern = re.compile(r"constraint-dependencies = \[.*?\n\]\n", flags=re.DOTALL)
    text, count = pattern.subn(lambda _: block, path.read_text(encoding="utf-8"))
    assert count == 1
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
