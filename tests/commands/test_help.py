"""`--help` teaches: every option of every verb and stage says what it is."""

import re

import pytest

from worldline.cli import STAGES, VERBS, main

# a mapping's keys have no text of their own: it stands over them
UNEXPLAINED = re.compile(r"--model\.shares\.\w+")


def explanations(page: str) -> dict[str, str]:
    """Option -> what is said of it, without its default."""
    found: dict[str, str] = {}
    name = None
    for line in page.splitlines():
        text = line[2:].rstrip(" |│")  # what is in a box, whatever its lines are drawn with
        if line[1:2] != " ":
            name = None
        elif option := re.match(r"(?:-\w, )?(--[a-z][\w.-]*)", text):
            name = option[1]
            found[name] = " ".join(re.split(r"\s{2,}", text)[1:])
        elif name is not None:
            found[name] += " " + text.strip()
    return {name: re.sub(r"\((default|required).*", "", text).strip() for name, text in found.items()}


@pytest.mark.parametrize(
    "command", [*((verb,) for verb in VERBS if verb != "train"), *(("train", s) for s in STAGES)], ids=" ".join
)
def test_every_option_says_what_it_is(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column of boxes
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = explanations(capsys.readouterr().out)
    assert {"--help"} < set(said), "the page was read"
    bare = [name for name, text in said.items() if len(text) < 4 and not UNEXPLAINED.fullmatch(name)]
    assert not bare, f"without a word: {', '.join(bare)}"
