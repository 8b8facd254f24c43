"""README and tutorials: every example runs, and prints what the page says.

Words must agree exactly. Numbers may differ by 30 %, or by one in their last printed digit: training
multiplies differences in the last digit between processors (one gene of one cell moved by a quarter
between two orders of summing), and means over a few hundred draws carry Monte Carlo error.
"""

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e-?\d+)?")


def agree(printed, expected):
    """Whether two texts are the same up to small differences in their numbers."""
    squeeze = [
        re.sub(r"[ \t]+", " ", "\n".join(line.strip() for line in t.strip().splitlines())) for t in (printed, expected)
    ]
    if NUMBER.sub("#", squeeze[0]) != NUMBER.sub("#", squeeze[1]):
        return False
    pairs = zip(*(NUMBER.findall(t) for t in squeeze), strict=True)

    def near(one, other):
        last_digit = 10.0 ** -len(other.partition(".")[2])
        one, other = (float(v.replace(",", "")) for v in (one, other))
        return abs(one - other) <= max(0.3 * abs(other), 1.001 * last_digit)

    return all(near(*pair) for pair in pairs)


def run(steps):
    """Run (code, expected output or None) in one namespace; what was printed where it disagrees."""
    names = {"__name__": "__page__"}
    wrong = []
    for code, expected in steps:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("default")
            exec(compile(code, "<page>", "exec"), names)  # noqa: S102 (our own pages)
        if expected is not None and not agree(out.getvalue(), expected):
            wrong.append(f"{code}\nprinted:\n{out.getvalue()}\nthe page says:\n{expected}")
    return wrong


def of_markdown(text):
    """Python blocks, each with the text block that follows it."""
    blocks = re.findall(r"```(python|text|\w*)\n(.*?)```", text, re.S)
    for i, (kind, code) in enumerate(blocks):
        if kind == "python":
            yield code, blocks[i + 1][1] if i + 1 < len(blocks) and blocks[i + 1][0] == "text" else None


def of_tutorial(text):
    """Code cells, each with its lines after ``# >``."""
    for cell in re.split(r"^# %%.*$", text, flags=re.M):
        said = re.findall(r"^# > ?(.*)$", cell, re.M)
        if not all(line.startswith("#") or not line for line in cell.splitlines()):
            yield cell, "\n".join(said) if said else None


def test_the_readme_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = list(of_markdown((ROOT / "README.md").read_text()))

    assert len(steps) >= 3
    assert any(expected for _, expected in steps)
    wrong = run(steps)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda p: p.stem)
def test_tutorials_print_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = list(of_tutorial(page.read_text()))

    assert any(expected for _, expected in steps)
    wrong = run(steps)
    assert not wrong, "\n\n".join(wrong)


def test_the_comparison_can_fail():
    assert agree("held out -660.1, b  ok", "held out -655.0, b ok")
    assert not agree("held out -660.1", "held out -400.0")
    assert not agree("held out -660.1 nats", "held out -660.1")
    assert not agree("1 2", "1")
    assert not agree("nmi 0.3", "nmi 0.6")
    assert run([("print(3)", "9")]) != []


def test_the_story_on_the_tutorial_is_the_one_that_is_fitted():
    import ast
    import inspect

    from pyrosc.models import scvi

    shown = re.findall(
        r"^#     (.*)$", (ROOT / "tutorials" / "01_first_fit.py").read_text().split("def model")[1], re.M
    )
    tree = ast.parse(inspect.getsource(scvi.model)).body[0].body[1:]
    assert "\n".join(line.strip() for line in shown).strip() == "\n".join(
        line.strip() for statement in tree for line in ast.unparse(statement).splitlines()
    ).replace("'", '"')
