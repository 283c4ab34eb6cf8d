"""Collect the image sets of params.yaml under outputs/data: checked, split, and packed, or noted where they lie."""

import json
import os
import shutil

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params) -> None:
    """Write the sets into a folder beside outputs/data that takes its place at the end: it is never half full."""
    from tttlab.workflow.gathering import decode, open_sources, separate
    from tttlab.workflow.set_files import write_set, write_shifted

    sets, shifts = separate(
        params, *decode(params, open_sources(params, places.ROOT / "downloads"))
    )
    target, partial = places.OUTPUTS / "data", places.OUTPUTS / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    summary = {name: write_set(images, name, partial / name) for name, images in sets.items()}
    summary |= write_shifted(shifts, partial / "shifted")
    (partial / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


if __name__ == "__main__":
    command.main(run, __doc__)
