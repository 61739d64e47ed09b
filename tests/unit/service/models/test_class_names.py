"""Class names and how requests may spell them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.models.class_names import MAX_CLASS_NAME, ClassNames

FASHION = ClassNames(("T-shirt/top", "Trouser", "Ankle boot", "Bag"))
IMAGENET = ClassNames(("tench, Tinca tinca", "goldfish", "crane", "crane", "maillot", "maillot, tank suit", "7"))
CREATURES = ClassNames(
    tuple(
        f"{colour} {animal}"
        for colour in ("black", "white", "great grey", "brown", "golden", "striped", "common", "little", "giant", "red")
        for animal in (
            "bear",
            "owl",
            "fox",
            "mantis",
            "squirrel",
            "retriever",
            "kangaroo",
            "salamander",
            "crane",
            "hen",
        )
    )
)
MANY = ClassNames((*(f"animal {k}" for k in range(900)), "Ankle boot, bootee", "Boot"))


@pytest.mark.parametrize("asked", ["Ankle boot", "ankle boot", "ANKLE_BOOT", "ankle-boot", " AnkleBoot "])
def test_case_spaces_underscores_and_hyphens_are_ignored(asked: str) -> None:
    assert FASHION.find(asked) == 2
    assert FASHION.in_prompt(asked, 64) == [2]


def test_an_exact_name_takes_precedence_over_similar_ones() -> None:
    names = ClassNames(("t_shirt", "T-shirt", "tshirt"))
    assert [names.find(name) for name in names.names] == [0, 1, 2]
    with pytest.raises(InvalidRequest, match=r'"T SHIRT" names the classes \[0, 1, 2\]: give the index'):
        names.find("T SHIRT")


@pytest.mark.parametrize(
    ("prompt", "classes"),
    [
        ("bag, trouser,BAG", [3, 1, 3]),
        ("t-shirt/top", [0]),
        ("1, bag", [1, 3]),
    ],
)
def test_a_prompt_lists_classes_between_commas(prompt: str, classes: list[int]) -> None:
    assert FASHION.in_prompt(prompt, 64) == classes


@pytest.mark.parametrize(
    ("prompt", "classes"),
    [
        ("tench, Tinca tinca", [0]),
        ("tench,tinca_tinca,goldfish", [0, 1]),
        ("Tinca tinca", [0]),
        ("tench", [0]),
        ("tench, goldfish, tench", [0, 1, 0]),
        ("maillot, tank suit", [5]),
        ("maillot", [4]),
        ("maillot, goldfish, tank suit", [4, 1, 5]),
        ("2, 3", [2, 3]),
        ("7", [6]),
    ],
)
def test_names_with_commas_are_found_completely_or_by_a_part(prompt: str, classes: list[int]) -> None:
    assert IMAGENET.in_prompt(prompt, 64) == classes


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("goldfish, crane", r'"crane" names the classes \[2, 3\]: give the index'),
        ("goldfish, dog, tench", 'must be one of tench, Tinca tinca, goldfish, .*; got "dog"'),
        ("goldfish,", 'got ""'),
        ("x" * 200, 'got "x{57}\\.\\.\\."'),
        ("9", 'got "9"'),
        ("goldfish," * 64 + "goldfish", "must list at most 64 classes; got 65"),
        ("," * 12_000, "must list at most 64 classes"),
    ],
)
def test_unknown_names_and_too_long_lists_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        IMAGENET.in_prompt(prompt, 64)
    assert error.value.field == "prompt"


def test_a_text_longer_than_any_name_matches_no_class() -> None:
    names = ClassNames(("a" * MAX_CLASS_NAME, "b" * (MAX_CLASS_NAME + 1)))
    assert names.in_prompt("a" * MAX_CLASS_NAME, 64) == [0]
    for longer in ("b" * (MAX_CLASS_NAME + 1), "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 12_800):
        with pytest.raises(InvalidRequest, match="must be one of"):
            names.in_prompt(longer, 64)


@given(st.sampled_from(CREATURES.names), st.integers(0, 20), st.sampled_from(["drop", "double", "swap", "replace"]))
def test_the_error_for_a_misspelt_name_of_many_has_the_correct_one(name: str, place: int, mistake: str) -> None:
    place %= len(name) - 1
    before, letter, following, after = name[:place], name[place], name[place + 1], name[place + 2 :]
    written = {
        "drop": following,
        "double": 2 * letter + following,
        "swap": following + letter,
        "replace": "q" + following,
    }
    asked = before + written[mistake] + after
    assume(asked.replace(" ", "") != name.replace(" ", ""))
    with pytest.raises(InvalidRequest) as error:
        CREATURES.find(asked)
    assert name in error.value.message.removeprefix("must be one of ").split(", ")


def test_the_error_for_an_unknown_name_of_many_has_the_nearest_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"must be one of (Boot|Ankle boot, bootee), .*\(902 in all"):
        MANY.find("ankle bott")
    with pytest.raises(InvalidRequest, match=r"animal 0, .*\(902 in all"):
        MANY.in_prompt("bag, ?!", 64)


@given(st.lists(st.integers(0, len(IMAGENET.names) - 1), min_size=1, max_size=9))
def test_every_list_of_names_or_indices_is_read_back(classes: list[int]) -> None:
    names = IMAGENET.names
    asked = [names[index] if names.count(names[index]) == 1 else str(index) for index in classes]
    assert IMAGENET.in_prompt(", ".join(asked), 64) == classes


@given(st.text(max_size=300))
def test_every_prompt_is_read_or_refused(prompt: str) -> None:
    with contextlib.suppress(InvalidRequest):
        assert all(0 <= index < len(IMAGENET.names) for index in IMAGENET.in_prompt(prompt, 64))
