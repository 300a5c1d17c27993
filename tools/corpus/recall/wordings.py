"""Wordings: how facts are told and asked for. Half of them are for training, others for tests.

In the texts {who}, {what} and {value} stand for a fact's parts. A question ends where its answer,
which is the value, begins.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tools.corpus.recall.facts import Fact

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Wording:
    """Texts for one kind of facts; any way to tell goes with any question.

    Attributes:
        tell: sentences.
        ask: each a question and, behind a bar, how its answer begins.
    """

    tell: tuple[str, ...]
    ask: tuple[str, ...]


TRAIN: Mapping[str, Wording] = {
    "number": Wording(
        (
            "{who}'s secret number is {value}.",
            "The secret number of {who} is {value}.",
            "Remember that {who} has the secret number {value}.",
            "{who} chose the secret number {value}.",
        ),
        (
            "What is {who}'s secret number?|{who}'s secret number is",
            "Which secret number does {who} have?|{who} has the secret number",
            "What is the secret number of {who}?|It is",
        ),
    ),
    "room": Wording(
        (
            "{who} lives in room {value}.",
            "You can find {who} in room {value}.",
            "{who} stays in room {value}.",
            "Room {value} is the room of {who}.",
        ),
        (
            "In which room does {who} live?|{who} lives in room",
            "What room is {who} in?|{who} is in room",
            "Where can you find {who}?|You can find {who} in room",
        ),
    ),
    "password": Wording(
        (
            "{who}'s password is {value}.",
            "The password of {who} is {value}.",
            '{who} opens the door with the word "{value}".',
            "To get in, {who} says the password {value}.",
        ),
        (
            "What is {who}'s password?|{who}'s password is",
            "Which password does {who} say?|{who} says the password",
            "What is the password of {who}?|It is",
        ),
    ),
    "color": Wording(
        (
            "{who} has a {value} {what}.",
            "{who}'s {what} is {value}.",
            "The {what} of {who} is {value}.",
            "{who} painted the {what} {value}.",
        ),
        (
            "What color is {who}'s {what}?|{who}'s {what} is",
            "Which color does the {what} of {who} have?|The {what} of {who} is",
            "What is the color of {who}'s {what}?|It is",
        ),
    ),
    "place": Wording(
        (
            "{who}'s {what} is {value}.",
            "{who} hid a {what} {value}.",
            "The {what} of {who} is {value}.",
            "{who} left the {what} {value}.",
        ),
        (
            "Where is {who}'s {what}?|{who}'s {what} is",
            "Where did {who} hide the {what}?|{who} hid the {what}",
            "Where can {who} find the {what}?|It is",
        ),
    ),
    "pet": Wording(
        (
            "{who} has a {what} called {value}.",
            "{who}'s {what} is called {value}.",
            "The name of {who}'s {what} is {value}.",
            "{who} named the {what} {value}.",
        ),
        (
            "What is the name of {who}'s {what}?|The name of {who}'s {what} is",
            "How does {who} call the {what}?|{who} calls the {what}",
            "What is {who}'s {what} called?|{who}'s {what} is called",
        ),
    ),
    "food": Wording(
        (
            "{who} likes {value} best.",
            "{who}'s favorite food is {value}.",
            "The favorite food of {who} is {value}.",
            "Nothing tastes better to {who} than {value}.",
        ),
        (
            "What does {who} like best?|Best of all {who} likes",
            "What is {who}'s favorite food?|{who}'s favorite food is",
            "What is the favorite food of {who}?|It is",
        ),
    ),
    "town": Wording(
        (
            "{who} lives in {value}.",
            "{who} has always lived in {value}.",
            "The home of {who} is in {value}.",
            "{who} and two cats live in {value}.",
        ),
        (
            "Where does {who} live?|{who} lives in",
            "Where is the home of {who}?|The home of {who} is in",
            "In which town is the home of {who}?|It is in",
        ),
    ),
    "job": Wording(
        (
            "{who} is a {value}.",
            "{who} works as a {value}.",
            "The job of {who} is to be a {value}.",
            "{who} earns money as a {value}.",
        ),
        (
            "What is {who}'s job?|{who} is a",
            "What does {who} do for work?|{who} works as a",
            "What is the job of {who}?|It is to be a",
        ),
    ),
}
TEST: Mapping[str, Wording] = {
    "number": Wording(
        ("The number that {who} keeps secret is {value}.",),
        ("Which number does {who} keep secret?|The secret number of {who} is",),
    ),
    "room": Wording(
        ("{who} sleeps in room {value}.",),
        ("Which room is the room of {who}?|The room of {who} is room",),
    ),
    "password": Wording(
        ("{who} chose the password {value}.",),
        ("Which password did {who} choose?|{who} chose the password",),
    ),
    "color": Wording(
        ("{who} bought a {what}, and it is {value}.",),
        ("Do you know the color of the {what} of {who}?|The color is",),
    ),
    "place": Wording(
        ("{who} put the {what} {value}.",),
        ("Where should {who} look for the {what}?|The {what} is",),
    ),
    "pet": Wording(
        ("{who} loves a {what} whose name is {value}.",),
        ("Which name did {who} give to the {what}?|The {what} is called",),
    ),
    "food": Wording(
        ("What {who} loves to eat is {value}.",),
        ("Which food does {who} love?|{who} loves",),
    ),
    "town": Wording(
        ("{who} has a house in {value}.",),
        ("In which town does {who} have a house?|{who} has a house in",),
    ),
    "job": Wording(
        ("For many years {who} has been a {value}.",),
        ("What has {who} been for many years?|For many years {who} has been a",),
    ),
}
# Question, beginning of the answer, and what stands behind the value.
TRAIN_FRAMES = (
    "Question: {question}\nAnswer: {begin}",
    "Q: {question}\nA: {begin}",
    "{question} {begin}",
)
TEST_FRAMES = ("Question: {question}\nAnswer: {begin}", "{question}\n{begin}")


@dataclass(frozen=True)
class Worded:
    """A fact in words.

    Attributes:
        fact: what is told.
        told: the sentence.
        question: up to where the value follows, behind a blank.
    """

    fact: Fact
    told: str
    question: str

    @property
    def value_ends(self) -> int:
        """Where in `told` the value ends."""
        found = re.search(rf"\b{re.escape(self.fact.value)}\b", self.told)
        assert found is not None
        return found.end()

    @property
    def answered(self) -> str:
        """The question with its answer."""
        return f"{self.question} {self.fact.value}."


def word(fact: Fact, split: Split, choices: tuple[int, int, int]) -> Worded:
    """A fact in one of the wordings of a split.

    Args:
        fact: of any kind.
        split: "test": ways to tell and to ask that no training text has.
        choices: numbers that choose how to tell, the question and its frame.
    """
    wording = (TRAIN if split == "train" else TEST)[fact.kind]
    frames = TRAIN_FRAMES if split == "train" else TEST_FRAMES
    tell, ask, frame = (
        texts[choice % len(texts)]
        for texts, choice in zip((wording.tell, wording.ask, frames), choices, strict=True)
    )
    parts = {"who": fact.who, "what": fact.what}
    question, begin = (text.format(**parts) for text in ask.split("|"))
    return Worded(
        fact,
        tell.format(**parts, value=fact.value),
        frame.format(question=question, begin=begin),
    )
