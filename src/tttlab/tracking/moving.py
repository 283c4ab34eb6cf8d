"""MLflow's absolute paths of files that moved, or were copied, together with the project."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

_COLUMNS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
# The files of a version are those of the logged model that it was made of (models:/<model's id>).
_OF_ITS_MODEL = """
    (SELECT artifact_location FROM logged_models
     WHERE 'models:/' || model_id = model_versions.source AND experiment_id = ?)"""


def relocate(store: Path, experiment: str, files: str) -> None:
    """Correct the paths in a store, if its files are elsewhere than it says.

    Of several processes that do so at once each leaves the same behind.

    Args:
        store: the file of the database.
        experiment: the name of the one whose location is that of all files.
        files: the address of the folder where they are now.
    """
    with closing(sqlite3.connect(store, timeout=60)) as database, database:
        found = database.execute(
            "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?", (experiment,)
        ).fetchone()
        if found is None:
            return
        number, old = found
        if old != files:
            _replace(database, old, files)
            _replace(database, _path(old), _path(files))  # MLflow's own experiment, Default
        _correct_versions(database, number)


def _replace(database: sqlite3.Connection, old: str, new: str) -> None:
    """Put one folder in the place of another, at the beginning of every path."""
    for table, column in _COLUMNS.items():
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )


def _correct_versions(database: sqlite3.Connection, experiment: int) -> None:
    """Correct registered versions where all else was corrected without them.

    Earlier releases of this package did so. It is read first: writing takes a lock.
    """
    wrong = f"storage_location != {_OF_ITS_MODEL}"
    found = database.execute(f"SELECT 1 FROM model_versions WHERE {wrong}", (experiment,))
    if found.fetchone():
        database.execute(
            f"UPDATE model_versions SET storage_location = {_OF_ITS_MODEL} WHERE {wrong}",
            (experiment, experiment),
        )


def _path(uri: str) -> str:
    return unquote(urlsplit(uri).path)
