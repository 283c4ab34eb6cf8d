"""Write the image sets of params.yaml to outputs/data: checked, split, packed or in place."""

import json
import os
import shutil

from tttlab.config.params import Params
from tttlab.workflow import command, places


def run(params: Params) -> None:
    """Write the sets beside outputs/data and move them there last: it is never incomplete."""
    from tttlab.workflow.gathering import decode, open_sources, separate
    from tttlab.workflow.set_files import write_set, write_shifted

    opened = open_sources(params, places.ROOT / "downloads")
    sets, shifts = separate(params, *decode(params, opened))
    target, partial = places.OUTPUTS / "data", places.OUTPUTS / "data.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        summary = {name: write_set(images, name, partial / name) for name, images in sets.items()}
        summary |= write_shifted(shifts, partial / "shifted")
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        (partial / "summary.json").write_text(text, encoding="utf-8")
    except Exception:  # perhaps the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


if __name__ == "__main__":
    command.main(run, __doc__)
