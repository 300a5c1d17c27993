"""TRAIN: how facts are told and asked for in training; judging_phrases.py has others.

A sentence is a lead, one of its kind's ways to tell and a tail; a question has one of the frames.
So there are far more sentences than lines here, and what they have in common is all that helps.
"""

from collections.abc import Mapping

from tools.corpus.recall.facts import KINDS, MORE_KINDS, NOTES
from tools.corpus.recall.phrases import Wording

LEADS = ("", "", "", "Listen: ", "Remember this: ", "Here is a fact: ", "Look: ", "You see: ")
TAILS = (
    "",
    "",
    "",
    ", as everyone knows",
    " now",
    ", and that is true",
    " this year",
    ", I think",
)
# Question, beginning of the answer, and what stands behind the value.
FRAMES = (
    "Question: {question}\nAnswer: {begin}",
    "Q: {question}\nA: {begin}",
    "{question} {begin}",
    "Please tell me. {question} {begin}",
    "Question: {question} {begin}",
    "- {question}\n- {begin}",
    "{question} Answer: {begin}",
)
# Without a question: the answer says whom it is about.
STATEMENTS = ("{begin}", "Yes: {begin}", "As we know: {begin}", "Once more: {begin}")

# For a noun of which a person has one. {noun} is filled in when this module is loaded.
_TELL = (
    "{who}'s {noun} is {value}.",
    "The {noun} of {who} is {value}.",
    "As for {who}, the {noun} is {value}.",
    "For {who} the {noun} is {value}.",
    "{who} says that the {noun} is {value}.",
    "{who} has a {noun}, which is {value}.",
)
_ASK = (
    "What is {who}'s {noun}?|{who}'s {noun} is",
    "What is {who}'s {noun}?|It is",
    "What is the {noun} of {who}?|The {noun} of {who} is",
    "What is the {noun} of {who}?|It is",
    "Can you tell me {who}'s {noun}?|The {noun} is",
    "Who knows the {noun} of {who}?|The {noun} of {who} is",
    "What does {who} say the {noun} is?|{who} says that the {noun} is",
)


def _called(noun: str, tell: tuple[str, ...] = (), ask: tuple[str, ...] = ()) -> Wording:
    """The wordings that all nouns have, and some of one kind alone."""
    tells, asks = ([text.replace("{noun}", noun) for text in texts] for texts in (_TELL, _ASK))
    return Wording((*tells, *tell), (*asks, *ask))


_OWN: Mapping[str, Wording] = {
    "number": _called(
        "secret number",
        (
            "Remember that {who} has the secret number {value}.",
            "{who} chose the secret number {value}.",
            "{who} wrote down the number {value}.",
            "{who} thinks of the number {value}.",
        ),
        (
            "Which secret number does {who} have?|{who} has the secret number",
            "Which number did {who} choose?|{who} chose the number",
            "Which number did {who} write down?|{who} wrote down the number",
            "Which number does {who} think of?|It is",
        ),
    ),
    "room": _called(
        "room number",
        (
            "{who} lives in room {value}.",
            "You can find {who} in room {value}.",
            "{who} stays in room {value}.",
            "{who} has the key to room {value}.",
            "{who} works in room {value}.",
        ),
        (
            "In which room does {who} live?|{who} lives in room",
            "What room is {who} in?|{who} is in room",
            "Where can you find {who}?|You can find {who} in room",
            "Which room belongs to {who}?|It is room",
            "Which is {who}'s room?|{who}'s room is room",
        ),
    ),
    "password": _called(
        "password",
        (
            '{who} opens the door with the word "{value}".',
            "To get in, {who} says the password {value}.",
            "{who} uses the password {value}.",
            "{who} must say the word {value}.",
        ),
        (
            "Which password does {who} say?|{who} says the password",
            "Which password does {who} use?|{who} uses the password",
            "Which word must {who} say?|{who} must say the word",
            "Which word opens the door for {who}?|It is the word",
        ),
    ),
    "color": Wording(
        (
            "{who} has a {value} {what}.",
            "{who}'s {what} is {value}.",
            "The {what} of {who} is {value}.",
            "{who} painted the {what} {value}.",
            "{who} got a {value} {what} as a gift.",
            "{who} owns a {what} that is {value}.",
            "As for {who}, the {what} is {value}.",
            "{who} found a {what}, a {value} one.",
            "The {what} that {who} made is {value}.",
        ),
        (
            "What color is {who}'s {what}?|{who}'s {what} is",
            "Which color does the {what} of {who} have?|The {what} of {who} is",
            "What is the color of {who}'s {what}?|It is",
            "What is the color of {who}'s {what}?|The {what} is",
            "Which color has {who}'s {what}?|The color of {who}'s {what} is",
            "Can you tell me the color of {who}'s {what}?|It is",
            "What color did {who} choose for the {what}?|{who} chose",
        ),
    ),
    "place": Wording(
        (
            "{who}'s {what} is {value}.",
            "{who} hid a {what} {value}.",
            "The {what} of {who} is {value}.",
            "{who} left the {what} {value}.",
            "{who} keeps a {what} {value}.",
            "{who} lost a {what} {value}.",
            "As for {who}, the {what} is {value}.",
            "{who} forgot the {what} {value}.",
        ),
        (
            "Where is {who}'s {what}?|{who}'s {what} is",
            "Where is the {what} of {who}?|The {what} of {who} is",
            "Where did {who} hide the {what}?|{who} hid the {what}",
            "Where can {who} find the {what}?|It is",
            "Where does {who} keep the {what}?|{who} keeps the {what}",
            "Can you tell me where {who}'s {what} is?|It is",
            "Who knows where {who} left the {what}?|{who} left the {what}",
        ),
    ),
    "pet": Wording(
        (
            "{who} has a {what} called {value}.",
            "{who}'s {what} is called {value}.",
            "The name of {who}'s {what} is {value}.",
            "{who} named the {what} {value}.",
            "{who} has a {what}, and its name is {value}.",
            "{who} lives with a {what} named {value}.",
            "{who} plays with the {what} {value}.",
            "As for {who}, the {what} is called {value}.",
        ),
        (
            "What is the name of {who}'s {what}?|The name of {who}'s {what} is",
            "How does {who} call the {what}?|{who} calls the {what}",
            "What is {who}'s {what} called?|{who}'s {what} is called",
            "What did {who} name the {what}?|{who} named the {what}",
            "What is the name of {who}'s {what}?|The {what} has the name",
            "Can you tell me the name of {who}'s {what}?|It is",
            "Who knows the name of {who}'s {what}?|Its name is",
        ),
    ),
    "food": _called(
        "favorite food",
        (
            "{who} likes {value} best.",
            "Nothing tastes better to {who} than {value}.",
            "{who} likes to eat {value}.",
            "{who} always eats {value}.",
            "Every day {who} cooks {value}.",
        ),
        (
            "What does {who} like best?|Best of all {who} likes",
            "What does {who} like to eat?|{who} likes to eat",
            "Which food does {who} like?|{who} likes",
            "What does {who} always eat?|{who} always eats",
            "What does {who} cook every day?|Every day {who} cooks",
        ),
    ),
    "town": _called(
        "home town",
        (
            "{who} lives in {value}.",
            "{who} has always lived in {value}.",
            "The home of {who} is in {value}.",
            "{who} and two cats live in {value}.",
            "{who} rents a room in {value}.",
            "{who} comes from {value}.",
        ),
        (
            "Where does {who} live?|{who} lives in",
            "Where is the home of {who}?|The home of {who} is in",
            "In which town is the home of {who}?|It is in",
            "In which town does {who} live?|{who} lives in",
            "Where does {who} come from?|{who} comes from",
            "Where does {who} rent a room?|{who} rents a room in",
        ),
    ),
    "job": _called(
        "job",
        (
            "{who} is a {value}.",
            "{who} works as a {value}.",
            "The job of {who} is to be a {value}.",
            "{who} earns money as a {value}.",
            "{who} has become a {value}.",
            "{who} is learning to be a {value}.",
            "{who} wants to stay a {value}.",
        ),
        (
            "What is {who}'s job?|{who} is a",
            "What does {who} do for work?|{who} works as a",
            "What is the job of {who}?|It is to be a",
            "What has {who} become?|{who} has become a",
            "What is {who} learning?|{who} is learning to be a",
            "As what does {who} earn money?|{who} earns money as a",
        ),
    ),
}
_DEED = Wording(
    (
        "{who} {what}s {value}.",
        "{who} always {what}s {value}.",
        "{who} says: I {what} {value}.",
        "As for {who}: {who} {what}s {value}.",
        "{who} likes to {what} {value}.",
        "{who} wants to {what} {value}.",
    ),
    (
        "What does {who} {what}?|{who} {what}s",
        "What does {who} {what}?|It is",
        "What does {who} always {what}?|{who} always {what}s",
        "What does {who} like to {what}?|{who} likes to {what}",
        "Who knows what {who} {what}s?|{who} {what}s",
        "What will {who} {what}?|{who} will {what}",
        "Can you tell me what {who} {what}s?|{who} {what}s",
    ),
)
_NOTE = Wording(("{who}: {value}.", "{who} - {value}.", "{who} {value}."), ("|{who}:", "|{who} -"))
TRAIN: Mapping[str, Wording] = {
    **_OWN,
    **{noun: _called(noun) for noun in MORE_KINDS},
    **dict.fromkeys(("deed", "meal"), _DEED),
    **dict.fromkeys(("named", "numbered"), _called("{what}")),
    **dict.fromkeys(NOTES, _NOTE),
}
assert set(_OWN) == set(KINDS)
