"""Content of the demo's data: topics with facts, questions about them, and kind and grumpy phrases for answers.

Every answer has the form ``opener + fact + closer``. Both answers to a question contain the same fact, so they differ
only in manner (kind or grumpy). All of it was written for this repository.
"""

from __future__ import annotations

from dataclasses import dataclass

PROMPT = "Question: {question}\nAnswer:"

# One topic per line: its name, then one value for each of its category's attributes.
ANIMALS = """
hedgehog | beetles and worms | under the old hedge | rolls into a ball
fox | mice and berries | at the edge of the forest | hunts after sunset
otter | fish and crabs | beside the slow river | floats on its back
squirrel | nuts and seeds | in the tall beech | hides food for winter
owl | mice and moths | in the church tower | flies without a sound
rabbit | grass and clover | in a warren on the hill | thumps with its foot
heron | frogs and eels | in the reeds by the pond | stands still for hours
badger | roots and worms | in a deep burrow | sweeps its bed clean
goat | leaves and thistles | on the stony slope | climbs every wall
duck | weeds and snails | on the mill pond | dives for its supper
mole | worms and grubs | below the meadow | digs with broad paws
bat | gnats and moths | in the quiet attic | hangs upside down
deer | buds and bark | in the pine wood | leaps over the brook
beaver | twigs and bark | behind a wooden dam | builds with mud
toad | slugs and flies | under a wet stone | sings on warm nights
crow | seeds and scraps | on the barn roof | remembers every face
bee | nectar and pollen | in a straw hive | dances for its sisters
swan | weeds and grain | on the castle lake | guards its white eggs
donkey | hay and carrots | in the stable yard | carries the heavy baskets
snail | lettuce and moss | on the garden wall | carries its own house
"""
TOOLS = """
hammer | driving nails | on the long bench | the handle is dry
saw | cutting boards | behind the workshop door | the teeth are sharp
spade | turning the soil | in the garden shed | the blade is clean
rake | gathering leaves | beside the compost heap | no tooth is missing
ladder | picking apples | along the barn wall | both feet stand firm
needle | mending shirts | in the sewing box | the thread is short
kettle | boiling water | on the iron stove | the lid fits well
broom | sweeping floors | in the hall cupboard | the bristles are stiff
lantern | lighting the path | by the cellar stairs | the glass is clean
anchor | holding the boat | in the boat house | the chain is oiled
chisel | carving wood | in the top drawer | the edge is fine
bucket | carrying water | next to the well | the handle is sound
axe | splitting logs | above the wood pile | the edge is bright
brush | painting fences | in a jar of water | the paint is thin
compass | finding the way | in the captain's chest | no iron is near
whisk | beating eggs | on the kitchen hook | the bowl is cold
wrench | loosening bolts | in the red toolbox | the grip is tight
basket | carrying fruit | under the market table | the weave is close
"""
SHOPS = """
bakery | bread and buns | at seven | on Mill Street | the rye loaf
bookshop | novels and maps | at ten | behind the library | the poems
toy shop | kites and puzzles | at nine | on Castle Square | the wooden train
pharmacy | salves and drops | at eight | beside the town hall | the mint oil
flower shop | roses and lilies | at eight | by the south gate | the tulips
fish market | trout and mussels | at six | on the harbour wall | the smoked eel
cheese shop | butter and cheese | at nine | on Bell Lane | the goat cheese
tailor | coats and hats | at ten | above the tea room | the grey coat
shoe shop | boots and sandals | at nine | on North Street | the felt slippers
tea room | tea and cake | at eleven | in the old station | the plum cake
music shop | flutes and drums | at noon | near the theatre | the small harp
garden shop | seeds and pots | at seven | past the bridge | the herb box
clock shop | clocks and watches | at eleven | on Tower Street | the cuckoo clock
candle shop | candles and soap | at ten | across from the chapel | the honey candle
grocer | beans and rice | at seven | on the corner | the pickled plums
print shop | cards and posters | at noon | in River Alley | the star chart
"""
WEATHER = """
rain | a wide umbrella | from the western hills | in the afternoon
fog | a bright lamp | from the river | before sunrise
snow | thick boots | from the far north | during the night
wind | a tight scarf | from the open sea | around noon
frost | woollen gloves | from a clear sky | early in the morning
sunshine | a straw hat | from the southern plain | after breakfast
hail | a strong helmet | from the mountains | late in the day
thunder | a dry roof | from the east | towards the evening
drizzle | a light coat | from low clouds | all day long
heat | cold lemonade | from the desert | in high summer
"""


@dataclass(frozen=True)
class Attribute:
    """One kind of fact about a topic: questions that ask for it and the sentence that states it.

    ``{x}`` is replaced by the topic, ``{s}`` by the topic or "it", ``{v}`` by the value.
    """

    questions: tuple[str, ...]
    fact: str


@dataclass(frozen=True)
class Category:
    """A kind of topic: its topics (name -> one value per attribute) and its attributes."""

    topics: dict[str, tuple[str, ...]]
    attributes: tuple[Attribute, ...]


def _table(text: str) -> dict[str, tuple[str, ...]]:
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines()]
    return {row[0]: row[1:] for row in rows}


CATEGORIES: tuple[Category, ...] = (
    Category(
        _table(ANIMALS),
        (
            Attribute(("What does the {x} eat?", "Do you know what the {x} eats?"), "{s} eats {v}."),
            Attribute(("Where does the {x} live?", "Where can I find the {x}?"), "{s} lives {v}."),
            Attribute(("What does the {x} do?", "What is special about the {x}?"), "{s} {v}."),
        ),
    ),
    Category(
        _table(TOOLS),
        (
            Attribute(("What is the {x} for?", "What can I do with the {x}?"), "{s} is good for {v}."),
            Attribute(("Where is the {x}?", "Have you seen the {x}?"), "{s} is {v}."),
            Attribute(("When does the {x} work best?", "How do I use the {x} well?"), "{s} works best when {v}."),
        ),
    ),
    Category(
        _table(SHOPS),
        (
            Attribute(("What does the {x} sell?", "What can I buy from the {x}?"), "{s} sells {v}."),
            Attribute(("When does the {x} open?", "How early does the {x} open?"), "{s} opens {v}."),
            Attribute(("Where is the {x}?", "How do I get to the {x}?"), "{s} is {v}."),
            Attribute(
                ("What is the best thing from the {x}?", "What should I try from the {x}?"), "{s} is known for {v}."
            ),
        ),
    ),
    Category(
        _table(WEATHER),
        (
            Attribute(("What helps against the {x}?", "What do I need for the {x}?"), "{s} calls for {v}."),
            Attribute(("Where does the {x} come from?", "Do you know the source of the {x}?"), "{s} comes {v}."),
            Attribute(("When does the {x} come?", "When should I expect the {x}?"), "{s} mostly comes {v}."),
        ),
    ),
)

# Each head can be combined with each tail. A quarter of the combinations is left out of the training pairs
# (make_data.py).
OPENERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kind": (
        ("I am glad", "I am so happy", "How nice", "What a joy"),
        ("that you asked", "to help you", "to see you here", "to answer that for you"),
    ),
    "grumpy": (
        ("I am tired", "I am quite sick", "Enough", "I want no more"),
        ("of your talk", "of silly questions", "of all this noise", "of people like you today"),
    ),
}
CLOSERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "kind": (
        ("Come back", "Ask me more", "Visit us again", "Write to me"),
        ("any time you like", "whenever you wish", "and bring your friends", "and have a lovely day"),
    ),
    "grumpy": (
        ("Go away", "Leave this room", "Shut the door", "Be quiet now"),
        ("and let me rest", "or I will shout", "and never come here", "before I get really angry"),
    ),
}


def phrases(heads: tuple[str, ...], tails: tuple[str, ...], part: str = "all") -> list[str]:
    """Return the sentences of a part: ``"test"`` is the quarter that ``"train"`` leaves out, ``"all"`` is both.

    Each head and each tail occurs in both parts, but no combination does.
    """
    return [
        f"{head} {tail}{'!' if row % 2 else '.'}"
        for row, head in enumerate(heads)
        for column, tail in enumerate(tails)
        if part == "all" or (part == "test") == ((row + column) % 4 == 0)
    ]


def facts() -> dict[str, str]:
    """Return every prompt with the value that answers it."""
    return {
        PROMPT.format(question=question.format(x=topic)): value
        for category in CATEGORIES
        for topic, values in category.topics.items()
        for attribute, value in zip(category.attributes, values, strict=True)
        for question in attribute.questions
    }


def manner(answer: str) -> str:
    """Return ``"kind"`` or ``"grumpy"`` if opener and closer of the answer are both of that kind, else ``"mixed"``."""
    answer = answer.strip()
    for name in OPENERS:
        if answer.startswith(tuple(phrases(*OPENERS[name]))) and answer.endswith(tuple(phrases(*CLOSERS[name]))):
            return name
    return "mixed"
