"""WORDINGS_OF: how a number is told and asked for, one half for searching, one for judging."""

from tools.evaluation.recall.fillers import Split
from tools.scoring.passkey_prompts import WORDINGS, Wording

# Those of `zoo passkey` are for searching: the placements that the project comes with were found
# with the first of them.
JUDGE_WORDINGS: dict[str, Wording] = {
    "flight": Wording(
        "Attention, passengers: the flight to Lisbon is number {number}. Flight {number} leaves "
        "for Lisbon tonight.",
        "Question: What is the number of the flight to Lisbon? Answer: The flight to Lisbon is "
        "number",
    ),
    "safe": Wording(
        "The combination of the safe is {number}. Do not forget that the safe opens with "
        "{number}.",
        "Question: What is the combination of the safe? Answer: The combination of the safe is",
    ),
    "invoice": Wording(
        "The unpaid invoice has the number {number}. Please pay invoice {number} soon.",
        "Question: Which invoice is unpaid? Answer: The unpaid invoice has the number",
    ),
    "museum": Wording(
        "Exactly {number} people visited the museum last year. The museum counted {number} "
        "visitors.",
        "Question: How many people visited the museum last year? Answer: The number of people "
        "who visited the museum last year is",
    ),
    "satellite": Wording(
        "The satellite sends its signal on channel {number}. Only channel {number} carries the "
        "signal of the satellite.",
        "Question: On which channel does the satellite send its signal? Answer: The satellite "
        "sends its signal on channel",
    ),
    "warehouse": Wording(
        "The piano is stored in box {number} of the warehouse. Box {number} holds the piano.",
        "Question: In which box of the warehouse is the piano? Answer: The piano is stored in box",
    ),
}


def wordings(split: Split) -> dict[str, Wording]:
    """The wordings of a split."""
    if split == "all":
        return WORDINGS | JUDGE_WORDINGS
    return WORDINGS if split == "search" else JUDGE_WORDINGS
