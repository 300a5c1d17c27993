"""draw_facts: what is told in a story and asked for later, such as the color of Martha's kite.

There are enough values of a kind that guessing helps little: 900 numbers, a dozen colors, some 30
of the others; and several facts of a document are of one kind, so that a model must find the right
one. `KINDS` and `PEOPLE` are what is asked for in tests; in training there are `MORE_KINDS`, notes
and invented names besides, so that no list can be learned by heart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.corpus.prompts import Draw
from tools.corpus.words import NAMES, entries

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
_CONSONANTS = "bdfghjklmnprstvwz"
_OF_A_KIND = 6  # facts, beyond which there are more kinds: the fewest values are 12
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

    def values_only(self) -> "Kind":
        """These values, for something of which a person has only one."""
        return Kind(self.values)


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


_DEEDS = entries(
    """want | need | draw | sell | hate | see | collect | keep | find | clean | bring | hold | make
    | take | pull | open | show | build | paint | lift | count | fear | hear | know | offer"""
)
_MEALS = entries(
    """eat | cook | bake | order | grow | cut | serve | share | smell | steal | spill"""
)
_NAMED = entries(
    """street | school | team | song | book | boat | doll | village | river | island | horse | club
    | star | shop | ship | game | dance | hill | farm | cousin"""
)
_NUMBERED = entries("""page | house | seat | shelf | train | ticket | box | bed | gate | floor""")
# Only in training. What the first ones are called is their key. Of the last four, what is done or
# owned has many words: what counts is the word that a question has in common with a fact.
MORE_KINDS: Mapping[str, Kind] = {
    "lucky number": Kind(),
    "locker number": Kind(),
    "bus number": Kind(),
    "code word": KINDS["password"],
    "lucky word": KINDS["password"],
    "favorite color": KINDS["color"].values_only(),
    "favorite place": KINDS["town"],
    "favorite toy": Kind(_THINGS),
    "favorite drink": Kind(
        entries(
            """milk | water | tea | coffee | cocoa | juice | lemonade | cider | apple juice |
            hot milk | cold tea | orange juice | plum juice | honey water"""
        )
    ),
    "favorite animal": Kind(
        entries(
            """horses | cows | bears | foxes | wolves | frogs | owls | bees | ants | whales |
            crabs | seals | lions | zebras | swans | moles | deer | bats | sheep | pigs"""
        )
    ),
    "favorite game": Kind(
        entries(
            """chess | tennis | football | tag | cards | golf | bowling | darts | hockey |
            marbles | hide and seek | checkers | dominoes | swimming | skating"""
        )
    ),
    "birthday month": Kind(
        entries(
            """January | February | March | April | May | June | July | August | September |
            October | November | December"""
        )
    ),
    "deed": Kind(KINDS["password"].values, _DEEDS),
    "meal": Kind(KINDS["food"].values, _MEALS),
    "named": Kind(KINDS["pet"].values, _NAMED),
    "numbered": Kind(None, _NUMBERED),
}
# The shortest facts: a name and a word, or a number.
NOTES: Mapping[str, Kind] = {"note": KINDS["password"], "numbered note": Kind()}


_TAKEN = frozenset(
    (*NAMES, *PEOPLE, *(value for kind in KINDS.values() for value in kind.values or ()))
)


def draw_facts(
    draw: Draw,
    count: int,
    *,
    kinds: Mapping[str, Kind] = KINDS,
    people: Sequence[str] = PEOPLE,
) -> list[Fact]:
    """Facts of a document: of one to three kinds, of more if they are many, about some people.

    No two are about the same thing of the same person, and no two of a kind have one value.
    """
    some = draw.several(list(kinds), min(max(1 + draw.below(3), count // _OF_A_KIND), len(kinds)))
    who = draw.several(people, min(count + draw.below(3), len(people)))
    facts: list[Fact] = []
    while len(facts) < count:
        name = draw.one(some)
        kind = kinds[name]
        value = str(100 + draw.below(900)) if kind.values is None else draw.one(kind.values)
        fact = Fact(name, draw.one(who), draw.one(kind.whats), value)
        if not any(_clash(fact, other) for other in facts):
            facts.append(fact)
    return facts


def invent_names(draw: Draw, count: int) -> list[str]:
    """Different names of two or three syllables that nobody has, such as Bamo and Tilura."""
    names: dict[str, None] = {}
    while len(names) < count:
        parts = 2 + draw.below(2)
        name = "".join(draw.one(_CONSONANTS) + draw.one("aeiou") for _ in range(parts))
        if name.capitalize() not in _TAKEN:
            names[name.capitalize()] = None
    return list(names)


def _clash(one: Fact, other: Fact) -> bool:
    same = one.kind == other.kind
    return same and ((one.who, one.what) == (other.who, other.what) or one.value == other.value)
