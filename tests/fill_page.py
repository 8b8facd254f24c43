"""Write what a tutorial prints now beneath its cells: python tests/fill_page.py tutorials/01_first_fit.py.

For after a change that moves numbers. Read the difference before it is committed: the words around must still be true.
"""

import contextlib
import io
import re
import sys
import warnings
from pathlib import Path


def filled(text: str) -> str:
    """The page with each block of ``# >`` lines replaced by what its cell prints."""
    names = {"__name__": "__page__"}
    pieces = re.split(r"(^# %%.*$)", text, flags=re.M)
    for i, cell in enumerate(pieces):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("default")
            exec(compile(cell, "<page>", "exec"), names)  # noqa: S102 (our own pages)
        said = "".join(f"# > {line}".rstrip() + "\n" for line in out.getvalue().strip("\n").splitlines())
        pieces[i] = re.sub(r"(^# >.*\n?)+", said.replace("\\", r"\\"), cell, count=1, flags=re.M)
    return "".join(pieces)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(filled(page.read_text()))
