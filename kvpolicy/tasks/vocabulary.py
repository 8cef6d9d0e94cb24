"""Words that samples are made of: plain English, so that any tokenizer has them in few tokens."""

from __future__ import annotations

import random
import uuid
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES: Final = _words(
    """
able amber ancient angry arctic awake bare basic bitter blank blue bold brave brief bright broad broken bronze brown
busy calm careful cheap clean clear clever close cloudy coastal cold common complete cool correct crimson curious
current daily damp dark deep dense direct distant double dry dull dusty eager early eastern easy empty equal even
exact faint fair famous fast final fine firm flat formal fresh full gentle giant glad golden grand grateful great
green grey happy hard heavy hidden high hollow honest huge humble icy idle inner jolly keen kind large late lazy light
little lively local lonely long loud lucky mild modern narrow neat new noble northern odd old open orange outer pale
patient plain polite proud public pure quick quiet rapid rare ready red rich rough round royal rural rusty sad safe
scarlet secret serious sharp short shy silent silver simple slow small smooth soft solid southern square steady steep
strange strong subtle sudden sunny sweet swift tall tame thick thin tidy tiny urban usual vague vast violet vivid warm
weak western white wide wild wise wooden yellow young
"""
)
NOUNS: Final = _words(
    """
actor anchor animal answer apple apron archive arrow artist autumn baker balcony banner barrel basket beach beacon
bell bench bicycle bird blanket boat bottle boulder branch bridge brush bucket builder butter button cabin cable
camera candle canyon captain carpet carriage castle cellar chain chair chapel cherry church circle citizen cliff clock
cloud coach coast coffee collar comet compass corner cottage cotton cousin crater creek curtain customer dancer dealer
desert desk dinner doctor donkey door dragon drawer driver eagle editor elbow engine evening falcon farmer feather
fence ferry field finger fire fisher flag flame flower flute forest fountain fox frame garden gate gift glacier glass
glove governor grape guitar hammer harbor harvest hat hawk hedge helmet hill horse hotel hunter island jacket journal
judge jungle kettle key kitchen kite ladder lake lamp lantern lawyer leader leaf lemon letter library lion lizard
magnet map market mason meadow melon merchant mirror monkey moon morning mountain museum music needle neighbor nest
novel nurse oak ocean office onion orchard otter owl painter palace paper parcel parrot path pebble pencil pepper
piano picture pillow pilot pine planet plate pocket poem pond potato prairie puppet quarry rabbit radio railway rain
ribbon river robin rocket roof rope saddle sailor salmon sandwich scarf school seed shadow sheep shelf shell ship
shirt shoe shop shore singer sister spider spoon spring stable station statue stone storm stranger street student
summer swan table tailor teacher temple tent theater thunder ticket tiger tower town train traveler treasure tree
trumpet tunnel turtle umbrella uncle valley vase village violin visitor wagon waiter wall warehouse water weaver whale
wheel willow window winter wolf worker writer yard zebra
"""
)
VERBS: Final = _words(
    """
admires answers asks avoids borrows brings builds buys calls carries catches changes checks chooses cleans climbs
closes collects copies counts covers crosses describes discovers draws drives enters explains finds finishes follows
forgets gathers gives guards guides hears helps hides holds joins keeps knows learns leaves lifts likes loses loves
makes marks measures meets mends misses moves names needs notices offers opens orders paints passes plans prepares
promises protects pulls pushes reaches reads remembers repairs reports returns saves sees sells sends serves shares
shows signs sketches studies teaches thanks touches trades tries turns uses visits waits wants washes watches wears
weighs wins writes
"""
)
NAMES: Final = _words(
    """
Ada Anton Bela Clara Davor Edith Emil Farid Greta Hanna Ilse Ivan Jonas Karin Leona Marek Nadia Nils Olga Oskar Petra
Rafael Rosa Samir Selma Tomas Ulla Vera Viktor Wanda Yusuf Zora
"""
)
TRADES: Final = _words(
    """
baker botanist carpenter cartographer chemist clockmaker composer doctor engraver geologist glassblower historian judge
locksmith mathematician painter pilot printer sculptor surveyor teacher translator violinist weaver
"""
)
PLACES: Final = ("near", "behind", "beside", "before", "beyond", "inside", "outside", "under", "above", "across from")
WORDS: Final = (*ADJECTIVES, *NOUNS, *VERBS)
"""Single words, all different."""


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words: single ones as far as they go, an adjective and a noun joined by a hyphen beyond."""
    if count <= len(WORDS):
        return rng.sample(WORDS, count)
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), min(count - len(WORDS), len(ADJECTIVES) * len(NOUNS)))
    found = [*WORDS, *(pair_of(number) for number in pairs)]
    rng.shuffle(found)
    return found


def pair_of(number: int) -> str:
    """One of the pairs of an adjective and a noun."""
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def distinct(rng: random.Random, kind: str, count: int) -> list[str]:
    """`count` different keys or values: `words` (pairs of words), `numbers` (of 7 digits) or `uuids`."""
    found: dict[str, None] = {}
    while len(found) < count:
        if kind == "words":
            made = pair_of(rng.randrange(len(ADJECTIVES) * len(NOUNS)))
        elif kind == "numbers":
            made = str(rng.randint(10**6, 10**7 - 1))
        else:
            made = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        found[made] = None
    return list(found)


def sentence(rng: random.Random) -> str:
    """A plain sentence that says nothing of importance."""
    subject, other, place = rng.sample(NOUNS, 3)
    first, second = rng.sample(ADJECTIVES, 2)
    where = f" {rng.choice(PLACES)} the {place}" if rng.random() < 0.6 else ""
    return f"The {first} {subject} {rng.choice(VERBS)} the {second} {other}{where}."
