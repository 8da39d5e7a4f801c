"""What a result on a GPU depends on, as a word: the code of zoo/ and kernels/, not their texts."""

import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def fingerprint(*files, root=ROOT):
    """A word that changes with any Python file of zoo/ and kernels/, and with the files named.

    kernels/bench/ is left out: how something is measured is named by who asks. A copy without git
    has the same word.

    Args:
        files: more of them, relative to the root; one that is not there counts as empty.
        root: of the repository.
    """
    found = {root / name for name in files}
    for room in ("zoo", "kernels"):
        for folder, folders, names in os.walk(root / room):  # does not follow zoo/kernels, a link
            folders[:] = sorted(set(folders) - {"bench", "__pycache__"})
            found |= {Path(folder) / name for name in names if name.endswith(".py")}
    total = hashlib.sha256()
    for path in sorted(found):
        content = path.read_bytes() if path.is_file() else b""
        total.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]
