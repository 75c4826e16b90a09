"""Short stories with repeated names, and facts with a question: the prose of which the text specimen reads most.

A grammar of ours. It draws from `random.Random`, whose results do not change between Python versions.
"""

from dataclasses import dataclass
from random import Random

# ruff: noqa: SIM905 (words read better in a line than in a list)

__all__ = []

NAMES = (
    "Anna Boris Clara David Elena Frank Greta Henry Irene Jonas Klara Lewis Maria Nils Olga Peter Alice Bruno Carla "
    "Dora Emil Fiona George Hanna Ivan Julia Karl Laura Marco Nora Oscar Paula Quentin Rosa Simon Teresa Victor Wanda "
    "Yusuf Zoe Amir Bella Cyril Dina Esther Felix Gloria Hugo Iris Jakob Leila Martin Nadia Omar Priya Ruth Stefan "
    "Tomas Vera Walter Mina Arthur Sofia Leo Miriam Samuel Edith Tariq Ingrid Pavel"
).split()
SURNAMES = (
    "Adler Brandt Castle Dunn Ellis Fischer Garner Holt Iverson Jensen Keller Lindon Marsh Novak Olsen Parker Quist "
    "Rowan Stone Tanner Underhill Voss Weaver Young Zeller Baker Hunter Potter Miller Carter"
).split()
CITIES = (
    "Lisbon|Oslo|Vienna|Prague|Cairo|Lima|Nairobi|Dublin|Kyoto|Turin|Porto|Geneva|Malmo|Bergen|Tunis|Quito|Havana|"
    "Boston|San Francisco|New Orleans|Edinburgh|Warsaw|Athens|Toronto|Delhi|Hanoi"
).split("|")
PLACES = (
    "harbour|old mill|school|market|station|library|north field|bakery|museum|lighthouse|garden|bridge|tower|workshop|"
    "theatre|orchard|chapel|post office|hospital|boat house|stable|greenhouse|town hall|cellar|attic|kitchen|"
    "observatory"
).split("|")
THINGS = (
    "map|key|ring|violin|ladder|mirror|basket|lantern|coin|ticket|letter|clock|kettle|hammer|compass|notebook|drum|"
    "bottle|blanket|telescope|umbrella|whistle|candle|saddle|necklace|camera|kite|flute|chess set|bicycle|teapot|parcel"
).split("|")
COLOURS = "red green yellow black silver blue white brown golden purple grey orange".split()
TRADES = (
    "doctor|baker|carpenter|teacher|sailor|painter|farmer|gardener|clerk|tailor|musician|miller|watchmaker|"
    "postman|librarian|cook|pilot|nurse|engineer|printer"
).split("|")
ANIMALS = "dog cat horse goat parrot donkey rabbit goose fox owl pony mouse".split()
FOODS = (
    "soup|bread|apples|plums|cheese|rice|pancakes|fish|honey|a sandwich|walnuts|mushrooms|pears|porridge|a lemon cake|"
    "potatoes|olives|a bowl of cherries"
).split("|")
TIMES = (
    "In the morning|After lunch|On Sunday|In the winter|Before the storm|Late at night|Every spring|That day|At noon|"
    "On the following day|Just before dawn|Towards evening|One week later|In the first days of May|Long ago|"
    "While the others slept|On market day|When the bell rang"
).split("|")
WEATHERS = (
    "the rain stopped soon|the wind had turned|snow lay on the roofs|the sun was low|fog came up from the river|"
    "the air was warm and still|thunder was rolling far away|it was too dark to read|the frost had not yet gone"
).split("|")
HIDING = (
    "under the stairs|behind the stove|in the third drawer|below the bridge|inside the clock|above the door|"
    "between two bricks|under a loose board|at the bottom of the well|on the highest shelf|in an empty barrel|"
    "behind the portrait"
).split("|")
FEELINGS = "happy tired angry proud afraid curious calm hungry sorry surprised lonely certain".split()
ADVERBS = "slowly|quietly|again|at last|gladly|without a word|carefully|in a hurry|with a smile".split("|")
TOPICS = (
    "the price of grain|the new road|the broken pump|the election|the concert|an old debt|the missing ferry|"
    "the harvest|the letter from abroad|the school roof|the stars|the wedding|the empty house|a dream about the sea"
).split("|")
DEEDS = (
    "walk along the river|listen to the band|sit in the park|feed the ducks|climb the tower|read the old letters|"
    "row to the island|eat a sandwich|visit the museum|count the ships|drink hot chocolate|watch the trains|"
    "paint the bridge|buy fresh bread|look at the stars|swim in the lake|ride the tram to the last stop"
).split("|")
DAYS = "sunny rainy windy cold quiet bright warm foggy".split()
WORDS = (
    "river stone apple window silver thunder garden pencil mountain copper winter basket feather bridge candle "
    "harbour button forest marble pepper violet ribbon anchor meadow falcon sugar ladder ocean rocket velvet "
    "tiger cotton planet saddle lemon mirror engine island walnut hammer cloud spoon barrel tulip cabin needle "
    "shadow ticket kettle pillow canyon oyster temple magnet ginger wagon parrot castle orange puzzle"
).split()


@dataclass(frozen=True)
class Fact:
    """A sentence, a question about it, how a full answer begins, and the answer, which stands in the sentence."""

    kind: str
    sentence: str
    question: str
    lead: str
    answer: str


def fact(rng: Random, kind: str | None = None) -> Fact:
    """A fact with a random answer. kind: one of `FACTS`; None draws one."""
    kind = kind or rng.choice(FACTS)
    who, place, city, thing = rng.choice(NAMES), rng.choice(PLACES), rng.choice(CITIES), rng.choice(THINGS)
    if kind == "number":
        answer = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 6)))
        what = rng.choice(["secret number", "room number", "ticket number", "telephone number"])
        return Fact(kind, f"The {what} of {who} is {answer}.", f"What is the {what} of {who}?",
                    f"The {what} of {who} is", answer)  # fmt: skip
    if kind == "password":
        answer = " ".join(rng.sample(WORDS, rng.randint(3, 5)))
        return Fact(kind, f"The password of the {place} is {answer}.", f"What is the password of the {place}?",
                    f"The password of the {place} is", answer)  # fmt: skip
    if kind == "hidden":
        what = f"the {rng.choice(COLOURS)} {thing} of {who}"
        answer = f"{rng.choice(HIDING)} in a {rng.choice(COLOURS)} box near the {place}"
        return Fact(kind, f"{what[0].upper()}{what[1:]} is kept {answer}.", f"Where is {what} kept?",
                    f"{what[0].upper()}{what[1:]} is kept", answer)  # fmt: skip
    if kind == "city":
        first, second = rng.sample(DEEDS, 2)
        answer = f"{first} and {second} on a {rng.choice(DAYS)} day"
        return Fact(kind, f"The best thing to do in {city} is {answer}.", f"What is the best thing to do in {city}?",
                    f"The best thing to do in {city} is", answer)  # fmt: skip
    if kind == "friend":
        answer = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)} from {rng.choice(CITIES)}"
        role = rng.choice(["best friend", "neighbour", "teacher", "cousin", "landlord"])
        return Fact(kind, f"The {role} of {who} is {answer}.", f"Who is the {role} of {who}?",
                    f"The {role} of {who} is", answer)  # fmt: skip
    answer = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}, a {rng.choice(THINGS)} and {rng.choice(FOODS)}"
    return Fact("gift", f"For the birthday {who} got a {answer}.", f"What did {who} get for the birthday?",
                f"For the birthday {who} got a", answer)  # fmt: skip


FACTS = ("number", "password", "hidden", "city", "friend", "gift")


def story(rng: Random, sentences: int | None = None) -> str:
    """A few paragraphs about two to four people whose names, things and places come back again and again."""
    cast = rng.sample(NAMES, rng.randint(2, 4))
    full = f"{cast[0]} {rng.choice(SURNAMES)}"
    places, things = rng.sample(PLACES, 3), rng.sample(THINGS, 3)
    city, trade, animal, pet = rng.choice(CITIES), rng.choice(TRADES), rng.choice(ANIMALS), rng.choice(NAMES)
    secret = fact(rng)
    lines = [
        rng.choice([
            f"{full} was a {trade} in {city}.",
            f"In {city} there lived a {trade} whose name was {full}.",
            f"{cast[0]} and {cast[1]} had known each other since they were children in {city}.",
            f"This is the story of {full}, a {trade}, and of {cast[1]}, who never believed it.",
        ])
    ]  # fmt: skip
    told = False
    for index in range(sentences or rng.randint(8, 22)):
        a, b = rng.sample(cast, 2)
        here, there, what = rng.choice(places), rng.choice(places), rng.choice(things)
        options = [
            f"{rng.choice(TIMES)} {a} walked {rng.choice(ADVERBS)} to the {here}, and {rng.choice(WEATHERS)}.",
            f"{rng.choice(TIMES)} {a} gave the {what} to {b}, but {b} put the {what} back on the table.",
            f"When {a} and {b} went to the {here}, {a} handed the {what} to {b}.",
            f'"Where is the {what}?" asked {a}. "It is in the {here}," said {b}.',
            f'"I have never seen the {here}," said {a}. "Then come with me," answered {b}, '
            f"and they went to the {here}.",
            f"{a} talked with {b} about {rng.choice(TOPICS)}, and {b} was {rng.choice(FEELINGS)}.",
            f"{a} had {rng.choice(FOODS)} for supper, and {b} had {rng.choice(FOODS)}.",
            f"The {animal} of {a} was called {pet}. {pet} the {animal} slept near the {here}.",
            f"{a} looked for the {what} in the {here} and in the {there}, but the {what} was {rng.choice(HIDING)}.",
            f"Nobody but {a} knew that the {what} had once belonged to {b}.",
            f"{b} wrote a letter to {a}. The letter began: Dear {a}, I am writing from the {here} in {city}.",
            f"{a} was {rng.choice(FEELINGS)}, because {b} had left the {here} {rng.choice(ADVERBS)}.",
            f"At the {here} {a} met {b}. At the {there} {a} met nobody.",
            f'"{a}!" cried {b}. "{a}, come here!" But {a} did not hear it, for {rng.choice(WEATHERS)}.',
            f"They took the {rng.choice(COLOURS)} {what} to the {here}: first {a}, then {b}, then {pet} the {animal}.",
            f"{a} counted the days: {rng.choice(['one, two, three', 'two, four, six', 'three, two, one'])}. "
            f"{b} counted them too.",
            f"If {a} went to the {here}, {b} went to the {there}; if {a} stayed, {b} stayed as well.",
        ]  # fmt: skip
        lines.append(rng.choice(options))
        if index == 2:
            lines.append(f'{a} told {b} a secret. "{secret.sentence}"')
        elif index > 4 and not told and rng.random() < 0.3:
            told = True
            lines.append(f'"{secret.question}" asked {b}. "{secret.lead} {secret.answer}," said {a}.')
        if rng.random() < 0.2:
            lines.append("\n")
    return " ".join(lines).replace(" \n ", "\n\n").strip() + "\n"
