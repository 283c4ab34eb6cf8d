"""Names of files, folders and classes: how they are compared, and which can be written."""

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
    """Tell whether a file of this name is the user's: not hidden, and not left by a system."""
    return not name.startswith(".") and name.lower() not in _LITTER


def nfc(name: str) -> str:
    """Encode accents as Unicode's form NFC, in which names are compared.

    Files on disk may have another form.
    """
    return unicodedata.normalize("NFC", name)


def is_utf8(name: str) -> bool:
    """Tell whether a name can be written in UTF-8, as all results are.

    On Linux the name of a file may be any bytes.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
