"""Names of files, folders and classes: which are somebody's own, how they are compared, which can be written."""

import unicodedata

# What macOS, Synology, QNAP, Windows, Linux and Python leave behind, in lower case.
_LITTER = frozenset(
    (
        "__macosx",
        "icon\r",
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
        "@recycle",
        "@recently-snapshot",
        "$recycle.bin",
        "system volume information",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "lost+found",
        "__pycache__",
    )
)


def is_own(name: str) -> bool:
    """Whether somebody put a file or folder of this name there: it is not hidden, and no system left it behind."""
    return not name.startswith(".") and name.lower() not in _LITTER


def nfc(name: str) -> str:
    """Encode accents in the one way (Unicode's form NFC) in which names are compared; what lies on disk may keep another."""
    return unicodedata.normalize("NFC", name)


def is_utf8(name: str) -> bool:
    """Whether a name can be written in UTF-8, as all results are; a file on Linux may be called by any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
