"""Prompts: token ids, weights and chunks as ComfyUI reads them."""

import time

import pytest

from diff2flow_nodes.hosts import HostError
from diff2flow_nodes.hosts.headless import prompts
from diff2flow_nodes.hosts.headless.tokens import END, START, tokenize
from diff2flow_nodes.training.captions import literal

KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "don't stop, it's 10 °C!!!": [847, 713, 1691, 267, 585, 568, 272, 271, 6858, 322, 995],
    "Café naïve résumé": [15304, 1097, 35689, 563, 29106, 7054, 4166],
    "emoji 😀🎉 test": [16327, 12832, 3986, 1628],
    "<|endoftext|>x": [49407, 343],
    "  multiple   spaces\t\nand lines ": [6470, 9006, 537, 3418],
    "": [],
}


@pytest.mark.parametrize("text", KNOWN)
def test_token_ids(text):
    assert tokenize(text) == KNOWN[text]


@pytest.mark.parametrize(
    "prompt, pieces",
    [
        ("plain", [("plain", 1.0)]),
        ("a (b) c", [("a ", 1.0), ("b", 1.1), (" c", 1.0)]),
        ("(b:1.5)", [("b", 1.5)]),
        ("((b))", [("b", 1.1 * 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 2.0), (" c", 0.5)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
        ("\\(a\\) [b]", [("(a) [b]", 1.0)]),
        ("(a", [("(a", 1.0)]),
        ("a) (b)", [("a) (b)", 1.0)]),
        ("(b:-1)", [("b", -1.0)]),
        ("", []),
    ],
)
def test_weights(prompt, pieces):
    found = prompts.weighted_pieces(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def words(text):
    """One token a word."""
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("caption", ["saber (fate)", "((a)) (b:1.4)", ":) (unbalanced"])
def test_a_literal_caption_is_its_letters_with_no_weights(caption):
    """As CLIP's tokenizer reads them; a bracket that is escaped already stays one bracket."""
    letters = tokenize(caption)
    for given in (caption, caption.replace("(", "\\(")):
        [chunk] = prompts.chunks(literal(given), tokenize, END)
        assert list(chunk.ids[1 : 1 + len(letters)]) == letters and chunk.ids[1 + len(letters)] == END
        assert set(chunk.weights) == {1.0}


@pytest.mark.parametrize("pad", [END, 0])
def test_a_short_prompt_is_one_padded_chunk(pad):
    (chunk,) = prompts.chunks("1 2 (3:1.5)", words, pad)
    assert chunk.ids == (START, 1, 2, 3, END, *[pad] * 72)
    assert chunk.weights == (1.0, 1.0, 1.0, 1.5, *[1.0] * 73)
    assert prompts.empty_chunk(pad).ids == (START, END, *[pad] * 75)


def test_a_long_piece_is_cut_between_chunks():
    first, second = prompts.chunks(" ".join(["5"] * 80), words, END)
    assert first.ids == (START, *[5] * 75, END)
    assert second.ids == (START, *[5] * 5, *[END] * 71)


def test_a_short_piece_moves_on_whole():
    first, second = prompts.chunks(" ".join(["5"] * 73) + "(6 6 6:1.2)", words, END)
    assert first.ids == (START, *[5] * 73, *[END] * 3)
    assert second.ids == (START, 6, 6, 6, *[END] * 73)
    assert second.weights[1:4] == (1.2, 1.2, 1.2)


@pytest.mark.parametrize(
    "prompt", ["embedding:bad", "a photo, embedding:bad_hands-5", "a\nembedding:x", "(embedding:x:1.2)"]
)
def test_textual_inversions_are_refused(prompt):
    with pytest.raises(HostError, match="embedding:"):
        prompts.chunks(prompt, words, END)


def test_embedding_inside_a_word_is_text():
    prompts.refuse_embeddings("an,embedding:x")


def test_parentheses_without_end_and_very_long_prompts_end_soon():
    with pytest.raises(HostError, match="nests parentheses more than 100 times"):
        prompts.chunks("(" * 400 + "5" + ")" * 400, words, END)
    assert prompts.weighted_pieces("(" * 400 + "5") == [("(" * 400 + "5", 1.0)]  # they have no partner
    began = time.perf_counter()
    made = prompts.chunks("5 " * 750_000, words, END)
    assert len(made) == 10_000 and {chunk.ids[1] for chunk in made} == {5} and time.perf_counter() - began < 20
