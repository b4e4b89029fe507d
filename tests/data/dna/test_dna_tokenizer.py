"""Tokens of DNA: the ids of HyenaDNA and Caduceus, also in transformers; complements; nothing is added."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.data.dna import COMPLEMENT_IDS, DnaTokenizer, reverse_complement, reverse_complement_ids
from anymamba.data.dna.letters import LETTERS
from anymamba.data.tokenizer import JsonTokenizer, StreamDecoder, load_tokenizer

CASES = ("fold", "keep")


def test_ids():
    tokenizer = DnaTokenizer()
    assert tokenizer.encode("ACGTN") == [7, 8, 9, 10, 11] == tokenizer.encode("acgtn") == tokenizer.encode(b"aCgTn")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (12, None)
    special = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"]
    assert [tokenizer.decode([i]) for i in range(7)] == special
    assert tokenizer.encode("RYSWKMBDHVryswkmbdhv") == [11] * 20
    assert tokenizer.encode("Uu") == [10, 10]
    assert tokenizer.encode("XZ-*. \n9é\udcff") == [6] * 10
    assert tokenizer.encode("") == []


def test_kept_case():
    tokenizer = DnaTokenizer("keep")
    assert tokenizer.encode("ACGTNacgtnUuRr") == [7, 8, 9, 10, 11, 12, 13, 14, 15, 11, 10, 15, 11, 11]
    assert tokenizer.vocab_size == 16 and tokenizer.decode([7, 12, 15, 11]) == "AatN"


def test_an_unknown_case():
    with pytest.raises(ValueError, match="case must be 'fold' or 'keep', got 'lower'"):
        DnaTokenizer("lower")


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=50, deadline=None)
@given(
    st.text(
        st.one_of(st.sampled_from(LETTERS.decode()), st.characters(exclude_categories=["Cs"], exclude_characters="["))
    )
)
def test_the_saved_file_gives_the_same_ids(case, text):
    tokenizer = DnaTokenizer(case)
    saved = JsonTokenizer("dna/tokenizer.json", tokenizer.to_json())
    assert saved.encode(text) == tokenizer.encode(text) == tokenizer.encode_array(text).tolist()
    assert saved.vocab_size == tokenizer.vocab_size and saved.eos_id is None
    assert saved.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_it_and_adds_nothing(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    tokenizer = DnaTokenizer(case)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("acgtACGTNR")["input_ids"] == tokenizer.encode("acgtACGTNR")
    assert (theirs.mask_token_id, theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id) == (3, 4, 6, 2)
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.eos_token_id) == (0, 1, None)
    assert theirs.decode([7, 8, 3, 9]) == "AC[MASK]G"
    assert theirs.pad({"input_ids": [[7], [7, 8]]})["input_ids"] == [[7, 4], [7, 8]]


@pytest.mark.parametrize("case", CASES)
def test_a_saved_one_is_recognised(tmp_path, case):
    DnaTokenizer(case).save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, DnaTokenizer) and loaded.case == case


def test_a_changed_file_is_not_taken_for_it(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(DnaTokenizer().to_json().replace('"A": 7', '"A": 8').replace('"C": 8', '"C": 7'))
    loaded = load_tokenizer(path)
    assert isinstance(loaded, JsonTokenizer) and loaded.encode("AC") == [8, 7]


def test_ids_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"token id 12 is outside the vocabulary of dna: 0 \.\. 11"):
        DnaTokenizer().decode([12])


def test_streams_of_tokens():
    decoder = StreamDecoder(DnaTokenizer())
    assert decoder.push([7, 8]) == "AC" and decoder.push([3, 11]) == "[MASK]N" and decoder.flush() == ""


# ------------------------------------------------------------------------------------------ complements


def test_complements():
    assert reverse_complement("AACGTN") == "NACGTT"
    assert reverse_complement("aacgRyKmBVdhSWn") == "nWSdhBVkMrYcgtt"
    assert reverse_complement("U") == "A" and reverse_complement("") == ""


@pytest.mark.parametrize("text", ["AX", "A-", "é", "A\n"])
def test_complements_of_other_letters(text):
    with pytest.raises(ValueError, match="a sequence may have the letters ACGTURYSWKMBDHVN in either case, got"):
        reverse_complement(text)


@given(st.text(LETTERS.decode().replace("U", "").replace("u", "")))
def test_twice_the_reverse_complement_is_the_sequence(text):
    assert reverse_complement(reverse_complement(text)) == text


@pytest.mark.parametrize("case", CASES)
@given(st.text(LETTERS.decode()))
def test_ids_of_the_reverse_complement(case, text):
    tokenizer = DnaTokenizer(case)
    wanted = tokenizer.encode(reverse_complement(text))
    assert reverse_complement_ids(tokenizer.encode(text)).tolist() == wanted


def test_ids_of_batches_and_of_special_tokens():
    ids = np.array([[0, 7, 8], [3, 11, 10]], np.int32)
    flipped = reverse_complement_ids(ids)
    assert flipped.tolist() == [[9, 10, 0], [7, 11, 3]] and flipped.dtype == np.int32
    assert (COMPLEMENT_IDS[COMPLEMENT_IDS] == np.arange(16)).all()
    for wrong in ([16], [-1], [0.5]):
        with pytest.raises(ValueError, match="ids must be whole numbers from 0 to 15"):
            reverse_complement_ids(wrong)
