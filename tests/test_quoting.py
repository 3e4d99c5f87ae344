"""Other people's text does nothing to a terminal, and says the same."""

import json

from hypothesis import given
from hypothesis import strategies as st

from trl_cpo.quoting import as_json, escaped, harmless

TEXT = st.text(st.characters()) | st.text(st.sampled_from("\x1b[2J\r\x9b\u202e\u200b\ud800\n\t \u00a0γ😀\u2028"))


@given(TEXT)
def test_nothing_acts_on_a_terminal(text):
    shown = harmless(text)
    assert all(c in "\n\t" or c.isprintable() or c.isspace() for c in shown) and not set(shown) & set(
        "\x1b\r\x9b\u202e\u2028\x85"
    )
    assert shown.count("\n") == text.count("\n")
    assert harmless(shown) == shown and "\n" not in escaped(text)


@given(st.dictionaries(TEXT, TEXT | st.integers()))
def test_json_says_the_same(document):
    said = as_json(document)
    assert json.loads(said) == document
    assert all(c == "\n" or c.isprintable() for c in said)
