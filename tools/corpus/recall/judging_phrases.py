"""TEST: how facts are told and asked for in tests, and in no text of the training."""

from collections.abc import Mapping

from tools.corpus.recall.phrases import Wording

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
TEST_FRAMES = ("Question: {question}\nAnswer: {begin}", "{question}\n{begin}")
