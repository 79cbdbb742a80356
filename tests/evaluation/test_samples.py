"""The sample file: what is read back, and what is refused by name."""

import gzip
import json

import pytest

from ddlm.evaluation.measure import choose_units
from ddlm.evaluation.samples import Sample, read_samples, write_samples
from ddlm.types import DataError


def test_a_sample_file_reads_back_as_written(tmp_path):
    samples = [
        Sample(
            "one line\u2028that\x85splits\nnowhere",
            [1, 2, 3],
            "one",
            [False, True, True],
            50,
            "completed",
            3,
        ),
        Sample("только текст", reference="a real one"),
        Sample("a b c d", generated=[(2, 3), (5, 7)]),
    ]
    assert write_samples(tmp_path / "s.jsonl", samples) == 3
    assert read_samples(tmp_path / "s.jsonl") == samples
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_an_interrupted_writer_leaves_the_old_file(tmp_path):
    file = tmp_path / "s.jsonl"
    write_samples(file, [Sample("old")])

    def broken():
        yield Sample("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(file, broken())
    assert read_samples(file) == [Sample("old")]
    assert len(list(tmp_path.iterdir())) == 1


def test_generated_tokens_mark_where_kept_parts_were():
    sample = Sample("x", [1, 2, 3, 4, 5, 6], is_noised=[True, False, True, True, False, True])
    assert sample.generated_tokens() == [1, -1, 3, 4, -1, 6]
    prefix = Sample("x", [1, 2, 3], is_noised=[False, True, True])
    assert prefix.generated_tokens() == [2, 3]


def test_tokens_of_which_none_says_what_was_written_are_not_counted():
    """Else a prompt, which all continuations share, would be counted as generated."""
    silent = Sample("the river flows", [1, 2, 3], prompt="the river")
    whole = Sample("it flows", [4, 5])
    telling = Sample("the river flows", [1, 2, 3], "the river", [False, False, True])
    assert [s.tells_generated_tokens for s in (silent, whole, telling)] == [False, True, True]
    with pytest.raises(DataError, match="does not say by 'is_noised' which tokens it wrote"):
        silent.generated_tokens()
    assert choose_units([[silent, whole]]).name == "words"
    assert choose_units([[whole, telling]]).name == "own tokens"


@pytest.mark.parametrize(
    ("sample", "ranges", "conditional"),
    [
        (Sample("The river flows."), [(0, 16)], False),
        (Sample("The river flows.", prompt="{64}"), [(0, 16)], False),
        (Sample("The river flows.", prompt="The river"), [(9, 16)], True),
        (Sample("The river flows.", prompt="The river{32}"), [(9, 16)], True),
        (Sample("The river, wide.", prompt="The river {32}"), [(9, 16)], True),
        (Sample("In the end.", prompt="In{3} end."), [(2, 6)], True),
        (Sample("{a} b c", prompt="{{a}} {2} c"), [(3, 5)], True),
        (Sample("{32} as text", prompt="{32} as"), [(7, 12)], True),
        (Sample("abc", generated=[(1, 2)]), [(1, 2)], True),
        (Sample("abc", generated=[(0, 3)]), [(0, 3)], False),
    ],
)
def test_prompt_or_ranges_say_what_was_generated(sample, ranges, conditional):
    assert sample.ranges() == ranges
    assert sample.conditional is conditional


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON .*: need one object with a 'text' field in every line"),
        ("[1]", "line 2: need a JSON object"),
        ('{"id": 1, "story": "a"}', "line 2: need a string 'text', found id, story"),
        ("{}", "line 2: need a string 'text', found none"),
        ('{"text": 3}', "line 2: need a string 'text', got int"),
        ('{"text": " \\n "}', "line 2: the text is empty"),
        ('{"text": "a", "prompt": 3}', "'prompt' must be a string"),
        ('{"text": "a", "seed": "x"}', "'seed' must be an integer"),
        ('{"text": "a", "tokens": [1, -2]}', "'tokens' must be a list of ids"),
        ('{"text": "a", "tokens": [1], "is_noised": [true, false]}', "2 entries for 1 tokens"),
        ('{"text": "a", "is_noised": [true]}', "1 entries for none tokens"),
        ('{"text": "abc", "prompt": "b"}', "line 2: the text does not start with its prompt"),
        ('{"text": "abc", "prompt": "a{1}d"}', "does not match its template"),
        ('{"text": "abc", "prompt": "a{1}b{1}c"}', "several slots"),
        ('{"text": "abc", "generated": [[2, 9]]}', "ascending ranges within the text's 3"),
        ('{"text": "abc", "generated": [1]}', "list of .start, end. pairs"),
        ('{"text": "abc", "generated": [[0, Infinity]]}', "line 2: 'generated' must be a list"),
        ('{"text": "a\\ud800b"}', "line 2: 'text' holds half of a surrogate pair at character 2"),
        ('{"text": "a", "prompt": "\\udc00"}', "line 2: 'prompt' holds half of a surrogate pair"),
        ('{"text": "a", "reference": "\\ud83d"}', "line 2: 'reference' holds half of a surrogate"),
        (
            '{"text": "a", "tokens": [9223372036854775808]}',
            "line 2: 'tokens' must be a list of ids",
        ),
        ('{"text": "a", "steps": 1' + "0" * 400 + "}", "line 2: 'steps' must be an integer"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "s.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        read_samples(file)


def test_missing_empty_and_binary_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no sample file"):
        read_samples(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(empty)
    empty.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_samples(empty)


def test_files_of_other_programs_are_read(tmp_path):
    """With a byte-order mark, Windows' line ends, packed."""
    lines = '{"text": "one"}\r\n{"text": "two"}\r\n\r\n'
    (tmp_path / "s.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    packed = gzip.compress(lines.encode())
    (tmp_path / "s.jsonl.gz").write_bytes(packed)
    for name in ("s.jsonl", "s.jsonl.gz"):
        assert read_samples(tmp_path / name) == [Sample("one"), Sample("two")]
    for damaged in (packed[:-9], b"no gzip"):
        (tmp_path / "s.jsonl.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"s\.jsonl\.gz is damaged and cannot be unpacked"):
            read_samples(tmp_path / "s.jsonl.gz")
