"""Planted keys, token windows, losses in pieces, and the comparison of methods."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seer_compile import corpus, retrieval
from seer_compile.errors import CalibrationDataError, RangeError, SeerInputError
from seer_compile.evaluate import next_token_loss
from seer_compile.evaluation_methods import method_names, parse_method
from seer_compile.token_data import (
    CalibrationWindows,
    planted_windows,
    read_token_file,
    window_starts,
)
from support import inputs


@pytest.fixture(scope="module")
def tokenizer():
    """Return a byte-level tokenizer with a few merges, so that lengths of lines differ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("3", "4"), ("a", "b"), ("K", "E"), ("KE", "Y")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result


def text_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(0, 200, length)


def test_value_of_a_key_line_spells_its_digits(tokenizer):
    for seed in range(50):
        line = retrieval.draw_key_line(tokenizer, random.Random(seed))
        text = tokenizer.decode(line.tokens.tolist())
        assert text.startswith("\nKEY_")
        assert text.endswith("\n")
        value = tokenizer.decode(line.tokens[line.value].tolist()).strip()
        assert value == text.split(" = ")[1].strip()
        assert len(value) == retrieval.DIGITS


def test_each_key_is_planted_twice_once_in_each_half(tokenizer):
    original = text_tokens(4096)
    planted = retrieval.plant_keys(original, tokenizer, keys=8, seed=3)
    halves = [
        tokenizer.decode(planted.tokens[part].tolist()) for part in (slice(2048), slice(2048, None))
    ]
    names = [
        {line.split(" = ")[0] for line in half.split("\n") if line.startswith("KEY_")}
        for half in halves
    ]
    assert len(names[0]) == 8
    assert names[0] == names[1]
    assert np.array_equal(planted.tokens[planted.ordinary], original[planted.ordinary])
    for value in planted.values:
        digits = tokenizer.decode(planted.tokens[value].tolist()).strip()
        assert value.start > 2048
        assert all(digits in half for half in halves)
        assert not planted.ordinary[value].any()


def test_planting_depends_on_the_seed_alone(tokenizer):
    first, again, other = (
        retrieval.plant_keys(text_tokens(2048), tokenizer, keys=4, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)


def test_order_of_second_occurrences_is_shuffled(tokenizer):
    planted = retrieval.plant_keys(text_tokens(8192), tokenizer, keys=16, seed=0)
    starts = [value.start for value in planted.values]
    assert starts != sorted(starts)


def test_a_key_counts_only_when_every_token_of_its_value_is_predicted(tokenizer):
    planted = retrieval.plant_keys(text_tokens(2048), tokenizer, keys=4, seed=0)
    predicted = np.roll(planted.tokens, -1)
    assert retrieval.count_retrieved(predicted, planted) == 4
    predicted[planted.values[2].stop - 2] += 1
    assert retrieval.count_retrieved(predicted, planted) == 3
    # A wrong token elsewhere is no business of the keys.
    predicted[planted.values[1].stop - 1] += 1
    assert retrieval.count_retrieved(predicted, planted) == 3


def test_too_many_keys_for_a_text_are_refused(tokenizer):
    with pytest.raises(CalibrationDataError, match="at most"):
        retrieval.plant_keys(text_tokens(256), tokenizer, keys=16, seed=0)
    with pytest.raises(RangeError):
        retrieval.plant_keys(text_tokens(256), tokenizer, keys=-1, seed=0)


def test_no_keys_leave_the_text_as_it_is(tokenizer):
    planted = retrieval.plant_keys(text_tokens(64), tokenizer, keys=0, seed=0)
    assert planted.ordinary.all()
    assert planted.values == ()


def test_copies_stand_twice_and_are_all_that_changes():
    original = np.arange(4096) + 1000
    planted = retrieval.plant_copies(original, copies=12, generator=np.random.default_rng(0))
    again = retrieval.plant_copies(original, copies=12, generator=np.random.default_rng(0))
    assert np.array_equal(planted, again)
    (changed,) = np.nonzero(planted != original)
    spans = np.split(changed, np.nonzero(np.diff(changed) > 1)[0] + 1)
    found = sorted(tuple(planted[span].tolist()) for span in spans)
    # Spans that touch are one run of changes; the others come in pairs.
    pairs = sum(one == other for one, other in itertools.pairwise(found))
    assert pairs >= 8
    assert 12 * 2 * 8 <= len(changed) <= 12 * 2 * 24
    assert set(planted) <= set(original)


def test_copies_leave_a_text_without_room_as_it_is():
    tokens = np.arange(30)
    generator = np.random.default_rng(0)
    assert np.array_equal(retrieval.plant_copies(tokens, copies=3, generator=generator), tokens)


def test_files_are_held_out_by_their_path_alone(tmp_path):
    names = [f"pkg/module_{i}.py" for i in range(400)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("pass\n")
    groups = {h: corpus.standard_library_files(held_out=h, root=tmp_path) for h in (True, False)}
    found = {h: {p.relative_to(tmp_path).as_posix() for p in group} for h, group in groups.items()}
    assert found[True] | found[False] == set(names)
    assert not found[True] & found[False]
    assert found[True] == {name for name in names if corpus.is_held_out(name)}
    assert 20 <= len(found[True]) <= 60
    assert [p.name for p in groups[False]] != sorted(p.name for p in groups[False])


def test_the_split_is_the_same_on_every_machine():
    # These are promises to a model that was trained elsewhere: never change them.
    paths = ["json/decoder.py", "tomllib/__init__.py", "test/test_doctest.py", "asyncio/events.py"]
    assert [corpus.is_held_out(path) for path in paths] == [False, True, True, False]


def test_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(CalibrationDataError):
        corpus.standard_library_files(held_out=False, root=tmp_path)


def test_files_are_encoded_up_to_a_number_of_tokens(tokenizer, tmp_path):
    paths = []
    for index in range(9):
        paths.append(tmp_path / f"{index}.py")
        paths[-1].write_bytes(b"x = 1\n" * 10 if index != 3 else b"\xff\xfe broken")
    every = corpus.encode_files(paths, tokenizer)
    assert len(every) == 8 * 60
    assert np.array_equal(corpus.encode_files(paths, tokenizer, max_tokens=100), every[:100])


def test_token_file_is_read_and_checked(tmp_path):
    path = tmp_path / "tokens.u16"
    np.arange(100, dtype="<u2").tofile(path)
    assert read_token_file(path, vocabulary=100).tolist() == list(range(100))
    with pytest.raises(SeerInputError, match="below 99"):
        read_token_file(path, vocabulary=99)
    path.write_bytes(b"abc")
    with pytest.raises(SeerInputError, match="3 bytes"):
        read_token_file(path)
    with pytest.raises(SeerInputError, match="existing file"):
        read_token_file(tmp_path / "absent.u16")


def test_windows_spread_over_the_stream_without_overlap_where_there_is_room():
    starts = window_starts(1000, 100, 5)
    assert starts[0] == 0
    assert starts[-1] == 900
    assert min(np.diff(starts)) >= 100
    assert window_starts(100, 100, 3) == [0, 0, 0]
    with pytest.raises(CalibrationDataError):
        window_starts(99, 100, 1)


def test_windows_of_one_evaluation_have_different_keys(tokenizer):
    windows = planted_windows(
        text_tokens(4096), tokenizer, length=1024, sequences=3, keys=4, seed=5
    )
    values = {tuple(w.tokens[w.values[0]].tolist()) for w in windows}
    assert len(values) == 3
    again = planted_windows(text_tokens(4096), tokenizer, length=1024, sequences=3, keys=4, seed=5)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(windows, again, strict=True))


def test_windows_without_keys_need_no_tokenizer():
    (window,) = planted_windows(text_tokens(256), None, length=128, sequences=1, keys=0)
    assert window.ordinary.all()
    with pytest.raises(SeerInputError):
        planted_windows(text_tokens(256), None, length=128, sequences=1, keys=1)


def test_calibration_windows_mix_lengths_and_can_be_read_again():
    data = CalibrationWindows(tokens=text_tokens(3000), lengths=(100, 300), seed=1)
    shapes = [batch["input_ids"].shape[1] for batch in data]
    assert len(data) == len(shapes) > 60
    assert shapes[:6] == [100, 300] * 3
    first, second = ([batch["input_ids"] for batch in data] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(batch["use_cache"] is False for batch in data)
    other = CalibrationWindows(tokens=text_tokens(3000), lengths=(100, 300), seed=2)
    assert any(not torch.equal(a, b["input_ids"]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("lengths", [(100,), (100, 300)])
@pytest.mark.parametrize("total", [1200, 9000])
def test_first_windows_share_no_token_with_any_other(total, lengths):
    numbered = np.arange(total)
    data = [
        batch["input_ids"][0].tolist()
        for batch in CalibrationWindows(tokens=numbered, lengths=lengths, seed=3)
    ]
    starts = [window[0] for window in data if len(window) == 100]
    assert any(start % 100 for start in starts)  # later cuts lie elsewhere
    assert len(set(starts)) == len(starts)
    for length in lengths:
        windows = [window for window in data if len(window) == length]
        held_out = windows[: min(8, total // length // 4)]
        assert held_out
        for window in held_out:
            assert all(other is window or not set(other) & set(window) for other in data)


def test_calibration_windows_refuse_a_stream_shorter_than_a_window():
    with pytest.raises(CalibrationDataError):
        CalibrationWindows(tokens=text_tokens(50), lengths=(100,))


def test_loss_in_pieces_equals_the_loss_at_once():
    length, vocabulary = 4500, 11
    logits = inputs.normal(length, vocabulary, dtype=torch.float32, seed=1)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, vocabulary, length))
    ordinary = np.random.default_rng(1).random(length) < 0.7
    loss, predicted = next_token_loss(logits, tokens, ordinary)
    every = -logits.double().log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0].numpy()
    assert math.isclose(loss, every[ordinary[1:]].mean(), rel_tol=1e-6)
    assert np.array_equal(predicted, logits.argmax(-1).numpy())


@pytest.mark.parametrize(
    ("name", "base", "selector"),
    [
        ("dense", "dense", None),
        ("gate", "gate", None),
        ("gate_fraction", "gate", "fraction"),
        ("oracle", "oracle", "top_p"),
        ("oracle_max_fraction", "oracle_max", "fraction"),
        ("sink_local", "sink_local", "fraction"),
        ("xattention_top_p", "xattention", "top_p"),
    ],
)
def test_method_names_carry_their_selector(name, base, selector):
    method = parse_method(name)
    assert (method.name, method.base, method.selector) == (name, base, selector)


def test_every_listed_method_can_be_parsed_and_others_are_refused():
    assert all(parse_method(name).name == name for name in method_names())
    for name in ("nonsense", "dense_top_p", "oracle_top_k", ""):
        with pytest.raises(SeerInputError, match="sink_local"):
            parse_method(name)


def test_calibration_windows_carry_copies_where_asked():
    tokens = text_tokens(20_000, seed=1)
    plain, copied = (
        CalibrationWindows(tokens=tokens, lengths=(1024,), copies=copies) for copies in (0, 4)
    )
    pairs = list(zip(plain, copied, strict=True))
    shares = [(one["input_ids"] != other["input_ids"]).float().mean() for one, other in pairs]
    assert all(0.05 < share < 0.2 for share in shares)
    again = next(iter(copied))["input_ids"]
    assert torch.equal(again, pairs[0][1]["input_ids"])
    with pytest.raises(RangeError, match="copies"):
        CalibrationWindows(tokens=tokens, lengths=(1024,), copies=-1)
