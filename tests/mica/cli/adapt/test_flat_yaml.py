"""A YAML file of options: values as they are written, and what is refused."""

import pytest

from mica.cli.adapt import flat_yaml
from mica.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank: 010", "010"),  # 8 in YAML 1.1
        ("rank: 1_000", "1_000"),
        ("rank: 0x10", "0x10"),
        ("rank: 1:30", "1:30"),  # 90
        ("rank: 1e3", "1e3"),
        ("rank: 2026-01-01", "2026-01-01"),
        ("rank: no", "no"),
        ("rank: .inf", ".inf"),
        ("rank: '16'", "16"),
        ("rank: !!str 16", "16"),
        ("rank:", None),
        ("rank: ~", None),
        ("rank: null", None),
        ("rank: 'null'", "null"),
        ("rank: ''", ""),
        ("rank: [a, 1, 'b c']", ["a", "1", "b c"]),
        ("rank:\n- a\n- 010\n", ["a", "010"]),
        ("rank: []", []),
        ("rank: &x 3", "3"),
        (r'rank: "\ud83d\ude00"', "😀"),  # JSON in ASCII
        (r'rank: "a\udcff"', "a\udcff"),  # a byte of a name of a file
    ],
)
def test_values_are_what_is_written(text, expected):
    assert flat_yaml.parse(f"{text}\n") == {"rank": expected}


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}]\n"
    for before, name in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank: 1\nseed: 2\nrank: 3\n", "rank is set twice, the second time in line 3"),
        ("rank: {a: 1}\n", "rank must be one value, but is a mapping in line 1"),
        ("text: [a, [b]]\n", "every value of text must be one value, but is a list in line 1"),
        ("text: [a, ~]\n", "text has an empty value in line 1"),
        ("rank: !!int 010\n", "rank must not have a tag, but has tag:yaml.org,2002:int in line 1"),
        ("rank: !!python/object:os.system x\n", "rank must not have a tag"),
        ("? [a]\n: b\n", "a key must be one value, but is a list in line 1"),
        ("rank: 1\n---\nrank: 2\n", "is not YAML: expected a single document"),
        ("rank: *unknown\n", "is not YAML: found undefined alias"),
        (
            "rank: " + "[" * 3000 + "]" * 3000,
            "must be a mapping of options to values, but is nested too deeply",
        ),
        (BOMB, "every value of b must be one value, but is a list in line"),
        ("- a\n", "must be a mapping of options to values"),
        ("", "must be a mapping of options to values"),
    ],
)
def test_what_options_have_no_use_for_is_refused(text, message):
    with pytest.raises(UsageError) as refusal:
        flat_yaml.parse(text)
    assert str(refusal.value).startswith(message)
