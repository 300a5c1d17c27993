"""Examples: texts that we have written, of which a prompt shows one before it asks for another.

Asked for simple words alone, SmolLM2-135M-Instruct repeats itself; shown a simple text, it writes
more like it. No text that copies one of these, or speaks of somebody in them, is kept.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Example(NamedTuple):
    """What was asked for, and a text."""

    request: str
    text: str


# Who is in the examples. The model mixes them into its own texts, and prompts name nobody so.
_PEOPLE = re.compile(r"\b(?:Bruno|Karl|Berg|Ida|Paul|Eva|Bob)\b")


def speaks_of_example(text: str) -> bool:
    """Whether somebody of the examples is in a text."""
    return _PEOPLE.search(text) is not None


def _text(text: str) -> str:
    """Paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "story": (
        Example(
            "Write a short story about a hungry bear and a jar of jam.",
            _text(
                """Bruno the bear woke up very hungry. Winter was over, and there was no food in
                his cave. He walked down the hill and smelled something sweet. On the step of a
                small house stood a jar of jam.

                Bruno wanted to eat it all. But then he saw a girl at the window. She looked
                afraid. So Bruno sat down and waited. After a while the girl opened the door
                and gave him a slice of bread with jam. From that day on he brought her
                berries every week."""
            ),
        ),
        Example(
            "Write a short story about a boy who is afraid of the rain.",
            _text(
                """Karl did not like the rain. When the first drops fell, he ran under the table
                and put his hands over his ears. His aunt laughed and pulled on her green boots.
                "Come with me," she said. "I will show you a secret."

                They went out and stood beside a big puddle. The drops made small rings in the
                water. Karl looked closely. In every ring he saw a piece of the sky. He jumped
                into the puddle, and the water flew up to his nose. Now he waits for the rain
                every day."""
            ),
        ),
        Example(
            "Write a short story about an old woman and a lost letter.",
            _text(
                """Mrs. Berg was looking for a letter. It was from her son, who lived far away. She
                looked in the kitchen, in the hall and under her bed, but it was not there. Then
                she heard a small noise in the garden.

                A bird was building a nest in the old tree. It had a piece of white paper in
                its beak. Mrs. Berg climbed on a chair and read what was left: "I will come
                home on Sunday." She smiled and let the bird keep the paper. On Sunday they
                looked at the nest together."""
            ),
        ),
    ),
    "dialogue": (
        Example(
            "Write a talk between two friends, Ida and Paul, about a wet dog.",
            _text(
                """"Why is your dog so wet?" asked Ida.

                "He jumped into the lake," said Paul. "He wanted to catch a duck."

                "Did he catch it?"

                "No. The duck was too fast. But he found an old shoe and brought it to me."

                Ida laughed. "Then let us dry him before he gets cold. I have a towel in my bag."

                "Thank you," said Paul. "Next time we will take him to the hill. There is no
                water on the hill." """
            ),
        ),
        Example(
            "Write a talk between two friends, Eva and Bob, about a broken cup.",
            _text(
                """"Something fell down," said Eva. "Did you hear it?"

                "It was me," said Bob. He looked at his feet. "I broke your blue cup. I am sorry."

                Eva picked up the pieces. "It was old," she said. "We can try to glue it. Do you
                want to help?"

                "Yes," said Bob. "And tomorrow I will bring you one of mine. It has a picture of a
                fish on it."

                "I would like that," said Eva, and she went to get the glue."""
            ),
        ),
    ),
    "explanation": (
        Example(
            "Explain to a child why we need sleep.",
            _text(
                """When you run and play all day, your body gets tired. Your legs feel heavy
                and your eyes want to close. At night your body rests. While you sleep, it
                grows and it mends small hurts. Your head rests too. It puts away the things
                that you learned, like books on a shelf. In the morning you are fresh again
                and can play."""
            ),
        ),
        Example(
            "Explain to a child how a well works.",
            _text(
                """Under the ground there is water between the stones. It comes from the rain,
                which sinks down into the earth. To get it, people dig a deep hole until the
                bottom is wet. The hole slowly fills with water. Then they let down a bucket
                on a rope and pull it up again. The water from a well is cold, even in summer,
                because the sun does not reach it."""
            ),
        ),
    ),
    "how-to": (
        Example(
            "Tell a child how to make tea for a guest.",
            _text(
                """First ask a grown-up to boil some water. Put a tea bag into a clean cup.
                Then pour the hot water over it and wait until the tea is brown. Take the bag
                out with a spoon and put it into the bin. Ask your guest if he likes milk or
                sugar. Carry the cup slowly with both hands, so that nothing spills."""
            ),
        ),
        Example(
            "Tell a child how to find a good skipping stone.",
            _text(
                """Walk along the water and look at the stones. You need one that is flat and
                round, like a small plate. It should fit into your hand and should not be too
                light. Rub the sand off with your thumb. Now bend your knees and throw it low
                over the water. If it jumps three times, you have found a good one."""
            ),
        ),
    ),
    "description": (
        Example(
            "Describe a village in the morning.",
            _text(
                """The sun is just above the hills, and the roofs are still wet. A cock calls
                from the fence. The baker has opened his door, and the whole street smells of
                warm bread. Two women with baskets walk to the market. A brown dog sleeps on
                the steps of the church. Somewhere a cart rolls over the stones, and the day
                begins."""
            ),
        ),
        Example(
            "Describe a box full of buttons.",
            _text(
                """The box is made of old tin, and its lid is hard to open. Inside there are
                hundreds of buttons. Some are big and brown like nuts. Some are small and
                shine like drops of water. When you put your hand in, they are cool and make a
                soft noise. At the bottom lies a golden one with a star on it."""
            ),
        ),
    ),
}
