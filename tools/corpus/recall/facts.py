"""draw_facts: what is told in a story and asked for later, such as the color of Martha's kite.

There are enough values of a kind that guessing helps little: 900 numbers, a dozen colors, some 30
of the others; and several facts of a document are of one kind, so that a model must find the right
one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.corpus.prompts import Draw
from tools.corpus.words import entries

# None of them is in the stories that prompts.py asks for.
PEOPLE = entries(
    """Martha | Victor | Clara | Simon | Alice | Henry | Julia | Oliver | Nancy | George | Laura
    | Edward | Helen | Philip | Paula | Arthur | Dora | Ralph | Emily | Walter | Stella | Conrad
    | Irene | Kevin | Hazel | Roger | Linda | Trevor | Vera | Gordon"""
)
_THINGS = entries(
    """kite | ball | hat | coat | bag | cup | boat | drum | bike | door | box | book | lamp |
    chair | scarf | bell | tent | car | blanket"""
)
_SMALL_THINGS = entries(
    """key | ring | coin | letter | map | pen | ticket | button | whistle | medal | stamp | card
    | watch | spoon"""
)
_PETS = entries("""cat | dog | rabbit | pony | parrot | turtle | goat | duck | hen""")


@dataclass(frozen=True)
class Fact:
    """One thing to remember.

    Attributes:
        kind: a key of `KINDS`.
        who: whose it is.
        what: the thing itself; "" in kinds of which a person has only one.
        value: what is asked for.
    """

    kind: str
    who: str
    what: str
    value: str


@dataclass(frozen=True)
class Kind:
    """What facts of a kind are drawn from.

    Attributes:
        values: that are asked for; None: any number of three digits.
        whats: things of a person.
    """

    values: Sequence[str] | None = None
    whats: Sequence[str] = ("",)


KINDS: Mapping[str, Kind] = {
    "number": Kind(),
    "room": Kind(),
    "password": Kind(
        entries(
            """apple | river | candle | window | pepper | tiger | garden | button | winter |
            silver | dragon | pillow | rocket | banana | carrot | castle | circle | cotton |
            dinner | finger | flower | forest | guitar | hammer | island | jacket | kitten |
            ladder | lemon | magnet | marble | melon | mirror | monkey | needle | paper | pencil
            | planet | pocket | potato"""
        )
    ),
    "color": Kind(
        entries(
            """red | blue | green | yellow | purple | pink | brown | black | white | gray |
            silver | golden"""
        ),
        _THINGS,
    ),
    "place": Kind(
        entries(
            """under the bed | behind the clock | in the blue jar | on the shelf | under the rug
            | in the drawer | behind the door | in the garden | under the lamp | in the kitchen
            | on the roof | in the barn | under the tree | in the boat | behind the curtain | in
            the red box | on the table | in the cellar | under the stairs | by the window | in
            the basket | at the school | in the shop | under the bridge | in the tower | on the
            piano | in the old shoe | behind the mirror | in the car | near the well"""
        ),
        _SMALL_THINGS,
    ),
    "pet": Kind(
        entries(
            """Pepper | Biscuit | Shadow | Coco | Ginger | Rusty | Snowy | Lucky | Buddy | Tiger
            | Honey | Muffin | Smokey | Bella | Rocky | Peanut | Toffee | Ziggy | Misty | Cookie
            | Jasper | Nugget | Pumpkin | Sunny | Domino | Waffles | Bingo | Button | Star |
            Velvet"""
        ),
        _PETS,
    ),
    "food": Kind(
        entries(
            """soup | bread | apples | pizza | rice | cake | cheese | pears | noodles | beans |
            honey | carrots | pancakes | eggs | plums | cookies | fish | corn | grapes | nuts |
            peas | butter | salad | cherries | potatoes | ice cream | oranges | lemon pie |
            tomatoes | melon"""
        )
    ),
    "town": Kind(
        entries(
            """Paris | London | Rome | Berlin | Madrid | Vienna | Oslo | Cairo | Tokyo | Delhi |
            Lima | Boston | Dublin | Prague | Athens | Lisbon | Warsaw | Moscow | Sydney |
            Toronto | Chicago | Venice | Geneva | Havana | Nairobi | Seoul | Dallas | Denver |
            Hamburg | Naples"""
        )
    ),
    "job": Kind(
        entries(
            """doctor | baker | teacher | farmer | pilot | painter | cook | nurse | singer |
            builder | sailor | driver | gardener | fireman | writer | dancer | tailor | judge |
            clown | hunter | soldier | dentist | waiter | miner | fisherman | guard | plumber |
            postman | shepherd | librarian"""
        )
    ),
}


def draw_facts(draw: Draw, count: int) -> list[Fact]:
    """Facts of a document: of one to three kinds, about some of the people.

    No two are about the same thing of the same person, and no two of a kind have one value.
    """
    kinds = draw.several(list(KINDS), 1 + draw.below(3))
    people = draw.several(PEOPLE, min(count + draw.below(3), len(PEOPLE)))
    facts: list[Fact] = []
    while len(facts) < count:
        name = draw.one(kinds)
        kind = KINDS[name]
        value = str(100 + draw.below(900)) if kind.values is None else draw.one(kind.values)
        fact = Fact(name, draw.one(people), draw.one(kind.whats), value)
        if not any(_clash(fact, other) for other in facts):
            facts.append(fact)
    return facts


def _clash(one: Fact, other: Fact) -> bool:
    same = one.kind == other.kind
    return same and ((one.who, one.what) == (other.who, other.what) or one.value == other.value)
